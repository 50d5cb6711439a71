"""Doubly robust: a fitted Q, corrected by the importance-weighted errors that it makes on the data.

    J = E_{s0} V(s0)  +  sum_t gamma^t  sum_e rho_t^e x_t^e / sum_e rho_t^e,      x_t = r_t + gamma (1 - terminated) V(s_{t+1}) - Q(s_t, a_t)

Right if either Q or the weights are. Source: Jiang and Li, "Doubly Robust Off-policy Value Evaluation for Reinforcement Learning" (ICML 2016);
self-normalised weights as in Thomas and Brunskill, "Data-Efficient Off-Policy Policy Evaluation" (ICML 2016), here over the one sum of
temporal differences. The Q of an episode's steps comes from the members that did not see it, so that Q's own fit is not taken for truth.
"""

from __future__ import annotations

import torch

from rlkit2.evaluation.offline.estimate import Replicates
from rlkit2.evaluation.offline.fqe import FittedQ
from rlkit2.evaluation.offline.importance import Ratios, weighted_sum
from rlkit2.evaluation.offline.problem import Resamples


def doubly_robust(fitted: FittedQ, ratios: Ratios, resamples: Resamples) -> Replicates:
    """J of every policy; refused where the policy has no probabilities, marked where the weights carry no correction."""
    problem = fitted.problem
    following = problem.discount * problem.continues * fitted.next_values
    correction, resampled = weighted_sum(ratios, problem.rewards + following - fitted.data_values, resamples)
    members = (
        torch.arange(len(resamples)) % fitted.initial_values.shape[1]
    )  # the interval holds the chance in Q's fit too
    shares = resamples.initial / resamples.initial.sum(1, keepdim=True)
    starts = torch.stack([(own[members] * shares).sum(1) for own in fitted.initial_values])
    values = fitted.initial_values.mean((1, 2)) + correction
    for policy, missing in enumerate(ratios.missing):
        if missing:
            values[policy] = float("nan")
    return Replicates(values, starts + resampled, ratios.reasons())
