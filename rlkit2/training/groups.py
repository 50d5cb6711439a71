"""Groups of seeds: how a run is laid out on the machine; in the results it shows in the last bit at most."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlkit2.agents.metrics import Derived, Metrics
from rlkit2.training.memory import keep_freed_memory
from rlkit2.training.updates import choose_update

if TYPE_CHECKING:
    from rlkit2.agents.base import Agent
    from rlkit2.data.dataset import TransitionDataset

MAX_GROUP = 4  # stacking more small networks gains nothing on a CPU
ROUND = 64  # updates between two meetings of the groups: how far they may be apart when a run is interrupted
BLOCK = 256  # minibatches whose rows are drawn at once; the rows do not depend on it


def seed_groups(seeds: Sequence[int], device: torch.device) -> list[tuple[int, ...]]:
    """Split seeds into groups that one agent each trains: all in one on a GPU, at most four a group on a CPU.

    On a CPU the number of groups is a multiple of the number of cores where the seeds allow it, so that all cores finish together.
    """
    if device.type != "cpu" or len(seeds) == 1:
        return [tuple(seeds)]
    cores = available_cores()
    count = min(len(seeds), -(-len(seeds) // (MAX_GROUP * cores)) * cores)
    return [tuple(int(seed) for seed in part) for part in np.array_split(np.asarray(seeds), count)]


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_intraop_thread(device: torch.device) -> Iterator[None]:
    """Let every Python thread compute with one thread of its own: groups share the cores, and sums do not depend on their number."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
        keep_freed_memory()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def subnormals_flushed() -> Iterator[None]:
    """Let this thread take numbers below 1e-38 for zero: weight decay drives the weights of dead units and Adam's averages there, where a processor
    takes many times as long for a product."""
    smallest = torch.tensor(1e-310, dtype=torch.float64)
    flushed = bool(smallest * 1.0 == 0.0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed)


class BatchIndices:
    """The rows of every seed's minibatches: one generator a seed, so a seed draws the same rows whoever trains beside it.

    Args:
        dataset: what is drawn from.
        seeds: each seeds its own generator.
        batch_size: rows a minibatch.
    """

    def __init__(self, dataset: TransitionDataset, seeds: Sequence[int], batch_size: int) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._block: Tensor | None = None  # [n, S, B]
        self._used = 0
        self._start = self._states()

    def next(self) -> Tensor:
        """Rows `[S, B]` of the next minibatch of every seed, on the dataset's device."""
        if self._block is None or self._used == len(self._block):
            self._start = self._states()
            self._block, self._used = self._draw(BLOCK).to(self.dataset.device), 0
        self._used += 1
        return self._block[self._used - 1]

    def state(self) -> Tensor:
        """Generator states `[S, bytes]` (uint8) from which the next minibatch would be drawn."""
        used = self._used if self._block is not None else 0
        end = self._states()
        self._restore(self._start)
        if used:
            self._draw(used)
        state = self._states()
        self._restore(end)
        return state

    def load_state(self, state: Tensor) -> None:
        """Continue from `state()`."""
        self._restore(state)
        self._start, self._block, self._used = state, None, 0

    def at(self, step: int) -> NDArray[np.int64]:
        """Rows `[S, B]` of update `step` (the first is 1), drawn again from the seeds; meant for fresh objects."""
        for _ in range((step - 1) // BLOCK):
            self._draw(BLOCK)
        rows: NDArray[np.int64] = self._draw((step - 1) % BLOCK + 1)[-1].numpy()
        return rows

    def _draw(self, count: int) -> Tensor:
        rows = self.dataset.sample_indices(count * self.batch_size, self.generators)
        return rows.view(len(self.generators), count, self.batch_size).transpose(0, 1).contiguous()

    def _states(self) -> Tensor:
        return torch.stack([generator.get_state() for generator in self.generators])

    def _restore(self, states: Tensor) -> None:
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state.clone())  # torch reads a view of a larger tensor wrongly


class MetricRows:
    """The metrics of every update since the last log line, kept on the device: one row a step, no transfer until asked for.

    Kept are those that an update has made; `derived` says what follows from them. `seeds`: S.
    """

    def __init__(self, seeds: int = 1) -> None:
        self.names: list[str] = []
        self.derived: Derived = {}
        self.length = 0
        self._rows = torch.empty(0, 0, seeds)
        self._absent = torch.empty(0)
        self._missing: list[tuple[int, str]] = []

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Keep one update's metrics, each `[S]`; a metric may be missing from some updates."""
        if isinstance(metrics, Metrics):
            self.derived = metrics.derived
            metrics = metrics.made
        if self.length == len(self._rows) or not metrics.keys() <= set(self.names):
            self._grow(metrics)
        if len(metrics) < len(self.names):
            self._missing += [(self.length, name) for name in self.names if name not in metrics]
        torch.stack([metrics.get(name, self._absent) for name in self.names], out=self._rows[self.length])
        self.length += 1

    def _grow(self, metrics: Mapping[str, Tensor]) -> None:
        names = [*self.names, *(name for name in metrics if name not in self.names)]
        values = torch.stack(list(metrics.values()))
        capacity = max(64, 2 * self.length)
        rows = torch.zeros((capacity, len(names), values.shape[1]), dtype=values.dtype, device=values.device)
        if self.names:
            rows[: self.length, : len(self.names)] = self._rows[: self.length]
            self._missing += [(row, name) for row in range(self.length) for name in names[len(self.names) :]]
        self.names, self._rows, self._absent = names, rows, torch.zeros_like(values[0])

    def take(self, *, clear: bool = True) -> tuple[list[str], Tensor, NDArray[np.bool_]]:
        """Names `[K]`, values `[n, K, S]` on the CPU in the one transfer of the interval, and which of them exist `[n, K]`."""
        values = self._rows[: self.length].cpu().clone()
        present = np.ones((self.length, len(self.names)), dtype=bool)
        for row, name in self._missing:
            present[row, self.names.index(name)] = False
        if clear:
            self.length, self._missing = 0, []
        return list(self.names), values, present

    def take_all(self) -> tuple[list[str], Tensor, NDArray[np.bool_]]:
        """`take()` with the derived metrics behind the others."""
        names, values, present = self.take()
        made = {name: values[:, k] for k, name in enumerate(names)}
        if not self.derived or not len(values):
            return names, values, present
        columns = [function(made).to(values.dtype) for function in self.derived.values()]
        everywhere = np.ones((len(values), len(columns)), dtype=bool)
        values = torch.cat([values, torch.stack(columns, 1)], 1)
        return [*names, *self.derived], values, np.concatenate([present, everywhere], 1)

    def restore(self, names: Sequence[str], values: Tensor, present: NDArray[np.bool_]) -> None:
        """Continue from `take(clear=False)`."""
        self.names, self.length, self._rows = list(names), len(values), values
        self._absent = torch.zeros_like(values[0, 0]) if len(values) else torch.empty(0)
        self._missing = [(int(row), self.names[column]) for row, column in np.argwhere(~present)]


class SeedGroup:
    """One agent with the seeds it trains, their batches and their metrics; runs in one thread.

    A step of a run is one update; a kind of training in which it is something else replaces `advance` and what says how the two go together.
    """

    unit = "updates"  # what a step is, in words

    def __init__(
        self, agent: Agent, dataset: TransitionDataset, batch_size: int, device: torch.device, compile: str
    ) -> None:
        self.agent = agent
        self.dataset = dataset
        self.step = 0
        self.indices = BatchIndices(dataset, agent.seeds, batch_size)
        self.metrics = MetricRows(len(agent.seeds))
        self.epoch = -(-len(dataset) // batch_size)  # updates
        self.labelling, self.labelled = agent.labels_data(agent.config), False
        if self.labelling:  # for the trial of the update
            agent.label(dataset, anew=False)
        self.update, self.note = choose_update(agent, dataset, batch_size, device, compile)

    def advance(self, target: int, stop: Event | None = None) -> None:
        """Update until `target` updates are done in all, or until `stop` is set."""
        with subnormals_flushed():
            while self.step < target and not (stop is not None and stop.is_set()):
                if self.labelling and (self.step % self.epoch == 0 or not self.labelled):
                    # also after a resume, where rounding is that of training (subnormals, library of the products)
                    self.agent.label(self.dataset, anew=self.step % self.epoch == 0)
                    self.labelled = True
                self.metrics.add(self.update(self.indices.next()))
                self.step += 1

    def updates_before(self, step: int) -> int:
        """Updates that are done when `step` steps are."""
        return step

    def step_of(self, row: int, rows: int) -> int:
        """The step of update `row` of the last `rows`."""
        return self.step - rows + row + 1

    def rows_at(self, seed: int, step: int) -> list[int]:
        """The rows of the minibatch of one seed in a step."""
        found: list[int] = BatchIndices(self.dataset, [seed], self.indices.batch_size).at(step)[0].tolist()
        return found

    @cached_property
    def reward_bounds(self) -> dict[str, float]:
        """The smallest and largest reward of what is trained on, as `Agent.warnings` takes them; nothing for data without rewards."""
        rewards = getattr(self.dataset, "rewards", None)
        if not isinstance(rewards, Tensor):
            return {}
        low, high = rewards.aminmax()
        return {"data/reward_min": low.item(), "data/reward_max": high.item()}

    def take_extra(self) -> list[dict[str, float]]:
        """For every seed what else than the means of an update's metrics belongs into this log line."""
        return [{} for _ in self.agent.seeds]

    # What a checkpoint keeps besides the agent

    def state(self) -> dict[str, Tensor]:
        """All that the next steps depend on, each with the seed axis in front."""
        return {"generators": self.indices.state()}

    @property
    def facts(self) -> dict[int, Any]:
        """What else a checkpoint keeps of some seeds, as JSON."""
        return {}

    def load_state(self, state: Mapping[str, Tensor], facts: Mapping[int, Any]) -> None:
        """Continue from `state()` and `facts`, at the step that this group has by now."""
        self.indices.load_state(state["generators"])

    def sync(self) -> None:
        """Wait until files of its own hold what the next checkpoint refers to."""

    def close(self) -> None:
        """Let go of what it holds open."""


def advance_groups(groups: Sequence[SeedGroup], target: int, stop: Event) -> None:
    """Advance all groups to `target`, in one thread a core; once `stop` is set, to the same step somewhere before it."""
    if len(groups) == 1:
        groups[0].advance(target, stop)
        return

    def work(group: SeedGroup, until: int) -> None:
        torch.set_num_threads(1)  # OpenMP keeps this number per thread
        try:
            group.advance(until, stop)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(min(len(groups), available_cores()), thread_name_prefix="rlkit2") as pool:
        while groups[0].step < target and not stop.is_set():
            until = min(target, groups[0].step + ROUND)
            for future in [pool.submit(work, group, until) for group in groups]:
                future.result()
    furthest = max(group.step for group in groups)
    for group in groups:
        group.advance(furthest)
