"""Real trainers of TRL with every option that their configurations have: with the callback the training is the same to the last bit, and
the coefficients are those of the trainer's own loss, or the callback refuses the option by name.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
import re
import warnings
from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl")

from rlkit2.entanglement.callback import EntanglementWarning  # noqa: E402
from rlkit2.entanglement.trainers import (  # noqa: E402
    CPO_LOSSES,
    DPO_LOSSES,
    KTO_LOSSES,
    TPO_LOSSES,
    loss_from_arguments,
    refuse_unknown_options,
)
from rlkit2.errors import ConfigError  # noqa: E402
from rlkit2.preferences import EntanglementCallback  # noqa: E402
from tests.entanglement.tiny_trl import gpt2, make_trainer, text_pairs, training_state  # noqa: E402

# option values that are not the default; what is not named here gets a value made from its type
VALUES = {
    "DPO": {
        "loss_type": [[name] for name in DPO_LOSSES if name != "aot_pair"]
        + [["sigmoid", "bco_pair", "sft"], ["sigmoid_norm", "sft"]],
        "f_divergence_type": ["forward_kl", "js_divergence", "alpha_divergence"],
        "truncation_mode": ["keep_end"],
        "max_length": [14, 11],
        "label_smoothing": [0.1],
        "beta": [0.7],
        "loss_weights": [[2.0]],
    },
    "CPO": {"loss_type": list(CPO_LOSSES), "max_length": [14], "alpha": [0.05], "cpo_alpha": [0.0, 0.3]},
    "ORPO": {"max_length": [14], "beta": [0.5]},
    "KTO": {"loss_type": list(KTO_LOSSES), "beta": [0.7], "max_length": [14], "desirable_weight": [1.5]},
    "TPO": {
        "loss_type": list(TPO_LOSSES),
        "beta": [0.7],
        "max_length": [14],
        "truncation_mode": ["keep_end"],
        "tpo_alpha": [0.0, 0.3],
        "label_smoothing": [0.1],
    },
    "Reward": {"max_length": [16], "center_rewards_coefficient": [0.1]},
}
TOGETHER = [
    ("DPO", {"loss_type": ["hinge"], "f_divergence_type": "forward_kl"}),
    ("DPO", {"loss_type": ["ipo", "sigmoid"], "loss_weights": [0.3, 2.0], "f_divergence_type": "js_divergence"}),
    ("DPO", {"loss_type": ["sigmoid_norm"], "use_weighting": True, "beta": 1.5}),
    ("DPO", {"loss_type": ["exo_pair"], "label_smoothing": 0.2, "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}),
    ("DPO", {"loss_type": ["robust"], "label_smoothing": 0.2, "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}),
    ("DPO", {"loss_type": ["discopop"], "discopop_tau": 0.3, "use_weighting": True}),
    ("DPO", {"loss_type": ["aot"], "use_weighting": True}),
    ("DPO", {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}),
    ("KTO", {"desirable_weight": 2.0, "undesirable_weight": 0.5, "beta": 1.5, "sync_ref_model": True, "ref_model_sync_steps": 1}),
    ("TPO", {"loss_type": "tpo-l", "tpo_l_gamma": 0.1, "label_smoothing": 0.2, "beta": 1.5}),
    ("CPO", {"loss_type": "sigmoid", "alpha": 0.05, "label_smoothing": 0.1}),
    ("CPO", {"loss_type": "hinge", "alpha": 0.05, "beta": 0.5}),
    ("CPO", {"loss_type": "ipo", "alpha": 0.2, "cpo_alpha": 0.0}),
    ("CPO", {"loss_type": "simpo", "alpha": 0.2, "label_smoothing": 0.2, "simpo_gamma": 0.1}),
]  # fmt: skip
# what cannot be switched on here at all (other hardware, another package, another kind of data), or says where things are written
ELSEWHERE = """output_dir fp16 fp16_full_eval bf16_full_eval tf32 torch_compile torch_compile_backend torch_compile_mode
    use_liger_kernel deepspeed fsdp fsdp_config use_cpu no_cuda local_rank ddp_backend parallelism_config
    push_to_hub hub_model_id hub_token hub_strategy report_to model_init_kwargs resume_from_checkpoint
    remove_unused_columns per_device_train_batch_size max_steps optim optim_args optim_target_modules
    auto_find_batch_size eval_strategy eval_steps eval_on_start load_best_model_at_end save_strategy debug
    skip_memory_metrics label_names generate_during_eval is_encoder_decoder max_completion_length chat_template_path
    eos_token pad_token padding_value dataset_num_proc dataloader_num_workers dataloader_prefetch_factor
    dataloader_persistent_workers dataloader_multiprocessing_context metric_for_best_model greater_is_better
    include_for_metrics lr_scheduler_type lr_scheduler_kwargs full_determinism accelerator_config log_level
    log_level_replica project liger_kernel_config gradient_checkpointing_kwargs activation_checkpointing_kwargs
    trackio_space_id trackio_bucket_id trackio_static_space_id hub_private_repo hub_always_push hub_revision
    do_predict do_eval ddp_timeout ddp_bucket_cap_mb run_name logging_strategy enable_jit_checkpoint
    train_sampling_strategy length_column_name trust_remote_code dataloader_drop_last disable_tqdm save_total_limit
    save_steps eval_delay eval_accumulation_steps use_cache batch_eval_metrics eval_do_concat_batches
    prediction_loss_only"""


def _other(item, default):
    """A value of the option's type that is not the default."""
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1
    if isinstance(default, float):
        return 0.5 if "adam_beta" in item.name else default * 1.5 + 0.01
    return {"bf16": True, "activation_checkpointing": True}.get(item.name, 1)


def _options(kind):
    """`(name, value)` of every option of the installed configuration."""
    config = type(make_trainer(kind, "unused", only_config=True))
    own = {f.name for f in dataclasses.fields(config)}
    for item in dataclasses.fields(config):
        if item.name in ELSEWHERE.split() or not item.init:
            continue
        default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
        for value in VALUES[kind].get(item.name, [_other(item, default)]):
            yield item.name, value
    assert set(VALUES[kind]) <= own


def _elsewhere():
    """A reference model that is not the start of training: at equal scores most losses look alike."""
    model = gpt2()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return model


def _settle(kind, folder, options):
    """ "equal", or the reason of a refusal; raises where a training changed or a coefficient is wrong."""
    options = dict(options)
    if options.get("loss_type") in (["exo_pair"], ["robust"]):
        options.setdefault("label_smoothing", 0.1)
    if options.get("f_divergence_type") and "loss_type" not in options:
        options["loss_type"] = ["sigmoid"]
    states, callback = [], EntanglementCallback(every=1, pairs=3)
    for name in ("without", "with"):
        try:
            trainer = make_trainer(
                kind,
                folder / name,
                [callback] if name == "with" else [],
                reference=_elsewhere(),
                **{"max_steps": 2, **options},
            )
        except (ValueError, TypeError, ImportError, RuntimeError, KeyError, AttributeError) as error:
            if name == "with":
                raise
            return f"TRL does not start: {error}"
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                trainer.train()
            except (ValueError, TypeError, ImportError, RuntimeError, KeyError, AttributeError) as error:
                if name == "with":
                    raise
                return f"TRL does not train: {error}"
        states.append(training_state(trainer))
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key
    warned = [str(w.message) for w in said if issubclass(w.category, EntanglementWarning)]
    if callback.off is not None:
        assert any(name in callback.off for name in options), callback.off
        assert len(warned) == 1
        return f"refused: {callback.off}"
    assert not warned, warned
    assert callback.record is not None
    if callback.record["trainer_check"] is None:
        hidden = options.get("precompute_ref_log_probs") or options.get("disable_dropout") is False
        assert hidden or options.get("loss_type") == "hinge", "no coefficients were compared"
    else:
        assert callback.record["trainer_check"]["agree"]
    return "equal"


@pytest.mark.parametrize(("kind", "options"), [
    ("DPO", {"use_weighting": True}), ("DPO", {"max_length": 14}), ("DPO", {"ld_alpha": 0.5}), ("DPO", {"neftune_noise_alpha": 1.0}), *TOGETHER[:2],
    TOGETHER[7], TOGETHER[11], TOGETHER[13], ("KTO", {}), TOGETHER[8], TOGETHER[9], ("TPO", {"tpo_alpha": 0.0}),
    ("ORPO", {}), ("Reward", {"center_rewards_coefficient": 0.1}),
])  # fmt: skip
def test_some_options(tmp_path, kind, options):
    outcome = _settle(kind, tmp_path, options)
    refused = set(options) & {"ld_alpha", "neftune_noise_alpha"}
    assert outcome.startswith("refused") if refused else outcome == "equal"


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(VALUES))
def test_every_option(tmp_path, kind):
    """Prints the table of docs/entanglement.md."""
    found = {}
    for number, (name, value) in enumerate(_options(kind)):
        found[f"{name}={value}"] = _settle(kind, tmp_path / str(number), {name: value})
    for number, (other, options) in enumerate(TOGETHER):
        if other == kind:
            found[str(options)] = _settle(kind, tmp_path / f"together{number}", options)
    words = {
        "equal": "bit-identical, coefficients right",
        "refused": "refused by name",
        "TRL": "TRL itself does not start",
    }
    for start, text in words.items():
        which = [name for name, outcome in found.items() if outcome.startswith(start)]
        print(f"| {kind} | {text} | {len(which)} | {', '.join(which) if start != 'equal' else ''} |")  # noqa: T201
    assert sum(outcome == "equal" for outcome in found.values()) > 0.6 * len(found)


MAPPED = {
    "DPO": set(DPO_LOSSES),
    "CPO": {*CPO_LOSSES, "alphapo"},  # alphapo: TRL's word for simpo without likelihood
    "KTO": set(KTO_LOSSES),
    "TPO": set(TPO_LOSSES),
}


REFUSED = {"CPO": {"kto_pair"}}  # a name in its code for which it has no loss


def _loss_names():
    """`(configuration, loss names)` of every configuration of the installed TRL: they stand in its choices, its help and its trainer."""
    for module in pkgutil.walk_packages(trl.__path__, "trl."):
        if not module.name.endswith("_config"):
            continue
        for name, config in inspect.getmembers(importlib.import_module(module.name), dataclasses.is_dataclass):
            fields = config.__dataclass_fields__
            if config.__module__ != module.name or "loss_type" not in fields:
                continue
            about = fields["loss_type"].metadata
            found = {str(choice) for choice in about.get("choices") or ()}
            found |= set(re.findall(r"`'([\w-]+)'`", about.get("help", "")))
            trainer = importlib.util.find_spec(module.name.replace("_config", "_trainer"))
            if trainer is not None:
                found |= set(re.findall(r"loss_type == \"([\w-]+)\"", Path(trainer.origin).read_text()))
            yield name.removesuffix("Config"), config, found


def test_every_loss_name_of_the_installed_trl_is_mapped_or_refused(tmp_path):
    seen = {}
    for kind, config, names in _loss_names():
        seen[kind] = names
        for name in names | {"quantum"}:
            args = object.__new__(config)
            for item in dataclasses.fields(config):
                default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
                setattr(args, item.name, default)
            args.loss_type = [name] if kind == "DPO" else "simpo" if name == "alphapo" else name
            args.label_smoothing = 0.1 if name in ("exo_pair", "robust") else 0.0
            if name in MAPPED.get(kind, ()):
                assert loss_from_arguments(args).name
            else:
                with pytest.raises(ConfigError, match=f"loss_type '{name}'|cannot tell the loss from {kind}Config"):
                    loss_from_arguments(args)
    assert set(MAPPED) <= set(seen)
    for kind, names in MAPPED.items():  # a name that a later release brings must be mapped, or stand here as refused
        assert seen[kind] <= names | REFUSED.get(kind, set()), kind
    assert {"OnlineDPO", "GRPO"} <= set(seen)


def test_options_that_nobody_knows_yet_are_refused_unless_they_have_their_default(tmp_path):
    base = type(make_trainer("DPO", tmp_path, only_config=True))

    @dataclasses.dataclass
    class Tomorrow(base):
        margin_boost: float = 0.0
        loss_shapes: list = dataclasses.field(default_factory=lambda: ["round"])

    def made(**options):
        return Tomorrow(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], **options)

    refuse_unknown_options(made())
    for options in (
        {"margin_boost": 0.1},
        {"loss_shapes": ["square"]},
        {"neftune_noise_alpha": 5.0},
        {"ld_alpha": 0.5},
    ):
        with pytest.raises(ConfigError, match=next(iter(options))):
            loss_from_arguments(made(**options))
    with pytest.raises(ConfigError, match="optim=lomo changes the parameters during the backward pass"):
        loss_from_arguments(made(optim="lomo"))


def test_a_trainer_that_minimises_something_else_is_noticed_at_the_first_step(tmp_path):
    class Twice(trl.DPOTrainer):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    callback = EntanglementCallback(every=1, pairs=2)
    trainer = make_trainer("DPO", tmp_path, [callback], trainer_class=Twice, max_steps=2)
    with pytest.warns(EntanglementWarning, match=r"d_w 0.05 0.05 0.05; d_l .* are claimed, but .* d_w 0.1 0.1 0.1"):
        trainer.train()
    assert callback.record["trainer_check"]["agree"] is False
    wrong = EntanglementCallback(every=1, pairs=2, loss="ipo")
    with pytest.warns(EntanglementWarning, match="other coefficients than ipo_mean"):
        make_trainer("DPO", tmp_path / "b", [wrong], max_steps=1).train()


def test_gpt2_is_small():
    assert sum(p.numel() for p in gpt2().parameters()) < 20_000
    assert len(text_pairs(2)) == 2
