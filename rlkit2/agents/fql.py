"""Flow Q-learning: a flow learns to clone the data, and a policy of one step is distilled from it while it climbs Q.

The flow v turns noise into the data's actions along straight lines; following it takes many steps, through which no gradient of Q has to pass: the
policy mu learns to do in one step what the flow does in K, and to do better.

    y     = r + gamma (1 - terminated) mean_i Q_target_i(s', mu(s', z')),   z' ~ N(0, 1)
    L(Q)  = E[ sum_i (Q_i(s, a) - y)^2 ]
    L(v)  = E[ |v(s, x_t, t) - (a - x_0)|^2 ] / act,   x_t = (1 - t) x_0 + t a,   x_0 ~ N(0, 1), t ~ U(0, 1)
    L(mu) = alpha E[ |mu(s, z) - x(s, z)|^2 ] / act - E[ mean_i Q_i(s, mu(s, z)) ],   x(s, z): z after K Euler steps of size 1/K along v

Actions are cut off at -1 and 1 but for those of mu in the distance to x. With `normalize_q` the last term of L(mu) is divided by the mean size of Q.

Source: Park, Li, Levine, "Flow Q-Learning" (ICML 2025), algorithm 1, with the defaults of the authors' code; all steps are at the values before them,
as there. Differences from that code: ReLU behind layer norms (theirs: GELU before them), layers start as torch's do (theirs: uniform by fan
average); L(Q) is summed over critics (theirs: their mean), which Adam does not see. A deterministic policy takes z = 0 (theirs always draws it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlkit2.agents.error_model import ErrorOptions
from rlkit2.agents.uncertain_agent import UncertainAgent
from rlkit2.data.batch import Batch
from rlkit2.fields import Count, Fraction, NonNegative, Rate, Widths
from rlkit2.nn import Adam, lerp_
from rlkit2.nn.actors import OneStepActor
from rlkit2.nn.mlp import StackedMLP
from rlkit2.nn.random import normal, uniform


@dataclass(frozen=True)
class FQLConfig(ErrorOptions):
    """Flow Q-learning, for continuous actions."""

    # weight of the distance to the flow's action; its authors tune it for every task
    alpha: NonNegative = 10.0
    # divide Q in the policy's loss by the mean of its size over the batch, so that alpha does not depend on the rewards
    normalize_q: bool = False
    # K: Euler steps from noise to an action of the flow
    flow_steps: Count = 10
    # gamma
    discount: Fraction = 0.99
    # estimates of Q
    num_critics: Count = 2
    # next value: the critics' "mean", their "min", or each critic's own ("independent")
    target: Literal["mean", "min", "independent"] = "mean"
    # hidden layers of Q, the flow and the policy
    hidden_sizes: Widths = (512, 512, 512, 512)
    # layer norm in Q
    critic_layer_norm: bool = True
    # layer norm in the flow and the policy
    policy_layer_norm: bool = False
    # Adam's step size for Q
    critic_learning_rate: NonNegative = 3e-4
    # Adam's step size for the policy
    policy_learning_rate: NonNegative = 3e-4
    # Adam's step size for the flow
    flow_learning_rate: NonNegative = 3e-4
    # Polyak rate of the target Q
    target_update_rate: Rate = 0.005


class FQL(UncertainAgent):
    """Flow Q-learning for S seeds; arguments as for `Agent`."""

    config_class = FQLConfig
    action_kinds = ("continuous",)
    config: FQLConfig

    def _build(self) -> None:
        config = self.config
        self._build_critics(layer_norm=config.critic_layer_norm)
        actor = self._make_actor(OneStepActor.head, config.hidden_sizes, layer_norm=config.policy_layer_norm)
        assert isinstance(actor, OneStepActor)
        self.actor = self._build_policy(actor, config.policy_learning_rate)
        self.flow = StackedMLP(
            self.observation_size + self.action_size + 1,
            config.hidden_sizes,
            self.action_size,
            layer_norm=config.policy_layer_norm,
            stream="flow",
            **self._placement,
        )
        self.flow_optimizer = Adam(self.flow, config.flow_learning_rate)
        self._register({"flow": self.flow}, {"flow": self.flow_optimizer})

    # The terms of the objective, on normalised batches

    def _noise(self, batch: Batch, stream: str) -> Tensor:
        """Standard normal numbers, `[S, B, act]`."""
        return normal(batch.actions.shape, self.seed_keys, self.step, stream=stream, dtype=self.dtype)

    @torch.no_grad()
    def critic_targets(self, batch: Batch) -> Tensor:
        """y: `[S, B]`; each critic's own, `[S, M, B]`, where independent."""
        next_actions = self.actor(batch.next_observations, self._noise(batch, "next_noise"))
        next_value = self.critic_target(batch.next_observations, next_actions)
        if self.config.target != "independent":
            next_value = next_value.mean(1) if self.config.target == "mean" else next_value.amin(1)
        return self.td_targets(batch, next_value)

    def velocity(self, observations: Tensor, points: Tensor, times: Tensor) -> Tensor:
        """v(s, x, t), `[S, B, act]`, for points `[S, B, act]` and times `[S, B, 1]`."""
        found: Tensor = self.flow(torch.cat([observations, points, times], -1))
        return found

    def flow_loss(self, batch: Batch) -> Tensor:
        """L(v), `[S]`."""
        start = self._noise(batch, "flow_start")
        shape = (*batch.actions.shape[:-1], 1)
        times = uniform(shape, self.seed_keys, self.step, stream="flow_time", dtype=self.dtype)
        velocity = self.velocity(batch.observations, torch.lerp(start, batch.actions, times), times)
        return (velocity - (batch.actions - start)).square().mean((1, 2))

    @torch.no_grad()
    def flow_actions(self, observations: Tensor, noise: Tensor) -> Tensor:
        """x(s, z), `[S, B, act]`: where the flow takes the noise."""
        steps, points = self.config.flow_steps, noise
        for k in range(steps):
            times = torch.full_like(points[..., :1], k / steps)
            points = points + self.velocity(observations, points, times) / steps
        return points.clamp(-1.0, 1.0)

    def policy_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """L(mu), `[S]`, with metrics of both terms."""
        noise = self._noise(batch, "policy_noise")
        wanted = self.flow_actions(batch.observations, noise)
        actions = self.actor.raw(batch.observations, noise)
        error = (actions - wanted).square().mean((1, 2))
        outputs = self.critic.outputs(batch.observations, actions.clamp(-1.0, 1.0), frozen=True)
        values = outputs[..., 0].mean(1)
        size = values.detach().abs().mean(1)
        weight = size.reciprocal() if self.config.normalize_q else torch.ones_like(size)
        loss = self.config.alpha * error - weight * values.mean(1)
        return loss, {
            "policy/distillation_error": error.detach(),
            "policy/value": values.detach().mean(1),
            "policy/lambda": weight,
        }

    # One update

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Steps of the policy, the flow and the critics, all at the values before them; then of the targets."""
        batch = self.normalize(batch)
        targets = self.critic_targets(batch)
        policy_loss, policy_metrics = self.policy_loss(batch)
        policy_gradient_norm = self.policy_optimizer.minimize(policy_loss)
        flow_loss = self.flow_loss(batch)
        flow_gradient_norm = self.flow_optimizer.minimize(flow_loss)
        metrics = self.fit_critic(batch, targets)
        lerp_(self.critic_target, self.critic, self.config.target_update_rate)
        self.step += 1
        return {
            "flow/loss": flow_loss.detach(),
            "flow/grad_norm": flow_gradient_norm,
            "policy/loss": policy_loss.detach(),
            "policy/grad_norm": policy_gradient_norm,
            **policy_metrics,
            **metrics,
        }
