"""The STARC distance over batches of rewards and of processes at once, differentiable: a training loss on any device."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlkit2.errors import ConfigError, RewardError
from rlkit2.guard import guarded
from rlkit2.rewards.arrays import power_of_two
from rlkit2.rewards.norms import rounding

_ORDERS = {"l1": 1.0, "l2": 2.0, "linf": float("inf")}


def batched_advantage(reward: Tensor, transitions: Tensor, discount: Tensor | float, policy: Tensor | None) -> Tensor:
    """The canonical form `val`, `[..., S, A]`, of rewards `[..., S, A, S']` or `[..., S, A]` in processes `[..., S, A, S']`.

    Leading axes are broadcast. Differentiable in rewards, transitions and policy; nothing is checked and nothing read back.
    """
    states, actions = transitions.shape[-3], transitions.shape[-2]
    if reward.shape[-3:] == transitions.shape[-3:]:
        reward = (transitions * reward).sum(-1)
    if policy is None:
        policy = transitions.new_full((states, actions), 1 / actions)
    discount = torch.as_tensor(discount, dtype=transitions.dtype, device=transitions.device)[..., None, None]
    step = (policy[..., None] * transitions).sum(-2)
    eye = torch.eye(states, dtype=transitions.dtype, device=transitions.device)
    values: Tensor = torch.linalg.solve(eye - discount * step, (policy * reward).sum(-1, keepdim=True))
    ahead = (transitions.flatten(-3, -2) @ values).squeeze(-1)
    return reward + discount * ahead.reshape(*ahead.shape[:-1], states, actions) - values


@guarded(RewardError)
def batched_starc_distance(
    reward_a: Tensor,
    reward_b: Tensor,
    transitions: Tensor,
    discount: Tensor | float,
    *,
    norm: Literal["l1", "l2", "linf"] = "l2",
    distance: Literal["l1", "l2", "linf"] = "l2",
    policy: Tensor | None = None,
    tol: float | None = None,
) -> Tensor:
    """The distance `starc_distance(..., "val")` of many pairs in many processes, `[...]`, in one batch of solves.

    Args:
        reward_a, reward_b: `[..., S, A, S']`, or `[..., S, A]` where that cannot be mistaken for the former.
        transitions: `[..., S, A, S']`, rows summing to one; differentiable too, for learned dynamics.
        discount: one number, or a tensor `[...]` of one per process, in [0, 1).
        norm, distance: as in `starc_distance`; each entry (s, a, s') counts once.
        policy: reference policy `[..., S, A]`, uniform when left out.
        tol: rewards with `max |form| <= tol max sum_s' tau |R|` are trivial: standardised to 0, without gradient; default as in `starc_distance`.

    All leading axes are broadcast against each other; all tensors share one dtype and device. Gradients are finite everywhere; at
    distance 0 they are 0 for `l2`.

    Raises:
        RewardError: shapes do not fit. ConfigError: unknown norm.
    """
    if norm not in _ORDERS or distance not in _ORDERS:
        raise ConfigError(f"norm {norm!r}, distance {distance!r}: choose 'l1', 'l2' or 'linf'")
    states, actions = transitions.shape[-3], transitions.shape[-2]
    if transitions.shape[-1] != states:
        raise RewardError(f"transitions has shape {list(transitions.shape)}; give [..., S, A, S]")
    dtype = transitions.dtype
    spread = torch.as_tensor(discount, dtype=dtype, device=transitions.device)
    limit = rounding(dtype, 0.0) / (1 - spread) if tol is None else torch.as_tensor(tol, dtype=dtype)
    scaled = []
    for reward, name in ((reward_a, "reward_a"), (reward_b, "reward_b")):
        full = reward.shape[-3:] == transitions.shape[-3:]
        if not full and reward.shape[-2:] != (states, actions):
            raise RewardError(
                f"{name} has shape {list(reward.shape)}; give [..., {states}, {actions}, {states}] or [..., {states}, {actions}]"
            )
        size = reward.detach().abs()
        size = ((transitions.detach() * size).sum(-1) if full else size).amax((-2, -1))
        power = power_of_two(size)
        reward = reward / power.reshape(*power.shape, *[1] * (3 if full else 2))
        form = batched_advantage(reward, transitions, discount, policy)
        flat = _each_next_state(form, states, _ORDERS[norm])
        trivial = form.detach().abs().amax((-2, -1)) <= limit * (size / power)
        length = torch.linalg.vector_norm(
            torch.where(trivial[..., None], torch.ones_like(flat), flat), _ORDERS[norm], -1
        )
        scaled.append(torch.where(trivial[..., None, None], torch.zeros_like(form), form / length[..., None, None]))
    gap = _each_next_state(scaled[0] - scaled[1], states, _ORDERS[distance])
    result: Tensor = torch.linalg.vector_norm(gap, _ORDERS[distance], -1)
    return result


def _each_next_state(form: Tensor, states: int, order: float) -> Tensor:
    """`[..., S * A]` whose p-norm is that of the form repeated over the S next states."""
    return form.flatten(-2) * (1.0 if order == float("inf") else states ** (1 / order))
