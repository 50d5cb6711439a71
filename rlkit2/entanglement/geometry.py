r"""Gradient geometry of preference pairs: angles, thresholds, rates, regimes, and what a whole batch does.

With `g_w, g_l` the gradients of the chosen's and the rejected's log-probability and `(d_w, d_l)` the coefficients of a margin loss,
a small gradient-descent step on one pair changes them at the rates

    da/deta = d_w |g_w|^2 - d_l <g_w, g_l>,        db/deta = d_w <g_w, g_l> - d_l |g_l|^2

(Yuan et al., "A Common Pitfall of Margin-based Language Model Alignment: Gradient Entanglement", ICLR 2025, for DPO; the
same algebra for every loss with two coefficients). With `u = d_w / d_l` the chosen rises while `<g_w, g_l> < u |g_w|^2` and the
rejected falls while `<g_w, g_l> < |g_l|^2 / u`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlkit2.errors import ConfigError

REGIMES = ("ideal", "both_down", "both_up", "inverted", "still", "undecided")
"""What one step does to a pair, by code: 0 chosen up and rejected down, 1 chosen not up, 2 rejected not down, 3 chosen down and rejected
up (impossible with positive coefficients, by Cauchy-Schwarz), 4 neither moves at all (an inactive hinge), 5 a rate is smaller than its error, so
that rounding or a sketch's chance would decide."""

Rates = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(rate, size of its terms) of the chosen and of the rejected."""

ROUNDING = 8.0
"""Units in the last place that the error of an inner product of given numbers is taken to have, at most, relative to the two norms."""


@dataclass(frozen=True)
class GradientGeometry:
    """Inner products of the two gradients of every pair, `[..., P]` (numpy or torch; the kind that is given comes back).

    Attributes:
        inner: `<g_w, g_l>`.
        sqnorm_w: `|g_w|^2`.
        sqnorm_l: `|g_l|^2`.
        gap_w: `<g_w, g_w - g_l>` where it was measured by itself; near the threshold it keeps the digits that `sqnorm_w - inner` loses.
        gap_l: `<g_l, g_w - g_l>`, likewise.
        parts: the same numbers by group of parameters (they add up to the whole).
        method: how it was measured; "head" is a proxy that overlooks entanglement.
        relative_error: standard error of an inner product in units of the product of the two norms. Numbers that are given without one are taken
            as exact: a rate within their rounding is 0. With one, such a rate is not known.
        parameters: which parameters the gradients are of, in words.

    Raises:
        ConfigError: shapes differ, a number is NaN or infinite, or a squared norm is negative.
    """

    inner: Any
    sqnorm_w: Any
    sqnorm_l: Any
    gap_w: Any = None
    gap_l: Any = None
    parts: Mapping[str, GradientGeometry] = field(default_factory=dict)
    method: str = "given"
    relative_error: float | None = None
    parameters: str = ""
    from_numpy: bool = field(init=False, default=False)
    exact: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "from_numpy", not isinstance(self.inner, Tensor))
        shape = None
        for name in ("inner", "sqnorm_w", "sqnorm_l", "gap_w", "gap_l"):
            if getattr(self, name) is None:
                continue
            tensor = torch.as_tensor(getattr(self, name))
            tensor = tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())
            shape = tensor.shape if shape is None else shape
            if tensor.shape != shape:
                raise ConfigError(f"{name} has shape {tuple(tensor.shape)} but inner {tuple(shape)}: give one per pair")
            if not bool(tensor.isfinite().all()):
                raise ConfigError(
                    f"{name} holds NaN or infinite values: drop pairs whose log-probability is not finite, or measure in float32"
                )
            if name.startswith("sqnorm") and bool((tensor < 0).any()):
                raise ConfigError(f"{name} is a squared norm and must be at least 0")
            object.__setattr__(self, name, np.asarray(tensor) if self.from_numpy else tensor)
        object.__setattr__(self, "exact", self.relative_error is None)
        if self.relative_error is None:
            object.__setattr__(self, "relative_error", ROUNDING * torch.finfo(torch.as_tensor(self.inner).dtype).eps)

    # --- angles --------------------------------------------------------------------------------------------------------------

    @property
    def cosine(self) -> Any:
        """Cosine of the angle between the two gradients; 0 where one of them vanishes."""
        ip, w2, l2 = self._tensors()
        norm = w2.sqrt() * l2.sqrt()
        return self._as_given(torch.where(norm > 0, ip / torch.where(norm > 0, norm, 1), 0).clamp(-1, 1))

    @property
    def score(self) -> Any:
        """`<g_w, g_l> / min(|g_w|^2, |g_l|^2)`: above 1 one of the two log-probabilities goes the wrong way under losses with `d_w = d_l`."""
        ip, w2, l2 = self._tensors()
        return self._as_given(_ratio(ip, torch.minimum(w2, l2)))

    def scores(self) -> dict[str, Any]:
        """`cosine`, `c_w = <g_w, g_l>/|g_w|^2`, `c_l = <g_w, g_l>/|g_l|^2` and `score` (the larger where the inner product is positive).

        Under DPO and every other loss with `d_w = d_l > 0` the chosen falls where `c_w > 1` and the rejected rises where `c_l > 1`.
        """
        ip, w2, l2 = self._tensors()
        return {
            "cosine": self.cosine,
            "c_w": self._as_given(_ratio(ip, w2)),
            "c_l": self._as_given(_ratio(ip, l2)),
            "score": self.score,
        }

    # --- what a loss does ----------------------------------------------------------------------------------------------------

    def rates(self, d_w: Any, d_l: Any) -> tuple[Any, Any]:
        """Change of the chosen's and the rejected's log-probability per unit of learning rate, each `[..., P]`."""
        (rate_w, _), (rate_l, _) = self._rates(d_w, d_l)
        return self._as_given(rate_w), self._as_given(rate_l)

    def margin_rate(self, d_w: Any, d_l: Any) -> Any:
        """Rate of `log pi(y_w) - log pi(y_l)`: `k |g_w - g_l|^2` where `d_w = d_l = k`; may be negative otherwise."""
        (rate_w, _), (rate_l, _) = self._rates(d_w, d_l)
        return self._as_given(rate_w - rate_l)

    def regime(self, d_w: Any, d_l: Any, *, standard_errors: float = 2.0) -> Any:
        """Code of what one step does to each pair, `[..., P]` integers; see `REGIMES`.

        Measured rates that are smaller than their error bound (`standard_errors` times `relative_error` times the size of their terms) make the
        pair "undecided"; of exact numbers, rates within rounding count as 0.
        """
        rates = self._rates(d_w, d_l)
        within = self._within_error(rates, standard_errors)
        sign_w, sign_l = (
            torch.where(small, 0, rate.sign()).int() for (rate, _), small in zip(rates, within, strict=True)
        )
        up, down = sign_w > 0, sign_l < 0
        code = torch.full_like(sign_w, 4)
        code[(sign_w < 0) & (sign_l > 0)] = 3
        code[(up & ~down) | ((sign_w == 0) & (sign_l > 0))] = 2
        code[(down & ~up) | ((sign_w < 0) & (sign_l == 0))] = 1
        code[up & down] = 0
        if not self.exact:
            code[within[0] | within[1]] = 5
        return self._as_given(code)

    def undecided(self, d_w: Any, d_l: Any, *, standard_errors: float = 2.0) -> Any:
        """Where a rate is smaller than the method's error, so that the regime is not known: `[..., P]` booleans."""
        within = self._within_error(self._rates(d_w, d_l), standard_errors)
        return self._as_given(within[0] | within[1])

    def _within_error(self, rates: Rates, standard_errors: float) -> tuple[Tensor, Tensor]:
        """Which of the two rates is smaller than its error; a rate without terms (both coefficients 0) has none."""
        assert self.relative_error is not None
        factor = standard_errors * self.relative_error
        found = [(bound > 0) & (rate.abs() <= factor * bound) for rate, bound in rates]
        return found[0], found[1]

    def thresholds(self, d_w: Any, d_l: Any) -> tuple[Any, Any]:
        """`(u |g_w|^2, |g_l|^2 / u)` with `u = d_w / d_l`: the inner product must stay below both (positive coefficients only)."""
        _, w2, l2 = self._tensors()
        c_w, c_l = self._coefficients(d_w, d_l)
        return self._as_given(c_w / c_l * w2), self._as_given(c_l / c_w * l2)

    def pngd_weights(self) -> tuple[Any, Any]:
        """`(1/|g_w|, 1/|g_l|)`: the coefficients of pairwise normalised gradient descent, under which every pair with cosine < 1 is ideal.

        Used as `rates(*pngd_weights())` they give `|g_w| (1 - cos)` and `-|g_l| (1 - cos)`. A vanishing gradient has weight 0.
        """
        _, w2, l2 = self._tensors()
        w, n = (torch.where(x > 1e-24, x.clamp(min=1e-24).rsqrt(), 0) for x in (w2, l2))
        return self._as_given(w), self._as_given(n)

    # --- plumbing ------------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(self.inner.shape[-1])

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.as_tensor(self.inner), torch.as_tensor(self.sqnorm_w), torch.as_tensor(self.sqnorm_l)

    def _coefficients(self, d_w: Any, d_l: Any) -> tuple[Tensor, Tensor]:
        ip = self._tensors()[0]
        found = [torch.as_tensor(d, dtype=ip.dtype, device=ip.device).expand(ip.shape) for d in (d_w, d_l)]
        return found[0], found[1]

    def _rates(self, d_w: Any, d_l: Any) -> Rates:
        """Each rate, in the one of two ways to write it that cancels less, with the size of the terms that its error is relative to.

        Subtracting gradients before they are multiplied keeps digits of the rate, but not those that the gradients themselves lack: the error
        stays relative to their norms, unless the numbers are given as they are.
        """
        ip, w2, l2 = self._tensors()
        c_w, c_l = self._coefficients(d_w, d_l)
        norms = w2.sqrt() * l2.sqrt()
        rate_w, bound_w = c_w * w2 - c_l * ip, c_w.abs() * w2 + c_l.abs() * norms
        rate_l, bound_l = c_w * ip - c_l * l2, c_w.abs() * norms + c_l.abs() * l2
        if self.gap_w is not None and self.gap_l is not None:
            gap_w, gap_l = torch.as_tensor(self.gap_w), torch.as_tensor(self.gap_l)
            apart = (gap_w - gap_l).clamp(min=0).sqrt()  # |g_w - g_l|
            near_w = c_l.abs() * w2.sqrt() * apart + (c_w - c_l).abs() * w2
            near_l = c_w.abs() * l2.sqrt() * apart + (c_w - c_l).abs() * l2
            rate_w = torch.where(near_w < bound_w, c_l * gap_w + (c_w - c_l) * w2, rate_w)
            rate_l = torch.where(near_l < bound_l, c_w * gap_l + (c_w - c_l) * l2, rate_l)
            if self.exact:
                bound_w, bound_l = torch.minimum(near_w, bound_w), torch.minimum(near_l, bound_l)
        return (rate_w, bound_w), (rate_l, bound_l)

    def _as_given(self, tensor: Tensor) -> Any:
        return np.asarray(tensor) if self.from_numpy else tensor


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / torch.where(denominator > 0, denominator, 1), 0)


# --- the batch -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchRates:
    """Rates of all log-probabilities under one step on the mean loss of P pairs, `[..., P]` each, split by where they come from.

    `own_*` is what a pair's own gradients do, `cross_*` what all other pairs' gradients do to it.
    """

    own_w: Any
    own_l: Any
    cross_w: Any
    cross_l: Any

    @property
    def chosen(self) -> Any:
        """Rate of the chosen log-probabilities."""
        return self.own_w + self.cross_w

    @property
    def rejected(self) -> Any:
        """Rate of the rejected log-probabilities."""
        return self.own_l + self.cross_l


def batch_rates(gram: Any, d_w: Any, d_l: Any) -> BatchRates:
    """What a gradient-descent step on the mean loss does to every log-probability: `G c` with `c = (d_w, -d_l)/P`.

    Args:
        gram: inner products of all gradients, `[..., 2P, 2P]`, the P chosen first.
        d_w, d_l: coefficients, `[..., P]`.

    Raises:
        ConfigError: the sizes do not fit.
    """
    numpy = not isinstance(gram, Tensor)
    matrix = torch.as_tensor(gram)
    c_w, c_l = (torch.as_tensor(d, dtype=matrix.dtype, device=matrix.device) for d in (d_w, d_l))
    pairs = c_w.shape[-1] if c_w.ndim else 0
    if not pairs or matrix.shape[-2:] != (2 * pairs, 2 * pairs) or c_l.shape != c_w.shape:
        raise ConfigError(
            f"a Gram matrix of P pairs is [2P, 2P] with d_w and d_l [P]; got {tuple(matrix.shape)}, {tuple(c_w.shape)}, {tuple(c_l.shape)}"
        )
    step = torch.cat([c_w, -c_l], -1) / pairs
    total = (matrix @ step.unsqueeze(-1)).squeeze(-1)
    to_itself = matrix.diagonal(dim1=-2, dim2=-1) * step
    between = matrix.diagonal(offset=pairs, dim1=-2, dim2=-1)  # <g_w, g_l> of each pair
    own_w = to_itself[..., :pairs] + between * step[..., pairs:]
    own_l = to_itself[..., pairs:] + between * step[..., :pairs]
    found = (own_w, own_l, total[..., :pairs] - own_w, total[..., pairs:] - own_l)
    return BatchRates(*(np.asarray(x) if numpy else x for x in found))


def predicted_change(gram: Any, d_w: Any, d_l: Any, lr: float) -> Any:
    """First-order change of all log-probabilities after one gradient-descent step on the mean loss: `[..., 2P]`, the chosen first.

    The error is of order `lr^2`. Under Adam, clipping or weight decay use `update_alignment` with the parameters' real change.

    Raises:
        ConfigError: the sizes do not fit.
    """
    rates = batch_rates(gram, d_w, d_l)
    if isinstance(gram, Tensor):
        return lr * torch.cat([rates.chosen, rates.rejected], -1)
    return lr * np.concatenate([rates.chosen, rates.rejected], -1)
