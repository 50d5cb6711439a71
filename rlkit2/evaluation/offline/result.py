"""What an evaluation without an environment found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rlkit2.evaluation.offline.estimate import ValueEstimate


@dataclass(frozen=True)
class OfflineEvaluation:
    """Discounted returns of P policies as M methods estimate them.

    Attributes:
        labels: names of the policies, `[P]`.
        estimates: method -> one `ValueEstimate` per policy, in the order of `labels`.
        discount: gamma of all estimates.
        dataset: its id; episodes, transitions: how many of each.
        data_return: mean discounted return of the data's own episodes, up to their end or truncation.
        outside: share of the data's states at which each policy acts unlike anything seen nearby (NaN: unknown); see `support.outside_share`.
        effective_episodes: episodes that carry the importance weights, per policy; None where no method needed them.
        effective_transitions: transitions that carry the occupancy ratios, per policy; None likewise.
        notes: what was assumed, one line each.
    """

    labels: tuple[str, ...]
    estimates: dict[str, tuple[ValueEstimate, ...]]
    discount: float
    deterministic: bool
    dataset: str
    episodes: int
    transitions: int
    data_return: float
    outside: tuple[float, ...]
    effective_episodes: tuple[float, ...] | None
    effective_transitions: tuple[float, ...] | None
    notes: tuple[str, ...]

    def __getitem__(self, method: str) -> ValueEstimate:
        """The estimate of the only policy; with several take `estimates[method]`."""
        if len(self.labels) != 1:
            raise KeyError(f"there are {len(self.labels)} policies; take estimates[{method!r}]")
        return self.estimates[method][0]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values; unknown numbers are None."""

        def plain(numbers: tuple[float, ...] | None) -> list[float | None] | None:
            return None if numbers is None else [number if math.isfinite(number) else None for number in numbers]

        return {
            "dataset": self.dataset,
            "episodes": self.episodes,
            "transitions": self.transitions,
            "discount": self.discount,
            "deterministic": self.deterministic,
            "data_return": self.data_return,
            "policies": list(self.labels),
            "estimates": {name: [one.to_dict() for one in found] for name, found in self.estimates.items()},
            "outside": plain(self.outside),
            "effective_episodes": plain(self.effective_episodes),
            "effective_transitions": plain(self.effective_transitions),
            "notes": list(self.notes),
        }
