"""Rank correlation, regret and the order of estimates that may be doubtful or refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from rlkit2.errors import ConfigError
from rlkit2.evaluation.offline import ValueEstimate, agreement, order, rank_correlation, regret_at_k


@pytest.mark.parametrize("seed", range(5))
def test_figures_of_random_rankings(seed):
    rng = np.random.default_rng(seed)
    true, estimated = rng.normal(size=12), rng.normal(size=12)
    missing = rng.random(12) < 0.3
    estimated[missing] = np.nan
    known = ~missing
    assert rank_correlation(estimated, true) == pytest.approx(stats.spearmanr(estimated[known], true[known]).statistic)
    ranked = sorted(np.flatnonzero(known), key=lambda index: -estimated[index])
    regrets = [regret_at_k(estimated, true, k) for k in range(1, 13)]
    for k, regret in enumerate(regrets, 1):
        assert regret == pytest.approx((true.max() - max(true[ranked[:k]])) / (true.max() - true.min()))
    assert regrets == sorted(regrets, reverse=True)
    assert 0.0 <= regrets[-1] <= regrets[0] <= 1.0


def test_perfect_reversed_and_unknown_rankings():
    true = np.arange(6.0)
    assert agreement(true, true) == {"policies": 6, "rank_correlation": 1.0, "regret@1": 0.0, "regret@5": 0.0}
    assert regret_at_k(-true, true) == 1.0
    assert rank_correlation(-true, true) == -1.0
    assert math.isnan(regret_at_k(np.full(6, np.nan), true))
    assert math.isnan(rank_correlation([1.0, np.nan, 2.0], [1.0, 2.0, 3.0]))  # two policies have no rank worth the name
    assert regret_at_k([1.0, 2.0], [3.0, 3.0]) == 0.0


def test_bad_input():
    with pytest.raises(ConfigError, match="one number per policy"):
        regret_at_k([1.0, 2.0], [1.0])
    with pytest.raises(ConfigError, match="a true return is not finite"):
        rank_correlation([1.0, 2.0], [1.0, np.nan])
    with pytest.raises(ConfigError, match="k must be at least 1"):
        regret_at_k([1.0], [1.0], 0)


def test_what_can_be_trusted_comes_first():
    def estimate(value, *reasons):
        return ValueEstimate("fqe", value, value - 1, value + 1, 0.95, reasons)

    found = [
        estimate(1.0),
        estimate(9.0, "runs away"),
        estimate(math.nan, "no density"),
        estimate(2.0),
        estimate(10.0, "far"),
    ]
    assert order(found) == [3, 0, 4, 1, 2]
    assert [str(one) for one in found] == ["1 [0, 2]", "(9 [8, 10])?", "refused", "2 [1, 3]", "(10 [9, 11])?"]
    assert found[2].to_dict()["value"] is None
