"""Implicit Q-learning: the best action in the data, found without ever asking Q about an action outside it.

V is an expectile of Q over the dataset's actions, Q regresses on V, and the policy clones the data weighted by the exponentiated advantage:

    A(s, a) = min_i Q_target_i(s, a) - V(s)
    L(V)  = E[ |tau - 1(A < 0)| A^2 ]
    L(Q)  = E[ sum_i (r + gamma (1 - terminated) V(s') - Q_i(s, a))^2 ]
    L(pi) = -E[ min(exp(beta A), 100) log pi(a|s) ]

Source: Kostrikov, Nair, Levine, "Offline Reinforcement Learning with Implicit Q-Learning" (ICLR 2022), with the hyper-parameters of its
MuJoCo experiments. Differences from the authors' code: A and V(s') are those before V's step (theirs: after it), which saves a second evaluation
of V; weights start as torch's linear layers do (theirs: orthogonal); no dropout in the policy. Discrete actions have one output of Q per action and
a categorical policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rlkit2.agents.base import ACTION_KINDS, EncoderOptions, PolicyOptions, batch_means
from rlkit2.agents.error_model import ErrorOptions, counted
from rlkit2.agents.uncertain_agent import UncertainAgent
from rlkit2.data.batch import Batch
from rlkit2.fields import Count, Fraction, Inside, NonNegative, Positive, Rate, Widths
from rlkit2.losses.td import expectile_slope
from rlkit2.nn import lerp_, vjp
from rlkit2.nn.optim import Schedule


@dataclass(frozen=True)
class InSampleConfig(EncoderOptions, PolicyOptions, ErrorOptions):
    """What implicit Q-learning shares with its relatives (`sql`, `xql`): V, Q and a policy that never ask for an action outside the data."""

    # upper bound of the policy weight
    weight_clamp: Positive = 100.0
    # gamma
    discount: Fraction = 0.99
    # estimates of Q; their minimum is the target of V
    num_critics: Count = 2
    # "shared": one V under the minimum of the critics; "independent": a V for each, so that no critic learns from another's error
    target: Literal["shared", "independent"] = "shared"
    # hidden layers of Q, V and the policy
    hidden_sizes: Widths = (256, 256)
    # layer norm in V
    value_layer_norm: bool = False
    # layer norm in Q
    critic_layer_norm: bool = False
    # Adam's step size for Q
    critic_learning_rate: NonNegative = 3e-4
    # Adam's step size for V
    value_learning_rate: NonNegative = 3e-4
    # Adam's step size for the policy, at the start
    policy_learning_rate: NonNegative = 3e-4
    # updates over which that step size falls to zero along half a cosine; run: those of the run; none: constant
    policy_cosine_steps: Count | Literal["run"] | None = "run"
    # Polyak rate of the target Q
    target_update_rate: Rate = 0.005


@dataclass(frozen=True)
class IQLConfig(InSampleConfig):
    """Implicit Q-learning."""

    # tau in (0, 1): 0.5 evaluates the data's policy, towards 1 the best action in the data (AntMaze: 0.9)
    expectile: Inside = 0.7
    # beta: 0 clones the data, larger values follow the advantage (AntMaze: 10)
    inverse_temperature: NonNegative = 3.0


class IQL(UncertainAgent):
    """Implicit Q-learning for S seeds; arguments as for `Agent`."""

    config_class: ClassVar[type] = IQLConfig
    action_kinds = ACTION_KINDS
    sees_images = True
    config: Any  # IQLConfig, or a relative's own

    def _build(self) -> None:
        config = self.config
        members = config.num_critics if config.target == "independent" else None
        rate, layer_norm = config.value_learning_rate, config.value_layer_norm
        self._build_value(config.hidden_sizes, rate, members=members, layer_norm=layer_norm)
        self._build_critics(layer_norm=config.critic_layer_norm)
        actor = self._likelihood_actor(config.hidden_sizes)
        steps = None if config.policy_cosine_steps == "run" else config.policy_cosine_steps
        self.actor = self._build_policy(actor, config.policy_learning_rate, cosine_steps=steps)

    def follow_schedule(
        self, schedule: Schedule, steps: int, curves: Mapping[str, Sequence[float]] | None = None
    ) -> None:
        """The policy's step size falls along half a cosine of its own where the run has no schedule for all."""
        super().follow_schedule(schedule, steps, curves)
        if schedule == "constant" and self.depends_on_steps(self.config):
            self.policy_optimizer.follow("cosine", steps, self.step)

    @classmethod
    def depends_on_steps(cls, config: IQLConfig) -> bool:
        """Where the cosine is that of the run."""
        return config.policy_cosine_steps == "run"

    # The terms of the objective, on normalised batches

    @torch.no_grad()
    def value_target(self, batch: Batch) -> Tensor:
        """min over target critics of Q(s, a), `[S, B]`; each critic's own, `[S, M, B]`, where independent."""
        values: Tensor = self.critic_target(batch.observations, batch.actions)
        return values if self.config.target == "independent" else values.amin(1)

    def value_term(self, values: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of V at every row, and the derivative of L(V) with respect to each V(s), all shaped as `values`, `[S, B]` or `[S, M, B]`."""
        slope = expectile_slope(advantage, self.config.expectile)
        return slope * advantage, slope * (-2.0 / advantage.shape[-1])

    @torch.no_grad()
    def critic_targets(self, batch: Batch) -> Tensor:
        """r + gamma (1 - terminated) V(s'), `[S, B]`; each critic's own, `[S, M, B]`, where independent."""
        return self.td_targets(batch, self.value_network(batch.next_observations))

    def policy_weight(self, advantage: Tensor) -> Tensor:
        """min(exp(beta A), clamp), `[S, B]`."""
        weight: Tensor = (self.config.inverse_temperature * advantage).exp()
        return weight.clamp(max=self.config.weight_clamp)

    def weight_shares(self, weight: Tensor) -> dict[str, Tensor]:
        """Flags `[S, B]` of rows whose share is worth watching."""
        return {"weight/clamp_share": weight == self.config.weight_clamp}

    def policy_loss(self, batch: Batch, weight: Tensor) -> Tensor:
        """L(pi), `[S]`."""
        log_prob = self.actor.log_prob(batch.observations, batch.actions)
        loss: Tensor = torch.linalg.vecdot(weight, log_prob) / -weight.shape[1]
        return loss

    # One update

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Steps of V, Q and the policy, all at the values before them; then the target of Q."""
        batch = self.normalize(batch)
        targets = self.critic_targets(batch)
        values, pullback = vjp(self.value_network, batch.observations)
        advantage = self.value_target(batch) - values
        value_loss, cotangent = self.value_term(values, advantage)
        if (
            self.config.target == "independent"
        ):  # V learns from the rows as its critic counts them; the policy follows the members' mean
            cotangent = counted(cotangent, self.row_weights(batch))
            value_loss, values, advantage = value_loss.mean(1), values.mean(1), advantage.mean(1)
        value_gradient = pullback(cotangent)
        self.value_optimizer.step(value_gradient)

        critic_metrics = self.fit_critic(batch, targets)

        weight = self.policy_weight(advantage)
        policy_loss = self.policy_loss(batch, weight)
        policy_gradient_norm = self.policy_optimizer.minimize(policy_loss)

        lerp_(self.critic_target, self.critic, self.config.target_update_rate)
        self.step += 1
        return {
            "value/grad_norm": torch.linalg.vector_norm(value_gradient, dim=1),
            "policy/grad_norm": policy_gradient_norm,
            "policy/loss": policy_loss.detach(),
            **critic_metrics,
            **batch_means(
                {
                    "value/loss": value_loss,
                    "value/mean": values,
                    "advantage/mean": advantage,
                    "weight/mean": weight,
                    **self.weight_shares(weight),
                }
            ),
        }

    # What it offers to others

    @torch.no_grad()
    def value(self, observations: Tensor) -> Tensor:
        """V at raw `observations [S, B, obs]` (independent: the members' mean), as `[S, B]`, in units of the batch's rewards."""
        values = self.raw_value(observations)
        return values.mean(1) if values.ndim == 3 else values

    @classmethod
    def warnings(cls, config: IQLConfig, metrics: Mapping[str, float]) -> dict[str, str]:
        """Saturated policy weights: beyond the clamp all good actions look alike; signs of trouble in the noise model."""
        found = super().warnings(config, metrics)
        if metrics.get("weight/clamp_share", 0.0) > 0.5:
            found["clamped_weights"] = (
                "more than half of the policy weights are at the clamp; use a smaller inverse_temperature or reward_scale"
            )
        return found
