"""One minibatch of transitions for every seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self

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

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same batch on `device`."""
        return self._changed(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def with_seed_axis(self) -> Self:
        """The same batch with the leading seed axis added where it is missing (`rewards` of shape `[B]`)."""
        if self.rewards.ndim == 2:
            return self
        return self._changed(lambda tensor: tensor.unsqueeze(0))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with `change` done to every tensor."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(part) for name, part in parts.items() if isinstance(part, Tensor)})


@dataclass(frozen=True, kw_only=True)
class RowBatch(Batch):
    """A batch that knows its rows of the dataset, `rows` int64 `[S, B]`: what `TransitionDataset.gather` and `sample` give."""

    rows: Tensor


@dataclass(frozen=True, kw_only=True)
class LookaheadBatch(RowBatch):
    """A batch that also says what the data did next; `TransitionDataset.looking_ahead` gives it.

    With returns of several steps, `steps` is k, the steps that each row spans, int64 `[S, B]`: `rewards` are then sum_(j<k) discount^j r_(t+j),
    `next_observations` and both flags those of the last of the k, and what follows is worth discount^k. k is smaller than asked for where the
    episode ends before.

    With the data's own next actions, `next_actions` (as `actions`) are those taken at `next_observations`; `followed`, bool `[S, B]`, is false where
    the episode ends and there is none (the last action of the episode then stands in, and must not count).

    With whole episodes, `returns_to_go` are the discounted rewards from the row to the end of its episode and `steps_to_go` their number, `[S, B]`;
    `first_returns`, `first_steps` and `first_observations` the same of the episode's first row, and its observation; `final_observations` and
    `final_terminations` what the episode's last step led to.
    """

    steps: Tensor | None = None
    discount: float = 1.0
    next_actions: Tensor | None = None
    followed: Tensor | None = None
    returns_to_go: Tensor | None = None
    steps_to_go: Tensor | None = None
    first_returns: Tensor | None = None
    first_steps: Tensor | None = None
    first_observations: Tensor | None = None
    final_observations: Tensor | None = None
    final_terminations: Tensor | None = None
