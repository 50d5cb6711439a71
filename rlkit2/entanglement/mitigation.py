"""Ways out of entanglement: other coefficients for the same two gradients, masks for shared tokens, fewer pairs.

With coefficients `(c_w, c_l)` a step moves along `c_w g_w - c_l g_l`. A remedy that only changes the coefficients is a function
`(geometry, d_w, d_l) -> (c_w, c_l)`; `coefficient_loss` turns any coefficients into a loss with exactly that gradient, so each of them
trains, and `entanglement_report(geometry, (c_w, c_l))` says beforehand what it would change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlkit2.entanglement.geometry import GradientGeometry
from rlkit2.entanglement.scores import PairBatch
from rlkit2.errors import ConfigError

SMALLEST_NORM = 1e-12
LONGEST_STEP = 10.0
"""A normalised step of one pair is at most this many times the step that keeps the loss's scale."""


def _prepared(geometry: GradientGeometry, d_w: Any, d_l: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    ip, w2, l2 = (torch.as_tensor(getattr(geometry, name)) for name in ("inner", "sqnorm_w", "sqnorm_l"))
    first, second = (torch.as_tensor(d, dtype=ip.dtype, device=ip.device).expand(ip.shape) for d in (d_w, d_l))
    return ip, w2, l2, first.detach(), second.detach()


def _returned(geometry: GradientGeometry, c_w: Tensor, c_l: Tensor) -> tuple[Any, Any]:
    return (np.asarray(c_w), np.asarray(c_l)) if geometry.from_numpy else (c_w, c_l)


def normalised_coefficients(
    geometry: GradientGeometry, d_w: Any, d_l: Any, *, mode: str = "per_pair"
) -> tuple[Any, Any]:
    """Pairwise normalised gradient descent (named by Yuan et al. 2024): steps along `g_w/|g_w| - g_l/|g_l|`, which is ideal for every
    pair whose gradients are not parallel.

    Args:
        mode: "per_pair" keeps the length of the loss's own step, "reweight" the loss's scale `sqrt(d_w d_l)` (the ratio is the same, `|g_l|/|g_w|`).

    Returns:
        `(c_w, c_l)`, `[..., P]`. A pair with a vanishing gradient, or coefficients of different signs, keeps its own.

    Raises:
        ConfigError: an unknown mode.
    """
    if mode not in ("per_pair", "reweight"):
        raise ConfigError(f'mode={mode!r} of normalised_coefficients must be "per_pair" or "reweight"')
    ip, w2, l2, first, second = _prepared(geometry, d_w, d_l)
    usable = (first * second > 0) & (w2 > SMALLEST_NORM**2) & (l2 > SMALLEST_NORM**2)
    norm_w, norm_l = (torch.where(usable, x, 1).sqrt() for x in (w2, l2))
    scale = (first * second).clamp(min=0).sqrt() * (norm_w * norm_l).sqrt()
    if mode == "per_pair":
        own = (first.square() * w2 - 2 * first * second * ip + second.square() * l2).clamp(min=0).sqrt()
        unit = (2 - 2 * ip / (norm_w * norm_l)).clamp(min=1e-12).sqrt()
        scale = torch.minimum(own / unit, LONGEST_STEP * scale)
    scale = scale * first.sign()
    return _returned(geometry, torch.where(usable, scale / norm_w, first), torch.where(usable, scale / norm_l, second))


def band_coefficients(geometry: GradientGeometry, d_w: Any, d_l: Any, *, margin: float = 0.05) -> tuple[Any, Any]:
    """The least change that disentangles: `u = d_w/d_l` is clipped into the band of ideal ratios, `sqrt(d_w d_l)` is kept.

    For a positive inner product every u strictly between `<g_w, g_l>/|g_w|^2` and `|g_l|^2/<g_w, g_l>` is ideal. (Derived here; Chen et al. 2026,
    arXiv 2604.18239, study such a band.)

    Args:
        margin: relative distance to the ends of the band; where the band is narrower, its geometric middle `|g_l|/|g_w|` is taken.

    Returns:
        `(c_w, c_l)`, `[..., P]`; pairs inside the band keep theirs.
    """
    if margin < 0:
        raise ConfigError(f"margin={margin} of band_coefficients must be at least 0")
    ip, w2, l2, first, second = _prepared(geometry, d_w, d_l)
    usable = (first * second > 0) & (ip > 0) & (w2 > SMALLEST_NORM**2) & (l2 > SMALLEST_NORM**2)
    safe = [torch.where(usable, x, 1) for x in (ip, w2, l2, first, second)]
    low, high = safe[0] / safe[1] * (1 + margin), safe[2] / safe[0] / (1 + margin)
    middle = (safe[2] / safe[1]).sqrt()
    ratio = safe[3] / safe[4]
    wanted = torch.where(low < high, torch.minimum(torch.maximum(ratio, low), high), middle)
    scale = (safe[3] * safe[4]).sqrt() * first.sign()
    return _returned(
        geometry,
        torch.where(usable, scale * wanted.sqrt(), first),
        torch.where(usable, scale / wanted.sqrt(), second),
    )


def likelihood_coefficients(geometry: GradientGeometry, d_w: Any, d_l: Any, *, weight: float = 0.05) -> tuple[Any, Any]:
    """An added likelihood term `-weight * log pi(y_w|x)`, as in RPO and CPO: enlarges u; may let the rejected rise."""
    _, _, _, first, second = _prepared(geometry, d_w, d_l)
    return _returned(geometry, first + weight, second)


def filtered_coefficients(geometry: GradientGeometry, d_w: Any, d_l: Any, *, drop: float = 0.1) -> tuple[Any, Any]:
    """Leaves out the share `drop` of pairs with the largest `c_w = <g_w, g_l>/|g_w|^2`, whose chosen suffers most."""
    if not 0 <= drop < 1:
        raise ConfigError(f"drop={drop} must be in [0, 1): the share of pairs to leave out")
    _, _, _, first, second = _prepared(geometry, d_w, d_l)
    c_w = torch.as_tensor(geometry.scores()["c_w"])
    keep = c_w.argsort(-1).argsort(-1) < c_w.shape[-1] - math.floor(drop * c_w.shape[-1])
    return _returned(geometry, torch.where(keep, first, 0), torch.where(keep, second, 0))


def group_coefficients(gram: Any, d_w: Any, d_l: Any) -> tuple[Any, Any]:
    """Normalised descent of the whole batch: along `G_w/|G_w| - G_l/|G_l|` with `G_w = mean d_w g_w`, `G_l = mean d_l g_l`.

    Cheap in training (two backward passes, see `group_normalised_loss`); guarantees the two sums, not every pair. The step keeps its length.

    Args:
        gram: inner products of all gradients, `[2P, 2P]`.
    """
    numpy = not isinstance(gram, Tensor)
    matrix = torch.as_tensor(gram)
    first, second = (torch.as_tensor(d, dtype=matrix.dtype).detach() for d in (d_w, d_l))
    pairs = len(first)
    sum_w = torch.cat([first, torch.zeros_like(first)]) / pairs
    sum_l = torch.cat([torch.zeros_like(second), second]) / pairs
    factor_w, factor_l = group_factors(sum_w @ matrix @ sum_w, sum_l @ matrix @ sum_l, sum_w @ matrix @ sum_l)
    found = first * factor_w, second * factor_l
    return (np.asarray(found[0]), np.asarray(found[1])) if numpy else found


def group_factors(w2: Tensor, l2: Tensor, ip: Tensor) -> tuple[Tensor, Tensor]:
    """What the two sums are multiplied with so that they are equally long and the step has its own length."""
    if bool(w2 <= SMALLEST_NORM**2) or bool(l2 <= SMALLEST_NORM**2):
        return torch.ones_like(w2), torch.ones_like(l2)
    norm_w, norm_l = w2.sqrt(), l2.sqrt()
    own = (w2 - 2 * ip + l2).clamp(min=0).sqrt()
    unit = (2 - 2 * ip / (norm_w * norm_l)).clamp(min=1e-12).sqrt()
    scale = torch.minimum(own / unit, LONGEST_STEP * (norm_w * norm_l).sqrt())
    return scale / norm_w, scale / norm_l


MITIGATIONS: Mapping[str, Callable[..., tuple[Any, Any]]] = MappingProxyType(
    {
        "normalised": normalised_coefficients,
        "band": band_coefficients,
        "likelihood": likelihood_coefficients,
        "filtered": filtered_coefficients,
    }
)
"""Remedies by name, `(geometry, d_w, d_l, **options) -> (c_w, c_l)`."""


# --- as losses -------------------------------------------------------------------------------------------------------------------


def coefficient_loss(logp_w: Tensor, logp_l: Tensor, c_w: Any, c_l: Any, *, value: Tensor | None = None) -> Tensor:
    """A loss per pair whose gradient is exactly `-c_w grad logp_w + c_l grad logp_l`, `[..., P]`.

    Args:
        logp_w, logp_l: scores with their graph.
        c_w, c_l: coefficients, taken without gradient.
        value: what to show as the loss (the margin loss itself); default 0.
    """
    first, second = (torch.as_tensor(c, dtype=logp_w.dtype, device=logp_w.device).detach() for c in (c_w, c_l))
    moving = -first * (logp_w - logp_w.detach()) + second * (logp_l - logp_l.detach())
    return moving if value is None else value.detach() + moving


def group_normalised_loss(
    logp_w: Tensor, logp_l: Tensor, d_w: Any, d_l: Any, params: Iterable[Tensor], *, value: Tensor | None = None
) -> Tensor:
    """Group-wise normalised descent as a scalar loss: two backward passes now, and `backward()` hands their combination to `.grad`.

    Args:
        logp_w, logp_l: scores with their graph, `[P]`.
        d_w, d_l: the margin loss's coefficients.
        params: the parameters that are trained.
        value: what to show as the loss; default 0.
    """
    trained = [p for p in params if p.requires_grad]
    first, second = (torch.as_tensor(d, dtype=logp_w.dtype, device=logp_w.device).detach() for d in (d_w, d_l))
    sums = [(first * logp_w).mean(), (second * logp_l).mean()]
    g_w = torch.autograd.grad(sums[0], trained, retain_graph=True, materialize_grads=True, allow_unused=True)
    g_l = torch.autograd.grad(sums[1], trained, materialize_grads=True, allow_unused=True)
    products = [sum((x * y).sum() for x, y in zip(a, b, strict=True)) for a, b in ((g_w, g_w), (g_l, g_l), (g_w, g_l))]
    factor_w, factor_l = group_factors(*(torch.as_tensor(product) for product in products))
    shown = logp_w.new_zeros(()) if value is None else value.mean()
    return gradient_loss(shown, trained, [factor_l * y - factor_w * x for x, y in zip(g_w, g_l, strict=True)])


def gradient_loss(value: Tensor, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A scalar that shows `value` and whose `backward()` hands each parameter the given gradient."""
    loss = value.detach()
    for p, gradient in zip(params, gradients, strict=True):
        loss = loss + ((p - p.detach()) * gradient).sum()
    return loss


# --- token masks -----------------------------------------------------------------------------------------------------------------


def differing_tokens(ids_w: Tensor, ids_l: Tensor, mask_w: Tensor, mask_l: Tensor) -> tuple[Tensor, Tensor]:
    """Completion masks without the longest common subsequence of the two completions: `[P, T_w]` and `[P, T_l]`.

    What is left are the contrastive tokens. Where nothing is left of a side (one completion is part of the other) it keeps all its tokens.
    Masking the loss does not stop the shared tokens from drifting.

    Args:
        ids_w, ids_l: token ids, `[P, T]`.
        mask_w, mask_l: 1 on completion tokens, `[P, T]`.
    """
    kept = mask_w.clone(), mask_l.clone()
    for pair in range(len(ids_w)):
        places = [mask[pair].nonzero().flatten().tolist() for mask in (mask_w, mask_l)]
        words = [ids[pair, place].tolist() for ids, place in zip((ids_w, ids_l), places, strict=True)]
        shared = _common_subsequence(*words)
        for side, (mask, place) in enumerate(zip(kept, places, strict=True)):
            if len(shared) < len(place):
                mask[pair, [place[match[side]] for match in shared]] = 0
    return kept


def mask_shared_tokens(batch: PairBatch) -> PairBatch:
    """The same pairs with only the `differing_tokens` of both completions counted."""
    sides = batch.chosen, batch.rejected
    masks = differing_tokens(*(rows[key] for key in ("input_ids", "completion_mask") for rows in sides))
    return PairBatch(*({**rows, "completion_mask": mask} for rows, mask in zip(sides, masks, strict=True)))


def _common_subsequence(first: list[int], second: list[int]) -> list[tuple[int, int]]:
    """Positions of the longest common subsequence in both lists."""
    length = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i in range(len(first) - 1, -1, -1):
        for j in range(len(second) - 1, -1, -1):
            same = first[i] == second[j]
            length[i][j] = length[i + 1][j + 1] + 1 if same else max(length[i + 1][j], length[i][j + 1])
    i = j = 0
    found = []
    while i < len(first) and j < len(second):
        if first[i] == second[j]:
            found.append((i, j))
            i, j = i + 1, j + 1
        elif length[i + 1][j] >= length[i][j + 1]:
            i += 1
        else:
            j += 1
    return found
