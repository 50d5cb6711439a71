"""Agents by datasets, each agent with its one default setting: what is finished is kept as small cells, what is missing is trained by a sweep.

No recipe is read: what is compared is what an agent does on data that nobody has tuned it for. All agents see the same networks' sizes, the same
number of updates and observations of the same scale.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit2 import __version__
from rlkit2.agents import agent_class, make_config
from rlkit2.agents.base import as_seeds
from rlkit2.api import load_dataset
from rlkit2.data.dataset import TransitionDataset
from rlkit2.envs.builtin import builtin_id
from rlkit2.errors import ConfigError, RunError
from rlkit2.evaluation import Evaluator
from rlkit2.fields import field_types
from rlkit2.files import make_folder, write_atomically
from rlkit2.nn.optim import Schedule
from rlkit2.reporting.board import Board, board_markdown, board_page
from rlkit2.reporting.cells import (
    Cell,
    cell_of_run,
    code_digest,
    make_setting,
    merge_cells,
    read_cells,
    same_setting,
)
from rlkit2.sweeps import Experiment, Sweep, run_sweep, sweep_status
from rlkit2.sweeps.engines import check_engine
from rlkit2.sweeps.experiment import find_run
from rlkit2.training.building import settled_data, settled_training
from rlkit2.training.options import DataOptions, TrainingOptions

DATASETS = ("builtin/rooms/stitch-sparse-v0", "builtin/pendulum/mixed-v0", "builtin/cartpole/mixed-v0")
AGENTS = ("bc", "bc10", "td3bc", "rebrac", "iql", "sql", "xql", "fql", "awac", "crr", "cql", "dt", "odice", "dqn")
RUNS = "runs"  # below `out`


@dataclass(frozen=True)
class Place:
    """An agent on a dataset. `refused`: why it is not trained there; `cell`: what is known of it; `missing`: the seeds that are not."""

    dataset: str
    agent: str
    setting: Mapping[str, Any]
    code: str
    refused: str | None
    cell: Cell | None
    missing: tuple[int, ...]


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark made: the board, and its files. `failed`: trainings that ended in an error, with it."""

    board: Board
    markdown: Path
    page: Path
    results: Path
    failed: Mapping[tuple[str, str], str]


def run_benchmark(
    out: str | os.PathLike[str],
    *,
    datasets: Sequence[str] = DATASETS,
    agents: Sequence[str] = AGENTS,
    seeds: int | Sequence[int] = 5,
    steps: int = 50_000,
    batch_size: int = 256,
    schedule: Schedule = "constant",
    policy_ema: float | None = None,
    hidden_sizes: Sequence[int] | None = None,
    eval_every: int | None = None,
    eval_episodes: int = 10,
    normalize_observations: bool = True,
    against: str | None = None,
    results: str | os.PathLike[str] | None = None,
    anew: bool = False,
    engine: str = "local",
    jobs: int | None = None,
    device: str = "auto",
    options: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    trust_env: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> Benchmark:
    """Train every agent on every dataset where the results do not have it yet, then write `benchmark.md` and `benchmark.html` into `out`.

    Args:
        out: folder of the runs (`out/runs`), the table and the page.
        datasets, agents: what `load_dataset` finds by name, and registered names.
        seeds: n for seeds 0 to n - 1, or the integers; those that the results have are not trained again.
        steps, batch_size, schedule, policy_ema, eval_episodes: as for `rlkit2.train`, the same for all; `policy_ema` is each agent's own by default.
        hidden_sizes: hidden layers of every network; default: each agent's own.
        eval_every: updates between evaluations; default: a tenth of the steps.
        normalize_observations: standardise them over the dataset, as `rlkit2.train` does; images are left as they are.
        against: agent that probabilities of improvement refer to; default: `bc` if it is among them, else the first.
        results: file of finished cells, made or added to as trainings end; default: `out/results.json`.
        anew: train cells again whose agent's code is not what they were trained with.
        engine, jobs, device, options: as for `rlkit2.sweeps.run_sweep`.
        dry_run: train nothing; table and page of what there is.
        trust_env: see `rlkit2.train`.
        say: told in one line what is reused, and what each training has come to.
        progress: see `rlkit2.sweeps.run_sweep`.

    Raises:
        ConfigError, DatasetError: an unknown agent, dataset or option, before anything is trained.
        EnvironmentUnavailableError: a dataset has no environment to score policies in.
        KeyboardInterrupt: what is finished is in the results; the same call continues.
    """
    check_engine(engine, jobs)
    against = against or ("bc" if "bc" in agents else next(iter(agents), ""))
    if against not in agents:
        raise ConfigError(f"the agent to hold the others against, {against!r}, is not among {', '.join(agents)}")
    if schedule == "refined":
        raise ConfigError(
            "a benchmark has one schedule for all, and a refined one comes from a run of one agent; choose constant, cosine or linear"
        )
    training = TrainingOptions(
        steps=steps,
        batch_size=batch_size,
        schedule=schedule,
        policy_ema=policy_ema,
        eval_every=max(1, steps // 10) if eval_every is None else eval_every,
        eval_episodes=eval_episodes,
    )
    if not training.eval_every:
        raise ConfigError("a benchmark needs evaluations; eval_every must be at least 1")
    data = DataOptions(normalize_observations=None if normalize_observations else False)
    named = tuple(dict.fromkeys(builtin_id(name) if name.startswith("builtin/") else name for name in datasets))
    names = tuple(dict.fromkeys(agents))
    for name in names:  # a wrong one is said first
        agent_class(name)
    opened = {name: _opened(name, trust_env) for name in named}
    make_folder(Path(out))
    file = Path(out) / "results.json" if results is None else Path(results)
    cells = read_cells(file)
    wanted = as_seeds(seeds)
    places = [
        _place(name, transitions, agent, hidden_sizes, data, training, wanted, cells, anew)
        for name, transitions in opened.items()
        for agent in names
    ]
    for line in _plan(places, file, wanted):
        say(line)
    failed: dict[tuple[str, str], str] = {}
    if not dry_run:
        engine_options = {"engine": engine, "jobs": jobs, "device": device, "options": options, "progress": progress}
        cells, failed = _train(Path(out), file, places, training, data, anew, trust_env, say, engine_options)
    shown = [_place(p.dataset, opened[p.dataset], p.agent, hidden_sizes, data, training, wanted, cells, False) for p in places]  # fmt: skip
    board = Board(
        {name: transitions.spec.action_kind for name, transitions in opened.items()},
        names,
        {(p.dataset, p.agent): p.cell or p.refused or failed.get((p.dataset, p.agent), "not trained") for p in shown},
        against,
        _command(named, names, wanted, training, hidden_sizes, normalize_observations, against, results),
        tuple(_notes(shown, wanted)),
    )
    table, sheet = Path(out) / "benchmark.md", Path(out) / "benchmark.html"
    write_atomically(table, board_markdown(board))
    write_atomically(sheet, board_page(board))
    return Benchmark(board, table, sheet, file, failed)


def _config(agent: str, dataset: TransitionDataset, hidden_sizes: Sequence[int] | None) -> Any:
    """The agent's default config for a dataset with the wanted sizes."""
    kind = dataset.spec.action_kind
    cls = agent_class(agent, kind)
    names = field_types(cls.config_class)
    sized = [name for name in names if name == "hidden_sizes"] or [n for n in names if n.endswith("hidden_sizes")]
    config = make_config(agent, kind, **({} if hidden_sizes is None else dict.fromkeys(sized, tuple(hidden_sizes))))
    config, _ = cls.settled(config, dataset)
    return config


def _opened(dataset: str, trust_env: bool) -> TransitionDataset:
    """A dataset, which must have an environment."""
    opened = load_dataset(dataset, trust_env=trust_env)
    Evaluator(opened.spec, episodes=1, trust_env=trust_env).close()
    return opened


def _place(
    dataset: str,
    transitions: TransitionDataset,
    agent: str,
    hidden_sizes: Sequence[int] | None,
    data: DataOptions,
    training: TrainingOptions,
    seeds: Sequence[int],
    cells: Sequence[Cell],
    anew: bool,
) -> Place:
    """What is known of an agent on a dataset, and what is missing; `anew`: seeds of other code are missing, too."""
    spec = transitions.spec
    kind = spec.action_kind
    cls = agent_class(agent, kind)
    config = _config(agent, transitions, hidden_sizes)
    own = settled_data(data, spec), settled_training(cls, config, training)
    fields = {name: getattr(config, name) for name in field_types(cls.config_class)}
    setting = make_setting(agent, fields, *map(dataclasses.asdict, own))
    code = code_digest(cls)
    if kind not in cls.action_kinds:
        return Place(dataset, agent, setting, code, "not for these actions", None, ())
    if cls.refusal(kind, images=bool(spec.images)) is not None:
        return Place(dataset, agent, setting, code, "not for images", None, ())
    found = [
        cell
        for cell in cells
        if (cell.dataset, cell.content_hash, cell.agent, cell.version)
        == (spec.id, spec.content_hash, agent, __version__)
        and same_setting(cell.setting, setting, kind)
    ]
    cell = found[0] if found else None
    for other in found[1:]:  # written before a field of the config existed, and since
        assert cell is not None
        cell = cell.joined(other)
    known = () if cell is None else cell.seeds_of(code) if anew else cell.seeds
    return Place(dataset, agent, setting, code, None, cell, tuple(seed for seed in seeds if seed not in known))


def _plan(places: Sequence[Place], file: Path, wanted: Sequence[int]) -> list[str]:
    """What is reused, and what is to be trained."""
    reused = Counter(place.agent for place in places if place.cell is not None and not place.missing)
    more = [place for place in places if place.cell is not None and place.missing]
    new = [place for place in places if place.refused is None and place.cell is None]
    lines = []
    if reused:
        named = ", ".join(f"{agent} on {count} dataset{'s' * (count != 1)}" for agent, count in reused.items())
        lines.append(f"reused from {file}: {named}")
    for seeds in dict.fromkeys(place.missing for place in more):
        named = ", ".join(f"{place.agent} on {place.dataset}" for place in more if place.missing == seeds)
        lines.append(f"there, but for seed {', '.join(map(str, seeds))}: {named}")
    refused = sum(place.refused is not None for place in places)
    lines.append(
        f"{len(places)} cells of {len(wanted)} seeds: {sum(reused.values())} reused, {len(new) + len(more)} to be trained, {refused} that do not fit"
    )
    return lines


def _train(
    out: Path,
    file: Path,
    places: Sequence[Place],
    training: TrainingOptions,
    data: DataOptions,
    anew: bool,
    trust_env: bool,
    say: Callable[[str], None],
    engine: Mapping[str, Any],
) -> tuple[list[Cell], dict[tuple[str, str], str]]:
    """Train what is missing, put it into the file as it comes; all cells, and the errors."""
    planned = {
        Experiment(
            place.agent,
            place.dataset,
            place.missing,
            config=dict(place.setting["config"]),
            data=dataclasses.asdict(data),
            training=dataclasses.asdict(training),
            recipes=False,
            label=f"{place.agent} {place.dataset} {__version__} {place.code}",
        ): place
        for place in places
        if place.missing
    }
    done, failed = 0, dict[tuple[str, str], str]()

    def ended(experiment: Experiment, status: str) -> None:
        nonlocal done
        place = planned[experiment]
        done += 1
        say(f"{done}/{len(planned)} {place.agent} on {place.dataset}: {status}")
        collect(experiment)

    def collect(experiment: Experiment) -> None:
        place, folder = planned[experiment], out / RUNS / experiment.folder
        status, run = sweep_status(folder), find_run(folder)
        if run is None or status not in ("finished", "failed"):
            failed[place.dataset, place.agent] = status
            return
        try:
            merge_cells(file, [cell_of_run(run, place.agent, place.code)], anew=anew)
        except (RunError, ConfigError) as error:
            failed[place.dataset, place.agent] = f"error: {error}"

    sweep = Sweep(out, RUNS, tuple(planned), trust_env)
    before = [
        experiment for experiment in planned if sweep_status(out / RUNS / experiment.folder) in ("finished", "failed")
    ]
    for experiment in before:  # trained, and not in the file yet
        collect(experiment)
    run_sweep(sweep, out=out, report=ended, **engine)
    return read_cells(file), failed


def _notes(places: Sequence[Place], wanted: Sequence[int]) -> list[str]:
    """What a reader must know: seeds beyond those asked for or missing, code that has changed since."""
    notes = []
    changed = Counter(
        p.agent for p in places if p.cell is not None and len(p.cell.seeds_of(p.code)) < len(p.cell.seeds)
    )
    if changed:
        named = ", ".join(f"{agent} ({count} cell{'s' * (count != 1)})" for agent, count in changed.items())
        notes.append(
            f"the code of these agents has changed since they were trained: {named}; --anew trains them again."
        )
    odd = [p for p in places if p.cell is not None and set(p.cell.seeds) != set(wanted)]
    if odd:
        named = ", ".join(f"{p.agent} on {p.dataset} ({len(p.cell.seeds)})" for p in odd if p.cell is not None)
        notes.append(f"cells with other seeds than the {len(wanted)} asked for: {named}.")
    return notes


def _command(
    datasets: Sequence[str],
    agents: Sequence[str],
    seeds: Sequence[int],
    training: TrainingOptions,
    hidden_sizes: Sequence[int] | None,
    normalize_observations: bool,
    against: str,
    results: str | os.PathLike[str] | None,
) -> str:
    """The command line of the same benchmark."""
    counted = list(seeds) == list(range(len(seeds)))
    words: list[object] = ["rlkit2", "benchmark", "--datasets", *datasets, "--agents", *agents]
    words += ["--seeds", len(seeds) if counted else ",".join(map(str, seeds)), "--steps", training.steps]
    words += ["--batch-size", training.batch_size, "--eval-every", training.eval_every]
    words += ["--eval-episodes", training.eval_episodes, "--against", against]
    words += [] if training.schedule == "constant" else ["--schedule", training.schedule]
    words += [] if training.policy_ema is None else ["--policy-ema", training.policy_ema]
    words += [] if hidden_sizes is None else ["--hidden-sizes", *hidden_sizes]
    words += [] if normalize_observations else ["--no-normalize-observations"]
    words += [] if results is None else ["--results", results]
    return shlex.join(map(str, words))
