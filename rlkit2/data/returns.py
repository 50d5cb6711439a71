"""Discounted returns of the data: what followed every step, to the end of its episode."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rlkit2.data.dataset import TransitionDataset


def discounted_returns(rewards: Tensor, episode_starts: Tensor, discount: float) -> Tensor:
    """Discounted sum of rewards from each row to the end of its episode; what follows a truncation counts as nothing.

    Args:
        rewards: `[..., N]`.
        episode_starts: `[E + 1]` rows, the last being N.
        discount: per step.

    Returns:
        `[..., N]` float64.
    """
    starts = episode_starts.tolist()
    rows = rewards.double().reshape(math.prod(rewards.shape[:-1]), rewards.shape[-1]).tolist()
    found = [_of_episodes(row, starts, discount) for row in rows]
    return torch.tensor(found, dtype=torch.float64).reshape(rewards.shape)


def _of_episodes(rewards: list[float], starts: list[int], discount: float) -> list[float]:
    """The recursion G_t = r_t + discount G_{t+1}, run backwards through every episode."""
    backwards: list[float] = []
    for start, end in itertools.pairwise(reversed(starts)):
        backwards += itertools.accumulate(reversed(rewards[end:start]), lambda after, reward: reward + discount * after)
    backwards.reverse()
    return backwards


def return_statistics(
    dataset: TransitionDataset, discount: float, rewards: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the discounted returns of a dataset's rows, float64; where all are equal the deviation counts as 1.

    `rewards` `[..., N]` go in the place of the dataset's own; the statistics are then `[...]`.
    """
    returns = discounted_returns(dataset.rewards if rewards is None else rewards, dataset.episode_starts, discount)
    std = returns.std(-1, correction=0)
    return returns.mean(-1), torch.where(std > 1e-9 * returns.abs().amax(-1), std, 1.0)
