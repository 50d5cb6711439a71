"""The environments: Gymnasium's own check, walls, determinism, the vector form against the single one, the noise, the tables."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import gennorm, kstest

import rlkit2.envs
from rlkit2.envs import four_rooms_tables
from rlkit2.envs.noisy_rewards import NoisyRewards
from rlkit2.envs.noisy_rooms import noise_scale, noise_shape, noise_std
from rlkit2.envs.rooms import GOAL_RADIUS, SPEED, is_free, move
from rlkit2.errors import ConfigError
from rlkit2.rewards.mdp import TabularMDP

OURS = sorted(rlkit2.envs._ENVIRONMENTS)
VECTOR = [name for name in OURS if gymnasium.spec(name).vector_entry_point]


@pytest.mark.parametrize("name", OURS)
@pytest.mark.filterwarnings("error")
def test_gymnasium_finds_nothing_wrong(name: str) -> None:
    with gymnasium.make(name, render_mode="rgb_array", disable_env_checker=True) as env:
        check_env(env.unwrapped)


def play(env: gymnasium.Env[Any, Any], seed: int, steps: int = 150) -> list[tuple[Any, ...]]:
    """Observations, rewards and flags of random actions, over the ends of episodes."""
    env.action_space.seed(seed)
    observation, _ = env.reset(seed=seed)
    found: list[tuple[Any, ...]] = [(observation,)]
    for _ in range(steps):
        observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        found.append((observation, reward, terminated, truncated))
        if terminated or truncated:
            found.append((env.reset()[0],))
    return found


@pytest.mark.parametrize("name", OURS)
def test_the_same_seed_gives_the_same_episodes(name: str) -> None:
    first, second, other = (play(gymnasium.make(name), seed) for seed in (7, 7, 8))
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)
    assert any(not np.array_equal(a[0], b[0]) for a, b in zip(first, other, strict=False))


@pytest.mark.parametrize("name", VECTOR)
def test_the_vector_form_equals_single_environments(name: str) -> None:
    count, kwargs = (
        5,
        {"start": [0.1, 0.1, 0.6, 0.6], "goal": [0.35, 0.35]},
    )  # close to the goal, so that episodes end within the steps
    # a copy: make_vec writes its arguments into the specification that it is given, the registry's for a name
    vector = gymnasium.make_vec(copy.deepcopy(gymnasium.spec(name)), num_envs=count, max_episode_steps=12, **kwargs)
    singles = [gymnasium.make(name, max_episode_steps=12, **kwargs) for _ in range(count)]
    rng = np.random.default_rng(0)
    observations, _ = vector.reset(seed=40)
    expected = [env.reset(seed=40 + i)[0] for i, env in enumerate(singles)]
    np.testing.assert_array_equal(observations, np.stack(expected))
    ended = np.zeros(count, bool)
    endings = set()
    for _ in range(60):
        actions = rng.uniform(-1, 1, (count, 2)).astype(np.float32)
        observations, rewards, terminations, truncations, _ = vector.step(actions)
        for i, env in enumerate(singles):
            if ended[i]:
                wanted: tuple[Any, ...] = (env.reset()[0], 0.0, False, False)
            else:
                wanted = env.step(actions[i])[:4]
            np.testing.assert_array_equal(observations[i], wanted[0])
            assert (rewards[i], terminations[i], truncations[i]) == wanted[1:]
            endings.add((bool(terminations[i]), bool(truncations[i])))
            ended[i] = terminations[i] or truncations[i]
    assert {(True, False), (False, True)} <= endings


points = st.tuples(st.floats(-1, 1), st.floats(-1, 1))


@given(start=points, actions=st.lists(points, min_size=1, max_size=30))
def test_no_wall_is_ever_crossed(start: tuple[float, float], actions: list[tuple[float, float]]) -> None:
    position = np.array([start], np.float32)
    if not is_free(position)[0]:
        return
    for action in actions:
        following = move(position, np.array([action], np.float32))
        assert is_free(following)[0]
        step = following - position
        assert np.abs(step).max() <= SPEED * 1.001
        between = position + np.linspace(0, 1, 9)[:, None] * step * np.array([1, 0])  # along x first
        then = np.array([following[0, 0], position[0, 1]]) + np.linspace(0, 1, 9)[:, None] * step * np.array([0, 1])
        assert is_free(np.concatenate([between, then])).all()
        position = following


def test_rewards_and_ends_of_the_rooms() -> None:
    with gymnasium.make("rlkit2/Rooms-v0", goal=[0.35, 0.35], start=[0.3, 0.3, 0.4, 0.6]) as env:
        env.reset(seed=0)
        env.unwrapped.position = np.array([0.35, 0.35 + GOAL_RADIUS + SPEED / 2], np.float32)
        assert env.step(np.array([0.0, 1.0], np.float32))[1:3] == (0.0, False)
        assert env.step(np.array([0.0, -1.0], np.float32))[1:3] == (0.0, False)
        observation, reward, terminated, truncated, _ = env.step(np.array([0.0, -1.0], np.float32))
        assert (reward, terminated, truncated) == (1.0, True, False)
    with gymnasium.make("rlkit2/RoomsDense-v0", goal=[0.35, 0.35]) as env:
        env.reset(seed=0)
        observation, reward, *_ = env.step(np.array([1.0, -0.5], np.float32))
        assert reward == pytest.approx(-np.hypot(observation[0] - 0.35, observation[1] - 0.35), abs=1e-6)


def test_noisy_rewards_follow_the_stated_distribution_and_leave_the_transitions_alone() -> None:
    noisy = gymnasium.make("rlkit2/NoisyRooms-v0", start=[-1.0, -1.0, 1.0, 1.0])
    plain = gymnasium.make("rlkit2/RoomsDense-v0", start=[-1.0, -1.0, 1.0, 1.0])
    rng = np.random.default_rng(1)
    standardized, shapes = [], []
    for episode in range(20):
        observation, _ = noisy.reset(seed=episode)
        np.testing.assert_array_equal(plain.reset(seed=episode)[0], observation)
        for _ in range(100):
            action = rng.uniform(-1, 1, 2).astype(np.float32)
            following, reward, terminated, truncated, _ = noisy.step(action)
            same, mean, *flags, _ = plain.step(action)
            np.testing.assert_array_equal(same, following)
            assert flags == [terminated, truncated]
            standardized.append((reward - mean) / noise_scale(observation))
            shapes.append(noise_shape(observation))
            if terminated or truncated:
                break
            observation = following
    uniform = gennorm.cdf(np.array(standardized), np.array(shapes))
    assert kstest(uniform, "uniform").pvalue > 0.01
    assert np.ptp(shapes) > 2


@pytest.mark.parametrize("shape", [0.8, 2.0, 4.0])
def test_any_environment_may_have_noise_of_a_known_shape_on_its_rewards(shape: float) -> None:
    plain, noisy = (gymnasium.make("Pendulum-v1") for _ in range(2))
    noisy = NoisyRewards(noisy, std=3.0, shape=shape)
    noises, firsts = [], []
    for seed in (*range(10), 0):
        np.testing.assert_array_equal(plain.reset(seed=seed)[0], noisy.reset(seed=seed)[0])
        own: list[float] = []
        for step in range(200):
            action = np.array([np.sin(step)], np.float32)
            observation, reward, *_ = plain.step(action)
            same, with_noise, _, _, info = noisy.step(action)
            np.testing.assert_array_equal(observation, same)
            assert info["reward_without_noise"] == reward
            own.append(float(with_noise) - float(reward))
        noises.append(own)
        firsts.append(own[0])
    assert noises[0] == noises[-1]  # the seed decides
    assert len(set(firsts)) == 10
    drawn = np.ravel(noises[:10])
    assert kstest(gennorm.cdf(drawn, shape, scale=noisy.scale), "uniform").pvalue > 0.01
    assert gennorm.std(shape, scale=noisy.scale) == pytest.approx(3.0)
    assert gymnasium.make(noisy.spec).get_wrapper_attr("shape") == shape
    with pytest.raises(ConfigError, match="must be positive numbers, not 0 and 2"):
        NoisyRewards(plain, std=0, shape=2)


@given(position=points)
def test_the_truth_about_the_noise_is_consistent(position: tuple[float, float]) -> None:
    shape, scale = float(noise_shape(position)), float(noise_scale(position))
    assert float(gennorm.std(shape, scale=scale)) == pytest.approx(float(noise_std(position)), rel=1e-6)
    assert 0.8 <= shape <= 4.0 + 1e-9
    assert 0.1 - 1e-9 <= noise_std(position) <= 0.5 + 1e-9


def test_the_tables_are_those_of_the_environment() -> None:
    tables = four_rooms_tables(slip=0.2)
    np.testing.assert_allclose(tables.transitions.sum(-1), 1)
    assert tables.transitions.shape == (104, 4, 104)
    env = gymnasium.make("rlkit2/GridRooms-v0", slip=0.2).unwrapped
    process, reward = TabularMDP.from_gym(env, 0.9)
    exact = tables.mdp(0.9)
    np.testing.assert_allclose(process.transitions, exact.transitions)
    np.testing.assert_allclose(process.initial_distribution, exact.initial_distribution)
    possible = tables.transitions > 0
    np.testing.assert_allclose(np.asarray(reward)[possible], tables.rewards[possible])
    env.reset(seed=0)
    counts = np.zeros(104)
    for _ in range(4000):
        env.state = 30
        counts[env.step(np.int64(1))[0]] += 1
    np.testing.assert_allclose(counts / 4000, tables.transitions[30, 1], atol=0.025)


def test_the_process_of_an_environment_of_ours_is_found_by_its_id() -> None:
    process, _ = TabularMDP.from_gym("rlkit2/GridRooms-v0", 0.9)
    np.testing.assert_allclose(process.transitions, four_rooms_tables().transitions)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("rlkit2/Rooms-v0", {"reward": "big"}, "reward must be"),
        ("rlkit2/Rooms-v0", {"goal": [0.0, 0.0]}, "goal must be a free point"),
        ("rlkit2/Rooms-v0", {"start": [0.0, 0.0, 0.0, 0.0]}, "holds no free point"),
        ("rlkit2/Rooms-v0", {"start": [0.0, 0.0]}, "start must be a box"),
        ("rlkit2/GridRooms-v0", {"slip": 1.5}, "slip must lie in"),
        ("rlkit2/GridRooms-v0", {"goal": (0, 0)}, "not a free cell"),
        ("rlkit2/GridRooms-v0", {"start": "there"}, "start must be"),
    ],
)
def test_wrong_arguments_are_refused(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gymnasium.make(name, **kwargs)


@pytest.mark.parametrize("name", [name for name in OURS if "CartPole" not in name])
def test_pictures(name: str) -> None:
    with gymnasium.make(name, render_mode="rgb_array") as env:
        env.reset(seed=0)
        picture = env.render()
        assert picture.dtype == np.uint8
        assert picture.ndim == 3
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 4  # floor, walls, goal, point
