"""Critic-regularized regression: the policy clones the actions of the data that its critic prefers to its own, and forgets the others.

    y     = r + gamma (1 - terminated) min_i Q_target_i(s', a''),   a'' ~ pi_target(.|s')
    L(Q)  = E[ sum_i (y - Q_i(s, a))^2 ]
    A     = Q(s, a) - 1/m sum_j Q(s, a_j),   a_j ~ pi(.|s)          (advantage = "max": less the largest of the m instead of their mean)
    L(pi) = -E[ f log pi(a|s) ],   f = 1(A > 0) or min(exp(A / beta), 20);   Q = min_i Q_i

Source: Wang et al., "Critic Regularized Regression" (NeurIPS 2020), equations 1 to 4 and Table 1, with beta 1, m 4 and the clamp at 20 of the paper
and of the released code in Acme. Differences: scalar values regressed by squared error (the paper: distributional; Acme and d3rlpy: scalar); a
Gaussian policy (the paper: a mixture of five); targets follow by Polyak averaging (theirs: a copy every 100 updates); the action is the policy's mode
(the paper: chosen among samples by Q); A is that after the step of Q. Of discrete actions Q has one output each; mean and largest are over them all.
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
from rlkit2.fields import Count, Fraction, NonNegative, Positive, Rate, Widths
from rlkit2.nn import Critic, lerp_, target_copy
from rlkit2.nn.actors import Actor
from rlkit2.nn.random import normal


@dataclass(frozen=True)
class CRRConfig(EncoderOptions, PolicyOptions, ErrorOptions):
    """Critic-regularized regression."""

    # f: "exp" weighs actions by exp(A / beta), "binary" keeps those with A > 0
    weight: Literal["exp", "binary"] = "exp"
    # what Q(s, a) is held against: the "mean" of Q over the policy's actions, or the largest of the samples ("max": stricter)
    advantage: Literal["mean", "max"] = "mean"
    # m: samples of the policy for that
    num_samples: Count = 4
    # beta of "exp": the smaller, the more the policy follows the advantage
    temperature: Positive = 1.0
    # upper bound of the weight of "exp"
    weight_clamp: Positive = 20.0
    # gamma
    discount: Fraction = 0.99
    # estimates of Q; targets and advantages take their minimum
    num_critics: Count = 1
    # hidden layers of Q and the policy
    hidden_sizes: Widths = (256, 256)
    # Adam's step size for Q
    critic_learning_rate: NonNegative = 3e-4
    # Adam's step size for the policy
    policy_learning_rate: NonNegative = 3e-4
    # Polyak rate of the targets
    target_update_rate: Rate = 0.005


class CRR(UncertainAgent):
    """CRR for S seeds; arguments as for `Agent`."""

    config_class = CRRConfig
    action_kinds = ACTION_KINDS
    sees_images = True
    config: CRRConfig

    def _build(self) -> None:
        config = self.config
        self._build_critics()
        self.actor = self._build_policy(self._likelihood_actor(config.hidden_sizes), config.policy_learning_rate)
        self.actor_target = target_copy(self.actor)
        self._register({"policy_target": self.actor_target})

    # The terms of the objective, on normalised batches

    def sampled_values(self, critic: Critic, actor: Actor, observations: Tensor, count: int, stream: str) -> Tensor:
        """min_i Q_i at `count` actions of a policy, `[S, count, B]`, by noise of the seed and the step."""
        seeds, rows = observations.shape[:2]
        repeated = observations.repeat(1, count, *(1 for _ in observations.shape[2:]))
        shape = (seeds, count * rows, self.action_size)
        noise = normal(shape, self.seed_keys, self.step, stream=stream, dtype=self.dtype)
        values: Tensor = critic(repeated, actor(repeated, noise).clamp(-1.0, 1.0))
        return values.amin(1).view(seeds, count, rows)

    @torch.no_grad()
    def critic_targets(self, batch: Batch) -> Tensor:
        """y, `[S, B]`; of discrete actions with the mean over the target policy's actions."""
        observations = batch.next_observations
        if self.discrete:
            probabilities = self.actor_target.network(observations).softmax(-1)
            next_value: Tensor = torch.linalg.vecdot(
                probabilities, self.critic_target.every_action(observations).amin(1)
            )
        else:
            sampled = self.sampled_values(self.critic_target, self.actor_target, observations, 1, "next_action")
            next_value = sampled.squeeze(1)
        return self.td_targets(batch, next_value)

    @torch.no_grad()
    def advantage(self, batch: Batch) -> Tensor:
        """A, `[S, B]`."""
        observations, largest = batch.observations, self.config.advantage == "max"
        chosen: Tensor = self.critic(observations, batch.actions)
        if self.discrete:
            every = self.critic.every_action(observations).amin(1)
            probabilities = self.actor.network(observations).softmax(-1)
            value: Tensor = every.amax(-1) if largest else torch.linalg.vecdot(probabilities, every)
        else:
            sampled = self.sampled_values(self.critic, self.actor, observations, self.config.num_samples, "action")
            value = sampled.amax(1) if largest else sampled.mean(1)
        return chosen.amin(1) - value

    def policy_weight(self, advantage: Tensor) -> Tensor:
        """f, `[S, B]`."""
        if self.config.weight == "binary":
            return (advantage > 0.0).to(self.dtype)
        return (advantage / self.config.temperature).exp().clamp(max=self.config.weight_clamp)

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
        lerp_(self.actor_target, self.actor, self.config.target_update_rate)
        self.step += 1
        means = {"advantage/mean": advantage, "weight/mean": weight}
        if self.config.weight == "exp":
            means["weight/clamp_share"] = weight == self.config.weight_clamp
        else:
            means["weight/zero_share"] = weight == 0.0
        return metrics | {"policy/loss": loss.detach(), **batch_means(means)}

    # What it offers to others

    @classmethod
    def warnings(cls, config: CRRConfig, metrics: Mapping[str, float]) -> dict[str, str]:
        """Weights at their clamp, or nearly all zero; signs of trouble in the noise model."""
        found = super().warnings(config, metrics)
        if metrics.get("weight/clamp_share", 0.0) > 0.5:
            found["clamped_weights"] = (
                "more than half of the policy weights are at the clamp; use a larger temperature or a smaller reward_scale"
            )
        if metrics.get("weight/zero_share", 0.0) > 0.99:
            found["few_weights"] = (
                "less than a hundredth of the data's actions are cloned; use advantage = 'mean' or weight = 'exp'"
            )
        return found
