"""The spaces of the dataset families that Minari hosts become rows in the stated order."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from rlkit2.data import DatasetSpec, DatasetWarning, read_dataset
from rlkit2.data.spaces import action_layout, flattener
from rlkit2.errors import ConfigError, RLKitError, UnsupportedSpaceError
from tests.data.make import Ending, box, create, make_minari

ENDINGS = [Ending(3, True, False), Ending(5, False, True)]


def goal_space(**parts: spaces.Space) -> spaces.Dict:
    """A goal dictionary as gymnasium-robotics writes them."""
    return spaces.Dict(
        {"achieved_goal": parts["goal"], "desired_goal": parts["goal"], "observation": parts["observation"]}
    )


HOSTED = {
    "pointmaze": (
        goal_space(goal=box(shape=(2,), dtype=np.float64), observation=box(shape=(4,), dtype=np.float64)),
        box(-1, 1),
        6,
    ),
    "antmaze": (
        goal_space(goal=box(shape=(2,), dtype=np.float64), observation=box(shape=(27,), dtype=np.float64)),
        box(-1, 1, (8,)),
        29,
    ),
    "kitchen": (
        goal_space(
            goal=spaces.Dict(
                {"microwave": box(shape=(1,), dtype=np.float64), "kettle": box(shape=(7,), dtype=np.float64)}
            ),
            observation=box(shape=(59,), dtype=np.float64),
        ),
        box(-1, 1, (9,), np.float64),
        67,
    ),
    "pen": (box(shape=(45,), dtype=np.float64), box(-1, 1, (24,)), 45),
    "mujoco": (box(shape=(17,), dtype=np.float64), box(-1, 1, (6,)), 17),
    "ant": (box(shape=(105,), dtype=np.float64), box(-1, 1, (8,)), 105),
}


@pytest.mark.parametrize("name", HOSTED)
def test_hosted_families_load(name: str) -> None:
    observation_space, action_space, size = HOSTED[name]
    dataset = read_dataset(make_minari(ENDINGS, observation_space, action_space))
    assert dataset.observations.shape == (8, size) == dataset.next_observations.shape
    assert dataset.observations.dtype == dataset.actions.dtype == dataset.rewards.dtype == torch.float32
    assert dataset.actions.shape == (8, *action_space.shape)
    assert (dataset.spec.observation_size, dataset.spec.action_size) == (size, action_space.shape[0])


def test_goal_dictionaries_give_observation_then_desired_goal_and_their_ranges() -> None:
    observation_space, action_space, _ = HOSTED["kitchen"]
    spec = read_dataset(make_minari(ENDINGS, observation_space, action_space)).spec
    assert spec.observation_keys == ("observation", "desired_goal")
    ranges = spec.observation_ranges
    assert ranges["observation"] == (0, 59)
    assert ranges["desired_goal"] == (59, 67)
    assert ranges["desired_goal/kettle"] == (59, 66)
    assert ranges["desired_goal/microwave"] == (66, 67)
    again = DatasetSpec.from_json(spec.to_json())
    assert again.observation_ranges == ranges
    assert again == spec


def test_observation_keys_choose_and_order() -> None:
    observation_space, action_space, _ = HOSTED["pointmaze"]
    made = make_minari(ENDINGS, observation_space, action_space)
    dataset = read_dataset(made, observation_keys=["achieved_goal", "observation"])
    assert dataset.spec.observation_ranges == {"achieved_goal": (0, 2), "observation": (2, 6)}
    whole = read_dataset(made, observation_keys=["desired_goal"])
    assert whole.spec.observation_size == 2
    with pytest.raises(
        ConfigError, match="'goal' is not in the observation space; keys: achieved_goal, desired_goal, observation"
    ):
        read_dataset(made, observation_keys=["goal"])
    with pytest.raises(ConfigError, match="once"):
        read_dataset(made, observation_keys=["observation", "observation"])


def buffers_of(space: spaces.Space, action_space: spaces.Space) -> list[EpisodeBuffer]:
    """Two short random episodes; Dict observations as Minari's collector keeps them."""
    space.seed(0)
    action_space.seed(0)
    found = []
    for episode, ending in enumerate(ENDINGS):
        samples = [space.sample() for _ in range(ending.length + 1)]
        stacked = (
            {k: [s[k] for s in samples] for k in samples[0]} if isinstance(space, spaces.Dict) else np.stack(samples)
        )
        flags = np.zeros(ending.length, bool)
        flags[-1] = True
        actions = np.stack([np.asarray(action_space.sample()) for _ in range(ending.length)])
        rewards = np.arange(ending.length, dtype=np.float64)
        found.append(
            EpisodeBuffer(
                id=episode,
                observations=stacked,
                actions=actions,
                rewards=rewards,
                terminations=flags,
                truncations=~flags & False,
            )
        )
    return found


def test_minigrid_leaves_the_mission_out_with_a_notice() -> None:
    space = spaces.Dict(
        {"image": spaces.Box(0, 255, (7, 7, 3), np.uint8), "direction": spaces.Discrete(4), "mission": spaces.Text(20)}
    )
    buffers = buffers_of(space, spaces.Discrete(7))
    made = create(buffers, space, spaces.Discrete(7), jpeg_encoding=False)
    with pytest.warns(DatasetWarning, match="'mission' is left out"):
        dataset = read_dataset(made)
    assert dataset.observations.shape == (8, 4 + 147)
    assert dataset.observations.dtype == torch.float32
    start, stop = dataset.spec.observation_ranges["image"]
    np.testing.assert_array_equal(
        dataset.observations[:3, start:stop].numpy(), np.stack(buffers[0].observations["image"][:3]).reshape(3, -1)
    )
    start, stop = dataset.spec.observation_ranges["direction"]
    np.testing.assert_array_equal(
        dataset.observations[:3, start:stop].argmax(1).numpy(), buffers[0].observations["direction"][:3]
    )


@pytest.mark.parametrize("jpeg", [False, True])
@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_images_stay_bytes_and_keep_their_shape(jpeg: bool, data_format: str) -> None:
    space, action_space = spaces.Box(0, 255, (21, 16, 3), np.uint8), spaces.Discrete(4)
    buffers = buffers_of(space, action_space)
    made = create(buffers, space, action_space, jpeg_encoding=jpeg, data_format=data_format)
    dataset = read_dataset(made)
    assert dataset.observations.dtype == torch.uint8
    assert dataset.observations.shape == (8, 21, 16, 3)
    stored = [np.asarray(episode.observations) for episode in made]
    wanted = np.concatenate([images[:-1] for images in stored])
    following = np.concatenate([images[1:] for images in stored])
    np.testing.assert_array_equal(dataset.observations.numpy(), wanted)
    np.testing.assert_array_equal(dataset.next_observations.numpy(), following)
    batch = dataset.sample(4, generator=torch.Generator().manual_seed(0))
    assert batch.observations.shape == (1, 4, 21, 16, 3)
    assert batch.actions.dtype == torch.int64
    if not jpeg:
        np.testing.assert_array_equal(stored[0], buffers[0].observations)


def test_flattening_an_environment_and_a_dataset_agree() -> None:
    space = spaces.Dict(
        {"z": spaces.Discrete(3), "a": spaces.MultiBinary(2), "m": spaces.MultiDiscrete([2, 3]), "b": box(0, 1, (2, 2))}
    )
    space.seed(1)
    samples = [space.sample() for _ in range(5)]
    stacked = {key: np.stack([s[key] for s in samples]) for key in space.spaces}
    flat = flattener(space)
    np.testing.assert_allclose(flat.flatten(stacked), np.stack([gymnasium.spaces.flatten(space, s) for s in samples]))
    assert flat.size == 3 + 2 + 5 + 4


@pytest.mark.parametrize(
    "space",
    [spaces.Graph(box(), None), spaces.Sequence(box()), spaces.Text(5), spaces.Dict({"x": spaces.Sequence(box())})],
)
def test_unsupported_spaces_are_named(space: spaces.Space) -> None:
    with pytest.raises(UnsupportedSpaceError, match=r"Graph|Sequence|Text") as caught:
        flattener(space)
    assert isinstance(caught.value, RLKitError)


def test_mixed_actions_are_refused_and_discrete_ones_keep_their_values() -> None:
    with pytest.raises(UnsupportedSpaceError, match="mixes"):
        action_layout(spaces.Dict({"a": box(), "b": spaces.Discrete(2)}))
    layout = action_layout(spaces.Tuple((spaces.Discrete(3), spaces.MultiBinary(2))))
    assert (layout.shape, layout.dtype) == ((3,), np.int64)
    np.testing.assert_array_equal(
        layout.flatten((np.array([2, 1]), np.array([[0, 1], [1, 1]]))), [[2, 0, 1], [1, 1, 1]]
    )


EVERY_KIND = {
    "matrix": (box(shape=(2, 3), dtype=np.float64), box(shape=(2, 2), dtype=np.float64)),
    "integers": (spaces.Box(-9, 9, (3,), np.int32), spaces.MultiBinary(3)),
    "bits": (spaces.MultiBinary(4), spaces.MultiDiscrete([2, 3])),
    "shifted": (spaces.Discrete(5, start=-2), spaces.Discrete(3, start=1)),
    "choices": (
        spaces.MultiDiscrete([3, 2], start=[1, -1]),
        spaces.Dict({"b": spaces.Discrete(3), "a": spaces.MultiBinary(2)}),
    ),
    "nested": (
        spaces.Dict(
            {"z": spaces.Tuple((box(), spaces.Discrete(3))), "a": spaces.Dict({"deep": spaces.MultiBinary(2)})}
        ),
        spaces.Tuple((box(), box(shape=(1,)))),
    ),
    "bytes": (spaces.Box(0, 255, (5,), np.uint8), box()),
}


def stacked(space: spaces.Space, samples: list) -> object:
    """Samples as a batch: a tree of arrays."""
    if isinstance(space, spaces.Dict):
        return {key: stacked(value, [s[key] for s in samples]) for key, value in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(stacked(value, [s[i] for s in samples]) for i, value in enumerate(space.spaces))
    return np.stack(samples)


def equal(a: object, b: object) -> bool:
    """Whether two trees of arrays hold the same values."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32)))


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_kind_of_space_is_read_and_written_back(kind: str, data_format: str) -> None:
    space, action_space = EVERY_KIND[kind]
    space.seed(0)
    action_space.seed(0)
    buffers = [
        EpisodeBuffer(
            id=episode,
            observations=stacked(space, [space.sample() for _ in range(length + 1)]),
            actions=stacked(action_space, [action_space.sample() for _ in range(length)]),
            rewards=np.arange(length, dtype=np.float64),
            terminations=np.arange(length) == length - 1,
            truncations=np.zeros(length, bool),
        )
        for episode, length in enumerate((3, 1, 4))
    ]
    dataset = read_dataset(create(buffers, space, action_space, data_format=data_format))
    flat, layout = dataset.spec.flattener, action_layout(action_space)
    for index, buffer in enumerate(buffers):
        episode = dataset.episode(index)
        chain = torch.cat([episode["observations"], episode["next_observations"][-1:]]).numpy()
        assert equal(flat.unflatten(chain), buffer.observations)
        assert equal(layout.unflatten(action_space, episode["actions"].numpy()), buffer.actions)
    again = read_dataset(dataset.to_minari("test/again-v0", data_format=data_format))
    for name in ("observations", "actions", "next_observations", "rewards", "terminations", "truncations"):
        assert torch.equal(getattr(again, name), getattr(dataset, name)), name
    assert again.spec.observation_ranges == dataset.spec.observation_ranges


def test_a_discrete_value_outside_its_space_is_refused() -> None:
    with pytest.raises(UnsupportedSpaceError, match="outside its space"):
        flattener(spaces.Discrete(3)).flatten(np.array([0, 3]))
