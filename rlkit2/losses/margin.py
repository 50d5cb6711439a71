r"""Margin-based preference losses, each with its value and its closed-form coefficients.

For one pair let `a = log pi(y_w|x)` and `b = log pi(y_l|x)` (sums over completion tokens, or returns, or discounted sums of
action log-densities). Every loss here has the gradient

    grad loss = -d_w grad a + d_l grad b,        d_w = -dloss/da,  d_l = dloss/db,

and the two numbers `(d_w, d_l)` are all that a gradient-entanglement diagnosis needs from a loss (Yuan et al., "A Common Pitfall
of Margin-based Language Model Alignment: Gradient Entanglement", ICLR 2025, general form and Table 1). A loss is one small
function that returns `(value, d_w, d_l)`; the registry `MARGIN_LOSSES` holds it with its defaults, its needs and its source.

In the formulas: `A = a - a0`, `B = b - b0` (log-ratios to the reference), `D = A - B`, `n_w, n_l` completion lengths, `s` the
logistic function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from rlkit2.errors import ConfigError
from rlkit2.guard import guarded
from rlkit2.losses.margin_base import MarginInputs, MarginLoss, Terms
from rlkit2.losses.margin_table import MARGIN_LOSSES, alpha_reward, f_score

__all__ = [
    "MARGIN_LOSSES",
    "MarginInputs",
    "MarginLoss",
    "get_margin_loss",
    "length_desensitized_logp",
    "margin_coefficients",
    "margin_loss",
    "mixture",
    "on_alpha_reward",
    "on_f_divergence",
    "weighted",
    "wpo",
    "wpo_weight",
]


def get_margin_loss(name: str | MarginLoss) -> MarginLoss:
    """A loss by its name or by TRL's `loss_type` (`sigmoid`, `ipo`, `sppo_hard`, ...).

    Raises:
        ConfigError: no such loss.
    """
    if isinstance(name, MarginLoss):
        return name
    aliases = {alias: loss for loss in MARGIN_LOSSES.values() for alias in loss.aliases}
    found = MARGIN_LOSSES.get(name) or aliases.get(name)
    if found is None:
        close = get_close_matches(name, [*MARGIN_LOSSES, *aliases], 1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(MARGIN_LOSSES)}"
        raise ConfigError(f"unknown margin loss {name!r}; {hint}")
    return found


@guarded()
def margin_loss(name: str | MarginLoss, inputs: MarginInputs, **hyperparameters: Any) -> Any:
    """The loss of every pair, `[..., P]`; the training loss is its mean over pairs.

    Raises:
        ConfigError: unknown loss or hyper-parameter, or inputs that the loss needs are missing.
    """
    return get_margin_loss(name).value(inputs, **hyperparameters)


@guarded()
def margin_coefficients(name: str | MarginLoss, inputs: MarginInputs, **hyperparameters: Any) -> tuple[Any, Any]:
    """`(d_w, d_l) = (-dloss/da, dloss/db)` of every pair in closed form, each `[..., P]`.

    For losses that couple the batch these are the derivatives of P times the batch mean.
    """
    return get_margin_loss(name).coefficients(inputs, **hyperparameters)


def mixture(
    weights: Mapping[str, float] | Iterable[tuple[str | MarginLoss, float]], **hyperparameters: Any
) -> MarginLoss:
    """A weighted sum of losses (values and coefficients add), such as MPO's `{"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}`.

    Every hyper-parameter goes to each of the losses that takes it.

    Raises:
        ConfigError: an unknown loss, or a hyper-parameter that none of them takes.
    """
    given = weights.items() if isinstance(weights, Mapping) else weights
    parts = [(get_margin_loss(name), float(weight)) for name, weight in given]
    if not parts:
        raise ConfigError("a mixture of margin losses needs at least one loss")
    unused = set(hyperparameters) - {key for loss, _ in parts for key in loss.hyperparameters}
    if unused:
        raise ConfigError(
            f"none of {', '.join(loss.name for loss, _ in parts)} takes the hyper-parameter {sorted(unused)[0]!r}"
        )
    bound = [
        (loss.bind(**{k: v for k, v in hyperparameters.items() if k in loss.hyperparameters}), weight)
        for loss, weight in parts
    ]

    def terms(x: MarginInputs) -> Terms:
        evaluated = [tuple(weight * term for term in loss._evaluate(x, {})) for loss, weight in bound]
        value, d_w, d_l = (torch.stack(column).sum(0) for column in zip(*evaluated, strict=True))
        return value, d_w, d_l

    return MarginLoss(
        name="+".join(f"{weight:g}*{loss.name}" for loss, weight in bound),
        terms=terms,
        hyperparameters=MappingProxyType({}),
        ratio="sum of d_w / sum of d_l",
        source="MPO (Wang et al. 2024, arXiv 2411.10442): weighted sum of preference, quality and generation losses",
        needs_reference=any(loss.needs_reference for loss, _ in bound),
        needs_lengths=any(loss.needs_lengths for loss, _ in bound),
        needs_collision=any(loss.needs_collision for loss, _ in bound),
        needs_context=any(loss.needs_context for loss, _ in bound),
        couples_batch=any(loss.couples_batch for loss, _ in bound),
    )


def weighted(loss: str | MarginLoss, weight: Callable[[MarginInputs], Tensor] | Tensor) -> MarginLoss:
    """The loss times a detached weight per pair `[..., P]` (a tensor or a function of the inputs such as `wpo_weight`)."""
    base = get_margin_loss(loss)

    def terms(x: MarginInputs, **hyperparameters: Any) -> Terms:
        factor = (weight(x) if callable(weight) else weight).detach()
        value, d_w, d_l = base.terms(x, **hyperparameters)
        return factor * value, factor * d_w, factor * d_l

    return replace(base, name=f"weighted {base.name}", terms=terms, aliases=())


def wpo_weight(inputs: MarginInputs) -> Tensor:
    """WPO's weight `w_w w_l` of a pair (Zhou et al. 2024, arXiv 2406.11827, eq. 2), `[..., P]`.

    `w = exp(mean_t [log p_t - log sum_v p_t(v)^2])` where the inputs hold `collision_*`, else without the second term (not aligned).
    """
    if inputs.len_chosen is None:
        raise ConfigError("WPO weighting needs len_chosen and len_rejected")
    sides = [inputs.a, inputs.b]
    if inputs.collision_chosen is not None:
        sides = [inputs.a - inputs.collision_chosen, inputs.b - inputs.collision_rejected]
    weight: Tensor = (sides[0] / inputs.len_chosen + sides[1] / inputs.len_rejected).exp()
    return weight


def wpo(loss: str | MarginLoss) -> MarginLoss:
    """The loss with WPO's aligned weights (TRL's `use_weighting`); the inputs must hold lengths and `collision_*`.

    Raises:
        ConfigError: a loss that couples the batch, whose terms do not belong to one pair each.
    """
    base = get_margin_loss(loss)
    if base.couples_batch:
        raise ConfigError(f"loss {base.name} couples the batch: WPO's weights per pair cannot be put on it")
    return replace(weighted(base, wpo_weight), name=f"wpo {base.name}", needs_lengths=True, needs_collision=True)


def on_f_divergence(loss: str | MarginLoss, divergence: str, *, alpha: float = 0.5) -> MarginLoss:
    """Any loss of the log-ratios with f-DPO's scores in their place (Wang et al. 2023, arXiv 2309.16240); see `f_score`.

    Raises:
        ConfigError: a loss without reference, or an unknown divergence.
    """
    base = get_margin_loss(loss)
    if not base.needs_reference:
        raise ConfigError(f"loss {base.name} has no reference: an f-divergence needs one")
    f_score(divergence, torch.zeros(1), alpha)

    def scores(x: MarginInputs) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        (score_w, slope_w), (score_l, slope_l) = (f_score(divergence, r, alpha) for r in (x.ratio_w, x.ratio_l))
        return (x.ref_chosen + score_w, slope_w), (x.ref_rejected + score_l, slope_l)

    return _on_scores(base, scores, f"{base.name} on {divergence}")


def on_alpha_reward(loss: str | MarginLoss, alpha: float) -> MarginLoss:
    """A reference-free loss with AlphaPO's reward `(1 - p^-alpha)/alpha` in place of `log p` (Gupta et al. 2025): of the token mean where the loss is
    length-normalised, else of the sum.
    """
    base = get_margin_loss(loss)

    def scores(x: MarginInputs) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        sizes = (x.len_chosen, x.len_rejected) if base.needs_lengths else (1, 1)
        found = [(alpha_reward(logp / size, alpha), size) for logp, size in zip((x.a, x.b), sizes, strict=True)]
        first, second = ((reward * size, slope) for (reward, slope), size in found)
        return first, second

    return _on_scores(base, scores, f"{base.name} on alpha rewards")


def _on_scores(
    base: MarginLoss,
    scores: Callable[[MarginInputs], tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]],
    name: str,
) -> MarginLoss:
    """The loss of other scores in place of both log-probabilities; `scores` gives each with its slope, and coefficients follow the chain rule."""

    def terms(x: MarginInputs, **hyperparameters: Any) -> Terms:
        (score_w, slope_w), (score_l, slope_l) = scores(x)
        value, d_w, d_l = base.terms(replace(x, logp_chosen=score_w, logp_rejected=score_l), **hyperparameters)
        return value, d_w * slope_w, d_l * slope_l

    return replace(base, name=name, terms=terms, ratio=f"{base.ratio}, times the scores' slopes", aliases=())


@guarded()
def length_desensitized_logp(token_logps: Tensor, mask: Tensor, other_length: Tensor, ld_alpha: float) -> Tensor:
    """LD-DPO's log-probability: tokens beyond the shorter completion's length count `ld_alpha` times (Liu et al. 2024).

    Args:
        token_logps: `[..., P, T]` log-probabilities of tokens.
        mask: `[..., P, T]`, 1 on completion tokens.
        other_length: `[..., P]` completion length of the pair's other side.
        ld_alpha: factor in [0, 1]; 1 is the plain sum.

    Returns:
        `[..., P]`, to be given as `logp_*` (and `ref_*`) of `MarginInputs`.
    """
    if not 0.0 <= ld_alpha <= 1.0:
        raise ConfigError(f"ld_alpha={ld_alpha} must be in [0, 1]")
    completion = mask.to(token_logps.dtype)
    shared = completion.cumsum(-1) <= other_length.unsqueeze(-1)
    return (token_logps * completion * torch.where(shared, 1.0, ld_alpha)).sum(-1)
