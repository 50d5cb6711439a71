"""ReBRAC: TD3+BC with a penalty of its own in the policy and in the critics, on layer-normalised critics.

Both keep to the data's actions, the critics to those that the data took next (a^', `followed` where there is one):

    a'    = pi_target(s') + noise,   noise = clip(N(0, 0.2^2), -0.5, 0.5)
    y     = r + gamma (1 - terminated) (min_i Q_target_i(s', a') - beta_2 followed |a' - a^'|^2)
    L(Q)  = E[ sum_i (y - Q_i(s, a))^2 ]
    L(pi) = -lambda E[ min_i Q_i(s, pi(s)) ] + beta_1 E[ |pi(s) - a|^2 ],   lambda = 1 / E|min_i Q_i(s, pi(s))|

Source: Tarasov, Kurenkov, Nikulin, Kolesnikov, "Revisiting the Minimalist Approach to Offline Reinforcement Learning" (NeurIPS 2023), with the
hyper-parameters of the authors' code, which tunes beta_1 and beta_2 for every dataset; the defaults here are their medians over its 18 locomotion
datasets. Differences from that code: the last step before a truncation stays, without a penalty (theirs: left out); layer norm before the ReLU
(theirs: behind it); the target policy follows the policy after its step (theirs: before it); the policy's first step is in the second update
(theirs: in the first); layers start as torch's do (theirs: biases 0.1, last layers near 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlkit2.agents.base import EncoderOptions
from rlkit2.agents.error_model import ErrorOptions
from rlkit2.agents.uncertain_agent import UncertainAgent
from rlkit2.data.batch import Batch, LookaheadBatch
from rlkit2.fields import Count, Fraction, NonNegative, Rate, Widths
from rlkit2.nn import lerp_, target_copy
from rlkit2.nn.random import normal


@dataclass(frozen=True)
class ReBRACConfig(EncoderOptions, ErrorOptions):
    """ReBRAC, for continuous actions."""

    # beta_1: weight of the squared distance to the data's action in the policy's loss (published: 0.001 to 0.1)
    policy_penalty: NonNegative = 0.01
    # beta_2: weight of the squared distance to the data's next action in the targets of Q (published: 0 to 0.5)
    critic_penalty: NonNegative = 0.01
    # gamma
    discount: Fraction = 0.99
    # estimates of Q; targets and the policy take their minimum
    num_critics: Count = 2
    # hidden layers of Q and the policy
    hidden_sizes: Widths = (256, 256, 256)
    # layer norm in Q
    critic_layer_norm: bool = True
    # layer norm in the policy
    policy_layer_norm: bool = False
    # Adam's step size for Q
    critic_learning_rate: NonNegative = 1e-3
    # Adam's step size for the policy
    policy_learning_rate: NonNegative = 1e-3
    # critic updates per update of the policy and of the targets
    policy_delay: Count = 2
    # standard deviation of the noise on the target action
    target_noise: NonNegative = 0.2
    # bound of that noise
    target_noise_clip: NonNegative = 0.5
    # Polyak rate of the targets, whenever the policy is updated
    target_update_rate: Rate = 0.005


class ReBRAC(UncertainAgent):
    """ReBRAC for S seeds; arguments as for `Agent`."""

    config_class = ReBRACConfig
    action_kinds = ("continuous",)
    sees_images = True
    needs_next_actions = True
    config: ReBRACConfig

    def _build(self) -> None:
        config = self.config
        self._build_critics(layer_norm=config.critic_layer_norm)
        actor = self._make_actor("deterministic", config.hidden_sizes, layer_norm=config.policy_layer_norm)
        self.actor = self._build_policy(actor, config.policy_learning_rate)
        self.actor_target = target_copy(self.actor)
        self._register({"policy_target": self.actor_target})
        self.phases = config.policy_delay  # on the host: the delay must not ask the device

    # The terms of the objective, on normalised batches

    @torch.no_grad()
    def next_actions(self, batch: Batch) -> Tensor:
        """a', `[S, B, act]`."""
        noise = normal(batch.actions.shape, self.seed_keys, self.step, stream="target_noise", dtype=self.dtype)
        limit = self.config.target_noise_clip
        noise = (self.config.target_noise * noise).clamp(-limit, limit)
        moved: Tensor = self.actor_target(batch.next_observations) + noise
        return moved.clamp(-1.0, 1.0)

    def penalty(self, batch: Batch, next_actions: Tensor) -> Tensor:
        """followed |a' - a^'|^2, `[S, B]`: nothing is known of what would have followed the end of an episode."""
        assert isinstance(batch, LookaheadBatch) and batch.next_actions is not None and batch.followed is not None  # noqa: PT018
        return batch.followed * (next_actions - batch.next_actions).square().sum(-1)

    @torch.no_grad()
    def regression(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """y and beta_2 times the penalty in it, both `[S, B]`."""
        next_actions = self.next_actions(batch)
        penalty = self.config.critic_penalty * self.penalty(batch, next_actions)
        next_value = self.critic_target(batch.next_observations, next_actions).amin(1)
        return self.td_targets(batch, next_value - penalty), penalty

    def critic_targets(self, batch: Batch) -> Tensor:
        """y, `[S, B]`."""
        return self.regression(batch)[0]

    def policy_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """L(pi), `[S]`, with metrics of both terms."""
        actions = self.actor(batch.observations)
        values = self.critic.minimum(batch.observations, actions)
        distance = (actions - batch.actions).square().sum(-1).mean(1)
        weight = values.detach().abs().mean(1).reciprocal()
        loss = self.config.policy_penalty * distance - weight * values.mean(1)
        cloning_error = distance.detach() / self.action_size
        return loss, {"policy/cloning_error": cloning_error, "policy/lambda": weight}

    # One update

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """A critic step; every `policy_delay`-th time also a policy step and a step of the targets."""
        batch = self.normalize(batch)
        targets, penalty = self.regression(batch)
        metrics = {**self.fit_critic(batch, targets), "critic/penalty": penalty.mean(1)}
        self.step += 1
        self.phase = (self.phase + 1) % self.phases
        if self.phase == 0:
            policy_loss, policy_metrics = self.policy_loss(batch)
            metrics["policy/grad_norm"] = self.policy_optimizer.minimize(policy_loss)
            metrics["policy/loss"] = policy_loss.detach()
            metrics.update(policy_metrics)
            lerp_(self.critic_target, self.critic, self.config.target_update_rate)
            lerp_(self.actor_target, self.actor, self.config.target_update_rate)
        return metrics
