"""Counting started episodes, independence of the number of environments, units, normalisation and bad input."""

import dataclasses
import json
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Dict, Discrete
from torch import nn

from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import ConfigError, EnvironmentUnavailableError, MissingExtraError
from rlkit2.evaluation import Evaluator, evaluate_policy, evaluation_seeds, make_environment, reference_scores
from rlkit2.evaluation.rollouts import environment_actions


class LinearPolicy(nn.Module):
    """Random linear policies for S seeds with the calling convention of `rlkit2.nn.policy.Policy`."""

    def __init__(self, spec, seeds=3, scale=0.3):
        super().__init__()
        self.seeds = tuple(range(seeds))
        self.start = int(spec.action_space.start) if spec.discrete else None
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(
            scale * torch.randn(seeds, spec.observation_size, spec.action_size, generator=generator)
        )

    def forward(self, observations, deterministic=True, generator=None):
        assert (observations.ndim == 2) == (len(self.seeds) == 1)
        single = observations.ndim == 2
        scores = torch.matmul(observations[None] if single else observations, self.weight)
        if not deterministic:
            scores = scores + torch.randn(scores.shape, generator=generator)
        actions = scores.tanh() if self.start is None else scores.argmax(-1) + self.start
        return actions[0] if single else actions


class UnevenEnv(gym.Env):
    """Half of the episodes last one step and earn 0, the other half last 20 steps and earn 1."""

    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 20 if self.np_random.random() < 0.5 else 1
        self.long = self.left == 20
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.left -= 1
        return (
            np.zeros(1, np.float32),
            float(self.left == 0 and self.long),
            self.left == 0,
            False,
            {"success": self.long},
        )


def spec_of(env, **changes):
    made = gym.make(env) if isinstance(env, str) else env()
    env_spec = made.spec if isinstance(env, str) else None
    return DatasetSpec(
        observation_space=made.observation_space,
        action_space=made.action_space,
        env_spec=env_spec,
        id="test/set-v0",
        **changes,
    )


CARTPOLE = spec_of("CartPole-v1", ref_min_score=20.0, ref_max_score=500.0)


def test_the_first_started_episodes_are_counted_not_the_first_finished():
    spec = spec_of(UnevenEnv)
    result = evaluate_policy(LinearPolicy(spec, 2), spec, env=UnevenEnv, episodes=200, num_envs=8)
    truth = []
    for seed in evaluation_seeds(0, 200):
        env = UnevenEnv()
        env.reset(seed=seed)
        truth.append(float(env.long))
    np.testing.assert_array_equal(result.returns, [truth, truth])
    np.testing.assert_array_equal(result.lengths, np.where(result.returns == 1, 20, 1))
    np.testing.assert_array_equal(result.successes, result.returns == 1)
    assert 0.4 < result.returns.mean() < 0.6

    assert np.mean([naive_mean(repeat) for repeat in range(50)]) < 0.35


def naive_mean(repeat):
    """Mean return of the first 16 episodes that finish on 8 environments, each started again as soon as it ends."""
    envs, finished = [UnevenEnv() for _ in range(8)], []
    for index, env in enumerate(envs):
        env.reset(seed=8 * repeat + index)
    while len(finished) < 16:
        for env in envs:
            _, reward, terminated, _, _ = env.step(np.zeros(1))
            if terminated:
                finished.append(reward)
                env.reset()
    return np.mean(finished[:16])


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "Hopper-v5"])
def test_results_do_not_depend_on_the_number_of_environments(env, deterministic):
    if env == "Hopper-v5":
        pytest.importorskip("mujoco")
    spec = spec_of(env)
    policy = LinearPolicy(spec)
    results = [
        evaluate_policy(policy, spec, episodes=13, num_envs=num_envs, deterministic=deterministic, max_steps=60)
        for num_envs in (1, 4, 13, None)
    ]
    for other in results[1:]:
        np.testing.assert_array_equal(other.returns, results[0].returns)
        np.testing.assert_array_equal(other.lengths, results[0].lengths)
    assert len(np.unique(results[0].returns)) > 5


def test_more_episodes_extend_and_another_seed_changes_the_episodes():
    policy = LinearPolicy(CARTPOLE)
    long = evaluate_policy(policy, CARTPOLE, episodes=23, deterministic=False)
    short = evaluate_policy(policy, CARTPOLE, episodes=12, deterministic=False)
    np.testing.assert_array_equal(short.returns, long.returns[:, :12])
    other = evaluate_policy(policy, CARTPOLE, episodes=12, deterministic=False, seed=1)
    assert not set(short.episode_seeds) & set(other.episode_seeds)
    assert (short.returns != other.returns).any()
    assert min(short.episode_seeds) >= 2**30
    assert max(evaluation_seeds(2**14 - 1, 2**16)) < 2**31


def test_every_policy_seed_sees_the_same_episodes():
    """Three copies of one policy earn the same; and one seed alone earns what it earns beside others."""
    policy = LinearPolicy(CARTPOLE)
    together = evaluate_policy(policy, CARTPOLE, episodes=11)
    alone = LinearPolicy(CARTPOLE, 1)
    alone.weight.data = policy.weight.data[1:2]
    np.testing.assert_array_equal(evaluate_policy(alone, CARTPOLE, episodes=11).returns[0], together.returns[1])
    policy.weight.data[:] = policy.weight.data[:1]
    copies = evaluate_policy(policy, CARTPOLE, episodes=11).returns
    np.testing.assert_array_equal(copies, np.repeat(copies[:1], 3, axis=0))


def test_returns_are_those_of_a_plain_loop():
    spec = spec_of("Pendulum-v1")
    policy = LinearPolicy(spec, 1)
    result = evaluate_policy(policy, spec, episodes=2)
    env = gym.make("Pendulum-v1")
    for episode, seed in enumerate(result.episode_seeds):
        observation, _ = env.reset(seed=seed)
        total, ended = 0.0, False
        while not ended:
            action = policy(torch.from_numpy(observation)[None])[0].detach().numpy()
            observation, reward, terminated, truncated, _ = env.step(action)
            total, ended = total + float(reward), terminated or truncated
        assert result.returns[0, episode] == pytest.approx(total, rel=1e-3)
    assert (result.lengths == 200).all()


def test_max_steps_and_progress():
    seen = []
    result = evaluate_policy(
        LinearPolicy(CARTPOLE),
        CARTPOLE,
        episodes=5,
        max_steps=4,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert (result.lengths == 4).all()
    assert (result.returns == 4).all()
    assert seen == [(k, 15) for k in range(1, 16)]


def test_actions_are_clipped_and_shaped_for_the_environment():
    box = Box(np.array([[-1.0, -2.0]]), np.array([[1.0, 2.0]]), dtype=np.float64)
    actions = environment_actions(np.array([[[5.0, -5.0], [0.5, np.nan]]], np.float32), box)
    assert actions.dtype == np.float64
    np.testing.assert_array_equal(actions, [[[[1.0, -2.0]], [[0.5, np.nan]]]])
    assert environment_actions(np.array([[[3]]]), Discrete(5, start=1))[0, 0] == 3


class CountingEnv(gym.Env):
    """Dict observations with keys the policy does not use, discrete actions from 2; the return counts actions equal to the goal."""

    observation_space = Dict(
        {
            "achieved_goal": Box(-9, 9, (2,)),
            "desired_goal": Box(-9, 9, (1,)),
            "observation": Box(-9, 9, (3,), np.float64),
        }
    )
    action_space = Discrete(2, start=2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.goal, self.steps = int(self.np_random.integers(2)), 0
        return self._observation(), {}

    def _observation(self):
        return {
            "observation": np.zeros(3),
            "achieved_goal": np.ones(2, np.float32),
            "desired_goal": np.array([self.goal], np.float32),
        }

    def step(self, action):
        assert self.action_space.contains(action)
        self.steps += 1
        return self._observation(), float(action - 2 == self.goal), False, self.steps == 3, {}


def test_goal_dictionaries_are_flattened_as_the_dataset_is_and_discrete_starts_are_kept():
    spec = spec_of(CountingEnv)
    policy = LinearPolicy(spec, 2)
    policy.weight.data[:] = 0
    policy.weight.data[:, 3] = torch.tensor([-1.0, 1.0])  # column 3 is the desired goal
    result = evaluate_policy(policy, spec, env=CountingEnv, episodes=20)
    assert (result.returns == 3).all()
    assert result.successes is None


def test_a_diverged_seed_gets_no_return_and_the_others_go_on():
    spec = spec_of("Pendulum-v1")
    policy = LinearPolicy(spec)
    policy.weight.data[1] = float("nan")
    result = evaluate_policy(policy, spec, episodes=3, max_steps=5)
    assert np.isnan(result.returns[1]).all()
    assert np.isfinite(result.returns[[0, 2]]).all()
    assert result.lines()[1]["returns"] == [None] * 3
    assert result.summary()["mean"] is None
    json.dumps(result.to_dict(), allow_nan=False)


def test_the_evaluator_builds_its_environments_once_and_gives_json_lines():
    made = []

    def build():
        made.append(gym.make("CartPole-v1"))
        return made[-1]

    with Evaluator(CARTPOLE, episodes=4, env=build) as evaluator:
        first, second = evaluator(LinearPolicy(CARTPOLE), 10), evaluator(LinearPolicy(CARTPOLE), 20)
    assert len(made) == 3 * 4
    assert first == second
    assert json.loads(json.dumps(first)) == first
    assert [line["seed"] for line in first] == [0, 1, 2]
    assert set(first[0]) == {"seed", "returns", "lengths", "normalized_scores", "deterministic"}


def test_training_mode_is_left_as_it_was():
    policy = LinearPolicy(CARTPOLE).train()
    evaluate_policy(policy, CARTPOLE, episodes=1)
    assert policy.training


# normalisation


def test_scores_follow_the_reference_returns_of_the_dataset():
    result = evaluate_policy(LinearPolicy(CARTPOLE), CARTPOLE, episodes=3)
    np.testing.assert_allclose(result.normalized_scores, 100 * (result.returns - 20) / 480)
    assert "metadata of test/set-v0" in result.normalization
    assert result.summary()["normalized"]["mean"] == pytest.approx(result.normalized_scores.mean())


@pytest.mark.parametrize("changes", [{}, {"ref_min_score": 1.0}, {"ref_min_score": 1.0, "ref_max_score": 1.0}])
def test_without_reference_returns_there_are_no_scores_but_a_reason(changes):
    spec = spec_of("CartPole-v1", **changes)
    result = evaluate_policy(LinearPolicy(spec), spec, episodes=2)
    assert result.normalized_scores is None
    assert result.summary()["normalized"] is None
    assert "test/set-v0 has no reference returns" in result.normalization


def test_reference_returns_hold_for_the_environment_of_the_dataset_only():
    policy = LinearPolicy(CARTPOLE)
    assert evaluate_policy(policy, CARTPOLE, episodes=1, env="CartPole-v1").normalized_scores is not None
    other = evaluate_policy(policy, CARTPOLE, episodes=1, env="CartPole-v0")
    assert other.normalized_scores is None
    assert "belong to CartPole-v1" in other.normalization


def test_the_shipped_table_serves_known_ids_in_their_environment_only():
    hopper = DatasetSpec(
        observation_space=Box(-1, 1, (11,)), action_space=Box(-1, 1, (3,)), id="mujoco/hopper/medium-v0"
    )
    assert reference_scores(hopper) is None
    hopper = dataclasses.replace(
        hopper, env_spec=EnvSpec("Hopper-v5", entry_point="gymnasium.envs.mujoco.hopper_v5:HopperEnv")
    )
    known = reference_scores(hopper)
    assert known.maximum == 4098.17
    assert "huggingface.co/farama-minari/Hopper-v5-SAC-expert" in known.source
    own = reference_scores(dataclasses.replace(hopper, ref_min_score=0.0, ref_max_score=10.0))
    assert (own.minimum, own.maximum) == (0, 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hopper", "halfcheetah", "walker2d"])
def test_random_reference_returns_can_be_measured_again(name):
    pytest.importorskip("mujoco")
    known = {"hopper": "Hopper-v5", "halfcheetah": "HalfCheetah-v5", "walker2d": "Walker2d-v5"}[name]
    spec = dataclasses.replace(spec_of(known), id=f"mujoco/{name}/medium-v0")
    env = gym.make(known)
    env.action_space.seed(1)
    returns = []
    for seed in range(100):
        env.reset(seed=seed)
        returns.append(0.0)
        ended = False
        while not ended:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            returns[-1] += reward
            ended = terminated or truncated
    assert abs(np.mean(returns) - reference_scores(spec).minimum) < 4 * np.std(returns) / 10


# environments that are not there


def test_the_evaluation_environment_comes_before_the_collection_environment():
    spec = dataclasses.replace(CARTPOLE, eval_env_spec=gym.spec("CartPole-v0"))
    result = evaluate_policy(LinearPolicy(spec), spec, episodes=1)
    assert result.environment == "CartPole-v0"
    assert result.reference.environment == "CartPole-v0"


def test_keyword_arguments_and_wrappers_of_the_specification_are_applied():
    env = gym.wrappers.TransformReward(gym.make("CartPole-v1", max_episode_steps=7), lambda reward: 2 * reward)
    wrapped = gym.make("CartPole-v1", max_episode_steps=7)
    wrapped = gym.wrappers.TimeAwareObservation(wrapped)
    spec = dataclasses.replace(CARTPOLE, env_spec=wrapped.spec, observation_space=wrapped.observation_space)
    assert evaluate_policy(LinearPolicy(spec), spec, episodes=2).lengths.max() <= 7
    result = evaluate_policy(LinearPolicy(CARTPOLE), CARTPOLE, episodes=2, env=lambda: env, num_envs=1, max_steps=3)
    assert (result.returns[0] == 6).all()


def test_no_environment_names_the_option():
    spec = dataclasses.replace(CARTPOLE, env_spec=None)
    with pytest.raises(EnvironmentUnavailableError, match=r"test/set-v0 names no environment; name one with --env"):
        evaluate_policy(LinearPolicy(spec), spec)


def test_an_unknown_environment_is_one_clear_line():
    with pytest.raises(EnvironmentUnavailableError, match=r"NoSuchThing-v3 cannot be built.*--env") as caught:
        evaluate_policy(LinearPolicy(CARTPOLE), CARTPOLE, env="NoSuchThing-v3")
    assert "\n" not in str(caught.value)


def test_an_environment_that_does_not_fit_is_refused_before_it_is_stepped():
    with pytest.raises(
        EnvironmentUnavailableError, match=r"Pendulum-v1 gives observations of 3 columns, .* expects 4 columns"
    ):
        evaluate_policy(LinearPolicy(CARTPOLE), CARTPOLE, env="Pendulum-v1")
    more_choices = dataclasses.replace(CARTPOLE, action_space=Discrete(3))
    with pytest.raises(
        EnvironmentUnavailableError, match=r"takes actions in Discrete\(2\), .* gives actions in Discrete\(3\)"
    ):
        evaluate_policy(LinearPolicy(more_choices), more_choices)


@pytest.mark.parametrize(
    ("module", "entry", "extra"),
    [
        ("mujoco", "gymnasium.envs.mujoco.hopper_v5:HopperEnv", "mujoco"),
        ("Box2D", "gymnasium.envs.box2d.lunar_lander:LunarLander", "box2d"),
        ("gymnasium_robotics", "gymnasium_robotics.envs.maze.point_maze:PointMazeEnv", "robotics"),
    ],
)
def test_a_missing_simulator_names_the_extra(monkeypatch, module, entry, extra):
    for name in [
        name
        for name in sys.modules
        if name.split(".")[0] == module or name.startswith(entry.split(":")[0].rsplit(".", 1)[0])
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'rlkit2\[{extra}\]'"):
        make_environment(EnvSpec("Some-v0", entry_point=entry))


@pytest.mark.parametrize("wrong", [{"episodes": 0}, {"num_envs": 0}, {"max_steps": 0}, {"seed": -1}])
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        evaluate_policy(LinearPolicy(CARTPOLE), CARTPOLE, **wrong)
