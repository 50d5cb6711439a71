"""Stacks of observations: what Gymnasium's wrapper shows in the environment, never across the border of an episode."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import FrameStackObservation
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit2.data import DatasetSpec, dataset_from_arrays
from rlkit2.errors import DatasetError, UnsupportedSpaceError

ACTIONS = spaces.Box(-1, 1, (1,), np.float32)
IMAGE = spaces.Box(0, 255, (3, 2, 1), np.uint8)
SPACES: dict[str, spaces.Space[Any]] = {
    "vector": spaces.Box(-5, 5, (3,), np.float32),
    "image": IMAGE,
    "choice": spaces.Discrete(4, start=1),
    "mixed": spaces.Dict(a=spaces.Box(-9, 9, (2,), np.float32), image=IMAGE, z=spaces.Discrete(3)),
}


class Replayed(gymnasium.Env[Any, Any]):
    """Shows given observations, an episode at a time."""

    def __init__(self, space: spaces.Space[Any], episodes: list[list[Any]]) -> None:
        self.observation_space, self.action_space, self.episodes = space, ACTIONS, episodes
        self.left: list[Any] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.left = list(self.episodes.pop(0))
        return self.left.pop(0), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.left.pop(0), 0.0, False, not self.left, {}


def stack(values: list[Any]) -> Any:
    if isinstance(values[0], dict):
        return {key: np.stack([value[key] for value in values]) for key in values[0]}
    return np.stack(values)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(list(SPACES)), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 5))
def test_a_stack_is_what_the_wrapper_shows(kind: str, lengths: list[int], count: int) -> None:
    space = SPACES[kind]
    space.seed(len(lengths))
    episodes = [[space.sample() for _ in range(length + 1)] for length in lengths]
    spec = DatasetSpec(observation_space=space, action_space=ACTIONS)
    rows = [spec.flattener.flatten(stack(episode)) for episode in episodes]
    last = np.concatenate([np.arange(n) == n - 1 for n in lengths])
    dataset = dataset_from_arrays(
        np.concatenate([row[:-1] for row in rows]),
        np.zeros((len(last), 1), np.float32),
        np.arange(len(last)),
        np.concatenate([row[1:] for row in rows]),
        np.zeros(len(last), bool),
        last,
        spec,
    )
    stacked = dataset.stacked(count)
    env = FrameStackObservation(Replayed(space, [list(episode) for episode in episodes]), count)
    for index, length in enumerate(lengths):
        shown = [env.reset()[0]] + [env.step(np.zeros(1))[0] for _ in range(length)]
        if count == 1:
            assert stacked is dataset
            continue
        expected = stacked.spec.flattener.flatten(stack(shown))
        found = stacked.episode(index)
        assert np.array_equal(found["observations"].numpy(), expected[:-1])
        assert np.array_equal(found["next_observations"].numpy(), expected[1:])
        assert stacked.spec.flattener.shape == found["observations"].shape[1:]
    batch = stacked.gather(torch.arange(len(last)).flip(0).view(1, -1))
    assert torch.equal(batch.observations[0].flip(0), stacked.observations)
    assert torch.equal(batch.rewards[0].flip(0), dataset.rewards)
    order = torch.arange(len(lengths)).flip(0)
    assert torch.equal(stacked.select(order).observations, dataset.select(order).stacked(count).observations)
    assert torch.equal(stacked.select(order).episode(0)["next_observations"], stacked.episode(-1)["next_observations"])


def test_a_stack_has_a_specification_of_its_own() -> None:
    spec = DatasetSpec(observation_space=IMAGE, action_space=ACTIONS)
    assert "frame_stack" not in spec.to_json()
    stacked = spec.stacked(3)
    assert DatasetSpec.from_json(stacked.to_json()) == stacked
    assert stacked.images == ((0, (3, 3, 2, 1)),)
    assert spec.stacked(1) is spec
    with pytest.raises(DatasetError, match="the observations of arrays are stacks of 3 already"):
        stacked.stacked(2)
    odd = DatasetSpec(observation_space=spaces.MultiDiscrete([2, 3]), action_space=ACTIONS)
    with pytest.raises(UnsupportedSpaceError, match="cannot be stacked"):
        odd.stacked(2)


def test_a_stack_is_not_written() -> None:
    flags = np.array([False, True])
    seen = np.zeros((2, 2), np.float32)
    dataset = dataset_from_arrays(seen, seen[:, :1], flags, seen, flags & False, flags)
    with pytest.raises(DatasetError, match="stacks of 2; write the dataset that they were made from"):
        dataset.stacked(2).to_minari("test/stacked-v0")
