"""The margin losses side by side for one pair: coefficients, their ratio, the cosines from which a log-probability goes the wrong way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from rlkit2.entanglement.geometry import REGIMES, GradientGeometry
from rlkit2.errors import ConfigError
from rlkit2.losses.margin import MARGIN_LOSSES, MarginInputs, get_margin_loss


def loss_table(
    names: Sequence[str] = (),
    *,
    logps: tuple[float, float],
    reference: tuple[float, float],
    lengths: tuple[int, int],
    cosine: float,
    norms: tuple[float, float],
) -> list[dict[str, Any]]:
    """One row per loss for one pair (chosen first in every tuple), hyper-parameters at their defaults.

    Returns:
        Rows with `d_w`, `d_l`, `u`, `chosen_falls_from` and `rejected_rises_from` (cosines; None where no cosine decides because a coefficient is
        not positive), `regime` of the given geometry, `margin_rate`, and what the loss needs.

    Raises:
        ConfigError: unknown loss, or a cosine or norm out of range.
    """
    if not -1 <= cosine <= 1 or min(norms) <= 0:
        raise ConfigError(f"cosine={cosine} must be in [-1, 1] and both norms {norms} above 0")
    one = [torch.tensor([x], dtype=torch.float64) for x in (*logps, *reference, *lengths)]
    inputs = replace(MarginInputs(*one), context_chosen=torch.zeros(1, dtype=torch.float64))
    product = torch.tensor([cosine * norms[0] * norms[1]], dtype=torch.float64)
    squares = [torch.tensor([norm**2], dtype=torch.float64) for norm in norms]
    geometry = GradientGeometry(product, squares[0], squares[1])
    rows = []
    for name in names or MARGIN_LOSSES:
        loss = get_margin_loss(name)
        d_w, d_l = (float(d) for d in loss.coefficients(inputs))
        positive = d_w > 0 and d_l > 0
        ratio = d_w / d_l if positive else None
        rows.append(
            {
                "loss": loss.name,
                "aliases": list(loss.aliases),
                "hyperparameters": dict(loss.hyperparameters),
                "d_w": d_w,
                "d_l": d_l,
                "u": ratio,
                "chosen_falls_from": ratio * norms[0] / norms[1]
                if ratio is not None and math.isfinite(ratio)
                else None,
                "rejected_rises_from": norms[1] / norms[0] / ratio if ratio else None,
                "regime": REGIMES[int(geometry.regime(d_w, d_l))],
                "margin_rate": float(geometry.margin_rate(d_w, d_l)),
                "ratio": loss.ratio,
                "needs_reference": loss.needs_reference,
                "needs_lengths": loss.needs_lengths,
                "source": loss.source,
            }
        )
    return rows
