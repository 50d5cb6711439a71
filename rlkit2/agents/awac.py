"""Advantage-weighted actor-critic: the policy clones the data, weighted by how much better each action is than the policy's own.

Q is that of the policy, which is asked at its own actions in the targets and nowhere else; the policy never climbs Q:

    y     = r + gamma (1 - terminated) min_i Q_target_i(s', a''),   a'' ~ pi(.|s')
    L(Q)  = E[ sum_i (y - Q_i(s, a))^2 ]
    A     = min_i Q_i(s, a) - min_i Q_i(s, a'),                     a'  ~ pi(.|s)
    L(pi) = -E[ w log pi(a|s) ],   w = exp(A / lambda) / mean over the batch of exp(A / lambda)

Source: Nair, Gupta, Dalal, Levine, "AWAC: Accelerating Online Reinforcement Learning with Offline Datasets" (2020), equations 8 to 13, and its
released code, whose weights are a softmax over the batch; `weight_normalization = "none"` has min(exp(A / lambda), clamp) instead, as CORL does.
Differences from the released code: A is that after the step of Q (theirs: before it); the log standard deviation is clamped to its bounds (theirs:
squashed into them, from their middle); the policy's network is as wide and deep as Q's (theirs: 4 x 256 beside 2 x 256). Of discrete actions Q has
one output each, and the mean over the policy's actions is exact instead of a sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlkit2.agents.base import ACTION_KINDS, EncoderOptions, PolicyOptions, batch_means
from rlkit2.agents.error_model import ErrorOptions
from rlkit2.agents.uncertain_agent import UncertainAgent
from rlkit2.data.batch import Batch
from rlkit2.fields import Bounds, Count, Fraction, NonNegative, Positive, Rate, Widths
from rlkit2.losses.ggd import effective_sample_size
from rlkit2.nn import Critic, lerp_
from rlkit2.nn.random import normal


@dataclass(frozen=True)
class AWACConfig(EncoderOptions, PolicyOptions, ErrorOptions):
    """Advantage-weighted actor-critic."""

    # lambda: the smaller, the more the policy follows the advantage
    temperature: Positive = 1.0
    # "mean" divides a seed's weights by their batch mean; "none" clamps them instead
    weight_normalization: Literal["none", "mean"] = "mean"
    # upper bound of the policy weight exp(A / lambda) under weight_normalization = "none"
    weight_clamp: Positive = 100.0
    # gamma
    discount: Fraction = 0.99
    # estimates of Q; targets and advantages take their minimum
    num_critics: Count = 2
    # hidden layers of Q and the policy
    hidden_sizes: Widths = (256, 256)
    # the log standard deviation is clamped to these when used
    log_std_bounds: Bounds = (-6.0, 0.0)
    # Adam's step size for Q
    critic_learning_rate: NonNegative = 3e-4
    # Adam's step size for the policy
    policy_learning_rate: NonNegative = 3e-4
    # L2 inside the policy's Adam
    policy_weight_decay: NonNegative = 1e-4
    # Polyak rate of the target Q
    target_update_rate: Rate = 0.005


class AWAC(UncertainAgent):
    """AWAC for S seeds; arguments as for `Agent`."""

    config_class = AWACConfig
    action_kinds = ACTION_KINDS
    sees_images = True
    config: AWACConfig

    def _build(self) -> None:
        config = self.config
        self._build_critics()
        actor = self._likelihood_actor(config.hidden_sizes)
        self.actor = self._build_policy(actor, config.policy_learning_rate, weight_decay=config.policy_weight_decay)

    # The terms of the objective, on normalised batches

    def policy_value(self, critic: Critic, observations: Tensor, stream: str) -> Tensor:
        """min_i Q_i(s, a'), a' ~ pi(.|s) by noise of the seed and the step, `[S, B]`; the mean over a' itself where there is one choice."""
        if self.discrete:
            probabilities = self.actor.network(observations).softmax(-1)
            mean: Tensor = torch.linalg.vecdot(probabilities, critic.every_action(observations).amin(1))
            return mean
        shape = (*observations.shape[:2], self.action_size)
        noise = normal(shape, self.seed_keys, self.step, stream=stream, dtype=self.dtype)
        values: Tensor = critic(observations, self.actor(observations, noise).clamp(-1.0, 1.0))
        return values.amin(1)

    @torch.no_grad()
    def critic_targets(self, batch: Batch) -> Tensor:
        """y, `[S, B]`."""
        next_value = self.policy_value(self.critic_target, batch.next_observations, "next_action")
        return self.td_targets(batch, next_value)

    @torch.no_grad()
    def advantage(self, batch: Batch) -> Tensor:
        """A, `[S, B]`."""
        value = self.policy_value(self.critic, batch.observations, "action")
        chosen: Tensor = self.critic(batch.observations, batch.actions)
        return chosen.amin(1) - value

    def policy_weight(self, advantage: Tensor) -> Tensor:
        """w, `[S, B]`."""
        exponent = advantage / self.config.temperature
        if self.config.weight_normalization == "mean":
            return exponent.softmax(1) * exponent.shape[1]
        return exponent.exp().clamp(max=self.config.weight_clamp)

    # One update

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """A critic step, a policy step on the weights after it, then a step of the targets."""
        batch = self.normalize(batch)
        metrics = self.fit_critic(batch, self.critic_targets(batch))
        advantage = self.advantage(batch)
        weight = self.policy_weight(advantage)
        loss = -(weight * self.actor.log_prob(batch.observations, batch.actions)).mean(1)
        metrics["policy/grad_norm"] = self.policy_optimizer.minimize(loss)
        lerp_(self.critic_target, self.critic, self.config.target_update_rate)
        self.step += 1
        means = {"advantage/mean": advantage, "weight/mean": weight}
        if self.config.weight_normalization == "none":
            means["weight/clamp_share"] = weight == self.config.weight_clamp
        return metrics | {
            "policy/loss": loss.detach(),
            "weight/effective_sample_share": effective_sample_size(weight) / weight.shape[1],
            "weight/max": weight.amax(1),
            **batch_means(means),
        }

    # What it offers to others

    @classmethod
    def warnings(cls, config: AWACConfig, metrics: Mapping[str, float]) -> dict[str, str]:
        """Weights that a handful of rows carry, or that are all at their clamp; signs of trouble in the noise model."""
        found = super().warnings(config, metrics)
        if metrics.get("weight/effective_sample_share", 1.0) < 0.01:
            found["few_weights"] = (
                "less than a hundredth of the batch carries the policy's weights; use a larger temperature or a smaller reward_scale"
            )
        if metrics.get("weight/clamp_share", 0.0) > 0.5:
            found["clamped_weights"] = (
                "more than half of the policy weights are at the clamp; use a larger temperature or a smaller reward_scale"
            )
        return found
