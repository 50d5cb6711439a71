"""The orthogonal rule of O-DICE with a projection of its own for every sample or every layer, beside the paper's, which has one for the batch.

The paper projects the backward gradient of a whole batch. Its argument is about pairs (s, s'), and a batch's gradient can be orthogonal while every
pair's is not: what cancels in the sum is not looked at. Both variants remove c g_f from g_b with c = <g_f, g_b> / <g_f, g_f>, taken over

    sample:  the parameters of a seed, for every transition's own g_f and g_b
    layer:   one layer of one value head, for the batch
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def coefficients(dot: Tensor, square: Tensor, guard: float) -> Tensor:
    """c = <g_f, g_b> / <g_f, g_f>, the square at least `guard`; 0 where a number is not finite."""
    return (dot / square.clamp(min=guard)).nan_to_num(0.0, 0.0, 0.0)


def orthogonal_by_layer(g_f: Tensor, g_b: Tensor, sizes: Sequence[int], guard: float) -> Tensor:
    """g_b less what is parallel to g_f, layer by layer, `[S, P]`.

    Args:
        g_f, g_b: forward and backward gradient, `[S, P]`.
        sizes: entries of each layer, see `rlkit2.nn.layer_sizes`.
        guard: floor of <g_f, g_f>.
    """
    parts = []
    for forward, backward in zip(g_f.split_with_sizes([*sizes], 1), g_b.split_with_sizes([*sizes], 1), strict=True):
        c = coefficients(torch.linalg.vecdot(forward, backward), torch.linalg.vecdot(forward, forward), guard)
        parts.append(torch.addcmul(backward, forward, c.unsqueeze(1), value=-1.0))
    return torch.cat(parts, 1)


def orthogonal_by_sample(
    at_value: Tensor, at_next: Tensor, square: Tensor, product: Tensor, guard: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The cotangent on V(s) that stands for g_f + (g_b - c g_f) with a c per transition, `[S, M, B]`, and metrics.

    A transition's g_f is its cotangent times the gradient of V(s), so c g_f is that same gradient with c times the cotangent: no gradient of a single
    transition is ever made.

    Args:
        at_value, at_next: cotangents on V(s) and V(s'), `[S, M, B]`, of means over heads and batch.
        square, product: <grad V(s), grad V(s)> and <grad V(s), grad V(s')> of every head, `[S, M, B]`.
        guard: floor of <g_f, g_f> of a transition's own objective (its sum over heads).
    """
    count = at_value.shape[2]
    forward, backward = at_value * count, at_next * count
    dot = (forward * backward * product).sum(1, keepdim=True)
    squares = (forward * forward * square).sum(1, keepdim=True)
    c = coefficients(dot, squares, guard)
    return at_value * (1.0 - c), {"projection/coefficient": c.mean((1, 2))}
