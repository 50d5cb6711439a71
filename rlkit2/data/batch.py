"""One minibatch of transitions for every seed."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Aligned transitions `(s, a, r, s')` in raw environment units, one independent minibatch per seed.

    Shapes: `observations`, `next_observations` `[S, B, obs]`; `actions` `[S, B, act]` (int64 `[S, B]` for discrete actions);
    `rewards`, `terminations`, `truncations` `[S, B]`. Flags are bool (0/1 floats are accepted by the agents). A terminated step
    bootstraps nothing; a truncated one bootstraps from its next observation.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminations: Tensor
    truncations: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        return type(self)(**{f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)})

    def with_seed_axis(self) -> Batch:
        """The same batch with the leading seed axis added where it is missing (`rewards` of shape `[B]`)."""
        if self.rewards.ndim == 2:
            return self
        return type(self)(**{f.name: getattr(self, f.name).unsqueeze(0) for f in fields(self)})


@dataclass(frozen=True, kw_only=True)
class RowBatch(Batch):
    """A batch that knows its rows of the dataset, `rows` int64 `[S, B]`: what `TransitionDataset.gather` and `sample` give."""

    rows: Tensor
