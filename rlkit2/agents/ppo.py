"""PPO: policy steps on what it has just done itself, clipped so that none leads far, and N value functions.

    A_i      = generalized advantages of member i:  delta_t + gamma lambda A_i(t + 1),   delta = r + gamma (1 - terminated) V_i(s') - V_i(s)
    R_i      = A_i + V_i(s)
    A        = mean over members of A_i, standardised over the minibatch
    rho      = pi(a|s) / pi_old(a|s)
    L(pi)    = -E[ min(rho A, clip(rho, 1 - eps, 1 + eps) A) ] - c E[ -log pi(a|s) ],  the last over a fresh a ~ pi(.|s)
    L(V)     = E[ sum_i (V_i(s) - R_i)^2 ]                        (critic = "mse"; with a noise model see `rlkit2.agents.error_model`)

A truncated step bootstraps from its next observation, and its trace ends there as at a termination. Every `rollout_steps` transitions of a seed serve
`epochs` times, in minibatches in a random order, and are forgotten.

Source: Schulman, Wolski, Dhariwal, Radford, Klimov, "Proximal Policy Optimization Algorithms" (arXiv 1707.06347); advantages: Schulman, Moritz,
Levine, Jordan, Abbeel (ICLR 2016); several members with a noise model and the mean of their advantages: Kim et al. (arXiv 2408.02295). Differences
from the usual code: continuous actions are squashed into their bounds, so that the density is that of the action that was done (elsewhere actions
beyond the bounds are clipped, and their density is not); the entropy is that of a sample; policy and values share no layers; values are not clipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from rlkit2.agents.base import Agent, batch_means
from rlkit2.agents.error_model import ErrorModel, ErrorOptions
from rlkit2.data.batch import Batch
from rlkit2.errors import ConfigError
from rlkit2.fields import Bounds, Count, Fraction, NonNegative, Positive, Widths
from rlkit2.losses.aggregation import member_advantages
from rlkit2.nn import Adam, Critic
from rlkit2.nn.actors import Actor, SquashedGaussianActor
from rlkit2.nn.random import normal


@dataclass(frozen=True)
class PPOConfig(ErrorOptions):
    """PPO."""

    # N value functions
    num_critics: Count = 1
    # transitions of a seed, over all of its environments, between two rounds of learning
    rollout_steps: Count = 2048
    # how often they are learnt from
    epochs: Count = 10
    # eps: how far from 1 the ratio of new to old probabilities still counts
    clip: Positive = 0.2
    # lambda of the advantages
    trace: Fraction = 0.95
    # gamma
    discount: Fraction = 0.99
    # c, the weight of the entropy
    entropy_coefficient: NonNegative = 0.0
    # hidden layers of V and the policy
    hidden_sizes: Widths = (64, 64)
    # the policy's log standard deviation is clamped to these
    log_std_bounds: Bounds = (-5.0, 0.5)
    # Adam's step size for V
    critic_learning_rate: NonNegative = 1e-3
    # Adam's step size for the policy
    policy_learning_rate: NonNegative = 3e-4
    # longer gradients are made that long
    max_gradient_norm: Positive = 0.5


@dataclass(frozen=True, kw_only=True)
class RolloutBatch(Batch):
    """Transitions that the policy itself has made: `log_probs [S, B]` then, their `advantages [S, B]` and returns `[S, M, B]`."""

    log_probs: Tensor
    advantages: Tensor
    returns: Tensor


class PPO(Agent):
    """PPO for S seeds; arguments as for `Agent`; a batch is a `RolloutBatch`.

    Attributes:
        learns_from: what sets it apart from agents that learn from recorded transitions.
    """

    config_class = PPOConfig
    learns_from: ClassVar[str] = "rollouts"
    config: PPOConfig
    actor: Actor

    def _build(self) -> None:
        config, norm = self.config, self.config.max_gradient_norm
        if self.discrete:
            actor = self._make_actor("categorical", config.hidden_sizes)
        else:
            actor = self._make_actor("squashed_gaussian", config.hidden_sizes, log_std_bounds=config.log_std_bounds)
        self.actor = self._build_policy(actor, config.policy_learning_rate, max_norm=norm)
        self.errors = ErrorModel(config, len(self.seeds), self.dtype, self.device)
        self.critic = Critic(
            self.observation_size,
            1,  # V is a Q of one action
            config.hidden_sizes,
            members=config.num_critics,
            discrete=True,
            noise_outputs=self.errors.outputs,
            detach_noise=self.errors.detached,
            prior_scale=config.prior_scale,
            stream="value",
            **self._placement,
        )
        self.critic_optimizer = Adam(self.critic, config.critic_learning_rate, max_norm=norm)
        self._register({"critic": self.critic}, {"critic": self.critic_optimizer}, self.errors.buffers)
        if self.errors.own_location:
            raise ConfigError(
                "ppo fits its values and their noise together: with critic = 'ggd' and weights biv or biev set coupling = 'ggd'"
            )
        if config.bootstrap != "none":
            raise ConfigError("bootstrap = 'rows' counts the rows of recorded data; leave it at none")

    @classmethod
    def prepare_dataset(cls, config: PPOConfig, dataset: Any, load: Callable[[str], Any] | None = None) -> NoReturn:
        """Raise `ConfigError`: there is nothing to learn from recorded data."""
        raise ConfigError(
            "ppo learns from what it has just done itself: rlkit2 train ppo --env ENV --online STEPS (rlkit2.train_online)"
        )

    @classmethod
    def online_refusal(cls) -> None:
        """It learns nowhere else."""

    # What it makes of what it has done

    def values(self, observations: Tensor) -> Tensor:
        """V of every member at normalised observations `[S, B, obs]`, `[S, M, B]`."""
        found: Tensor = self.critic.every_action(observations)[..., 0]
        return found

    @torch.no_grad()
    def rollout(self, batch: Batch, num_envs: int) -> RolloutBatch:
        """The batch with what the updates need besides, by the policy and the values of now.

        Args:
            batch: raw transitions `[S, T E, ...]`: step after step, each of all E environments.
            num_envs: E.
        """
        seen = self.normalize(batch)
        values, following = self.values(seen.observations), self.values(seen.next_observations)
        advantages, returns = self.advantages(seen, values, following, batch.truncations, num_envs)
        log_probs = self.actor.log_prob(seen.observations, seen.actions)
        own = {field.name: getattr(batch, field.name) for field in fields(Batch)}
        return RolloutBatch(**own, log_probs=log_probs, advantages=advantages, returns=returns)

    def advantages(
        self, seen: Batch, values: Tensor, following: Tensor, truncations: Tensor, num_envs: int
    ) -> tuple[Tensor, Tensor]:
        """A, `[S, T E]`, and R_i, `[S, M, T E]`."""
        seeds, members, rows = values.shape
        gamma, truncated = self.config.discount, truncations.to(self.dtype) * (1.0 - seen.terminations)

        def by_time(tensor: Tensor) -> Tensor:
            """`[S, M or 1, T E]` as `[T, S M E]`."""
            full = tensor.expand(seeds, members, rows).reshape(seeds * members, rows // num_envs, num_envs)
            return full.transpose(0, 1).reshape(rows // num_envs, -1)

        ends = by_time(((seen.terminations + truncated) > 0.0).to(self.dtype).unsqueeze(1))
        cut = by_time(truncated.unsqueeze(1)) * by_time(following)  # what a truncated step is worth behind its end
        rewards = by_time(seen.rewards.unsqueeze(1)) + gamma * cut
        found = member_advantages(
            rewards, by_time(values).unsqueeze(1), by_time(following).unsqueeze(1), 1.0 - ends, gamma, self.config.trace
        )  # fmt: skip

        def back(tensor: Tensor) -> Tensor:
            return (
                tensor.view(rows // num_envs, seeds * members, num_envs).transpose(0, 1).reshape(seeds, members, rows)
            )

        advantages, returns = (back(tensor) for tensor in found)
        return advantages.mean(1), returns

    # The terms of the objective, on normalised batches

    def policy_loss(
        self, observations: Tensor, actions: Tensor, log_probs: Tensor, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L(pi), `[S]`, and metrics."""
        now = self.actor.log_prob(observations, actions)
        ratio = torch.exp(now - log_probs)
        spread, mean = torch.std_mean(advantages, 1, keepdim=True)
        scaled = (advantages - mean) / (spread + 1e-8)
        clipped = ratio.clamp(1.0 - self.config.clip, 1.0 + self.config.clip)
        gain = torch.minimum(ratio * scaled, clipped * scaled)
        entropy = self.entropy(observations)
        loss = -gain.mean(1) - self.config.entropy_coefficient * entropy.mean(1)
        watched = {
            "policy/clip_share": ((ratio - 1.0).abs() > self.config.clip).to(ratio.dtype),
            "policy/divergence": (ratio - 1.0)
            - (now - log_probs),  # KL of old and new, without its variance (Schulman)
            "policy/entropy": entropy,
        }
        return loss, batch_means({name: value.detach() for name, value in watched.items()})

    def entropy(self, observations: Tensor) -> Tensor:
        """Entropy of the policy, `[S, B]`: exact for a choice, that of a sample else."""
        if isinstance(self.actor, SquashedGaussianActor):
            shape = (*observations.shape[:-1], self.action_size)
            noise = normal(shape, self.seed_keys, self.step, stream="entropy", dtype=self.dtype)
            return -self.actor.sample(observations, noise)[1]
        log_probabilities = torch.log_softmax(self.actor.network(observations), -1)
        return -(log_probabilities.exp() * log_probabilities).sum(-1)

    def value_loss(self, observations: Tensor, returns: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """L(V), `[S]`, and metrics."""
        outputs = self.critic.every_output(observations)[:, :, :, 0]
        loss, metrics = self.errors.loss(outputs, returns, self.config.discount)
        return loss, {"value/loss": loss.detach(), "value/mean": outputs[..., 0].detach().mean((1, 2)), **metrics}

    # One update

    def update(self, batch: RolloutBatch) -> dict[str, Tensor]:  # type: ignore[override]
        """A step of the policy and one of the values on a minibatch of a rollout."""
        seen = self.normalize(batch)
        own = [tensor.to(self.dtype) for tensor in (batch.log_probs, batch.advantages, batch.returns)]
        loss, metrics = self.policy_loss(seen.observations, seen.actions, own[0], own[1])
        metrics |= {"policy/loss": loss.detach(), "policy/grad_norm": self.policy_optimizer.minimize(loss)}
        loss, of_values = self.value_loss(seen.observations, own[2])
        metrics |= of_values | {"value/grad_norm": self.critic_optimizer.minimize(loss)}
        self.step += 1
        return metrics

    # What it offers to others

    @torch.no_grad()
    def value(self, observations: Tensor) -> Tensor:
        """Mean over members of V at raw `observations [S, B, obs]`, as `[S, B]`, in units of the rewards."""
        return self.values(self.inputs(observations)).mean(1)
