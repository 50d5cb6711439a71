"""EDAC: SAC-N with critics kept diverse, so that few of them are pessimistic enough.

To the critics' loss of SAC-N comes the mean cosine between the members' action gradients,

    g_i = grad_a Q_i(s, a) / |grad_a Q_i(s, a)|,     L(Q) += eta / (N - 1) E[ sum_(i != j) <g_i, g_j> ]

which keeps the ensemble from agreeing outside the data. Its gradient is a second derivative of a ReLU network: one more forward pass beside
the ordinary backward pass, see `rlkit2.nn.ensembles.vjp_with_slopes`.

Source: An, Moon, Kim, Song, "Uncertainty-Based Offline Reinforcement Learning with Diversified Q-Ensemble" (NeurIPS 2021). Differences from the
authors' code: those of `rlkit2.agents.sacn`. With a noise model the diversity concerns the values alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlkit2.agents.sacn import SACN, SACNConfig
from rlkit2.data.batch import Batch
from rlkit2.errors import ConfigError
from rlkit2.fields import NonNegative
from rlkit2.nn.ensembles import vjp_with_slopes


@dataclass(frozen=True)
class EDACConfig(SACNConfig):
    """EDAC, for continuous actions."""

    # weight of the diversity term; 0 is SAC-N (published: 1 to 5 for MuJoCo locomotion)
    eta: NonNegative = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_critics < 2:
            raise ConfigError("edac needs num_critics of at least 2: diversity is between critics")
        if self.prior_scale > 0.0:
            raise ConfigError("edac keeps its critics apart by their diversity; leave prior_scale at 0")


class EDAC(SACN):
    """EDAC for S seeds; arguments and errors as for `SACN`."""

    config_class = EDACConfig
    config: EDACConfig

    @property
    def moves_values(self) -> bool:
        """To where their slopes differ."""
        return self.config.eta > 0.0

    def diversity(self, slopes: Tensor) -> Tensor:
        """1/(N - 1) E[ sum_(i != j) <g_i, g_j> ], `[S]`, for action gradients `[S, M, B, act]`."""
        unit = slopes / (torch.linalg.vector_norm(slopes, dim=-1, keepdim=True) + 1e-10)
        together = unit.sum(1).square().sum(-1) - unit.square().sum((1, 3))  # |sum g|^2 less the diagonal
        mean: Tensor = together.mean(1) / (slopes.shape[1] - 1)
        return mean

    def critic_step(self, batch: Batch) -> dict[str, Tensor]:
        """One step of all critics down their loss and the diversity term."""
        inputs = torch.cat([batch.observations, batch.actions], -1)
        values, slopes, pullback = vjp_with_slopes(self.critic.network, inputs)
        outputs = (values if self.critic.noise_outputs else values.unsqueeze(-1)).requires_grad_()
        slopes = slopes[..., self.observation_size :].requires_grad_()
        targets, spread = self.regression(batch)
        loss, metrics = self.error_loss(batch, outputs, targets, spread)
        diversity = self.diversity(slopes)
        on_outputs, on_slopes = torch.autograd.grad((loss + self.config.eta * diversity).sum(), (outputs, slopes))
        gradient = pullback(on_outputs.view_as(values), torch.nn.functional.pad(on_slopes, (self.observation_size, 0)))
        self.critic_optimizer.step(gradient)
        return {
            "critic/loss": loss.detach(),
            "critic/diversity": diversity.detach(),
            "critic/grad_norm": torch.linalg.vector_norm(gradient, dim=1),
            "critic/q_mean": outputs[..., 0].detach().mean((1, 2)),
            **metrics,
        }
