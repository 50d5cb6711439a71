"""Conservative Q-learning, which pushes down the values of actions outside the data; here for discrete actions.

    L(Q) = L_DQN(Q) + alpha E[ sum_i (log sum_a' exp Q_i(s, a') - Q_i(s, a)) ]

The second term is the negative log-likelihood of the data's action under softmax(Q_i). With a noise model (`rlkit2.agents.error_model`) it
concerns the values alone: the likelihood of the errors is taken at the data's actions, around a location that this term does not move.

Source: Kumar, Zhou, Tucker, Levine, "Conservative Q-Learning for Offline Reinforcement Learning" (NeurIPS 2020), the CQL(H) of its equation 4 on the
double DQN of `rlkit2.agents.dqn`; continuous actions have `rlkit2.agents.cql_continuous`. Differences from the authors' discrete agent: an ordinary
regression on scalar values instead of quantiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlkit2.agents.dqn import DQN, DQNConfig
from rlkit2.agents.error_model import counted
from rlkit2.data.batch import Batch
from rlkit2.fields import NonNegative
from rlkit2.nn.critics import taken


@dataclass(frozen=True)
class CQLConfig(DQNConfig):
    """Conservative Q-learning, for discrete actions."""

    # weight of the conservative term; 0 is DQN
    alpha: NonNegative = 1.0


class CQL(DQN):
    """Conservative Q-learning for S seeds; arguments as for `Agent`."""

    config_class = CQLConfig
    config: CQLConfig

    @property
    def moves_values(self) -> bool:
        """Down, outside the data."""
        return self.config.alpha > 0.0

    def conservative_term(self, every: Tensor, chosen: Tensor, row_weights: Tensor | None = None) -> Tensor:
        """E[ sum_i (log sum_a' exp Q_i(s, a') - Q_i(s, a)) ], `[S]`, for values `[S, M, B, n]`, those of the data and weights `[S, M, B]`."""
        gap: Tensor = torch.logsumexp(every, -1) - chosen
        return counted(gap, row_weights).mean(2).sum(1)

    def critic_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """L(Q), `[S]`, and metrics."""
        every = self.critic.every_output(batch.observations)
        outputs = taken(every, batch.actions)
        td_loss, metrics = self.td_loss(batch, outputs)
        conservative = self.conservative_term(every[..., 0], outputs[..., 0], self.row_weights(batch))
        return td_loss + self.config.alpha * conservative, {
            "critic/loss": td_loss.detach(),
            "critic/conservative": conservative.detach(),
            "critic/q_mean": outputs[..., 0].detach().mean((1, 2)),
            **metrics,
        }
