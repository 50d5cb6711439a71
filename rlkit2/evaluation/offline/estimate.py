"""An estimate of what a policy earns, how sure it is, and why it should not be trusted where it should not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit
from torch import Tensor


@dataclass(frozen=True)
class Replicates:
    """What an estimator found: `values [P]`, the same of R resamples of the episodes `[P, R]`, and per policy reasons for distrust.

    A value that is not a number is refused; its reasons say why.
    """

    values: Tensor
    resampled: Tensor
    reasons: list[list[str]]


@dataclass(frozen=True)
class ValueEstimate:
    """Discounted return of one policy by one method, in the rewards' units.

    `low`, `high`: interval of nominal level `confidence`; NaN where one episode cannot give any. `trusted`: no reason speaks against it. A refused
    estimate is NaN. `reasons`: what speaks against it, one line each.
    """

    method: str
    value: float
    low: float
    high: float
    confidence: float
    reasons: tuple[str, ...]

    @property
    def trusted(self) -> bool:
        """Whether nothing is known against it."""
        return math.isfinite(self.value) and not self.reasons

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return "refused"
        text = f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"
        return text if self.trusted else f"({text})?"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; numbers that are not finite become None."""
        numbers = {name: getattr(self, name) for name in ("value", "low", "high")}
        return {
            "method": self.method,
            **{name: number if math.isfinite(number) else None for name, number in numbers.items()},
            "confidence": self.confidence,
            "trusted": self.trusted,
            "reasons": list(self.reasons),
        }


def estimates(
    method: str, found: Replicates, units: int, confidence: float, doubts: list[list[str]] | None = None
) -> list[ValueEstimate]:
    """One `ValueEstimate` per policy: value -/+ t se, with se the deviation of the replicates over resamples of `units` episodes or initial states.

    Student's t has min(R, units) - 1 degrees of freedom, and the deviation is corrected for the resamples being those of a sample (Efron and
    Tibshirani, "An Introduction to the Bootstrap", 1993, section 12.2 and problem 5.2).
    """
    values, resampled = found.values.double().numpy(), found.resampled.double().numpy()
    half = np.full(len(values), np.nan)
    freedom = min(resampled.shape[1], units) - 1
    if freedom > 0:
        error = resampled.std(1, ddof=1) * math.sqrt(units / (units - 1))
        half = float(stdtrit(freedom, 0.5 + confidence / 2)) * error
    listed = []
    for index, (value, width) in enumerate(zip(values, half, strict=True)):
        reasons = [*found.reasons[index], *(doubts[index] if doubts else [])]
        if freedom <= 0:
            reasons.append("one episode gives no interval")
        if not math.isfinite(value):
            value, width = math.nan, math.nan
        listed.append(
            ValueEstimate(method, float(value), float(value - width), float(value + width), confidence, tuple(reasons))
        )
    return listed
