"""Aggregates against their published definitions, written out anew: rliable's matrices, all choices of k, all draws of a budget, a bandit by hand."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlkit2.errors import ConfigError
from rlkit2.evaluation.aggregates import (
    bandit_performance,
    expected_online_performance,
    optimality_gap,
    performance_profile,
    pooled_gap,
    pooled_median,
    worst_of,
)
from rlkit2.evaluation.statistics import pooled_iqm, pooled_mean, probability_of_improvement

# Few different values, so that ties are the rule.
NUMBERS = st.sampled_from([-20.0, 0.0, 35.5, 50.0, 99.0, 100.0, 130.0])
MATRIX = st.tuples(st.integers(1, 6), st.integers(1, 4)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=NUMBERS)
)


def split(matrix: np.ndarray) -> list[np.ndarray]:
    """rliable's [runs, tasks] as one array of seeds per task."""
    return list(matrix.T)


@given(MATRIX)
def test_aggregates_are_rliables(matrix: np.ndarray) -> None:
    tasks = split(matrix)
    np.testing.assert_allclose(pooled_mean(tasks), matrix.mean(axis=0).mean())
    np.testing.assert_allclose(pooled_median(tasks), np.median(matrix.mean(axis=0)))
    np.testing.assert_allclose(pooled_iqm(tasks), scipy.stats.trim_mean(matrix, proportiontocut=0.25, axis=None))
    np.testing.assert_allclose(pooled_gap(tasks, target=100), 100 - np.minimum(matrix, 100).mean(), atol=1e-12)
    found = optimality_gap(tasks, target=100)
    assert found.value == pytest.approx(100 - np.minimum(matrix, 100).mean(), abs=1e-12)
    assert found.low >= 0 or np.isnan(found.low)


@given(MATRIX, st.lists(st.sampled_from([-30.0, 0.0, 40.0, 100.0, 200.0]), min_size=1, unique=True))
def test_profiles_are_rliables_run_score_distribution(matrix: np.ndarray, thresholds: list[float]) -> None:
    found = performance_profile(split(matrix), thresholds)
    np.testing.assert_allclose(found.share, [(matrix > threshold).mean() for threshold in thresholds])
    assert ((found.low >= 0) & (found.low <= found.share) & (found.share <= found.high) & (found.high <= 1)).all()


@given(MATRIX, MATRIX)
def test_probability_of_improvement_is_rliables(x: np.ndarray, y: np.ndarray) -> None:
    tasks = min(x.shape[1], y.shape[1])
    shares = [scipy.stats.mannwhitneyu(x[:, i], y[:, i]).statistic / (len(x) * len(y)) for i in range(tasks)]
    assert probability_of_improvement(split(x)[:tasks], split(y)[:tasks]).value == pytest.approx(np.mean(shares))


def test_every_task_counts_the_same_with_unequal_runs() -> None:
    """Three seeds at 2 and twelve at 100: one weighting for all of them, not one for the seeds and one for the tasks."""
    tasks = [np.full(3, 2.0), np.full(12, 100.0)]
    for statistic in (pooled_mean, pooled_iqm, pooled_median):
        assert statistic(tasks) == pytest.approx(51)
    assert pooled_gap(tasks, target=100) == pytest.approx(49)
    np.testing.assert_allclose(performance_profile(tasks, [0, 50, 100]).share, [1, 0.5, 0])


def test_the_intervals_of_a_profile_are_wilsons() -> None:
    """Against scipy's, one task; several tasks narrow it as independent estimates do."""
    scores = [1.0, 2.0, 3.0, 4.0, 5.0]
    found = performance_profile([scores], [3.0])
    expected = scipy.stats.binomtest(2, 5).proportion_ci(method="wilson")
    np.testing.assert_allclose([found.low[0], found.high[0]], expected)
    many = performance_profile([scores] * 4, [3.0])
    np.testing.assert_allclose(many.share - many.low, (found.share - found.low) / 2)
    alone = performance_profile([[7.0]], [3.0])  # one run: nearly nothing is known
    assert alone.low[0] < 0.3
    assert alone.high[0] == 1


@given(arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=NUMBERS), st.integers(1, 6))
def test_the_worst_of_k_is_the_mean_over_all_choices(scores: np.ndarray, k: int) -> None:
    if k > scores.shape[1]:
        with pytest.raises(
            ConfigError, match=f"the worst of {k} episodes cannot be told from {scores.shape[1]} episodes of hopper"
        ):
            worst_of([scores], k, names=["hopper"])
        return
    expected = np.mean([[min(choice) for choice in combinations(row, k)] for row in scores])
    assert worst_of([scores], k).value == pytest.approx(expected, abs=1e-9)


def test_the_worst_of_k_successes_is_pass_to_the_k() -> None:
    """pass^k = C(c, k) / C(n, k) for c successes in n trials."""
    from math import comb

    for n, c, k in product([8], range(9), [1, 2, 3, 8]):
        trials = [[1.0] * c + [0.0] * (n - c)]
        assert worst_of([trials], k).value == pytest.approx(comb(c, k) / comb(n, k), abs=1e-12)


@given(arrays(np.float64, st.integers(1, 5), elements=NUMBERS), st.integers(1, 3))
def test_a_budget_of_evaluations_finds_the_best_of_all_draws(scores: np.ndarray, budget: int) -> None:
    published = np.mean([max(draw) for draw in product(scores, repeat=budget)])
    assert expected_online_performance(scores, [budget], replacement=True)[0] == pytest.approx(published)
    if budget <= len(scores):
        unbiased = np.mean([max(draw) for draw in combinations(scores, budget)])
        assert expected_online_performance(scores, [budget])[0] == pytest.approx(unbiased)


def test_a_bandit_finds_the_better_policy_and_a_single_pull_does_not() -> None:
    policies = [np.full(5, 10.0), np.full(3, 90.0), np.full(4, 50.0)]
    found = bandit_performance(policies, 40, repeats=400)
    assert found[0] == pytest.approx(50, abs=5)  # the policy pulled first, whichever it is
    assert found[1] == pytest.approx((50 + 90 + 90) / 3, abs=5)  # the better of two
    np.testing.assert_allclose(found[2:], 90)
    noisy = [np.array([0.0, 100.0]), np.array([20.0, 100.0])]  # true means 50 and 60
    late = bandit_performance(noisy, 400, repeats=200)
    assert 50 <= late[0] < 57
    assert late[-1] > 58
    np.testing.assert_array_equal(late, bandit_performance(noisy, 400, repeats=200))
    assert bandit_performance(policies, 5, choose_from=1, repeats=400)[-1] == pytest.approx(50, abs=5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    tasks = [[1.0, 2.0], [3.0, bad]]
    names = ["hopper", "walker"]
    for call in (
        lambda: optimality_gap(tasks, names=names),
        lambda: performance_profile(tasks, [1.0], names=names),
        lambda: worst_of([np.ones((2, 3)), [[1.0, bad, 2.0], [1.0, 1.0, 1.0]]], 2, names=names),
    ):
        with pytest.raises(ConfigError, match="scores of walker are not finite in row"):
            call()
    with pytest.raises(ConfigError, match="scores of the policies are not finite"):
        expected_online_performance([1.0, bad], [1])
    with pytest.raises(ConfigError, match="scores of policy 1 are not finite"):
        bandit_performance([[1.0], [bad]], 3)


def test_what_does_not_fit_is_refused() -> None:
    for call, match in (
        (lambda: expected_online_performance([1.0, 2.0], [3]), "a budget of 3 evaluations does not fit 2 policies"),
        (lambda: expected_online_performance([1.0], [0], replacement=True), "a budget of 0"),
        (lambda: performance_profile([[1.0]], [np.nan]), "thresholds"),
        (lambda: performance_profile([], [1.0]), "at least one task"),
        (lambda: bandit_performance([[1.0]], 0), "at least one pull"),
        (lambda: bandit_performance([[1.0]], 1, choose_from=2), "chooses from 1 to 1"),
    ):
        with pytest.raises(ConfigError, match=match):
            call()
