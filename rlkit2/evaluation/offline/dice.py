"""Marginal weights: how much oftener the policy is at a state and action than the data are, found for the fixed policy by a saddle point.

    max_zeta min_nu  (1 - gamma) E_{s0, a0 ~ pi} nu(s0, a0) + E_D[ zeta(s, a) (gamma (1 - terminated) E_{a' ~ pi} nu(s', a') - nu(s, a)) ]
        + 1/2 |nu|^2 - lambda/2 E_D[ (zeta(s, a) - 1)^2 ]

The minimum over nu makes the flow of visits that `zeta` implies balance, so zeta = d_pi / d_D where the data reach; then
J = E_D[zeta r] / (1 - gamma). Source: Yang, Nachum, Dai, Li, Schuurmans, "Off-Policy Evaluation via the Regularized Lagrangian" (NeurIPS 2020),
with both sides regularised, no reward inside and the dual estimate. Here nu and zeta are linear in the same random features phi
(whitened; Rahimi and Recht, 2007), so that the saddle point is one linear system instead of a game between two networks, which does not settle:

    C = E_D[ (phi - gamma (1 - terminated) phi'_pi) phi^T ],   b = (1 - gamma) E phi_pi(s0),
    theta = argmin |C theta - b|^2 + lambda E_D (zeta - 1)^2

The price: weights are not kept positive. The paper's multiplier for E_D[zeta] = 1 is here the balance for nu = 1, which holds with terminations
too and is imposed at the end: J = E_D[zeta r] / E_D[zeta (1 - gamma (1 - terminated))].

The weights that DICE agents (`odice`) train with are not these: a semi-gradient or an orthogonal one solves another problem, and what they weigh is
the policy they are about to clone. Whether the flow balances is measured on functions that took no part in the fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlkit2.evaluation.offline.estimate import Replicates
from rlkit2.evaluation.offline.options import OfflineOptions
from rlkit2.evaluation.offline.problem import Problem, Resamples, chunks

UNBALANCED = 0.1  # of a feature's deviation: by how much the start that the weights imply may miss the true one
NEGATIVE = 0.2  # share of the weights' mass below zero
SMALLEST = 1e-6  # of the largest variance: directions of the features below it are dropped


@dataclass(frozen=True)
class OccupancyRatios:
    """zeta of P policies at the data's steps by M members, each from its own resample, `weights [P, M, N]`, scaled so that nu = 1 balances.

    `imbalance [P]`: by how much of their standard deviation held-out functions of the start are missed (root mean square). `negative [P]`: share
    of the weights' mass below zero. `effective [P]`: (sum zeta)^2 / sum zeta^2, in transitions.
    """

    problem: Problem
    weights: Tensor
    resamples: Resamples
    imbalance: Tensor
    negative: Tensor
    effective: Tensor

    def estimate(self) -> Replicates:
        """J of every policy."""
        problem = self.problem
        counts = self.resamples.episodes[:, problem.episode]
        outflow = 1.0 - problem.discount * problem.continues
        rewards = torch.stack([(own * counts) @ problem.rewards for own in self.weights])
        flows = torch.stack([(own * counts) @ outflow for own in self.weights])
        members = torch.where(flows > 0, rewards / flows, torch.nan)
        reasons: list[list[str]] = [[] for _ in self.imbalance]
        for policy, (missed, negative) in enumerate(zip(self.imbalance.tolist(), self.negative.tolist(), strict=True)):
            if not missed <= UNBALANCED:
                reasons[policy].append(
                    f"the weights imply another start ({missed:.2g} standard deviations off): the data do not hold this policy's visits"
                )
            if not negative <= NEGATIVE:
                reasons[policy].append(f"{100 * negative:.0f} % of the weights' mass is negative")
        return Replicates(members.mean(1), members, reasons)


class Features:
    """phi(s, a): a constant, the inputs and cosines of random projections of them; for discrete actions one block per action."""

    def __init__(self, problem: Problem, size: int, seed: int) -> None:
        self.discrete, self.actions = problem.discrete, problem.dataset.spec.action_size
        inputs = problem.observations.shape[1] + (0 if self.discrete else self.actions)
        size = size // self.actions if self.discrete else size
        generator = torch.Generator().manual_seed(seed)
        self.projection = torch.randn(inputs, size, generator=generator) / math.sqrt(inputs)
        self.phase = 2.0 * math.pi * torch.rand(size, generator=generator)

    def of(self, observations: Tensor, actions: Tensor) -> Tensor:
        """`[B, D]` for `observations [B, obs]` and probabilities `[B, n]`, or the mean over K actions `[B, K, act]`."""
        if self.discrete:
            plain = self._plain(observations)
            return (plain.unsqueeze(1) * actions.unsqueeze(2)).flatten(1)
        return torch.stack([self._plain(torch.cat([observations, draw], 1)) for draw in actions.unbind(1)]).mean(0)

    def _plain(self, inputs: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(inputs[:, :1]), inputs, (inputs @ self.projection + self.phase).cos()], 1)

    def all(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The same in chunks."""
        return torch.cat([self.of(observations[rows], actions[rows]) for rows in chunks(len(observations))])


def data_actions(problem: Problem) -> Tensor:
    """The data's actions in the layout of a policy's, `[N, n]` or `[N, 1, act]`."""
    if problem.discrete:
        return torch.nn.functional.one_hot(problem.actions, problem.dataset.spec.action_size).float()
    return problem.actions.unsqueeze(1)


@torch.no_grad()
def fit_ratios(
    problem: Problem, options: OfflineOptions, progress: Callable[[int, int], None] | None = None
) -> OccupancyRatios:
    """Solve the saddle point for every policy and member."""
    resamples = problem.resamples(options.members, options.seed)
    phi, held_out = Features(problem, options.features, options.seed), Features(problem, 64, options.seed + 1)
    taken = data_actions(problem)
    here = phi.all(problem.observations, taken)
    whitening = _whitening(here)
    here = here @ whitening
    continued = (problem.discount * problem.continues).unsqueeze(1)
    rate = 1.0 - problem.discount
    begun = resamples.initial / resamples.initial.sum(1, keepdim=True)
    all_weights, imbalance = [], []
    for policy in range(problem.num_policies):
        flow = here - continued * (phi.all(problem.next_observations, problem.after[policy]) @ whitening)
        start = rate * begun @ (phi.all(problem.initial_observations, problem.initial[policy]) @ whitening)
        own = []
        for counts, inflow in zip(resamples.episodes, start, strict=True):
            rows = counts[problem.episode]
            balance = (flow.T @ (here * rows.unsqueeze(1)) / rows.sum()).double()
            own.append(
                here @ _solve(balance, inflow.double(), here.mean(0).double(), options.regularization * rate**2).float()
            )
        weights = torch.stack(own)
        counts = resamples.episodes[:, problem.episode]
        scale = _scale(weights, counts, 1.0 - continued.squeeze(1), rate)
        all_weights.append(weights * scale.unsqueeze(1))
        imbalance.append(_imbalance(problem, policy, held_out, all_weights[-1].mean(0)))
        if progress is not None:
            progress(policy + 1, problem.num_policies)
    weights = torch.stack(all_weights)
    mean = weights.mean(1)
    return OccupancyRatios(
        problem,
        weights,
        resamples,
        torch.stack(imbalance),
        mean.clamp(max=0.0).abs().sum(1) / mean.abs().sum(1),
        mean.sum(1).square() / mean.square().sum(1),
    )


def _whitening(features: Tensor) -> Tensor:
    """`[D, D']` that makes the second moments of `features [N, D]` the identity."""
    moments = (features.T @ features / len(features)).double()
    variances, directions = torch.linalg.eigh(moments)
    kept = variances > SMALLEST * variances[-1]
    whitening: Tensor = directions[:, kept] / variances[kept].sqrt()
    return whitening.float()


def _solve(balance: Tensor, inflow: Tensor, one: Tensor, penalty: float) -> Tensor:
    """theta `[D]`; `one` are the coefficients of zeta = 1, towards which the penalty pulls."""
    system = balance.T @ balance + penalty * torch.eye(len(one), dtype=torch.float64)
    moved: Tensor = torch.linalg.solve(system, balance.T @ (inflow - balance @ one))
    return one + moved


def _scale(weights: Tensor, counts: Tensor, outflow: Tensor, rate: float) -> Tensor:
    """`[M]`: factor by which nu = 1 balances in every member's resample."""
    return rate * counts.sum(1) / ((weights * counts) @ outflow)


def _imbalance(problem: Problem, policy: int, functions: Features, weights: Tensor) -> Tensor:
    """Root mean square over functions phi of E phi_pi(s0) - E_D[zeta (phi - gamma (1 - terminated) phi'_pi)] / (1 - gamma), in deviations of phi."""
    here = functions.all(problem.observations, data_actions(problem))
    after = functions.all(problem.next_observations, problem.after[policy])
    start = functions.all(problem.initial_observations, problem.initial[policy]).mean(0)
    flow = here - (problem.discount * problem.continues).unsqueeze(1) * after
    implied = weights @ flow / (len(flow) * (1.0 - problem.discount))
    deviation = here.std(0)
    varies = deviation > 1e-6
    missed: Tensor = ((start - implied)[varies] / deviation[varies]).square().mean().sqrt()
    return missed
