"""Rank correlations of measures of a reward with what optimising it costs, over rewards that share cells and seeds.

A cell is one way to get a reward (a teacher with a budget, a construction), and every seed runs through all of them: the rewards of a cell have their
teacher in common, those of a seed their first weights, first pairs and random numbers. Neither are independent draws, so that intervals come from a
bootstrap that draws cells and seeds, each as a whole and independently of the other (Owen 2007, "The pigeonhole bootstrap").
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rlkit2.evaluation.statistics import Estimate

Array = NDArray[np.float64]
RESAMPLES = 2000


def spearman(x: Array, y: Array, given: Sequence[Array] = ()) -> float:
    """The rank correlation of `x [L]` with `y [L]`, or the partial one: of what the ranks of the `given` measures leave of their ranks.

    NaN where there are fewer than 3 + len(given) values or nothing is left of one of the two.
    """
    if len(x) < 3 + len(given):
        return float("nan")
    ranks = np.stack([stats.rankdata(part) for part in (x, y, *given)])
    ranks -= ranks.mean(1, keepdims=True)
    size = np.sqrt((ranks**2).sum(1))
    if given:
        basis = np.linalg.svd(ranks[2:].T, full_matrices=False)
        held = basis[0][:, basis[1] > 1e-9 * max(basis[1][0], 1e-300)]
        ranks = ranks[:2] - (ranks[:2] @ held) @ held.T
    left = np.sqrt((ranks[:2] ** 2).sum(1))
    if (left <= 1e-9 * np.maximum(size[:2], 1e-300)).any():
        return float("nan")
    return float(ranks[0] @ ranks[1] / (left[0] * left[1]))


@dataclass(frozen=True)
class Measured:
    """L rewards: their cells and seeds, a `distance`, an `error` of pairs, the `regret` of optimising them, the `budget` of labels, `[L]` each."""

    cells: tuple[Hashable, ...]
    seeds: tuple[Hashable, ...]
    distance: Array
    error: Array
    regret: Array
    budget: Array

    def __len__(self) -> int:
        return len(self.cells)

    def select(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Measured:
        """Some of the rewards, possibly again and again."""
        index = np.arange(len(self))[rows]
        return Measured(
            tuple(self.cells[i] for i in index),
            tuple(self.seeds[i] for i in index),
            *(part[index] for part in (self.distance, self.error, self.regret, self.budget)),
        )


def _plain(x: Measured) -> tuple[float, float]:
    return spearman(x.distance, x.regret), spearman(x.error, x.regret)


# What is asked of a set of rewards. The difference is the test: above 0 where the distance foretells the regret better than the pair error does.
QUESTIONS: dict[str, Callable[[Measured], float]] = {
    "starc": lambda x: _plain(x)[0],
    "error": lambda x: _plain(x)[1],
    "difference": lambda x: abs(_plain(x)[0]) - abs(_plain(x)[1]),
    "starc given error and budget": lambda x: spearman(x.distance, x.regret, (x.error, x.budget)),
    "error given starc and budget": lambda x: spearman(x.error, x.regret, (x.distance, x.budget)),
}


def answers(found: Measured, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Estimate]:
    """Every question's answer with a 95 % interval (percentiles of the crossed bootstrap); NaN below three rewards or two cells."""
    cells, cell_of = np.unique(np.array([str(cell) for cell in found.cells]), return_inverse=True)
    seeds, seed_of = np.unique(np.array([str(seed) for seed in found.seeds]), return_inverse=True)
    values = {name: ask(found) for name, ask in QUESTIONS.items()}
    if len(found) < 3 or len(cells) < 2:
        return dict.fromkeys(QUESTIONS, Estimate(np.nan, np.nan, np.nan))
    generator = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in QUESTIONS}
    for _ in range(resamples):
        of_cells = generator.multinomial(len(cells), np.full(len(cells), 1 / len(cells)))
        of_seeds = generator.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)))
        again = found.select(np.repeat(np.arange(len(found)), of_cells[cell_of] * of_seeds[seed_of]))
        for name, ask in QUESTIONS.items():
            drawn[name].append(ask(again))
    intervals = {}
    for name, value in values.items():
        known = np.array(drawn[name])[~np.isnan(drawn[name])]
        low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
        intervals[name] = Estimate(value, float(low), float(high))
    return intervals
