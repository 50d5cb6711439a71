"""Decision transformer: cloning by a sequence model that is told which return its episode is to have.

Every step of an episode is three tokens, the return to go R_t = r_t + r_(t+1) + ... , the observation and the action; a causal transformer reads the
last K steps and puts out the action behind each observation:

    L = E[ 1/K sum_k |mu(R_1, s_1, a_1, ..., R_k, s_k) - a_k|^2 / act ]      (discrete actions: -log softmax(mu)_(a_k))

Nothing bootstraps. To act, R_1 is the return that is wanted, here the best of the data unless given, and what has been earned is taken off it.

Source: Chen, Lu, Rajeswaran, Lee, Grover, Laskin, Abbeel, Srinivas, Mordatch, "Decision Transformer: Reinforcement Learning via Sequence Modeling"
(NeurIPS 2021), with the settings of its MuJoCo experiments, as CORL has them (tanh of the actions, layer norms in front). Differences from that code:
returns are divided by their deviation over the data's steps (theirs: by 1000 and other numbers for each environment); the attention's maps start
as all others do (theirs: as torch's do); steps beyond `max_timestep` count as the last (theirs: fail).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from rlkit2.agents.base import Agent
from rlkit2.data.sequences import SequenceBatch, SequenceDataset
from rlkit2.fields import Checked, Count, Finite, Interval, Natural, NonNegative, Positive, Widths
from rlkit2.nn import Adam, Policy
from rlkit2.nn.actors import make_sequence_actor
from rlkit2.nn.random import uniform


@dataclass(frozen=True)
class DTConfig(Checked):
    """Decision transformer."""

    # K: steps that the policy sees
    context_length: Count = 20
    # return that episodes are to have, in the environment's rewards; none: the best one of the data
    target_return: Finite | None = None
    # width of every block of the transformer, all the same
    hidden_sizes: Widths = (128, 128, 128)
    # heads of the attention; they divide the width
    num_heads: Count = 1
    # share of embeddings, attention weights and outputs of the blocks that is set to zero in an update
    dropout: Annotated[float, Interval("[0, 1)")] = 0.1
    # steps of an episode that are told apart
    max_timestep: Count = 1000
    # AdamW's step size
    learning_rate: NonNegative = 1e-4
    # of AdamW
    weight_decay: NonNegative = 1e-4
    # updates over which the step size rises to what it is
    warmup_steps: Natural = 10_000
    # longer gradients are made that long
    max_gradient_norm: Positive = 0.25


class DT(Agent):
    """Decision transformer for S seeds; arguments as for `Agent`; a batch is a `SequenceBatch`.

    Attributes:
        learns_from: what sets it apart from agents that learn from transitions.
    """

    config_class = DTConfig
    learns_from: ClassVar[str] = "sequences"
    counts_rewards = True
    config: DTConfig

    def _build(self) -> None:
        config = self.config
        self.actor = make_sequence_actor(
            self.observation_size,
            self.action_size,
            config.hidden_sizes,
            context=config.context_length,
            heads=config.num_heads,
            timesteps=config.max_timestep,
            discrete=self.discrete,
            **self._placement,
        )
        if config.target_return is not None:
            self.actor.target_return.fill_(config.target_return)
        self.policy = Policy(self.actor, self.normalizer, self.seeds)
        self.policy_optimizer = Adam(
            self.actor.network,
            config.learning_rate,
            weight_decay=config.weight_decay,
            decoupled=True,
            warmup=config.warmup_steps,
            max_norm=config.max_gradient_norm,
        )
        self._register({"policy": self.actor}, {"policy": self.policy_optimizer})

    @classmethod
    def prepare_dataset(cls, config: DTConfig, dataset: Any, load: Callable[[str], Any] | None = None) -> Any:
        """Windows of `context_length` steps of the dataset."""
        return SequenceDataset(dataset, config.context_length)

    @classmethod
    def return_discount(cls, config: DTConfig) -> float:
        """Returns to go are not discounted; their deviation is what they are divided by."""
        return 1.0

    def _drop(self, values: Tensor, name: str) -> Tensor:
        """Dropout of `values [S, ...]`, by numbers of the seed, the step and the place."""
        share = self.config.dropout
        if share == 0.0:
            return values
        drawn = uniform(values.shape, self.seed_keys, self.step, stream=f"dropout.{name}", dtype=self.dtype)
        return values * (drawn >= share) / (1.0 - share)

    def outputs(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """What the network puts out at every step of a batch, `[S, B, K, act]`, and the actions it was to put out (discrete: int64 `[S, B, K]`)."""
        seeds, rows, length = batch.timesteps.shape
        observations = self.inputs(batch.observations.flatten(1, 2)).view(seeds, rows, length, -1)
        actions = self.normalize_actions(batch.actions.flatten(1, 2)).view(
            seeds, rows, length, *batch.actions.shape[3:]
        )
        entered = actions
        if self.discrete:
            columns = observations.new_zeros(*actions.shape, self.action_size)
            entered = columns.scatter(-1, actions.unsqueeze(-1), 1.0)
        returns = batch.returns_to_go.to(self.dtype)
        if self.normalizer.return_std is not None:
            returns = returns / self.normalizer.return_std.unsqueeze(-1)
        found: Tensor = self.actor.network(
            returns, observations, entered, batch.timesteps, batch.known, drop=self._drop
        )
        return found, actions

    def policy_loss(self, batch: SequenceBatch) -> Tensor:
        """L, `[S]`: steps that are not known count as zero in the mean."""
        outputs, actions = self.outputs(batch)
        if self.discrete:
            losses = F.cross_entropy(outputs.flatten(0, 2), actions.flatten(), reduction="none").view(actions.shape)
        else:
            losses = (outputs.tanh() - actions).square().mean(-1)
        return (losses * batch.known).mean((1, 2))

    def update(self, batch: SequenceBatch) -> dict[str, Tensor]:  # type: ignore[override]
        """One step of cloning."""
        loss = self.policy_loss(batch)
        gradient_norm = self.policy_optimizer.minimize(loss)
        if self.config.target_return is None:
            self.actor.target_return.copy_(batch.best_return.unsqueeze(-1))
        self.step += 1
        return {"policy/loss": loss.detach(), "policy/grad_norm": gradient_norm}
