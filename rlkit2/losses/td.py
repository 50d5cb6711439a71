"""Temporal-difference targets and regression losses."""

from __future__ import annotations

from torch import Tensor


def td_target(rewards: Tensor, terminations: Tensor, next_value: Tensor, discount: float) -> Tensor:
    """r + discount (1 - terminated) next_value; a truncated step bootstraps, a terminated one does not.

    Args:
        rewards, terminations: `[S, B]`, flags as 0/1 numbers.
        next_value: value of the next observations, `[S, B]`.
        discount: in [0, 1].
    """
    return rewards + discount * (1.0 - terminations) * next_value


def expectile_loss(difference: Tensor, expectile: float) -> Tensor:
    """|expectile - 1(difference < 0)| difference^2, element by element: asymmetric least squares (Newey and Powell, 1987).

    Args:
        difference: target minus estimate, any shape.
        expectile: in (0, 1); 1/2 is half the squared error, larger values move the minimiser towards the largest targets.
    """
    weight = (difference > 0.0).to(difference) * (2.0 * expectile - 1.0) + (1.0 - expectile)
    return weight * difference.square()


def squared_td_error(values: Tensor, targets: Tensor) -> Tensor:
    """Squared error of every member against the same targets: mean over the batch, sum over the members, `[S]`.

    Args:
        values: `[S, M, B]`.
        targets: `[S, B]`, without gradient.
    """
    return (values - targets.unsqueeze(1)).square().mean(2).sum(1)
