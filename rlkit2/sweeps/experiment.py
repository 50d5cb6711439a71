"""What a sweep file says: the runs, each with a folder of its own that only its settings decide.

name = "pendulum"                     # folder below `out`; default: the name of the file
[base]                                # what all runs share, in the words of a recipe
agent = "bc"
dataset = "builtin/pendulum"
seeds = 4                             # a number, or a list of seeds
loggers = ["tensorboard"]             # beside the files that are always written
recipes = false                       # what is not given comes from the defaults, never from a shipped recipe
[base.config]                         # [base.data], [base.training] and [base.reading] likewise
hidden_sizes = [64, 64]
[grid]                                # every combination of these
agent = ["bc", "iql"]
"config.learning_rate" = [1e-3, 3e-4]
[[runs]]                              # and these, one by one
agent = "odice"
config.lambda_ = 0.7

In place of a grid and of runs, a search chooses:

[search]
metric = "min:policy/loss"            # as for --stop-when
trials = 20
method = "random"                     # or "optuna", which learns from the trials before
seed = 0
batch = 4                             # trials that are chosen together
prune = [1000, 3000]                  # steps at which trials that are worse than the median of all so far end
[search.space]
"config.learning_rate" = { low = 1e-4, high = 1e-2, log = true }
"config.hidden_sizes" = [[64, 64], [256, 256]]
"""

from __future__ import annotations

import copy
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rlkit2.agents import agent_classes, make_config, read_config
from rlkit2.agents.base import as_seeds
from rlkit2.data.known_environments import check_named_id
from rlkit2.errors import ConfigError, RunError
from rlkit2.fields import field_types, read_fields
from rlkit2.sweeps.space import SAMPLERS, Space, read_space
from rlkit2.toml import read_toml
from rlkit2.training import Run
from rlkit2.training.loggers import check_names
from rlkit2.training.options import SECTIONS as OPTIONS
from rlkit2.training.options import TrainingOptions
from rlkit2.training.run_files import read_json
from rlkit2.training.selection import Goal, read_goal

MOST_TRIALS = 100_000

SECTIONS = ("config", *OPTIONS)
NAMES = ("agent", "dataset", "seeds", "env", "loggers", "recipes")
TAIL = 65_536  # bytes at the end of a log in which its last line begins
ENDED = "ended.json"  # in a run's folder of a sweep: how the last attempt ended


@dataclass(frozen=True, eq=False)
class Experiment:
    """One run of a sweep, in the words of `rlkit2.train`; `label` says what sets it apart from the others."""

    agent: str
    dataset: str
    seeds: tuple[int, ...] = (0,)
    env: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    reading: dict[str, Any] = field(default_factory=dict)
    loggers: tuple[str, ...] = ()
    label: str = ""
    recipes: bool = True  # shipped ones, for what is not given

    @property
    def folder(self) -> str:
        """Name of its folder: readable, and the same for the same settings wherever the run stands in the file."""
        settings = {name: value for name, value in asdict(self).items() if name not in ("label", "loggers")}
        if not self.reading:  # a section that older files do not know
            del settings["reading"]
        if self.recipes:  # likewise
            del settings["recipes"]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        return re.sub(r"[^A-Za-z0-9._=]+", "-", f"{self.label or self.agent} {digest}").strip("-")


@dataclass(frozen=True)
class Search:
    """What is searched for and how. `steps`: updates of a whole trial; `base`: what all trials share."""

    goal: Goal
    space: Space
    trials: int
    method: str
    seed: int
    batch: int
    prune: tuple[int, ...]
    steps: int
    base: Mapping[str, Any]


@dataclass(frozen=True)
class Sweep:
    """The experiments of a file, or its search, which makes them; `trust_env`: environments are built as it and its datasets say."""

    path: Path
    name: str
    experiments: tuple[Experiment, ...]
    trust_env: bool = False
    search: Search | None = None


def load_sweep(path: str | os.PathLike[str], *, trust_env: bool = False) -> Sweep:
    """Read and check a sweep file.

    Args:
        path: the file.
        trust_env: let the file, and the datasets it names, say which code to import for an environment.

    Raises:
        EnvironmentUnavailableError: the file names an environment by a module to import (`module:Env-v0`) without `trust_env`.
        ConfigError: the file is missing, no TOML, names nothing to run, or has an unknown entry, agent or field, a value of
            the wrong type, or the same run twice; the message names the run.
    """
    path = Path(path)
    content = read_toml(path, "sweep")
    try:
        _check_names(content, ("name", "base", "grid", "runs", "search"), "the file")
        search = _search(content) if "search" in content else None
        settings = [] if search else [*_grid(content.get("base", {}), content.get("grid", {})), *_listed(content)]
        if "grid" not in content and "runs" in content:
            settings = settings[1:]  # the base alone is not a run
        experiments = tuple(_experiment(values, label) for values, label in settings)
    except ConfigError as error:
        raise ConfigError(f"sweep {path}: {error}") from error
    folders = [experiment.folder for experiment in experiments]
    if len(set(folders)) < len(folders):
        twice = next(folder for folder in folders if folders.count(folder) > 1)
        raise ConfigError(f"sweep {path} holds the same run twice: {twice}")
    for experiment in experiments:
        check_named_id(experiment.env or "", f"sweep {path}", trust_env=trust_env)
    name = content.get("name", path.stem)
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w .=+-]*", name):  # a folder below `out` and nowhere else
        raise ConfigError(f"sweep {path}: name must be a plain name of a folder, not {name!r}")
    return Sweep(path, name, experiments, trust_env, search)


def trial_experiment(sweep: Sweep, number: int, values: Mapping[str, Any]) -> Experiment:
    """The run of a trial with these values.

    Raises:
        ConfigError: the values do not fit the agent; the message names the trial.
    """
    assert sweep.search is not None
    settings = copy.deepcopy(dict(sweep.search.base))
    for name, value in values.items():
        _assign(settings, name, value)
    return _experiment(settings, f"trial={number} {_label(values)}")


def _search(content: Mapping[str, Any]) -> Search:
    """The `[search]` of a file, checked as far as that goes before a trial is chosen."""
    given = content["search"]
    known = ("metric", "trials", "method", "seed", "batch", "prune", "space")
    _check_names(given, known, "search")
    if "grid" in content or "runs" in content:
        raise ConfigError("search stands in place of [grid] and [[runs]]; leave them out")
    if not isinstance(given.get("metric"), str):
        raise ConfigError('search names no metric; add metric = "min:policy/loss" or another column of metrics.csv')
    numbers = {"trials": given.get("trials", 20), "seed": given.get("seed", 0), "batch": given.get("batch", 4)}
    for name, value in numbers.items():
        low, high = (0, 2**32 - 1) if name == "seed" else (1, MOST_TRIALS)
        if type(value) is not int or not low <= value <= high:
            raise ConfigError(
                f"search: {name} must be a whole number of at least {low} and at most {high}, not {value!r}"
            )
    method, prune, base = given.get("method", "random"), given.get("prune", []), content.get("base", {})
    if method not in list(SAMPLERS):  # it may be of any type
        raise ConfigError(f"search: method must be one of {', '.join(SAMPLERS)}, not {method!r}")
    steps = TrainingOptions(**read_fields(TrainingOptions, base.get("training", {}))).steps
    if (
        not isinstance(prune, list)
        or any(type(s) is not int or not 0 < s < steps for s in prune)
        or sorted({*prune}) != prune
    ):
        raise ConfigError(f"search: prune must be rising steps below {steps}, not {prune!r}")
    space = read_space(given.get("space"))
    if "training.steps" in space:
        raise ConfigError("search: trials of unequal steps cannot be compared; leave training.steps out of the space")
    return Search(
        read_goal(given["metric"]), space, method=method, prune=tuple(prune), steps=steps, base=base, **numbers
    )


def _grid(base: Mapping[str, Any], grid: Mapping[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Every combination of the grid's values on top of the base, with its label."""
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"grid: {name} must be a list of values, not {values!r}")
    found = []
    for combination in itertools.product(*grid.values()):
        settings = copy.deepcopy(dict(base))
        for name, value in zip(grid, combination, strict=True):
            _assign(settings, name, value)
        found.append((settings, _label(dict(zip(grid, combination, strict=True)))))
    return found


def _listed(content: Mapping[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """The runs that are listed one by one, on top of the base."""
    found = []
    for run in content.get("runs", []):
        settings = copy.deepcopy(dict(content.get("base", {})))
        flat = {
            (f"{name}.{key}" if name in SECTIONS else name): entry
            for name, value in run.items()
            for key, entry in (value.items() if name in SECTIONS and isinstance(value, dict) else [("", value)])
        }
        for name, value in flat.items():
            _assign(settings, name, value)
        found.append((settings, _label(flat)))
    return found


def _assign(settings: dict[str, Any], name: str, value: Any) -> None:
    section, dot, key = name.partition(".")
    if dot:
        settings.setdefault(section, {})[key] = value
    else:
        settings[name] = value


def _label(values: Mapping[str, Any]) -> str:
    """`agent=bc learning_rate=0.001`: the last part of every name with its value."""
    return " ".join(
        str(value) if name in ("agent", "dataset") else f"{name.rpartition('.')[2]}={_text(value)}"
        for name, value in values.items()
    )


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def _experiment(settings: Mapping[str, Any], label: str) -> Experiment:
    """One run, every field checked."""
    what = f"run {label!r}" if label else "base"
    _check_names(settings, (*NAMES, *SECTIONS), what)
    for name in ("agent", "dataset"):
        if not isinstance(settings.get(name), str):
            raise ConfigError(
                f'{what} names no {name}; add {name} = "..." to [base] or {name} = ["...", "..."] to [grid]'
            )
    if not isinstance(settings.get("env", ""), str):
        raise ConfigError(f"{what}: env must be the id of an environment, not {settings['env']!r}")
    try:
        agent = settings["agent"]
        config = read_config(agent, settings.get("config", {}))
        fitting = [cls for cls in agent_classes(agent) if config.keys() <= field_types(cls.config_class).keys()]
        make_config(agent, fitting[-1].action_kinds[0], **config)
        options = {name: read_fields(cls, settings.get(name, {})) for name, cls in OPTIONS.items()}
        for name, cls in OPTIONS.items():
            cls(**options[name])
        seeds = as_seeds(settings.get("seeds", 1))
        loggers = settings.get("loggers", [])
        if not isinstance(loggers, list):
            raise ConfigError(f"loggers must be a list of names, not {loggers!r}")
        check_names(loggers)
        recipes = settings.get("recipes", True)
        if not isinstance(recipes, bool):
            raise ConfigError(f"recipes must be true or false, not {recipes!r}")
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from error
    return Experiment(
        agent,
        settings["dataset"],
        seeds,
        settings.get("env"),
        config=config,
        **options,
        loggers=tuple(loggers),
        label=label,
        recipes=recipes,
    )


def _check_names(values: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for name, value in values.items():
        if name not in known:
            close = get_close_matches(name, known, 1)
            raise ConfigError(
                f"{what} has an unknown entry {name!r}; {f'did you mean {close[0]}?' if close else 'there are ' + ', '.join(known)}"
            )
        if name in (*SECTIONS, "base", "grid", "search") and not isinstance(value, dict):
            raise ConfigError(f"{what}: {name} must be a section, not {value!r}")


def sweep_runs(out: str | os.PathLike[str], sweep: Sweep) -> dict[Experiment, Run | None]:
    """The run of every experiment below `out`, None where it has not begun or cannot be read (`sweep_status` says which)."""
    found: dict[Experiment, Run | None] = {}
    for experiment in sweep.experiments:
        try:
            found[experiment] = find_run(Path(out) / sweep.name / experiment.folder)
        except RunError:
            found[experiment] = None
    return found


def sweep_status(folder: Path) -> str:
    """How far the run in an experiment's folder is: its status, and what ended it where that was an error."""
    try:
        run = find_run(folder)
        if run is not None and run.status in ("finished", "failed", "running"):
            return run.status
    except RunError as error:
        return f"error: {error}"
    ended = str(read_json(folder / ENDED).get("status")) if (folder / ENDED).exists() else ""
    status = "not begun" if run is None else run.status
    return f"{status} ({ended})" if ended.startswith("error") else status


def find_run(folder: Path) -> Run | None:
    """The run in an experiment's folder, or None."""
    found = sorted(folder.glob("*/config.json"))
    return Run(found[-1].parent) if found else None


def steps_done(folder: Path) -> int:
    """The step of the newest checkpoint of the run in an experiment's folder; 0 without one."""
    run = find_run(folder)
    return 0 if run is None else max(run.checkpoints, default=0)


def share_done(folder: Path) -> float:
    """Which share of its updates the run in an experiment's folder has done, in [0, 1], by its last line of metrics; 1 if it has ended."""
    run = find_run(folder)
    if run is None or run.status in ("finished", "failed"):
        return float(run is not None)
    log = run.path / "metrics.jsonl"
    with log.open("rb") if log.exists() else io.BytesIO() as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        steps = re.findall(rb'"step": (\d+)', file.read())
    return min(1.0, int(steps[-1]) / run.config["training"]["steps"]) if steps else 0.0
