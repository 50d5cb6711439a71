"""Sparse Q-learning: implicit value regularisation by the chi-square divergence, which gives poor actions no weight at all.

As in implicit Q-learning (`rlkit2.agents.iql`) Q is never asked about an action outside the data. V is what the regularised problem says it is: the
multiplier at which the policy's weights on the data average to one, and actions far below it drop out of V and of the policy:

    A(s, a) = min_i Q_target_i(s, a) - V(s)
    L(V)  = E[ max(A / alpha + 1/2, 0)^2 + V(s) / alpha ]
    L(Q)  = E[ sum_i (r + gamma (1 - terminated) V(s') - Q_i(s, a))^2 ]
    L(pi) = -E[ min(max(A, 0), 100) log pi(a|s) ]

The smaller alpha, the nearer V is to the best action in the data; where alpha is large, every action counts in V.

Source: Xu, Jiang, Li, Yang, Wang, Chan, Zhan, "Offline RL with No OOD Actions: In-Sample Learning via Implicit Value Regularization" (ICLR 2023),
as its released code for the MuJoCo sets has it: its alpha is four times that of the paper's loss, E[ max(1 + A / (2 alpha'), 0)^2 + V / alpha' ], and
the policy's weight is the advantage where the paper has max(1 + A / (2 alpha'), 0). Differences from that code: A and V(s') are those before V's step
(theirs: after it); weights start as torch's linear layers do (theirs: orthogonal). Discrete actions as in `rlkit2.agents.iql`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlkit2.agents.iql import IQL, InSampleConfig
from rlkit2.fields import Positive


@dataclass(frozen=True)
class SQLConfig(InSampleConfig):
    """Sparse Q-learning."""

    # alpha, in units of return: the smaller, the nearer V to the best action in the data (medium-expert: 5)
    alpha: Positive = 2.0
    # layer norm in V
    value_layer_norm: bool = True
    # layer norm in Q
    critic_layer_norm: bool = True


class SQL(IQL):
    """Sparse Q-learning for S seeds; arguments as for `Agent`."""

    config_class = SQLConfig
    config: SQLConfig

    # The terms of the objective that are not those of implicit Q-learning

    def value_term(self, values: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of V at every row, and the derivative of L(V) with respect to each V(s), all shaped as `values`, `[S, B]` or `[S, M, B]`."""
        alpha, rows = self.config.alpha, values.shape[-1]
        kept = (advantage / alpha + 0.5).clamp(min=0.0)
        return kept.square() + values / alpha, (1.0 - 2.0 * kept) / (alpha * rows)

    def policy_weight(self, advantage: Tensor) -> Tensor:
        """min(max(A, 0), clamp), `[S, B]`."""
        return advantage.clamp(0.0, self.config.weight_clamp)

    def weight_shares(self, weight: Tensor) -> dict[str, Tensor]:
        """Flags `[S, B]` of rows at the clamp, and of those that the policy does not see."""
        return {**super().weight_shares(weight), "weight/zero_share": weight == 0.0}

    @classmethod
    def warnings(cls, config: Any, metrics: Mapping[str, float]) -> dict[str, str]:
        """Weights that nearly all vanish or saturate; signs of trouble in the noise model."""
        found = super(IQL, cls).warnings(config, metrics)
        if metrics.get("weight/zero_share", 0.0) > 0.99:
            found["no_weights"] = (
                "the policy clones less than a hundredth of the data; use a larger alpha or reward_scale"
            )
        if metrics.get("weight/clamp_share", 0.0) > 0.5:
            found["clamped_weights"] = (
                "more than half of the policy weights are at the clamp; use a smaller reward_scale"
            )
        return found
