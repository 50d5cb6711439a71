"""Minibatches of which a fixed share comes from the offline data and the rest from what was collected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from rlkit2.data.batch import Batch, LookaheadBatch, RowBatch
from rlkit2.data.dataset import TransitionDataset
from rlkit2.online.replay import Replay
from rlkit2.training.groups import BatchIndices


class Mixture:
    """Takes the first columns of a minibatch from the offline data and the others from the replay, each uniformly.

    Half of each (symmetric sampling) is what Ball, Smith, Kostrikov and Levine, "Efficient Online Reinforcement Learning with Offline Data" (ICML
    2023), found to serve many tasks without being tuned.

    Args:
        offline: None where there are no offline data.
        replay: what is collected.
        batch_size, share: of a minibatch, and how much of it is offline (rounded to whole rows).
    """

    def __init__(self, offline: TransitionDataset | None, replay: Replay, batch_size: int, share: float) -> None:
        self.offline, self.replay = offline, replay
        self.offline_rows = 0 if offline is None else round(share * batch_size)
        self.batch_size = batch_size
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return min(self.replay.capacity, self.replay.capacity if self.offline is None else len(self.offline))

    def sample_indices(self, count: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Numbers `[S, count]` in [0, 1), each seed's from its own generator; `rows` makes rows of them once it is known how many there are."""
        return torch.stack([torch.rand(count, generator=generator, dtype=torch.float64) for generator in generators])

    def rows(self, drawn: Tensor) -> Tensor:
        """The rows that numbers `[S, B]` in [0, 1) stand for now, int64 `[S, B]`."""
        parts = []
        if self.offline is not None and self.offline_rows:
            parts.append(drawn[:, : self.offline_rows] * len(self.offline))
        filled = self.replay.count - self.replay.oldest
        parts.append(drawn[:, self.offline_rows :] * filled + self.replay.oldest)
        return torch.cat(parts, 1).to(torch.int64)  # rounds down

    def gather(self, rows: Tensor) -> Batch:
        """The transitions at `rows [S, B]`; a collected one counts its row behind those of the offline data."""
        if not self.offline_rows or self.offline is None:
            return self.replay.gather(rows)
        known = self.offline.gather(rows[:, : self.offline_rows])
        if self.offline_rows == self.batch_size:
            return known
        new = self.replay.gather(rows[:, self.offline_rows :])
        new_rows = new.rows + len(self.offline)
        kind = LookaheadBatch if isinstance(new, LookaheadBatch) else RowBatch
        joined = {field.name: _joined(getattr(known, field.name), getattr(new, field.name)) for field in fields(kind)}
        return kind(**{**joined, "rows": torch.cat([rows[:, : self.offline_rows], new_rows], 1)})


def _joined(first: Any, second: Any) -> Any:
    """Tensors along the minibatch; other values are the same in both."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second], 1)
    return first


class MixedIndices(BatchIndices):
    """The rows of every seed's minibatches of a `Mixture`, which grows."""

    dataset: Mixture  # type: ignore[assignment]

    def next(self) -> Tensor:
        """Rows `[S, B]` of the next minibatch of every seed."""
        return self.dataset.rows(super().next())
