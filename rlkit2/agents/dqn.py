"""DQN on a fixed dataset: Q-learning with an ensemble of critics for discrete actions.

    y_i  = r + gamma (1 - terminated) max_a' Q_target_i(s', a')            (each member its own; with double_q at the online member's best action)
    L(Q) = E[ sum_i (Q_i(s, a) - y_i)^2 ]                                  (critic = "mse"; with a noise model see `rlkit2.agents.error_model`)
    pi(s) = argmax_a vote_i Q_i(s, a)

Nothing but `vote` and `target` holds it near the data: a baseline, or an agent for datasets that cover their actions; `rlkit2.agents.cql` adds
the term that makes it an offline algorithm. Targets may also be shared by all members and pessimistic: the minimum or mean - k std of
their next values.

Source: Mnih et al., "Human-level control through deep reinforcement learning" (Nature, 2015); double_q: van Hasselt, Guez, Silver (AAAI 2016).
Vote "shape" is the action choice of the released code of Kim et al. (arXiv 2408.02295). Differences: Polyak averaging of the target instead of
a copy every so many steps; plain squared error instead of its clipped gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlkit2.agents.base import EncoderOptions
from rlkit2.agents.error_model import ErrorOptions
from rlkit2.agents.uncertain_agent import UncertainAgent
from rlkit2.data.batch import Batch
from rlkit2.errors import ConfigError
from rlkit2.fields import Count, Finite, Fraction, NonNegative, Rate, Widths
from rlkit2.losses.aggregation import lower_bound
from rlkit2.nn import GreedyActor, Policy, lerp_
from rlkit2.nn.actors import Vote
from rlkit2.nn.critics import taken


@dataclass(frozen=True)
class DQNConfig(EncoderOptions, ErrorOptions):
    """DQN, for discrete actions."""

    # members of the ensemble; 1 is plain DQN, without epistemic uncertainty
    num_critics: Count = 5
    # next value: each member's own ("independent"), the members' "min", or mean - k std ("shared_lcb")
    target: Literal["independent", "min", "shared_lcb"] = "independent"
    # independent targets: the online member picks the next action, its target values it
    double_q: bool = True
    # acts on the members' "mean", on "lcb" (mean - k std), or by their noise shapes ("shape")
    vote: Vote = "mean"
    # k in mean - k std; none: as low as the minimum in expectation (1.16 for 5)
    lcb_coefficient: Finite | None = None
    # gamma
    discount: Fraction = 0.99
    # hidden layers of Q
    hidden_sizes: Widths = (256, 256)
    # Adam's step size
    critic_learning_rate: NonNegative = 3e-4
    # Polyak rate of the target Q
    target_update_rate: Rate = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vote == "shape" and self.critic != "ggd":
            raise ConfigError("vote = 'shape' needs the shapes of critic = 'ggd'")


class DQN(UncertainAgent):
    """DQN for S seeds; arguments as for `Agent`."""

    config_class = DQNConfig
    action_kinds = ("discrete",)
    sees_images = True
    config: DQNConfig

    def _build(self) -> None:
        config = self.config
        self._build_critics()
        self.actor = GreedyActor(self.critic, config.vote, self.lcb_coefficient, config.critic_form)
        self.policy = Policy(self.actor, self.normalizer, self.seeds)
        self._register({"policy": self.actor})

    # The terms of the objective, on normalised batches

    @torch.no_grad()
    def critic_targets(self, batch: Batch) -> Tensor:
        """y: `[S, M, B]` for independent members, else `[S, B]`."""
        next_values = self.critic_target.every_action(batch.next_observations)
        if self.config.target == "independent":
            chooser = self.critic.every_action(batch.next_observations) if self.config.double_q else next_values
            own = next_values.gather(-1, chooser.argmax(-1, keepdim=True)).squeeze(-1)
            return self.td_targets(batch, own)
        if self.config.target == "min":
            shared = next_values.amin(1)
        else:
            shared = lower_bound(next_values, self.lcb_coefficient)
        return self.td_targets(batch, shared.amax(-1))

    @torch.no_grad()
    def target_variance(self, batch: Batch) -> Tensor:
        """gamma^2 (1 - terminated) times the members' variance of the next value, `[S, B]`."""
        next_values = self.critic_target.every_action(batch.next_observations).amax(-1)
        return (self.discounts(batch) * (1.0 - batch.terminations)).square() * next_values.var(1)

    def critic_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """L(Q), `[S]`, and metrics."""
        outputs = taken(self.critic.every_output(batch.observations), batch.actions)
        loss, metrics = self.td_loss(batch, outputs)
        return loss, {"critic/loss": loss.detach(), "critic/q_mean": outputs[..., 0].detach().mean((1, 2)), **metrics}

    def td_loss(self, batch: Batch, outputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The regression of the outputs `[S, M, B, 1 + k]` at the actions taken on their targets."""
        spread = self.target_variance(batch) if self.config.sample_weighting == "iv" else None
        return self.error_loss(batch, outputs, self.critic_targets(batch), spread)

    # One update

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step of all critics and of their targets."""
        batch = self.normalize(batch)
        loss, metrics = self.critic_loss(batch)
        metrics["critic/grad_norm"] = self.critic_optimizer.minimize(loss)
        lerp_(self.critic_target, self.critic, self.config.target_update_rate)
        self.step += 1
        return metrics

    # What it offers to others

    @torch.no_grad()
    def q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """mean over critics of Q at raw observations `[S, B, obs]` and actions `[S, B]`, as `[S, B]`, in units of the batch's rewards."""
        return self.raw_q(self.critic, observations, actions).mean(1)

    @torch.no_grad()
    def value(self, observations: Tensor) -> Tensor:
        """The greedy action's score at raw `observations [S, B, obs]`, as `[S, B]`."""
        return self.actor.scores(self.inputs(observations)).amax(-1)
