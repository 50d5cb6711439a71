"""Minimal canonical forms: the smallest reward among all that order policies alike, by closed form (p = 2) or linear programme.

With `g = r + gamma tau Phi - Phi` the best next-state profile of a row (s, a) is known, so only the potential Phi is left: weighted
least squares for p = 2 and "weighted_2", least absolute deviations for 1 and "weighted_1", Chebyshev for "inf".
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
import scipy.sparse as sp
import torch
from scipy.optimize import linprog
from torch import Tensor

from rlkit2.errors import ConfigError, RewardError
from rlkit2.rewards.mdp import TabularMDP

P: TypeAlias = Literal[1, 2, "inf", "weighted_1", "weighted_2"]
MINIMAL_P: tuple[P, ...] = (1, 2, "inf", "weighted_1", "weighted_2")


def check_p(p: P) -> None:
    """Raise `ConfigError` unless `p` is one of `MINIMAL_P`."""
    if p not in MINIMAL_P:
        raise ConfigError(f"p is {p!r}; choose 1, 2, 'inf', 'weighted_1' or 'weighted_2'")


def minimal(mdp: TabularMDP, expected: Tensor, p: P) -> Tensor:
    """The smallest reward over shaping and redistribution for `r [..., S, A]`: `[..., S, A, S']` for p 1 and 2, else `[..., S, A]`."""
    check_p(p)
    tau = mdp.dense
    scale = torch.ones_like(tau[..., 0])
    if p in (1, 2):
        scale = tau.square().sum(-1).sqrt() if p == 2 else tau.amax(-1)
    weights = 1 / scale
    if p in (2, "weighted_2"):
        potential = _least_squares(mdp, expected, weights)
    else:
        design = mdp.discount * tau.flatten(0, 1) - torch.eye(
            mdp.num_states, dtype=tau.dtype, device=tau.device
        ).repeat_interleave(mdp.num_actions, 0)
        potential = _linear_programme(design, expected.flatten(-2), weights.flatten(), chebyshev=p == "inf")
    gap = expected + mdp.discount * mdp.dynamics.next_mean(potential) - potential[..., None]
    if p == 2:
        return gap[..., None] * (tau / scale.square()[..., None])
    if p == 1:
        peak = torch.nn.functional.one_hot(tau.argmax(-1), mdp.num_states)
        return (gap / scale)[..., None] * peak
    return gap


def minimal_potential(mdp: TabularMDP, reward: Tensor, p: P) -> Tensor:
    """The smallest reward over shaping alone for `R [..., S, A, S']`, same shape."""
    check_p(p)
    tau, discount, states, actions = mdp.dense, mdp.discount, mdp.num_states, mdp.num_actions
    if p in (2, "weighted_2"):
        weights = tau if p == "weighted_2" else torch.ones_like(tau)
        flow, out = weights.sum(1), weights.sum((1, 2))
        gram = torch.diag(discount**2 * weights.sum((0, 1)) + out) - discount * (flow + flow.mT)
        weighted = weights * reward
        slope = discount * weighted.sum((-3, -2)) - weighted.sum((-2, -1))
        solved: Tensor = torch.linalg.solve(gram, slope.unsqueeze(-1))
        potential = -solved.squeeze(-1)
    else:
        eye = torch.eye(states, dtype=tau.dtype, device=tau.device)
        design = (discount * eye[None, None, :, :] - eye[:, None, None, :]).expand(states, actions, states, states)
        rows = tau.flatten() > 0 if p == "weighted_1" else torch.ones(tau.numel(), dtype=torch.bool, device=tau.device)
        weights = (
            tau.flatten()[rows] if p == "weighted_1" else torch.ones(tau.numel(), dtype=tau.dtype, device=tau.device)
        )
        chosen = design.reshape(-1, states)[rows]
        potential = _linear_programme(chosen, reward.flatten(-3)[..., rows], weights, chebyshev=p == "inf")
    return reward + discount * potential[..., None, None, :] - potential[..., :, None, None]


def _least_squares(mdp: TabularMDP, expected: Tensor, weights: Tensor) -> Tensor:
    """The potential that minimises `sum (weights (r + gamma tau Phi - Phi))^2`, with one step of refinement; float64 inside."""
    tau = mdp.dense.double()
    weights, right = weights.double().square().flatten(), expected.double().flatten(-2)
    eye = torch.eye(mdp.num_states, dtype=tau.dtype, device=tau.device)
    design = mdp.discount * tau.flatten(0, 1) - eye.repeat_interleave(mdp.num_actions, 0)
    factor = torch.linalg.cholesky(design.mT @ (weights[:, None] * design))
    potential = torch.zeros(*right.shape[:-1], mdp.num_states, dtype=tau.dtype, device=tau.device)
    for _ in range(2):
        slope = (weights * (right + potential @ design.mT)) @ design
        potential = potential - torch.cholesky_solve(slope.reshape(-1, mdp.num_states).mT, factor).mT.reshape(
            potential.shape
        )
    return potential.to(expected.dtype)


def _linear_programme(design: Tensor, right: Tensor, weights: Tensor, *, chebyshev: bool) -> Tensor:
    """The potentials that minimise the weighted sum, or the maximum, of `|right + design Phi|`; `right [..., n]` gives `[..., S]`."""
    matrix = sp.csr_array(design.double().cpu().numpy())
    rows, states = matrix.shape
    weight = weights.double().cpu().numpy()
    solved = []
    for target in right.detach().double().cpu().numpy().reshape(-1, rows):
        size = max(float(np.abs(target).max()), np.finfo(float).tiny)
        arguments: dict[str, Any]
        if chebyshev:
            one = sp.csr_array(np.ones((rows, 1)))
            arguments = {
                "c": np.r_[np.zeros(states), 1.0],
                "A_ub": sp.vstack([sp.hstack([matrix, -one]), sp.hstack([-matrix, -one])], format="csr"),
                "b_ub": np.r_[-target, target] / size,
                "bounds": [(None, None)] * states + [(0, None)],
            }
        else:
            eye = sp.eye_array(rows)
            arguments = {
                "c": np.r_[np.zeros(states), weight, weight],
                "A_eq": sp.hstack([matrix, -eye, eye], format="csr"),
                "b_eq": -target / size,
                "bounds": [(None, None)] * states + [(0, None)] * (2 * rows),
            }
        tight = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
        result: Any = linprog(**arguments, method="highs", options=tight)  # type: ignore[call-overload]
        if result.x is None:
            raise RewardError(f"the linear programme of the minimal form failed: {result.message}")
        solved.append(result.x[:states] * size)
    return torch.from_numpy(np.stack(solved)).to(right).reshape(*right.shape[:-1], states)
