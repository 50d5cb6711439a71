"""A dataset whose transitions are drawn with unequal probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from rlkit2.data.batch import Batch
from rlkit2.data.dataset import TransitionDataset
from rlkit2.errors import DatasetError


@dataclass(frozen=True, eq=False)
class WeightedDataset(TransitionDataset):
    """A `TransitionDataset` that draws row i with probability `weights[i] / sum(weights)`; made by `with_weights`.

    A loss averaged over its minibatches is the weighted average of the loss over the dataset. The weights live on the CPU, where rows are drawn;
    `to_minari` does not keep them.
    """

    weights: Tensor | None = None

    @cached_property
    def _cumulative(self) -> Tensor:
        assert self.weights is not None
        return self.weights.double().cumsum(0)

    def sample_indices(self, batch_size: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Rows `[S, batch_size]` drawn by weight with replacement, row k from `generators[k]` alone."""
        total = self._cumulative[-1]
        points = [torch.rand(1, batch_size, generator=g, dtype=torch.float64) * total for g in generators]
        return torch.searchsorted(self._cumulative, torch.cat(points), right=True).clamp(max=len(self) - 1)

    def sample(
        self, batch_size: int, *, seeds: int = 1, generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> Batch:
        """As for `TransitionDataset`, by weight."""
        if isinstance(generator, Sequence):
            return super().sample(batch_size, seeds=seeds, generator=generator)
        own = torch.default_generator if generator is None else generator
        return self.gather(self.sample_indices(batch_size, [own] * seeds))

    def select(self, episodes: ArrayLike | Tensor) -> TransitionDataset:
        """As for `TransitionDataset`; every row keeps its weight."""
        plain = TransitionDataset(**{f.name: getattr(self, f.name) for f in fields(TransitionDataset)})
        carried = replace(plain, new_rewards=self.weights).select(episodes).new_rewards
        return replace(super().select(episodes), weights=carried)  # type: ignore[call-arg]


def with_weights(dataset: TransitionDataset, weights: ArrayLike | Tensor) -> WeightedDataset:
    """The same transitions, drawn in proportion to `weights` `[N]` (finite, at least 0, not all 0).

    Raises:
        DatasetError: weights that do not fit.
    """
    values = torch.as_tensor(weights if isinstance(weights, Tensor) else np.asarray(weights)).detach().cpu().double()
    if values.shape != (len(dataset),):
        raise DatasetError(
            f"weights of shape {tuple(values.shape)} for {len(dataset)} transitions; give one per transition"
        )
    if not bool(values.isfinite().all()) or bool((values < 0).any()) or not bool((values > 0).any()):
        raise DatasetError("weights must be finite, at least 0, and not all 0")
    plain = {f.name: getattr(dataset, f.name) for f in fields(TransitionDataset)}
    plain["spec"] = dataset._derived(b"weights", values.numpy().tobytes())
    return WeightedDataset(**plain, weights=values)
