"""What TRL's trainers say about themselves: the loss their arguments stand for, how they cut rows, which weights and options are out of reach.

Every option is either modelled, known to leave the loss alone, or refused by name: an option that this module has never heard of and that does
not have its default value is refused too. Read against TRL 1.16 and transformers 5.24.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from rlkit2.errors import ConfigError
from rlkit2.losses.margin import MarginLoss, get_margin_loss, mixture, on_alpha_reward, on_f_divergence, wpo

GIVE_LOSS = "give EntanglementCallback(loss=..., hyperparameters=...)"

# transformers' own options that say how often, where and with which optimiser is trained, but not what is minimised
_HARMLESS = """output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps
    warmup_ratio optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules gradient_accumulation_steps
    average_tokens_across_devices max_grad_norm bf16 fp16 bf16_full_eval fp16_full_eval tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode
    use_liger_kernel liger_kernel_config use_cache torch_empty_cache_steps auto_find_batch_size logging_dir logging_strategy logging_steps
    logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen include_tokens_per_second log_level log_level_replica
    disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
    per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps
    include_for_metrics batch_eval_metrics save_only_model save_strategy save_steps save_on_each_node save_total_limit save_safetensors
    enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end
    metric_for_best_model greater_is_better ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu
    no_cuda accelerator_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names train_sampling_strategy
    group_by_length length_column_name ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
    ddp_timeout fsdp fsdp_config deepspeed debug skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank
    model_init_kwargs trust_remote_code disable_dropout dataset_num_proc pad_to_multiple_of pad_token padding_value padding_free
    activation_offloading precompute_ref_batch_size generate_during_eval eos_token chat_template_path"""
# options that loss_from_arguments and RowForm turn into what they mean, by trainer
_MODELLED = {
    "DPO": """loss_type loss_weights beta label_smoothing use_weighting f_divergence_type f_alpha_divergence_coef discopop_tau max_length
        truncation_mode precompute_ref_log_probs sync_ref_model ref_model_mixup_alpha ref_model_sync_steps router_aux_loss_coef""",
    "CPO": "loss_type beta label_smoothing cpo_alpha simpo_gamma alpha max_length",
    "ORPO": "beta max_length",
    "KTO": """loss_type beta desirable_weight undesirable_weight max_length precompute_ref_log_probs sync_ref_model ref_model_mixup_alpha
        ref_model_sync_steps router_aux_loss_coef""",
    "TPO": "loss_type beta label_smoothing tpo_alpha tpo_l_gamma max_length truncation_mode",
    "Reward": "center_rewards_coefficient max_length",
}
_ON_SCORES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
"""TRL's DPO losses that see f-divergence scores in place of log-ratios."""

_OUT_OF_ORDER = ("lomo", "layerwise")


def trainer_kind(args: Any) -> str:
    """ "DPO", "CPO", "ORPO", "KTO", "TPO" or "Reward": whose configuration these arguments are.

    Raises:
        ConfigError: none of them.
    """
    names = [base.__name__ for base in type(args).__mro__]
    found = next((kind for kind in _MODELLED if f"{kind}Config" in names), None)
    if found is None:
        raise ConfigError(f"cannot tell the loss from {names[0]}: {GIVE_LOSS}")
    return found


def refuse_unknown_options(args: Any) -> None:
    """Refuse every option that may change the loss in a way that is not modelled here.

    Raises:
        ConfigError: such an option has another value than its default; it is named.
    """
    known = {*_HARMLESS.split(), *_MODELLED[trainer_kind(args)].split()}
    for item in fields(args):
        if item.name in known or not item.init:
            continue
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        value = getattr(args, item.name)
        if value != default and not (item.name == "parallelism_config" and value is None):
            raise ConfigError(
                f"{item.name}={value!r} may change the loss, or when it acts, in a way that is not modelled: {GIVE_LOSS}"
            )
    optimizer = getattr(args, "optim", "")
    optimizer = str(getattr(optimizer, "value", optimizer)).lower()
    if any(word in optimizer for word in _OUT_OF_ORDER):
        raise ConfigError(
            f"optim={optimizer} changes the parameters during the backward pass, before they can be measured: use an optimiser that steps after it"
        )


def loss_from_arguments(args: Any) -> MarginLoss:
    """The margin loss that a TRL trainer with these arguments minimises.

    DPO: `loss_type` (also a weighted list), `beta`, `label_smoothing` (not for sigmoid, which ignores it), `discopop_tau`, f-divergences,
    `use_weighting` (WPO); CPO: `loss_type`, AlphaPO's `alpha`, and `cpo_alpha` times the token-mean likelihood; ORPO with its likelihood per
    token of prompts and completions; KTO as pairs of a wanted and an unwanted completion, half of both losses (its reference point, the
    hyper-parameter `z_ref`, is 0 here: see `has_reference_point`); TPO without its gold completions (see `gold_weight`); reward models with
    their centering.

    Raises:
        ConfigError: not the arguments of such a trainer, or an option that may change the loss in another way; it is named.
    """
    kind = trainer_kind(args)
    refuse_unknown_options(args)
    return _LOSSES[kind](args)


def _dpo(args: Any) -> MarginLoss:
    names = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
    weights = getattr(args, "loss_weights", None) or [1.0] * len(names)
    divergence = getattr(args, "f_divergence_type", None) or "reverse_kl"
    divergence = str(getattr(divergence, "value", divergence))
    given = {"beta": args.beta, "tau": getattr(args, "discopop_tau", 0.05)}
    bound = []
    for name in names:
        if name not in DPO_LOSSES:
            raise ConfigError(f"loss_type {name!r} of DPO is not known here: {GIVE_LOSS}")
        loss = get_margin_loss(name)
        own = dict(given) if name == "sigmoid" else {**given, "label_smoothing": args.label_smoothing}
        loss = loss.bind(**{k: v for k, v in own.items() if k in loss.hyperparameters})
        if divergence != "reverse_kl" and name in _ON_SCORES:
            loss = on_f_divergence(loss, divergence, alpha=getattr(args, "f_alpha_divergence_coef", 0.5))
        if getattr(args, "use_weighting", False):
            if loss.couples_batch:
                raise ConfigError(
                    f"use_weighting with loss_type {name!r}, which couples the batch, is not modelled: {GIVE_LOSS}"
                )
            loss = wpo(loss)
        bound.append(loss)
    plain = len(bound) == 1 and weights[0] == 1
    return bound[0] if plain else mixture(zip(bound, weights, strict=True))


DPO_LOSSES = (
    *_ON_SCORES,
    *("nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "aot_pair", "apo_zero", "apo_down", "sft"),
)
"""TRL's `loss_type`s of DPO that are modelled; any other is refused."""

CPO_LOSSES = {"sigmoid": "cpo", "hinge": "hinge_free", "ipo": "ipo_free", "simpo": "simpo"}
"""TRL's `loss_type`s of CPO and the losses they are."""


def _cpo(args: Any) -> MarginLoss:
    name = CPO_LOSSES.get(args.loss_type)
    if name is None:
        raise ConfigError(f"loss_type {args.loss_type!r} of CPO is not known here: {GIVE_LOSS}")
    loss = get_margin_loss(name)
    given = {
        "beta": args.beta,
        "gamma": getattr(args, "simpo_gamma", 0.5),
        "label_smoothing": args.label_smoothing,
        "lam": 0.0,
    }
    loss = loss.bind(**{k: v for k, v in given.items() if k in loss.hyperparameters})
    if getattr(args, "alpha", 0.0):
        loss = on_alpha_reward(loss, args.alpha)
    return mixture([(loss, 1.0), ("sft", args.cpo_alpha)]) if args.cpo_alpha else loss


KTO_LOSSES = ("kto", "apo_zero_unpaired")
"""TRL's `loss_type`s of KTO; the second is the first with its reference point at 0."""

TPO_LOSSES = {"sigmoid": "tpo", "hinge": "hinge_free", "ipo": "ipo_free", "tpo-l": "tpo_l"}
"""TRL's `loss_type`s of TPO and the losses they are, but for the gold completion's likelihood."""


def _kto(args: Any) -> MarginLoss:
    loss_type = getattr(args, "loss_type", "kto")
    if loss_type not in KTO_LOSSES:
        raise ConfigError(f"loss_type {loss_type!r} of KTO is not known here: {GIVE_LOSS}")
    # the trainer's mean is over rows, of which a pair has two
    sides = {"weight_chosen": args.desirable_weight / 2, "weight_rejected": args.undesirable_weight / 2}
    return get_margin_loss("kto").bind(beta=args.beta, **sides)


def has_reference_point(args: Any) -> bool:
    """Whether the trainer measures KTO's reference point on every batch."""
    return trainer_kind(args) == "KTO" and getattr(args, "loss_type", "kto") == "kto"


def _tpo(args: Any) -> MarginLoss:
    name = TPO_LOSSES.get(args.loss_type)
    if name is None:
        raise ConfigError(f"loss_type {args.loss_type!r} of TPO is not known here: {GIVE_LOSS}")
    loss = get_margin_loss(name)
    given = {"beta": args.beta, "gamma": args.tpo_l_gamma, "label_smoothing": args.label_smoothing}
    return loss.bind(**{k: v for k, v in given.items() if k in loss.hyperparameters})


def gold_weight(args: Any) -> float:
    """Weight of the likelihood per token that TPO gives to a third, gold completion of every pair; 0 for other trainers."""
    return float(args.tpo_alpha) if trainer_kind(args) == "TPO" else 0.0


def _reward(args: Any) -> MarginLoss:
    return get_margin_loss("bradley_terry").bind(centering=getattr(args, "center_rewards_coefficient", None) or 0.0)


_LOSSES: Mapping[str, Callable[[Any], MarginLoss]] = {
    "DPO": _dpo,
    "CPO": _cpo,
    "ORPO": lambda args: get_margin_loss("orpo_batch").bind(lam=args.beta),
    "KTO": _kto,
    "TPO": _tpo,
    "Reward": _reward,
}


@dataclass(frozen=True)
class RowForm:
    """How a trainer makes token rows of its data.

    Attributes:
        max_length: rows are cut to that many tokens; None: not at all.
        keep_end: cut from the left.
        drop_longer: leave longer rows out instead of cutting them (reward models).
        add_bos: put the tokenizer's start token in front where it is missing.
    """

    max_length: int | None = None
    keep_end: bool = False
    drop_longer: bool = False
    add_bos: bool = False

    @classmethod
    def of(cls, args: Any) -> RowForm:
        """The form that a trainer with these arguments uses; rows as they are for a trainer that is not known."""
        try:
            kind = trainer_kind(args)
        except ConfigError:
            return cls()
        longest = getattr(args, "max_length", None)
        if kind in ("CPO", "ORPO"):
            return cls(512 if longest is None else longest, add_bos=True)
        return cls(longest, getattr(args, "truncation_mode", "") == "keep_end", drop_longer=kind == "Reward")


def refuse_partial_weights(model: Any) -> None:
    """Refuse models whose weights are not all here as numbers.

    Raises:
        ConfigError: ZeRO-3 or FSDP shards, or k-bit weights.
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ConfigError("the model is sharded by FSDP: measure entanglement on one process with the whole model")
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


def refuse_deepspeed(args: Any, trainer: Any) -> None:
    """Refuse DeepSpeed, whose engine takes the optimiser's step inside the backward pass, before it can be measured.

    Raises:
        ConfigError: it trains with DeepSpeed.
    """
    if getattr(args, "deepspeed", None) or getattr(trainer, "is_deepspeed_enabled", False):
        raise ConfigError(
            "DeepSpeed (ZeRO) steps inside the backward pass, before the step can be measured: use plain data parallelism"
        )


def refuse_router_loss(args: Any, model: Any) -> None:
    """Refuse a mixture of experts that trains a router loss beside the preference loss.

    Raises:
        ConfigError: naming `router_aux_loss_coef` or `output_router_logits`.
    """
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not hasattr(text, "output_router_logits"):
        return
    if hasattr(args, "router_aux_loss_coef"):
        if args.router_aux_loss_coef != 0:
            raise ConfigError(
                "the model's experts add a router loss, which is not modelled: set router_aux_loss_coef=0"
            )
    elif text.output_router_logits:
        raise ConfigError(
            "the model's experts add a router loss, which is not modelled: set output_router_logits=False"
        )


def calling_trainer(callback: Any) -> Any:
    """The trainer that calls this callback now, or None.

    Callbacks are handed neither the trainer nor its evaluation data and reference model, so it is looked for among the callers: the object
    whose `callback_handler` holds this very callback.
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        handler = getattr(owner, "callback_handler", None)
        if any(one is callback for one in getattr(handler, "callbacks", ())):
            return owner
        frame = frame.f_back
    return None
