"""Conservative Q-learning for continuous actions: soft actor-critic whose Q is pushed down where the policy goes and the data are not.

    y      = r + gamma (1 - terminated) min_i Q_target_i(s', a'),   a' ~ pi(.|s')
    D_i(s) = T log sum_a exp((Q_i(s, a) - log p(a)) / T)   over N actions each of p: uniform, pi(.|s), pi(.|s')
    L(Q)   = E[ sum_i (Q_i(s, a) - y)^2 ] + alpha E[ sum_i (D_i(s) - Q_i(s, a)) ]
    L(pi)  = E[ tau log pi(a|s) - min_i Q_i(s, a) ],   a ~ pi(.|s);   tau moves so that the policy's entropy is that of `target_entropy`

D is the logarithm of the integral of exp Q over actions, by importance sampling and up to a constant. With `gap` the second term has a multiplier of
its own, which grows while D - Q is above it. The targets hold no entropy unless `entropy_backup`.

Source: Kumar, Zhou, Tucker, Levine, "Conservative Q-Learning for Offline Reinforcement Learning" (NeurIPS 2020), the CQL(H) of its equation 4 and
appendix F, as CORL has it (whose code follows Geng's): its steps are taken at the values before all of them, as here. Differences from that code: the
log standard deviation is the network's output (theirs: times and plus a number that learn, from 1 and -1); Q starts as torch's linear layers do
(theirs: orthogonal); after a terminated step pi(.|s) stands in for pi(.|s'); no maximum over next actions, no cloning at the start. Targets,
critics and policy are those of `rlkit2.agents.sacn`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlkit2.agents.error_model import counted
from rlkit2.agents.sacn import SACN, SACNConfig, Temperature
from rlkit2.data.batch import Batch
from rlkit2.fields import Bounds, Count, Finite, NonNegative, Positive
from rlkit2.nn import Adam, lerp_
from rlkit2.nn.random import uniform

LARGEST_MULTIPLIER = 1e6


@dataclass(frozen=True)
class ContinuousCQLConfig(SACNConfig):
    """Conservative Q-learning, for continuous actions."""

    # estimates of Q
    num_critics: Count = 2
    # weight of the conservative term; 0 is SAC
    alpha: NonNegative = 10.0
    # N, of each of three kinds: uniform, of the policy at the state, of the policy at the next state
    num_samples: Count = 10
    # divide exp Q of a sampled action by its density; else the data's action joins them
    importance_sampling: bool = True
    # T of the log-sum-exp
    softmax_temperature: Positive = 1.0
    # alpha is multiplied by a number that learns to hold the conservative term here; none: alpha is what it is
    gap: Finite | None = None
    # the targets hold the entropy of the next action
    entropy_backup: bool = False
    # the policy's log standard deviation is clamped to these
    log_std_bounds: Bounds = (-20.0, 2.0)
    # Adam's step size for the policy
    policy_learning_rate: NonNegative = 3e-5
    # Adam's step size for log tau
    temperature_learning_rate: NonNegative = 3e-5


class ContinuousCQL(SACN):
    """Conservative Q-learning for S seeds, continuous actions; arguments and errors as for `SACN`."""

    config_class = ContinuousCQLConfig
    config: ContinuousCQLConfig

    def _build(self) -> None:
        super()._build()
        if self.config.gap is not None:
            self.multiplier = Temperature(math.e, len(self.seeds), self.dtype, self.device)
            self.multiplier_optimizer = Adam(self.multiplier, self.config.critic_learning_rate)
            self._register({"multiplier": self.multiplier}, {"multiplier": self.multiplier_optimizer})

    @property
    def moves_values(self) -> bool:
        """Down, outside the data."""
        return self.config.alpha > 0.0

    # The terms of the objective that are not those of SAC-N, on normalised batches

    @torch.no_grad()
    def next_values(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Target critics at a sampled next action, `[S, M, B]`, and its entropy term, `[S, B]`: zero without `entropy_backup`."""
        values, entropy_term = super().next_values(batch)
        return values, entropy_term if self.config.entropy_backup else torch.zeros_like(entropy_term)

    @torch.no_grad()
    def sampled_actions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """3N actions for every row, `[S, 3 N, B, act]`: uniform, of the policy here and at the next state; and log-densities, `[S, 3 N, B]`."""
        seeds, rows, size = batch.actions.shape
        shape = (seeds, self.config.num_samples, rows, size)
        drawn = uniform(shape, self.seed_keys, self.step, stream="uniform_action", dtype=self.dtype)
        parts = [(2.0 * drawn - 1.0, torch.full_like(drawn[..., 0], -size * math.log(2.0)))]
        ended = batch.terminations.bool().unsqueeze(-1)  # what follows the end of an episode is not looked at
        following = torch.where(ended, batch.observations, batch.next_observations)
        for observations, stream in ((batch.observations, "sampled"), (following, "sampled_next")):
            repeated = observations.repeat(1, self.config.num_samples, 1)
            actions, log_prob = self._sample(repeated, stream)
            parts.append((actions.view(shape), log_prob.view(shape[:3])))
        actions, log_densities = (torch.cat(columns, 1) for columns in zip(*parts, strict=True))
        return actions, log_densities

    def soft_maximum(self, values: Tensor, data_values: Tensor, log_densities: Tensor) -> Tensor:
        """D, `[S, M, B]`, from Q of the sampled actions `[S, M, 3 N, B]`, of the data's `[S, M, B]`, and log-densities `[S, 3 N, B]`."""
        if self.config.importance_sampling:
            values = values - log_densities.unsqueeze(1)
        else:
            values = torch.cat([values, data_values.unsqueeze(2)], 2)
        temperature = self.config.softmax_temperature
        found: Tensor = temperature * torch.logsumexp(values / temperature, 2)
        return found

    # One update

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Steps of the policy, the temperature and the critics, all at the values before them; then of the targets."""
        batch = self.normalize(batch)
        targets, spread = self.regression(batch)  # what the critics learn from, by the policy before its step
        sampled = self.sampled_actions(batch)

        metrics = self.policy_step(batch) | self.conservative_step(batch, targets, spread, *sampled)
        lerp_(self.critic_target, self.critic, self.config.target_update_rate)
        self.step += 1
        return metrics

    def conservative_step(
        self, batch: Batch, targets: Tensor, spread: Tensor | None, actions: Tensor, log_densities: Tensor
    ) -> dict[str, Tensor]:
        """One step of all critics on targets and sampled actions, and of the multiplier where there is one."""
        samples, rows = actions.shape[1:3]
        every = torch.cat([batch.actions, actions.flatten(1, 2)], 1)
        outputs = self.critic.outputs(batch.observations.repeat(1, 1 + samples, 1), every)
        at_data = outputs[:, :, :rows]
        values = outputs[:, :, rows:, 0].reshape(*outputs.shape[:2], samples, rows)
        td_loss, metrics = self.error_loss(batch, at_data, targets, spread)
        q = at_data[..., 0]
        gap = counted(self.soft_maximum(values, q, log_densities) - q, self.row_weights(batch)).mean(2)  # [S, M]
        weight = torch.full_like(td_loss, self.config.alpha)
        if self.config.gap is not None:
            weight = weight * self.multiplier().detach().clamp(max=LARGEST_MULTIPLIER).squeeze(1)
            excess = gap.detach().mean(1) - self.config.gap
            strength = self.multiplier().clamp(max=LARGEST_MULTIPLIER).squeeze(1)
            self.multiplier_optimizer.minimize(-self.config.alpha * strength * excess)
            metrics["critic/multiplier"] = strength.detach()
        gradient_norm = self.critic_optimizer.minimize(td_loss + weight * gap.sum(1))
        count = self.config.num_samples
        return {
            "critic/loss": td_loss.detach(),
            "critic/conservative": gap.detach().sum(1),
            "critic/grad_norm": gradient_norm,
            "critic/q_mean": q.detach().mean((1, 2)),
            "critic/q_uniform": values[:, :, :count].detach().mean((1, 2, 3)),
            "critic/q_policy": values[:, :, count : 2 * count].detach().mean((1, 2, 3)),
            **metrics,
        }
