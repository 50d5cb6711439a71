"""Generalized-Gaussian noise on rewards: density proportional to exp(-|x / scale|^shape); shape 1 is Laplace, 2 Gaussian, 8 nearly uniform.

`NoisyRewards` puts it on the rewards of any environment, so that what a critic says about its noise can be compared with the truth.
"""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaincinv, gammaln

from rlkit2.errors import ConfigError

Array = NDArray[Any]

STREAM = 1  # beside the seed of a reset: the noise is not drawn from the environment's own numbers


def scale_of(std: ArrayLike, shape: ArrayLike) -> Array:
    """The scale at which noise of a shape has a standard deviation: std / sqrt(Gamma(3 / shape) / Gamma(1 / shape)), float64."""
    inverse = 1 / np.asarray(shape, np.float64)
    return np.asarray(std * np.exp(0.5 * (gammaln(inverse) - gammaln(3 * inverse))))


def noise_at(uniform: ArrayLike, scale: ArrayLike, shape: ArrayLike) -> Array:
    """Noise from numbers in (-1, 1), by the inverse distribution function: |x / scale|^shape is Gamma(1 / shape)."""
    shape = np.asarray(shape)
    return np.asarray(np.sign(uniform) * scale * gammaincinv(1 / shape, np.abs(uniform)) ** (1 / shape))


class NoisyRewards(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """An environment whose rewards carry noise of mean 0; transitions are those of `env`, which never sees it.

    The noise of an episode follows from the seed of its reset, so a run in the environment resumes as it does in any other.

    Args:
        env: any environment.
        std: standard deviation of the noise, in units of the reward.
        shape: of its distribution.

    Raises:
        ConfigError: one of them is not positive.

    Attributes:
        scale: of the distribution.
    """

    def __init__(self, env: gym.Env[Any, Any], std: float, shape: float) -> None:
        RecordConstructorArgs.__init__(self, std=std, shape=shape)
        super().__init__(env)
        if not (0.0 < std < np.inf and 0.0 < shape < np.inf):
            raise ConfigError(f"std and shape of the noise must be positive numbers, not {std} and {shape}")
        self.std, self.shape, self.scale = std, shape, float(scale_of(std, shape))
        self._generator = np.random.default_rng()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; with a seed its noise is that of the seed."""
        if seed is not None:
            self._generator = np.random.default_rng([seed, STREAM])
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """A step whose reward is noisy; `info["reward_without_noise"]` is the environment's own."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        noise = float(noise_at(2.0 * self._generator.random() - 1.0, self.scale, self.shape))
        return observation, float(reward) + noise, terminated, truncated, {**info, "reward_without_noise": reward}
