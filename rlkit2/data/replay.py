"""A ring of transitions with the same `sample` as a dataset, for data that are still being collected."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rlkit2.data.batch import Batch
from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.records import Records, record_dtype
from rlkit2.data.spaces import action_layout
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import ConfigError, DatasetError


class ReplayBuffer:
    """The last `capacity` transitions, in raw environment units; the oldest are overwritten first.

    `spec` gives the spaces. Rows are unordered: episodes are not kept apart.
    """

    def __init__(self, capacity: int, spec: DatasetSpec) -> None:
        if capacity < 1:
            raise ConfigError(f"replay capacity {capacity} must be positive")
        flat, actions = spec.flattener, action_layout(spec.action_space)
        dtype = record_dtype(flat.shape, flat.dtype, actions.shape, actions.dtype)
        self.capacity = capacity
        self.spec = spec
        self.records = Records.from_numpy(np.zeros(capacity, dtype))
        self.size = 0
        self._next = 0

    def __len__(self) -> int:
        return self.size

    def add(
        self,
        observations: Tensor,
        actions: Tensor,
        rewards: Tensor,
        next_observations: Tensor,
        terminations: Tensor,
        truncations: Tensor,
    ) -> None:
        """Append n transitions: `observations`, `next_observations` `[n, obs]`, `actions` `[n, act]` or `[n]`, the rest `[n]`.

        Raises `DatasetError` where lengths or shapes do not fit.
        """
        given = {
            "observations": observations,
            "next_observations": next_observations,
            "actions": actions,
            "rewards": rewards,
            "terminations": terminations,
            "truncations": truncations,
        }
        values = {name: torch.as_tensor(value) for name, value in given.items()}
        count = len(values["rewards"])
        rows = (self._next + torch.arange(count)) % self.capacity
        if count > self.capacity:  # only the last ones survive
            values = {name: value[count - self.capacity :] for name, value in values.items()}
            rows = rows[count - self.capacity :]
        for name, view in self.records.views(self.records.words).items():
            if values[name].shape != (len(rows), *view.shape[1:]):
                expected = (count, *view.shape[1:])
                raise DatasetError(f"{name} have shape {tuple(given[name].shape)}; expected {expected}")
        for name, view in self.records.views(self.records.words).items():
            view[rows] = values[name].to(view.dtype)
        self._next = (self._next + count) % self.capacity
        self.size = min(self.size + count, self.capacity)

    def extend(self, dataset: TransitionDataset) -> None:
        """Append all transitions of a dataset with the same record layout."""
        if any(getattr(dataset.spec, name) != getattr(self.spec, name) for name in ("record_dtype", "layout")):
            raise DatasetError(f"{dataset.spec.id} has other spaces than the buffer")
        fields = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
        self.add(*(getattr(dataset, name) for name in fields))

    def sample(
        self, batch_size: int, *, seeds: int = 1, generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> Batch:
        """A uniform minibatch per seed, as `TransitionDataset.sample`; `DatasetError` while empty."""
        if self.size == 0:
            raise DatasetError("the replay buffer is empty; add transitions before sampling")
        return self._view().sample(batch_size, seeds=seeds, generator=generator)

    def _view(self) -> TransitionDataset:
        """The filled part as a dataset of one episode."""
        records = Records(self.records.words[: self.size], self.records.dtype)
        return TransitionDataset(records, torch.tensor([0, self.size]), self.spec)
