"""Losses of generalized-Gaussian TD errors: likelihoods, weights between members and between samples.

For errors d = q - y with scale alpha and shape beta, z = d / alpha, the negative log-likelihood (without its log 2) is

    power:     |z|^beta  + log alpha + lgamma(1 + 1/beta)
    official:  beta |z|  + log alpha + lgamma(1 + 1/beta)

The first is the generalized Gaussian; the second is what the released code of the paper minimises (with alpha = 1). They agree at beta = 1 only: the
shape that minimises the second never exceeds 2.1663, whatever the data, and does not estimate the shape of the errors.

Source: Kim et al., "Generalized Gaussian Temporal Difference Error for Uncertainty-aware Reinforcement Learning" (arXiv 2408.02295) and its released
code; batch inverse-variance weights after Mai et al., "Sample Efficient Deep RL via Uncertainty Estimation" (ICLR 2022); the best biased
variance estimator after Searls and Intarapanich, "A note on an estimator for the variance" (The American Statistician, 1990).

All functions take torch tensors or numpy arrays in float32 or float64 and return the kind they were given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr
from torch import Tensor

from rlkit2.errors import ConfigError
from rlkit2.guard import guarded

Array = TypeVar("Array", Tensor, NDArray[np.floating])

Form = Literal["power", "official"]
FORMS: tuple[str, ...] = get_args(Form)
LARGEST_EXPONENT = 30.0  # |z|^beta = e^30: beyond it float32 is near overflow, and the gradient of an outlier is cut
VARIANCE_FLOOR = 1e-6  # of the released code


def _on_arrays(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """Let a function of tensors take numpy arrays too; arrays give an array."""

    @wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        if not any(isinstance(value, np.ndarray) for value in given):
            return function(*args, **kwargs)

        def tensor(value: Any) -> Any:
            return torch.as_tensor(value) if isinstance(value, np.ndarray) else value

        return function(*map(tensor, args), **{name: tensor(value) for name, value in kwargs.items()}).numpy()

    return either


@guarded()
@_on_arrays
def ggd_nll(
    values: Tensor,
    targets: Tensor,
    *,
    shape: Tensor,
    form: str = "power",
    log_scale: Tensor | None = None,
    reduction: str = "mean",
    smoothing: float = 0.0,
) -> Tensor:
    """Negative log-likelihood of `targets` around `values`, without its log 2; differentiable in everything but at d = 0, where it counts as flat.

    Args:
        values, targets: any broadcastable shapes, such as `[S, M, B]`.
        shape: beta > 0.
        form: "power" or "official" (see the module).
        log_scale: log alpha; None is alpha = 1.
        reduction: "none", "mean" or "sum", over all elements.
        smoothing: epsilon in log|z| = log(z^2 + epsilon^2) / 2 (power form): bounds the slope at d = 0, which is infinite for beta < 1.
            1e-3 changes values by less than 6e-5 for |z| > 0.03.

    In the power form the exponent beta log|z| is cut at 30, so float32 neither overflows nor lets one error dominate.

    Raises:
        ConfigError: unknown form or reduction.
    """
    if form not in FORMS:
        raise ConfigError(f"unknown form {form!r}; choose one of: {', '.join(FORMS)}")
    standardized = (values - targets) if log_scale is None else (values - targets) * torch.exp(-log_scale)
    if form == "official":
        penalty = shape * standardized.abs()
    else:
        penalty = _smooth_power(standardized, shape, smoothing)
    loss = penalty + torch.lgamma(1.0 + shape.reciprocal())
    return _reduce(loss if log_scale is None else loss + log_scale, reduction)


def _smooth_power(x: Tensor, exponent: Tensor, smoothing: float) -> Tensor:
    if smoothing > 0.0:
        largest = 0.5 * math.sqrt(
            torch.finfo(x.dtype).max
        )  # the square of what is larger overflows, and its gradient is not a number
        x = x.clamp(-largest, largest)
        log = 0.5 * torch.log(x.square() + smoothing * smoothing)
        return torch.exp((exponent * log).clamp(max=LARGEST_EXPONENT))
    zero = x == 0.0
    log = torch.where(zero, 1.0, x.abs()).log()
    return torch.where(zero, 0.0, torch.exp((exponent * log).clamp(max=LARGEST_EXPONENT)))


@guarded()
@_on_arrays
def gaussian_nll(
    values: Tensor, targets: Tensor, variance: Tensor, *, floor: float = VARIANCE_FLOOR, reduction: str = "mean"
) -> Tensor:
    """(log v + d^2 / v) / 2 with v = max(variance, floor), the floor unseen by the gradient.

    Arguments and errors as for `ggd_nll`; `variance` is positive.
    """
    bounded = variance + (variance.clamp(min=floor) - variance).detach()
    return _reduce(0.5 * (bounded.log() + (values - targets).square() / bounded), reduction)


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    if reduction not in ("mean", "sum"):
        raise ConfigError(f"unknown reduction {reduction!r}; choose none, mean or sum")
    return loss.mean() if reduction == "mean" else loss.sum()


# Weights between members


@guarded()
@_on_arrays
def shape_weights(shape: Tensor, axis: int = -2) -> Tensor:
    """beta / sum of beta over the members on `axis` (default: M of `[S, M, B]`): they sum to one, and 1 for a single member.

    The gradient flows through them, as in the released code; normalised over members it does not move the shape's fixed point.
    """
    return shape / shape.sum(axis, keepdim=True)


# Weights between samples, on the last axis


@guarded()
@_on_arrays
def effective_sample_size(weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 over the last axis: `[..., B]` -> `[...]`, between 1 and B."""
    scaled = weights / weights.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return scaled.sum(-1).square() / scaled.square().sum(-1)


@guarded()
@_on_arrays
@torch.no_grad()
def batch_inverse_variance(variance: Tensor, xi: Tensor | float = 0.0) -> Tensor:
    """Weights 1 / (variance + xi) scaled to a mean of one over the last axis, without gradient.

    Args:
        variance: `[..., B]`, not negative.
        xi: `[...]` or a number, added to every variance: the larger, the more equal the weights.

    The released code scales them to a sum of one and then averages over the batch, which divides the term's weight by B once more.
    """
    total = variance + (xi.to(variance).unsqueeze(-1) if isinstance(xi, Tensor) else xi)
    total = total.clamp(min=torch.finfo(variance.dtype).tiny)
    weights = total.amin(-1, keepdim=True) / total  # relative to the largest: no overflow
    return weights / weights.mean(-1, keepdim=True)


@guarded()
@_on_arrays
@torch.no_grad()
def solve_xi(variance: Tensor, min_effective: float) -> Tensor:
    """The smallest xi >= 0 at which the weights 1 / (variance + xi) have an effective sample size of `min_effective`, by bisection of log xi.

    Args:
        variance: `[..., B]`, not negative.
        min_effective: wanted effective sample size, cut to B - 1 (xi would grow without bound beyond).

    Returns:
        `[...]`, 0 where none is needed. The effective size at the result is at least the wanted one, up to rounding.
    """
    wanted = min(float(min_effective), variance.shape[-1] - 1.0)
    largest = variance.amax(-1).clamp(min=torch.finfo(variance.dtype).tiny)
    smallest = torch.maximum(variance.amin(-1), 1e-12 * largest)
    low, high = (1e-9 * smallest).log(), (largest * variance.shape[-1]).log()
    for _ in range(64 if variance.dtype == torch.float64 else 36):
        middle = 0.5 * (low + high)
        short = effective_sample_size(batch_inverse_variance(variance, middle.exp())) < wanted
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    enough = effective_sample_size(batch_inverse_variance(variance)) >= wanted
    return torch.where(enough, 0.0, high.exp())


@guarded()
def inverse_variance_weights(variance: Array, min_effective: float) -> Array:
    """`batch_inverse_variance` at the xi of `solve_xi`: as unequal as an effective sample size of `min_effective` allows."""
    weights: Array = batch_inverse_variance(variance, solve_xi(variance, min_effective))
    return weights


@guarded()
@_on_arrays
def mbbe_variance(errors: Tensor, axis: int = -1, *, ddof: int = 1, floor: float = 0.0) -> Tensor:
    """The multiple of the sample variance with the least mean squared error, s^2 / (kappa/n + (n+1)/(n-1)).

    kappa is the sample excess kurtosis over the same n values, corrected for bias when n > 3 (scipy's `bias=False`), 0 where all are equal.

    Args:
        errors: any shape with n >= 2 values along `axis`.
        axis: the axis reduced, such as the members'.
        ddof: of s^2; the released code has 0, which cancels in normalised weights.
        floor: least result.

    Raises:
        ConfigError: a single value along `axis`.
    """
    count = errors.shape[axis]
    if count < 2:
        raise ConfigError("a variance between members needs at least two of them; raise num_critics")
    deviation = errors - errors.mean(axis, keepdim=True)
    second = deviation.square().mean(axis, keepdim=True)
    equal = second == 0.0
    standardized = deviation * torch.where(equal, 1.0, second).rsqrt()
    kurtosis = torch.where(equal.squeeze(axis), 0.0, standardized.square().square().mean(axis) - 3.0)
    if count > 3:
        corrected = (count - 1) / ((count - 2) * (count - 3)) * ((count + 1) * kurtosis + 6.0)
        kurtosis = torch.where(equal.squeeze(axis), 0.0, corrected)
    variance = second.squeeze(axis) * (count / (count - ddof))
    return (variance / (kurtosis / count + (count + 1) / (count - 1))).clamp(min=floor)


@guarded()
def expected_minimum(count: int) -> float:
    """Minus the expected minimum of `count` standard normal numbers: 0.56 (2), 1.16 (5), 1.54 (10), 2.25 (50).

    mean - k std with this k matches the minimum over an ensemble in expectation.
    """
    x = np.linspace(-10.0, 10.0, 4001)
    density = np.exp(-0.5 * x**2) / math.sqrt(2.0 * math.pi)
    return float(np.sum(x * count * density * ndtr(x) ** (count - 1)) * (x[1] - x[0]))
