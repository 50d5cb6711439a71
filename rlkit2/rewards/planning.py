"""Exact planning in finite processes: optimal and worst policies, returns and regret. Policies are found in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from rlkit2.errors import RewardError
from rlkit2.guard import guarded
from rlkit2.rewards.arrays import Array, Scalar, give_back
from rlkit2.rewards.dynamics import DenseDynamics, SparseDynamics, solve_sparse
from rlkit2.rewards.mdp import TabularMDP

_IMPROVEMENT = 1e-12  # an action replaces another only if it is better by this share of the largest advantage
_BATCH_BYTES = 1 << 27
_MAX_ROUNDS = 10_000


def optimal_actions(mdp: TabularMDP, expected: Tensor) -> Tensor:
    """Optimal actions `[K, S]` for `r [K, S, A]` by policy iteration over all K at once; among equals the lowest index.

    Planning starts from the advantage of the uniform policy instead of `r`: the same policies are optimal, and potentials, however
    large, cannot drown the differences that count.
    """
    mdp = mdp.to(torch.float64)
    reward = expected.detach().to(device=mdp.device, dtype=torch.float64)
    values = mdp.values(reward, mdp.uniform_policy)
    reward = reward + mdp.discount * mdp.dynamics.next_mean(values) - values[..., None]
    size = max(1, _BATCH_BYTES // (8 * mdp.num_states**2)) if not mdp.sparse else 1
    return torch.cat([_policy_iteration(mdp, part) for part in torch.split(reward, size)])


def _policy_iteration(mdp: TabularMDP, reward: Tensor) -> Tensor:
    actions = reward.argmax(-1)
    tolerance = _IMPROVEMENT * reward.abs().amax((-2, -1))[:, None] / (1 - mdp.discount)
    active = torch.arange(len(reward), device=reward.device)
    for _ in range(_MAX_ROUNDS):
        chosen = actions[active]
        values = _evaluate(mdp, reward[active], chosen)
        action_values = reward[active] + mdp.discount * mdp.dynamics.next_mean(values)
        best, slack = action_values.amax(-1), tolerance[active]
        current = action_values.gather(-1, chosen[..., None]).squeeze(-1)
        better = best > current + slack
        improving = better.any(-1)
        lowest = (action_values >= (best - slack)[..., None]).to(torch.int8).argmax(-1)
        actions[active] = torch.where(improving[:, None], torch.where(better, action_values.argmax(-1), chosen), lowest)
        active = active[improving]
        if not len(active):
            return actions
    raise RewardError(f"policy iteration did not settle in {_MAX_ROUNDS} rounds; lower the discount {mdp.discount}")


def _evaluate(mdp: TabularMDP, reward: Tensor, actions: Tensor) -> Tensor:
    """`V [K, S]` of deterministic policies `actions [K, S]` under `r [K, S, A]`."""
    right = reward.gather(-1, actions[..., None]).squeeze(-1)
    dynamics = mdp.dynamics
    if isinstance(dynamics, DenseDynamics):
        system = -mdp.discount * dynamics.backups(actions)
        system.diagonal(dim1=-2, dim2=-1).add_(1.0)
        values: Tensor = torch.linalg.solve(system, right.unsqueeze(-1))
        return values.squeeze(-1)
    solved = [_evaluate_sparse(dynamics, mdp.discount, row, chosen) for row, chosen in zip(right, actions, strict=True)]
    return torch.from_numpy(np.stack(solved))


def _evaluate_sparse(dynamics: SparseDynamics, discount: float, right: Tensor, actions: Tensor) -> Any:
    states, count = dynamics.shape
    backup = dynamics.transitions[np.arange(states) * count + actions.numpy()]
    return solve_sparse(sp.csr_array(sp.eye_array(states) - discount * backup), right.numpy())


def deterministic_returns(mdp: TabularMDP, expected: Tensor, actions: Tensor) -> Tensor:
    """`J [K]` of `actions [K, S]` under `r [K, S, A]`, differentiable in r."""
    process = mdp.to(torch.float64)
    return (_evaluate(process, expected.double(), actions) @ process.initial_distribution).to(expected.dtype)


def return_ranges(mdp: TabularMDP, expected: Tensor) -> tuple[Tensor, Tensor]:
    """The worst and the best return of any policy for `r [..., S, A]`, each `[...]`, differentiable in r (envelope theorem)."""
    rewards = expected.reshape(-1, *expected.shape[-2:])
    both = torch.cat([rewards, -rewards])
    returns = deterministic_returns(mdp, both, optimal_actions(mdp, both))
    best, worst = returns[: len(rewards)], -returns[len(rewards) :]
    return worst.reshape(expected.shape[:-2]), best.reshape(expected.shape[:-2])


def expected_one(mdp: TabularMDP, reward: Any, name: str = "reward") -> Tensor:
    """`r [S, A]` of a single reward in the dtype of `mdp`; raises `RewardError` for a batch."""
    expected = mdp.expected_reward(reward, name)
    if expected.ndim != 2:
        raise RewardError(f"{name} is a batch of shape {list(expected.shape)}; give one reward")
    return expected


@guarded(RewardError)
def optimal_policy(reward: Array, mdp: TabularMDP, *, minimize: bool = False) -> Any:
    """The policy with the largest (with `minimize`, the smallest) return: one action per state, int64 `[S]`.

    Among equally good actions (up to rounding) the lowest index is taken. `reward` is `[S, A, S']`, `[S, A]` or `[S]`.
    """
    expected = expected_one(mdp.to(torch.float64), reward)
    return give_back(optimal_actions(mdp, (-expected if minimize else expected)[None])[0], reward)


@guarded(RewardError)
def policy_return(policy: Array, reward: Array, mdp: TabularMDP) -> Scalar:
    """The discounted return `J = mu0 . V^pi` of a policy, `[S, A]` probabilities or `[S]` actions, under one reward."""
    from rlkit2.rewards.canonical import common_process

    mdp = common_process(mdp, reward)
    values = mdp.values(expected_one(mdp, reward), mdp.policy(policy))
    return give_back(values @ mdp.initial_distribution, reward)  # type: ignore[no-any-return]
