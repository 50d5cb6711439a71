"""The generalized Gaussian (generalized normal) distribution, its estimators and equal-weight mixtures of it.

    p(x) = shape / (2 scale Gamma(1 / shape)) exp(-(|x - loc| / scale)^shape)

Shape 1 is Laplace, 2 is Normal with standard deviation scale / sqrt(2), infinity is uniform on [loc - scale, loc + scale]; below 2 the tails
are heavy. Every Gamma(k / shape) is written through Gamma(1 + k / shape), which does not cancel for large shapes, so float32 is enough.

Source: Nadarajah, "A generalized normal distribution" (Journal of Applied Statistics 32, 2005); moments and maximum likelihood also in
Varanasi and Aazhang, "Parametric generalized Gaussian density estimation" (JASA 86, 1989).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.utils import broadcast_all

from rlkit2.errors import ConfigError

Array = TypeVar("Array", Tensor, NDArray[np.floating])
Value = Tensor | NDArray[np.floating] | float

SHAPE_RANGE = (0.02, 500.0)  # where the estimators look for the shape
_BISECTIONS = 64  # of the range of log(shape): to the last digit of float64


def _on_arrays(method: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    """Let a method of tensors take numpy arrays and numbers too; arrays give arrays."""

    @functools.wraps(method)
    def either(self: Any, value: Any) -> Any:
        if isinstance(value, Tensor):
            return method(self, value)
        result = method(self, torch.as_tensor(value, dtype=None if isinstance(value, np.ndarray) else torch.float64))
        return result.numpy() if isinstance(value, np.ndarray) else result

    return either


class _Finite(constraints.Constraint):
    """Finite numbers, which torch's `real` and `positive` do not ask for: an infinite scale has no density."""

    def __init__(self, *, positive: bool = False) -> None:
        self.positive = positive

    def check(self, value: Tensor) -> Tensor:
        return value.isfinite() & (value > 0.0) if self.positive else value.isfinite()

    def __repr__(self) -> str:
        return "a finite positive number" if self.positive else "a finite number"


class GeneralizedNormal(Distribution):
    """GGD(loc, scale, shape); the parameters broadcast.

    Args:
        loc: location (mean, median and mode), any real number.
        scale: positive; |x - loc| / scale is what is raised to the shape.
        shape: positive; 1 Laplace, 2 Normal.

    Tensors or numpy arrays in float32 or float64 keep their dtype (the wider of two); whole numbers and plain numbers alone count
    as float64. `log_prob` and `rsample` are differentiable
    in all parameters (`log_prob` has gradient 0 at its kink x = loc). `cdf`, `sf`, `icdf` and `isf` are computed in float64
    without gradient (the incomplete gamma function has none in its first argument) and are exact in the tails.

    Raises:
        ValueError: a parameter out of range, or not finite.
    """

    arg_constraints = {  # noqa: RUF012 (as torch.distributions has it)
        "loc": _Finite(),
        "scale": _Finite(positive=True),
        "shape": _Finite(positive=True),
    }
    support = constraints.real
    has_rsample = True

    def __init__(self, loc: Value, scale: Value, shape: Value, validate_args: bool | None = None) -> None:
        given = [torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in (loc, scale, shape)]
        tensors = [value for value in given if isinstance(value, Tensor)]
        dtype = functools.reduce(torch.promote_types, (value.dtype for value in tensors)) if tensors else torch.float64
        dtype = dtype if dtype.is_floating_point else torch.float64  # whole numbers are rounded by no density
        device = tensors[0].device if tensors else None
        parameters = [torch.as_tensor(value, dtype=dtype, device=device) for value in given]
        self.loc, self.scale, self.shape = broadcast_all(*parameters)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: GeneralizedNormal | None = None) -> GeneralizedNormal:
        """The same distribution with parameters expanded to `batch_shape`."""
        size = torch.Size(batch_shape)
        loc, scale, shape = (value.expand(size) for value in (self.loc, self.scale, self.shape))
        expanded = GeneralizedNormal(loc, scale, shape, validate_args=False)  # they are checked already
        expanded._validate_args = self._validate_args
        return expanded

    # Moments

    @property
    def mean(self) -> Tensor:
        """The location."""
        return self.loc

    @property
    def mode(self) -> Tensor:
        """The location."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """scale^2 Gamma(3 / shape) / Gamma(1 / shape)."""
        return self.scale.square() * unit_variance(self.shape)

    @property
    def kurtosis(self) -> Tensor:
        """Fourth standardised moment, 3 for a Normal (`excess_kurtosis` is 3 less); a function of the shape alone."""
        inverse = self.shape.reciprocal()
        return 1.8 * torch.exp(
            torch.lgamma(1.0 + 5.0 * inverse) + torch.lgamma(1.0 + inverse) - 2.0 * torch.lgamma(1.0 + 3.0 * inverse)
        )

    @property
    def excess_kurtosis(self) -> Tensor:
        """`kurtosis` - 3: positive for shapes below 2, at least -1.2."""
        return self.kurtosis - 3.0

    @property
    def mean_absolute_deviation(self) -> Tensor:
        """E|x - loc| = scale Gamma(2 / shape) / Gamma(1 / shape)."""
        inverse = self.shape.reciprocal()
        return 0.5 * self.scale * torch.exp(torch.lgamma(1.0 + 2.0 * inverse) - torch.lgamma(1.0 + inverse))

    @property
    def fisher_information(self) -> Tensor:
        """Fisher information of the location, shape^2 Gamma(2 - 1/shape) / (scale^2 Gamma(1/shape)); NaN for shapes up to 1/2."""
        inverse = self.shape.reciprocal()
        information = self.shape * torch.exp(torch.lgamma(2.0 - inverse) - torch.lgamma(1.0 + inverse))
        return torch.where(self.shape > 0.5, information / self.scale.square(), torch.nan)

    def entropy(self) -> Tensor:
        """Differential entropy in nats."""
        inverse = self.shape.reciprocal()
        return inverse + torch.log(2.0 * self.scale) + torch.lgamma(1.0 + inverse)

    # Density, distribution function, samples

    @_on_arrays
    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density at `value`, which broadcasts with the parameters."""
        if self._validate_args:
            self._validate_sample(value)
        standardized = (value - self.loc) / self.scale
        return -(abs_power(standardized, self.shape) + log_normalizer(self.shape) + self.scale.log())

    @_on_arrays
    @torch.no_grad()
    def cdf(self, value: Tensor) -> Tensor:
        """P(x <= value)."""
        return self._tail(-1.0, value)

    @_on_arrays
    @torch.no_grad()
    def sf(self, value: Tensor) -> Tensor:
        """P(x > value), to full relative precision far out in the upper tail."""
        return self._tail(1.0, value)

    def _tail(self, side: float, value: Tensor) -> Tensor:
        dtype = torch.result_type(value, self.loc)
        loc, scale, shape, at = (t.double() for t in (self.loc, self.scale, self.shape, value))
        standardized = side * (at - loc) / scale
        power = abs_power(standardized, shape)
        inverse = shape.reciprocal().expand_as(power)
        # Around the median the power underflows for large shapes: there the leading term of the series is exact.
        near = power < 1e-17
        middle = standardized.abs() * torch.exp(-torch.lgamma(1.0 + inverse))
        outside = 0.5 * torch.where(near, 1.0 - middle, torch.special.gammaincc(inverse, power))
        inside = 0.5 + 0.5 * torch.where(near, middle, torch.special.gammainc(inverse, power))
        return torch.where(standardized > 0, outside, inside).to(dtype)

    @_on_arrays
    @torch.no_grad()
    def icdf(self, value: Tensor) -> Tensor:
        """The quantile at probability `value` in [0, 1]; 0 and 1 give -inf and inf."""
        return self._quantile(value, 1.0)

    @_on_arrays
    @torch.no_grad()
    def isf(self, value: Tensor) -> Tensor:
        """The quantile that is exceeded with probability `value`: exact for tiny upper-tail probabilities."""
        return self._quantile(value, -1.0)

    def _quantile(self, probability: Tensor, sign: float) -> Tensor:
        if self._validate_args and not bool(((probability >= 0.0) & (probability <= 1.0)).all()):
            raise ValueError("probabilities must lie in [0, 1]")
        dtype, p = torch.result_type(probability, self.loc), probability.double()
        halves = (2.0 * torch.minimum(p, 1.0 - p), 2.0 * (p - 0.5).abs())
        outside, inside = (t.cpu().numpy() for t in halves)
        inverse = self.shape.double().reciprocal().cpu().numpy()
        power = np.where(  # each half from the tail that keeps its digits
            outside < 0.5, special.gammainccinv(inverse, outside), special.gammaincinv(inverse, inside)
        )
        near = inside * special.gamma(1.0 + inverse)  # the leading term around the median, where the power underflows
        magnitude = torch.from_numpy(np.where(power > 1e-280, power**inverse, near)).to(p.device)
        return (self.loc + sign * self.scale * torch.sign(p - 0.5) * magnitude).to(dtype)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """loc + scale U Y^(1/shape) with U uniform on (-1, 1) and Y ~ Gamma(1 + 1/shape): exact, and without underflow for large shapes."""
        shape = self._extended_shape(torch.Size(sample_shape))
        inverse = self.shape.reciprocal().expand(shape)
        uniform = 2.0 * torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device) - 1.0
        return self.loc + self.scale * uniform * torch._standard_gamma(1.0 + inverse).pow(inverse)


def abs_power(x: Tensor, exponent: Tensor) -> Tensor:
    """|x|^exponent with gradient 0 at x = 0, where autograd would give NaN for exponents below 1."""
    magnitude = x.abs()
    zero = magnitude == 0.0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, magnitude).pow(exponent))


def log_normalizer(shape: Tensor) -> Tensor:
    """log of the integral of exp(-|x|^shape): log 2 + lgamma(1 + 1/shape)."""
    return math.log(2.0) + torch.lgamma(1.0 + shape.reciprocal())


def unit_variance(shape: Tensor) -> Tensor:
    """Variance at scale 1: Gamma(3/shape) / Gamma(1/shape), smallest (0.3143) at shape 9.115; in float32 at most about 2e30.

    It would leave float32 at shapes below 0.073, which the released code's form allows, and one such row would make a mean infinite.
    """
    inverse = shape.reciprocal()
    most = 0.8 * math.log(torch.finfo(shape.dtype).max)
    return torch.exp((torch.lgamma(1.0 + 3.0 * inverse) - torch.lgamma(1.0 + inverse)).clamp(max=most)) / 3.0


# Estimators


def fit_moments(x: Array, loc: Value = 0.0) -> GeneralizedNormal:
    """Match E|x - loc| and E(x - loc)^2, whose ratio of squares grows with the shape from 0 to 3/4: fast and robust.

    Args:
        x: `[..., n]` samples.
        loc: known location, a number or `[...]`.

    Returns:
        A distribution of batch shape `[...]` in x's dtype; a shape beyond `SHAPE_RANGE` is cut to it.

    Raises:
        ConfigError: no samples, samples that are not finite, or all of them equal to `loc`.
    """
    samples, center, dtype = _centered(x, loc)
    mean_abs = samples.abs().mean(-1)
    target = mean_abs.square() / samples.square().mean(-1)

    def excess(shape: Tensor) -> Tensor:
        inverse = shape.reciprocal()
        logs = [torch.lgamma(1.0 + k * inverse) for k in (1.0, 2.0, 3.0)]
        return 0.75 * torch.exp(2.0 * logs[1] - logs[0] - logs[2]) - target

    shape = _solve_shape(excess, target)
    unit = GeneralizedNormal(torch.zeros_like(shape), torch.ones_like(shape), shape).mean_absolute_deviation
    return _distribution(center, mean_abs / unit, shape, dtype)


def fit_mle(x: Array, loc: Value = 0.0) -> GeneralizedNormal:
    """Maximum likelihood of scale and shape at a known location: the root of the profile score in the shape.

    Arguments, result and errors as for `fit_moments`. At 2000 samples the shape has a standard deviation of about 4 %.
    """
    samples, center, dtype = _centered(x, loc)
    logs, usable = _log_magnitudes(samples)
    count = samples.shape[-1]

    def sums(shape: Tensor) -> tuple[Tensor, Tensor]:
        """log sum |x|^b, and the mean of log|x| under weights |x|^b."""
        weights = torch.where(usable, shape.unsqueeze(-1) * logs, -torch.inf)
        return weights.logsumexp(-1), (weights.softmax(-1) * logs).sum(-1)

    def negative_score(shape: Tensor) -> Tensor:
        log_sum, weighted = sums(shape)
        inverse = shape.reciprocal()
        return -1.0 - torch.digamma(inverse) * inverse + weighted - ((shape / count).log() + log_sum) * inverse

    shape = _solve_shape(negative_score, samples[..., 0])
    scale = torch.exp(((shape / count).log() + sums(shape)[0]) / shape)
    return _distribution(center, scale, shape, dtype)


def fit_shape(x: Array, scale: Value = 1.0, loc: Value = 0.0, *, form: str = "power") -> Array:
    """The shape alone, at a known scale and location.

    Args:
        x: `[..., n]` samples.
        scale, loc: numbers or `[...]`.
        form: "power" is maximum likelihood, mean(|z|^b log|z|) = psi(1 + 1/b) / b^2 with z = (x - loc) / scale; "official" is where the released
            loss of GGD-TD (with b |z| for |z|^b) is stationary, mean|z| = psi(1 + 1/b) / b^2, which never exceeds 2.1663.

    Returns:
        `[...]` of x's kind and dtype.

    Raises:
        ConfigError: as for `fit_moments`, or an unknown form.
    """
    if form not in ("power", "official"):
        raise ConfigError(f"unknown form {form!r}; choose power or official")
    samples, _, dtype = _centered(x, loc)
    samples = samples / torch.as_tensor(scale, dtype=torch.float64).unsqueeze(-1)
    logs, usable = _log_magnitudes(samples)
    mean_abs = samples.abs().mean(-1)

    def slope(shape: Tensor) -> Tensor:
        if form == "official":
            data = mean_abs
        else:
            powers = torch.exp(shape.unsqueeze(-1) * logs) * logs
            data = torch.where(usable, powers, 0.0).mean(-1)
        return data - torch.digamma(1.0 + shape.reciprocal()) / shape.square()

    shape = _solve_shape(slope, mean_abs).to(dtype)
    return shape if isinstance(x, Tensor) else shape.numpy()


def _centered(x: Array, loc: Value) -> tuple[Tensor, Tensor, torch.dtype]:
    samples = torch.as_tensor(x)
    dtype = samples.dtype if samples.is_floating_point() else torch.float64
    if samples.ndim == 0 or samples.shape[-1] == 0:
        raise ConfigError("a fit needs samples of shape [..., n] with n at least 1")
    center = torch.as_tensor(loc, dtype=torch.float64, device=samples.device).expand(samples.shape[:-1])
    samples = samples.double() - center.unsqueeze(-1)
    if not bool(samples.isfinite().all()):
        raise ConfigError("samples are not all finite; remove NaN and infinite values before the fit")
    if bool((samples == 0.0).all(-1).any()):
        raise ConfigError("all samples equal the location, so no scale or shape fits them")
    return samples, center, dtype


def _log_magnitudes(samples: Tensor) -> tuple[Tensor, Tensor]:
    """log|x| (0 where x = 0), and where x is not 0."""
    usable = samples != 0.0
    return torch.where(usable, samples.abs(), 1.0).log(), usable


def _solve_shape(rising: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Where `rising(shape)` passes from negative to positive, by bisection of log(shape) over `SHAPE_RANGE`; an end if it never does."""
    low, high = (torch.full_like(like, math.log(end)) for end in SHAPE_RANGE)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        negative = rising(middle.exp()) < 0.0
        low, high = torch.where(negative, middle, low), torch.where(negative, high, middle)
    return (0.5 * (low + high)).exp()


def _distribution(loc: Tensor, scale: Tensor, shape: Tensor, dtype: torch.dtype) -> GeneralizedNormal:
    return GeneralizedNormal(loc.to(dtype), scale.to(dtype), shape.to(dtype))


# Mixtures of the last batch axis with equal weights: what an ensemble predicts


def mixture_cdf(members: GeneralizedNormal, value: Tensor) -> Tensor:
    """P(x <= value) under the equal-weight mixture of the last batch axis: members `[..., M]`, value `[..., K]` -> `[..., K]`."""
    mean: Tensor = _per_value(members).cdf(value.unsqueeze(-1)).mean(-1)
    return mean


def mixture_icdf(members: GeneralizedNormal, probability: Tensor) -> Tensor:
    """Quantiles of the equal-weight mixture: members `[..., M]`, probability `[K]` in (0, 1) -> `[..., K]`, by bisection."""
    ends: Tensor = _per_value(members).icdf(probability.to(members.loc).unsqueeze(-1)).double()
    low, high = ends.amin(-1), ends.amax(-1)  # the mixture's quantile lies between its members'
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        below = mixture_cdf(members, middle) < probability
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (0.5 * (low + high)).to(members.loc.dtype)


def _per_value(members: GeneralizedNormal) -> GeneralizedNormal:
    """The members with an axis for values before theirs, `[..., 1, M]`."""
    loc, scale, shape = (t.unsqueeze(-2) for t in (members.loc, members.scale, members.shape))
    return GeneralizedNormal(loc, scale, shape, validate_args=False)


def mixture_excess_kurtosis(members: GeneralizedNormal) -> Tensor:
    """Excess kurtosis `[...]` of the equal-weight mixture of members `[..., M]`: heavy also where the members merely disagree."""
    shift = (members.loc - members.loc.mean(-1, keepdim=True)).square()
    variance = members.variance
    second = (variance + shift).mean(-1)
    fourth = (members.kurtosis * variance.square() + 6.0 * variance * shift + shift.square()).mean(-1)
    return fourth / second.square() - 3.0
