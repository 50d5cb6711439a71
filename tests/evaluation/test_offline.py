"""Estimates from data alone against the exact value of finite processes, with terminations, truncations and any start."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlkit2.data.dataset import dataset_from_arrays
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import ConfigError
from rlkit2.evaluation.offline import Candidate, OfflineOptions, importance, judge
from rlkit2.evaluation.offline import fqe as fqe_module
from rlkit2.evaluation.offline import problem as problem_module
from rlkit2.evaluation.offline.behavior import policy_log_probs
from rlkit2.nn import Normalizer, Policy
from rlkit2.nn.actors import make_actor
from rlkit2.nn.distributions import GeneralizedNormal
from tests.evaluation.processes import random_policy, random_process, sample, table_policy

TABLES = OfflineOptions(hidden_sizes=(), features=0, steps=600, learning_rate=0.03, members=8, resamples=50)
METHODS = ("fqe", "dice", "is", "dr")


def judged(
    process, behavior, policies, *, episodes=1500, length=8, seed=0, known=True, options=TABLES, methods=METHODS, **more
):
    dataset, log_probs = sample(process, behavior, episodes, length, seed)
    return judge(
        [Candidate("tables", table_policy(*policies))],
        dataset,
        methods=methods,
        discount=more.pop("discount", process.mdp.discount),
        deterministic=False,
        behavior_log_probs=log_probs if known else None,
        options=options,
        **more,
    )


def deviation(estimate, true):
    """Distance to the truth in half-widths of the 95 % interval."""
    return abs(estimate.value - true) / (estimate.high - estimate.value)


@pytest.mark.parametrize(("seed", "ending"), [(0, 0.0), (0, 0.15), (1, 0.15), (2, 0.0)])
def test_all_estimators_find_the_exact_value(seed, ending):
    process = random_process(seed, ending=ending, discount=0.8)
    behavior = random_policy(process, 100 + seed, 0.5)
    policies = [random_policy(process, seed + k, 0.7) for k in (0, 10)]
    found = judged(process, behavior, policies, seed=seed)
    for index, policy in enumerate(policies):
        true = process.value(policy)
        assert abs(found.data_return - true) > 0.1  # the data's own episodes are cut short
        for method in METHODS:
            estimate = found.estimates[method][index]
            assert deviation(estimate, true) < 2.0, (method, true, str(estimate))
            assert estimate.low < estimate.value < estimate.high
            assert abs(estimate.value - true) < 0.25, (method, true, str(estimate))


def test_errors_shrink_with_the_data():
    process = random_process(3, discount=0.8)
    behavior, policy = random_policy(process, 103, 0.5), random_policy(process, 3, 0.7)
    errors = {}
    for episodes in (30, 1500):
        runs = [judged(process, behavior, [policy], episodes=episodes, seed=seed) for seed in range(2)]
        errors[episodes] = {
            method: np.mean([abs(run.estimates[method][0].value - process.value(policy)) for run in runs])
            for method in METHODS
        }
    for method in METHODS:
        assert errors[1500][method] < 0.5 * errors[30][method], (method, errors)


def test_seeds_are_judged_as_if_alone():
    process = random_process(4, discount=0.8)
    behavior, policies = random_policy(process, 104, 0.5), [random_policy(process, k) for k in range(3)]
    few = dataclasses.replace(TABLES, steps=100)
    together = judged(process, behavior, policies, episodes=100, options=few)
    for index, policy in enumerate(policies):
        alone = judged(process, behavior, [policy], episodes=100, options=few)
        for method in METHODS:
            np.testing.assert_allclose(
                [together.estimates[method][index].value, together.estimates[method][index].high],
                [alone[method].value, alone[method].high],
                rtol=1e-3,
                atol=1e-4,
            )


def wrong_truncation(dataset):
    """Truncations taken for terminations: nothing is bootstrapped there."""
    return {"terminations": dataset.terminations | dataset.truncations, "truncations": dataset.truncations & False}


@pytest.mark.parametrize("mistake", ["truncation", "discount", "start"])
def test_mistakes_move_the_estimate_away(mistake):
    """What the exact test does not forgive: each mistake moves every estimator by twice its tolerance and more."""
    process = random_process(0, ending=0.1, discount=0.8, offset=1.0)
    behavior, policy = random_policy(process, 100, 0.5), random_policy(process, 0, 0.7)
    dataset, log_probs = sample(process, behavior, 1500, 8, 0)
    options = {"discount": process.mdp.discount, "initial_observations": None}
    if mistake == "truncation":
        fields = {name: getattr(dataset, name) for name in ("observations", "actions", "rewards", "next_observations")}
        dataset = dataset_from_arrays(**fields, **wrong_truncation(dataset), spec=dataset.spec)
    elif mistake == "discount":
        options["discount"] = 0.7
    else:  # everything begins in the state whose value is farthest from the mean
        values = [process.value_from(state, policy) for state in range(process.sizes[0] - 1)]
        options["initial_observations"] = np.eye(process.sizes[0], dtype=np.float32)[
            [int(np.argmax(np.abs(np.array(values) - process.value(policy))))]
        ]
    found = judge(
        [Candidate("x", table_policy(policy))],
        dataset,
        methods=METHODS,
        deterministic=False,
        behavior_log_probs=log_probs,
        options=TABLES,
        **options,
    )
    for method in METHODS:
        if mistake == "start" and method in ("is", "dr"):  # their weights belong to the episodes' start: not guessed
            assert str(found[method]) == "refused", method
        else:
            assert abs(found[method].value - process.value(policy)) > 0.5, method


@pytest.mark.parametrize("method", ["fqe", "dice"])
def test_other_starts_are_taken_as_given(method):
    process = random_process(5, discount=0.8)
    behavior, policy = random_policy(process, 105, 0.5), random_policy(process, 5, 0.7)
    eye = np.eye(process.sizes[0], dtype=np.float32)
    for state in (0, 3):
        found = judged(process, behavior, [policy], initial_observations=eye[[state, state]], methods=(method,))
        assert found[method].value == pytest.approx(process.value_from(state, policy), rel=0.15, abs=0.25)


def test_a_cloned_behavior_is_as_good_as_the_known_one():
    process = random_process(6, discount=0.8)
    behavior, policy = random_policy(process, 106, 0.5), random_policy(process, 6, 0.7)
    found = judged(process, behavior, [policy], known=False, methods=("is", "dr"))
    for method in ("is", "dr"):
        assert deviation(found[method], process.value(policy)) < 2.0
    assert any("cloned" in note for note in found.notes)


def test_a_policy_unlike_the_data_is_said_to_be():
    process = random_process(7, actions=4, discount=0.9)
    behavior = np.tile([0.5, 0.49, 0.0099, 0.0001], (process.sizes[0], 1))
    behavior /= behavior.sum(1, keepdims=True)
    strange = np.tile([1e-6, 1e-6, 1e-6, 1 - 3e-6], (process.sizes[0], 1))
    found = judged(process, behavior, [behavior, strange], episodes=150)
    assert found.outside[0] < 0.1
    assert found.outside[1] > 0.9
    for method in METHODS:
        assert not found.estimates[method][1].trusted, method
        assert found.estimates[method][1].reasons
    assert str(found.estimates["is"][1]) == "refused"
    assert found.effective_episodes[0] > 100 > 50 > found.effective_episodes[1]
    for method in ("fqe", "is", "dr"):
        assert found.estimates[method][0].trusted, found.estimates[method][0].reasons
        assert not str(found.estimates[method][0]).endswith("?")


def test_a_fit_too_short_for_the_discount_says_how_many_steps_it_needs():
    process = random_process(8, discount=0.99)
    policy = random_policy(process, 8)
    short = judged(
        process, policy, [policy], episodes=50, methods=("fqe",), options=dataclasses.replace(TABLES, steps=100)
    )
    assert not short["fqe"].trusted
    assert "use 30 times the steps" in short["fqe"].reasons[0]


def gaussian_policy(weight, seeds=1):
    actor = make_actor("gaussian", 1, 1, (), seeds=list(range(seeds)), log_std_init=math.log(0.3))
    actor.named_views()["layers.0.weight"].fill_(weight)
    actor.named_views()["layers.0.bias"].zero_()
    normalizer = Normalizer(action_low=torch.tensor([-4.0]), action_high=torch.tensor([4.0]), seeds=seeds)
    return Policy(actor, normalizer, tuple(range(seeds)))


def linear_dataset(policy, episodes, length, seed=0):
    """x' = .7 x + .2 a + noise, r = -x^2 - .1 a^2 + 1, actions from `policy`, all episodes truncated."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    x = rng.normal(size=(episodes, 1)).astype(np.float32)
    columns = {name: [] for name in ("x", "a", "r", "n")}
    for _ in range(length):
        a = policy(torch.from_numpy(x), deterministic=False, generator=generator).numpy()
        following = (0.7 * x + 0.2 * a + 0.2 * rng.normal(size=x.shape)).astype(np.float32)
        for name, value in zip(columns, (x, a, 1 - x[:, 0] ** 2 - 0.1 * a[:, 0] ** 2, following), strict=True):
            columns[name].append(value)
        x = following
    flat = {
        name: np.stack(values, 1).reshape(episodes * length, *values[0].shape[1:]) for name, values in columns.items()
    }
    ends = np.tile(np.arange(length) == length - 1, episodes)
    spec = DatasetSpec(
        observation_space=spaces.Box(-np.inf, np.inf, (1,), np.float32),
        action_space=spaces.Box(-4.0, 4.0, (1,), np.float32),
        id="linear",
    )
    return dataset_from_arrays(flat["x"], flat["a"], flat["r"], flat["n"], ends & False, ends, spec)


def linear_value(gain, deviation, discount=0.9):
    """The exact value of a = 4 gain x + 4 deviation e from x0 ~ N(0, 1) (without the clip, which is far away)."""
    b, s = 4 * gain, 4 * deviation
    closed, noise = 0.7 + 0.2 * b, 0.04 + 0.04 * s**2
    square = -(1 + 0.1 * b**2) / (1 - discount * closed**2)
    constant = (1 - 0.1 * s**2 + discount * noise * square) / (1 - discount)
    return square + constant


@pytest.mark.parametrize("deterministic", [False, True])
def test_continuous_actions(deterministic):
    behavior, policy = gaussian_policy(-0.1), gaussian_policy(-0.2, seeds=2)
    dataset = linear_dataset(behavior, 300, 8)
    options = OfflineOptions(
        hidden_sizes=(32,), features=64, steps=600, learning_rate=0.01, members=4, batch_size=128, draws=4
    )
    found = judge(
        [Candidate("x", policy)], dataset, methods=METHODS, discount=0.9, deterministic=deterministic, options=options
    )
    true = linear_value(-0.2, 0.0 if deterministic else 0.3)
    assert abs(linear_value(-0.2, 0.0) - linear_value(-0.2, 0.3)) > 1.0  # the difference that must be seen
    for method in ("fqe", "dice") if deterministic else METHODS:
        for seed in range(2):
            assert found.estimates[method][seed].value == pytest.approx(true, abs=0.6), method
    if deterministic:
        for method in ("is", "dr"):
            assert str(found.estimates[method][0]) == "refused"
            assert "--stochastic" in found.estimates[method][0].reasons[0]
    assert found.labels == ("x, seed 0", "x, seed 1")


def test_densities_are_per_unit_of_raw_actions():
    policy = gaussian_policy(-0.1)
    dataset = linear_dataset(policy, 20, 5)
    problem = problem_module.make_problem(
        [policy], dataset, 0.9, deterministic=False, initial_observations=None, options=OfflineOptions()
    )
    expected = torch.distributions.Normal(-0.4 * dataset.observations[:, 0], 1.2).log_prob(dataset.actions[:, 0])
    torch.testing.assert_close(policy_log_probs(problem)[0], expected, rtol=1e-4, atol=1e-4)


def test_possible_returns_know_that_an_episode_may_end_at_once():
    process = random_process(0, ending=0.2, offset=5.0)
    policy = random_policy(process, 0)
    for ending, lowest in ((0.2, 1.0), (0.0, 10.0)):
        process = random_process(0, ending=ending, offset=5.0)
        dataset, _ = sample(process, policy, 50, 8)
        problem = problem_module.make_problem(
            [table_policy(policy)], dataset, 0.9, deterministic=False, initial_observations=None, options=TABLES
        )
        low, high = fqe_module.possible_returns(problem)
        smallest = float(dataset.rewards.min())
        assert low == pytest.approx(lowest * smallest, rel=1e-5)
        assert high == pytest.approx(10.0 * float(dataset.rewards.max()), rel=1e-5)


def test_bad_questions_are_refused_in_one_line():
    process = random_process(9)
    policy = random_policy(process, 9)
    dataset, log_probs = sample(process, policy, 20, 5)
    candidates = [Candidate("mine", table_policy(policy))]
    for message, options in {
        "unknown method 'fq'; choose from: fqe": {"methods": ("fq",)},
        r"discount is 1.0; an evaluation": {"discount": 1.0},
        "behavior_log_probs must be": {"behavior_log_probs": log_probs[:-1], "methods": ("is",)},
        r"initial_observations must be \[I, 6\]": {"initial_observations": np.zeros((2, 3))},
    }.items():
        with pytest.raises(ConfigError, match=message):
            judge(candidates, dataset, options=TABLES, deterministic=False, **options)
    with pytest.raises(
        ConfigError, match="mine takes 6 observation columns and 3 discrete actions, the dataset linear has 1"
    ):
        judge(candidates, linear_dataset(gaussian_policy(0.0), 3, 3), options=TABLES)


def test_one_episode_gives_no_interval():
    process = random_process(10, ending=0.0)
    policy = random_policy(process, 10)
    found = judged(process, policy, [policy], episodes=1, length=40, methods=("fqe",))
    assert math.isnan(found["fqe"].low)
    assert "one episode gives no interval" in found["fqe"].reasons
    assert found.to_dict()["estimates"]["fqe"][0]["low"] is None


@pytest.mark.parametrize("seed", range(3))
def test_weighted_sums_are_what_the_formula_says(seed):
    """sum_t gamma^t sum_e rho x / sum_e rho by loops; an ended episode keeps its last weight."""
    process = random_process(seed, ending=0.2)
    behavior, policy = random_policy(process, 20 + seed), random_policy(process, seed)
    dataset, log_probs = sample(process, behavior, 12, 6, seed)
    problem = problem_module.make_problem(
        [table_policy(policy)], dataset, 0.9, deterministic=False, initial_observations=None, options=TABLES
    )
    ratios = importance.episode_ratios(problem, policy_log_probs(problem), torch.from_numpy(log_probs))
    x = np.random.default_rng(seed).normal(size=len(dataset))
    states, actions = dataset.observations.argmax(1).numpy(), dataset.actions.numpy()
    one_step = policy[states, actions] / behavior[states, actions]
    starts, expected = dataset.episode_starts.tolist(), 0.0
    for time in range(int(dataset.episode_lengths.max())):
        above = below = 0.0
        for start, stop in itertools.pairwise(starts):
            weight = one_step[start : min(start + time + 1, stop)].prod()
            below += weight
            above += weight * x[start + time] if start + time < stop else 0.0
        expected += 0.9**time * above / below
    values, resampled = importance.weighted_sum(ratios, torch.from_numpy(x)[None], problem.resamples(20, 0))
    assert float(values[0]) == pytest.approx(expected, rel=1e-5)
    assert resampled.shape == (1, 20)


NOISE = np.array([0.1, 2.0, 0.5, 0.1, 1.0])  # deviation of the rewards' noise by state


def noisy_targets(tails: float):
    """A problem whose rewards carry noise of known deviation, a policy, its Q's exact target deviation at every row."""
    process = random_process(5, states=5, ending=0.1, discount=0.8)
    behavior, policy = random_policy(process, 105, 0.5), random_policy(process, 5, 0.7)
    dataset, _ = sample(process, behavior, 800, 8, 0)
    states = dataset.observations.argmax(1)
    noise = GeneralizedNormal(torch.zeros(()), torch.ones(()), torch.tensor(tails))
    torch.manual_seed(0)
    drawn = noise.sample((len(states),)) / noise.variance.sqrt() * torch.from_numpy(NOISE)[states]
    fields = {
        name: getattr(dataset, name)
        for name in ("observations", "actions", "next_observations", "terminations", "truncations")
    }
    noisy = dataset_from_arrays(**fields, rewards=(dataset.rewards + drawn).float(), spec=dataset.spec)
    values = np.array([process.value_from(state, policy) for state in range(6)])
    transitions = process.mdp.transitions.numpy()
    targets = process.reward + process.mdp.discount * values
    mean = (transitions * targets).sum(-1, keepdims=True)
    variance = (transitions * (targets - mean) ** 2).sum(-1)[:-1] + (NOISE**2)[:, None]
    return process, policy, noisy, np.sqrt(variance[states, dataset.actions])


@pytest.mark.parametrize(("critic", "tails"), [("gaussian", 2.0), ("ggd", 0.8)])
def test_fitted_q_knows_the_noise_of_its_targets(critic, tails):
    _, policy, dataset, true = noisy_targets(tails)
    options = dataclasses.replace(TABLES, critic=critic, members=4)
    problem = problem_module.make_problem(
        [table_policy(policy)], dataset, 0.8, deterministic=False, initial_observations=None, options=options
    )
    noise = fqe_module.fit_q(problem, options).noise()
    assert noise.level == 0.9
    assert abs(noise.coverage.item() - 0.9) < 0.03
    found = noise.deviation[0].numpy()
    for state in range(5):
        rows = dataset.observations.argmax(1).numpy() == state
        assert 0.75 < found[rows].mean() / true[rows].mean() < 1.3, state
    assert fqe_module.fit_q(problem, dataclasses.replace(options, critic="mse", steps=2)).noise() is None


def test_weights_by_noise_leave_the_truth_where_it_is():
    process, policy, dataset, _ = noisy_targets(2.0)
    found = {}
    for weighting in ("none", "iv"):
        options = dataclasses.replace(TABLES, critic="gaussian", sample_weighting=weighting, members=5, steps=400)
        result = judge(
            [Candidate("x", table_policy(policy))],
            dataset,
            methods=("fqe",),
            discount=0.8,
            deterministic=False,
            options=options,
        )
        assert any("noise of fitted Q's targets (gaussian)" in note for note in result.notes)
        found[weighting] = result["fqe"]
        assert deviation(result["fqe"], process.value(policy)) < 2.0
    assert found["none"].value != found["iv"].value
    with pytest.raises(ConfigError, match="weights between samples need critic"):
        dataclasses.replace(TABLES, sample_weighting="iv")
