"""Small Minari datasets whose every value says which episode and step it belongs to."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import minari
import numpy as np
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

WIDTH = 16  # steps per episode that a discrete code can tell apart
_ids = itertools.count()


@dataclass(frozen=True)
class Ending:
    """How an episode of `length` steps ends."""

    length: int
    terminated: bool
    truncated: bool


def box(
    low: float = -np.inf, high: float = np.inf, shape: tuple[int, ...] = (2,), dtype: Any = np.float32
) -> spaces.Box:
    """A Box of one range."""
    return spaces.Box(low, high, shape, dtype)


GOAL = {"observation": box(), "achieved_goal": box(), "desired_goal": box()}
FAMILIES: dict[str, tuple[spaces.Space[Any], spaces.Space[Any]]] = {
    "box32": (box(), box()),
    "box64": (box(dtype=np.float64), box(dtype=np.float32)),
    "dict": (spaces.Dict({"b": box(), "a": box(shape=(1,))}), box()),
    "goal": (spaces.Dict(GOAL), box()),
    "nested goal": (
        spaces.Dict({**GOAL, "desired_goal": spaces.Dict({"task": box(), "other": box(shape=(1,))})}),
        box(),
    ),
    "tuple": (spaces.Tuple((box(), box(shape=(1,)))), box()),
    "discrete": (spaces.Discrete(128, start=3), spaces.Discrete(128, start=3)),
    "discrete action": (box(), spaces.Discrete(128, start=-5)),
    "multi discrete": (spaces.MultiDiscrete([8, WIDTH]), spaces.MultiDiscrete([8, WIDTH])),
}


def code(space: spaces.Space[Any], episode: int, steps: np.ndarray[Any, Any]) -> Any:
    """Values of `space` that say (episode, step) for every step."""
    if isinstance(space, spaces.Dict):
        return {key: code(value, episode, steps) for key, value in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(code(value, episode, steps) for value in space.spaces)
    if isinstance(space, spaces.Discrete):
        return space.start + episode * WIDTH + steps
    pair = np.stack([np.full(len(steps), episode), steps], axis=1)
    if isinstance(space, spaces.MultiDiscrete):
        return pair.astype(np.int64)
    width = int(np.prod(space.shape or ()))
    if width == 1:
        return (episode * WIDTH + steps[:, None]).astype(space.dtype)
    return np.tile(pair, (1, width))[:, :width].astype(space.dtype)


def make_minari(
    endings: Sequence[Ending],
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    data_format: str = "hdf5",
    **extra: Any,
) -> minari.MinariDataset:
    """A Minari dataset in which observation t of episode e says (e, t), and so does action t."""
    buffers = []
    for episode, ending in enumerate(endings):
        steps = np.arange(ending.length + 1)
        flags = np.zeros((2, ending.length), bool)
        flags[:, -1] = ending.terminated, ending.truncated
        buffers.append(
            EpisodeBuffer(
                id=episode,
                observations=code(observation_space, episode, steps),
                actions=code(action_space, episode, steps[:-1]),
                rewards=(100.0 * episode + steps[:-1]).astype(np.float64),
                terminations=flags[0],
                truncations=flags[1],
                infos=None,
            )
        )
    return create(buffers, observation_space, action_space, data_format=data_format, **extra)


def create(
    buffers: Sequence[EpisodeBuffer],
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    **extra: Any,
) -> Any:
    """`minari.create_dataset_from_buffers` under a fresh id, without Minari's advice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name = extra.pop("dataset_id", f"test/made/n{next(_ids)}-v0")
        return minari.create_dataset_from_buffers(
            name, list(buffers), observation_space=observation_space, action_space=action_space, **extra
        )
