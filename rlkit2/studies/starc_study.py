"""Which reward distance predicts regret? The study of Skalse et al. (arXiv 2309.15257) with exact values, policies and returns.

Random processes, pairs of random rewards, and rewards on the way from one to the other: every metric's distance is correlated with the
regret of optimising one reward where the other is meant. `starc_table.csv` beside this file holds the published correlations and those
of an exact run over 384 processes, with all rewards and without those that are trivial up to 1e-6 of their size.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from rlkit2.errors import ConfigError, RunError
from rlkit2.files import make_folder, save_figure, write_atomically, write_json
from rlkit2.processes import run_jobs
from rlkit2.rewards import TabularMDP
from rlkit2.rewards.canonical import Canonicalizer
from rlkit2.rewards.norms import Norm
from rlkit2.rewards.planning import deterministic_returns, optimal_actions
from rlkit2.training.run_files import read_json

Floats = NDArray[np.float64]
FORMS: dict[str, tuple[Any, Any]] = {
    "VAL": ("val", 2),
    "VALPotential": ("val_potential", 2),
    "EPIC": ("epic", 2),
    "DARD": ("dard", 2),
    "None": ("none", 2),
    "MinimalPotential-2": ("minimal_potential", 2),
    "MinimalPotential-weighted_2": ("minimal_potential", "weighted_2"),
    "Minimal2": ("minimal", 2),
    "Minimalw2": ("minimal", "weighted_2"),
}
NORMS: dict[str, Any] = {
    "1": "l1",
    "2": "l2",
    "inf": "linf",
    "weighted_1": "weighted_l1",
    "weighted_2": "weighted_l2",
    "weighted_inf": "weighted_linf",
    "0": "none",
}
PLAIN = ("VAL", "VALPotential", "EPIC", "DARD", "None")
SHOWN = ("RANGE-RANGE", "VAL-2-2", "EPIC-2-2", "None-2-2")
_PART = 4  # processes per file of results
_TRIVIAL = 1e-6


def metrics(which: Literal["standard", "all"] = "standard") -> list[str]:
    """Names `canon-norm-distance`. `standard`: every canonical form with the same norm twice, three without normalisation for VAL and
    None, Pearson distances and `RANGE-RANGE`, 43 in all; `all`: every combination that the minimal forms have closed forms for, 237."""
    sizes = list(NORMS)[:-1]
    own = [
        ("MinimalPotential", "2"),
        ("MinimalPotential", "weighted_2"),
        ("Minimal2", "2"),
        ("Minimalw2", "weighted_2"),
    ]
    special = ["EPIC-pearson-tau", "DARD-pearson-tau", "RANGE-RANGE"]
    if which == "all":
        names = [f"{form}-{norm}-{distance}" for form in PLAIN for norm in NORMS for distance in sizes]
        return [*names, *(f"{form}-{norm}-{distance}" for form, norm in own for distance in sizes), *special]
    names = [f"{form}-{norm}-{norm}" for form in PLAIN for norm in sizes]
    names += [f"{form}-{norm}-{norm}" for form, norm in own]
    return [*names, *(f"{form}-0-{distance}" for form in ("VAL", "None") for distance in sizes[:3]), *special]


@dataclass(frozen=True)
class StudyConfig:
    """The published protocol by default: 384 processes of 32 states and 4 actions, 8 pairs each, 16 rewards on the way of each pair."""

    mdps: int = 384
    pairs: int = 8
    steps: int = 16
    states: int = 32
    actions: int = 4
    discount: float = 0.95
    seed: int = 0
    which: Literal["standard", "all"] = "standard"

    def __post_init__(self) -> None:
        if (
            min(self.mdps, self.pairs, self.steps) < 1
            or self.states < 2
            or self.actions < 2
            or not 0 <= self.discount < 1
        ):
            raise ConfigError(
                f"the study needs positive sizes, 2 states, 2 actions and a discount in [0, 1), not {self}"
            )


def random_process(rng: np.random.Generator, states: int, actions: int, discount: float) -> TabularMDP:
    """Dynamics of the study: a softmax over normal logits, those not above a threshold (1, 1.5 from 50 states, 1.8 from 100) put to -20."""
    threshold = 1.0 if states < 50 else 1.5 if states < 100 else 1.8
    logits = rng.normal(size=(states, actions, states))
    weights = np.exp(np.where(logits > threshold, logits, -20.0))
    return TabularMDP(weights / weights.sum(-1, keepdims=True), discount)


def random_reward(rng: np.random.Generator, states: int, actions: int, discount: float) -> Floats:
    """A reward of the study, `[S, A, S]`: normal; sparse (entries above 3), scaled, shifted and shaped with chances .2, .7, .3, .5."""
    reward = rng.normal(size=(states, actions, states))
    sparse, scaled, shifted, shaped = rng.random(4) < (0.2, 0.7, 0.3, 0.5)
    if sparse:
        reward = np.where(reward > 3, reward, 0.0)
    if scaled:
        reward = reward * rng.uniform(0, 10)
    if shifted:
        reward = reward + rng.uniform(0, 10)
    if shaped:
        potential = rng.normal(size=states) * rng.uniform(0, 10) + rng.uniform(0, 1)
        reward = reward + discount * potential[None, None, :] - potential[:, None, None]
    return np.asarray(reward)


@dataclass(frozen=True)
class Comparisons:
    """Of n comparisons: `distances [n, metrics]`, `regret [n]` in [0, 1] (mean of both directions), `trivial [n]`, `process [n]`."""

    distances: Floats
    regret: Floats
    trivial: NDArray[np.bool_]
    process: NDArray[np.int64]

    @classmethod
    def join(cls, parts: Sequence[Comparisons]) -> Comparisons:
        """One after the other."""
        names = ("distances", "regret", "trivial", "process")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def keep(self, rows: Any) -> Comparisons:
        """Some of the rows."""
        return Comparisons(self.distances[rows], self.regret[rows], self.trivial[rows], self.process[rows])


def compare_process(config: StudyConfig, index: int) -> Comparisons:
    """All comparisons in the process number `index`; depends on the configuration and `index` alone."""
    rng = np.random.default_rng([config.seed, index])
    mdp = random_process(rng, config.states, config.actions, config.discount)
    size = config.states, config.actions, config.discount
    ways = []
    for _ in range(config.pairs):
        start, end = random_reward(rng, *size), random_reward(rng, *size)
        ways += [start + (i / config.steps) * (end - start) for i in range(config.steps + 1)]
    rewards = torch.from_numpy(np.stack(ways)).reshape(config.pairs, config.steps + 1, *ways[0].shape)
    distances = _distances(mdp, rewards, metrics(config.which))
    advantage = Canonicalizer(mdp)(rewards)
    rms = advantage.square().mean((-2, -1)).sqrt()
    trivial = rms <= _TRIVIAL * rewards.abs().amax((-3, -2, -1))
    return Comparisons(
        distances.flatten(0, 1).numpy(),
        _regret(mdp, advantage).flatten().numpy(),
        (trivial[:, :1] | trivial[:, 1:]).flatten().numpy(),
        np.full(config.pairs * config.steps, index),
    )


def _distances(mdp: TabularMDP, rewards: Tensor, names: Sequence[str]) -> Tensor:
    """`[pairs, steps, metrics]` of the first reward to the others of `rewards [pairs, steps + 1, S, A, S]`; only an exact 0 is trivial."""
    wanted: dict[str, dict[str, list[str]]] = {}
    for name in names:
        form, norm, distance = name.split("-") if name != "RANGE-RANGE" else ("VAL", "range", "range")
        form = f"{form}-{norm}" if form == "MinimalPotential" else form
        wanted.setdefault(form, {}).setdefault(norm, []).append(distance)
    found: dict[str, Tensor] = {}
    for form, norms in wanted.items():
        canonical = Canonicalizer(mdp, FORMS[form][0], p=FORMS[form][1])
        forms, axes = canonical(rewards), canonical.axes
        for norm, distances in norms.items():
            if norm == "pearson":
                tau = mdp.dense
                centred = forms - (tau * forms).sum((-3, -2, -1), keepdim=True) / tau.sum()
                found[f"{form}-pearson-tau"] = _compare(mdp, centred, axes, "weighted_l2", ["weighted_l2"])[0] / 2
            elif norm == "range":
                found["RANGE-RANGE"] = _compare(mdp, forms, axes, "range", ["range"])[0]
            else:
                values = _compare(mdp, forms, axes, NORMS[norm], [NORMS[distance] for distance in distances])
                for distance, value in zip(distances, values, strict=True):
                    found[f"{form.partition('-')[0]}-{norm}-{distance}"] = value
    return torch.stack([found[name] for name in names], -1)


def _compare(mdp: TabularMDP, forms: Tensor, axes: int, norm: Any, distances: Sequence[Any]) -> list[Tensor]:
    """`[pairs, steps]` for each distance, of forms divided by their norm."""
    sizes = Norm(norm, mdp, legacy=True)(forms, axes)
    factors = torch.where(sizes > 0, 1 / sizes, torch.zeros_like(sizes))[(..., *[None] * axes)]
    gap = forms[:, 1:] * factors[:, 1:] - forms[:, :1] * factors[:, :1]
    return [Norm(name, mdp, legacy=True, role="distance")(gap, axes) for name in distances]


def _regret(mdp: TabularMDP, advantage: Tensor) -> Tensor:
    """`[pairs, steps]`: mean of what is lost under either reward by optimising the other, as shares of their ranges; NaN for a range of 0."""
    flat, pairs = advantage.flatten(0, 1), advantage.shape[:2]
    best, worst = (optimal_actions(mdp, forms).reshape(*pairs, -1) for forms in (flat, -flat))

    def returns(forms: Tensor, actions: Tensor) -> Tensor:
        shape = torch.Size(map(max, forms.shape[:2], actions.shape[:2]))
        rows = forms.expand(*shape, *forms.shape[2:]).flatten(0, 1), actions.expand(*shape, -1).flatten(0, 1)
        return deterministic_returns(mdp, *rows).reshape(shape)

    top = returns(advantage, best)
    ranges = top - returns(advantage, worst)
    lost = (top[:, :1] - returns(advantage[:, :1], best[:, 1:])) / ranges[:, :1]
    swapped = (top[:, 1:] - returns(advantage[:, 1:], best[:, :1])) / ranges[:, 1:]
    return ((lost + swapped) / 2).clamp(0, 1)


def run_study(
    config: StudyConfig, out: Path, *, workers: int = 1, progress: Callable[[int, int], None] | None = None
) -> StudyResult:
    """Run the study in `workers` processes and write its table, figure and comparisons to the folder `out`.

    Results are written every few processes: started again in the same folder with the same configuration, a killed study continues, to the
    same numbers. Raises `RunError` where `out` holds another study.
    """
    make_folder(out)
    settings = out / "study.json"
    if settings.exists() and read_json(settings) != asdict(config):
        raise RunError(f"{out} holds a study with other settings; give another folder, or delete it")
    write_json(settings, asdict(config))
    starts = range(0, config.mdps, _PART)
    missing = [start for start in starts if not _part(out, start).exists()]
    done = len(starts) - len(missing)
    for _ in run_jobs([(_run_part, config, start, out) for start in missing], workers):
        done += 1
        if progress is not None:
            progress(min(done * _PART, config.mdps), config.mdps)
    parts = []
    for start in starts:
        with np.load(_part(out, start), allow_pickle=False) as file:
            parts.append(Comparisons(**{key: file[key] for key in file.files}))
    result = StudyResult(config, Comparisons.join(parts))
    write_atomically(out / "table.csv", result.to_csv())
    save_figure(result.figure(), out / "distance_and_regret.svg")
    return result


def _part(out: Path, start: int) -> Path:
    return out / f"comparisons-{start:05d}.npz"


def _run_part(config: StudyConfig, start: int, out: Path) -> None:
    stop = min(start + _PART, config.mdps)
    found = Comparisons.join([compare_process(config, index) for index in range(start, stop)])
    data = io.BytesIO()
    np.savez_compressed(
        data, distances=found.distances, regret=found.regret, trivial=found.trivial, process=found.process
    )
    write_atomically(_part(out, start), data.getvalue())


@dataclass(frozen=True)
class StudyResult:
    """All comparisons of a study and the correlations of its metrics with regret."""

    config: StudyConfig
    comparisons: Comparisons

    @property
    def names(self) -> list[str]:
        """The metrics."""
        return metrics(self.config.which)

    def usable(self, *, trivial: bool) -> Comparisons:
        """Comparisons with a regret; without those of trivial rewards unless `trivial`."""
        kept = np.isfinite(self.comparisons.regret)
        return self.comparisons.keep(kept if trivial else kept & ~self.comparisons.trivial)

    def correlations(self, *, trivial: bool = False, resamples: int = 200) -> Floats:
        """`[metrics, 3]`: Pearson correlation with regret and its 95 % bootstrap interval over processes."""
        used = self.usable(trivial=trivial)
        columns = np.concatenate([used.distances, used.regret[:, None]], 1)
        kept = np.isfinite(columns).all(0)
        values = np.where(kept, np.nan_to_num(columns - np.nanmean(columns, 0)), 0.0)
        processes = np.unique(used.process)
        rng = np.random.default_rng(self.config.seed)
        drawn = rng.multinomial(len(processes), np.full(len(processes), 1 / len(processes)), resamples)
        weights = np.concatenate([np.ones((1, len(processes))), drawn])
        products = (values * values[:, -1:], values**2, values, np.ones((len(values), 1)))
        place = np.searchsorted(processes, used.process)
        xy, xx, x, n = (weights @ _sum_by(product, place, len(processes)) for product in products)
        covariance = xy / n - x * x[:, -1:] / n**2
        spread = np.sqrt(np.maximum(xx / n - (x / n) ** 2, 0))
        with np.errstate(divide="ignore", invalid="ignore"):
            found = (covariance / spread / spread[:, -1:])[:, :-1]
        found[:, ~kept[:-1]] = np.nan
        return np.stack([found[0], *np.quantile(found[1:], [0.025, 0.975], axis=0)], 1)

    def rank_correlations(self, *, trivial: bool = False) -> Floats:
        """`[metrics]`: Spearman correlation with regret."""
        used = self.usable(trivial=trivial)
        return np.array([stats.spearmanr(column, used.regret).statistic for column in used.distances.T])

    def rows(self) -> list[dict[str, Any]]:
        """One row per metric, best first: correlation without trivial rewards with interval, with them, rank, published, exact reference."""
        without, everything = self.correlations(), self.correlations(trivial=True)
        ranks, table = self.rank_correlations(), reference_table()
        found = [
            {
                "metric": name,
                "correlation": without[k, 0],
                "low": without[k, 1],
                "high": without[k, 2],
                "spearman": ranks[k],
                "with_trivial": everything[k, 0],
                **table.get(name, {}),
            }
            for k, name in enumerate(self.names)
        ]
        return sorted(found, key=lambda row: -np.nan_to_num(row["correlation"], nan=-2.0))

    def to_csv(self) -> str:
        """The rows as CSV text."""
        columns = ("metric", "correlation", "low", "high", "spearman", "with_trivial", *_COLUMNS)
        lines = [",".join(columns)]
        for row in self.rows():
            cells = [row.get(column, np.nan) for column in columns[1:]]
            lines.append(",".join([row["metric"], *("" if np.isnan(cell) else f"{cell:.4f}" for cell in cells)]))
        return "\n".join(lines) + "\n"

    def figure(self, names: Sequence[str] = SHOWN) -> Figure:
        """Distance against regret: counts of comparisons for some metrics, with the median regret of each distance."""
        used, found = self.usable(trivial=False), self.correlations(resamples=1)
        figure = Figure(figsize=(3.4 * len(names), 3.4), layout="constrained")
        for axes, name in zip(np.ravel(figure.subplots(1, len(names), sharey=True, squeeze=False)), names, strict=True):
            k = self.names.index(name)
            x = used.distances[:, k]
            axes.hexbin(x, used.regret, gridsize=40, bins="log", cmap="Blues", mincnt=1)
            edges = np.quantile(x, np.linspace(0, 1, 21))
            inside = [(x >= a) & (x <= b) for a, b in itertools.pairwise(edges)]
            axes.plot(
                [np.median(x[m]) for m in inside], [np.median(used.regret[m]) for m in inside], "C1.-", linewidth=1.2
            )
            axes.set_title(f"{name}: r = {found[k, 0]:.3f}", fontsize=10)
            axes.set_xlabel("distance")
        figure.axes[0].set_ylabel("regret (share of the range)")
        return figure


_COLUMNS = ("published", "exact_all", "exact_nontrivial")


def reference_table() -> dict[str, dict[str, float]]:
    """Metric -> published correlation and those of the exact run, NaN where there is none."""
    text = resources.files("rlkit2.studies").joinpath("starc_table.csv").read_text()
    return {
        row["metric"]: {column: float(row[column] or "nan") for column in _COLUMNS}
        for row in csv.DictReader(text.splitlines())
    }


def _sum_by(values: Floats, groups: NDArray[np.int64], count: int) -> Floats:
    out = np.zeros((count, values.shape[1]))
    np.add.at(out, groups, values)
    return out
