"""Per-decision importance sampling: the data's rewards, each weighted by how much likelier the policy makes the actions that led to it.

    rho_t = prod_{k <= t} pi(a_k | s_k) / mu(a_k | s_k),      J = sum_t gamma^t  sum_e rho_t^e x_t^e / sum_e rho_t^e,      x_t = r_t

Source: Precup, Sutton, Singh, "Eligibility Traces for Off-Policy Policy Evaluation" (ICML 2000): the weighted per-decision form, which is consistent
and bounded. An episode that has terminated stays in the denominators with its last weight and reward zero; where one was truncated, its last
reward is followed by gamma V(s') of a fitted Q, as nothing else is known of what follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlkit2.evaluation.offline.behavior import no_density
from rlkit2.evaluation.offline.estimate import Replicates
from rlkit2.evaluation.offline.problem import Problem, Resamples

FEW = 10.0  # effective episodes below which weighted episodes say nothing
COVERED = 0.5  # mean one-step ratio below which the weights are those of another policy, however even
ENOUGH = 50.0  # below which their interval is too narrow: the weights that matter most have not been drawn yet


@dataclass(frozen=True)
class Ratios:
    """Weights of the episodes over time, for P policies.

    Attributes:
        weights: rho_t, `[P, E, T]`, an ended episode keeping its last; at every t divided by the largest of all episodes.
        effective: `[P]`, episodes that carry the estimate: (sum rho)^2 / sum rho^2 at every t, of which the harmonic mean with weights gamma^t is
            taken, as errors add up like 1 / effective.
        covered: `[P]`, mean of the one-step ratios over the data: 1 for a policy whose actions the data hold, less by what they lack.
        missing: per policy why there are no weights, or None.
    """

    problem: Problem
    weights: Tensor
    effective: Tensor
    covered: Tensor
    missing: list[str | None]

    @property
    def refused(self) -> Tensor:
        """bool `[P]`: whose weights carry no estimate at all."""
        missing = torch.tensor([reason is not None for reason in self.missing])
        return missing | (self.effective < FEW) | (self.covered < COVERED)

    def reasons(self) -> list[list[str]]:
        """Per policy why its weights carry no estimate."""
        found = []
        for effective, covered, missing in zip(
            self.effective.tolist(), self.covered.tolist(), self.missing, strict=True
        ):
            if missing:
                found.append([missing])
            elif covered < COVERED:
                found.append([f"the data's actions hold {100 * covered:.0f} % of what this policy may do"])
            elif effective < ENOUGH:
                size = f"effective sample size {effective:.1f} of {self.problem.num_episodes} episodes"
                found.append([f"{size}: the data hardly ever do what this policy does"])
            else:
                found.append([])
        return found


def episode_ratios(problem: Problem, policy: Tensor, behavior: Tensor) -> Ratios:
    """From log pi `[P, N]` and log mu `[N]` of the data's actions to the weights of whole histories."""
    log_ratio = (policy - behavior).double().nan_to_num(nan=-torch.inf)
    log_ratio = log_ratio.clamp(min=-1e4)  # a weight of zero that sums and subtracts
    total = torch.cat([torch.zeros(len(log_ratio), 1, dtype=torch.float64), log_ratio.cumsum(1)], 1)
    summed = total[:, 1:] - total[:, problem.starts[problem.episode]]
    table = by_time(problem, summed)
    ends = problem.starts[1:] - 1
    over = torch.arange(table.shape[-1]) > problem.time[ends].unsqueeze(1)
    table = torch.where(over, summed[:, ends].unsqueeze(-1), table)
    weights = (table - table.amax(1, keepdim=True)).exp() * (table > -5e3)
    squares = weights.square().sum(1)
    effective = torch.where(squares > 0, weights.sum(1).square() / squares.clamp(min=1e-300), 0.0)
    decay = problem.discount ** torch.arange(weights.shape[-1], dtype=torch.float64)
    effective = decay.sum() / (decay / effective).sum(1)
    missing = no_density(problem)
    if not problem.own_starts:
        elsewhere = "importance weights belong to the start of the data's episodes, not to other initial observations"
        missing = [reason or elsewhere for reason in missing]
    return Ratios(problem, weights, effective, log_ratio.exp().mean(1), missing)


def by_time(problem: Problem, values: Tensor) -> Tensor:
    """`[..., N]` as `[..., E, T]`, zero after an episode's end."""
    longest = int(problem.time.max()) + 1
    table = torch.zeros(*values.shape[:-1], problem.num_episodes, longest, dtype=values.dtype)
    table[..., problem.episode, problem.time] = values
    return table


def weighted_sum(ratios: Ratios, terms: Tensor, resamples: Resamples) -> tuple[Tensor, Tensor]:
    """sum_t gamma^t sum_e rho_t^e x_t^e / sum_e rho_t^e for `terms` x `[P, N]`: `[P]`, and for every resample `[P, R]`."""
    counts = torch.cat([torch.ones_like(resamples.episodes[:1]), resamples.episodes]).double()
    found = []
    for weights, own in zip(ratios.weights, terms.double(), strict=True):
        longest = weights.shape[-1]
        decay = ratios.problem.discount ** torch.arange(longest, dtype=torch.float64)
        above = counts @ (weights * by_time(ratios.problem, own) * decay)
        below = counts @ weights
        found.append(torch.where(below > 0, above / below.clamp(min=1e-300), 0.0).sum(-1))
    everything = torch.stack(found)
    return everything[:, 0], everything[:, 1:]


def importance_sampling(ratios: Ratios, next_values: Tensor, resamples: Resamples) -> Replicates:
    """J of every policy; `next_values [P, N]` count at truncations alone. Refused where too few episodes carry the weights."""
    problem = ratios.problem
    terms = problem.rewards + problem.discount * torch.where(problem.cut, next_values, 0.0)
    values, resampled = weighted_sum(ratios, terms, resamples)
    return Replicates(torch.where(ratios.refused, torch.nan, values), resampled, ratios.reasons())
