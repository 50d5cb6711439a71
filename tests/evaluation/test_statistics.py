"""Statistics against closed forms, scipy and the properties that define them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from rlkit2.errors import ConfigError
from rlkit2.evaluation.statistics import (
    bootstrap,
    interquartile_mean,
    pooled_iqm,
    pooled_mean,
    probability_of_improvement,
    resampled_seed_scores,
    standard_errors,
)

finite = st.floats(-1e4, 1e4, allow_subnormal=False)
tables = st.tuples(st.integers(1, 6), st.integers(1, 6)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=finite)
)
quick = settings(deadline=None, max_examples=30)


def test_interquartile_mean_drops_the_outer_quarters():
    assert interquartile_mean([1, 2, 3, 4]) == 2.5
    assert interquartile_mean([-1e9, 1, 2, 3, 4, 5, 6, 1e9]) == pytest.approx(3.5)
    assert interquartile_mean([0, 0, 9]) == pytest.approx(3)  # fewer than four values: the mean
    np.testing.assert_allclose(interquartile_mean([[1, 2, 3, 4], [5, 6, 7, 80]], axis=1), [2.5, 6.5])


@quick
@given(tables, st.floats(0.1, 10), finite)
def test_estimates_move_with_shift_and_scale(scores, scale, shift):
    for statistic in (pooled_mean, pooled_iqm):
        plain = bootstrap([scores], statistic, resamples=50)
        moved = bootstrap([scale * scores + shift], statistic, resamples=50)
        np.testing.assert_allclose(
            [moved.value, moved.low, moved.high],
            scale * np.array([plain.value, plain.low, plain.high]) + shift,
            rtol=1e-7,
            atol=1e-6,
        )


@quick
@given(tables)
def test_intervals_lie_between_the_extreme_episodes_and_repeat(scores):
    first = bootstrap([scores], resamples=50, seed=3)
    assert first == bootstrap([scores], resamples=50, seed=3)
    assert scores.min() - 1e-9 <= first.low <= first.high <= scores.max() + 1e-9
    assert first.value == pytest.approx(scores.mean(), abs=1e-9)


@quick
@given(tables, tables)
def test_probability_of_improvement_is_the_mann_whitney_share(x, y):
    estimate = probability_of_improvement([x], [y], resamples=50)
    a, b = x.mean(axis=1), y.mean(axis=1)
    assert estimate.value == pytest.approx(stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)))
    assert 0 <= estimate.low <= estimate.high <= 1
    assert estimate.value + probability_of_improvement([y], [x], resamples=50).value == pytest.approx(1)


def test_probability_of_improvement_averages_over_tasks():
    better, worse = np.full((4, 3), 2.0), np.full((4, 3), 1.0)
    assert probability_of_improvement([better, worse], [worse, better]).value == 0.5
    certain = probability_of_improvement([better, better], [worse, worse])
    assert (certain.value, certain.low, certain.high) == (1, 1, 1)


def test_one_stage_bootstrap_agrees_with_scipy():
    """With one episode per seed there is one stage, which scipy's percentile bootstrap also does."""
    scores = np.random.default_rng(0).gamma(2.0, 10.0, size=30)
    ours = bootstrap([scores], resamples=20_000)
    theirs = stats.bootstrap((scores,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    np.testing.assert_allclose([ours.low, ours.high], theirs, rtol=0.02)


def test_the_interval_covers_the_mean_of_the_next_training_runs():
    """Seeds vary (std 5) far more than episodes of one seed (std 2 over 20 episodes); the interval must see the seeds."""
    generator = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        scores = 10 + 5 * generator.standard_normal((10, 1)) + 2 * generator.standard_normal((10, 20))
        estimate = bootstrap([scores], resamples=300, seed=trial)
        hits += estimate.low <= 10 <= estimate.high
    assert 0.85 <= hits / 200 <= 0.99


def test_two_stages_spread_as_the_theory_says():
    """Davison and Hinkley (1997), 3.8: the variance of the resampled mean is that of seed means plus that of episodes within seeds."""
    generator = np.random.default_rng(2)
    scores = 3 * generator.standard_normal((8, 1)) + generator.standard_normal((8, 15))
    samples = resampled_seed_scores(scores, 40_000, generator).mean(axis=1)
    expected = scores.mean(axis=1).var() / 8 + scores.var(axis=1).mean() / (8 * 15)
    assert samples.var() == pytest.approx(expected, rel=0.03)


def test_strata_are_kept_apart():
    """Two tasks on very different scales: resampling never mixes them, so the spread is that of each task and not between them."""
    tasks = [np.full((5, 4), 0.0), np.full((7, 4), 100.0)]
    estimate = bootstrap(tasks)
    assert (estimate.value, estimate.low, estimate.high) == (50, 50, 50)


def test_standard_errors_separate_seeds_from_episodes():
    same_seeds = np.tile(np.arange(10.0), (4, 1))
    between, within = standard_errors(same_seeds)
    assert between == 0
    assert within == pytest.approx(np.std(np.arange(10.0), ddof=1) / np.sqrt(10) / 2)
    between, within = standard_errors(np.repeat([[1.0], [2.0], [6.0]], 5, axis=1))
    assert within == 0
    assert between == pytest.approx(np.std([1, 2, 6], ddof=1) / np.sqrt(3))
    assert standard_errors(np.ones((1, 1))) == (None, None)


def test_a_diverged_seed_is_not_left_out():
    scores = np.ones((3, 2))
    scores[1, 0] = np.nan
    estimate = bootstrap([scores])
    assert np.isnan([estimate.value, estimate.low, estimate.high]).all()
    assert np.isnan(probability_of_improvement([scores], [np.zeros((3, 2))]).value)


def test_wrong_shapes_say_so():
    with pytest.raises(ConfigError, match=r"\[seeds, episodes\].*shape \[0, 1\]"):
        bootstrap([[]])
    with pytest.raises(ConfigError, match="same tasks on both sides, not 1 and 2"):
        probability_of_improvement([[1.0]], [[1.0], [2.0]])


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_the_interquartile_mean_is_scipys_trimmed_mean(axis):
    for shape in ((3, 5), (4, 8), (1, 1), (10, 7)):
        scores = np.random.default_rng(0).normal(size=shape)
        np.testing.assert_allclose(
            interquartile_mean(scores, axis), stats.trim_mean(scores, 0.25, axis=axis), rtol=1e-12
        )
    assert np.isnan(interquartile_mean([1.0, 2.0, np.nan, 3.0]))
