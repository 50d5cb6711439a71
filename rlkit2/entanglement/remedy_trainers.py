"""Remedies in TRL's trainers: subclasses that train the same loss with normalised descent or with a learned token mask.

Nothing private of TRL is used: the trainer computes its own loss (and logs what it always logs), and the remedy works on the log-probabilities or
logits that the model handed to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlkit2.entanglement.mitigation import gradient_loss, group_factors
from rlkit2.entanglement.scores import untouched
from rlkit2.entanglement.token_mask import TokenMask, masked_loss
from rlkit2.entanglement.trainers import loss_from_arguments, refuse_partial_weights, refuse_router_loss, trainer_kind
from rlkit2.errors import ConfigError, require

REMEDIES = ("normalised", "token_mask")
MASK_FILE = "token_mask.safetensors"


def with_remedy(trainer: type[Any], remedy: str = "normalised", **options: Any) -> type[Any]:
    """A subclass of a TRL trainer that trains with a remedy: `with_remedy(DPOTrainer)(model=..., args=..., train_dataset=...)`.

    `normalised`: the two parts of the batch's gradient, through the chosen and through the rejected rows, are brought to one length; the step keeps
    its own. For any trainer of pairs whose batches hold the chosen rows first (DPO, CPO, ORPO, reward models) and any of its losses. Costs one
    more backward pass. Without a guarantee for single pairs.

    `token_mask`: see `rlkit2.entanglement.token_mask`; for DPO. Costs one more forward pass. Options: `sparsity` (default 0.01), `mask_learning_rate`
    (default: the trainer's own times 100). The mask is kept in every checkpoint and read again when training is resumed.

    Evaluation shows the trainer's own loss.

    Raises:
        ConfigError: an unknown remedy, or options that it does not take.
        MissingExtraError: TRL is not installed.
    """
    require("trl", extra="trl")
    if remedy == "normalised" and not options:
        return type(f"Normalised{trainer.__name__}", (_Normalised, trainer), {})
    if remedy == "token_mask" and set(options) <= {"sparsity", "mask_learning_rate"}:
        return type(f"Masked{trainer.__name__}", (_Masked, trainer), {"mask_options": options})
    known = {"normalised": "none", "token_mask": "sparsity, mask_learning_rate"}
    if remedy in known:
        raise ConfigError(f"remedy {remedy!r} does not take {sorted(options)}; its options: {known[remedy]}")
    raise ConfigError(f"unknown remedy {remedy!r} for a trainer; known: {', '.join(REMEDIES)}")


@contextmanager
def _hearing(model: torch.nn.Module) -> Iterator[list[Tensor]]:
    """What the model gives with gradients during the block: log-probabilities where it computes them itself, else logits."""
    heard: list[Tensor] = []

    def hear(module: Any, args: Any, output: Any) -> None:
        given = getattr(output, "log_probs", None)
        given = getattr(output, "logits", None) if given is None else given
        if torch.is_grad_enabled() and isinstance(given, Tensor) and given.requires_grad:
            heard.append(given)

    handle = model.register_forward_hook(hear)
    try:
        yield heard
    finally:
        handle.remove()


class _Normalised:
    """Mix-in of `with_remedy`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        kind = trainer_kind(trainer.args)
        if kind in ("KTO", "TPO"):
            raise ConfigError(f"normalised descent needs batches of pairs, the chosen first; {kind} trains others")
        refuse_partial_weights(trainer.model)
        refuse_router_loss(trainer.args, trainer.model)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own loss with another gradient."""
        base: Any = super()
        if not torch.is_grad_enabled():
            return base.compute_loss(model, inputs, *args, **kwargs)
        with _hearing(model) as heard:
            found = base.compute_loss(model, inputs, *args, **kwargs)
        loss, *rest = found if isinstance(found, tuple) else (found,)
        if len(heard) != 1 or len(heard[0]) % 2:
            rows = ", ".join(str(len(given)) for given in heard) or "no"
            raise ConfigError(
                f"normalised descent needs one pass of an even number of rows, the chosen first; the trainer made {len(heard)} of {rows} rows"
            )
        loss = normalised_step(loss, heard[0], [p for p in model.parameters() if p.requires_grad])
        return (loss, *rest) if isinstance(found, tuple) else loss


def normalised_step(loss: Tensor, rows: Tensor, params: Sequence[Tensor]) -> Tensor:
    """A scalar with the value of `loss` whose gradient is normalised descent: its parts through the first and the second half of `rows` brought to
    one length, the length of their sum kept (at most `LONGEST_STEP` times what keeps the loss's scale).

    Args:
        loss: scalar that depends on the parameters through `rows` alone.
        rows: `[2P, ...]` outputs of the model with their graph, the chosen first.
        params: what is trained.
    """
    (slope,) = torch.autograd.grad(loss, rows, retain_graph=True)
    first = torch.arange(len(rows), device=rows.device) < len(rows) // 2
    chosen = first.reshape(-1, *[1] * (rows.ndim - 1))
    parts = [
        torch.autograd.grad(rows, params, slope * side, retain_graph=True, allow_unused=True, materialize_grads=True)
        for side in (chosen, ~chosen)
    ]  # downhill is -g_w for the chosen and +g_l for the rejected
    w2, l2, ip = (
        torch.stack([(x.float() * y.float()).sum() for x, y in zip(parts[i], parts[j], strict=True)]).sum()
        for i, j in ((0, 0), (1, 1), (0, 1))
    )
    factor_w, factor_l = group_factors(w2, l2, -ip)
    return gradient_loss(loss, params, [factor_w * x + factor_l * y for x, y in zip(*parts, strict=True)])


class _Masked:
    """Mix-in of `with_remedy`."""

    mask_options: Mapping[str, Any] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        arguments, model = trainer.args, trainer.model
        if trainer_kind(arguments) != "DPO":
            raise ConfigError("the learned token mask is for DPO trainers; normalised descent is for others too")
        self.masked_margin_loss = loss_from_arguments(arguments)
        if self.masked_margin_loss.needs_collision or arguments.precompute_ref_log_probs:
            odd = "precompute_ref_log_probs" if arguments.precompute_ref_log_probs else "use_weighting"
            raise ConfigError(f"the learned token mask needs log-probabilities of single tokens: leave {odd} out")
        if "ref" in getattr(model, "peft_config", ()):
            raise ConfigError(
                "the learned token mask needs a reference of its own: give ref_model, or train a new adapter"
            )
        refuse_partial_weights(model)
        refuse_router_loss(arguments, model)
        device = next(model.parameters()).device
        self.token_mask = TokenMask(model.config.get_text_config().hidden_size).to(device)
        self.resumed_from: Any = None
        self.mean_weight = math.nan
        trainer.add_callback(_mask_keeper(trainer))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's optimiser, which learns the mask too."""
        trainer: Any = self
        base: Any = super()
        made = base.create_optimizer(*args, **kwargs)
        known = {id(p) for group in made.param_groups for p in group["params"]}
        missing = [p for p in self.token_mask.parameters() if id(p) not in known]
        if missing:
            rate = self.mask_options.get("mask_learning_rate", 100 * trainer.args.learning_rate)
            made.add_param_group({"params": missing, "lr": rate, "weight_decay": 0.0})
        return made

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own."""
        self.resumed_from = resume_from_checkpoint
        base: Any = super()
        return base.train(resume_from_checkpoint, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        """The trainer's logs with the mask's mean weight in the last batch."""
        base: Any = super()
        return base.log({**logs, "token_mask/mean": self.mean_weight} if "loss" in logs else logs, *args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The margin loss of masked log-probabilities; the trainer's own loss is computed for its logs."""
        trainer: Any = self
        base: Any = super()
        if not torch.is_grad_enabled():
            return base.compute_loss(model, inputs, *args, **kwargs)
        with torch.no_grad(), untouched(model):
            base.compute_loss(model, inputs)
        tokens, states = _tokens(model, inputs)
        completions = inputs["completion_mask"][:, 1:].to(tokens.dtype)
        weights = self.token_mask(states).to(tokens.dtype)
        self.mean_weight = float((weights.detach() * completions).sum() / completions.sum())
        reference = None
        if self.masked_margin_loss.needs_reference:
            with torch.no_grad():
                frozen = trainer.ref_model
                policy = trainer.accelerator.unwrap_model(model)
                with nullcontext() if frozen is not None else policy.disable_adapter():
                    reference = _tokens(model if frozen is None else frozen, inputs)[0]
        sides = [None if x is None else x.chunk(2) for x in (tokens, reference, weights, completions)]
        sparsity = self.mask_options.get("sparsity", 0.01)
        return masked_loss(self.masked_margin_loss, *sides, sparsity=sparsity).mean()  # type: ignore[arg-type]


def _tokens(model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens 1..T-1 and the states that predict them."""
    names = {"input_ids", "attention_mask"}
    output = model(**{n: inputs[n] for n in names}, output_hidden_states=True, use_cache=False)
    logps = output.logits[:, :-1].float().log_softmax(-1)
    return logps.gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1), output.hidden_states[-1][:, :-1]


def _mask_keeper(trainer: Any) -> Any:
    """A callback that keeps the mask in checkpoints, and takes it from the one that is resumed."""
    base: Any = require("transformers", extra="trl").TrainerCallback

    class MaskKeeper(base):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not state.global_step:
                return
            given = trainer.resumed_from
            folder = Path(
                given if isinstance(given, str | Path) else f"{args.output_dir}/checkpoint-{state.global_step}"
            )
            if not (folder / MASK_FILE).is_file():
                raise ConfigError(f"{folder} has no {MASK_FILE}: it was not written by a training with a token mask")
            trainer.token_mask.load_state_dict(load_file(folder / MASK_FILE))

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for (
                p
            ) in trainer.token_mask.parameters():  # it is no part of the model that is wrapped for several processes
                p.grad = trainer.accelerator.reduce(p.grad, "mean")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.token_mask.zero_grad()

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
                save_file(trainer.token_mask.state_dict(), folder / MASK_FILE)

    return MaskKeeper()
