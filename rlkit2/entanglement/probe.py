"""A fixed set of pairs that is measured around optimiser steps: what was predicted, what happened, what a remedy would have changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlkit2.entanglement.geometry import GradientGeometry, batch_rates
from rlkit2.entanglement.measure import PairGradients, Sizes, pair_gradients
from rlkit2.entanglement.mitigation import MITIGATIONS, group_coefficients, mask_shared_tokens
from rlkit2.entanglement.scores import (
    PairBatch,
    PairLike,
    Rows,
    SequenceScore,
    as_pair_batch,
    evaluation_mode,
    margin_inputs,
    sums_of_sides,
)
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
        reference: reference scores `(chosen, rejected)`, `[P]` each, for losses that need them; a function that gives them, asked at every
            measurement; "initial": the scores of the model now.
        method: loop, vmap, ghost or sketch; "auto": see `pair_gradients`.
        microbatch: pairs at a time; default: see `pair_geometry`.
        sketch_dim: for the sketch.
        dry_run: remedies of `REMEDIES` whose effect is predicted each time.
        group_by: also report parts, see `pair_geometry`.
        gold: rows of further completions whose likelihood per token the loss trains beside the pairs, and its weight (TPO).

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
        reference: tuple[Tensor, Tensor] | Callable[[], tuple[Tensor, Tensor]] | str | None = None,
        method: str = "auto",
        microbatch: int | None = None,
        sketch_dim: int = 1024,
        dry_run: Sequence[str] = ("normalised", "band", "likelihood"),
        group_by: str | None = None,
        gold: tuple[Rows, float] | None = None,
    ) -> None:
        self.check_choices(method, dry_run)
        self.logp = logp
        self.batch = logp.prepare(as_pair_batch(batch))
        self.loss = get_margin_loss(loss).bind(**(hyperparameters or {}))
        self.method = method
        self._sizes: Sizes = {"microbatch": microbatch, "sketch_dim": sketch_dim}
        self.dry_run, self.group_by, self._gold = tuple(dry_run), group_by, gold
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
        self._outside_step: dict[str, Tensor] = {}
        self._scores: tuple[Tensor, Tensor] | None = None
        self._inputs: MarginInputs | None = None

    @staticmethod
    def check_choices(method: str, dry_run: Sequence[str]) -> None:
        """Refuse an unknown method or remedy.

        Raises:
            ConfigError: naming it.
        """
        unknown = [name for name in dry_run if name not in REMEDIES]
        if unknown:
            raise ConfigError(f"unknown remedy {unknown[0]!r}; known: {', '.join(REMEDIES)}")
        if method not in ("auto", "loop", "vmap", "ghost", "sketch"):
            raise ConfigError(f"method={method!r} of a probe must be auto, loop, vmap, ghost or sketch")

    def scores(self) -> tuple[Tensor, Tensor]:
        """Scores of the chosen and the rejected now, `[P]` each."""
        return sums_of_sides(self.logp, self.batch, self._sizes.get("microbatch"))

    def inputs(self, scores: tuple[Tensor, Tensor]) -> MarginInputs:
        """What the loss sees at these scores and the present parameters."""
        reference = self.reference() if callable(self.reference) else self.reference
        return margin_inputs(self.logp, self.batch, self.loss, scores, reference)

    def before(self) -> None:
        """Take the gradients at the present parameters."""
        self._scores = self.scores()
        self._inputs = self.inputs(self._scores)
        self._held = self._gradients(self.batch)
        self._outside_step = self._outside(self._inputs)
        self._start = {name: p.detach().clone() for name, p in self.logp.params.items()}

    def after(self, *, step: int | None = None, lr: float | None = None) -> dict[str, Any]:
        """Compare with the present parameters: a JSON-able record.

        Raises:
            ConfigError: `before()` was not called.
        """
        if self._held is None or self._scores is None or self._inputs is None:
            raise ConfigError("EntanglementProbe.after() needs before() in front of the optimiser's step")
        held, scores = self._held, self._scores
        now = self.scores()
        realised = now[0] - scores[0], now[1] - scores[1]
        delta = {name: p.detach() - self._start[name] for name, p in self.logp.params.items()}
        predicted = held.along(delta)
        d_w, d_l = self.loss.coefficients(self._inputs)
        geometry, gram = held.geometry(self.group_by), held.gram()
        outside = held.along(self._outside_step) if self._outside_step else None
        report = entanglement_report(
            geometry,
            (d_w, d_l),
            gram=gram,
            optimizer=predicted,
            realised=realised,
            outside=outside,
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
            "dry_run": {name: self._try(name, held, geometry, gram, (d_w, d_l), outside) for name in self.dry_run},
        }
        self._held, self._scores, self._inputs, self._start = None, None, None, {}
        return record

    def _outside(self, inputs: MarginInputs) -> dict[str, Tensor]:
        """The direction in which a loss that trains more than the completions of the pairs (prompts, gold completions) moves the parameters for
        the sake of that, per unit of learning rate.
        """
        if self.loss.needs_context:
            rows = self.batch.chosen
            first = rows["completion_mask"].long().argmax(1, keepdim=True)
            prompt = torch.arange(rows["input_ids"].shape[1], device=first.device)[None] < first
            rows, weight = {**rows, "completion_mask": prompt.long()}, 1.0
            tokens = (inputs.len_chosen + inputs.context_chosen).sum()
        elif self._gold is not None:
            rows, weight = self._gold
            tokens = self.logp.mask(rows).sum()
        else:
            return {}
        leaves = {name: p.detach().requires_grad_() for name, p in self.logp.params.items()}
        with evaluation_mode(self.logp.module), torch.enable_grad():
            mean = weight * self.logp.terms(leaves, rows).sum() / tokens
            found = torch.autograd.grad(mean, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    def _gradients(self, batch: PairBatch) -> PairGradients:
        found = pair_gradients(self.logp, batch, self.method, **self._sizes)
        self.method = found.method
        return found

    def _try(
        self,
        name: str,
        held: PairGradients,
        geometry: GradientGeometry,
        gram: Tensor,
        own: tuple[Tensor, Tensor],
        outside: tuple[Tensor, Tensor] | None,
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
        if outside is not None:
            chosen, rejected = chosen + outside[0], rejected + outside[1]
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
