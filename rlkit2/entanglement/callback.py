"""`EntanglementCallback`: gradient entanglement measured during training with transformers' and TRL's trainers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlkit2.entanglement.language_pairs import (
    check_vocabulary,
    encode_pairs,
    pairs_by_prompt,
    reward_rows,
    token_rows,
)
from rlkit2.entanglement.probe import EntanglementProbe, log_values
from rlkit2.entanglement.scores import PairBatch, SequenceScore, causal_lm_logp, evaluation_mode, sequence_reward
from rlkit2.errors import ConfigError, require
from rlkit2.losses.margin import MarginLoss, get_margin_loss, mixture

if TYPE_CHECKING:
    _Base = object
else:
    _Base = require("transformers", extra="trl").TrainerCallback


class EntanglementCallback(_Base):
    """Measures a fixed set of preference pairs at every `every`-th optimiser step and writes one JSON line each.

    At those steps it takes the pairs' gradients just before the optimiser acts and compares with what the step really did, so the record
    holds all three meters (the pair's own step, the batch's step, the optimiser's real step) and the realised change. Parameters,
    gradients, optimiser and random states stay bit-identical. Values appear in the trainer's logs as `entanglement/...` for loggers that
    run later; the full record is only in the JSON lines.

    Args:
        every: optimiser steps between measurements.
        pairs: how many pairs are measured.
        dataset: where they are taken from (its first rows): prepared token columns, or `prompt`, `chosen`, `rejected`. Default: the
            trainer's evaluation data, else the first rows of its training data.
        loss: margin loss; default: read from the trainer's arguments (DPO, CPO, ORPO, reward model).
        hyperparameters: of `loss`.
        reference: "initial" takes the model's scores at the start of training as reference scores (right where the reference is the initial
            policy); or the reference model. Columns `ref_chosen_logps` and `ref_rejected_logps` of the dataset go first.
        method: see `EntanglementProbe`.
        sketch_dim: for method "sketch".
        dry_run: remedies to try without training on them.
        jsonl: the file; default `entanglement.jsonl` in the trainer's output folder.

    Raises:
        MissingExtraError: transformers is not installed.
        ConfigError: at the start of training: sharded or quantised weights, no pairs, or a loss that cannot be told from the arguments.
    """

    def __init__(
        self,
        every: int = 50,
        pairs: int = 8,
        dataset: Any = None,
        loss: str | MarginLoss | None = None,
        *,
        hyperparameters: Mapping[str, Any] | None = None,
        reference: Any = "initial",
        method: str = "auto",
        sketch_dim: int = 1024,
        dry_run: Sequence[str] = ("normalised", "band", "likelihood"),
        jsonl: str | Path | None = None,
    ) -> None:
        if every < 1 or pairs < 1:
            raise ConfigError(f"every={every} and pairs={pairs} of EntanglementCallback must be at least 1")
        self.every, self.pairs, self.dataset = every, pairs, dataset
        self.loss = None if loss is None else get_margin_loss(loss).bind(**(hyperparameters or {}))
        self.reference, self.jsonl = reference, jsonl
        self._options: dict[str, Any] = {"method": method, "sketch_dim": sketch_dim, "dry_run": tuple(dry_run)}
        self.probe: EntanglementProbe | None = None
        self.record: dict[str, Any] | None = None
        self._measuring = False
        self._lr: float | None = None
        self._origin = ""

    # --- the trainer's events ------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, **kwargs: Any) -> None:
        """Choose the pairs and the loss, and score the reference."""
        if not state.is_world_process_zero:
            return
        refuse_partial_weights(model)
        examples, origin = self._examples(kwargs.get("eval_dataloader"), kwargs.get("train_dataloader"))
        score, batch = _scored(model, examples, kwargs.get("processing_class"))
        loss = self.loss or loss_from_arguments(args)
        reference = self._reference(examples, score, batch, loss)
        self.probe = EntanglementProbe(score, batch, loss, reference=reference, **self._options)
        self.jsonl = Path(self.jsonl or Path(args.output_dir, "entanglement.jsonl"))
        self.jsonl.parent.mkdir(parents=True, exist_ok=True)
        self._keep_lines(state.global_step)
        self._origin = origin

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Gradients of the pairs, where the coming step is one to measure."""
        self._measuring = self.probe is not None and (state.global_step + 1) % self.every == 0
        if self._measuring and self.probe is not None:
            self._lr = float(optimizer.param_groups[0]["lr"]) if optimizer is not None else None
            self.probe.before()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare, and append the record to the file."""
        if not self._measuring or self.probe is None:
            return
        self._measuring = False
        record = self.probe.after(step=state.global_step, lr=self._lr)
        self.record = {"epoch": state.epoch, "pairs_from": self._origin, **record}
        with open(Path(self.jsonl or ""), "a", encoding="utf-8") as file:
            file.write(json.dumps(self.record) + "\n")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the last record's headline to loggers that run after this callback."""
        if logs is not None and self.record is not None and "loss" in logs:
            logs.update(log_values(self.record))

    # --- choices -------------------------------------------------------------------------------------------------------------

    def _examples(self, eval_dataloader: Any, train_dataloader: Any) -> tuple[list[Any], str]:
        """The first rows of the dataset; indexing leaves the training's order and random state alone."""
        for origin, source in (
            ("dataset", self.dataset),
            ("evaluation data", getattr(eval_dataloader, "dataset", None)),
            ("training data", getattr(train_dataloader, "dataset", None)),
        ):
            if isinstance(source, PairBatch):
                return [source.select(slice(0, self.pairs))], origin
            if source is not None:
                found = _first(source, self.pairs)
                if found and {"completion", "label"} <= set(found[0]):  # KTO's unpaired rows
                    return pairs_by_prompt(source, self.pairs), origin
                if found:
                    return found, origin
        raise ConfigError("no preference pairs to measure: give EntanglementCallback(dataset=...)")

    def _reference(
        self, examples: list[Any], score: SequenceScore, batch: PairBatch, loss: MarginLoss
    ) -> tuple[Tensor, Tensor] | str | None:
        if not loss.needs_reference:
            return None
        if isinstance(examples[0], Mapping) and "ref_chosen_logps" in examples[0]:
            device = next(iter(score.params.values())).device
            columns = [[float(e[f"ref_{side}_logps"]) for e in examples] for side in ("chosen", "rejected")]
            return torch.tensor(columns[0], device=device), torch.tensor(columns[1], device=device)
        if isinstance(self.reference, torch.nn.Module):
            frozen = causal_lm_logp(self.reference, parameters="all")
            with torch.no_grad(), evaluation_mode(self.reference):
                rows = frozen.prepare(batch)
                return frozen.sums(frozen.params, rows.chosen), frozen.sums(frozen.params, rows.rejected)
        found: tuple[Tensor, Tensor] | str | None = self.reference
        return found

    def _keep_lines(self, step: int) -> None:
        """A resumed training keeps the lines up to its checkpoint; a new one starts an empty file."""
        path = Path(self.jsonl or "")
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() and step else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        path.write_text("".join(kept), encoding="utf-8")


def _first(source: Any, count: int) -> list[Any]:
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return [source[i] for i in range(min(count, len(source)))]
    if isinstance(source, Iterable):
        return list(islice(source, count))
    raise ConfigError(f"cannot take pairs from {type(source).__name__}: give a list or a dataset of rows")


def _scored(model: Any, examples: list[Any], tokenizer: Any) -> tuple[SequenceScore, PairBatch]:
    """What is scored and the rows, for a language model or a reward model (one label)."""
    config = getattr(model, "config", None)
    reward = any(
        "SequenceClassification" in name
        for name in (type(model).__name__, *(getattr(config, "architectures", None) or ()))
    )
    score = sequence_reward(model) if reward else causal_lm_logp(model)
    if isinstance(examples[0], PairBatch):
        batch = examples[0]
    elif reward:
        batch = reward_rows(examples, tokenizer)
    elif any(name in examples[0] for name in ("chosen_ids", "chosen_input_ids")):
        batch = token_rows(examples)
    elif tokenizer is not None and all(name in examples[0] for name in ("prompt", "chosen", "rejected")):
        batch = encode_pairs(tokenizer, examples)
    else:
        raise ConfigError(
            f"cannot make pairs of rows with {', '.join(sorted(examples[0]))}: give prompt, chosen and rejected"
        )
    check_vocabulary(batch, getattr(config, "vocab_size", None))
    device = next(iter(score.params.values())).device
    sides = ({name: tensor.to(device) for name, tensor in rows.items()} for rows in (batch.chosen, batch.rejected))
    return score, PairBatch(*sides)


def refuse_partial_weights(model: Any) -> None:
    """Refuse models whose weights are not all here as numbers.

    Raises:
        ConfigError: ZeRO-3 or FSDP shards, or k-bit weights.
    """
    if getattr(model, "is_quantized", False):
        raise ConfigError("the model is quantised to k bits: load it in bfloat16 or float32 to measure entanglement")
    for name, p in model.named_parameters():
        if hasattr(p, "ds_id") or type(p).__name__ in ("FlatParameter", "DTensor") or hasattr(p, "device_mesh"):
            raise ConfigError(
                f"parameter {name} is sharded (ZeRO-3 or FSDP): measure entanglement on one process with the whole model"
            )
        if hasattr(p, "quant_state") or not (p.is_floating_point() or p.is_complex()):
            raise ConfigError(
                f"parameter {name} is quantised to k bits: load the model in bfloat16 or float32 to measure entanglement"
            )


def loss_from_arguments(args: Any) -> MarginLoss:
    """The margin loss that a TRL trainer with these arguments minimises.

    DPO: `loss_type` (also a weighted list), `beta`, `label_smoothing` (not for sigmoid, which ignores it), `discopop_tau`; CPO:
    `loss_type` plus `cpo_alpha` times the token-mean likelihood; ORPO; KTO (as pairs); reward models with their centering.

    Raises:
        ConfigError: not the arguments of such a trainer, or an option that changes the loss in another way.
    """
    kind = type(args).__name__
    if kind.startswith("ORPO"):
        return get_margin_loss("orpo").bind(lam=args.beta)
    if kind.startswith("Reward"):
        return get_margin_loss("bradley_terry").bind(centering=getattr(args, "center_rewards_coefficient", None) or 0.0)
    if kind.startswith("CPO"):
        return _cpo_loss(args)
    if kind.startswith("KTO"):  # the reference point is left at 0: it needs the batch's mismatched pairs
        sides = {"weight_chosen": args.desirable_weight, "weight_rejected": args.undesirable_weight}
        return get_margin_loss("kto").bind(beta=args.beta, **sides)
    if not kind.startswith("DPO"):
        raise ConfigError(f"cannot tell the loss from {kind}: give EntanglementCallback(loss=..., hyperparameters=...)")
    if getattr(args, "f_divergence_type", "reverse_kl") not in ("reverse_kl", None) or getattr(args, "ld_alpha", None):
        raise ConfigError("f_divergence_type and ld_alpha change the loss: give EntanglementCallback(loss=...)")
    names = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
    weights = getattr(args, "loss_weights", None) or [1.0] * len(names)
    given = {"beta": args.beta, "tau": getattr(args, "discopop_tau", 0.05)}
    bound = []
    for name in names:
        loss = get_margin_loss(name)
        smoothing = {"label_smoothing": args.label_smoothing} if name != "sigmoid" else {}
        bound.append(loss.bind(**{k: v for k, v in {**given, **smoothing}.items() if k in loss.hyperparameters}))
    return bound[0] if len(bound) == 1 else mixture(zip(bound, weights, strict=True))


def _cpo_loss(args: Any) -> MarginLoss:
    given = {
        "beta": args.beta,
        "gamma": getattr(args, "simpo_gamma", 0.5),
        "alpha": getattr(args, "alpha", 0.0),
        "label_smoothing": args.label_smoothing,
    }
    name = {"sigmoid": "cpo", "hinge": "hinge_free", "ipo": "ipo_free", "simpo": "simpo"}.get(args.loss_type)
    if name is None:
        raise ConfigError(f"unknown loss_type {args.loss_type!r} of CPO: give EntanglementCallback(loss=...)")
    if name == "simpo" and given["alpha"]:
        name = "alphapo"
    loss = get_margin_loss(name)
    bound = loss.bind(
        **{k: v for k, v in given.items() if k in loss.hyperparameters}, **({"lam": 0.0} if name == "cpo" else {})
    )
    return mixture([(bound, 1.0), ("sft", args.cpo_alpha)]) if args.cpo_alpha else bound
