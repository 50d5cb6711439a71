"""What a benchmark keeps of finished trainings: one cell for an agent on a dataset, small enough to be committed, and the file of cells.

A file holds one JSON object with a cell a line, so that versions of it differ by lines:

    "settings": digest -> agent, config, data, training
    "cells": dataset, content_hash, agent, setting (a digest), version, unit, steps, seeds, runs

`seeds` maps each seed to its mean at every evaluation of `steps` and to the episodes of the last one, in `unit` (per cent of the way from a random to
an expert return where the dataset says what these are); null stands for a seed that a loss without a number ended. `runs` say when, where, with
which versions and with which code of the agent (`code_digest`) the seeds were trained, and in how many seconds.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlkit2.agents import agent_class
from rlkit2.agents.base import Agent
from rlkit2.errors import ConfigError, RunError
from rlkit2.evaluation.evaluation import json_numbers
from rlkit2.evaluation.scores import ScoreHistory, score_history
from rlkit2.files import make_folder, write_atomically
from rlkit2.training.building import stored_config
from rlkit2.training.options import DataOptions, TrainingOptions
from rlkit2.training.run import Run
from rlkit2.training.run_files import read_json

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

TRAINING = ("steps", "batch_size", "schedule", "policy_ema", "eval_every", "eval_episodes")
# of settings from before an option, where the default is another now
FORMER: dict[str, dict[str, Any]] = {"training": {"policy_ema": 0.0}, "data": {"normalize_observations": False}}
DIGITS = 3  # decimals of a score that are kept


@dataclass(frozen=True, eq=False)
class Cell:
    """The scores of an agent on a dataset, all its seeds with one setting and one version.

    `setting`: agent, config, data and training as JSON. `runs`: facts about the trainings, `seeds`, `seconds` and `code` among them.
    """

    dataset: str
    content_hash: str
    agent: str
    setting: Mapping[str, Any]
    version: str
    history: ScoreHistory
    runs: tuple[Mapping[str, Any], ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, in order."""
        return self.history.seeds

    @property
    def hours(self) -> float:
        """Hours of all its trainings, evaluations included."""
        return float(sum(run["seconds"] for run in self.runs)) / 3600

    @property
    def identity(self) -> str:
        """What two cells share that are one: their seeds belong together."""
        named = [self.dataset, self.content_hash, self.agent, digest(self.setting), self.version]
        return json.dumps(named)

    def seeds_of(self, code: str) -> tuple[int, ...]:
        """The seeds that were trained with this code of the agent."""
        return tuple(sorted(seed for run in self.runs if run["code"] == code for seed in run["seeds"]))

    def last(self, count: int) -> ScoreHistory:
        """A history whose only score is each seed's mean over the last `count` evaluations, `[S, 1]`."""
        history = self.history
        return ScoreHistory(
            history.steps[-1:], (history.per_seed[-count:].mean(axis=0)[:, None],), self.seeds, history.unit
        )

    def joined(self, other: Cell) -> Cell:
        """The seeds of both; those that both have are this cell's.

        Raises:
            ConfigError: they were evaluated at other steps, or on other numbers of episodes.
        """
        new = [index for index, seed in enumerate(other.seeds) if seed not in self.seeds]
        if not new:
            return self
        one, two = self.history, other.history
        if one.steps != two.steps or one.scores[-1].shape[1] != two.scores[-1].shape[1] or one.unit != two.unit:
            raise ConfigError(f"{self.agent} on {self.dataset}: seeds of two runs were not evaluated alike")
        seeds = (*self.seeds, *(two.seeds[index] for index in new))
        order = np.argsort(seeds)
        scores = tuple(np.concatenate([a, b[new]])[order] for a, b in zip(one.scores, two.scores, strict=True))
        history = ScoreHistory(one.steps, scores, tuple(int(seeds[index]) for index in order), one.unit)
        return replace(self, history=history, runs=(*self.runs, *_without(other.runs, self.seeds)))


def _without(runs: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[Mapping[str, Any]]:
    """The facts of runs as far as they are about other seeds than these."""
    found: list[Mapping[str, Any]] = []
    for run in runs:
        kept = [seed for seed in run["seeds"] if seed not in seeds]
        if kept:
            found.append({**run, "seeds": kept, "seconds": run["seconds"] * len(kept) / len(run["seeds"])})
    return found


def digest(setting: Mapping[str, Any]) -> str:
    """Eight digits that name a setting."""
    return hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:8]


def code_digest(cls: type[Agent]) -> str:
    """Eight digits that name the code of an agent: its file and those of the agents it is made from, without comments and docstrings."""
    files = {inspect.getfile(part) for part in cls.__mro__ if issubclass(part, Agent) and part is not Agent}
    code = "".join(_bare(Path(name).read_text()) for name in sorted(files))
    return hashlib.sha256(code.encode()).hexdigest()[:8]


def _bare(source: str) -> str:
    """Source text without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [part for part in body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def make_setting(agent: str, config: Mapping[str, Any], data: Mapping[str, Any], training: Mapping[str, Any]) -> Any:
    """Agent, config, data options and those of training that the scores depend on, as JSON."""
    named = {name: training[name] for name in TRAINING if name in training}  # a run from before an option has none
    return json.loads(json.dumps({"agent": agent, "config": config, "data": data, "training": named}))


def same_setting(stored: Mapping[str, Any], wanted: Mapping[str, Any], kind: str | None = None) -> bool:
    """Whether a stored setting is the one that is wanted: a field it does not know counts as runs from before that field have it.

    `kind`: of the actions, see `agent_class`.
    """
    if stored == wanted:
        return True
    if stored["agent"] != wanted["agent"]:
        return False
    with suppress(ConfigError, TypeError):
        one, other = (
            stored_config(agent_class(setting["agent"], kind), setting["config"]) for setting in (stored, wanted)
        )
        alike = one == other
        for name, options in (("data", DataOptions), ("training", TrainingOptions)):
            past = FORMER.get(name, {})
            alike = alike and options(**past | stored[name]) == options(**past | wanted[name])
        return bool(alike)
    return False  # a field that is no more


def cell_of_run(run: Run, agent: str, code: str) -> Cell:
    """The cell of a run that is through.

    Args:
        agent: the name it was trained by, a preset's own.
        code: digest of the agent's code.

    Raises:
        RunError: it was never evaluated.
    """
    config, manifest = run.config, run.manifest
    history = score_history(run)
    wanted, seeds = config["training"]["steps"], history.seeds
    if history.steps[-1] < wanted:  # every seed stopped before
        nothing = np.full_like(history.scores[-1], np.nan)
        history = replace(history, steps=(*history.steps, wanted), scores=(*history.scores, nothing))
    means = tuple(scores.mean(axis=1, keepdims=True) for scores in history.scores[:-1])
    history = replace(history, scores=(*means, history.scores[-1]))  # as the file keeps it
    start = manifest["starts"][-1]
    facts = {
        "seeds": list(seeds),
        "code": code,
        "seconds": manifest["seconds"],
        "finished": manifest["finished"],
        "device": start["device"],
        "processors": start["processors"],
        "python": start["python"],
        "versions": start["versions"],
        "commit": (start["git"] or {}).get("commit"),
    }
    setting = make_setting(agent, config["config"], config["data"], config["training"])
    dataset = config["dataset"]
    return Cell(dataset["id"], dataset["content_hash"], agent, setting, start["versions"]["rlkit2"], history, (facts,))


def read_cells(path: str | os.PathLike[str]) -> list[Cell]:
    """The cells of a file; none where there is no file.

    Raises:
        RunError: it is damaged.
    """
    path = Path(path)
    if not path.exists():
        return []
    content = read_json(path)
    try:
        if content["format"] != 1:
            raise RunError(f"{path} has format {content['format']}, which this version does not know; upgrade rlkit2")
        return [_read(line, content["settings"]) for line in content["cells"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path} is not a file of cells, or damaged ({type(error).__name__}: {error})") from error


def _read(line: Mapping[str, Any], settings: Mapping[str, Any]) -> Cell:
    seeds = {int(seed): values for seed, values in line["seeds"].items()}
    means = np.array([values["means"] for values in seeds.values()], dtype=np.float64)
    final = np.array([values["final"] for values in seeds.values()], dtype=np.float64)
    scores = (*(means[:, index, None] for index in range(means.shape[1] - 1)), final)
    history = ScoreHistory(tuple(line["steps"]), scores, tuple(seeds), line["unit"])
    if len(history.steps) != means.shape[1]:
        raise ValueError(
            f"{line['agent']} on {line['dataset']} has {means.shape[1]} scores at {len(history.steps)} steps"
        )
    setting = settings[line["setting"]]
    if not all(isinstance(setting[part], dict) for part in ("config", "data", "training")):
        raise ValueError(f"setting {line['setting']} is not one of agent, config, data and training")
    named = (line["dataset"], line["content_hash"], line["agent"], setting, line["version"])
    return Cell(*named, history, tuple(line["runs"]))


def write_cells(path: str | os.PathLike[str], cells: Sequence[Cell]) -> None:
    """Write a file of cells, in the order of their datasets and agents."""
    ordered = sorted(cells, key=lambda cell: (cell.dataset, cell.agent, cell.version, digest(cell.setting)))
    settings = {digest(cell.setting): cell.setting for cell in sorted(ordered, key=lambda cell: cell.agent)}
    lines = [json.dumps(_written(cell)) for cell in ordered]
    named = [f"{json.dumps(name)}: {json.dumps(setting)}" for name, setting in settings.items()]
    text = f'{{"format": 1,\n"settings": {{\n{_joined(named)}}},\n"cells": [\n{_joined(lines)}]}}\n'
    write_atomically(path, text)


def _joined(lines: Sequence[str]) -> str:
    return ",\n".join(lines) + ("\n" if lines else "")


def _written(cell: Cell) -> dict[str, Any]:
    history = cell.history
    means = np.round(history.per_seed.T, DIGITS)
    final = np.round(history.scores[-1], DIGITS)
    return {
        "dataset": cell.dataset,
        "content_hash": cell.content_hash,
        "agent": cell.agent,
        "setting": digest(cell.setting),
        "version": cell.version,
        "unit": history.unit,
        "steps": list(history.steps),
        "seeds": {
            str(seed): {"means": json_numbers(means[index]), "final": json_numbers(final[index])}
            for index, seed in enumerate(cell.seeds)
        },
        "runs": [dict(run) for run in cell.runs],
    }


def merge_cells(path: str | os.PathLike[str], cells: Sequence[Cell], *, anew: bool = False) -> list[Cell]:
    """Add cells to those of a file and return all: seeds of one cell come together; one that is there stays as it is, or goes where `anew`.

    Processes of this machine that merge into one file take turns.
    """
    path = Path(path)
    make_folder(path.parent)
    with _alone(path.parent):
        before = {cell.identity: cell for cell in read_cells(path)}
        found = dict(before)
        for cell in cells:
            known = found.get(cell.identity, cell)
            found[cell.identity] = cell.joined(known) if anew else known.joined(cell)
        if any(found[name] is not before.get(name) for name in found):
            write_cells(path, list(found.values()))
        return list(found.values())


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process of this machine is in here for the same folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
