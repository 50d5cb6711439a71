"""The closed loop: label segments, learn a reward, measure its distance to the truth, train offline on it, and see what it cost.

For every teacher and label budget, several seeds at once: labels, a reward ensemble, its accuracy on held-out pairs and its STARC distance to the
true reward, a policy trained offline on the learned reward, and the regret of that policy under the true one. The question is which of the two
measures of the reward foretells the regret better.

A teacher with a budget is a cell: one folder, one piece of work of the sweep engine.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import one_hot

from rlkit2.agents import Agent, agent_class, make_agent, make_config, make_normalizer, read_config
from rlkit2.api import load_dataset
from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.normalizers import observation_statistics
from rlkit2.data.preferences import PreferenceDataset
from rlkit2.data.returns import return_statistics
from rlkit2.errors import ConfigError, DatasetError, RunError
from rlkit2.evaluation import evaluate_policy
from rlkit2.evaluation.statistics import Estimate
from rlkit2.fields import read_fields
from rlkit2.files import make_folder, write_json
from rlkit2.preferences.collecting import collect_preferences
from rlkit2.preferences.evaluation import evaluate_reward, shuffled_labels, starc_to_truth
from rlkit2.preferences.fitting import fit_reward_model
from rlkit2.preferences.options import FitOptions, RelabelOptions
from rlkit2.preferences.relabelling import relabelled_rewards
from rlkit2.preferences.teachers import ScriptedTeacher
from rlkit2.studies.rank_tests import Measured, answers
from rlkit2.sweeps import check_engine, run_folders
from rlkit2.training.groups import BatchIndices, one_intraop_thread
from rlkit2.training.run_files import read_json

Array = NDArray[np.float64]
CONSTRUCTIONS = ("shaped", "noise", "offset", "blend")
BASELINES = ("true", "zero", "constant", "random labels")
TEST_SEED = 1_000_003  # of the pairs that judge every reward; apart from all seeds of the labels
CELL, ROWS = "cell.json", "rows.json"  # of a cell's folder: what it is, and what came out
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class StudySettings:
    """Everything that decides the numbers of a study."""

    dataset: str
    teachers: tuple[str, ...] = ("oracle", "mistake", "noisy")
    budgets: tuple[int, ...] = (5, 15, 50, 150, 500)
    # rewards made from the true one beside those of the teachers, a kind with a number: see `constructed_reward`
    constructed: tuple[str, ...] = ()
    seeds: int = 5
    # steps of a segment
    length: int = 16
    # that judge every reward, labelled by the oracle
    test_pairs: int = 1000
    # of the STARC distance, and of the agent where `agent_settings` say nothing else
    discount: float = 0.97
    # what is subtracted from a learned reward, see `relabel`
    offset: str = "mean"
    # arguments of `fit_reward_model`
    reward: dict[str, Any] = field(default_factory=dict)
    agent: str = "iql"
    # fields of the agent's config
    agent_settings: dict[str, Any] = field(default_factory=dict)
    # updates of the agent
    steps: int = 5000
    batch_size: int = 256
    # that measure the regret of a policy
    episodes: int = 20
    # resamples behind the interval of a STARC distance
    bootstrap: int = 100

    def __post_init__(self) -> None:
        for name in ("seeds", "length", "test_pairs", "steps", "batch_size", "episodes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} of the study must be at least 1, not {getattr(self, name)}")
        if not self.budgets or min(self.budgets) < 2:
            raise ConfigError(f"budgets {self.budgets} of the study must be 2 labels or more")
        for teacher in self.teachers:
            ScriptedTeacher(teacher)
        for name in self.constructed:
            _construction(name)
        read_config(self.agent, self.agent_settings)
        read_fields(FitOptions, self.reward)
        read_fields(RelabelOptions, {"offset": self.offset})

    @property
    def shared(self) -> dict[str, Any]:
        """What every cell depends on, as JSON values: all but the teachers, budgets and constructions, which only say which cells there are."""
        facts = {
            name: value for name, value in asdict(self).items() if name not in ("teachers", "budgets", "constructed")
        }
        return cast(dict[str, Any], json.loads(json.dumps(facts)))

    @property
    def cells(self) -> dict[str, tuple[str, int]]:
        """Teacher and labels of every cell by the name of its folder, baselines first; random labels are as many as the largest budget."""
        baselines = [(name, max(self.budgets) if name == "random labels" else 0) for name in BASELINES]
        made = [(name, 0) for name in self.constructed]
        named = [*baselines, *made, *((teacher, budget) for budget in self.budgets for teacher in self.teachers)]
        return {f"{teacher.replace(' ', '-')}-{labels}": (teacher, labels) for teacher, labels in named}


@dataclass(frozen=True)
class StudyResult:
    """All rows of a study, one per teacher, budget and seed (and per baseline and seed).

    A row has `teacher`, `budget` (0 for baselines), `seed`, `accuracy`, `starc`, `starc_low`, `starc_high` (None where the data do not
    determine the distance), `return`, `regret` (share of the way from the reference maximum down to the reference minimum).
    """

    settings: StudySettings
    rows: list[dict[str, Any]]

    @cached_property
    def learned(self) -> list[dict[str, Any]]:
        """Rows of learned rewards with a distance."""
        made = {*BASELINES, *self.settings.constructed}
        return [row for row in self.rows if row["teacher"] not in made and row["starc"] is not None]

    @cached_property
    def constructed(self) -> list[dict[str, Any]]:
        """Rows of constructed rewards with a distance."""
        return [row for row in self.rows if row["teacher"] in self.settings.constructed and row["starc"] is not None]

    @cached_property
    def correlations(self) -> dict[str, Estimate]:
        """`rank_tests.answers` for the learned rewards: Spearman's rank correlation with the regret of the distance (`starc`) and of one minus the
        accuracy (`error`), the `difference` of their sizes (above 0 where the distance foretells the regret better), and partial ones."""
        return answers(_measured(self.learned))

    @cached_property
    def all_correlations(self) -> dict[str, dict[str, Estimate]]:
        """The same for the learned rewards, the constructed ones, and both together; a group of none is left out."""
        groups = {"learned": self.learned, "constructed": self.constructed, "all": [*self.learned, *self.constructed]}
        if not self.constructed:
            return {"learned": self.correlations}
        return {
            name: self.correlations if name == "learned" else answers(_measured(rows)) for name, rows in groups.items()
        }

    def table(self) -> list[dict[str, Any]]:
        """Means over seeds of every teacher and budget, and of the baselines."""
        keys = dict.fromkeys((row["teacher"], row["budget"]) for row in self.rows)
        found = []
        for teacher, budget in keys:
            rows = [row for row in self.rows if (row["teacher"], row["budget"]) == (teacher, budget)]
            means = {
                name: float(np.mean(known)) if (known := [row[name] for row in rows if row[name] is not None]) else None
                for name in ("accuracy", "starc", "starc_low", "starc_high", "return", "regret")
            }
            spread = (
                float(np.std([row["regret"] for row in rows], ddof=1) / np.sqrt(len(rows))) if len(rows) > 1 else None
            )
            found.append({"teacher": teacher, "budget": budget, **means, "regret_error": spread})
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""

        def plain(found: dict[str, Estimate]) -> dict[str, Any]:
            return {name: [e.value, e.low, e.high] if np.isfinite(e.value) else None for name, e in found.items()}

        return {
            "settings": asdict(self.settings),
            "spearman_with_regret": plain(self.correlations),
            "by_group": {group: plain(found) for group, found in self.all_correlations.items()},
            "table": self.table(),
            "rows": self.rows,
        }


def run_study(
    settings: StudySettings,
    out: str | os.PathLike[str],
    *,
    engine: str = "local",
    jobs: int | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress = lambda done, total: None,
) -> StudyResult:
    """Run (or resume) a study: a folder below `out/cells` for every teacher and budget, each one piece of work of the sweep engine.

    A finished cell is never computed again, so a killed study loses the cells it was in, and more teachers or budgets can be added.

    Args:
        settings: what to do.
        out: folder of the study; `study.json` is written there at the end.
        engine: `local` (processes on this machine), `ray` or `slurm`.
        jobs: cells computed at the same time (local); default: as many as there are cores.
        options: of the engine, see `rlkit2.sweeps.run_sweep`.
        progress: called with (cells done, cells in all).

    Raises:
        ConfigError: a setting is out of range, or an unknown engine. DatasetError: no reference returns, so no scale of regret.
        RunError: `out` holds a study with other settings, or a cell ended with an error; the others are done.
        KeyboardInterrupt: the same call resumes.
    """
    check_engine(engine, jobs)
    folder = Path(out).resolve()
    dataset = _load(settings.dataset)
    _claim(folder, {**settings.shared, "content_hash": dataset.spec.content_hash})
    cells = {folder / "cells" / name: cell for name, cell in settings.cells.items()}
    waiting = [cell for cell in cells if not (cell / ROWS).exists()]
    for cell in waiting:
        make_folder(cell)
        teacher, labels = cells[cell]
        write_json(cell / CELL, {"teacher": teacher, "labels": labels, "settings": settings.shared})
    ended: dict[Path, str] = {}

    def report(cell: Path, status: str) -> None:
        ended[cell] = status
        progress(len(cells) - len(waiting) + len(ended), len(cells))

    progress(len(cells) - len(waiting), len(cells))
    run_folders(study_cell, waiting, engine=engine, jobs=jobs, options=options, report=report)
    if broken := {cell: status for cell, status in ended.items() if status != "finished"}:
        cell, status = next(iter(broken.items()))
        raise RunError(f"{len(broken)} of {len(cells)} cells of the study did not finish; {cell.name}: {status}")
    result = StudyResult(settings, [row for cell in cells for row in read_json(cell / ROWS)["rows"]])
    write_json(folder / "study.json", result.to_dict())
    return result


def _claim(folder: Path, facts: dict[str, Any]) -> None:
    """Make the folder that of a study with these settings; `RunError` where it is that of another one."""
    path = folder / "settings.json"
    make_folder(folder)
    before = read_json(path) if path.exists() else facts
    changed = [name for name, value in facts.items() if before.get(name) != value]
    if changed:
        raise RunError(
            f"{folder} holds a study with another {', '.join(changed)}; give another folder, or delete that one"
        )
    write_json(path, facts)


def study_cell(folder: Path) -> str:
    """Compute the cell that `cell.json` in the folder names and write its rows beside it; what is finished is left alone."""
    if not (folder / ROWS).exists():
        cell = read_json(folder / CELL)
        with one_intraop_thread(torch.device("cpu")):
            rows = run_cell(_World(StudySettings(**cell["settings"])), cell["teacher"], cell["labels"])
        write_json(folder / ROWS, {"rows": rows})
    return "finished"


def _load(source: str) -> TransitionDataset:
    """The dataset of a study; `DatasetError` where it has no reference returns."""
    dataset = load_dataset(source)
    if dataset.spec.ref_min_score is None or dataset.spec.ref_max_score is None:
        raise DatasetError(f"{dataset.spec.id} has no reference returns; a study needs them as the scale of regret")
    return dataset


class _World:
    """What all cells of a study share: the dataset, the pairs that judge, the scale of regret."""

    def __init__(self, settings: StudySettings) -> None:
        self.settings = settings
        self.dataset = _load(settings.dataset)
        self.truth = self.dataset.rewards.double().numpy()
        self.test = collect_preferences(
            self.dataset, ScriptedTeacher(), settings.test_pairs, length=settings.length, seed=TEST_SEED
        )

    def regret(self, returns: Array) -> Array:
        """Share of the way from the reference maximum down to the reference minimum, `[S]` from `[S, E]`."""
        low, high = self.dataset.spec.ref_min_score, self.dataset.spec.ref_max_score
        assert low is not None
        assert high is not None
        return np.asarray((high - returns.mean(1)) / (high - low))


def run_cell(world: _World, teacher: str, labels: int) -> list[dict[str, Any]]:
    """The rows of one teacher and number of labels (or of one baseline), all seeds together."""
    settings, dataset = world.settings, world.dataset
    seeds = list(range(settings.seeds))
    accuracies, rewards = _learned(world, teacher, labels, seeds)
    distances = _distances(world, rewards)
    agent = train_on_rewards(settings, dataset, torch.stack([torch.from_numpy(r) for r in rewards]), seeds)
    returns = evaluate_policy(agent.policy, dataset.spec, episodes=settings.episodes).returns
    regrets = world.regret(returns)
    return [
        {
            "teacher": teacher,
            "budget": 0 if teacher in BASELINES else labels,
            "seed": seed,
            "accuracy": accuracies[k],
            "starc": distances[k]["distance"],
            "starc_low": distances[k]["low"],
            "starc_high": distances[k]["high"],
            "return": float(returns[k].mean()),
            "regret": float(regrets[k]),
        }
        for k, seed in enumerate(seeds)
    ]


def _learned(world: _World, teacher: str, count: int, seeds: list[int]) -> tuple[list[float], list[Array]]:
    """Accuracy on the judging pairs and rewards `[N]` (scaled for the agent) of every seed."""
    settings, dataset = world.settings, world.dataset
    if teacher.split(" ")[0] in CONSTRUCTIONS:
        made = [constructed_reward(teacher, dataset, world.truth, settings.discount, seed) for seed in seeds]
        found = [evaluate_reward(reward, world.test, dataset).accuracy for reward in made]
        return found, [reward / (reward.std() or 1.0) for reward in made]
    fixed = {"true": world.truth, "zero": np.zeros(len(dataset)), "constant": np.ones(len(dataset))}
    if teacher in fixed:
        accuracy = evaluate_reward(fixed[teacher], world.test, dataset).accuracy
        reward = fixed[teacher] / (fixed[teacher].std() or 1.0)
        return [accuracy] * len(seeds), [reward] * len(seeds)
    labels = [_labels(world, teacher, count, seed) for seed in seeds]
    model = fit_reward_model(labels, dataset, seeds=seeds, **settings.reward)
    parts = [model.select_seed(k) for k in range(len(seeds))]
    accuracies = [evaluate_reward(part, world.test, dataset).accuracy for part in parts]
    rewards = [relabelled_rewards(dataset, part, offset=settings.offset, normalise="std")[0].numpy() for part in parts]
    return accuracies, rewards


def _construction(name: str) -> tuple[str, float]:
    """Kind and number of a construction; `ConfigError` for what is none."""
    kind, _, number = name.partition(" ")
    try:
        size = float(number)
    except ValueError:
        size = math.nan
    if kind not in CONSTRUCTIONS or not math.isfinite(size):
        raise ConfigError(
            f"constructed reward {name!r} is unknown; write one of {', '.join(CONSTRUCTIONS)} and a number, such as 'shaped 2'"
        )
    return kind, size


def constructed_reward(name: str, dataset: TransitionDataset, truth: Array, discount: float, seed: int) -> Array:
    """A reward `[N]` made from the true one, at a distance and an accuracy that teachers do not bring together.

    `shaped x`: with a random potential of the observations whose shaping has x times the true reward's deviation (distance 0, other returns of
    segments); `noise x`: with independent noise of x deviations (distance 0 in the long run); `offset x`: plus x deviations (the accuracy stays, what
    the end of an episode is worth does not); `blend x`: turned by x degrees towards a random reward of observations and actions.
    Raises `ConfigError` for another name.
    """
    kind, size = _construction(name)
    spread = truth.std() or 1.0
    if kind == "offset":
        return truth + size * spread
    generator = torch.Generator().manual_seed(1_000_003 * seed + 17)
    if kind == "noise":
        return truth + size * spread * torch.randn(len(truth), generator=generator, dtype=torch.float64).numpy()
    here, after = dataset.observations.double(), dataset.next_observations.double()
    mean, std = here.mean(0), here.std(0).clamp(min=1e-6)
    if kind == "shaped":
        potential = _random_function(here.shape[1], generator)
        alive = (~dataset.terminations).double()
        shaping = (discount * alive * potential((after - mean) / std) - potential((here - mean) / std)).numpy()
        return truth + size * spread / (shaping.std() or 1.0) * shaping
    actions = dataset.actions
    chosen = one_hot(actions - actions.min()).double() if dataset.spec.discrete else actions.double()
    columns = torch.cat([(here - mean) / std, (chosen - chosen.mean(0)) / chosen.std(0).clamp(min=1e-6)], 1)
    other = _random_function(columns.shape[1], generator)(columns).numpy()
    other = (other - other.mean()) / (other.std() or 1.0)
    angle = math.radians(size)
    return np.asarray(math.cos(angle) * (truth - truth.mean()) / spread + math.sin(angle) * other)


def _random_function(columns: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """A smooth random function of rows `[n, columns]`."""
    first = torch.randn(columns, 32, generator=generator, dtype=torch.float64) / columns**0.5
    last = torch.randn(32, generator=generator, dtype=torch.float64)
    return lambda x: torch.tanh(x @ first) @ last


def _labels(world: _World, teacher: str, count: int, seed: int) -> PreferenceDataset:
    random = teacher == "random labels"
    asked = ScriptedTeacher("oracle" if random else teacher, beta_scale="std" if teacher == "noisy" else "none")
    found = collect_preferences(world.dataset, asked, count, length=world.settings.length, seed=seed)
    return shuffled_labels(found, seed=seed) if random else found


def _distances(world: _World, rewards: list[Array]) -> list[dict[str, Any]]:
    """STARC distance to the true reward of every seed's reward; that of zero, under which all policies are equal, is 1 by definition. A constant
    is estimated: where episodes end it pays for living on or for ending."""
    settings = world.settings
    if not any(reward.any() for reward in rewards):
        return [{"distance": 1.0, "low": None, "high": None}] * len(rewards)
    distinct = rewards if any(r is not rewards[0] for r in rewards) else rewards[:1]
    named = {f"seed {k}": reward for k, reward in enumerate(distinct)}
    found = starc_to_truth(world.dataset, named, world.truth, discount=settings.discount, bootstrap=settings.bootstrap)
    listed = list(found.values())
    return listed if len(listed) == len(rewards) else listed * len(rewards)


def train_on_rewards(
    settings: StudySettings, dataset: TransitionDataset, rewards: Tensor, seeds: Sequence[int]
) -> Agent:
    """Train all seeds in one agent, seed k on rewards `rewards[k]` `[N]`; rows and weights of a seed are those of its own run.

    Returns the agent; raises `ConfigError` where it does not fit the dataset.
    """
    kind = dataset.spec.action_kind
    cls = agent_class(settings.agent, kind)
    given = {"discount": settings.discount} if any(part.name == "discount" for part in fields(cls.config_class)) else {}
    config = make_config(settings.agent, kind, **read_config(settings.agent, given | settings.agent_settings, kind))
    mean, std = observation_statistics(dataset)
    statistics: dict[str, Tensor] = {"observation_mean": mean, "observation_std": std}
    if (discount := cls.return_discount(config)) is not None:
        returns = return_statistics(dataset, discount, rewards)
        statistics |= dict(zip(("return_mean", "return_std"), returns, strict=True))
    normalizer = make_normalizer(dataset.spec, seeds=len(seeds), **statistics)
    agent = make_agent(config, dataset.spec, seeds=list(seeds), normalizer=normalizer, cls=cls)
    agent.follow_schedule("constant", settings.steps)
    indices = BatchIndices(dataset, seeds, settings.batch_size)
    rewards = rewards.float()
    for _ in range(settings.steps):
        rows = indices.next()
        agent.update(replace(dataset.gather(rows), rewards=rewards.gather(1, rows)))
    return agent


def _measured(rows: Sequence[Mapping[str, Any]]) -> Measured:
    """The rewards of a study as the tests read them."""
    columns = [(row["starc"], 1 - row["accuracy"], row["regret"], row["budget"]) for row in rows]
    distance, error, regret, budget = np.array(columns, dtype=np.float64).reshape(-1, 4).T
    cells = tuple((row["teacher"], row["budget"]) for row in rows)
    return Measured(cells, tuple(row["seed"] for row in rows), distance, error, regret, budget)


def load_study(path: str | os.PathLike[str]) -> StudyResult:
    """Read `study.json`."""
    found = read_json(Path(path))
    settings: dict[str, Any] = {
        name: tuple(v) if name in ("teachers", "budgets", "constructed") else v for name, v in found["settings"].items()
    }
    return StudyResult(StudySettings(**settings), found["rows"])
