"""Transitions as sampled distances read them: rows of whole episodes, and rewards evaluated on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rlkit2.data import Batch
from rlkit2.data.reward_calls import RewardCall
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import RewardError
from rlkit2.rewards.matrix import named_rewards

CHUNK = 4096


class Rows(Protocol):
    """N transitions of E whole episodes; a `TransitionDataset` is one."""

    @property
    def episode_starts(self) -> Tensor:
        """The row of each episode's first step, and N, `[E + 1]`."""

    def __len__(self) -> int: ...

    def gather(self, indices: Tensor) -> Batch:
        """The transitions at `indices [n]`."""


@dataclass(frozen=True)
class BatchRows:
    """A `Batch` without seed axis as `Rows`; episodes end where a flag is set."""

    batch: Batch
    episode_starts: Tensor

    @classmethod
    def of(cls, batches: Batch | Iterable[Batch]) -> BatchRows:
        """One batch, or several that follow one another, each ending an episode; raises `RewardError` where there is none."""
        parts = [batches] if isinstance(batches, Batch) else list(batches)
        if not parts or not all(isinstance(part, Batch) and part.rewards.numel() for part in parts):
            raise RewardError("no transitions to compare rewards on; give a TransitionDataset or batches with rows")
        flat = [part if part.rewards.ndim == 1 else _without_seed_axis(part) for part in parts]
        joined = Batch(**{f.name: torch.cat([getattr(part, f.name) for part in flat]) for f in fields(Batch)})
        ends = (joined.terminations.bool() | joined.truncations.bool()).clone()
        ends[torch.tensor([len(part.rewards) for part in flat]).cumsum(0) - 1] = True
        return cls(joined, torch.cat([torch.zeros(1, dtype=torch.int64), ends.nonzero().squeeze(1) + 1]))

    def __len__(self) -> int:
        return len(self.batch.rewards)

    def gather(self, indices: Tensor) -> Batch:
        return Batch(**{f.name: getattr(self.batch, f.name)[indices] for f in fields(Batch)})


def _without_seed_axis(batch: Batch) -> Batch:
    if batch.rewards.ndim != 2 or len(batch.rewards) != 1:
        raise RewardError(f"a batch of shape {list(batch.rewards.shape)} has several seeds; give batches of one")
    return Batch(**{f.name: getattr(batch, f.name)[0] for f in fields(Batch)})


def episode_rows(rows: Rows, episodes: Tensor) -> Tensor:
    """The row indices of the given episodes, in order, `[n]`."""
    starts = rows.episode_starts.cpu()
    first, lengths = starts[:-1][episodes], starts.diff()[episodes]
    offsets = torch.arange(int(lengths.sum())) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    return torch.repeat_interleave(first, lengths) + offsets


class RewardFunctions:
    """K named rewards evaluated on rows: arrays aligned with the rows, functions and modules of any signature (`RewardCall`), or `"recorded"`, the
    rewards of the data themselves. `infos` are what else came with each row, arrays `[N, ...]` by name.

    Raises `RewardError` naming the reward for arrays of another length, results of another shape and non-finite values.
    """

    def __init__(
        self,
        rewards: Mapping[str, Any] | Iterable[Any],
        rows: int,
        *,
        spec: DatasetSpec | None = None,
        infos: Mapping[str, Any] | None = None,
    ) -> None:
        self.names: list[str] = []
        self._evaluate: list[Callable[[Batch, Tensor], Tensor]] = []
        self._infos = {name: _aligned(f"infos[{name!r}]", values, rows) for name, values in (infos or {}).items()}
        for name, reward in named_rewards(rewards):
            if name in self.names:
                raise RewardError(f"two rewards are called {name!r}; give each its own name")
            self.names.append(name)
            self._evaluate.append(self._evaluator(name, reward, rows, spec))
        if not self.names:
            raise RewardError("there are no rewards to compare; give at least one")

    def __call__(self, batch: Batch, indices: Tensor) -> Tensor:
        """`[n, K]` float64."""
        columns = []
        for name, evaluate in zip(self.names, self._evaluate, strict=True):
            values = evaluate(batch, indices).detach().double().cpu()
            if not bool(torch.isfinite(values).all()):
                bad = int((~torch.isfinite(values)).nonzero()[0])
                raise RewardError(f"{name} is {float(values[bad])} at row {int(indices[bad])}; rewards must be finite")
            columns.append(values)
        return torch.stack(columns, 1)

    def evaluated(self, rows: Rows) -> RewardFunctions:
        """The same rewards as arrays."""
        parts = [self(rows.gather(chosen), chosen) for chosen in torch.split(torch.arange(len(rows)), CHUNK)]
        return RewardFunctions(dict(zip(self.names, torch.cat(parts).unbind(1), strict=True)), len(rows))

    def _evaluator(
        self, name: str, reward: Any, rows: int, spec: DatasetSpec | None
    ) -> Callable[[Batch, Tensor], Tensor]:
        if isinstance(reward, str):
            if reward != "recorded":
                raise RewardError(f"{name} is the text {reward!r}; 'recorded' stands for the rewards of the data")
            return lambda batch, _: batch.rewards
        if callable(reward):
            call = RewardCall(name, reward, spec)
            return lambda batch, indices: call(batch, {key: part[indices] for key, part in self._infos.items()})
        values = _aligned(name, reward, rows)
        if values.ndim != 1:
            raise RewardError(f"{name} has shape {list(values.shape)}; give one number per transition, [{rows}]")
        return lambda _, indices: values[indices.to(values.device)]


def _aligned(name: str, values: Any, rows: int) -> Tensor:
    tensor = torch.as_tensor(values if isinstance(values, Tensor) else np.asarray(values))
    if tensor.ndim == 0 or len(tensor) != rows:
        raise RewardError(
            f"{name} has shape {list(tensor.shape)}; the data has {rows} transitions, give one number each"
        )
    return tensor
