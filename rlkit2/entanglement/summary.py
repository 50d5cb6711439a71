"""A JSON-able summary of the geometry of preference pairs: angles, regimes, and three meters that may disagree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlkit2.entanglement.geometry import REGIMES, GradientGeometry, batch_rates
from rlkit2.errors import ConfigError

QUANTILES = (0.1, 0.5, 0.9)
METERS = {
    "pair": "a gradient step on the pair's own loss",
    "batch": "a gradient step on the mean loss of these pairs",
    "optimizer": "the optimiser's real step, to first order",
    "realised": "the real change of the log-probabilities",
}


def entanglement_report(
    geometry: GradientGeometry,
    coefficients: tuple[Any, Any],
    *,
    gram: Any = None,
    optimizer: tuple[Any, Any] | None = None,
    realised: tuple[Any, Any] | None = None,
    outside: tuple[Any, Any] | None = None,
    pairwise: bool = True,
) -> dict[str, Any]:
    """Summarise how a loss moves both log-probabilities of every pair.

    The per-pair condition alone may mislead: other pairs and the optimiser's preconditioner move the same parameters. Every meter that its
    numbers are given for appears under "meters", and "disagreement" says for what share of pairs it contradicts the per-pair meter.

    Args:
        geometry: P pairs.
        coefficients: `(d_w, d_l)` of the loss, `[P]` each.
        gram: inner products of all gradients, `[2P, 2P]`: adds what a step on the whole batch does, own and cross parts.
        optimizer: `update_alignment(...)` of the optimiser's step, `[P]` each.
        realised: real change of chosen and rejected, `[P]` each.
        outside: rates, `[P]` each, that come from terms of the loss outside all completions (the prompts' likelihood of ORPO), for the batch
            meter.
        pairwise: False for losses that give up the pairs' identity (`aot_unpaired`): leaves the per-pair meter out.

    Returns:
        Plain numbers, lists and strings. With a seed axis `[S, P]`: `{"seeds": [one report per seed]}`.

    Raises:
        ConfigError: shapes do not fit.
    """
    d_w, d_l = (torch.as_tensor(d).detach() for d in coefficients)
    ip = torch.as_tensor(geometry.inner)
    if ip.ndim > 1:
        seeds = range(len(ip))
        return {
            "seeds": [
                entanglement_report(
                    _seed(geometry, s),
                    (d_w.expand(ip.shape)[s], d_l.expand(ip.shape)[s]),
                    gram=None if gram is None else gram[s],
                    optimizer=None if optimizer is None else (optimizer[0][s], optimizer[1][s]),
                    realised=None if realised is None else (realised[0][s], realised[1][s]),
                    outside=None if outside is None else (outside[0][s], outside[1][s]),
                    pairwise=pairwise,
                )
                for s in seeds
            ]
        }
    d_w, d_l = (d.expand(ip.shape) for d in (d_w, d_l))
    regime = torch.as_tensor(geometry.regime(d_w, d_l))
    meters = _meters(geometry, d_w, d_l, gram, optimizer, realised, outside, pairwise)
    report: dict[str, Any] = {
        "pairs": len(geometry),
        "method": geometry.method,
        "proxy": geometry.method == "head",
        "parameters": geometry.parameters,
        **{name: _distribution(value) for name, value in geometry.scores().items()},
        "share_score_above_1": _share(torch.as_tensor(geometry.score) > 1),
        "d_w": _distribution(d_w),
        "d_l": _distribution(d_l),
        "regimes": {name: _share(regime == code) for code, name in enumerate(REGIMES)},
        "share_undecided": _share(geometry.undecided(d_w, d_l)),
        "share_margin_falls": _share(torch.as_tensor(geometry.margin_rate(d_w, d_l)) < 0),
        "meters": {name: _meter(*values) | {"means": METERS[name]} for name, values in meters.items()},
    }
    if "pair" in meters:
        report["disagreement"] = {
            name: _disagreement(meters["pair"], values) for name, values in meters.items() if name != "pair"
        }
    if gram is not None:
        rates = batch_rates(torch.as_tensor(gram), d_w, d_l)
        report["own_size"] = float(torch.cat([rates.own_w, rates.own_l]).abs().mean())
        report["cross_size"] = float(torch.cat([rates.cross_w, rates.cross_l]).abs().mean())
    if geometry.parts:
        report["parts"] = _parts(geometry)
    report["per_pair"] = _per_pair(geometry, d_w, d_l, regime)
    return report


def _seed(geometry: GradientGeometry, index: int) -> GradientGeometry:
    def pick(value: Any) -> Any:
        return None if value is None else value[index]

    return GradientGeometry(
        pick(geometry.inner),
        pick(geometry.sqnorm_w),
        pick(geometry.sqnorm_l),
        pick(geometry.gap_w),
        pick(geometry.gap_l),
        parts={name: _seed(part, index) for name, part in geometry.parts.items()},
        method=geometry.method,
        relative_error=None if geometry.exact else geometry.relative_error,
        parameters=geometry.parameters,
    )


def _meters(
    geometry: GradientGeometry,
    d_w: Tensor,
    d_l: Tensor,
    gram: Any,
    optimizer: tuple[Any, Any] | None,
    realised: tuple[Any, Any] | None,
    outside: tuple[Any, Any] | None,
    pairwise: bool,
) -> dict[str, tuple[Tensor, Tensor]]:
    """(chosen, rejected) of every meter whose numbers are there."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    if pairwise:
        rate_w, rate_l = geometry.rates(d_w, d_l)
        found["pair"] = torch.as_tensor(rate_w), torch.as_tensor(rate_l)
    if gram is not None:
        rates = batch_rates(torch.as_tensor(gram), d_w, d_l)
        more = outside or (0.0, 0.0)
        found["batch"] = rates.chosen + more[0], rates.rejected + more[1]
    for name, change in (("optimizer", optimizer), ("realised", realised)):
        if change is not None:
            sides = torch.as_tensor(change[0]).detach(), torch.as_tensor(change[1]).detach()
            if sides[0].shape != d_w.shape or sides[1].shape != d_w.shape:
                raise ConfigError(f"{name} must hold one change per pair and side, {tuple(d_w.shape)} each")
            found[name] = sides
    return found


def _meter(chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    up, down = chosen > 0, rejected < 0
    return {
        "chosen": float(chosen.mean()),
        "rejected": float(rejected.mean()),
        "share_chosen_rises": _share(up),
        "share_rejected_falls": _share(down),
        "share_ideal": _share(up & down),
        "share_both_down": _share(~up & down),
        "share_both_up": _share(up & ~down),
    }


def _disagreement(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Share of pairs whose chosen (rejected) goes the other way."""
    return {
        side: _share((one > 0) != (other > 0))
        for side, one, other in zip(("chosen", "rejected"), first, second, strict=True)
    }


def _parts(geometry: GradientGeometry) -> dict[str, dict[str, float]]:
    total = float(torch.as_tensor(geometry.inner).sum())
    return {
        name: {
            "inner_share": float(torch.as_tensor(part.inner).sum()) / total if total else 0.0,
            "cosine_mean": float(torch.as_tensor(part.cosine).mean()),
        }
        for name, part in geometry.parts.items()
    }


def _per_pair(geometry: GradientGeometry, d_w: Tensor, d_l: Tensor, regime: Tensor) -> dict[str, list[Any]]:
    rate_w, rate_l = geometry.rates(d_w, d_l)
    columns: Mapping[str, Any] = {
        **geometry.scores(),
        "norm_w": torch.as_tensor(geometry.sqnorm_w).sqrt(),
        "norm_l": torch.as_tensor(geometry.sqnorm_l).sqrt(),
        "d_w": d_w,
        "d_l": d_l,
        "rate_chosen": rate_w,
        "rate_rejected": rate_l,
    }
    numbers: dict[str, list[Any]] = {name: torch.as_tensor(value).tolist() for name, value in columns.items()}
    return {**numbers, "regime": [REGIMES[code] for code in regime.tolist()]}


def _distribution(values: Any) -> dict[str, float]:
    tensor = torch.as_tensor(values)
    quantiles = torch.quantile(tensor.double(), torch.tensor(QUANTILES, dtype=torch.float64, device=tensor.device))
    return {
        "mean": float(tensor.mean()),
        **{f"p{round(100 * q)}": float(v) for q, v in zip(QUANTILES, quantiles, strict=True)},
    }


def _share(mask: Any) -> float:
    return float(torch.as_tensor(mask).double().mean())
