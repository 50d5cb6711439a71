"""Statistics against closed forms, scipy and the properties that define them."""

import inspect

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
def test_percentile_intervals_lie_between_the_extreme_episodes_and_repeat(scores):
    first = bootstrap([scores], method="percentile", resamples=50, seed=3)
    assert first == bootstrap([scores], method="percentile", resamples=50, seed=3)
    assert scores.min() - 1e-9 <= first.low <= first.high <= scores.max() + 1e-9
    assert first.value == pytest.approx(scores.mean(), abs=1e-9)


@quick
@given(tables, tables)
def test_probability_of_improvement_is_the_mann_whitney_share(x, y):
    for method in ("auto", "percentile"):
        estimate = probability_of_improvement([x], [y], resamples=50, method=method)
        a, b = x.mean(axis=1), y.mean(axis=1)
        assert estimate.value == pytest.approx(stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)))
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1 or method == "percentile"
        other = probability_of_improvement([y], [x], resamples=50, method=method)
        assert estimate.value + other.value == pytest.approx(1)


@quick
@given(st.integers(0, 16), st.integers(1, 4), st.integers(1, 4))
def test_newcombes_interval_solves_its_equation_and_narrows(wins, first, second):
    """Newcombe (2006), method 5, also where one side always wins; four times the seeds give a narrower interval."""
    share = min(wins, first * second) / (first * second)
    x = np.zeros(first)
    y = np.full(second, 1.0)
    x[: round(share * first)] = 2
    share = round(share * first) / first
    found = probability_of_improvement([x], [y])
    extra = (first + second) / 2 - 1
    for end in (found.low, found.high):
        if end not in (0, 1):
            variance = (
                end * (1 - end) * (1 + extra * (1 - end) / (2 - end) + extra * end / (1 + end)) / (first * second)
            )
            assert abs(end - share) == pytest.approx(stats.norm.ppf(0.975) * np.sqrt(variance), rel=1e-6)
    more = probability_of_improvement([np.tile(x, 4)], [np.tile(y, 4)])
    assert more.high - more.low < found.high - found.low


def test_probability_of_improvement_averages_over_tasks():
    better, worse = np.full((4, 3), 2.0), np.full((4, 3), 1.0)
    assert probability_of_improvement([better, worse], [worse, better]).value == 0.5
    one = probability_of_improvement([better], [worse])
    certain = probability_of_improvement([better, better], [worse, worse])
    assert (one.value, one.high, certain.value, certain.high) == (1, 1, 1, 1)
    assert 0.5 < one.low < certain.low < 1  # four against four, twice: more is known, and never everything
    assert 1 - certain.low == pytest.approx((1 - one.low) / np.sqrt(2))


def test_one_stage_percentile_bootstrap_agrees_with_scipy():
    """With one episode per seed there is one stage, which scipy's percentile bootstrap also does."""
    scores = np.random.default_rng(0).gamma(2.0, 10.0, size=30)
    ours = bootstrap([scores], method="percentile", resamples=20_000)
    seeded = {
        "rng" if "rng" in inspect.signature(stats.bootstrap).parameters else "random_state": 1
    }  # before SciPy 1.15
    theirs = stats.bootstrap((scores,), np.mean, n_resamples=20_000, method="percentile", **seeded).confidence_interval
    np.testing.assert_allclose([ours.low, ours.high], theirs, rtol=0.02)


@pytest.mark.parametrize("seeds", [2, 3, 4])
def test_few_seeds_give_students_interval(seeds):
    scores = np.random.default_rng(seeds).normal(50, 10, size=(seeds, 7))
    means = scores.mean(axis=1)
    expected = stats.t.interval(0.95, seeds - 1, means.mean(), stats.sem(means))
    for statistic in (pooled_mean, pooled_iqm)[: 1 if seeds == 4 else 2]:  # nothing is trimmed below four
        found = bootstrap([scores], statistic)
        np.testing.assert_allclose([found.low, found.high], expected, rtol=1e-9)
        assert found.method == f"t over {seeds} seeds"


def test_several_tasks_give_welchs_interval():
    """The mean over two tasks is half the sum of two means, whose interval is Welch's with the sign of one side turned."""
    first, second = np.array([1.0, 5.0, 4.0]), np.array([-20.0, -22.0, -60.0, -31.0])
    found = bootstrap([first, second])
    expected = stats.ttest_ind(first, -second, equal_var=False).confidence_interval()
    np.testing.assert_allclose([2 * found.low, 2 * found.high], [expected.low, expected.high], rtol=1e-9)
    assert found.method == "t over 7 seeds"


def test_the_studentised_bootstrap_is_scipys_idea_of_it():
    """Against a plain loop: quantiles of resampled t statistics, turned around."""
    scores = np.random.default_rng(4).gamma(2.0, 10.0, size=12)
    generator, found = np.random.default_rng(9), []
    for _ in range(4_000):
        drawn = generator.choice(scores, 12)
        found.append((drawn.mean() - scores.mean()) / stats.sem(drawn))
    low, high = np.quantile(found, [0.025, 0.975])
    ours = bootstrap([scores], resamples=20_000)
    expected = scores.mean() - np.array([high, low]) * stats.sem(scores)
    np.testing.assert_allclose([ours.low, ours.high], expected, rtol=0.04)
    assert ours.method == "studentised bootstrap over 12 seeds"


def test_one_seed_speaks_by_its_episodes_and_one_episode_not_at_all():
    episodes = np.array([[1.0, 2.0, 6.0]])
    found = bootstrap([episodes])
    expected = stats.t.interval(0.95, 2, 3, stats.sem(episodes[0]))
    np.testing.assert_allclose([found.low, found.high], expected)
    assert found.method == "t over 3 episodes of one seed"
    iqm = bootstrap([episodes, [[4.0, 5.0, 9.0]], [[4.0, 5.0, 9.0]], [[4.0, 5.0, 9.0]]], pooled_iqm)
    assert iqm.low < iqm.value < iqm.high
    nothing = bootstrap([[3.0]])
    assert (nothing.value, nothing.method) == (3, "no interval: one seed, one episode")
    assert np.isnan([nothing.low, nothing.high]).all()


def test_where_most_seeds_are_alike_the_interval_stays_finite():
    """Four of five seeds fail: a third of the resamples have no spread, and a t statistic of them would be infinite."""
    found = bootstrap([[0.0, 0.0, 0.0, 0.0, 100.0]])
    assert found.method == "t over 5 seeds"
    assert -50 < found.low < 20 < found.high < 100
    alike = bootstrap([[7.0] * 6])
    assert (alike.low, alike.high) == (7, 7)


DISTRIBUTIONS = {"normal": (lambda g, s: g.normal(size=s), 0.0), "gamma": (lambda g, s: g.gamma(4.0, size=s), 4.0)}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("seeds", [2, 3, 5, 10, 25])
def test_nominal_95_per_cent_cover_at_least_93(name, seeds):
    """The table of docs/evaluation.md (benchmarks/intervals.py) in short; a percentile bootstrap covers 50 % with two seeds and 83 % with five."""
    draw, truth = DISTRIBUTIONS[name]
    generator = np.random.default_rng(seeds)
    tables = draw(generator, (500, seeds))
    found = [bootstrap([table], resamples=400, seed=k) for k, table in enumerate(tables)]
    assert np.mean([e.low <= truth <= e.high for e in found]) > 0.93 - 2 * np.sqrt(0.93 * 0.07 / 500)
    narrow = [bootstrap([table], method="percentile", resamples=400, seed=k) for k, table in enumerate(tables)]
    assert np.mean([e.low <= truth <= e.high for e in narrow]) < (0.88 if seeds <= 5 else 0.97)


def test_every_task_counts_the_same_however_many_seeds_it_has():
    few, many = np.full(3, 2.0), np.full(12, 100.0)
    np.testing.assert_allclose([pooled_mean([few, many]), pooled_iqm([few, many])], 51, rtol=1e-12)
    generator = np.random.default_rng(0)
    tasks = [generator.normal(size=count) for count in (2, 3, 6)]
    repeated = np.concatenate([np.repeat(task, 6 // len(task)) for task in tasks])
    assert pooled_iqm(tasks) == pytest.approx(interquartile_mean(repeated), rel=1e-12)
    stacked = [np.stack([task, -task]) for task in tasks]
    np.testing.assert_allclose(pooled_iqm(stacked), [pooled_iqm(tasks), -pooled_iqm(tasks)])


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


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("method", ["auto", "percentile"])
def test_no_score_that_is_not_finite_is_trimmed_away(bad, method):
    for statistic in (pooled_mean, pooled_iqm):
        found = bootstrap([[1.0, 2.0, 3.0, bad]], statistic, method=method)
        assert np.isnan([found.value, found.low, found.high]).all()


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
