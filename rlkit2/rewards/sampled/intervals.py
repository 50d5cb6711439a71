"""Intervals from refits on resampled episodes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.special import ndtri, stdtrit
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """Two-sided bounds at 95 %, `low` and `high` of one shape; they hold the estimate they belong to."""

    low: Tensor
    high: Tensor


def interval(values: Tensor, units: float) -> Interval:
    """The interval of `values[0]` from its refits `values[1:]` on data whose `units` independent pieces were resampled.

    Percentiles of the refits, moved so that their median is the estimate (a refit sees fewer distinct episodes, so that refits may sit beside the
    estimate as the estimate sits beside the truth), and stretched as Student's t is wider than the normal, by `t / z sqrt(n / (n - 1))`
    (Hesterberg 2015, "What teachers should know about the bootstrap", expanded percentiles). The k-th of B refits stands for the level
    `k / (B + 1)`. NaN refits count for nothing.
    """
    units = max(units, 2.0)
    stretch = float(stdtrit(units - 1, 0.975) / ndtri(0.975)) * math.sqrt(units / (units - 1))
    refits = len(values) - 1
    tail = max(0.0, (0.025 * (refits + 1) - 1) / max(refits - 1, 1))
    levels = torch.tensor([tail, 0.5, 1 - tail], dtype=values.dtype)
    low, centre, high = torch.nanquantile(values[1:], levels, dim=0)
    return Interval(values[0] + stretch * (low - centre), values[0] + stretch * (high - centre))
