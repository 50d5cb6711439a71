"""`EntanglementCallback`: gradient entanglement measured during training with transformers' and TRL's trainers."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlkit2.entanglement.language_pairs import (
    check_positions,
    check_vocabulary,
    gold_rows,
    pairs_by_prompt,
    trained_pairs,
)
from rlkit2.entanglement.probe import EntanglementProbe, log_values
from rlkit2.entanglement.reference_point import ReferencePoint, mismatched_pairs
from rlkit2.entanglement.scores import (
    PairBatch,
    SequenceScore,
    causal_lm_logp,
    sequence_reward,
    sums_of_sides,
    untouched,
)
from rlkit2.entanglement.trainer_check import CoefficientCheck
from rlkit2.entanglement.trainers import (
    RowForm,
    calling_trainer,
    gold_weight,
    has_reference_point,
    loss_from_arguments,
    refuse_deepspeed,
    refuse_partial_weights,
    refuse_router_loss,
)
from rlkit2.errors import ConfigError, first_line, require
from rlkit2.losses.margin import MarginLoss, get_margin_loss

if TYPE_CHECKING:
    _Base = object
else:
    _Base = require("transformers", extra="trl").TrainerCallback

Reference = tuple[Tensor, Tensor] | Callable[[], tuple[Tensor, Tensor]] | str | None


class EntanglementWarning(UserWarning):
    """Something about the measurement that its reader must know; the training goes its way."""


def _never_ends_training(event: Callable[..., None]) -> Callable[..., None]:
    """An event of the trainer in which nothing may happen to the training: any failure switches the callback off with one warning."""

    @wraps(event)
    def guarded(self: EntanglementCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.off is not None:
            return
        try:
            with untouched(kwargs.get("model")):
                event(self, args, state, control, **kwargs)
        except Exception as error:  # noqa: BLE001
            self._switch_off(error)

    return guarded


class EntanglementCallback(_Base):
    """Measures a fixed set of preference pairs at every `every`-th optimiser step and writes one JSON line each.

    At those steps it takes the pairs' gradients just before the optimiser acts and compares with what the step really did, so the record
    holds all three meters (the pair's own step, the batch's step, the optimiser's real step) and the realised change. Parameters,
    gradients, optimiser and random states stay bit-identical. Values appear in the trainer's logs as `entanglement/...` for loggers that
    run later; the full record is only in the JSON lines.

    With several processes of plain data parallelism (accelerate, torchrun) the first one measures while the others wait for it at their next step.

    It never ends a training. What it cannot do (sharded or quantised weights, DeepSpeed, no pairs, an option that may change the loss in a way
    it does not know, any failure of its own) is one `EntanglementWarning` that names the reason, kept in `off`; from then on it does nothing. At
    the first step it holds the coefficients it claims against those that arrive from the trainer's own loss (`trainer_check` of the records) and
    warns where they differ.

    Args:
        every: optimiser steps between measurements.
        pairs: how many pairs are measured.
        dataset: where they are taken from (its first rows that the trainer would train on, cut as it cuts them): prepared token columns, or
            `prompt`, `chosen`, `rejected`. Default: the trainer's evaluation data, else the first rows of its training data.
        loss: margin loss; default: read from the trainer's arguments (DPO, CPO, ORPO, KTO, reward model).
        hyperparameters: of `loss`.
        reference: the reference model; default: the trainer's own, asked at every measurement (so one that is synchronised is followed), else
            the model's scores at the start of training; "initial": always the latter. Columns `ref_chosen_logps` and `ref_rejected_logps` of
            the pairs go first.
        method: see `EntanglementProbe`.
        microbatch: pairs at a time; less memory, more time.
        sketch_dim: for method "sketch".
        dry_run: remedies to try without training on them.
        jsonl: the file; default `entanglement.jsonl` in the trainer's output folder.

    Raises:
        MissingExtraError: transformers is not installed.
        ConfigError: an argument of the callback itself is out of range.
    """

    def __init__(
        self,
        every: int = 50,
        pairs: int = 8,
        dataset: Any = None,
        loss: str | MarginLoss | None = None,
        *,
        hyperparameters: Mapping[str, Any] | None = None,
        reference: Any = None,
        method: str = "auto",
        microbatch: int | None = None,
        sketch_dim: int = 1024,
        dry_run: Sequence[str] = ("normalised", "band", "likelihood"),
        jsonl: str | Path | None = None,
    ) -> None:
        if every < 1 or pairs < 1:
            raise ConfigError(f"every={every} and pairs={pairs} of EntanglementCallback must be at least 1")
        if isinstance(reference, str) and reference != "initial":
            raise ConfigError(f'reference={reference!r} of EntanglementCallback must be a model or "initial"')
        EntanglementProbe.check_choices(method, dry_run)
        self.every, self.pairs, self.dataset = every, pairs, dataset
        self.loss = None if loss is None else get_margin_loss(loss).bind(**(hyperparameters or {}))
        self.reference, self.jsonl = reference, jsonl
        self._options: dict[str, Any] = {
            "method": method,
            "microbatch": microbatch,
            "sketch_dim": sketch_dim,
            "dry_run": tuple(dry_run),
        }
        self.probe: EntanglementProbe | None = None
        self.record: dict[str, Any] | None = None
        self.off: str | None = None
        self._check: CoefficientCheck | None = None
        self._checked: dict[str, Any] | None = None
        self._point: ReferencePoint | None = None
        self._trainer: Any = None
        self._measuring = False
        self._lr: float | None = None
        self._origin = ""

    # --- the trainer's events ------------------------------------------------------------------------------------------------

    @_never_ends_training
    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, **kwargs: Any) -> None:
        """Choose the pairs and the loss, and score the reference."""
        if not state.is_world_process_zero:
            return
        self._trainer = calling_trainer(self)
        refuse_deepspeed(args, self._trainer)
        refuse_partial_weights(model)
        loss, gold, unpaired = self.loss, 0.0, False
        if loss is None:
            loss, gold, unpaired = loss_from_arguments(args), gold_weight(args), has_reference_point(args)
            refuse_router_loss(args, model)
        score = _score(model)
        batch, examples, self._origin = self._choose(args, score, kwargs)
        if loss.name == "bradley_terry" and "margin" in examples[0]:
            device = next(iter(score.params.values())).device
            loss = loss.bind(margin=torch.tensor([float(e["margin"]) for e in examples], device=device))
        reference = self._reference(args, state, examples, score, batch, loss)
        if unpaired:
            self._point = self._reference_point(examples, score, batch, RowForm.of(args))
        beside = self._gold(score, examples, args, kwargs, gold) if gold else None
        self.probe = EntanglementProbe(score, batch, loss, reference=reference, gold=beside, **self._options)
        self.jsonl = Path(self.jsonl or Path(args.output_dir, "entanglement.jsonl"))
        self.jsonl.parent.mkdir(parents=True, exist_ok=True)
        self._keep_lines(state.global_step)
        shared_point = (
            unpaired and getattr(args, "world_size", 1) > 1
        )  # a mean over all processes, of which one is seen
        if not getattr(args, "fp16", False) and getattr(args, "n_gpu", 1) < 2 and not shared_point:
            sides = 1 if loss.name == "kto" else 3 if gold else 2
            self._check = CoefficientCheck(model, sides, mismatched=unpaired)

    @_never_ends_training
    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Gradients of the pairs, where the coming step is one to measure."""
        if self.probe is None:
            return
        if self._check is not None:
            self._hold_against_trainer(args)
        self._measuring = (state.global_step + 1) % self.every == 0
        if self._measuring:
            self._lr = float(optimizer.param_groups[0]["lr"]) if optimizer is not None else None
            if self._point is not None:
                self.probe.loss = self.probe.loss.bind(z_ref=self._point(self.probe.loss.hyperparameters["beta"]))
            self.probe.before()

    @_never_ends_training
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare, and append the record to the file."""
        if not self._measuring or self.probe is None:
            return
        self._measuring = False
        record = self.probe.after(step=state.global_step, lr=self._lr)
        self.record = {"epoch": state.epoch, "pairs_from": self._origin, **record, "trainer_check": self._checked}
        if self._point is not None:
            self.record["reference_point"] = self.probe.loss.hyperparameters["z_ref"]
        with open(Path(self.jsonl or ""), "a", encoding="utf-8") as file:
            file.write(json.dumps(self.record) + "\n")

    @_never_ends_training
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the last record's headline to loggers that run after this callback."""
        if logs is not None and self.record is not None and "loss" in logs:
            logs.update(log_values(self.record))

    @_never_ends_training
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the trainer and its model."""
        self._let_go()

    # --- warnings and the end ------------------------------------------------------------------------------------------------

    def _switch_off(self, error: Exception) -> None:
        self.off = (
            first_line(error, 500)
            if isinstance(error, ConfigError | ValueError)
            else f"{type(error).__name__}: {first_line(error)}"
        )
        self._let_go()
        self._warn(f"{self.off}. Entanglement is not measured from here on; the training continues")

    def _let_go(self) -> None:
        if self._check is not None:
            with suppress(Exception):
                self._check.close()
        self.probe, self._check, self._trainer, self._measuring, self._point = None, None, None, False, None

    def _warn(self, text: str) -> None:
        """Say it once; where warnings are errors, on the error stream, since a training does not end for it."""
        try:
            warnings.warn(f"EntanglementCallback: {text}", EntanglementWarning, stacklevel=2)
        except Warning:
            print(f"EntanglementCallback: {text}", file=sys.stderr)  # noqa: T201

    # --- choices -------------------------------------------------------------------------------------------------------------

    def _choose(self, args: Any, score: SequenceScore, kwargs: Mapping[str, Any]) -> tuple[PairBatch, list[Any], str]:
        """The pairs, what they were made of, and where they are from; indexing leaves the training's order and random state alone."""
        config = getattr(score.module, "config", None)
        evaluation = getattr(self._trainer, "eval_dataset", None)
        if isinstance(evaluation, Mapping):  # several, by name
            evaluation = next(iter(evaluation.values()), None)
        sources = [
            ("dataset", self.dataset),
            ("evaluation data", evaluation),
            ("evaluation data", getattr(kwargs.get("eval_dataloader"), "dataset", None)),
            ("training data", getattr(kwargs.get("train_dataloader"), "dataset", None)),
        ]
        examples: list[Any]
        for origin, source in sources:
            if isinstance(source, PairBatch):
                batch, examples = source.select(slice(0, self.pairs)), [{}]
            elif source is not None:
                rows = _rows(source)
                first = next(rows, None)
                if first is None:
                    continue
                if (
                    isinstance(first, Mapping) and "label" in first and {"completion", "completion_ids"} & set(first)
                ):  # KTO's unpaired rows
                    first, rows = None, iter(pairs_by_prompt(_rows(source), self.pairs))
                chain = rows if first is None else _with_first(first, rows)
                batch, examples = trained_pairs(
                    chain, self.pairs, RowForm.of(args), kwargs.get("processing_class"), reward=score.head is None
                )
            else:
                continue
            check_vocabulary(batch, getattr(config, "vocab_size", None))
            check_positions(batch, config)
            device = next(iter(score.params.values())).device
            sides = ({k: tensor.to(device) for k, tensor in rows.items()} for rows in (batch.chosen, batch.rejected))
            return PairBatch(*sides), examples, origin
        raise ConfigError("no preference pairs to measure: give EntanglementCallback(dataset=...)")

    def _reference(
        self, args: Any, state: Any, examples: list[Any], score: SequenceScore, batch: PairBatch, loss: MarginLoss
    ) -> Reference:
        """Reference scores of the pairs, or how to ask for them at every measurement."""
        if not loss.needs_reference:
            return None
        if "ref_chosen_logps" in examples[0]:
            device = next(iter(score.params.values())).device
            columns = [[float(e[f"ref_{side}_logps"]) for e in examples] for side in ("chosen", "rejected")]
            return torch.tensor(columns[0], device=device), torch.tensor(columns[1], device=device)
        found = self._scorer(score)
        if found is not None:
            return found(batch) if not getattr(args, "sync_ref_model", False) else lambda: found(batch)
        if getattr(args, "sync_ref_model", False):
            raise ConfigError(
                "sync_ref_model moves the reference during training: give EntanglementCallback(reference=ref_model)"
            )
        if state.global_step:
            raise ConfigError(
                "the training is resumed, so the model's own scores now are not the reference's: give EntanglementCallback(reference=ref_model)"
            )
        return "initial"

    def _reference_point(
        self, examples: list[Any], score: SequenceScore, batch: PairBatch, form: RowForm
    ) -> ReferencePoint:
        """KTO's reference point on the measured pairs."""
        found = self._scorer(score)
        if found is None and "ref_chosen_logps" in examples[0]:
            raise ConfigError(
                "KTO's reference point needs more than the pairs' ref_chosen_logps: give EntanglementCallback(reference=ref_model)"
            )
        return ReferencePoint(score, mismatched_pairs(batch, form), found, self._options["microbatch"])

    def _gold(
        self, score: SequenceScore, examples: list[Any], args: Any, kwargs: Mapping[str, Any], weight: float
    ) -> tuple[Any, float]:
        """Rows of TPO's gold completions as the score takes them, and the weight of their likelihood."""
        rows = gold_rows(examples, RowForm.of(args), kwargs.get("processing_class"))
        device = next(iter(score.params.values())).device
        moved = {name: tensor.to(device) for name, tensor in rows.items()}
        return score.prepare(PairBatch(moved, moved)).chosen, weight

    def _scorer(self, score: SequenceScore) -> Callable[[PairBatch], tuple[Tensor, Tensor]] | None:
        """Scores under the reference model, where there is one beside the trained model."""
        if self.reference == "initial":
            return None
        module = self.reference if self.reference is not None else getattr(self._trainer, "ref_model", None)
        if isinstance(module, torch.nn.Module):
            frozen = causal_lm_logp(module, parameters="all")

            def ask(batch: PairBatch) -> tuple[Tensor, Tensor]:
                with untouched(module):
                    return sums_of_sides(frozen, frozen.prepare(batch), self._options["microbatch"])

            return ask
        policy: Any = score.module
        if hasattr(policy, "disable_adapter") and "ref" not in getattr(policy, "peft_config", ()):

            def without_adapter(batch: PairBatch) -> tuple[Tensor, Tensor]:
                with policy.disable_adapter():
                    return sums_of_sides(score, score.prepare(batch), self._options["microbatch"])

            return without_adapter
        return None

    def _hold_against_trainer(self, args: Any) -> None:
        """The coefficients that are claimed against those that arrived from the trainer's loss in the first microbatch."""
        check, probe = self._check, self.probe
        self._check = None
        if check is None or probe is None:
            return
        check.close()
        given = self._scorer(probe.logp)
        if given is None and getattr(args, "precompute_ref_log_probs", False):
            return  # the batch's own reference scores are not seen from here
        frozen = getattr(self._trainer, "ref_model", None)
        if isinstance(frozen, torch.nn.Module) and any(
            isinstance(m, torch.nn.Dropout) and m.training and m.p > 0 for m in frozen.modules()
        ):
            return  # the trainer's reference scores are drawn anew each time

        def reference(batch: PairBatch) -> tuple[Tensor, Tensor]:
            return given(batch) if given else sums_of_sides(probe.logp, probe.logp.prepare(batch))

        steps = getattr(self._trainer, "current_gradient_accumulation_steps", args.gradient_accumulation_steps)
        loss = probe.loss.bind(margin=0.0) if probe.loss.name == "bradley_terry" else probe.loss
        self._checked = check.compare(loss, reference, scale=1 / steps)
        if self._checked is not None and not self._checked["agree"]:
            claimed, trained = (
                "; ".join(
                    f"{name} {' '.join(f'{x:.3g}' for x in side[:3])}"
                    for name, side in zip(("d_w", "d_l"), found, strict=True)
                )
                for found in (self._checked["claimed"], self._checked["trained"])
            )
            self._warn(
                f"the trainer's loss has other coefficients than {loss.name}: {claimed} are claimed, but at the first step its gradients are "
                f"{trained}; the pair and batch meters are not those of this training"
            )

    def _keep_lines(self, step: int) -> None:
        """A resumed training keeps the lines up to its checkpoint; a new one starts an empty file."""
        path = Path(self.jsonl or "")
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() and step else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        path.write_text("".join(kept), encoding="utf-8")


def _rows(source: Any) -> Iterator[Any]:
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return (source[i] for i in range(len(source)))
    if isinstance(source, Iterable):
        return iter(source)
    raise ConfigError(f"cannot take pairs from {type(source).__name__}: give a list or a dataset of rows")


def _with_first(first: Any, rows: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rows


def _score(model: Any) -> SequenceScore:
    """What is scored: completions of a language model, whole rows of a reward model (one label)."""
    config = getattr(model, "config", None)
    names = (type(model).__name__, *(getattr(config, "architectures", None) or ()))
    reward = any("SequenceClassification" in name for name in names)
    return sequence_reward(model) if reward else causal_lm_logp(model)
