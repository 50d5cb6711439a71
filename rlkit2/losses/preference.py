"""Losses that learn rewards, policies and value functions from preferences between trajectory segments.

Pairs are ordered as (first, second) = (chosen, rejected); `label_mass` is the probability that the SECOND is preferred, so 0 is a
clear preference for the first and 0.5 a tie.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlkit2.errors import ConfigError
from rlkit2.guard import guarded
from rlkit2.losses.margin_base import softplus


@guarded()
def bradley_terry_loss(
    return_w: Any, return_l: Any, *, label_mass: Any = 0.0, beta: Any = 1.0, margin: Any = 0.0, centering: float = 0.0
) -> Any:
    """Negative log-likelihood of soft labels under Bradley-Terry (Christiano et al. 2017, eq. 1), with margin and centering.

    With `z = beta (R_w - R_l) - margin` the loss is `-(1-y) log s(z) - y log s(-z) + centering (R_w + R_l)^2`. A constant added to
    both returns leaves the first two terms unchanged; `centering` (Eisenstein et al. 2023) fixes that freedom.

    Args:
        return_w, return_l: predicted returns (sums or means over the segment's steps) of first and second, `[..., P]`.
        label_mass: probability in [0, 1] that the second is preferred, broadcast to `[..., P]`.
        beta: inverse temperature, above 0.
        margin: how much better the first must be, in units of z.

    Returns:
        `[..., P]`.

    Raises:
        ConfigError: shapes differ or a `label_mass` is NaN or outside [0, 1] (on an accelerator the device stops instead).
    """
    (first, second), numpy = _pair(return_w, return_l)
    y = _mass(label_mass, first)
    z = beta * (first - second) - margin
    value = (1 - y) * softplus(-z) + y * softplus(z) + centering * (first + second).square()
    return _as_given(value, numpy)


@guarded()
def segment_advantage(logp: Any, *, alpha: float = 0.1, discount: float = 1.0) -> Any:
    """CPL's segment score `sum_t alpha discount^t log pi(a_t|s_t)` (Hejna et al. 2023, eq. 5): `[..., H]` to `[...]`."""
    if not 0.0 < discount <= 1.0:
        raise ConfigError(f"discount={discount} must be in (0, 1]")
    tensor = torch.as_tensor(logp)
    powers = discount ** torch.arange(tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
    return _as_given(alpha * (tensor * powers).sum(-1), not isinstance(logp, Tensor))


@guarded()
def cpl_loss(
    logp_w: Any, logp_l: Any, *, alpha: float = 0.1, lam: float = 0.5, discount: float = 1.0, label_mass: Any = 0.0
) -> Any:
    """Contrastive preference learning with conservative bias (Hejna et al. 2023, eqs. 5 and 6).

    `-(1-y) log s(A_w - lam A_l) - y log s(A_l - lam A_w)` with `A = sum_t alpha discount^t log pi(a_t|s_t)`.

    Args:
        logp_w, logp_l: log-densities of the actions, `[..., P, H]`, both segments of one length H.
        lam: bias in (0, 1]: the smaller, the more the chosen segment's own likelihood counts.

    Returns:
        `[..., P]`.

    Raises:
        ConfigError: the segments have different lengths, or a number is out of range.
    """
    if not 0.0 < lam <= 1.0:
        raise ConfigError(f"lam={lam} of CPL must be in (0, 1]")
    (first, second), numpy = _pair(logp_w, logp_l)
    score_w, score_l = (segment_advantage(logp, alpha=alpha, discount=discount) for logp in (first, second))
    y = _mass(label_mass, score_w)
    return _as_given((1 - y) * softplus(lam * score_l - score_w) + y * softplus(lam * score_w - score_l), numpy)


@guarded()
def cpl_rank_loss(advantages: Any, scores: Any, *, lam: float = 0.5) -> Any:
    """CPL on all pairs that a ranking implies (the dense variant of Hejna et al. 2023).

    Mean of `-log s(A_j - lam A_i)` over all pairs whose scores say `score_j > score_i`; equal scores imply nothing.

    Args:
        advantages: `A` of every segment (`segment_advantage`), `[..., N]`.
        scores: what ranks the segments, `[..., N]`.

    Returns:
        `[...]`, 0 where no pair is ordered.
    """
    (adv, score), numpy = _pair(advantages, scores)
    better = (score.unsqueeze(-2) > score.unsqueeze(-1)).to(adv.dtype)  # [.., i, j]: j above i
    loss = softplus(lam * adv.unsqueeze(-1) - adv.unsqueeze(-2))
    return _as_given((better * loss).sum((-2, -1)) / better.sum((-2, -1)).clamp(min=1), numpy)


@guarded()
def implicit_reward(q: Any, next_value: Any, *, discount: float, chi2: float = 0.5, clip: bool = True) -> Any:
    """IPL's reward `Q(s,a) - discount V(s')` (Hejna and Sadigh 2023, eq. 4); `V` clipped to `1/(chi2 (1-discount))` in size, its largest
    value under rewards that the chi2 penalty keeps within `1/chi2`.
    """
    (q_, v), numpy = _pair(q, next_value)
    if clip and chi2 > 0 and discount < 1:
        limit = 1 / (chi2 * (1 - discount))
        v = v.clamp(-limit, limit)
    return _as_given(q_ - discount * v, numpy)


@guarded()
def ipl_loss(
    q_w: Any,
    q_l: Any,
    next_value_w: Any,
    next_value_l: Any,
    *,
    discount: float,
    chi2: float = 0.5,
    label_mass: Any = 0.0,
    clip: bool = True,
) -> Any:
    """Inverse preference learning (Hejna and Sadigh 2023): Bradley-Terry on implicit rewards plus `chi2 * mean r^2`.

    Args:
        q_w, q_l, next_value_w, next_value_l: `[..., P, H]` (the next values without gradient, zero after a termination).
        discount: in (0, 1).
        chi2: weight of the penalty on squared implicit rewards; replay data adds its own `chi2 * implicit_reward(...)^2`.

    Returns:
        `[..., P]`: preference loss plus penalty of every pair.
    """
    reward_w, reward_l = (
        implicit_reward(q, v, discount=discount, chi2=chi2, clip=clip)
        for q, v in ((q_w, next_value_w), (q_l, next_value_l))
    )
    preference = bradley_terry_loss(reward_w.sum(-1), reward_l.sum(-1), label_mass=label_mass)
    return preference + chi2 * ((reward_w**2).mean(-1) + (reward_l**2).mean(-1)) / 2


def _pair(first: Any, second: Any) -> tuple[tuple[Tensor, Tensor], bool]:
    numpy = not (isinstance(first, Tensor) or isinstance(second, Tensor))
    tensors = torch.as_tensor(first), torch.as_tensor(second)
    if tensors[0].shape != tensors[1].shape:
        shapes = " and ".join(str(tuple(t.shape)) for t in tensors)
        raise ConfigError(
            f"the two sides of a preference have shapes {shapes}: cut both to one length and one number of pairs"
        )
    return tensors, numpy


_BAD_MASS = "label_mass must be in [0, 1] everywhere: it is the probability that the second segment is preferred"


def _mass(label_mass: Any, like: Tensor) -> Tensor:
    """The labels as a tensor, checked without waiting for the device: an accelerator stops by itself at a bad label."""
    y = torch.as_tensor(label_mass, dtype=like.dtype, device=like.device)
    try:
        torch._assert_async(((y >= 0) & (y <= 1)).all(), _BAD_MASS)
    except RuntimeError as error:
        if _BAD_MASS in str(error):
            given = f"; label_mass={label_mass}" if isinstance(label_mass, float | int) else ""
            raise ConfigError(_BAD_MASS + given) from error
        # inside torch.func.vmap values cannot be looked at
    return y


def _as_given(tensor: Tensor, numpy: bool) -> Any:
    return np.asarray(tensor.detach()) if numpy else tensor
