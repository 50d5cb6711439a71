"""Statistics of few runs: interquartile mean, bootstrap intervals over seeds and episodes, probability of improvement.

Source: Agarwal, Schwarzer, Castro, Courville, Bellemare, "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (NeurIPS 2021).

Throughout, the scores of one task (dataset) are an array `[S, E]`: S training seeds, E evaluation episodes of each. The score of a seed is the mean
over its episodes, and seeds are what mean, interquartile mean and probability of improvement speak about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlkit2.errors import ConfigError

Array = NDArray[np.float64]
Statistic = Callable[[Sequence[Array]], Array]


@dataclass(frozen=True)
class Estimate:
    """A point estimate and its percentile interval at level `confidence`."""

    value: float
    low: float
    high: float
    confidence: float = 0.95

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def interquartile_mean(scores: ArrayLike, axis: int | None = None) -> Array:
    """Mean of the middle half of the values: the lowest and the highest `n // 4` are dropped (Agarwal et al. 2021, section 4.2).

    With fewer than four values nothing is dropped and it equals the mean. NaN wherever one of the values is NaN.
    """
    values = np.asarray(scores, dtype=np.float64)
    values = np.sort(
        values.ravel() if axis is None else np.moveaxis(values, axis, -1)
    )  # scipy.stats takes a second to import
    cut = values.shape[-1] // 4
    means = values[..., cut : values.shape[-1] - cut].mean(axis=-1)
    return np.asarray(
        np.where(np.isnan(values[..., -1]), np.nan, means)
    )  # NaN sorts last; a diverged seed is not an outlier to drop


def pooled_mean(tasks: Sequence[Array]) -> Array:
    """Mean over tasks of the mean over seeds: `[..., S]` per task to `[...]`."""
    return np.asarray(np.mean([task.mean(axis=-1) for task in tasks], axis=0))


def pooled_iqm(tasks: Sequence[Array]) -> Array:
    """Interquartile mean over the seeds of all tasks together: `[..., S]` per task to `[...]`."""
    return interquartile_mean(np.concatenate(tasks, axis=-1), axis=-1)


def checked(scores: ArrayLike, name: str = "scores") -> Array:
    """Scores as float64 `[S, E]`; one dimension is read as S seeds with one score each. Raises `ConfigError` for anything else."""
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or not array.size:
        raise ConfigError(
            f"{name} must be [seeds] or [seeds, episodes] with at least one entry, not shape {list(array.shape)}"
        )
    return array


def resampled_seed_scores(scores: Array, resamples: int, generator: np.random.Generator) -> Array:
    """Seed scores `[resamples, S]` of the two-stage bootstrap of `[S, E]`: seeds with replacement, then the episodes of each drawn seed.

    Two-stage resampling of clusters: Davison and Hinkley, "Bootstrap Methods and their Application" (1997), section 3.8. With one seed only the
    episodes are resampled, so the interval then speaks about this policy and not about the next training run.
    """
    seeds, episodes = scores.shape
    drawn = generator.integers(seeds, size=(resamples, seeds, 1))
    out = np.empty((resamples, seeds))
    chunk = max(1, 4_000_000 // (seeds * episodes))
    for start in range(0, resamples, chunk):
        part = drawn[start : start + chunk]
        out[start : start + chunk] = scores[part, generator.integers(episodes, size=(len(part), seeds, episodes))].mean(
            axis=-1
        )
    return out


def bootstrap(
    tasks: Sequence[ArrayLike],
    statistic: Statistic = pooled_mean,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """`statistic` of the seed scores with a percentile interval from a bootstrap stratified by task (Agarwal et al. 2021, section 4.1).

    `tasks`: one array `[S, E]` (or `[S]`) per task; the number of seeds may differ. `statistic` takes one array `[..., S]` per task and reduces the
    last axis, as `pooled_mean` and `pooled_iqm` do. Non-finite scores give a non-finite estimate, never a silent omission.
    """
    arrays = [checked(task) for task in tasks]
    if not arrays:
        raise ConfigError("a bootstrap needs the scores of at least one task")
    value = float(statistic([array.mean(axis=1) for array in arrays]))
    if not np.isfinite(value):
        return Estimate(value, float("nan"), float("nan"), confidence)
    generator = np.random.default_rng(seed)
    samples = statistic([resampled_seed_scores(array, resamples, generator) for array in arrays])
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, float(low), float(high), confidence)


def probability_of_improvement(
    tasks: Sequence[ArrayLike],
    baseline: Sequence[ArrayLike],
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Probability that a seed of X scores above a seed of Y on a task drawn at random, ties counting one half (Agarwal et al. 2021, section 4.3).

    `tasks[i]` and `baseline[i]` are the scores `[S, E]` (or `[S]`) of X and Y on task i; both sides are resampled.
    """
    if len(tasks) != len(baseline) or not tasks:
        raise ConfigError(
            f"probability of improvement needs the same tasks on both sides, not {len(tasks)} and {len(baseline)}"
        )
    count = len(tasks)

    def statistic(scores: Sequence[Array]) -> Array:
        return np.asarray(
            np.mean([_superiority(x, y) for x, y in zip(scores[:count], scores[count:], strict=True)], axis=0)
        )

    return bootstrap([*tasks, *baseline], statistic, resamples=resamples, confidence=confidence, seed=seed)


def _superiority(x: Array, y: Array) -> Array:
    """Share of pairs with x above y for `[..., S]` and `[..., T]`; the Mann-Whitney U statistic over its maximum."""
    difference = x[..., :, None] - y[..., None, :]
    share: Array = np.where(np.isnan(difference), np.nan, (np.sign(difference) + 1) / 2).mean(axis=(-2, -1))
    return share


def standard_errors(scores: ArrayLike) -> tuple[float | None, float | None]:
    """Standard errors of the mean of `[S, E]`: between seeds, and within these policies.

    The first says how far the mean would move with other training seeds (None for one seed); the second how far it would move if the very same
    policies were evaluated on other episodes (None for one episode each).
    """
    array = checked(scores)
    seeds, episodes = array.shape
    between = float(array.mean(axis=1).std(ddof=1) / np.sqrt(seeds)) if seeds > 1 else None
    within = float(np.sqrt((array.var(axis=1, ddof=1) / episodes).sum()) / seeds) if episodes > 1 else None
    return between, within
