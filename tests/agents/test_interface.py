"""Policies in the loop of an environment: arrays, dicts, batches and stacks give what the rows of a dataset give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers import FrameStackObservation

import rlkit2
from rlkit2.agents import make_agent
from rlkit2.agents.bc import BCConfig
from rlkit2.agents.policy_interface import make_interface
from rlkit2.data import DatasetSpec
from rlkit2.errors import ConfigError, RunError
from rlkit2.evaluation import evaluate_policy
from rlkit2.evaluation.rollouts import environment_actions, stack, step_action
from rlkit2.nn import Policy, load_policy
from rlkit2.nn.interface import Interface
from tests.training.tiny_problem import Walk, tiny_dataset

IMAGE = spaces.Box(0, 255, (5, 6, 1), np.uint8)
BOX = spaces.Box(-1.0, np.array([1.0, 2.0], np.float32), (2,), np.float32)
OBSERVATIONS: dict[str, spaces.Space[Any]] = {
    "box": spaces.Box(-3, 3, (3,), np.float32),
    "box64": spaces.Box(-np.inf, np.inf, (2, 2), np.float64),
    "number": spaces.Box(0, 1, (), np.float32),
    "whole": spaces.Box(-5, 5, (1, 3), np.int16),
    "image": IMAGE,
    "discrete": spaces.Discrete(4, start=-2),
    "multidiscrete": spaces.MultiDiscrete([3, 2], start=[1, 0]),
    "multibinary": spaces.MultiBinary([2, 3]),
    "goal": spaces.Dict(dict.fromkeys(("observation", "achieved_goal", "desired_goal"), BOX)),
    "dict": spaces.Dict({"b": spaces.Dict({"z": IMAGE, "a": spaces.Discrete(3)}), "a": BOX}),
    "tuple": spaces.Tuple([BOX, spaces.MultiBinary(2)]),
}
ACTIONS: dict[str, spaces.Space[Any]] = {
    "box": BOX,
    "matrix": spaces.Box(-0.1, 0.3, (2, 1), np.float64),
    "number": spaces.Box(0, 1, (), np.float32),
    "free": spaces.Box(-np.inf, np.inf, (2,), np.float32),
    "whole": spaces.Box(-3, 200, (2,), np.int32),
    "discrete": spaces.Discrete(4, start=-2),
    "multidiscrete": spaces.MultiDiscrete([[3, 2], [2, 4]]),
    "multibinary": spaces.MultiBinary(3),
    "dict": spaces.Dict({"b": BOX, "a": spaces.Dict({"c": spaces.Box(-1, 1, (1, 2), np.float32)})}),
    "tuple": spaces.Tuple([spaces.Discrete(3, start=5), spaces.MultiBinary(2)]),
}
PAIRS = [(one, "box") for one in OBSERVATIONS] + [("box", one) for one in ACTIONS if one != "box"]


def made(observation: spaces.Space[Any], action: spaces.Space[Any], frames: int = 1, seeds: int = 1) -> Policy:
    """An untrained policy, with actions that reach beyond the bounds."""
    spec = DatasetSpec(observation_space=observation, action_space=action).stacked(frames)
    config = BCConfig(hidden_sizes=(8,), tanh_mean=False, log_std_init=1.0)
    policy = make_agent(config, spec, seeds=seeds).policy
    policy.metadata["spec"] = spec.to_json()
    return policy


def samples(space: spaces.Space[Any], count: int) -> list[Any]:
    space.seed(3)
    return [space.sample() for _ in range(count)]


def same(one: Any, other: Any) -> None:
    """Equal structure, types and values."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        one, other = tuple(one.values()), tuple(other.values())
    if isinstance(one, tuple):
        for a, b in zip(one, other, strict=True):
            same(a, b)
    else:
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("observation", "action"), PAIRS, ids=map("-".join, PAIRS))
def test_predict_gives_the_action_of_the_observations_row(observation: str, action: str) -> None:
    space, actions = OBSERVATIONS[observation], ACTIONS[action]
    policy = made(space, actions)
    seen = samples(space, 6)
    spec = DatasetSpec(observation_space=space, action_space=actions)
    rows = torch.from_numpy(spec.flattener.flatten(stack(seen))).reshape(6, -1)
    stored = policy(rows).numpy()
    expected = environment_actions(stored.reshape(1, 6, -1), actions)[0]
    for one, row in zip(seen, expected, strict=True):
        found, state = policy.predict(one)
        assert state is None
        assert found in actions
        wanted = step_action(row, actions)
        if isinstance(actions, spaces.Discrete):
            assert found == wanted
            assert {int(found): 1}[found] == 1  # it serves as a key, as tables of environments need it
        elif isinstance(actions, spaces.Dict | spaces.Tuple):
            np.testing.assert_allclose(spaces.flatten(actions, found), spaces.flatten(actions, wanted), atol=1e-6)
        else:
            np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_allclose(policy(stack(seen)), stored, atol=1e-6)  # forward takes the batch as it is, too
    batch, _ = policy.predict(stack(seen))
    assert batch in batch_space(actions, 6) or action in ("dict", "tuple")


@pytest.mark.parametrize("name", ["box", "image", "discrete", "dict", "multibinary"])
def test_stacks_are_made_of_frames_as_the_wrapper_makes_them(name: str) -> None:
    """Two environments step together; one of them starts anew twice."""
    space, frames = OBSERVATIONS[name], 3
    policy = made(space, ACTIONS["box"], frames)
    seen, starts = samples(space, 20), [[True, True]] + [[step == 4, step in (3, 8)] for step in range(1, 10)]
    state, last = None, [[], []]
    for step, start in enumerate(starts):
        newest = [seen[2 * step], seen[2 * step + 1]]
        for history, frame, begins in zip(last, newest, start, strict=True):
            history[:] = [frame] * frames if begins else [*history[1:], frame]
        given = stack(newest)
        actions, state = policy.predict(given, state, np.array(start))
        assert isinstance(state, np.ndarray)
        expected = policy(stack([stack(history) for history in last]))
        np.testing.assert_allclose(actions, expected, atol=1e-6)
    one, state = policy.predict(seen[0], None, True)
    two, _ = policy.predict(seen[1], state)
    wanted = policy(stack([stack([seen[0]] * frames), stack([seen[0], seen[0], seen[1]])]))
    np.testing.assert_allclose([one, two], wanted, atol=1e-6)


def test_a_forgotten_history_is_refused_and_never_guessed() -> None:
    policy = made(OBSERVATIONS["box"], BOX, frames=4)
    one = np.zeros(3, np.float32)
    for given in ({}, {"episode_start": False}, {"episode_start": [True, False]}):
        with pytest.raises(ConfigError, match="sees the last 4 observations: give the state that predict returned"):
            policy.predict(one, **given)
    _, state = policy.predict(one, episode_start=True)
    with pytest.raises(ConfigError, match=r"state has shape \[4, 3\], not \[2, 4, 3\]"):
        policy.predict(np.zeros((2, 3)), state)
    with pytest.raises(ConfigError, match=r"episode_start has shape \[3\]"):
        policy.predict(np.zeros((2, 3)), None, [True, True, True])
    with pytest.raises(ConfigError, match=r"takes \[3\] or a batch \[B, 3\]"):
        policy.predict(np.zeros((2, 4, 3)), None, True)  # stacks are for the call, not for predict
    assert policy(np.zeros((2, 4, 3))).shape == (2, 2)
    with pytest.raises(ConfigError, match=r"takes observations \[B, 12\], not \[3\]"):
        policy(one)


def test_tensors_arrays_one_and_many() -> None:
    policy = made(OBSERVATIONS["box"], BOX)
    rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    actions = policy(rows)
    for given, expected in ((rows[2], actions[2]), (rows, actions), (rows[None], actions[None])):
        torch.testing.assert_close(policy(given), expected)
        found = policy(given.numpy())
        assert isinstance(found, np.ndarray)
        torch.testing.assert_close(torch.from_numpy(found), expected)
    tensor, _ = policy.predict(rows)
    assert isinstance(tensor, torch.Tensor)
    torch.testing.assert_close(tensor, actions)
    read_only = rows.numpy().copy()
    read_only.flags.writeable = False
    np.testing.assert_array_equal(policy.predict(read_only[:, ::-1])[0], policy.predict(rows.flip(-1).numpy())[0])
    np.testing.assert_array_equal(policy.predict(rows[0].tolist())[0], policy.predict(rows[0].numpy())[0])
    drawn = [policy.predict(rows.numpy(), None, None, False, torch.Generator().manual_seed(k))[0] for k in (1, 1, 2)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()
    assert all(one in batch_space(BOX, 5) for one in drawn)


@pytest.mark.parametrize(
    ("space", "given", "message"),
    [
        ("box", np.zeros(4), r"the observation has shape \[4\]; this policy takes \[3\] or a batch \[B, 3\]"),
        ("box", np.zeros((2, 2, 3)), r"has shape \[2, 2, 3\]"),
        ("box", np.array([0.0, np.nan, 0.0]), "holds a number that is not finite"),
        ("box", {"a": np.zeros(3)}, r"the observation is a dict with entries a; this policy takes an array \[3\]"),
        ("box", np.array(["a", "b", "c"]), "is not an array of numbers"),
        ("box", None, "is not an array of numbers"),
        ("image", np.zeros((5, 6, 1), np.float32), "is of type float32; this policy takes bytes, 0 to 255"),
        ("discrete", 1.0, "is of type float64; this policy takes choices as whole numbers"),
        ("discrete", 2, "is 2, which lies outside of its space"),
        ("goal", np.zeros(2), r"the observation has no entry 'observation', which this policy reads; it is an array \[2\]"),
        ("goal", {"observation": np.zeros(2)}, "has no entry 'desired_goal', which this policy reads; it has observation"),
        ("goal", {"observation": np.zeros(2), "desired_goal": np.zeros(3)}, "entry 'desired_goal' of the observation has"),
        ("goal", {"observation": np.zeros((4, 2)), "desired_goal": np.zeros(2)}, "batches of different sizes"),
        ("tuple", (np.zeros(2),), "has no entry 1, which this policy reads; it is a tuple"),
        ("dict", {"a": np.zeros(2), "b": {"a": 1}}, "entry 'b' of the observation has no entry 'z'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(space: str, given: Any, message: str) -> None:
    policy = made(OBSERVATIONS[space], BOX)
    with pytest.raises(ConfigError, match=message) as caught:
        policy.predict(given)
    assert "\n" not in str(caught.value)


def test_several_seeds_act_together_and_are_chosen_for_predict(tmp_path: Path) -> None:
    policy = made(OBSERVATIONS["goal"], BOX, seeds=3)
    seen = {key: np.random.default_rng(1).normal(size=(3, 4, 2)) for key in ("desired_goal", "observation")}
    together = policy(seen)
    assert together.shape == (3, 4, 2)
    with pytest.raises(ConfigError, match=r"holds seeds 0, 1, 2; choose one: policy.select_seed\(0\)"):
        policy.predict({key: value[0, 0] for key, value in seen.items()})
    with pytest.raises(ConfigError, match=r"observations \[3, B, 4\], or entries observation, desired_goal, not"):
        policy({key: value[0] for key, value in seen.items()})
    policy.save(tmp_path)
    for one in (policy.select_seed(2), load_policy(tmp_path, seed_index=2)):
        assert one.seeds == (2,)
        assert one.metadata == policy.metadata
        found, _ = one.predict({key: value[2] for key, value in seen.items()})
        np.testing.assert_allclose(found, together[2], atol=1e-6)
    with pytest.raises(ConfigError, match="seed index 3 is out of range: the policy holds 3 seeds"):
        policy.select_seed(3)


@pytest.mark.parametrize(("observation", "action"), PAIRS, ids=map("-".join, PAIRS))
def test_a_saved_policy_keeps_its_interface(observation: str, action: str, tmp_path: Path) -> None:
    policy = made(OBSERVATIONS[observation], ACTIONS[action])
    policy.save(tmp_path)
    loaded = load_policy(tmp_path)
    assert loaded.interface == policy.interface
    assert Interface.from_json(loaded.interface.to_json()) == policy.interface
    one = samples(OBSERVATIONS[observation], 1)[0]
    same(policy.predict(one)[0], loaded.predict(one)[0])


def test_older_files_take_it_from_the_specification_and_others_take_rows(tmp_path: Path) -> None:
    policy = made(OBSERVATIONS["goal"], BOX)
    interface, policy.interface = policy.interface, None
    policy.save(tmp_path)
    assert rlkit2.load_policy(tmp_path).interface == interface
    alone = load_policy(tmp_path)
    assert alone.predict(np.zeros(4))[0].shape == (2,)
    with pytest.raises(ConfigError, match=r"is a dict with entries observation; this policy takes an array \[4\]"):
        alone.predict({"observation": np.zeros(2)})
    policy.interface = Interface(interface.observation[:1], interface.action)
    policy.save(tmp_path)
    with pytest.raises(RunError, match="describes other observations than its network takes"):
        load_policy(tmp_path)


def test_the_loop_of_one_environment_earns_what_evaluation_finds(tmp_path: Path) -> None:
    run = rlkit2.train(
        BCConfig(hidden_sizes=(8,)), tiny_dataset(), steps=5, out=tmp_path, env=Walk, eval_episodes=1, progress=False
    )
    policy, env = rlkit2.load_policy(run.path), Walk()
    result = rlkit2.evaluate(run, episodes=3, env=Walk)
    for episode, seed in enumerate(result.episode_seeds):
        observation, _ = env.reset(seed=seed)
        total, done = 0.0, False
        while not done:
            action, _ = policy.predict(observation)
            observation, reward, terminated, truncated, _ = env.step(action)
            total, done = total + float(reward), terminated or truncated
        assert total == pytest.approx(result.returns[0, episode], abs=1e-4)


def test_a_stacking_policy_in_the_loop_earns_what_evaluation_finds() -> None:
    """CartPole without velocities in mind: frames from the environment, stacks in the policy."""
    env = gymnasium.make("CartPole-v1")
    spec = DatasetSpec(observation_space=env.observation_space, action_space=env.action_space, env_spec=env.spec)
    policy = make_agent(BCConfig(hidden_sizes=(8,)), spec.stacked(4)).policy
    result = evaluate_policy(policy, spec.stacked(4), episodes=4, max_steps=40)
    wrapped = FrameStackObservation(gymnasium.make("CartPole-v1"), 4)
    for episode, seed in enumerate(result.episode_seeds):
        observation, _ = env.reset(seed=seed)
        stacks, _ = wrapped.reset(seed=seed)
        state, start, steps = None, True, 0
        while True:
            action, state = policy.predict(observation, state, start)
            assert action == policy(stacks)
            observation, _, terminated, truncated, _ = env.step(action)
            stacks, *_ = wrapped.step(action)
            start, steps = False, steps + 1
            if terminated or truncated or steps == 40:
                break
        assert steps == result.lengths[0, episode]


def test_actions_end_at_the_bounds_to_the_last_bit() -> None:
    """0.3 is no number of float32, and -0.1 times anything is none either."""
    for name in ("matrix", "whole", "box"):
        policy = made(OBSERVATIONS["box"], ACTIONS[name])
        far, _ = policy.predict(1e6 * np.random.default_rng(0).normal(size=(50, 3)))
        assert all(action in ACTIONS[name] for action in far)
        assert (far == ACTIONS[name].low).any()
        assert (far == ACTIONS[name].high).any()


def test_interfaces_hold_one_bound_where_all_are_alike() -> None:
    spec = DatasetSpec(observation_space=spaces.Box(0, 255, (84, 84, 4), np.uint8), action_space=BOX)
    found = make_interface(spec)
    assert (found.observation[0].low, found.observation[0].high) == ((0,), (255,))
    assert found.action[0].high == (1.0, 2.0)
