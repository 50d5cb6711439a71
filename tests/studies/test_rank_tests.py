"""Rank correlations, plain and partial, and intervals that know what rewards share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from rlkit2.studies.rank_tests import Measured, answers, spearman


def test_plain_correlation_is_spearmans() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.normal(size=(2, 30)).round(1)
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert np.isnan(spearman(np.ones(5), np.arange(5.0)))
    assert np.isnan(spearman(np.arange(2.0), np.arange(2.0)))


def test_partial_correlation_is_that_of_the_formula() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        z = rng.normal(size=40)
        x, y = z + rng.normal(size=40), z + rng.normal(size=40)
        a, b, c = spearman(x, y), spearman(x, z), spearman(y, z)
        assert spearman(x, y, (z,)) == pytest.approx((a - b * c) / np.sqrt((1 - b**2) * (1 - c**2)))
    assert spearman(x, y, (z, np.ones(40))) == pytest.approx(spearman(x, y, (z,)))  # a constant holds nothing
    assert np.isnan(spearman(x, y, (x,)))  # nothing of x is left


def rows(kind: str, rng: np.random.Generator, cells: int = 8, seeds: int = 6) -> Measured:
    """Regret that follows the distance and noise of each reward, of its cell, or of its seed."""
    cell, seed = np.repeat(np.arange(cells), seeds), np.tile(np.arange(seeds), cells)
    shared = {
        "reward": rng.normal(size=len(cell)),
        "cell": rng.normal(size=cells)[cell],
        "seed": rng.normal(size=seeds)[seed],
    }
    noise = rng.normal(size=len(cell))
    distance = shared[kind]
    return Measured(
        tuple(cell),
        tuple(seed),
        distance,
        noise,
        rng.normal(size=cells)[cell] if kind == "cell" else shared[kind] + rng.normal(size=len(cell)),
        np.zeros(len(cell)),
    )


def test_the_difference_is_seen_where_there_is_one() -> None:
    found = answers(rows("reward", np.random.default_rng(0)), resamples=300)
    assert found["difference"].low > 0
    assert found["starc given error and budget"].low > 0
    assert found["error given starc and budget"].low < 0 < found["error given starc and budget"].high


def test_what_rewards_share_is_no_evidence() -> None:
    """Distance and regret that are the same within a cell and independent between cells: a bootstrap of rewards sees one too often."""
    wrong = 0
    for seed in range(20):
        found = answers(rows("cell", np.random.default_rng(seed)), resamples=100)["starc"]
        wrong += not found.low < 0 < found.high
    assert wrong <= 4


def test_too_few() -> None:
    one_cell = rows("reward", np.random.default_rng(0), cells=1)
    assert all(np.isnan(value.value) for value in answers(one_cell, resamples=5).values())
    scattered = replace(rows("reward", np.random.default_rng(0), cells=4, seeds=1), seeds=(0, 1, 2, 3))
    found = answers(scattered, resamples=200)["starc"]  # many of the draws hold no reward at all
    assert -1 - 1e-9 < found.low < 1
    assert found.high == pytest.approx(1)
