"""The model that ensemble critics have of their TD errors: what every member is fitted with, and how members and samples are weighted.

Every member i has outputs (q, rho, lambda) and the distribution GGD(q, alpha, beta) for its target y:

    beta  = min(0.3 + softplus(rho + 1.498), 8)            (2, Gaussian, at the start)
    alpha = s exp(clamp(lambda, -7, 7)),                   s = running mean of |q - y| per seed
    L     = E[ sum_i (q_i - y_i)^2 ] + E[ sum_i m_i ],      m = negative log-likelihood of y - q at detached q      (coupling "mean")
    L     = E[ sum_i m_i ]                                                                                        (coupling "ggd")

In the first form Q stays the conditional mean and the hidden layers learn from Q alone. In the second Q is the mode: better under symmetric heavy
tails, wrong for skewed rewards. "gaussian" is the same with beta = 2.

Where an agent moves Q away from the mean of its targets on purpose (the conservative term of CQL, the diversity of EDAC), the noise has a location
mu of its own, from networks that are fitted to the targets by squared error and by nothing else: GGD(mu, alpha, beta) stays the distribution of
the target, and what the agent does to Q does not pass for noise. Outputs on Q's own hidden layers would not do: those are bent like Q.

Source: Kim et al., "Generalized Gaussian Temporal Difference Error for Uncertainty-aware Reinforcement Learning" (arXiv 2408.02295); `RELEASED`
are the options of its released code, whose likelihood is not that of a generalized Gaussian (see `rlkit2.losses.ggd`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rlkit2.errors import ConfigError
from rlkit2.fields import Checked, NonNegative, Rate
from rlkit2.losses.ggd import (
    LARGEST_EXPONENT,
    VARIANCE_FLOOR,
    Form,
    batch_inverse_variance,
    effective_sample_size,
    ggd_nll,
    mbbe_variance,
    shape_weights,
    solve_xi,
)
from rlkit2.nn.critics import SHAPE_CAP, SHAPE_FLOOR, noise_shape
from rlkit2.nn.distributions import unit_variance

LOG_SCALE_LIMIT = 7.0
SMOOTHING = 1e-3  # of |z| at 0, in units of the scale
SCALE_RATE = 0.005  # of the running mean of |d|


@dataclass(frozen=True)
class ErrorOptions(Checked):
    """How a critic is fitted; the defaults leave Q a plain regression on its targets."""

    # "mse"; "gaussian" or "ggd" also learn the noise of the targets, for `uncertainty`
    critic: Literal["mse", "gaussian", "ggd"] = "mse"
    # "power" is the generalized Gaussian's likelihood, "official" that of the released code
    critic_form: Form = "power"
    # scale of the noise: "learned", "running" (mean of |d|) or "fixed" (1)
    critic_scale: Literal["learned", "running", "fixed"] = "learned"
    # "mean": Q by squared error, noise apart; "ggd": both by likelihood, for symmetric heavy-tailed noise only
    coupling: Literal["mean", "ggd"] = "mean"
    # "shape": members count by their shape
    member_weighting: Literal["none", "shape"] = "none"
    # "biv", "biev": a further term with inverse-variance weights; where Q is fitted: "iv": such weights, "shape": beta over its batch mean
    sample_weighting: Literal["none", "biv", "biev", "iv", "shape"] = "none"
    # weight of the further term of "biv" and "biev"
    regulariser_weight: NonNegative = 0.1
    # least effective sample size under such weights, as a share of the batch
    min_effective_fraction: Rate = 0.8
    # divide that term by the batch size once more, as the released code does
    legacy_batch_mean: bool = False
    # "rows": every member counts the data's rows anew (Poisson), so that members differ as Q does between datasets; "none": all see the same rows
    bootstrap: Literal["none", "rows"] = "none"
    # deviation, in units of Q, of the fixed random function that each member's Q is learnt on top of; members part where there are no data
    prior_scale: NonNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.critic == "mse" and (self.member_weighting, self.sample_weighting) != ("none", "none"):
            raise ConfigError("weights between members or samples need critic = 'gaussian' or 'ggd'")
        if self.critic == "gaussian" and (self.critic_form, self.critic_scale) != ("power", "learned"):
            raise ConfigError("critic = 'gaussian' has no shape; leave critic_form and critic_scale at their defaults")
        if self.sample_weighting == "shape" and self.critic != "ggd":
            raise ConfigError("sample_weighting = 'shape' needs the shapes of critic = 'ggd'")
        if self.sample_weighting not in ("none", "shape") and getattr(self, "num_critics", 2) < 2:
            raise ConfigError(f"sample_weighting = {self.sample_weighting!r} needs num_critics of at least 2")
        if self.bootstrap != "none" and getattr(self, "num_critics", 2) < 2:
            raise ConfigError("bootstrap is between members; it needs num_critics of at least 2")
        if self.sample_weighting == "iv" and self.coupling == "ggd":
            raise ConfigError("sample_weighting = 'iv' needs coupling = 'mean'; a likelihood weighs by its own scale")


RELEASED: dict[str, Any] = {
    "critic": "ggd",
    "critic_form": "official",
    "critic_scale": "fixed",
    "coupling": "ggd",
    "member_weighting": "shape",
    "sample_weighting": "biev",
    "min_effective_fraction": 16 / 256,  # its min_batch_size at its batch size
    "legacy_batch_mean": True,
}
"""Options of the released code's `iev-ggd` variant."""

CALIBRATED: dict[str, Any] = {"critic": "ggd", "bootstrap": "rows", "target": "independent", "num_critics": 10}
"""Options under which the size of `epistemic_sd` is that of Q's error from the chance in the data (see the page on uncertainty)."""


@dataclass(frozen=True)
class Heads:
    """What the members say, each `[S, M, B]` (discrete, for every action: `[S, M, B, n]`): value; shape, log scale and location of the noise."""

    q: Tensor
    shape: Tensor
    log_scale: Tensor
    own_location: Tensor | None = None  # of the noise, where the agent moves `q`

    @property
    def location(self) -> Tensor:
        """What the noise lies around: `q` itself, unless the agent moves that."""
        return self.q if self.own_location is None else self.own_location

    @property
    def variance(self) -> Tensor:
        """Variance of the noise."""
        return torch.exp(2.0 * self.log_scale) * unit_variance(self.shape)


class ErrorModel:
    """The heads of an ensemble of critics and their loss.

    Args:
        options: an `ErrorOptions`, such as an agent's config.
        seeds: S.
        dtype, device: of the running scale.
        moved: the agent moves Q away from the mean of its targets, so the noise needs a location of its own.
        own_rows: every member has rows of its own, so nothing is averaged over members at a row.

    Attributes:
        outputs: noise outputs per value.
        detached: whether they leave the hidden layers alone.
        own_location: whether the noise has a location of its own.
        buffers: `[S]` tensors that belong to the agent's state.
    """

    def __init__(
        self,
        options: ErrorOptions,
        seeds: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        moved: bool = False,
        own_rows: bool = False,
    ) -> None:
        self.options, self.own_rows = options, own_rows
        learns_scale = options.critic != "mse" and options.critic_scale == "learned"
        absolute = options.critic == "ggd" and options.sample_weighting in ("biv", "biev")  # a pull towards the median
        own_location = options.critic != "mse" and (moved or (absolute and options.coupling == "mean"))
        self.outputs = int(options.critic == "ggd") + int(learns_scale)
        self.learns_scale, self.own_location, self.detached = learns_scale, own_location, options.coupling == "mean"
        zeros = torch.zeros(seeds, dtype=dtype, device=device)
        self.buffers = {"error_scale": zeros, "error_scale_weight": zeros.clone()} if self.outputs else {}

    # From outputs to heads

    def heads(self, outputs: Tensor, location: Tensor | None = None) -> Heads:
        """Outputs `[S, M, B, ..., 1 + k]`, in the order value, shape, scale (those there are), and the noise's own location `[S, M, B, ...]`."""
        q = outputs[..., 0]
        if self.options.critic == "gaussian":
            shape = torch.full_like(q, 2.0)
        else:
            shape = noise_shape(outputs[..., 1], self.options.critic_form)
        if self.options.critic_scale == "fixed":
            return Heads(q, shape, torch.zeros_like(q), location)
        log_scale = self.error_scale().log().view(-1, *(1 for _ in q.shape[1:])).expand_as(q)
        if self.learns_scale:
            log_scale = log_scale + outputs[..., -1].clamp(-LOG_SCALE_LIMIT, LOG_SCALE_LIMIT)
        return Heads(q, shape, log_scale, location)

    def error_scale(self) -> Tensor:
        """s, the running mean of |d| without the bias of its start, `[S]`."""
        tiny = torch.finfo(self.buffers["error_scale"].dtype).tiny
        mean = self.buffers["error_scale"] / self.buffers["error_scale_weight"].clamp(min=tiny)
        fresh = self.buffers["error_scale_weight"] == 0.0
        return torch.where(fresh, 1.0, mean.clamp(min=1e-8))

    @torch.no_grad()
    def track(self, errors: Tensor) -> None:
        """Follow the size of the errors `[S, M, B]`."""
        if self.buffers:
            self.buffers["error_scale"].lerp_(errors.abs().mean((1, 2)), SCALE_RATE)
            self.buffers["error_scale_weight"].lerp_(torch.ones_like(self.buffers["error_scale_weight"]), SCALE_RATE)

    # The loss

    def loss(
        self,
        outputs: Tensor,
        targets: Tensor,
        discount: float | Tensor,
        target_variance: Tensor | None = None,
        row_weights: Tensor | None = None,
        location: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's loss, `[S]`, and metrics.

        Args:
            outputs: `[S, M, B, 1 + k]`, at the actions taken.
            targets: `[S, B]`, or `[S, M, B]` where members have their own; without gradient.
            discount: gamma, or `[S, B]` where rows span different numbers of steps.
            target_variance: gamma^2 (1 - terminated) times the members' variance of the next value, `[S, B]`, for "iv".
            row_weights: how much each row counts for each member, `[S, M, B]`; None: all alike.
            location: of the noise, `[S, M, B]`, without gradient, where it has one of its own.
        """
        targets = targets if targets.ndim == 3 else targets.unsqueeze(1)
        error = outputs[..., 0] - targets
        if self.options.critic == "mse":
            return counted(error.square(), row_weights).mean(2).sum(1), {}
        noise = (error if location is None else location - targets).detach()
        self.track(noise)
        heads = self.heads(outputs, location)
        weights = xi = None
        if self.options.sample_weighting != "none":
            weights, xi = self.sample_weights(heads, noise, discount, target_variance)
        member, fit = self.member_loss(heads, targets), self.fit_loss(heads, targets)
        on_fit = weights if self.options.sample_weighting in ("iv", "shape") else None
        loss = counted(member, row_weights if fit is not None else _product(on_fit, row_weights)).sum(1).mean(1)
        if fit is not None:
            loss = loss + counted(fit, _product(on_fit, row_weights)).sum(1).mean(1)
        if weights is not None and on_fit is None:
            loss = loss + self.options.regulariser_weight * self.regulariser(error, weights[:, 0], row_weights)
        return loss, self.metrics(heads, noise, member, weights, xi)

    def member_loss(self, heads: Heads, targets: Tensor) -> Tensor:
        """Negative log-likelihood of the noise for every member, times its weight, `[S, M, B]`; it trains Q in the coupling "ggd" alone."""
        location = heads.location if self.options.coupling == "ggd" else heads.location.detach()
        member = self._nll(location, targets, heads.shape, heads.log_scale)
        return shape_weights(heads.shape, 1) * member if self.options.member_weighting == "shape" else member

    def fit_loss(self, heads: Heads, targets: Tensor) -> Tensor | None:
        """What else trains Q, `[S, M, B]`: its squared error, or its likelihood under noise that lies elsewhere; None where `member_loss` does it."""
        if self.options.coupling == "mean":
            return (heads.q - targets).square()
        if heads.own_location is None:
            return None
        return self._nll(heads.q, targets, heads.shape.detach(), heads.log_scale.detach())

    def _nll(self, values: Tensor, targets: Tensor, shape: Tensor, log_scale: Tensor) -> Tensor:
        found: Tensor = ggd_nll(
            values,
            targets,
            shape=shape,
            form=self.options.critic_form,
            log_scale=log_scale,
            reduction="none",
            smoothing=SMOOTHING,
        )
        return found

    @torch.no_grad()
    def sample_weights(
        self, heads: Heads, error: Tensor, discount: float | Tensor, target_variance: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Weights of mean one over the batch, and the xi `[S]` that keeps the effective size: `[S, 1, B]`, for "shape" and own rows `[S, M, B]`.

        All are 1 / (v + xi), with v by kind: biv the variance of the members' Q; biev the best biased estimate of the variance of their errors; iv
        the aleatoric variance plus that of the target; shape 1 / beta of every member, so that the weights are its shapes over their mean.
        """
        kind = self.options.sample_weighting
        if kind == "biv":
            variance = discount**2 * heads.q.var(1).clamp(min=VARIANCE_FLOOR)
        elif kind == "biev":
            variance = mbbe_variance(error, 1, ddof=0, floor=VARIANCE_FLOOR)
        elif kind == "shape":
            variance = heads.shape.reciprocal()
        else:
            variance = heads.variance if self.own_rows else heads.variance.mean(1)
            variance = variance if target_variance is None else variance + target_variance
        xi = solve_xi(variance, self.options.min_effective_fraction * variance.shape[-1])
        weights = batch_inverse_variance(variance, xi)
        return (weights, xi.mean(1)) if weights.ndim == 3 else (weights.unsqueeze(1), xi)

    def regulariser(self, error: Tensor, weights: Tensor, row_weights: Tensor | None = None) -> Tensor:
        """Weighted errors, absolute for the generalized and squared for the Gaussian likelihood, `[S]`."""
        size = error.abs() if self.options.critic == "ggd" else error.square()
        term = (weights * counted(size, row_weights).sum(1)).mean(1)
        return term / weights.shape[1] if self.options.legacy_batch_mean else term

    @torch.no_grad()
    def metrics(
        self, heads: Heads, error: Tensor, member: Tensor, weights: Tensor | None, xi: Tensor | None
    ) -> dict[str, Tensor]:
        """What to watch, per seed."""
        shape, z = heads.shape, error.abs() * torch.exp(-heads.log_scale)
        deviation, mean = torch.std_mean(shape, (1, 2))
        low, high = shape.flatten(1).aminmax(dim=1)
        found = {
            "noise/nll": member.mean((1, 2)),
            "noise/shape_mean": mean,
            "noise/shape_std": deviation,
            "noise/shape_variation": deviation / mean,
            "noise/shape_min": low,
            "noise/shape_max": high,
            "noise/aleatoric_sd": heads.variance.mean(1).sqrt().mean(1),
            "noise/error_scale": self.error_scale(),
            "noise/cap_share": _share(shape >= SHAPE_CAP, mean),
            "noise/floor_share": _share(shape <= SHAPE_FLOOR + 0.01, mean),
            "noise/outlier_share": _share(shape * z.log() > LARGEST_EXPONENT, mean),
            "noise/non_finite": (~member.isfinite()).to(mean).sum((1, 2)),
        }
        if error.shape[1] > 1:
            found["noise/epistemic_sd"] = heads.q.std(1).mean(1)
        if weights is not None and xi is not None:
            found["weight/effective_share"] = effective_sample_size(weights).mean(1) / weights.shape[-1]
            found["weight/max"] = weights.amax((1, 2))
            found["weight/xi"] = xi
        return found


def counted(values: Tensor, weights: Tensor | None) -> Tensor:
    """`values`, times `weights` where there are any."""
    return values if weights is None else values * weights


def _product(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None else counted(first, second)


def _share(flags: Tensor, like: Tensor) -> Tensor:
    return flags.to(like).mean((1, 2))


def error_warnings(metrics: Mapping[str, float]) -> dict[str, str]:
    """Signs of trouble in the metrics of a noise model."""
    found = {}
    if metrics.get("noise/non_finite", 0.0) > 0.0:
        found["non_finite_noise"] = (
            "likelihoods of TD errors are not finite; lower critic_learning_rate or use coupling = 'mean'"
        )
    if metrics.get("noise/cap_share", 0.0) > 0.5:
        found["shape_at_cap"] = (
            "more than half of the shapes are at their cap of 8 and no longer learn; the noise has almost no tails"
        )
    return found
