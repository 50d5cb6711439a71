"""An agent as a user writes one: a single file, registered nowhere."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlkit2.agents.base import Agent, PolicyOptions
from rlkit2.data import Batch
from rlkit2.fields import NonNegative, Positive, Widths


@dataclass(frozen=True)
class OwnConfig(PolicyOptions):
    """Reward-weighted cloning."""

    # the smaller, the more the best rewards count
    temperature: Positive = 1.0
    # hidden layers of the policy
    hidden_sizes: Widths = (256, 256)
    # Adam's step size
    learning_rate: NonNegative = 3e-4


class Own(Agent):
    """Reward-weighted cloning for S seeds."""

    config_class = OwnConfig

    def _build(self) -> None:
        self.actor = self._build_policy(self._likelihood_actor(self.config.hidden_sizes), self.config.learning_rate)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step."""
        batch = self.normalize(batch)
        weight = (batch.rewards / self.config.temperature).softmax(1)
        loss = -(weight * self.actor.log_prob(batch.observations, batch.actions)).sum(1)
        gradient_norm = self.policy_optimizer.minimize(loss)
        self.step += 1
        return {"policy/loss": loss.detach(), "policy/grad_norm": gradient_norm}
