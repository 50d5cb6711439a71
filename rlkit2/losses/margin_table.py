"""The table of margin losses: one small function each, `(inputs, **hyperparameters) -> (value, d_w, d_l)`.

`A, B` are the log-ratios to the reference, `D = A - B`, `n_w, n_l` the completion lengths and `k` the row's own scalar, the common
factor of both coefficients. At a kink the derivative is 0, as in torch's relu.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from rlkit2.errors import ConfigError
from rlkit2.guard import guarded
from rlkit2.losses.margin_base import MarginInputs, MarginLoss, Terms, softplus

MARGIN_LOSSES: dict[str, MarginLoss] = {}
"""Every loss by its canonical name; `get_margin_loss` also knows the aliases."""


def _loss(
    name: str,
    *aliases: str,
    ratio: str,
    source: str,
    needs: str = "",
    couples_batch: bool = False,
    **hyperparameters: Any,
) -> Callable[[Callable[..., Terms]], Callable[..., Terms]]:
    """Put a function `(inputs, **hyperparameters) -> (value, d_w, d_l)` into the registry."""

    def register(terms: Callable[..., Terms]) -> Callable[..., Terms]:
        MARGIN_LOSSES[name] = MarginLoss(
            name=name,
            terms=terms,
            hyperparameters=MappingProxyType(hyperparameters),
            ratio=ratio,
            source=source,
            needs_reference="reference" in needs,
            needs_lengths="lengths" in needs,
            needs_context="context" in needs,
            couples_batch=couples_batch,
            aliases=aliases,
        )
        return terms

    return register


# --- losses on the margin D (u = 1) ----------------------------------------------------------------------------------------------


def _smoothed(z: Tensor, beta: Any, smoothing: Any) -> tuple[Tensor, Tensor]:
    """`-(1-e) log s(z) - e log s(-z)` and `-beta` times its derivative."""
    value = (1 - smoothing) * softplus(-z) + smoothing * softplus(z)
    return value, beta * ((1 - smoothing) * torch.sigmoid(-z) - smoothing * torch.sigmoid(z))


@_loss(
    "dpo", "sigmoid", needs="reference", ratio="1", source="Rafailov et al. 2023, eq. 7", beta=0.1, label_smoothing=0.0
)
@_loss(
    "cdpo",
    needs="reference",
    ratio="1 (k < 0 once beta D > log((1-e)/e))",
    source="Mitchell 2023",
    beta=0.1,
    label_smoothing=0.1,
)
def _dpo(x: MarginInputs, beta: Any, label_smoothing: Any) -> Terms:
    value, k = _smoothed(beta * x.margin, beta, label_smoothing)
    return value, k, k


@_loss("robust", needs="reference", ratio="1", source="Chowdhury et al. 2024", beta=0.1, label_smoothing=0.0)
def _robust(x: MarginInputs, beta: Any, label_smoothing: Any) -> Terms:
    z, e = beta * x.margin, label_smoothing
    value = ((1 - e) * softplus(-z) - e * softplus(z)) / (1 - 2 * e)
    k = beta * ((1 - e) * torch.sigmoid(-z) + e * torch.sigmoid(z)) / (1 - 2 * e)
    return value, k, k


@_loss(
    "hinge",
    needs="reference",
    ratio="1 while active",
    source="SLiC-HF on log-ratios (Zhao et al. 2023; Liu et al. 2024, RSO)",
    beta=0.1,
)
def _hinge(x: MarginInputs, beta: Any) -> Terms:
    slack = 1 - beta * x.margin
    k = beta * (slack > 0).to(slack.dtype)
    return relu(slack), k, k


@_loss("ipo_sum", needs="reference", ratio="1 (k < 0 past the target)", source="Azar et al. 2023, on sums", beta=0.1)
def _ipo_sum(x: MarginInputs, beta: Any) -> Terms:
    gap = 1 / (2 * beta) - x.margin
    return gap.square(), 2 * gap, 2 * gap


@_loss("rdpo", needs="reference lengths", ratio="1", source="Park et al. 2024", beta=0.1, alpha=0.2)
def _rdpo(x: MarginInputs, beta: Any, alpha: Any) -> Terms:
    z = beta * x.margin + alpha * (x.len_chosen - x.len_rejected)
    k = beta * torch.sigmoid(-z)
    return softplus(-z), k, k


@_loss(
    "exo_pair",
    needs="reference",
    ratio="1 (k < 0 past the target)",
    source="Ji et al. 2024",
    beta=0.1,
    label_smoothing=1e-3,
)
def _exo_pair(x: MarginInputs, beta: Any, label_smoothing: Any) -> Terms:
    z = beta * x.margin
    smoothing = torch.as_tensor(label_smoothing, dtype=z.dtype, device=z.device)
    log_target_w, log_target_l = torch.log1p(-smoothing), smoothing.log()
    q_w, q_l = torch.sigmoid(z), torch.sigmoid(-z)
    value = q_w * (logsigmoid(z) - log_target_w) + q_l * (logsigmoid(-z) - log_target_l)
    k = -beta * q_w * q_l * (z - log_target_w + log_target_l)
    return value, k, k


@_loss(
    "discopop",
    needs="reference",
    ratio="1 (k < 0 for slightly negative margins)",
    source="Lu et al. 2024, log-ratio modulated loss",
    beta=0.1,
    tau=0.05,
)
def _discopop(x: MarginInputs, beta: Any, tau: Any) -> Terms:
    z = beta * x.margin
    gate, rest = torch.sigmoid(z / tau), torch.sigmoid(-z / tau)
    slope = gate * rest / tau
    # M e^-z and M (1-M) e^-z as single exponentials: e^-z alone overflows for very negative z
    gate_exp = (logsigmoid(z / tau) - z).exp()
    slope_exp = (logsigmoid(z / tau) + logsigmoid(-z / tau) - z).exp() / tau
    value = rest * softplus(-z) + gate_exp
    k = beta * (rest * torch.sigmoid(-z) + slope * softplus(-z) + gate_exp - slope_exp)
    return value, k, k


# --- losses on the log-ratios A and B --------------------------------------------------------------------------------------------


@_loss(
    "dpop",
    "pdpo",
    "smaug",
    needs="reference",
    ratio="1 + lam while a < a0, else 1",
    source="Pal et al. 2024",
    beta=0.1,
    lam=50.0,
)
def _dpop(x: MarginInputs, beta: Any, lam: Any) -> Terms:
    z = beta * (x.margin - lam * relu(-x.ratio_w))
    k = beta * torch.sigmoid(-z)
    return softplus(-z), k * (1 + lam * (x.ratio_w < 0).to(k.dtype)), k


def _sigmoid_slope(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * torch.sigmoid(-z)


@_loss(
    "kto",
    needs="reference",
    ratio="weight_chosen s'(beta A - z_ref) / (weight_rejected s'(z_ref - beta B))",
    source="Ethayarajh et al. 2024, a desirable and an undesirable sample seen as a pair; z_ref = beta max(0, batch KL)",
    beta=0.1,
    z_ref=0.0,
    weight_chosen=1.0,
    weight_rejected=1.0,
)
def _kto(x: MarginInputs, beta: Any, z_ref: Any, weight_chosen: Any, weight_rejected: Any) -> Terms:
    above, below = beta * x.ratio_w - z_ref, z_ref - beta * x.ratio_l
    value = weight_chosen * torch.sigmoid(-above) + weight_rejected * torch.sigmoid(-below)
    return value, weight_chosen * beta * _sigmoid_slope(above), weight_rejected * beta * _sigmoid_slope(below)


@_loss(
    "sppo",
    "sppo_hard",
    needs="reference",
    ratio="(1/(2 beta) - A) / (1/(2 beta) + B)",
    source="Wu et al. 2024 (TRL's scale)",
    beta=0.1,
)
def _sppo(x: MarginInputs, beta: Any) -> Terms:
    gap_w, gap_l = 1 / (2 * beta) - x.ratio_w, 1 / (2 * beta) + x.ratio_l
    return gap_w.square() + gap_l.square(), 2 * gap_w, 2 * gap_l


@_loss(
    "sppo_half",
    needs="reference",
    ratio="(1/(2 beta) - A) / (1/(2 beta) + B)",
    source="Wu et al. 2024 (the authors' scale)",
    beta=0.1,
)
def _sppo_half(x: MarginInputs, beta: Any) -> Terms:
    value, d_w, d_l = _sppo(x, beta)
    return value / 2, d_w / 2, d_l / 2


@_loss(
    "nca_pair",
    needs="reference",
    ratio="(s(-beta A) - s(beta A)/2) / (s(beta B)/2)",
    source="Chen et al. 2024",
    beta=0.1,
)
def _nca_pair(x: MarginInputs, beta: Any) -> Terms:
    r_w, r_l = beta * x.ratio_w, beta * x.ratio_l
    value = softplus(-r_w) + 0.5 * softplus(r_w) + 0.5 * softplus(r_l)
    return value, beta * (torch.sigmoid(-r_w) - 0.5 * torch.sigmoid(r_w)), 0.5 * beta * torch.sigmoid(r_l)


@_loss(
    "bco_pair",
    needs="reference",
    ratio="s(delta - beta A) / s(beta B - delta)",
    source="Jung et al. 2024; delta = running mean reward",
    beta=0.1,
    delta=0.0,
)
def _bco_pair(x: MarginInputs, beta: Any, delta: Any) -> Terms:
    r_w, r_l = beta * x.ratio_w - delta, beta * x.ratio_l - delta
    return softplus(-r_w) + softplus(r_l), beta * torch.sigmoid(-r_w), beta * torch.sigmoid(r_l)


@_loss("apo_zero", needs="reference", ratio="s'(beta A) / s'(beta B)", source="D'Oosterlinck et al. 2024", beta=0.1)
def _apo_zero(x: MarginInputs, beta: Any) -> Terms:
    r_w, r_l = beta * x.ratio_w, beta * x.ratio_l
    return torch.sigmoid(-r_w) + torch.sigmoid(r_l), beta * _sigmoid_slope(r_w), beta * _sigmoid_slope(r_l)


@_loss(
    "apo_down",
    needs="reference",
    ratio="1 - s'(beta A) / s'(beta D); meant to lower the chosen",
    source="D'Oosterlinck et al. 2024",
    beta=0.1,
)
def _apo_down(x: MarginInputs, beta: Any) -> Terms:
    r_w, z = beta * x.ratio_w, beta * x.margin
    d_l = beta * _sigmoid_slope(z)
    return torch.sigmoid(r_w) + torch.sigmoid(-z), d_l - beta * _sigmoid_slope(r_w), d_l


def _largest_exponent(like: Tensor) -> float:
    return math.log(torch.finfo(like.dtype).max) - 10


def _capped_exp(exponent: Tensor) -> Tensor:
    return exponent.clamp(max=_largest_exponent(exponent)).exp()


def _f_dpo(x: MarginInputs, beta: Any, divergence: str, alpha: Any = None) -> Terms:
    (score_w, slope_w), (score_l, slope_l) = (f_score(divergence, r, alpha) for r in (x.ratio_w, x.ratio_l))
    z = beta * (score_w - score_l)
    k = beta * torch.sigmoid(-z)
    return softplus(-z), k * slope_w, k * slope_l


@guarded()
def f_score(divergence: str, ratio: Tensor, alpha: Any = 0.5) -> tuple[Tensor, Tensor]:
    """f-DPO's score `f'(pi/pi0)` of a log-ratio to the reference, and its slope (Wang et al. 2023).

    Args:
        divergence: "reverse_kl" (the log-ratio itself), "forward_kl", "js_divergence" or "alpha_divergence" (whose limit at alpha 1 is reverse KL
            and at alpha 0 forward KL).
        alpha: of the last, any number.

    Raises:
        ConfigError: no such divergence.
    """
    if divergence == "forward_kl":
        return 1 - _capped_exp(-ratio), _capped_exp(-ratio)
    if divergence == "js_divergence":
        return math.log(2) + logsigmoid(ratio), torch.sigmoid(-ratio)
    if divergence == "alpha_divergence" and alpha != 1:
        power = (alpha - 1) * ratio
        # past the cap the value stays and so does the slope: exp(power) - 1 loses all digits near alpha = 1, expm1 none
        return torch.expm1(power.clamp(max=_largest_exponent(power))) / (alpha - 1), _capped_exp(power)
    if divergence in ("reverse_kl", "alpha_divergence"):
        return ratio, torch.ones_like(ratio)
    raise ConfigError(
        f"unknown divergence {divergence!r}; choose one of: reverse_kl, forward_kl, js_divergence, alpha_divergence"
    )


@_loss(
    "dpo_forward_kl", "forward_kl", needs="reference", ratio="e^-A / e^-B", source="Wang et al. 2023 (f-DPO)", beta=0.1
)
def _dpo_forward_kl(x: MarginInputs, beta: Any) -> Terms:
    return _f_dpo(x, beta, "forward_kl")


@_loss("dpo_js", "js_divergence", needs="reference", ratio="s(-A) / s(-B)", source="Wang et al. 2023 (f-DPO)", beta=0.1)
def _dpo_js(x: MarginInputs, beta: Any) -> Terms:
    return _f_dpo(x, beta, "js_divergence")


@_loss(
    "dpo_alphadiv",
    "alpha_divergence",
    needs="reference",
    ratio="e^((alpha-1)A) / e^((alpha-1)B)",
    source="Wang et al. 2023 (f-DPO)",
    beta=0.1,
    alpha=0.5,
)
def _dpo_alphadiv(x: MarginInputs, beta: Any, alpha: Any) -> Terms:
    return _f_dpo(x, beta, "alpha_divergence", alpha)


# --- length-normalised losses ----------------------------------------------------------------------------------------------------


@_loss(
    "ipo_mean",
    "ipo",
    needs="reference lengths",
    ratio="n_l / n_w",
    source="Azar et al. 2023, on token means (TRL's ipo)",
    beta=0.1,
)
def _ipo_mean(x: MarginInputs, beta: Any) -> Terms:
    gap = 1 / (2 * beta) - (x.ratio_w / x.len_chosen - x.ratio_l / x.len_rejected)
    return gap.square(), 2 * gap / x.len_chosen, 2 * gap / x.len_rejected


@_loss(
    "dpo_norm",
    "sigmoid_norm",
    needs="reference lengths",
    ratio="n_l / n_w",
    source="Lambert et al. 2024 (Tulu 3)",
    beta=0.1,
)
def _dpo_norm(x: MarginInputs, beta: Any) -> Terms:
    z = beta * (x.ratio_w / x.len_chosen - x.ratio_l / x.len_rejected)
    k = beta * torch.sigmoid(-z)
    return softplus(-z), k / x.len_chosen, k / x.len_rejected


@_loss(
    "simpo",
    needs="lengths",
    ratio="n_l / n_w",
    source="Meng et al. 2024 (TRL's defaults)",
    beta=0.1,
    gamma=0.5,
    label_smoothing=0.0,
)
@_loss(
    "tpo_l",
    "tpo-l",
    needs="lengths",
    ratio="n_l / n_w; a third completion's likelihood acts beside",
    source="Saeidi et al. 2024 (TPO), length-normalised, without the gold completion's likelihood",
    beta=0.01,
    gamma=0.5,
    label_smoothing=0.0,
)
def _simpo(x: MarginInputs, beta: Any, gamma: Any, label_smoothing: Any) -> Terms:
    z = beta * (x.a / x.len_chosen - x.b / x.len_rejected) - gamma
    value, k = _smoothed(z, beta, label_smoothing)
    return value, k / x.len_chosen, k / x.len_rejected


@_loss(
    "alphapo",
    "simpo_alphapo",
    needs="lengths",
    ratio="(p_w / p_l)^-alpha n_l / n_w",
    source="Gupta et al. 2025; alpha 0 is SimPO",
    beta=0.1,
    gamma=0.5,
    alpha=0.0,
    label_smoothing=0.0,
)
def _alphapo(x: MarginInputs, beta: Any, gamma: Any, alpha: Any, label_smoothing: Any) -> Terms:
    (reward_w, slope_w), (reward_l, slope_l) = (
        alpha_reward(mean, alpha) for mean in (x.a / x.len_chosen, x.b / x.len_rejected)
    )
    value, k = _smoothed(beta * (reward_w - reward_l) - gamma, beta, label_smoothing)
    return value, k * slope_w / x.len_chosen, k * slope_l / x.len_rejected


@guarded()
def alpha_reward(logp: Tensor, alpha: Any) -> tuple[Tensor, Tensor]:
    """AlphaPO's reward `(1 - p^-alpha)/alpha` of a log-probability, and its slope `p^-alpha`; alpha 0 is the log-probability itself."""
    if alpha == 0:
        return logp, torch.ones_like(logp)
    power = -alpha * logp
    return -torch.expm1(power.clamp(max=_largest_exponent(power))) / alpha, _capped_exp(power)


@_loss(
    "rrhf",
    needs="lengths",
    ratio="(1 + lam) n_l / n_w while active",
    source="Yuan et al. 2023; lam weighs the mean log-prob",
    lam=0.0,
)
def _rrhf(x: MarginInputs, lam: Any) -> Terms:
    mean_w, mean_l = x.a / x.len_chosen, x.b / x.len_rejected
    active = (mean_l > mean_w).to(mean_w.dtype)
    return relu(mean_l - mean_w) - lam * mean_w, (active + lam) / x.len_chosen, active / x.len_rejected


def _log_odds(mean_logp: Tensor) -> tuple[Tensor, Tensor]:
    """`log p/(1-p)` of `p = e^mean_logp` and its slope `1/(1-p)`; for p above 1 - eps the value stays, so its slope is 0."""
    largest = -torch.finfo(mean_logp.dtype).eps
    inside = mean_logp.clamp(max=largest)
    rest = -torch.expm1(inside)
    return inside - rest.log(), torch.where(mean_logp <= largest, 1 / rest, 0)


def _odds_ratio(x: MarginInputs, lam: Any) -> Terms:
    (odds_w, slope_w), (odds_l, slope_l) = _log_odds(x.a / x.len_chosen), _log_odds(x.b / x.len_rejected)
    z = odds_w - odds_l
    k = lam * torch.sigmoid(-z)
    return lam * softplus(-z), k * slope_w / x.len_chosen, k * slope_l / x.len_rejected


@_loss(
    "orpo",
    needs="lengths",
    ratio="[1 + lam s(-z)/(1-p_w)] (1-p_l) n_l / (lam s(-z) n_w)",
    source="Hong et al. 2024 (lam is TRL's beta); every pair's likelihood per token of its own completion",
    lam=0.1,
)
def _orpo(x: MarginInputs, lam: Any) -> Terms:
    value, d_w, d_l = _odds_ratio(x, lam)
    return value - x.a / x.len_chosen, d_w + 1 / x.len_chosen, d_l


@_loss(
    "orpo_batch",
    needs="lengths context",
    couples_batch=True,
    ratio="as orpo, with P / (tokens of all prompts and chosen completions) in place of 1/n_w",
    source="TRL's ORPO: the likelihood is the mean over all tokens of the batch's prompts and chosen completions",
    lam=0.1,
)
def _orpo_batch(x: MarginInputs, lam: Any) -> Terms:
    value, d_w, d_l = _odds_ratio(x, lam)
    scale = x.a.shape[-1] / (x.len_chosen + x.context_chosen).sum(-1, keepdim=True)
    return value - scale * x.a, d_w + scale, d_l


# --- reference-free losses on sums -----------------------------------------------------------------------------------------------


@_loss("slic", "slic_hf", ratio="1 + lam while active", source="Zhao et al. 2023 (SLiC-HF)", delta=1.0, lam=0.1)
def _slic(x: MarginInputs, delta: Any, lam: Any) -> Terms:
    slack = delta - x.a + x.b
    active = (slack > 0).to(slack.dtype)
    return relu(slack) - lam * x.a, active + lam, active


@_loss(
    "cpo",
    ratio="1 + lam / k",
    source="Xu et al. 2024; lam weighs the summed log-prob",
    beta=0.1,
    lam=1.0,
    label_smoothing=0.0,
)
@_loss(
    "tpo",
    ratio="1 (with lam 0); a third completion's likelihood acts beside",
    source="Saeidi et al. 2024 (TPO), without the gold completion's likelihood; lam where the chosen is the gold one, summed",
    beta=0.01,
    lam=0.0,
    label_smoothing=0.0,
)
def _cpo(x: MarginInputs, beta: Any, lam: Any, label_smoothing: Any) -> Terms:
    value, k = _smoothed(beta * (x.a - x.b), beta, label_smoothing)
    return value - lam * x.a, k + lam, k


@_loss("hinge_free", ratio="1 while active", source="TRL's CPO hinge: relu(1 - beta (a - b))", beta=0.1)
def _hinge_free(x: MarginInputs, beta: Any) -> Terms:
    slack = 1 - beta * (x.a - x.b)
    k = beta * (slack > 0).to(slack.dtype)
    return relu(slack), k, k


@_loss("ipo_free", needs="lengths", ratio="n_l / n_w", source="TRL's CPO ipo: (a/n_w - b/n_l - 1/(2 beta))^2", beta=0.1)
def _ipo_free(x: MarginInputs, beta: Any) -> Terms:
    gap = 1 / (2 * beta) - (x.a / x.len_chosen - x.b / x.len_rejected)
    return gap.square(), 2 * gap / x.len_chosen, 2 * gap / x.len_rejected


@_loss(
    "cpl",
    ratio="1 / lam",
    source="Hejna et al. 2023; a, b = discounted sums of action log-densities",
    alpha=0.1,
    lam=0.5,
)
def _cpl(x: MarginInputs, alpha: Any, lam: Any) -> Terms:
    z = alpha * (x.a - lam * x.b)
    k = alpha * torch.sigmoid(-z)
    return softplus(-z), k, lam * k


@_loss(
    "bradley_terry",
    "reward",
    ratio="1 (with centering 0)",
    source="Christiano et al. 2017; a, b = predicted returns or scores",
    beta=1.0,
    margin=0.0,
    centering=0.0,
)
def _bradley_terry(x: MarginInputs, beta: Any, margin: Any, centering: Any) -> Terms:
    z, total = beta * (x.a - x.b) - margin, x.a + x.b
    k = beta * torch.sigmoid(-z)
    return softplus(-z) + centering * total.square(), k - 2 * centering * total, k + 2 * centering * total


@_loss("nll", ratio="infinite (d_l = 0)", source="-a: the added likelihood of RPO and CPO, summed over tokens")
def _nll(x: MarginInputs) -> Terms:
    return -x.a, torch.ones_like(x.a), torch.zeros_like(x.b)


# --- losses that couple the batch ------------------------------------------------------------------------------------------------


@_loss(
    "sft",
    needs="lengths",
    couples_batch=True,
    ratio="infinite (d_l = 0)",
    source="negative log-likelihood per token of the batch (TRL's sft)",
)
def _sft(x: MarginInputs) -> Terms:
    scale = x.a.shape[-1] / x.len_chosen.sum(-1, keepdim=True)
    return -x.a * scale, scale.expand_as(x.a), torch.zeros_like(x.b)


def _sorted_margin(first: Tensor, second: Tensor, beta: Any, smoothing: Any) -> Terms:
    """cDPO on the differences of two sorted samples; values and slopes go back to the members by rank."""
    ranks_first, ranks_second = (sample.argsort(dim=-1, stable=True).argsort(-1) for sample in (first, second))
    value, k = _smoothed(
        beta * (first.sort(dim=-1, stable=True).values - second.sort(dim=-1, stable=True).values), beta, smoothing
    )
    return value.gather(-1, ranks_first), k.gather(-1, ranks_first), k.gather(-1, ranks_second)


@_loss(
    "aot",
    needs="reference",
    couples_batch=True,
    ratio="1",
    source="Melnyk et al. 2024, paired",
    beta=0.1,
    label_smoothing=0.0,
)
def _aot(x: MarginInputs, beta: Any, label_smoothing: Any) -> Terms:
    value, k, _ = _sorted_margin(x.a - x.b, x.ref_chosen - x.ref_rejected, beta, label_smoothing)
    return value, k, k


@_loss(
    "aot_unpaired",
    "aot_pair",
    needs="reference",
    couples_batch=True,
    ratio="by rank; pairs lose their identity",
    source="Melnyk et al. 2024, unpaired",
    beta=0.1,
    label_smoothing=0.0,
)
def _aot_unpaired(x: MarginInputs, beta: Any, label_smoothing: Any) -> Terms:
    return _sorted_margin(x.ratio_w, x.ratio_l, beta, label_smoothing)
