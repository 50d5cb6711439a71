"""What else can be said about a table of scores: optimality gap, performance profile, worst of k episodes, the best of a budget of evaluations.

`tasks` are as in `rlkit2.evaluation.statistics`: one array `[S, E]` (or `[S]`) per task, the number of seeds may differ, the score of a seed is the
mean over its episodes, and every task counts the same. Scores that are not finite are refused with the name of their task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln, ndtri

from rlkit2.errors import ConfigError
from rlkit2.evaluation.statistics import Estimate, bootstrap, checked

Array = NDArray[np.float64]


def pooled_median(tasks: Sequence[Array]) -> Array:
    """Median over tasks of the mean over seeds, `[..., S]` per task to `[...]`: rliable's `aggregate_median` (Agarwal et al. 2021, section 4.2)."""
    return np.asarray(np.median([task.mean(axis=-1) for task in tasks], axis=0))


def pooled_gap(tasks: Sequence[Array], *, target: float = 100.0) -> Array:
    """Mean over tasks of how far seeds stay below `target`, those above it counting as zero: `[..., S]` per task to `[...]`."""
    return np.asarray(target - np.mean([np.minimum(task, target).mean(axis=-1) for task in tasks], axis=0))


def optimality_gap(tasks: Sequence[ArrayLike], *, target: float = 100.0, names: Sequence[str] = ()) -> Estimate:
    """How far training stays below `target` (100: the expert), with its interval; 0 where every seed reaches it (Agarwal et al. 2021, section 4.2).

    Unlike the mean it gives no credit for scores beyond the target. `names`: of the tasks, for messages.

    Raises:
        ConfigError: no tasks, or scores that are not finite.
    """
    found = bootstrap(finite_tasks(tasks, names), partial(pooled_gap, target=target))
    return Estimate(found.value, max(found.low, 0.0), found.high, found.confidence, found.method)


@dataclass(frozen=True)
class Profile:
    """A performance profile: the share of seeds above each threshold, with pointwise intervals; all `[T]`."""

    thresholds: Array
    share: Array
    low: Array
    high: Array


def performance_profile(
    tasks: Sequence[ArrayLike], thresholds: ArrayLike, *, confidence: float = 0.95, names: Sequence[str] = ()
) -> Profile:
    """Share of seeds that score above each threshold, averaged over tasks (run-score distribution, Agarwal et al. 2021, section 4.1).

    The interval at each threshold is Wilson's for a share of few seeds (Journal of the American Statistical Association 22, 1927); those of several
    tasks are combined as Zou and Donner do (Statistics in Medicine 27, 2008). The published code resamples instead, which says nothing where all
    seeds are on one side.

    Raises:
        ConfigError: no tasks, or scores or thresholds that are not finite.
    """
    levels = np.asarray(thresholds, dtype=np.float64).ravel()
    if not levels.size or not np.isfinite(levels).all():
        raise ConfigError("thresholds of a performance profile must be finite numbers, at least one")
    arrays = finite_tasks(tasks, names)
    shares = np.stack([(array.mean(axis=1)[:, None] > levels).mean(axis=0) for array in arrays])
    ends = np.stack([_wilson(share, len(array), confidence) for share, array in zip(shares, arrays, strict=True)])
    share = shares.mean(axis=0)
    below, above = np.sqrt(np.square(ends - shares[:, None]).sum(axis=0)) / len(arrays)
    return Profile(levels, share, np.maximum(share - below, 0.0), np.minimum(share + above, 1.0))


def worst_of(tasks: Sequence[ArrayLike], k: int, *, names: Sequence[str] = ()) -> Estimate:
    """Expected score of the worst of `k` episodes of one policy, mean over seeds and tasks, with its interval.

    Estimated without bias from the E episodes of each seed: the mean over all choices of k of them. For episodes that succeed (1) or fail (0) it
    is the probability that k in a row succeed, pass^k of Yao, Shinn, Razavi, Narasimhan, "tau-bench" (2024), section 3. k = 1 is the mean.

    Raises:
        ConfigError: fewer than k episodes, or scores that are not finite.
    """
    arrays = finite_tasks(tasks, names)
    for index, array in enumerate(arrays):
        if not 1 <= k <= array.shape[1]:
            raise ConfigError(
                f"the worst of {k} episodes cannot be told from {array.shape[1]} episodes of {_name(names, index)}; evaluate with more episodes"
            )
    if k == 1:
        return bootstrap(arrays)
    return bootstrap([-_largest_of(-array, k)[:, None] for array in arrays])


def expected_online_performance(scores: ArrayLike, budgets: Sequence[int], *, replacement: bool = False) -> Array:
    """Expected score of the best policy after `budgets` of them, drawn at random, were evaluated: `[N]` policies to one value per budget.

    Kurenkov and Kolesnikov, "Showing Your Offline Reinforcement Learning Work: Online Evaluation Budget Matters" (ICML 2022); the policies are those
    of a search over settings and seeds. `replacement=True` is the estimator of Dodge et al., "Show Your Work" (EMNLP 2019), which is too low by
    what is drawn twice; the default draws without replacement, which is unbiased (Tang et al., "Showing Your Work Doesn't Always Work", ACL 2020).

    Raises:
        ConfigError: a budget below 1 or, without replacement, above N; scores that are not finite.
    """
    values = finite_tasks([scores], ["the policies"])[0].mean(axis=1)
    for budget in budgets:
        if budget < 1 or (budget > len(values) and not replacement):
            raise ConfigError(f"a budget of {budget} evaluations does not fit {len(values)} policies")
    if not replacement:
        return np.array([_largest_of(values[None], budget)[0] for budget in budgets])
    ranks = np.arange(len(values) + 1) / len(values)
    return np.array([(np.sort(values) * np.diff(ranks**budget)).sum() for budget in budgets])


def bandit_performance(
    policies: Sequence[ArrayLike], pulls: int, *, repeats: int = 200, choose_from: int | None = None, seed: int = 0
) -> Array:
    """Expected score `[pulls]` of the policy that looks best after 1, 2, ... single episodes, which a bandit spends on the policies.

    `policies`: the episode scores `[E]` of each; an episode is drawn from them, and what counts is the mean of the policy that has the best mean
    so far. UCB1 (Auer, Cesa-Bianchi, Fischer, Machine Learning 47, 2002) chooses, with rewards scaled by the range of all scores: the budget of
    evaluations as Jackson et al. see it in "A Clean Slate for Offline Reinforcement Learning" (2025). `choose_from`: policies drawn at random for
    each of the `repeats`; default: all.

    Raises:
        ConfigError: no policies, no pulls, or scores that are not finite.
    """
    arrays = [array.ravel() for array in finite_tasks(policies, [f"policy {index}" for index in range(len(policies))])]
    if pulls < 1 or not 1 <= (choose_from or 1) <= len(arrays):
        raise ConfigError(
            f"a bandit over {len(arrays)} policies needs at least one pull, and chooses from 1 to {len(arrays)} of them"
        )
    generator = np.random.default_rng(seed)
    means = np.array([array.mean() for array in arrays])
    span = float(max(array.max() for array in arrays) - min(array.min() for array in arrays))
    count = choose_from or len(arrays)
    arms = np.stack([generator.permutation(len(arrays))[:count] for _ in range(repeats)])  # [repeats, K]
    lengths = np.array([len(array) for array in arrays])
    table = np.full((len(arrays), lengths.max()), np.nan)
    for row, array in zip(table, arrays, strict=True):
        row[: len(array)] = array
    rows, sums, plays = np.arange(repeats), np.zeros((repeats, count)), np.zeros((repeats, count))
    found = np.empty(pulls)
    for pull in range(pulls):
        with np.errstate(divide="ignore", invalid="ignore"):
            average = np.where(plays > 0, sums / plays, -np.inf)
            bound = np.where(plays > 0, average + span * np.sqrt(2 * np.log(max(pull, 1)) / plays), np.inf)
        chosen = bound.argmax(axis=1)
        policy = arms[rows, chosen]
        sums[rows, chosen] += table[policy, generator.integers(lengths[policy])]
        plays[rows, chosen] += 1
        best = np.where(plays > 0, sums / np.maximum(plays, 1), -np.inf).argmax(axis=1)
        found[pull] = means[arms[rows, best]].mean()
    return found


def finite_tasks(tasks: Sequence[ArrayLike], names: Sequence[str] = ()) -> list[Array]:
    """The tasks as `[S, E]`.

    Raises:
        ConfigError: none, or scores that are not finite; the message names the task.
    """
    if not len(tasks):
        raise ConfigError("statistics need the scores of at least one task")
    arrays = [checked(task, f"scores of {_name(names, index)}") for index, task in enumerate(tasks)]
    for index, array in enumerate(arrays):
        if not np.isfinite(array).all():
            seed = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
            raise ConfigError(
                f"scores of {_name(names, index)} are not finite in row {seed}; a run that diverged has no score: leave it out or train it again"
            )
    return arrays


def _name(names: Sequence[str], index: int) -> str:
    return names[index] if index < len(names) else f"task {index}"


def _largest_of(values: Array, k: int) -> Array:
    """Mean over all choices of k of the n values of their largest: `[S, n]` to `[S]`."""
    n = values.shape[1]
    rank = np.arange(k, n + 1)  # the i-th smallest is the largest of C(i - 1, k - 1) choices
    weights = np.exp(_log_choices(rank - 1, k - 1) - _log_choices(np.array(n), k))
    largest: Array = np.sort(values, axis=1)[:, k - 1 :] @ weights
    return largest


def _log_choices(n: NDArray[np.int64], k: int) -> Array:
    return np.asarray(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1))


def _wilson(share: Array, count: int, confidence: float) -> Array:
    """Lower and upper end `[2, T]` of Wilson's score interval for shares `[T]` of `count`."""
    z = float(ndtri((1 + confidence) / 2))
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return np.stack([middle - half, middle + half])
