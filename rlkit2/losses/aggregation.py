"""From the members of a critic ensemble to one target, one action or one bound.

Layout: members on axis 1, `[S, M, B, ...]`. `grouped_minimum`, `shape_weighted_vote` and `member_advantages` are the aggregations of the released
code of Kim et al. (arXiv 2408.02295) for SAC, DQN and PPO; `lower_bound` is the usual alternative to the minimum of An et al. (NeurIPS 2021).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlkit2.errors import ConfigError
from rlkit2.guard import guarded
from rlkit2.losses.ggd import expected_minimum
from rlkit2.nn.critics import mean_less_deviations


@guarded()
def lower_bound(values: Tensor, coefficient: float | None = None) -> Tensor:
    """mean - k std (of M - 1 degrees of freedom) over the members of `values [S, M, ...]` -> `[S, ...]`; the mean itself for one member.

    `coefficient`: k; None matches the expected minimum over M normal members (0.56 for 2, 1.54 for 10).
    """
    k = expected_minimum(values.shape[1]) if coefficient is None else coefficient
    return mean_less_deviations(values, k)


@guarded()
def grouped(values: Tensor, groups: int) -> Tensor:
    """`[S, G N, ...]` as `[S, G, N, ...]`.

    Raises:
        ConfigError: the members cannot be shared out evenly.
    """
    if values.shape[1] % groups:
        raise ConfigError(f"{values.shape[1]} critics cannot form {groups} equal groups")
    return values.view(len(values), groups, -1, *values.shape[2:])


@guarded()
def grouped_minimum(values: Tensor, groups: int = 2) -> Tensor:
    """Member by member the minimum over the groups, `[S, G N, ...]` -> `[S, N, ...]`: the next values of the released SAC."""
    return grouped(values, groups).amin(1)


@guarded()
def grouped_mean_minimum(values: Tensor, groups: int = 2) -> Tensor:
    """Mean over a group's members, then the minimum over groups, `[S, G N, ...]` -> `[S, ...]`: the actor's value in the released SAC."""
    return grouped(values, groups).mean(2).amin(1)


@guarded()
def shape_weighted_vote(values: Tensor, shape: Tensor | None = None) -> Tensor:
    """Action values by which the released DQN acts: `[S, M, B, n]` -> `[S, B, n]`, weighted by beta over members (None: their mean)."""
    if shape is None:
        return values.mean(1)
    return (shape * values).sum(1) / shape.sum(1)


@guarded()
def member_advantages(
    rewards: Tensor, values: Tensor, next_values: Tensor, continues: Tensor, discount: float, trace: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation for every member apart (Schulman et al., 2016), as the released PPO has it.

    Args:
        rewards, continues: `[T, B]`; `continues` is 0 where the step ended its episode.
        values, next_values: `[T, M, B]`.
        discount, trace: gamma and lambda.

    Returns:
        Advantages and returns, `[T, M, B]`.
    """
    rewards, continues = rewards.unsqueeze(1), continues.unsqueeze(1)
    errors = rewards + discount * continues * next_values - values
    advantages = torch.empty_like(errors)
    running = torch.zeros_like(errors[0])
    for t in range(len(errors) - 1, -1, -1):
        running = errors[t] + discount * trace * continues[t] * running
        advantages[t] = running
    return advantages, advantages + values
