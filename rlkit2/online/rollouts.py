"""A group of seeds that learns from what it has just done itself, and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlkit2.data.batch import Batch
from rlkit2.data.environments import EnvSource
from rlkit2.data.spec import DatasetSpec
from rlkit2.online.collector import Collector
from rlkit2.online.exploration import Explorer
from rlkit2.online.group import OnlineGroup
from rlkit2.online.replay import Replay
from rlkit2.training.groups import MetricRows, subnormals_flushed
from rlkit2.training.options import OnlineOptions

if TYPE_CHECKING:
    from rlkit2.agents.ppo import PPO


class Orders:
    """Random orders of the rows of a rollout, each seed's from a generator of its own."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def next(self, rows: int) -> Tensor:
        """`[S, rows]`."""
        return torch.stack([torch.randperm(rows, generator=generator) for generator in self.generators])

    def state(self) -> Tensor:
        """The generators, `[S, bytes]`."""
        return torch.stack([generator.get_state() for generator in self.generators])

    def load_state(self, state: Tensor) -> None:
        """Continue from `state()`."""
        for generator, own in zip(self.generators, state, strict=True):
            generator.set_state(own.clone())  # torch reads a view of a larger tensor wrongly


class RolloutGroup(OnlineGroup):
    """Collects `rollout_steps` transitions of every seed with one policy, then learns from them for some epochs; a step is one transition.

    What is left at the end of a run, less than a rollout, is not learnt from.

    Args:
        agent, spec, source, run, options, batch_size, reward: as for `OnlineGroup`; a rollout must be a multiple of the environments.
    """

    agent: PPO

    def __init__(
        self,
        agent: PPO,
        *,
        spec: DatasetSpec,
        source: EnvSource,
        run: Path,
        options: OnlineOptions,
        batch_size: int,
        reward: Callable[[Tensor], Tensor],
        **others: Any,
    ) -> None:
        self.agent, self.options, self.step, self.note = agent, options, 0, None
        self.batch_size, self.rollout = batch_size, agent.config.rollout_steps
        self.replay = Replay(spec, agent.seeds, options.num_envs, self.rollout, run, reward=reward)
        self.explorer = Explorer(agent.acting_policy, agent.seeds, options, 0)
        self.collector = Collector(source, spec, agent.seeds, self.replay, self.explorer)
        self.orders = Orders(agent.seeds)
        self.indices = self.orders  # type: ignore[assignment]
        self.metrics = MetricRows(len(agent.seeds))

    def updates_before(self, step: int) -> int:
        """Updates that are done when `step` steps are."""
        return step // self.rollout * self.agent.config.epochs * math.ceil(self.rollout / self.batch_size)

    def advance(self, target: int, stop: Event | None = None) -> None:
        """Collect, and learn after every rollout, until `target` steps are done in all, or until `stop` is set."""
        with subnormals_flushed():
            while self.step < target and not (stop is not None and stop.is_set()):
                if self.step % self.options.num_envs == 0:
                    self.collector.collect(self.step)
                self.step += 1
                if self.step % self.rollout == 0:
                    self.learn()

    def learn(self) -> None:
        """All epochs on the last rollout."""
        rows = torch.arange(self.replay.oldest, self.replay.count).expand(len(self.agent.seeds), -1)
        done = self.replay.gather(rows)
        transitions = Batch(**{name: getattr(done, name) for name in Batch.__dataclass_fields__})
        batch = self.agent.rollout(transitions.to(self.agent.device), self.options.num_envs)
        seeds = torch.arange(len(rows), device=self.agent.device).unsqueeze(1)
        for _ in range(self.agent.config.epochs):
            order = self.orders.next(self.rollout).to(self.agent.device)
            for part in torch.split(order, self.batch_size, 1):
                self.metrics.add(self.agent.learn(_rows_of(batch, seeds, part)))

    @property
    def reward_bounds(self) -> dict[str, float]:
        """Nothing: the values are those of the policy."""
        return {}


def _rows_of(batch: Any, seeds: Tensor, rows: Tensor) -> Any:
    """The rows `[S, B]` of a batch; fields `[S, M, B]` keep their members."""
    fields = {}
    for name in type(batch).__dataclass_fields__:
        value = getattr(batch, name)
        if name == "returns":
            fields[name] = value.gather(2, rows.unsqueeze(1).expand(-1, value.shape[1], -1))
        else:
            fields[name] = value[seeds, rows]
    return type(batch)(**fields)
