"""Statistics of few runs: interquartile mean, intervals that hold their level with few seeds, probability of improvement.

The statistics are those of Agarwal, Schwarzer, Castro, Courville, Bellemare, "Deep Reinforcement Learning at the Edge of the Statistical Precipice"
(NeurIPS 2021). Its percentile bootstrap covers the truth far too rarely with few seeds, so intervals are studentised here; `python
benchmarks/intervals.py` prints how often each covers it.

Throughout, the scores of one task (dataset) are an array `[S, E]`: S training seeds, E evaluation episodes of each. The score of a seed is the mean
over its episodes, and seeds are what mean, interquartile mean and probability of improvement speak about.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtrit

from rlkit2.errors import ConfigError
from rlkit2.guard import guarded

Array = NDArray[np.float64]
Statistic = Callable[[Sequence[Array]], Array]
Method = Literal["auto", "percentile"]
STUDENTISED = 5  # seeds of every task from which on resampled t statistics are better than the t distribution


@dataclass(frozen=True)
class Estimate:
    """A point estimate and its interval at level `confidence`, NaN where there is none; `method` says how it was found and over what."""

    value: float
    low: float
    high: float
    confidence: float = 0.95
    method: str = ""

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@guarded()
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


@guarded()
def pooled_mean(tasks: Sequence[Array]) -> Array:
    """Mean over tasks of the mean over seeds: `[..., S]` per task to `[...]`. Every task counts the same, however many seeds it has."""
    return np.asarray(np.mean([task.mean(axis=-1) for task in tasks], axis=0))


@guarded()
def pooled_iqm(tasks: Sequence[Array]) -> Array:
    """Interquartile mean over the seeds of all tasks together: `[..., S]` per task to `[...]`.

    Every task counts the same: with unequal numbers of seeds, each is repeated as often as makes them equal.
    """
    counts = [task.shape[-1] for task in tasks]
    values = np.concatenate(tasks, axis=-1)
    if len(set(counts)) == 1:
        return interquartile_mean(values, axis=-1)
    weights = np.concatenate([np.full(count, 1 / (len(tasks) * count)) for count in counts])
    total = len(tasks) * math.lcm(*counts)  # values after repeating
    cut = (total // 4) / total
    order = np.argsort(values, axis=-1)
    ends = np.cumsum(weights[order], axis=-1)
    kept = np.clip(np.minimum(ends, 1 - cut) - np.maximum(ends - weights[order], cut), 0, None)
    kept[kept < 1e-12] = 0  # rounding
    middle = np.where(kept > 0, np.take_along_axis(values, order, axis=-1), 0)
    means = (kept * middle).sum(axis=-1) / kept.sum(axis=-1)
    return np.asarray(np.where(np.isnan(values).any(axis=-1), np.nan, means))


@guarded()
def checked(scores: ArrayLike, name: str = "scores") -> Array:
    """Scores as float64 `[S, E]`; one dimension is read as S seeds with one score each. Raises `ConfigError` for anything else."""
    try:
        array = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} must be numbers [seeds] or [seeds, episodes] ({error})") from error
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


@guarded()
def bootstrap(
    tasks: Sequence[ArrayLike],
    statistic: Statistic = pooled_mean,
    *,
    method: Method = "auto",
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """`statistic` of the seed scores with an interval, stratified by task, that holds its level with few seeds.

    `tasks`: one array `[S, E]` (or `[S]`) per task; the number of seeds may differ. `statistic` takes one array `[..., S]` per task and reduces the
    last axis, as `pooled_mean` and `pooled_iqm` do. `method`:

    * `auto`: for the mean, Student's t (several tasks: Satterthwaite's degrees of freedom) below five seeds a task, from there on the studentised
      bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), section 12.5); for any other statistic, t quantiles with the
      standard error of a bootstrap whose deviations are widened by `sqrt(S / (S - 1))` (section 12.4). A task of one seed is spoken of by its
      episodes: that interval is about this policy and not about the next training run.
    * `percentile`: seeds, then the episodes of each, resampled (Agarwal et al. 2021, section 4.1); far too narrow below some 20 seeds.

    Any score that is not finite gives NaN, never a silent omission. No interval (NaN) where a task has one seed and one episode.
    """
    arrays = [checked(task) for task in tasks]
    if not arrays:
        raise ConfigError("a bootstrap needs the scores of at least one task")
    if method not in ("auto", "percentile"):
        raise ConfigError(f"method must be auto or percentile, not {method!r}")
    nan = float("nan")
    if not all(np.isfinite(array).all() for array in arrays):
        return Estimate(nan, nan, nan, confidence)
    value = float(statistic([array.mean(axis=1) for array in arrays]))
    generator = np.random.default_rng(seed)
    over = _over(arrays)
    if method == "percentile":
        samples = statistic([resampled_seed_scores(array, resamples, generator) for array in arrays])
        low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
        return Estimate(value, float(low), float(high), confidence, f"percentile bootstrap over {over}")
    samples_of = [_sample(array) for array in arrays]
    if min(map(len, samples_of)) < 2:
        return Estimate(value, nan, nan, confidence, "no interval: one seed, one episode")
    if statistic is pooled_iqm and len(arrays) == 1 and len(arrays[0]) < 4:
        statistic = pooled_mean  # nothing is trimmed
    if statistic is not pooled_mean:
        error = float(statistic([_resampled(array, resamples, generator) for array in arrays]).std())
        width = _t_quantile(samples_of, confidence) * error
        return Estimate(value, value - width, value + width, confidence, f"t, bootstrap error, over {over}")
    if min(map(len, samples_of)) >= STUDENTISED:
        ends = _studentised(samples_of, resamples, confidence, generator)
        if ends is not None:
            return Estimate(value, value - ends[1], value - ends[0], confidence, f"studentised bootstrap over {over}")
    width = _t_quantile(samples_of, confidence) * _mean_error(samples_of)
    return Estimate(value, value - width, value + width, confidence, f"t over {over}")


def _sample(scores: Array) -> Array:
    """What a task's mean is the mean of: its seeds, or the episodes of its only seed."""
    sample: Array = scores.mean(axis=1) if len(scores) > 1 else scores[0]
    return sample


def _over(arrays: Sequence[Array]) -> str:
    seeds = sum(len(array) for array in arrays if len(array) > 1)
    episodes = sum(array.shape[1] for array in arrays if len(array) == 1)
    parts = [f"{seeds} seeds"] if seeds else []
    parts += [f"{episodes} episodes of {'one seed' if len(arrays) == 1 else 'single seeds'}"] if episodes else []
    return " and ".join(parts)


def _mean_error(samples: Sequence[Array]) -> float:
    """Standard error of the mean over samples of their means."""
    return math.sqrt(sum(sample.var(ddof=1) / len(sample) for sample in samples)) / len(samples)


def _t_quantile(samples: Sequence[Array], confidence: float) -> float:
    """Quantile of Student's t with the degrees of freedom of several samples (Satterthwaite, Biometrics Bulletin 2, 1946)."""
    parts = np.array([sample.var(ddof=1) / len(sample) for sample in samples])
    free = np.array([len(sample) - 1 for sample in samples])
    scale = parts.max()
    if scale == 0:
        return 0.0
    parts = parts / scale  # squares must not overflow
    return float(stdtrit(parts.sum() ** 2 / (parts**2 / free).sum(), (1 + confidence) / 2))


def _studentised(
    samples: Sequence[Array], resamples: int, confidence: float, generator: np.random.Generator
) -> tuple[float, float] | None:
    """Quantiles of (resampled mean - mean) / its error, times the error; None where too many resamples are one value throughout."""
    error, shift, variance = _mean_error(samples), np.zeros(resamples), np.zeros(resamples)
    if error == 0:
        return 0.0, 0.0
    for sample in samples:
        drawn = sample[generator.integers(len(sample), size=(resamples, len(sample)))]
        shift += (drawn.mean(axis=1) - sample.mean()) / len(samples)
        variance += drawn.var(axis=1, ddof=1) / len(sample) / len(samples) ** 2
    valid = variance > 1e-18 * error**2
    if (~valid).mean() > (1 - confidence) / 2:
        return None
    low, high = np.quantile(shift[valid] / np.sqrt(variance[valid]), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low) * error, float(high) * error


def _resampled(scores: Array, resamples: int, generator: np.random.Generator) -> Array:
    """Seed scores `[resamples, S]` with the spread of the seeds (or of the mean of a single seed's episodes), not the smaller one of resamples."""
    sample = _sample(scores)
    wide = sample.mean() + (sample - sample.mean()) * math.sqrt(len(sample) / (len(sample) - 1))
    drawn: Array = wide[generator.integers(len(sample), size=(resamples, len(sample)))]
    return drawn if len(scores) > 1 else drawn.mean(axis=1, keepdims=True)


@guarded()
def probability_of_improvement(
    tasks: Sequence[ArrayLike],
    baseline: Sequence[ArrayLike],
    *,
    method: Method = "auto",
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Probability that a seed of X scores above a seed of Y on a task drawn at random, ties counting one half (Agarwal et al. 2021, section 4.3).

    `tasks[i]` and `baseline[i]` are the scores `[S, E]` (or `[S]`) of X and Y on task i. The interval is Newcombe's score interval for the
    Mann-Whitney share (Statistics in Medicine 25, 2006, pp. 559-573, method 5), which widens as seeds get few, also where one side always wins;
    tasks are combined as Zou and Donner do (Statistics in Medicine 27, 2008). `method="percentile"`: both sides are resampled, as in `bootstrap`.
    """
    if len(tasks) != len(baseline) or not tasks:
        raise ConfigError(
            f"probability of improvement needs the same tasks on both sides, not {len(tasks)} and {len(baseline)}"
        )
    pairs = [(checked(x).mean(axis=1), checked(y).mean(axis=1)) for x, y in zip(tasks, baseline, strict=True)]
    if not all(np.isfinite(side).all() for pair in pairs for side in pair):
        return Estimate(float("nan"), float("nan"), float("nan"), confidence)
    if method == "percentile":

        def statistic(scores: Sequence[Array]) -> Array:
            halves = zip(scores[: len(tasks)], scores[len(tasks) :], strict=True)
            return np.asarray(np.mean([_superiority(x, y) for x, y in halves], axis=0))

        return bootstrap(
            [*tasks, *baseline], statistic, method=method, resamples=resamples, confidence=confidence, seed=seed
        )
    shares = np.array([float(_superiority(x, y)) for x, y in pairs])
    ends = np.array(
        [_share_interval(share, len(x), len(y), confidence) for share, (x, y) in zip(shares, pairs, strict=True)]
    )
    value = float(shares.mean())
    below, above = np.sqrt(np.square(ends - shares[:, None]).sum(axis=0)) / len(pairs)
    seeds = " and ".join(str(sum(len(pair[side]) for pair in pairs)) for side in (0, 1))
    return Estimate(
        value, float(value - below), float(value + above), confidence, f"Newcombe's score interval over {seeds} seeds"
    )


def _share_interval(share: float, first: int, second: int, confidence: float) -> tuple[float, float]:
    """All probabilities that do not differ from the observed share by more than their own standard error times the normal quantile."""
    quantile, extra = float(ndtri((1 + confidence) / 2)), (first + second) / 2 - 1

    def far(p: float) -> bool:
        variance = p * (1 - p) * (1 + extra * (1 - p) / (2 - p) + extra * p / (1 + p)) / (first * second)
        return abs(p - share) > quantile * math.sqrt(variance)

    return _boundary(far, 0.0, share), _boundary(far, 1.0, share)


def _boundary(far: Callable[[float], bool], outside: float, inside: float) -> float:
    """Where `far` ends between a point that may be far and one that is not, by bisection."""
    if outside == inside or not far(outside):
        return outside
    for _ in range(50):
        middle = (outside + inside) / 2
        outside, inside = (middle, inside) if far(middle) else (outside, middle)
    return inside


def _superiority(x: Array, y: Array) -> Array:
    """Share of pairs with x above y for `[..., S]` and `[..., T]`; the Mann-Whitney U statistic over its maximum."""
    difference = x[..., :, None] - y[..., None, :]
    share: Array = np.where(np.isnan(difference), np.nan, (np.sign(difference) + 1) / 2).mean(axis=(-2, -1))
    return share


@guarded()
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
