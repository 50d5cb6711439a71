"""Scores that say before any training which chosen completions a preference loss will lower, cheapest first. Higher: more harm.

| score | what it is | cost of a pair |
| --- | --- | --- |
| `edit` | 1 - edit distance / longer completion, in tokens | none |
| `ches`, `ches_mean` | centred hidden-embedding similarity, of sums or of token means (Razin et al. 2024, arXiv 2410.08847) | 2 forward passes |
| `head_gap`, `head_ratio` | `gap` and `c_w` of the output matrix alone (a proxy) | 2 forward passes, products of logits |
| `gap`, `gap_mean` | `<g_w, g_l> - |g_w|^2`, of gradients of sums or of means over tokens | 2 backward passes |
| `c_w` | `<g_w, g_l> / |g_w|^2`; above 1 a DPO step on the pair lowers its chosen | 2 backward passes |
| `cosine` | of the two gradients | 2 backward passes |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlkit2.entanglement.geometry import GradientGeometry
from rlkit2.entanglement.gradients import entering_head
from rlkit2.entanglement.measure import Sizes, automatic, pair_geometry
from rlkit2.entanglement.scores import PairBatch, PairLike, Rows, SequenceScore, as_pair_batch, evaluation_mode
from rlkit2.errors import ConfigError

FORWARD = ("edit", "ches", "ches_mean", "head_gap", "head_ratio")
"""Scores without a backward pass."""
GRADIENT = ("gap", "gap_mean", "c_w", "cosine")
"""Scores of the gradients."""


def edit_distance(first: Sequence[int], second: Sequence[int]) -> int:
    """Fewest insertions, deletions and substitutions that turn one list of tokens into the other (Levenshtein)."""
    a, b = np.asarray(first), np.asarray(second)
    places = np.arange(len(b) + 1)
    row = places.copy()
    for token in a:
        reached = np.concatenate([row[:1] + 1, np.minimum(row[1:] + 1, row[:-1] + (b != token))])
        row = np.minimum.accumulate(reached - places) + places  # insertions, all along the row at once
    return int(row[-1])


def forward_scores(score: SequenceScore, batch: PairLike, *, head: bool = True) -> dict[str, Tensor]:
    """The scores `FORWARD`, the log-probabilities `logp_chosen`, `logp_rejected` and the lengths `tokens_chosen`, `tokens_rejected`, `[P]` each.

    Logits exist of one completion per side at a time.

    Args:
        score: `causal_lm_logp(model)`.
        head: False leaves the scores of the output matrix out, whose products of logits cost as much as the model where the vocabulary is large.

    Raises:
        ConfigError: the score is not one of a language model; an empty completion.
    """
    if score.head is None:
        raise ConfigError("these scores need a causal language model with an output layer: give causal_lm_logp(model)")
    pairs = score.prepare(as_pair_batch(batch))
    with torch.no_grad(), evaluation_mode(score.module):
        sides = [_Side(score, rows) for rows in (pairs.chosen, pairs.rejected)]
        found = [_of_pair(*(side.row(i, residual=head) for side in sides)) for i in range(len(pairs))]
    return {name: torch.tensor([one[name] for one in found], dtype=torch.float64) for name in found[0]}


class _Side:
    """Forward passes of one side's rows."""

    def __init__(self, score: SequenceScore, rows: Rows) -> None:
        self._score, self._rows, self._mask = score, rows, score.mask(rows)
        self._states = entering_head(score, score.params, rows)
        capped = score.hidden is None  # the logits are not what the output layer gives
        self._sums = score.sums(score.params, rows) if capped else None

    def row(self, i: int, *, residual: bool) -> dict[str, Any]:
        """States `h [n, d]`, ids, log-probability and residuals `e - p [n, V]` of one completion."""
        mask = self._mask[i]
        h, ids = self._states[i, mask], self._rows["input_ids"][i, 1:][mask]
        logits = self._score.head(h)  # type: ignore[misc]
        logits = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
        logp = logits.gather(-1, ids[:, None]).sum() if self._sums is None else self._sums[i]
        found = {"h": h if h.dtype == torch.float64 else h.float(), "ids": ids.tolist(), "logp": float(logp)}
        if residual:
            r = logits.exp_().neg_()
            r[torch.arange(len(ids), device=ids.device), ids] += 1
            found["r"] = r
        return found


def _of_pair(w: dict[str, Any], l: dict[str, Any]) -> dict[str, float]:  # noqa: E741
    n_w, n_l = len(w["ids"]), len(l["ids"])
    sum_w, sum_l = w["h"].sum(0), l["h"].sum(0)
    found = {
        "edit": 1 - edit_distance(w["ids"], l["ids"]) / max(n_w, n_l),
        "ches": float(sum_w @ sum_l - sum_w @ sum_w),
        "ches_mean": float(sum_w @ sum_l / (n_w * n_l) - sum_w @ sum_w / n_w**2),
        "logp_chosen": w["logp"],
        "logp_rejected": l["logp"],
        "tokens_chosen": float(n_w),
        "tokens_rejected": float(n_l),
    }
    if "r" in w:
        inner, norm = (float(((w["r"] @ x["r"].mT) * (w["h"] @ x["h"].mT)).sum()) for x in (l, w))
        found |= {"head_gap": inner - norm, "head_ratio": inner / max(norm, 1e-30)}
    return found


def gradient_scores(geometry: GradientGeometry, lengths: tuple[Any, Any]) -> dict[str, Tensor]:
    """The scores `GRADIENT` from a measured geometry, `[P]` each.

    Args:
        geometry: see `pair_geometry`; of method "sketch" or "head" the scores are estimates.
        lengths: tokens of the chosen and of the rejected, `[P]` each.
    """
    ip, w2 = (torch.as_tensor(x).double() for x in (geometry.inner, geometry.sqnorm_w))
    n_w, n_l = (torch.as_tensor(n).double().to(ip.device) for n in lengths)
    return {
        "gap": ip - w2,
        "gap_mean": ip / (n_w * n_l) - w2 / n_w.square(),
        "c_w": ip / w2.clamp(min=1e-300),
        "cosine": torch.as_tensor(geometry.cosine).double(),
    }


def measured_scores(
    score: SequenceScore, batch: PairBatch, *, method: str = "auto", **sizes: Any
) -> tuple[dict[str, Tensor], str]:
    """`gradient_scores` of pairs under a model, and the method that was used.

    Args:
        method: see `pair_geometry`; "auto": ghost where the model allows it, else loop.
        sizes: `microbatch`, `sketch_dim`, `seed`.
    """
    pairs = score.prepare(as_pair_batch(batch))
    given: Sizes = {"microbatch": 1, **sizes}  # type: ignore[typeddict-item]
    geometry = automatic(lambda name: pair_geometry(score, None, pairs, method=name, **given), method)
    lengths = (score.mask(pairs.chosen).sum(1), score.mask(pairs.rejected).sum(1))
    return gradient_scores(geometry, lengths), geometry.method
