"""A fixed set of pairs that is measured around optimiser steps: what was predicted, what happened, what a remedy would have changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlkit2.entanglement.geometry import GradientGeometry, batch_rates
from rlkit2.entanglement.measure import PairGradients
from rlkit2.entanglement.mitigation import MITIGATIONS, group_coefficients, mask_shared_tokens
from rlkit2.entanglement.scores import PairBatch, PairLike, SequenceScore, as_pair_batch, evaluation_mode
from rlkit2.entanglement.summary import entanglement_report
from rlkit2.errors import ConfigError
from rlkit2.losses.margin import MarginInputs, MarginLoss, get_margin_loss

REMEDIES = (*MITIGATIONS, "group_normalised", "token_mask")
"""What a dry run can try: the remedies of `mitigation`, on the whole batch or with shared tokens masked."""


class EntanglementProbe:
    """Measures P pairs before and after an optimiser step, without touching anything that training depends on.

    `before()` takes gradients and keeps a copy of the measured parameters; `after()` compares with the parameters then. Between the two the
    optimiser may do what it likes (clip, precondition, decay).

    Args:
        logp: what is scored, see `causal_lm_logp`.
        batch: the pairs.
        loss: name or object of the margin loss that is trained.
        hyperparameters: of the loss.
        reference: reference scores `(chosen, rejected)`, `[P]` each, for losses that need them; "initial": the scores of the model now.
        method: loop, vmap, ghost or sketch; "auto": ghost where the model allows it, else loop.
        sketch_dim: for the sketch.
        dry_run: remedies of `REMEDIES` whose effect is predicted each time.
        group_by: also report parts, see `pair_geometry`.

    Raises:
        ConfigError: reference scores are missing, an unknown method or remedy, an empty completion.
    """

    def __init__(
        self,
        logp: SequenceScore,
        batch: PairLike,
        loss: str | MarginLoss,
        *,
        hyperparameters: Mapping[str, Any] | None = None,
        reference: tuple[Tensor, Tensor] | str | None = None,
        method: str = "auto",
        sketch_dim: int = 1024,
        dry_run: Sequence[str] = ("normalised", "band", "likelihood"),
        group_by: str | None = None,
    ) -> None:
        unknown = [name for name in dry_run if name not in REMEDIES]
        if unknown:
            raise ConfigError(f"unknown remedy {unknown[0]!r}; known: {', '.join(REMEDIES)}")
        if method not in ("auto", "loop", "vmap", "ghost", "sketch"):
            raise ConfigError(f"method={method!r} of a probe must be auto, loop, vmap, ghost or sketch")
        self.logp = logp
        self.batch = logp.prepare(as_pair_batch(batch))
        self.loss = get_margin_loss(loss).bind(**(hyperparameters or {}))
        self.method, self.sketch_dim = method, sketch_dim
        self.dry_run, self.group_by = tuple(dry_run), group_by
        if reference == "initial":
            reference = self.scores()
        if isinstance(reference, str):
            raise ConfigError(f'reference={reference!r} must be "initial" or two tensors of scores')
        if self.loss.needs_reference and reference is None:
            raise ConfigError(
                f"loss {self.loss.name} needs reference log-probabilities: give reference=(chosen, rejected), "
                'or "initial" to take the model\'s own now'
            )
        self.reference = reference
        self._held: PairGradients | None = None
        self._start: dict[str, Tensor] = {}
        self._scores: tuple[Tensor, Tensor] | None = None

    def scores(self) -> tuple[Tensor, Tensor]:
        """Scores of the chosen and the rejected now, `[P]` each."""
        with torch.no_grad(), evaluation_mode(self.logp.module):
            sides = [self.logp.sums(self.logp.params, rows) for rows in (self.batch.chosen, self.batch.rejected)]
        return sides[0], sides[1]

    def coefficients(self, scores: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """`(d_w, d_l)` of the loss at these scores."""
        lengths = [self.logp.mask(rows).sum(-1) for rows in (self.batch.chosen, self.batch.rejected)]
        reference = self.reference if self.reference is not None else (None, None)
        d_w, d_l = self.loss.coefficients(MarginInputs(*scores, *reference, *lengths))
        return d_w, d_l

    def before(self) -> None:
        """Take the gradients at the present parameters."""
        self._scores = self.scores()
        self._held = self._gradients(self.batch)
        self._start = {name: p.detach().clone() for name, p in self.logp.params.items()}

    def after(self, *, step: int | None = None, lr: float | None = None) -> dict[str, Any]:
        """Compare with the present parameters: a JSON-able record.

        Raises:
            ConfigError: `before()` was not called.
        """
        if self._held is None or self._scores is None:
            raise ConfigError("EntanglementProbe.after() needs before() in front of the optimiser's step")
        held, scores = self._held, self._scores
        now = self.scores()
        realised = now[0] - scores[0], now[1] - scores[1]
        delta = {name: p.detach() - self._start[name] for name, p in self.logp.params.items()}
        predicted = held.along(delta)
        d_w, d_l = self.coefficients(scores)
        geometry, gram = held.geometry(self.group_by), held.gram()
        report = entanglement_report(
            geometry,
            (d_w, d_l),
            gram=gram,
            optimizer=predicted,
            realised=realised,
            pairwise=self.loss.name != "aot_unpaired",
        )
        record = {
            "step": step,
            "lr": lr,
            "loss": self.loss.name,
            "logp_chosen": float(scores[0].mean()),
            "logp_rejected": float(scores[1].mean()),
            "logp_chosen_after": float(now[0].mean()),
            "logp_rejected_after": float(now[1].mean()),
            "update_norm": float(torch.stack([d.double().norm() for d in delta.values()]).norm()),
            **report,
            "changes": {
                "optimizer": [side.tolist() for side in predicted],
                "realised": [side.tolist() for side in realised],
            },
            "dry_run": {name: self._try(name, held, geometry, gram, (d_w, d_l)) for name in self.dry_run},
        }
        self._held, self._scores, self._start = None, None, {}
        return record

    def _gradients(self, batch: PairBatch) -> PairGradients:
        if self.method == "auto":
            try:
                found = PairGradients(self.logp, None, batch, method="ghost")
            except ConfigError:
                self.method = "loop"
            else:
                self.method = "ghost"
                return found
        return PairGradients(self.logp, None, batch, method=self.method, sketch_dim=self.sketch_dim)

    def _try(
        self, name: str, held: PairGradients, geometry: GradientGeometry, gram: Tensor, own: tuple[Tensor, Tensor]
    ) -> dict[str, float]:
        """What a step on the batch would do with a remedy in place."""
        if name == "token_mask":
            pairs = len(self.batch)
            step = torch.cat([own[0], -own[1]]).to(gram.dtype) / pairs
            rates = held.gram(self._gradients(mask_shared_tokens(self.batch))) @ step
            chosen, rejected = rates[:pairs], rates[pairs:]
        else:
            remedy = MITIGATIONS.get(name)
            found = batch_rates(gram, *(remedy(geometry, *own) if remedy else group_coefficients(gram, *own)))
            chosen, rejected = found.chosen, found.rejected
        return {
            "rate_chosen": float(chosen.mean()),
            "rate_rejected": float(rejected.mean()),
            "share_chosen_rises": float((chosen > 0).double().mean()),
            "share_rejected_falls": float((rejected < 0).double().mean()),
        }


def log_values(record: Mapping[str, Any]) -> dict[str, float]:
    """The record's headline numbers under the names that a logger shows."""
    rates = record["meters"].get("pair", record["meters"]["batch"])
    values = {
        "cosine_mean": record["cosine"]["mean"],
        "cosine_p90": record["cosine"]["p90"],
        "score_mean": record["score"]["mean"],
        "share_ideal": record["regimes"]["ideal"],
        "share_both_down": record["regimes"]["both_down"],
        "share_both_up": record["regimes"]["both_up"],
        "rate_chosen": rates["chosen"],
        "rate_rejected": rates["rejected"],
    }
    return {f"entanglement/{name}": value for name, value in values.items()}
