"""Extreme Q-learning: V is the soft maximum of Q over the data's actions, found by Gumbel regression.

The maximum of many noisy values is Gumbel-distributed, and the likelihood of that distribution has the log-mean-exp of Q as its optimum: the value
of the policy that is regularised by its KL divergence from the data's. As in implicit Q-learning (`rlkit2.agents.iql`), no action outside the data is
asked about:

    A(s, a) = min_i Q_target_i(s, a) - V(s),   z = min(A / beta, c)
    L(V)  = E[ exp(z) - z - 1 ] exp(-m),   m = max(largest z of the batch, -1), a number
    L(Q)  = E[ sum_i h(r + gamma (1 - terminated) V(s') - Q_i(s, a)) ],   h = Huber's loss, half the square within delta
    L(pi) = -E[ min(exp(tau A), 100) log pi(a|s) ]

exp(-m) keeps the exponential within range; Adam hardly sees it. The smaller beta, the nearer V is to the best action in the data.

Source: Garg, Hejna, Geist, Ermon, "Extreme Q-Learning: MaxEnt RL without Entropy" (ICLR 2023), equation 8 and appendix C, with the settings of its
released code that are one for all MuJoCo sets (XQL-C): beta 2, c 7, delta 20, tau 3, layer norm in V. Differences from that code: A and V(s') are
those before V's step (theirs: after it); weights start as torch's linear layers do (theirs: orthogonal). Discrete actions as in `rlkit2.agents.iql`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlkit2.agents.base import batch_means
from rlkit2.agents.error_model import counted
from rlkit2.agents.iql import IQL, InSampleConfig
from rlkit2.data.batch import Batch
from rlkit2.fields import NonNegative, Positive


@dataclass(frozen=True)
class XQLConfig(InSampleConfig):
    """Extreme Q-learning."""

    # beta, in units of return: the smaller, the nearer V to the best action in the data (AntMaze: 0.6 to 0.8)
    temperature: Positive = 2.0
    # c: A / beta is cut off there; V does not follow what lies above
    exponent_clip: Positive = 7.0
    # tau: 0 clones the data, larger values follow the advantage (AntMaze: 10)
    inverse_temperature: NonNegative = 3.0
    # delta: TD errors above it count linearly (critic = "mse" only)
    huber_delta: Positive = 20.0
    # layer norm in V
    value_layer_norm: bool = True


class XQL(IQL):
    """Extreme Q-learning for S seeds; arguments as for `Agent`."""

    config_class = XQLConfig
    config: XQLConfig

    # The terms of the objective that are not those of implicit Q-learning

    def value_term(self, values: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of V at every row, and the derivative of L(V) with respect to each V(s), all shaped as `values`, `[S, B]` or `[S, M, B]`."""
        beta, clip = self.config.temperature, self.config.exponent_clip
        z = (advantage / beta).clamp(max=clip)
        shift = z.amax(-1, keepdim=True).clamp(min=-1.0)
        scaled, one = (z - shift).exp(), (-shift).exp()
        slope = (one - scaled).masked_fill(z == clip, 0.0)  # of z: nothing where it was cut off
        return scaled - (z + 1.0) * one, slope / (beta * z.shape[-1])

    def fit_critic(self, batch: Batch, targets: Tensor, target_variance: Tensor | None = None) -> dict[str, Tensor]:
        """One step of all members by Huber's loss, with metrics; with a noise model by its likelihood. Arguments as for `UncertainAgent`."""
        if self.errors.outputs:
            return super().fit_critic(batch, targets, target_variance)
        q, pullback = self.critic.vjp(batch.observations, batch.actions)
        error = q - (targets if targets.ndim == 3 else targets.unsqueeze(1))
        slope = error.clamp(-self.config.huber_delta, self.config.huber_delta)
        weights = self.row_weights(batch)
        losses = counted(slope * (error - 0.5 * slope), weights).sum(1)
        gradient = pullback(counted(slope, weights) / q.shape[-1])
        self.critic_optimizer.step(gradient)
        means = batch_means({"critic/loss": losses, "critic/q_mean": q[:, 0]})
        return {"critic/grad_norm": torch.linalg.vector_norm(gradient, dim=1), **means}
