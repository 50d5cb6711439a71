"""Windows of consecutive steps, for agents that read an episode as a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.returns import discounted_returns


@dataclass(frozen=True, kw_only=True)
class SequenceBatch:
    """B windows of K steps for each of S seeds, in raw units. Behind the end of its episode a window repeats the last step, and `known` is false.

    `observations` `[S, B, K, obs]`; `actions` `[S, B, K, act]`, discrete int64 `[S, B, K]`; `returns_to_go` `[S, B, K]`, the rewards from that step
    to the end of the episode; `timesteps` int64 `[S, B, K]`, counted from the start of the episode; `known` bool `[S, B, K]`; `best_return` `[S]`,
    the largest return of an episode of the dataset.
    """

    observations: Tensor
    actions: Tensor
    returns_to_go: Tensor
    timesteps: Tensor
    known: Tensor
    best_return: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SequenceBatch:
        """The batch on another device."""
        parts = {f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)}
        return SequenceBatch(**parts)


class SequenceDataset:
    """A dataset whose rows stand for the windows that begin there, as a trainer sees it: `sample_indices`, then `gather`.

    Rows drawn uniformly give every window the same chance, and an episode one by its length. Everything else is asked of the dataset itself.

    Args:
        dataset: whole episodes.
        length: K.
    """

    def __init__(self, dataset: TransitionDataset, length: int) -> None:
        self.dataset, self.length = dataset, length

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not made yet, as while it is copied
            raise AttributeError(name)
        return getattr(self.dataset, name)

    @cached_property
    def _starts(self) -> Tensor:
        """First row of every row's episode, `[N]`."""
        starts = self.dataset.episode_starts
        return torch.repeat_interleave(starts[:-1], starts.diff())

    @cached_property
    def _ends(self) -> Tensor:
        """Last row of every row's episode, `[N]`."""
        starts = self.dataset.episode_starts
        return torch.repeat_interleave(starts[1:] - 1, starts.diff())

    @cached_property
    def returns_to_go(self) -> Tensor:
        """Rewards from every row to the end of its episode, `[N]` float32."""
        found = discounted_returns(self.dataset.rewards, self.dataset.episode_starts, 1.0)
        return found.float().to(self.dataset.device)

    @cached_property
    def best_return(self) -> Tensor:
        """The largest return of an episode, one number."""
        return self.returns_to_go[self.dataset.episode_starts[:-1]].amax()

    def to(self, device: torch.device | str) -> SequenceDataset:
        """The same windows with the dataset in the memory of `device`."""
        return SequenceDataset(self.dataset.to(device), self.length)

    def sample_indices(self, batch_size: int, generators: Sequence[torch.Generator]) -> Tensor:
        """First rows of windows, `[S, batch_size]`, each seed's from its own generator."""
        return self.dataset.sample_indices(batch_size, generators)

    def gather(self, indices: Tensor) -> SequenceBatch:
        """The windows that begin at rows `[S, B]`."""
        first = indices.to(self.dataset.device).unsqueeze(-1)
        wanted = first + torch.arange(self.length, device=first.device)
        rows = torch.minimum(wanted, self._ends[first])
        steps = self.dataset.gather(rows)
        return SequenceBatch(
            observations=steps.observations,
            actions=steps.actions,
            returns_to_go=self.returns_to_go[rows],
            timesteps=rows - self._starts[first],
            known=wanted == rows,
            best_return=self.best_return.expand(len(indices)),
        )
