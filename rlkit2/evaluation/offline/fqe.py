"""Fitted Q evaluation: the Q of a fixed policy by regression on its own Bellman targets.

    Q_{k+1} = argmin_Q  E_D [ (r + gamma (1 - terminated) E_{a' ~ pi(.|s')} Q_k(s', a') - Q(s, a))^2 ],      J = E_{s0} E_{a ~ pi(.|s0)} Q(s0, a)

Source: Le, Voloshin, Yue, "Batch Policy Learning under Constraints" (ICML 2019), section 4. Here k moves with every update: the target follows
by Polyak averaging, and the averaged network is the result. Targets are clipped to the returns that the data's rewards allow at all, which keeps
a bootstrap beyond the data from running away. The M members are each fitted to their own resample of the episodes (Hao et al., "Bootstrapping
Fitted Q-Evaluation for Off-Policy Inference", ICML 2021): their spread is the interval.

With `critic = "gaussian"` or `"ggd"` every member also learns the noise of its targets, as the agents' critics do (`rlkit2.agents.error_model`).
Q stays a regression on the mean; `sample_weighting = "iv"` lets quiet transitions count more in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rlkit2.agents.error_model import ErrorModel, ErrorOptions
from rlkit2.data.returns import discounted_returns
from rlkit2.evaluation.offline.estimate import Replicates
from rlkit2.evaluation.offline.options import OfflineOptions
from rlkit2.evaluation.offline.problem import EpisodeSampler, Problem, Resamples, chunks
from rlkit2.nn import Adam, Critic, lerp_, target_copy
from rlkit2.nn.distributions import GeneralizedNormal

RUNAWAY = 0.05  # of the range of possible returns: a target so far beyond it is no noise of the fit
REMAINING = 0.05  # share of the distance from the start that may be left
UNSETTLED = (
    0.1  # of the spread of returns: an estimate that still moves so much over the last third of the fit has not arrived
)


@dataclass(frozen=True)
class TargetNoise:
    """Noise of the Bellman targets: its `deviation [P, N]` at the data's steps in the rewards' units, and the share of targets that its intervals
    of nominal `level` hold, `coverage [P]`."""

    deviation: Tensor
    level: float
    coverage: Tensor


@dataclass(frozen=True)
class FittedQ:
    """Q of P policies by M members. Value = `center + scale * network`.

    `backups`: Bellman backups made, updates times the target's rate. `drift [P]`: how far the estimate moved over the last third of the fit, and
    `clipped [P]` the share of the last targets far outside the possible returns, the former in units of `scale`.
    """

    problem: Problem
    critic: Critic
    resamples: Resamples
    center: float
    scale: float
    backups: float
    drift: Tensor
    clipped: Tensor
    errors: ErrorModel

    @cached_property
    def initial_values(self) -> Tensor:
        """V of the initial states, `[P, M, I]`."""
        return self._values(self.problem.initial_observations, self.problem.initial)

    @cached_property
    def next_values(self) -> Tensor:
        """V of the next observations, `[P, N]`, each by the members that did not see its episode."""
        return self._unseen(self._values(self.problem.next_observations, self.problem.after))

    @cached_property
    @torch.no_grad()
    def data_values(self) -> Tensor:
        """Q of the data's steps, `[P, N]`, each by the members that did not see its episode."""
        rows = chunks(len(self.problem.rewards))
        found = torch.cat([self.problem.at_data(self.critic, part) for part in rows], -1)
        return self._unseen(self.center + self.scale * found)

    @torch.no_grad()
    def _values(self, observations: Tensor, chosen: Tensor) -> Tensor:
        parts = [self.problem.at_policy(self.critic, observations, chosen, rows) for rows in chunks(len(observations))]
        return self.center + self.scale * torch.cat(parts, -1)

    def _unseen(self, values: Tensor) -> Tensor:
        """Mean over the members `[P, M, N]` that have not seen the row."""
        return (values * self._weights).sum(1) / self._weights.sum(0)

    @cached_property
    def _weights(self) -> Tensor:
        """`[M, N]`: 1 where a member's resample lacks the row's episode (for an episode that every one has: at all of them)."""
        unseen = (self.resamples.episodes == 0).float()
        return torch.where(unseen.sum(0) == 0, torch.ones_like(unseen), unseen)[:, self.problem.episode]

    @torch.no_grad()
    def noise(self, level: float = 0.9) -> TargetNoise | None:
        """What the members say of the noise of targets in episodes that they have not seen; None where they learn none."""
        if not self.errors.outputs:
            return None
        variances, inside = [], []
        following = (self._values(self.problem.next_observations, self.problem.after) - self.center) / self.scale
        rewards, bootstrap = in_units(self.problem, self.center, self.scale)
        for rows in chunks(len(rewards)):
            heads = self.errors.heads(self.problem.outputs_at_data(self.critic, rows))
            targets = rewards[rows] + bootstrap[rows] * following[..., rows]
            spread = GeneralizedNormal(torch.zeros_like(heads.q), heads.log_scale.exp(), heads.shape)
            inside.append(((2.0 * spread.cdf((targets - heads.q).abs()) - 1.0) <= level).float())
            variances.append(heads.variance)
        deviation = self.scale * self._unseen(torch.cat(variances, -1)).sqrt()
        return TargetNoise(deviation, level, self._unseen(torch.cat(inside, -1)).mean(-1))

    def estimate(self) -> Replicates:
        """J of every policy."""
        weights = self.resamples.initial
        members = (self.initial_values * weights).sum(-1) / weights.sum(-1)
        reasons: list[list[str]] = [[] for _ in self.drift]
        left = self.problem.discount**self.backups
        for policy, (drift, clipped) in enumerate(zip(self.drift.tolist(), self.clipped.tolist(), strict=True)):
            if left > REMAINING:
                needed = math.ceil(math.log(REMAINING) / math.log(left))
                reasons[policy].append(
                    f"{self.backups:.0f} backups reach {100 * (1 - left):.0f} % of the horizon; use {needed} times the steps"
                )
            if drift > UNSETTLED:
                reasons[policy].append(
                    f"still moving: {drift:.2g} of the returns' spread in the last third of the fit; use more steps"
                )
            if clipped > 0.01:
                reasons[policy].append(
                    f"{100 * clipped:.0f} % of the targets lie far beyond every possible return: Q runs away"
                )
        return Replicates(members.mean(1), members, reasons)


def possible_returns(problem: Problem) -> tuple[float, float]:
    """The lowest and the highest value that rewards within the data's range can add up to."""
    low, high = float(problem.rewards.min()), float(problem.rewards.max())
    horizon = 1.0 / (1.0 - problem.discount)
    if bool((problem.continues == 0).any()):  # an end may come after one step
        return min(low, low * horizon), max(high, high * horizon)
    return low * horizon, high * horizon


def returns_to_go(problem: Problem) -> Tensor:
    """Discounted sum of the data's rewards from each row to the end of its episode, `[N]`; what follows a truncation counts as nothing."""
    return discounted_returns(problem.rewards, problem.starts, problem.discount).float()


def in_units(problem: Problem, center: float, scale: float) -> tuple[Tensor, Tensor]:
    """Rewards for a Q that is `center + scale * network`, and gamma (1 - terminated), `[N]`."""
    bootstrap = problem.discount * problem.continues
    return (problem.rewards - center + bootstrap * center) / scale, bootstrap


def fit_q(problem: Problem, options: OfflineOptions, progress: Callable[[int, int], None] | None = None) -> FittedQ:
    """Fit Q of every policy; all of them see the same batches, so that their differences are not noise of the fit."""
    resamples = problem.resamples(options.members, options.seed)
    sampler = EpisodeSampler(resamples.episodes, problem.episode, options.seed)
    errors = ErrorModel(
        ErrorOptions(critic=options.critic, sample_weighting=options.sample_weighting),
        problem.num_policies,
        problem.rewards.dtype,
        problem.rewards.device,
        own_rows=True,
    )
    critic = problem.critic(options, "fqe", noise_outputs=errors.outputs, detach_noise=errors.detached)
    target = target_copy(critic)
    optimizer = Adam(critic, options.learning_rate, cosine_steps=options.steps)

    to_go = returns_to_go(problem)  # only units and a start: the fit forgets them
    center, scale = float(to_go.mean()), float(to_go.std(correction=0)) or 1.0
    low, high = ((bound - center) / scale for bound in possible_returns(problem))
    rewards, bootstrap = in_units(problem, center, scale)

    clipped = torch.zeros(problem.num_policies)
    path = []
    everyone = torch.arange(len(problem.initial_observations))
    for step in range(options.steps):
        rows = sampler.draw(options.batch_size)
        with torch.no_grad():
            following = problem.at_policy(target, problem.next_observations, problem.after, rows)
            targets = rewards[rows] + bootstrap[rows] * following
            bounded = targets.clamp(low, high)
        loss, _ = errors.loss(problem.outputs_at_data(critic, rows), bounded, problem.discount)
        optimizer.minimize(loss)
        lerp_(target, critic, options.target_update_rate)
        if step >= options.steps - 100:
            outside = (targets - bounded).abs() > RUNAWAY * (high - low)
            clipped += outside.float().mean((1, 2)) / min(100, options.steps)
        if step in (options.steps * 2 // 3, options.steps - 1):
            with torch.no_grad():
                path.append(
                    problem.at_policy(target, problem.initial_observations, problem.initial, everyone).mean((1, 2))
                )
        if progress is not None:
            progress(step + 1, options.steps)
    return FittedQ(
        problem,
        target,
        resamples,
        center,
        scale,
        options.steps * options.target_update_rate,
        (path[-1] - path[0]).abs(),
        clipped,
        errors,
    )
