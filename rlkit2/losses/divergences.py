"""f-divergences for dual (DICE) objectives, each with its conjugate over non-negative weights.

For convex f with f(1) = 0 (up to a linear term), f*(y) = max over w >= 0 of w y - f(w), and (f*)'(y) = max(0, (f')^-1(y)) is the maximising weight.

| name | f(w) | f*(R) | (f*)'(R) | policy weight |
|---|---|---|---|---|
| `pearson` | (w - 1)^2 | R + R^2/4 above -2, else -1 | max(0, R/2 + 1) | max(0, R) |
| `rkl` | w log w | exp(R - 1) | exp(R - 1) | exp(R - 1) |
| `soft_chi2` | w log w - w + 1 below 1, else (w - 1)^2/2 | exp(R) - 1 below 0, else R + R^2/2 | exp(R) below 0, else 1 + R | (f*)' |
| `alpha` | (w^a - a w + a - 1)/(a (a - 1)) | ((1 + (a - 1) R)_+^(a/(a-1)) - 1)/a | (1 + (a - 1) R)_+^(1/(a-1)) | (f*)' |

The policy weight of `pearson` and `rkl` is that of Mao et al., "ODICE" (ICLR 2024); `soft_chi2` is the f of Lee et al., "OptiDICE" (ICML 2021).
Divergences whose conjugate is infinite beyond a bound (total variation, squared Hellinger, Jensen-Shannon) are left out: an unconstrained
value function leaves their domain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlkit2.errors import ConfigError
from rlkit2.guard import guarded

_ALIASES = {"Pearson_chi_square": "pearson", "Reverse_KL": "rkl"}
Divergence = Literal["pearson", "rkl", "soft_chi2", "alpha", "Pearson_chi_square", "Reverse_KL"]
DIVERGENCES: tuple[str, ...] = tuple(name for name in get_args(Divergence) if name not in _ALIASES)
WeightKind = Literal["positive_residual", "conjugate_grad"]
WEIGHT_KINDS: tuple[str, ...] = get_args(WeightKind)

Array = TypeVar("Array", Tensor, NDArray[np.floating])


@guarded()
def f_conjugate(name: str, residual: Array, *, alpha: float = 1.5) -> Array:
    """f*(R), element-wise and differentiable.

    Args:
        name: one of `DIVERGENCES` (or the aliases `Pearson_chi_square`, `Reverse_KL`).
        residual: any shape, torch tensor or numpy array; the result has its kind, shape and dtype.
        alpha: order of "alpha", in (1, 2].

    Raises:
        ConfigError: (a `ValueError`) unknown name, or alpha out of range.
    """
    name = resolve_divergence(name, alpha)

    def conjugate(r: Tensor) -> Tensor:
        if name == "pearson":
            r = r.clamp(min=-2.0)
            return torch.addcmul(r, r, r, value=0.25)
        if name == "rkl":
            return torch.exp(r - 1.0)
        if name == "soft_chi2":
            positive = r.clamp(min=0.0)
            return torch.where(r < 0.0, torch.expm1(r.clamp(max=0.0)), positive + positive * positive / 2.0)
        return ((1.0 + (alpha - 1.0) * r).clamp(min=0.0) ** (alpha / (alpha - 1.0)) - 1.0) / alpha

    return _on_tensors(conjugate, residual)


@guarded()
def f_conjugate_grad(name: str, residual: Array, *, alpha: float = 1.5) -> Array:
    """(f*)'(R), the optimal weight; arguments and errors as for `f_conjugate`."""
    name = resolve_divergence(name, alpha)

    def gradient(r: Tensor) -> Tensor:
        if name == "pearson":
            return torch.rsub(r, 1.0, alpha=-0.5).clamp(min=0.0)  # max(0, R/2 + 1)
        if name == "rkl":
            return torch.exp(r - 1.0)
        if name == "soft_chi2":
            return torch.where(r < 0.0, torch.exp(r.clamp(max=0.0)), 1.0 + r)
        return (1.0 + (alpha - 1.0) * r).clamp(min=0.0) ** (1.0 / (alpha - 1.0))

    return _on_tensors(gradient, residual)


@guarded()
def policy_weight(
    name: str, residual: Array, clamp: float | None = 100.0, *, kind: str = "positive_residual", alpha: float = 1.5
) -> Array:
    """Weight of a transition in the policy's likelihood, without gradient.

    Args:
        name, residual, alpha: as for `f_conjugate`.
        clamp: upper bound; None for none.
        kind: "positive_residual", the released choice, is max(0, R) for `pearson` and (f*)'(R) for the rest; "conjugate_grad" is (f*)'(R) for all.

    Raises:
        ConfigError: (a `ValueError`) unknown name or kind, or alpha out of range.
    """
    name = resolve_divergence(name, alpha)
    if kind not in WEIGHT_KINDS:
        raise ConfigError(f"unknown weight {kind!r}; choose one of: {', '.join(WEIGHT_KINDS)}")

    def weight(r: Tensor) -> Tensor:
        r = r.detach()
        raw = (
            r.clamp(min=0.0)
            if name == "pearson" and kind == "positive_residual"
            else f_conjugate_grad(name, r, alpha=alpha)
        )
        return raw if clamp is None else raw.clamp(max=clamp)

    return _on_tensors(weight, residual)


@guarded()
def f_value(name: str, weight: Array, *, alpha: float = 1.5) -> Array:
    """f(w), infinite for w < 0; arguments and errors as for `f_conjugate`."""
    name = resolve_divergence(name, alpha)

    def value(w: Tensor) -> Tensor:
        if name == "pearson":
            f = (w - 1.0) ** 2
        elif name == "rkl":
            f = torch.xlogy(w, w)
        elif name == "soft_chi2":
            f = torch.where(w < 1.0, torch.xlogy(w, w) - w + 1.0, (w - 1.0) ** 2 / 2.0)
        else:
            f = (w.clamp(min=0.0) ** alpha - alpha * w + alpha - 1.0) / (alpha * (alpha - 1.0))
        return torch.where(w < 0.0, torch.inf, f)

    return _on_tensors(value, weight)


def resolve_divergence(name: str, alpha: float = 1.5) -> str:
    """The canonical name behind `name`.

    Raises:
        ConfigError: (a `ValueError`) unknown name, or alpha out of range for "alpha".
    """
    name = _ALIASES.get(name, name)
    if name not in DIVERGENCES:
        raise ConfigError(f"unknown divergence {name!r}; choose one of: {', '.join(DIVERGENCES)}")
    if name == "alpha" and not 1.0 < alpha <= 2.0:
        raise ConfigError(f"alpha must lie in (1, 2], not {alpha}")
    return name


def _on_tensors(function: Callable[[Tensor], Tensor], x: Array) -> Array:
    if isinstance(x, Tensor):
        return function(x)
    array = np.asarray(x)
    return function(torch.from_numpy(array.reshape(-1))).numpy().reshape(array.shape).astype(array.dtype, copy=False)
