"""How well estimates order policies: rank correlation and regret@k against true returns, and the order itself.

Source: Fu et al., "Benchmarks for Deep Off-Policy Evaluation" (ICLR 2021), section 3: the metrics by which estimators are compared there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlkit2.errors import ConfigError
from rlkit2.evaluation.offline.estimate import ValueEstimate

Array = NDArray[np.float64]


def order(found: Sequence[ValueEstimate]) -> list[int]:
    """Indices from best to worst: trusted estimates by value, then those in doubt by value, refused ones last."""

    def key(index: int) -> tuple[int, float]:
        one = found[index]
        refused = not math.isfinite(one.value)
        return (2 if refused else 0 if one.trusted else 1, 0.0 if refused else -one.value)

    return sorted(range(len(found)), key=key)


def rank_correlation(estimated: ArrayLike, true: ArrayLike) -> float:
    """Spearman's rank correlation over the policies that have an estimate; NaN with fewer than three, or where all are alike."""
    from scipy import stats

    values, truth = _both(estimated, true)
    known = np.isfinite(values)
    if known.sum() < 3 or np.ptp(values[known]) == 0 or np.ptp(truth[known]) == 0:
        return math.nan
    return float(stats.spearmanr(values[known], truth[known]).statistic)


def regret_at_k(estimated: ArrayLike, true: ArrayLike, k: int = 1) -> float:
    """(best true return - best true return among the k policies with the highest estimates) / (best - worst true return), in [0, 1].

    0: the best policy is among the k. Policies without an estimate are never chosen; NaN where there is no estimate at all, 0 where all true
    returns are alike.
    """
    if k < 1:
        raise ConfigError(f"k must be at least 1, not {k}")
    values, truth = _both(estimated, true)
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        return math.nan
    spread = np.ptp(truth)
    chosen = known[np.argsort(-values[known], kind="stable")[:k]]
    return float((truth.max() - truth[chosen].max()) / spread) if spread > 0 else 0.0


def agreement(estimated: ArrayLike, true: ArrayLike) -> dict[str, Any]:
    """The figures of one method: `policies` with an estimate, `rank_correlation`, `regret@1`, `regret@5`."""
    return {
        "policies": int(np.isfinite(np.asarray(estimated, dtype=np.float64)).sum()),
        "rank_correlation": rank_correlation(estimated, true),
        "regret@1": regret_at_k(estimated, true, 1),
        "regret@5": regret_at_k(estimated, true, 5),
    }


def _both(estimated: ArrayLike, true: ArrayLike) -> tuple[Array, Array]:
    first, second = np.asarray(estimated, dtype=np.float64), np.asarray(true, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ConfigError(
            f"estimates {list(first.shape)} and true returns {list(second.shape)} must be one number per policy"
        )
    if not np.isfinite(second).all():
        raise ConfigError("a true return is not finite")
    return first, second
