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

from rlkit2.agents.base import Agent
from rlkit2.data.batch import Batch
from rlkit2.errors import ConfigError
from rlkit2.nn import Adam, Policy


@dataclass(frozen=True)
class BCConfig:
    """Behaviour cloning."""

    # "gaussian", "squashed_gaussian", "deterministic" or "categorical" (always used for discrete actions)
    policy_head: str = "gaussian"
    # widths of the policy's hidden layers
    hidden_sizes: tuple[int, ...] = (256, 256)
    # squash the Gaussian's mean into the action bounds
    tanh_mean: bool = True
    # initial log standard deviation of the Gaussian
    log_std_init: float = 0.0
    # the log standard deviation is clamped to these when used
    log_std_bounds: tuple[float, float] = (-5.0, 2.0)
    # Adam's step size
    learning_rate: float = 3e-4
    # L2 inside Adam
    weight_decay: float = 0.0
    # share of episodes to train on, best returns first; at least one episode
    fraction: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise ConfigError(f"fraction must lie in (0, 1], not {self.fraction}")


class BC(Agent):
    """Behaviour cloning for S seeds; arguments as for `Agent`."""

    config_class = BCConfig
    config: BCConfig

    def _build(self) -> None:
        config = self.config
        self.actor = self._likelihood_actor(config.hidden_sizes)
        self.policy = Policy(self.actor, self.normalizer, self.seeds)
        self.policy_optimizer = Adam(self.actor, config.learning_rate, weight_decay=config.weight_decay)
        self._register({"policy": self.actor}, {"policy": self.policy_optimizer})

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
