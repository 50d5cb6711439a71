"""What agents that learn from preferences share: where their labels come from and how segments enter the networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar

from torch import Tensor

from rlkit2.agents.base import Agent
from rlkit2.data.batch import Batch
from rlkit2.data.preferences import PreferenceBatch, PreferenceDataset
from rlkit2.errors import ConfigError


class PreferenceAgent(Agent):
    """An agent whose batches are `PreferenceBatch`es; its config has a field `preferences`, the folder of the labels.

    Attributes:
        learns_from: what sets these agents apart from those that learn from transitions.
    """

    learns_from: ClassVar[str] = "preferences"

    @classmethod
    def prepare_dataset(cls, config: Any, dataset: Any, load: Callable[[str], Any] | None = None) -> Any:
        """The labelled pairs of the dataset, each beside `config.replay` of its transitions where there is such a field.

        Raises:
            ConfigError: no labels are named; DatasetError: they are missing, damaged, or belong to another dataset.
        """
        if not config.preferences:
            raise ConfigError(
                f"{cls.__name__} learns from preferences: name the folder of the labels (--preferences); make them with: rlkit2 prefs label"
            )
        return PreferenceDataset.load(config.preferences).pairs(dataset, replay=getattr(config, "replay", 0))

    def update(self, batch: PreferenceBatch) -> dict[str, Tensor]:  # type: ignore[override]
        """One training step on a batch in raw units; returns metrics `group/name` as tensors `[S]` on the device."""
        raise NotImplementedError

    def normalize_segments(self, segments: Batch) -> Batch:
        """The steps of all segments of a batch (fields `[S, B, 2, H, ...]`) in a row, `[S, 2 B H, ...]`, in the networks' units and dtype."""
        return self.normalize(Batch(**{f.name: getattr(segments, f.name).flatten(1, 3) for f in fields(Batch)}))

    def preference_accuracy(self, margin: Tensor, label_mass: Tensor) -> Tensor:
        """Share `[S]` of the decided pairs whose preferred segment has the larger score; `margin [S, B]` is second minus first."""
        decided = (label_mass != 0.5).to(margin.dtype)
        right = ((margin > 0) == (label_mass > 0.5)).to(margin.dtype)
        return (right * decided).sum(1) / decided.sum(1).clamp(min=1.0)
