"""A learned sparse mask over completion tokens: which tokens of a pair the margin loss may move.

Named by Yuan et al. 2024 ("sparsity regularised token masking"); the form here is ours. A small head turns the hidden state that predicts a token
into a weight `m` in (0, 1); the loss sees the masked sums `sum_t m_t log pi(y_t)` of policy and reference, and `sparsity` times the mean weight is
added, so that tokens that do not help the margin fade out. The head reads detached states: the model is moved through the log-probabilities alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlkit2.errors import ConfigError
from rlkit2.losses.margin import MarginInputs, MarginLoss, get_margin_loss


class TokenMask(nn.Module):
    """Weights of tokens from the hidden states that predict them.

    Args:
        width: of the hidden states.
        start: weight of every token before anything is learned, in (0, 1).
    """

    def __init__(self, width: int, *, start: float = 0.9) -> None:
        super().__init__()
        if not 0 < start < 1:
            raise ConfigError(f"start={start} of a TokenMask must be in (0, 1)")
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, torch.tensor(start).logit().item())

    def forward(self, states: Tensor) -> Tensor:
        """`[..., T, width]` to weights `[..., T]`."""
        own = self.head.weight.dtype
        return self.head(states.detach().to(own)).squeeze(-1).sigmoid()  # type: ignore[no-any-return]


def masked_loss(
    loss: str | MarginLoss,
    tokens: tuple[Tensor, Tensor],
    reference: tuple[Tensor, Tensor] | None,
    weights: tuple[Tensor, Tensor],
    completions: tuple[Tensor, Tensor],
    *,
    sparsity: float = 0.01,
    **hyperparameters: Any,
) -> Tensor:
    """The margin loss of masked sums plus `sparsity` times the mean weight of each pair's tokens, `[P]`.

    Args:
        loss: any margin loss of log-probabilities and lengths.
        tokens: log-probabilities of the chosen's and the rejected's tokens, `[P, T]` each, with their graph.
        reference: the same of the reference; None for losses without.
        weights: of `TokenMask`, `[P, T]` each.
        completions: 1 on completion tokens, `[P, T]` each.
        sparsity: at least 0.

    Raises:
        ConfigError: a negative sparsity, or inputs that the loss needs are missing.
    """
    if sparsity < 0:
        raise ConfigError(f"sparsity={sparsity} must be at least 0")
    masks = [w * c for w, c in zip(weights, completions, strict=True)]
    lengths = [c.sum(-1) for c in completions]
    sums = [(m * t).sum(-1) for m, t in zip(masks, tokens, strict=True)]
    frozen = [None, None] if reference is None else [(m * r).sum(-1) for m, r in zip(masks, reference, strict=True)]
    value: Tensor = get_margin_loss(loss).value(MarginInputs(*sums, *frozen, *lengths), **hyperparameters)
    kept = (masks[0].sum(-1) + masks[1].sum(-1)) / (lengths[0] + lengths[1])
    return value + sparsity * kept
