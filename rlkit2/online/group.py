"""A group of seeds that acts in its environments between its updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlkit2.data.dataset import Lookahead, TransitionDataset
from rlkit2.data.environments import EnvSource
from rlkit2.data.spec import DatasetSpec
from rlkit2.online.collector import ENDED, HIGHEST, LENGTHS, LOWEST, RETURNS, Collector
from rlkit2.online.exploration import Explorer
from rlkit2.online.mixing import MixedIndices, Mixture
from rlkit2.online.replay import SINGLE_STEPS, Replay
from rlkit2.training.groups import MetricRows, SeedGroup, subnormals_flushed
from rlkit2.training.options import OnlineOptions
from rlkit2.training.updates import choose_update

if TYPE_CHECKING:
    from rlkit2.agents.base import Agent


class OnlineGroup(SeedGroup):
    """Collects, and learns from offline data and what was collected; a step is one transition of every seed.

    With E environments all of them are stepped before the first of every E steps, and the updates of those steps follow.

    Args:
        agent: in its present state.
        offline: what a share of every minibatch comes from, as the agent shall see it; None: nothing.
        spec: of the environment.
        source: what an environment is made from.
        run: folder of the run.
        options: settled.
        batch_size, steps: of the training.
        scratch: no trained policy: the steps before the first update are random.
        lookahead, reward: see `Replay`.
    """

    unit = "steps"

    def __init__(
        self,
        agent: Agent,
        *,
        offline: TransitionDataset | None,
        spec: DatasetSpec,
        source: EnvSource,
        run: Path,
        options: OnlineOptions,
        batch_size: int,
        steps: int,
        scratch: bool,
        device: torch.device,
        compile: str,
        lookahead: Lookahead = SINGLE_STEPS,
        reward: Callable[[Tensor], Tensor] = lambda reward: reward,
    ) -> None:
        self.agent, self.options = agent, options
        self.step = 0
        envs = options.num_envs
        capacity = envs * max(1, math.ceil(min(options.capacity, steps) / envs))
        self.replay = Replay(spec, agent.seeds, envs, capacity, run, lookahead, reward)
        random_steps = options.warmup or 0 if scratch else 0
        self.explorer = Explorer(agent.acting_policy, agent.seeds, options, random_steps)
        self.collector = Collector(source, spec, agent.seeds, self.replay, self.explorer)
        self.mixture = Mixture(offline, self.replay, batch_size, options.offline_share)
        self.indices = MixedIndices(self.mixture, agent.seeds, batch_size)  # type: ignore[arg-type]
        self.metrics = MetricRows(len(agent.seeds))
        # a graph on a GPU reads rows that lie there, and the replay does not
        how = compile if device.type == "cpu" else "off"
        self.update, self.note = choose_update(agent, self.mixture, batch_size, device, how)  # type: ignore[arg-type]

    def updates_before(self, step: int) -> int:
        """Updates that are done when `step` steps are."""
        return math.floor(max(0, step - (self.options.warmup or 0)) * self.options.update_ratio)

    def advance(self, target: int, stop: Event | None = None) -> None:
        """Collect and update until `target` steps are done in all, or until `stop` is set."""
        with subnormals_flushed():
            while self.step < target and not (stop is not None and stop.is_set()):
                if self.step % self.options.num_envs == 0:
                    self.collector.collect(self.step)
                for _ in range(self.updates_before(self.step + 1) - self.updates_before(self.step)):
                    self.metrics.add(self.update(self.indices.next()))
                self.step += 1

    def step_of(self, row: int, rows: int) -> int:
        """The step of update `row` of the last `rows`."""
        number = self.updates_before(self.step) - rows + row
        return next(step for step in range(1, self.step + 1) if self.updates_before(step) > number)

    def rows_at(self, seed: int, step: int) -> list[int]:
        """Nothing: what the replay held then is not drawn again."""
        return []

    @property
    def reward_bounds(self) -> dict[str, float]:
        """The smallest and largest reward of the offline data and of what was collected."""
        known = [self.collector.tally[:, LOWEST].min(), self.collector.tally[:, HIGHEST].max()]
        bounds = self.replay.reward(torch.tensor(known)).tolist()
        if self.mixture.offline is not None and self.mixture.offline_rows:
            bounds += [end.item() for end in self.mixture.offline.rewards.aminmax()]
        return {"data/reward_min": min(bounds), "data/reward_max": max(bounds)}

    def take_extra(self) -> list[dict[str, float]]:
        """Of the episodes that ended since the last log line how many there were, and their mean return and length."""
        found = []
        for tally in self.collector.tally:
            count, returns, lengths = (float(tally[column]) for column in (ENDED, RETURNS, LENGTHS))
            means = {"online/return": returns / count, "online/length": lengths / count} if count else {}
            found.append({**means, "online/episodes": count})
        self.collector.tally[:, [ENDED, RETURNS, LENGTHS]] = 0.0
        return found

    # What a checkpoint keeps besides the agent

    def state(self) -> dict[str, Tensor]:
        """Generators, episodes in progress, and what the files of the replay hold."""
        return {**super().state(), **self.explorer.state(), **self.collector.state(), **self.replay.state()}

    @property
    def facts(self) -> dict[int, Any]:
        """The rows behind which an episode of a seed was given up, where there are any."""
        return {seed: sorted(cuts) for seed, cuts in zip(self.agent.seeds, self.replay.cuts, strict=True) if cuts}

    def load_state(self, state: Mapping[str, Tensor], facts: Mapping[int, Any]) -> None:
        """Continue from `state()`; an environment that does not come back begins a new episode, and that is said.

        Raises:
            RunError: the replay's files are damaged.
        """
        super().load_state(state, facts)
        self.explorer.load_state(state)
        envs = self.options.num_envs
        self.replay.load_state(math.ceil(self.step / envs) * envs, state)
        self.replay.cuts = [set(facts.get(seed, ())) for seed in self.agent.seeds]
        with subnormals_flushed():  # as when it was collected
            lost = self.collector.load_state(state)
        if lost:
            self.note = (
                f"environment {self.collector.name} does not come back to where it was when it is given the same seed and actions again: the "
                "episodes in progress were dropped, and the run ends otherwise than one that was never stopped"
            )

    def sync(self) -> None:
        """Write what was collected, and wait until it is on the disk."""
        self.replay.sync()

    def close(self) -> None:
        """Close files and environments."""
        self.replay.close()
        self.collector.close()
