"""Behaviour cloning: maximise the likelihood of the dataset's actions.

    L(pi) = -E_(s,a)~D[ log pi(a|s) ]

With `fraction < 1` the policy sees the transitions of the best episodes alone (by undiscounted return), the filtered cloning that
Chen et al., "Decision Transformer" (NeurIPS 2021), call %BC. A deterministic policy minimises the squared error instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlkit2.agents.base import ACTION_KINDS, Agent, EncoderOptions, PolicyOptions
from rlkit2.data.batch import Batch
from rlkit2.fields import NonNegative, Rate, Widths


@dataclass(frozen=True)
class BCConfig(EncoderOptions, PolicyOptions):
    """Behaviour cloning."""

    # widths of the policy's hidden layers
    hidden_sizes: Widths = (256, 256)
    # Adam's step size
    learning_rate: NonNegative = 3e-4
    # L2 inside Adam
    weight_decay: NonNegative = 0.0
    # share of episodes to train on, best returns first; at least one episode
    fraction: Rate = 1.0


class BC(Agent):
    """Behaviour cloning for S seeds; arguments as for `Agent`."""

    config_class = BCConfig
    action_kinds = ACTION_KINDS
    sees_images = True
    config: BCConfig

    def _build(self) -> None:
        config = self.config
        actor = self._likelihood_actor(config.hidden_sizes)
        self.actor = self._build_policy(actor, config.learning_rate, weight_decay=config.weight_decay)

    @classmethod
    def prepare_dataset(cls, config: BCConfig, dataset: Any, load: Callable[[str], Any] | None = None) -> Any:
        """Keep the best `fraction` of the episodes by return."""
        if config.fraction == 1.0:
            return dataset
        returns = torch.as_tensor(dataset.episode_returns)
        best = returns.argsort(descending=True, stable=True)[: math.ceil(config.fraction * len(returns))]
        return dataset.select(best.sort().values)

    def policy_loss(self, batch: Batch) -> Tensor:
        """Negative log-likelihood of the batch's actions, `[S]` (normalised batch)."""
        return -self.actor.log_prob(batch.observations, batch.actions).mean(1)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step of maximum likelihood."""
        batch = self.normalize(batch)
        loss = self.policy_loss(batch)
        gradient_norm = self.policy_optimizer.minimize(loss)
        self.step += 1
        return {"policy/loss": loss.detach(), "policy/grad_norm": gradient_norm}
