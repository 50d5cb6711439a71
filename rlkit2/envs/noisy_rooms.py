"""The four rooms with generalized-Gaussian reward noise whose scale and shape depend on where the step began.

The noise has the density proportional to exp(-|x / scale|^shape). Its standard deviation grows from west to east, its shape from
heavy tails in the south (0.8; 1 is Laplace) to nearly uniform in the north (4; 2 is Gaussian). It never touches the transitions:
episodes visit the same states as in `rlkit2/Rooms-v0` for the same seed and actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from rlkit2.envs.noisy_rewards import noise_at, scale_of
from rlkit2.envs.rooms import Rooms, RoomsEnv, RoomsVectorEnv

Array = NDArray[Any]


def noise_std(positions: Array) -> Array:
    """True standard deviation of the reward noise at positions [..., 2]: 0.1 in the west to 0.5 in the east, float64 [...]."""
    return 0.3 + 0.2 * np.asarray(positions, np.float64)[..., 0]


def noise_shape(positions: Array) -> Array:
    """True shape of the generalized Gaussian at positions [..., 2]: 0.8 in the south to 4 in the north, float64 [...]."""
    shape: Array = 0.8 * 5.0 ** ((np.asarray(positions, np.float64)[..., 1] + 1) / 2)
    return shape


def noise_scale(positions: Array) -> Array:
    """True scale at positions [..., 2]: std / sqrt(Gamma(3 / shape) / Gamma(1 / shape)), float64 [...]."""
    return scale_of(noise_std(positions), noise_shape(positions))


class NoisyRooms(Rooms):
    """`Rooms` whose reward carries generalized-Gaussian noise; `scale`, `shape` and `std` are the truth about it."""

    scale = staticmethod(noise_scale)
    shape = staticmethod(noise_shape)
    std = staticmethod(noise_std)

    def __init__(self, reward: str = "dense", **task: Any) -> None:
        super().__init__(reward, **task)

    def rewards(self, positions: Array, next_positions: Array, generators: Sequence[Generator]) -> Array:
        uniform = (
            2 * np.array([generator.random() for generator in generators]) - 1
        )  # one number per step and generator
        noise = noise_at(uniform, noise_scale(positions), noise_shape(positions))
        return super().rewards(positions, next_positions, generators) + noise


class NoisyRoomsEnv(RoomsEnv):
    """`RoomsEnv` with noisy rewards."""

    task_class: ClassVar[type[Rooms]] = NoisyRooms


class NoisyRoomsVectorEnv(RoomsVectorEnv):
    """`RoomsVectorEnv` with noisy rewards."""

    task_class: ClassVar[type[Rooms]] = NoisyRooms
