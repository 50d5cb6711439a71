"""One measurement of a model on preference pairs: geometry, batch, layers, tokens and what each remedy would change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlkit2.entanglement.geometry import GradientGeometry
from rlkit2.entanglement.measure import (
    MOST_BYTES,
    Sizes,
    automatic,
    gram_matrix,
    pair_geometry,
    token_cosines,
    token_geometry,
    token_rates,
)
from rlkit2.entanglement.mitigation import MITIGATIONS
from rlkit2.entanglement.scores import PairLike, SequenceScore, as_pair_batch, margin_inputs, sums_of_sides
from rlkit2.entanglement.summary import entanglement_report
from rlkit2.losses.margin import MarginLoss, get_margin_loss


def diagnose(
    logp: SequenceScore,
    batch: PairLike,
    loss: str | MarginLoss,
    *,
    hyperparameters: Mapping[str, Any] | None = None,
    reference: tuple[Tensor, Tensor] | None = None,
    method: str = "auto",
    microbatch: int | None = 8,
    sketch_dim: int = 1024,
    group_by: str | None = "layer",
    tokens: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure what a loss does to both log-probabilities of every pair at the model's present parameters.

    Args:
        logp: what is scored.
        batch: P pairs.
        loss: the margin loss.
        hyperparameters: of the loss.
        reference: reference scores, `[P]` each; default: the model's own, as at the start of training.
        method: see `pair_geometry`; "auto": ghost where the model allows it, else loop.
        microbatch: pairs at a time.
        sketch_dim: for method "sketch", and for the batch's Gram matrix where exact gradients would take more than `MOST_BYTES`.
        group_by: parts of the inner product by "layer" or "parameter".
        tokens: also the token products of the pair whose chosen suffers most.
        progress: called with (pairs done, all pairs).

    Returns:
        `entanglement_report` plus `logp_chosen`, `logp_rejected` (means), `loss`, `gram_method`, `remedies` (shares of regimes under each)
        and `tokens`.

    Raises:
        ConfigError: see `pair_geometry`.
    """
    pairs = logp.prepare(as_pair_batch(batch))
    bound = get_margin_loss(loss).bind(**(hyperparameters or {}))
    sides = sums_of_sides(logp, pairs, microbatch)
    lengths = [logp.mask(rows).sum(-1) for rows in (pairs.chosen, pairs.rejected)]
    d_w, d_l = bound.coefficients(margin_inputs(logp, pairs, bound, sides, reference or sides))
    sizes: Sizes = {"microbatch": microbatch, "sketch_dim": sketch_dim}
    geometry = automatic(
        lambda name: pair_geometry(logp, None, pairs, method=name, group_by=group_by, progress=progress, **sizes),
        method,
    )
    bytes_of_one = 4 * sum(p.numel() for p in logp.params.values())
    fits = 2 * len(pairs) * bytes_of_one <= MOST_BYTES
    gram_method = geometry.method if fits and geometry.method != "head" else "sketch"
    gram = gram_matrix(logp, None, pairs, method=gram_method, **sizes)
    report = entanglement_report(geometry, (d_w, d_l), gram=gram, pairwise=bound.name != "aot_unpaired")
    report |= {
        "loss": bound.name,
        "hyperparameters": dict(bound.hyperparameters),
        "logp_chosen": float(sides[0].mean()),
        "logp_rejected": float(sides[1].mean()),
        "gram_method": gram_method,
        "remedies": {name: _remedy(geometry, gram, remedy(geometry, d_w, d_l)) for name, remedy in MITIGATIONS.items()},
    }
    worst = int(torch.as_tensor(geometry.scores()["c_w"]).argmax())
    longest = max(int(length[worst]) for length in lengths)
    if tokens and longest > 1 and 2 * longest * bytes_of_one <= MOST_BYTES:
        report["tokens"] = _tokens(logp, pairs, worst, float(d_w[worst]), float(d_l[worst]))
    return report


def _remedy(geometry: GradientGeometry, gram: Tensor, coefficients: tuple[Any, Any]) -> dict[str, float]:
    found = entanglement_report(geometry, coefficients, gram=gram)
    batch = found["meters"]["batch"]
    return {
        **{f"share_{name}": found["regimes"][name] for name in ("ideal", "both_down", "both_up")},
        "batch_chosen": batch["chosen"],
        "batch_rejected": batch["rejected"],
    }


def _tokens(logp: SequenceScore, pairs: Any, pair: int, d_w: float, d_l: float) -> dict[str, Any]:
    products = [token_geometry(logp, None, pairs, pair=pair, sides=sides) for sides in ("wl", "ww", "ll")]
    rates = token_rates(logp, None, pairs, d_w, d_l, pair=pair)
    found: dict[str, Any] = {"pair": pair, "cosine": token_cosines(products[0], products[1], products[2]).tolist()}
    for side, rows, rate in zip(("chosen", "rejected"), (pairs.chosen, pairs.rejected), rates, strict=True):
        found[f"rate_{side}"] = rate.tolist()
        if "input_ids" in rows and "completion_mask" in rows:
            found[f"ids_{side}"] = rows["input_ids"][pair][rows["completion_mask"][pair].bool()].tolist()
    return found
