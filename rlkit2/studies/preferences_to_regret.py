"""The closed loop: label segments, learn a reward, measure its distance to the truth, train offline on it, and see what it cost.

For every teacher and label budget, several seeds at once: labels, a reward ensemble, its accuracy on held-out pairs and its STARC distance to the
true reward, a policy trained offline on the learned reward, and the regret of that policy under the true one. The question is which of the two
measures of the reward foretells the regret better.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from rlkit2.agents import Agent, agent_class, make_agent, make_config, make_normalizer
from rlkit2.api import load_dataset
from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.normalizers import observation_statistics
from rlkit2.data.preferences import PreferenceDataset
from rlkit2.errors import ConfigError, DatasetError
from rlkit2.evaluation import evaluate_policy
from rlkit2.evaluation.statistics import Estimate
from rlkit2.preferences.collecting import collect_preferences
from rlkit2.preferences.evaluation import evaluate_reward, shuffled_labels, starc_to_truth
from rlkit2.preferences.fitting import fit_reward_model
from rlkit2.preferences.relabelling import relabelled_rewards
from rlkit2.preferences.teachers import ScriptedTeacher
from rlkit2.training.files import read_json, write_json
from rlkit2.training.groups import BatchIndices, one_intraop_thread
from rlkit2.training.recipe import read_fields

Array = NDArray[np.float64]
BASELINES = ("true", "zero", "constant", "random labels")
TEST_SEED = 1_000_003  # of the pairs that judge every reward; apart from all seeds of the labels
Say = Callable[[str], None]


@dataclass(frozen=True)
class StudySettings:
    """Everything that decides the numbers of a study."""

    dataset: str
    teachers: tuple[str, ...] = ("oracle", "mistake", "noisy")
    budgets: tuple[int, ...] = (10, 30, 100, 300, 1000)
    seeds: int = 5
    length: int = 16  # steps of a segment
    test_pairs: int = 1000  # that judge every reward, labelled by the oracle
    discount: float = 0.95  # of the STARC distance
    offset: str = "mean"  # what is subtracted from a learned reward, see `relabel`
    reward: dict[str, Any] = field(default_factory=dict)  # arguments of `fit_reward_model`
    agent: str = "iql"
    agent_settings: dict[str, Any] = field(default_factory=dict)  # fields of the agent's config
    steps: int = 5000  # updates of the agent
    batch_size: int = 256
    episodes: int = 20  # that measure the regret of a policy
    bootstrap: int = 100  # resamples behind the interval of a STARC distance

    def __post_init__(self) -> None:
        for name in ("seeds", "length", "test_pairs", "steps", "batch_size", "episodes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} of the study must be at least 1, not {getattr(self, name)}")
        if not self.budgets or min(self.budgets) < 2:
            raise ConfigError(f"budgets {self.budgets} of the study must be 2 labels or more")
        for teacher in self.teachers:
            ScriptedTeacher(teacher)
        read_fields(agent_class(self.agent).config_class, self.agent_settings)

    @property
    def digest(self) -> str:
        """A hash of what a cell depends on: cells of studies that differ in teachers or budgets alone are shared."""
        facts = {name: value for name, value in asdict(self).items() if name not in ("teachers", "budgets")}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


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
        """Rows of learned rewards with a distance: what the correlations are about."""
        return [row for row in self.rows if row["teacher"] not in BASELINES and row["starc"] is not None]

    def correlation(self, measure: str, *, resamples: int = 2000, seed: int = 0) -> Estimate:
        """Spearman's rank correlation of a measure with the regret over learned rewards, with a 95 % bootstrap interval over rows.

        Args:
            measure: "starc", or "error" (one minus accuracy).
        """
        if len(self.learned) < 3:
            return Estimate(float("nan"), float("nan"), float("nan"))
        values = np.array([row["starc"] if measure == "starc" else 1 - row["accuracy"] for row in self.learned])
        regret = np.array([row["regret"] for row in self.learned])
        generator = np.random.default_rng(seed)
        drawn = generator.integers(len(values), size=(resamples, len(values)))
        samples = [_spearman(values[rows], regret[rows]) for rows in drawn]
        low, high = np.nanquantile(samples, [0.025, 0.975])
        return Estimate(_spearman(values, regret), float(low), float(high))

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
        correlations = {
            name: [e.value, e.low, e.high] if np.isfinite(e.value) else None
            for name in ("starc", "error")
            for e in [self.correlation(name)]
        }
        return {
            "settings": asdict(self.settings),
            "spearman_with_regret": correlations,
            "table": self.table(),
            "rows": self.rows,
        }


def run_study(settings: StudySettings, out: str | os.PathLike[str], *, say: Say = lambda text: None) -> StudyResult:
    """Run (or go on with) a study; every finished cell is a file in `out/cells`, so a killed study loses one cell at most.

    Args:
        settings: what to do.
        out: folder of the study; `study.json` is written there at the end.
        say: told about every cell.

    Raises:
        ConfigError: a setting is out of range. DatasetError: no reference returns, so that there is no scale of regret.
    """
    folder = Path(out)
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    cells = [*((name, 0) for name in BASELINES), *((t, b) for b in settings.budgets for t in settings.teachers)]
    world: _World | None = None
    rows: list[dict[str, Any]] = []
    for number, (teacher, budget) in enumerate(cells, 1):
        path = folder / "cells" / f"{teacher.replace(' ', '-')}-{budget}-{settings.digest}.json"
        if not path.exists():
            say(f"{number}/{len(cells)}: {teacher}" + (f", {budget} labels" if budget else ""))
            world = world or _World(settings)
            write_json(path, {"rows": run_cell(world, teacher, budget)})
        rows += read_json(path)["rows"]
    result = StudyResult(settings, rows)
    write_json(folder / "study.json", result.to_dict())
    return result


class _World:
    """What all cells of a study share: the dataset, the pairs that judge, the scale of regret."""

    def __init__(self, settings: StudySettings) -> None:
        self.settings = settings
        self.dataset = load_dataset(settings.dataset)
        spec = self.dataset.spec
        if spec.ref_min_score is None or spec.ref_max_score is None:
            raise DatasetError(f"{spec.id} has no reference returns; a study needs them as the scale of regret")
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


def run_cell(world: _World, teacher: str, budget: int) -> list[dict[str, Any]]:
    """The rows of one teacher and budget (or of one baseline), all seeds together."""
    settings, dataset = world.settings, world.dataset
    seeds = list(range(settings.seeds))
    accuracies, rewards = _learned(world, teacher, budget, seeds)
    distances = _distances(world, rewards)
    agent = train_on_rewards(settings, dataset, torch.stack([torch.from_numpy(r) for r in rewards]), seeds)
    returns = evaluate_policy(agent.policy, dataset.spec, episodes=settings.episodes).returns
    regrets = world.regret(returns)
    return [
        {
            "teacher": teacher,
            "budget": budget,
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


def _learned(world: _World, teacher: str, budget: int, seeds: list[int]) -> tuple[list[float], list[Array]]:
    """Accuracy on the judging pairs and rewards `[N]` (scaled for the agent) of every seed."""
    settings, dataset = world.settings, world.dataset
    fixed = {"true": world.truth, "zero": np.zeros(len(dataset)), "constant": np.ones(len(dataset))}
    if teacher in fixed:
        accuracy = evaluate_reward(fixed[teacher], world.test, dataset).accuracy
        reward = fixed[teacher] / (fixed[teacher].std() or 1.0)
        return [accuracy] * len(seeds), [reward] * len(seeds)
    labels = [_labels(world, teacher, budget, seed) for seed in seeds]
    model = fit_reward_model(labels, dataset, seeds=seeds, **settings.reward)
    parts = [model.select_seed(k) for k in range(len(seeds))]
    accuracies = [evaluate_reward(part, world.test, dataset).accuracy for part in parts]
    rewards = [relabelled_rewards(dataset, part, offset=settings.offset, normalise="std")[0].numpy() for part in parts]
    return accuracies, rewards


def _labels(world: _World, teacher: str, budget: int, seed: int) -> PreferenceDataset:
    settings = world.settings
    if teacher == "random labels":
        asked, count = ScriptedTeacher(), max(settings.budgets)
    else:
        scale = "std" if teacher == "noisy" else "none"
        asked, count = replace(ScriptedTeacher(teacher), beta_scale=scale), budget
    found = collect_preferences(world.dataset, asked, count, length=settings.length, seed=seed)
    return shuffled_labels(found, seed=seed) if teacher == "random labels" else found


def _distances(world: _World, rewards: list[Array]) -> list[dict[str, Any]]:
    """STARC distance to the true reward of every seed's reward; a trivial reward is at distance 1 of any other by definition."""
    settings = world.settings
    if all(np.ptp(reward) == 0 for reward in rewards):
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
    config = make_config(
        settings.agent, **read_fields(agent_class(settings.agent).config_class, settings.agent_settings)
    )
    mean, std = observation_statistics(dataset)
    normalizer = make_normalizer(dataset.spec, seeds=len(seeds), observation_mean=mean, observation_std=std)
    agent = make_agent(config, dataset.spec, seeds=list(seeds), normalizer=normalizer)
    indices = BatchIndices(dataset, seeds, settings.batch_size)
    rewards = rewards.float()
    with one_intraop_thread(torch.device("cpu")):
        for _ in range(settings.steps):
            rows = indices.next()
            agent.update(replace(dataset.gather(rows), rewards=rewards.gather(1, rows)))
    return agent


def _spearman(a: Array, b: Array) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(stats.spearmanr(a, b).statistic)


def load_study(path: str | os.PathLike[str]) -> StudyResult:
    """Read `study.json`."""
    found = read_json(Path(path))
    settings: dict[str, Any] = {
        name: tuple(v) if name in ("teachers", "budgets") else v for name, v in found["settings"].items()
    }
    return StudyResult(StudySettings(**settings), found["rows"])
