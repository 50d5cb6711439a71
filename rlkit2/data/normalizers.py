"""Statistics for observation normalisation and the reward transforms of common offline pipelines."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlkit2.data.dataset import TransitionDataset
from rlkit2.errors import ConfigError, DatasetError

CHUNK = 1 << 18


def observation_statistics(dataset: TransitionDataset, epsilon: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation plus `epsilon` of every observation column, each `[obs]` float32, accumulated in float64.

    Of what is finite: one broken value spoils its own row, and not what all others are seen as. A column that is always the same counts as having a
    deviation of 1: divided by next to nothing, the first other value that a policy meets would drown all else.

    Source: the state normalisation of TD3+BC (Fujimoto & Gu 2021, section 5), `(s - mean) / (std + 1e-3)`.
    """
    observations = dataset.observations
    if observations.dtype == torch.uint8:
        raise ConfigError(
            f"the observations of {dataset.spec.id} are bytes, which networks scale themselves; leave normalize_observations off"
        )
    total = torch.zeros(observations.shape[1], dtype=torch.float64)
    square = total.clone()
    count = total.clone()
    shift = (
        observations[0].double().cpu().nan_to_num(0.0, 0.0, 0.0)
    )  # keeps the squares small where a column is far from zero
    for start in range(0, len(observations), CHUNK):
        part = observations[start : start + CHUNK].double().cpu() - shift
        finite = part.isfinite()
        part = torch.where(finite, part, 0.0)
        total += part.sum(0)
        square += (part * part).sum(0)
        count += finite.sum(0)
    count.clamp_(min=1.0)
    mean = total / count
    variance = (square / count - mean * mean).clamp(min=0)
    mean, std = mean + shift, variance.sqrt()
    std = torch.where(std > 1e-7 * mean.abs(), std + epsilon, 1.0)
    return mean.float(), std.float()


Rewards = Callable[[Tensor], Tensor]


def _return_range(dataset: TransitionDataset | None) -> Rewards:
    """Rewards x 1000 / (largest - smallest episode return)."""
    if dataset is None:
        raise ConfigError("reward_transform = 'return_range' needs the returns of a dataset, and there is none")
    returns = dataset.episode_returns
    spread = float(returns.max() - returns.min())
    if not spread > 0:
        raise DatasetError(
            f"{dataset.spec.id}: all episodes have return {float(returns[0]):g}; reward transform 'return_range' needs a range"
        )
    return lambda rewards: rewards * (1000.0 / spread)


def _goal_penalty(dataset: TransitionDataset | None) -> Rewards:
    """Reward 0 at the goal and -3 elsewhere, for rewards that are 0 or positive at the goal (AntMaze)."""
    return lambda rewards: torch.where(rewards == 0, -3.0, 0.0)


REWARD_TRANSFORMS: dict[str, Callable[[TransitionDataset | None], Rewards]] = {
    "none": lambda dataset: lambda rewards: rewards,
    "return_range": _return_range,
    "goal_penalty": _goal_penalty,
}


def reward_rule(name: str, dataset: TransitionDataset | None) -> Rewards:
    """What a transform of `reward_transform` makes of rewards of any shape, also of others than the dataset's; `return_range` alone needs one."""
    if name not in REWARD_TRANSFORMS:
        raise ConfigError(f"unknown reward transform {name!r}; choose from {', '.join(REWARD_TRANSFORMS)}")
    return REWARD_TRANSFORMS[name](dataset)


def reward_transform(name: str, dataset: TransitionDataset) -> Tensor:
    """Transformed rewards `[N]`: `none`, `return_range` (x 1000 / return range, as IQL's MuJoCo pipeline) or `goal_penalty` (0 -> -3, else 0).

    Raises `ConfigError` for an unknown name, `DatasetError` where the returns have no range.
    """
    return reward_rule(name, dataset)(dataset.rewards)
