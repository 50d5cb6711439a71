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
    return _correlation(*_centred_ranks(np.stack([x, y, *given])))


def _centred_ranks(measures: Array) -> Array:
    """Ranks of every row of `[K, L]`, less their mean."""
    if measures.shape[1] == 0:
        return measures
    ranks = stats.rankdata(measures, axis=1)
    centred: Array = ranks - ranks.mean(1, keepdims=True)
    return centred


def _correlation(x: Array, y: Array, *given: Array) -> float:
    """`spearman` of what `_centred_ranks` made."""
    if len(x) < 3 + len(given):
        return float("nan")
    pair = np.stack([x, y])
    size = np.sqrt((pair**2).sum(1))
    if given:
        basis = np.linalg.svd(np.stack(given).T, full_matrices=False)
        held = basis[0][:, basis[1] > 1e-9 * max(basis[1][0], 1e-300)]
        pair = pair - (pair @ held) @ held.T
    left = np.sqrt((pair**2).sum(1))
    if (left <= 1e-9 * np.maximum(size, 1e-300)).any():
        return float("nan")
    return float(pair[0] @ pair[1] / (left[0] * left[1]))


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


# What is asked of a set of rewards, as a function of the ranks of its distances, errors, regrets and budgets.
# The difference is the test: above 0 where the distance foretells the regret better than the pair error does.
QUESTIONS: dict[str, Callable[[Array, Array, Array, Array], float]] = {
    "starc": lambda distance, error, regret, budget: _correlation(distance, regret),
    "error": lambda distance, error, regret, budget: _correlation(error, regret),
    "difference": lambda distance, error, regret, budget: (
        abs(_correlation(distance, regret)) - abs(_correlation(error, regret))
    ),
    "starc given error and budget": lambda distance, error, regret, budget: _correlation(
        distance, regret, error, budget
    ),
    "error given starc and budget": lambda distance, error, regret, budget: _correlation(
        error, regret, distance, budget
    ),
}


def _ask(measures: Array) -> dict[str, float]:
    """Every question's answer; `measures [4, L]` are ranked once for all of them."""
    ranks = _centred_ranks(measures)
    return {name: question(*ranks) for name, question in QUESTIONS.items()}


def answers(found: Measured, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Estimate]:
    """Every question's answer with a 95 % interval (percentiles of the crossed bootstrap); NaN below three rewards or two cells."""
    cells, cell_of = np.unique(np.array([str(cell) for cell in found.cells]), return_inverse=True)
    seeds, seed_of = np.unique(np.array([str(seed) for seed in found.seeds]), return_inverse=True)
    measures = np.stack([found.distance, found.error, found.regret, found.budget])
    if len(found) < 3 or len(cells) < 2:
        return dict.fromkeys(QUESTIONS, Estimate(np.nan, np.nan, np.nan))
    values = _ask(measures)
    generator = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in QUESTIONS}
    for _ in range(resamples):
        of_cells = generator.multinomial(len(cells), np.full(len(cells), 1 / len(cells)))
        of_seeds = generator.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)))
        again = _ask(np.repeat(measures, of_cells[cell_of] * of_seeds[seed_of], axis=1))
        for name, value in again.items():
            drawn[name].append(value)
    intervals = {}
    for name, value in values.items():
        known = np.array(drawn[name])[~np.isnan(drawn[name])]
        low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
        intervals[name] = Estimate(value, float(low), float(high))
    return intervals
