"""Temporal-difference targets and regression losses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rlkit2.guard import guarded


@guarded()
def td_target(rewards: Tensor, terminations: Tensor, next_value: Tensor, discount: float | Tensor) -> Tensor:
    """r + discount (1 - terminated) next_value; a truncated step bootstraps, a terminated one does not.

    Args:
        rewards, terminations: `[S, B]`, flags as 0/1 numbers.
        next_value: value of the next observations, `[S, B]`.
        discount: in [0, 1]; `[S, B]` where rows span different numbers of steps.
    """
    continued = torch.addcmul(next_value, terminations, next_value, value=-1.0)
    if isinstance(discount, Tensor):
        return torch.addcmul(rewards, discount, continued)
    return torch.add(rewards, continued, alpha=discount)


@guarded()
def expectile_slope(difference: Tensor, expectile: float) -> Tensor:
    """|expectile - 1(difference < 0)| difference, element by element; half the derivative of `expectile_loss`."""
    return expectile * F.leaky_relu(difference, (1.0 - expectile) / expectile)


@guarded()
def expectile_loss(difference: Tensor, expectile: float) -> Tensor:
    """|expectile - 1(difference < 0)| difference^2, element by element: asymmetric least squares (Newey and Powell, 1987).

    Args:
        difference: target minus estimate, any shape.
        expectile: in (0, 1); 1/2 is half the squared error, larger values move the minimiser towards the largest targets.
    """
    return expectile_slope(difference, expectile) * difference


@guarded()
def squared_error(values: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Regression of every ensemble member on the same targets.

    Args:
        values: `[S, M, B]`.
        targets: `[S, B]`.

    Returns:
        The squared errors summed over members, `[S, B]`, and the derivative of their mean over the batch with respect to `values`, `[S, M, B]`.
    """
    error = values - targets.unsqueeze(1)
    return error.square().sum(1), error * (2.0 / error.shape[2])
