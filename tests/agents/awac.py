"""Advantage-weighted actor-critic: what a new agent costs.

    A(s, a) = min_i Q_i(s, a) - min_i Q_i(s, a'),   a' ~ pi(.|s)
    y       = r + gamma (1 - terminated) min_i Q_target_i(s', a''),   a'' ~ pi(.|s')
    L(Q)    = E[ sum_i (y - Q_i(s, a))^2 ]
    L(pi)   = -E[ min(exp(A / lambda), clamp) log pi(a|s) ]

Source: Nair, Gupta, Dalal, Levine, "AWAC: Accelerating Online Reinforcement Learning with Offline Datasets" (2020), equations 8 to 13.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlkit2.agents.base import PolicyOptions
from rlkit2.agents.error_model import ErrorOptions
from rlkit2.agents.uncertain_agent import UncertainAgent
from rlkit2.data.batch import Batch
from rlkit2.fields import Count, Fraction, NonNegative, Positive, Rate, Widths
from rlkit2.losses.td import td_target
from rlkit2.nn import lerp_
from rlkit2.nn.random import normal


@dataclass(frozen=True)
class AWACConfig(PolicyOptions, ErrorOptions):
    """AWAC, for continuous actions and several choices."""

    # lambda: the smaller, the more the policy follows the advantage
    temperature: Positive = 1.0
    # upper bound of the policy weight
    weight_clamp: Positive = 20.0
    # gamma
    discount: Fraction = 0.99
    # estimates of Q; targets take their minimum
    num_critics: Count = 2
    # hidden layers of Q and the policy
    hidden_sizes: Widths = (256, 256)
    # Adam's step size for Q
    critic_learning_rate: NonNegative = 3e-4
    # Adam's step size for the policy
    policy_learning_rate: NonNegative = 3e-4
    # Polyak rate of the target Q
    target_update_rate: Rate = 0.005


class AWAC(UncertainAgent):
    """AWAC for S seeds; arguments as for `Agent`."""

    config_class = AWACConfig
    action_kinds = ("continuous", "multidiscrete")
    config: AWACConfig

    def _build(self) -> None:
        self._build_critics()
        actor = self._likelihood_actor(self.config.hidden_sizes)
        self.actor = self._build_policy(actor, self.config.policy_learning_rate)

    def sample(self, observations: Tensor, stream: str) -> Tensor:
        """Actions of the policy, `[S, B, act]`, by noise of the seed and the step."""
        shape = (*observations.shape[:-1], self.action_size)
        noise = normal(shape, self.seed_keys, self.step, stream=stream, dtype=self.dtype)
        sampled: Tensor = self.actor(observations, noise)
        return sampled.clamp(-1.0, 1.0)

    @torch.no_grad()
    def critic_targets(self, batch: Batch) -> Tensor:
        """y, `[S, B]`."""
        next_actions = self.sample(batch.next_observations, "next_action")
        next_value = self.critic_target(batch.next_observations, next_actions).amin(1)
        return td_target(batch.rewards, batch.terminations, next_value, self.config.discount)

    @torch.no_grad()
    def policy_weight(self, batch: Batch) -> Tensor:
        """min(exp(A / lambda), clamp), `[S, B]`."""
        value = self.critic(batch.observations, self.sample(batch.observations, "action")).amin(1)
        advantage = self.critic(batch.observations, batch.actions).amin(1) - value
        return (advantage / self.config.temperature).exp().clamp(max=self.config.weight_clamp)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """A critic step, a policy step on the weights after it, then a step of the targets."""
        batch = self.normalize(batch)
        metrics = self.fit_critic(batch, self.critic_targets(batch))
        weight = self.policy_weight(batch)
        loss = -(weight * self.actor.log_prob(batch.observations, batch.actions)).mean(1)
        metrics["policy/grad_norm"] = self.policy_optimizer.minimize(loss)
        lerp_(self.critic_target, self.critic, self.config.target_update_rate)
        self.step += 1
        return metrics | {"policy/loss": loss.detach(), "weight/mean": weight.mean(1)}
