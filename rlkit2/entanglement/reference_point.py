"""KTO's reference point on a fixed set of pairs, found as the trainer finds it on its batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlkit2.entanglement.language_pairs import Row, cut, padded
from rlkit2.entanglement.scores import PairBatch, Rows, SequenceScore, sums_of_sides
from rlkit2.entanglement.trainers import RowForm
from rlkit2.errors import ConfigError

Scorer = Callable[[PairBatch], tuple[Tensor, Tensor]]


def mismatched_pairs(batch: PairBatch, form: RowForm) -> PairBatch:
    """Every prompt with both completions of the pair before it, cut as the trainer cuts rows (the first with those of the last).

    Raises:
        ConfigError: fewer than two pairs, or nothing of the completions is left.
    """
    if len(batch) < 2:
        raise ConfigError("KTO's reference point is a mean over mismatched completions: measure at least two pairs")
    sides = []
    for rows in (batch.chosen, batch.rejected):
        apart = [_parts(rows, i) for i in range(len(batch))]
        found: list[Row] = []
        for (prompt, _), (_, completion) in zip(apart, [apart[-1], *apart[:-1]], strict=True):
            row = cut((prompt + completion, [0] * len(prompt) + [1] * len(completion)), form)
            if row is None:
                raise ConfigError(
                    f"a prompt fills max_length={form.max_length}, so that KTO's reference point cannot be measured: raise max_length"
                )
            found.append(row)
        device = rows["input_ids"].device
        sides.append({name: tensor.to(device) for name, tensor in padded(found).items()})
    return PairBatch(*sides)


def _parts(rows: Rows, index: int) -> tuple[list[int], list[int]]:
    """Token ids of a row's prompt and of its completion."""
    completion = rows["completion_mask"][index].bool()
    end = int(completion.nonzero().max()) + 1
    ids, completion = rows["input_ids"][index, :end], completion[:end]
    attended = rows["attention_mask"][index, :end].bool() if "attention_mask" in rows else torch.ones_like(completion)
    return ids[attended & ~completion].tolist(), ids[completion].tolist()


class ReferencePoint:
    """`z_ref = beta max(0, mean log pi/pi0 of mismatched completions)` (Ethayarajh et al. 2024; TRL's estimate).

    Args:
        score: of the model that is trained.
        pairs: see `mismatched_pairs`.
        reference: scores them under the reference model; None: the trained model as it is now.
        microbatch: pairs at a time.
    """

    def __init__(
        self, score: SequenceScore, pairs: PairBatch, reference: Scorer | None, microbatch: int | None = None
    ) -> None:
        self._score, self._pairs, self._microbatch = score, score.prepare(pairs), microbatch
        self._reference = reference
        self._start = None if reference is not None else self._sums()

    def _sums(self) -> tuple[Tensor, Tensor]:
        return sums_of_sides(self._score, self._pairs, self._microbatch)

    def __call__(self, beta: float) -> float:
        """At the present parameters."""
        found = self._start if self._reference is None else self._reference(self._pairs)
        assert found is not None
        ratios = torch.cat([now - then for now, then in zip(self._sums(), found, strict=True)])
        return beta * max(0.0, float(ratios.mean()))
