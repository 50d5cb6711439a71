"""TD3+BC: twin delayed deterministic policy gradient, kept near the data by a cloning term.

The policy maximises Q, scaled to the size of the cloning error, and every second critic step updates it:

    y     = r + gamma (1 - terminated) min_i Q_target_i(s', pi_target(s') + noise),   noise = clip(N(0, 0.2^2), -0.5, 0.5)
    L(Q)  = E[ sum_i (y - Q_i(s, a))^2 ]
    L(pi) = -lambda E[ Q_1(s, pi(s)) ] + E[ |pi(s) - a|^2 ] / act,   lambda = alpha / E|Q_1(s, pi(s))|

Source: Fujimoto and Gu, "A Minimalist Approach to Offline Reinforcement Learning" (NeurIPS 2021), and the TD3 of Fujimoto, van Hoof and Meger
(ICML 2018), with the authors' hyper-parameters. Noise and clip are in units of the rescaled action, whose bounds are -1 and 1. Train on normalised
observations, as they do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlkit2.agents.base import EncoderOptions
from rlkit2.agents.error_model import ErrorOptions
from rlkit2.agents.uncertain_agent import UncertainAgent
from rlkit2.data.batch import Batch
from rlkit2.fields import Count, Fraction, NonNegative, Rate, Widths
from rlkit2.nn import lerp_, target_copy
from rlkit2.nn.random import normal


@dataclass(frozen=True)
class TD3BCConfig(EncoderOptions, ErrorOptions):
    """TD3+BC, for continuous actions."""

    # weight of Q against the cloning term; 0 clones the data
    alpha: NonNegative = 2.5
    # gamma
    discount: Fraction = 0.99
    # estimates of Q; targets take their minimum
    num_critics: Count = 2
    # next value: the critics' "min", or each critic's own ("independent")
    target: Literal["min", "independent"] = "min"
    # hidden layers of Q and the policy
    hidden_sizes: Widths = (256, 256)
    # Adam's step size for Q
    critic_learning_rate: NonNegative = 3e-4
    # Adam's step size for the policy
    policy_learning_rate: NonNegative = 3e-4
    # critic updates per update of the policy and of the targets
    policy_delay: Count = 2
    # standard deviation of the noise on the target action
    target_noise: NonNegative = 0.2
    # bound of that noise
    target_noise_clip: NonNegative = 0.5
    # Polyak rate of the targets, whenever the policy is updated
    target_update_rate: Rate = 0.005


class TD3BC(UncertainAgent):
    """TD3+BC for S seeds; arguments as for `Agent`."""

    config_class = TD3BCConfig
    action_kinds = ("continuous",)
    sees_images = True
    config: TD3BCConfig

    def _build(self) -> None:
        config = self.config
        self._build_critics()
        actor = self._make_actor("deterministic", config.hidden_sizes)
        self.actor = self._build_policy(actor, config.policy_learning_rate)
        self.actor_target = target_copy(self.actor)
        self._register({"policy_target": self.actor_target})
        self.phases = config.policy_delay  # on the host: the delay must not ask the device

    # The terms of the objective, on normalised batches

    @torch.no_grad()
    def critic_targets(self, batch: Batch) -> Tensor:
        """y, `[S, B]`: the least target critic at the smoothed action of the target policy; each critic's own, `[S, M, B]`, where independent."""
        noise = normal(batch.actions.shape, self.seed_keys, self.step, stream="target_noise", dtype=self.dtype)
        limit = self.config.target_noise_clip
        noise = (self.config.target_noise * noise).clamp(-limit, limit)
        next_actions = (self.actor_target(batch.next_observations) + noise).clamp(-1.0, 1.0)
        next_value = self.critic_target(batch.next_observations, next_actions)
        return self.td_targets(batch, next_value if self.config.target == "independent" else next_value.amin(1))

    def policy_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """-lambda Q_1(s, pi(s)) plus the cloning error, `[S]`, with metrics of both."""
        actions = self.actor(batch.observations)
        values = self.critic.first(batch.observations, actions)
        cloning = (actions - batch.actions).square().mean((1, 2))
        weight = self.config.alpha / values.detach().abs().mean(1)
        loss = cloning - weight * values.mean(1)
        return loss, {"policy/cloning_error": cloning.detach(), "policy/lambda": weight}

    # One update

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """A critic step; every `policy_delay`-th time also a policy step and a step of the targets."""
        batch = self.normalize(batch)
        metrics = self.fit_critic(batch, self.critic_targets(batch))
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
