"""The callback with the real trainers of TRL on a tiny model made on the spot."""

import copy
import json
import random

import numpy as np
import pytest
import torch

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from rlkit2.entanglement.callback import loss_from_arguments, refuse_partial_weights  # noqa: E402
from rlkit2.entanglement.language_pairs import encode_pairs, pairs_by_prompt, read_pairs, token_rows  # noqa: E402
from rlkit2.entanglement.probe import REMEDIES  # noqa: E402
from rlkit2.entanglement.scores import as_pair_batch  # noqa: E402
from rlkit2.errors import ConfigError, DatasetError  # noqa: E402
from rlkit2.losses.margin import MarginInputs  # noqa: E402
from rlkit2.preferences import EntanglementCallback  # noqa: E402
from rlkit2.preferences.entanglement import causal_lm_logp  # noqa: E402
from tests.entanglement.tiny_trl import gpt2, text_pairs, tokenizer  # noqa: E402

COMMON = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 0,
    "max_steps": 4,
}


def _trainer(kind, folder, callbacks=(), **options):
    """A trainer of TRL; its configuration and class move between releases."""
    model, reference = gpt2(labels=1 if kind == "Reward" else None), gpt2()
    module = trl
    if kind in ("CPO", "ORPO"):
        module = pytest.importorskip(f"trl.experimental.{kind.lower()}")
    arguments = {**COMMON, **options}
    config = getattr(module, f"{kind}Config")(output_dir=str(folder), **arguments)
    extra = {"ref_model": reference} if kind == "DPO" else {}
    return getattr(module, f"{kind}Trainer")(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(text_pairs(32)),
        processing_class=tokenizer(),
        callbacks=list(callbacks),
        **extra,
    )


def _states(trainer):
    """Everything that training depends on."""
    state = {f"p/{name}": p.detach().clone() for name, p in trainer.model.named_parameters()}
    for i, slots in enumerate(trainer.optimizer.state.values()):
        state |= {f"o/{i}/{name}": torch.as_tensor(x).clone() for name, x in slots.items()}
    return {**state, "rng": torch.get_rng_state()}


def _lines(folder):
    return [json.loads(line) for line in (folder / "entanglement.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["auto", "loop", "sketch"])
def test_dpo_training_is_bit_identical_with_the_callback(tmp_path, method):
    options = {
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "disable_dropout": False,
        "logging_steps": 1,
    }
    found = []
    for name in ("without", "with"):
        callback = EntanglementCallback(
            every=2, pairs=3, dataset=text_pairs(3, seed=9), method=method, dry_run=REMEDIES
        )
        trainer = _trainer("DPO", tmp_path / name, [callback] if name == "with" else [], **options)
        trainer.train()
        found.append({**_states(trainer), "python": torch.tensor(random.getstate()[1])})
    assert found[0].keys() == found[1].keys()
    for key, tensor in found[0].items():
        assert torch.equal(tensor, found[1][key]), key
    lines = _lines(tmp_path / "with")
    assert [line["step"] for line in lines] == [2, 4]
    assert trainer.state.global_step == 4
    for line in lines:
        assert set(line["dry_run"]) == set(REMEDIES)
        assert set(line["meters"]) == {"pair", "batch", "optimizer", "realised"}
        assert line["pairs"] == 3
        assert line["method"] == ("ghost" if method == "auto" else method)
        assert line["lr"] > 0
    # the optimiser's real step predicts the real change, a gradient step need not
    tolerance = 0.5 if method == "sketch" else 0.25
    for line in lines:
        predicted, real = (np.array(line["changes"][name]) for name in ("optimizer", "realised"))
        assert np.abs(predicted - real).max() < tolerance * np.abs(real).max() + 1e-3


def test_gradients_and_modes_are_untouched(tmp_path):
    """What is there when the optimiser acts is what was there before the measurement."""
    seen = []

    class Spy(EntanglementCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            model = kwargs["model"]
            before = self._all(model)
            super().on_pre_optimizer_step(args, state, control, **kwargs)
            after = self._all(model)
            seen.append((before, after))

        def on_step_end(self, args, state, control, **kwargs):
            before = self._all(kwargs["model"])
            super().on_step_end(args, state, control, **kwargs)
            seen.append((before, self._all(kwargs["model"])))

        @staticmethod
        def _all(model):
            tensors = {n: p.detach().clone() for n, p in model.named_parameters()}
            tensors |= {f"grad {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            flags = torch.tensor([m.training for m in model.modules()])
            return {**tensors, "flags": flags, "rng": torch.get_rng_state()}

    _trainer("DPO", tmp_path, [Spy(every=1, pairs=2)], max_steps=2).train()
    assert len(seen) == 4
    assert any(key.startswith("grad") for key in seen[0][0])
    assert bool(seen[0][0]["flags"].all())
    for before, after in seen:
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert torch.equal(tensor, after[key]), key
    lines = _lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    assert {line["pairs_from"] for line in lines} == {"training data"}


@pytest.mark.parametrize("kind", ["CPO", "ORPO", "Reward"])
def test_other_trainers(tmp_path, kind):
    _trainer(kind, tmp_path, [EntanglementCallback(every=2, pairs=3)], max_steps=2, logging_steps=1).train()
    (line,) = _lines(tmp_path)
    assert line["loss"] == {"CPO": "1*cpo+1*sft", "ORPO": "orpo", "Reward": "bradley_terry"}[kind]
    predicted, real = (np.array(line["changes"][name]) for name in ("optimizer", "realised"))
    assert np.abs(predicted - real).max() < 0.25 * np.abs(real).max() + 1e-3


@pytest.mark.parametrize(
    "loss_type",
    ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down",
     "discopop", "sigmoid_norm", "sft", ["sigmoid", "bco_pair", "sft"]],
)  # fmt: skip
def test_our_loss_equals_the_installed_trl(tmp_path, loss_type):
    smoothing = 0.1 if loss_type in ("exo_pair", "robust", "aot") else 0.0
    known = trl.DPOConfig.__dataclass_fields__
    options = {"loss_type": loss_type, "label_smoothing": smoothing, "beta": 0.3, "disable_dropout": True}
    if isinstance(loss_type, list):
        options["loss_weights"] = [0.8, 0.2, 1.0]
    try:
        trainer = _trainer("DPO", tmp_path, **{k: v for k, v in options.items() if k in known})
    except ValueError as error:
        pytest.skip(f"TRL {trl.__version__} does not have {loss_type}: {error}")
    with torch.no_grad():
        for p in trainer.model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model.eval(), dict(batch))
    score, frozen = causal_lm_logp(trainer.model), causal_lm_logp(trainer.ref_model, parameters="all")
    pairs = score.prepare(as_pair_batch({k: batch[k] for k in ("input_ids", "attention_mask", "completion_mask")}))
    sides = (pairs.chosen, pairs.rejected)
    inputs = MarginInputs(
        *(score.sums(score.params, rows) for rows in sides),
        *(frozen.sums(frozen.params, rows).detach() for rows in sides),
        *(rows["completion_mask"].sum(1) for rows in sides),
    )
    ours = loss_from_arguments(trainer.args).value(inputs).mean()
    torch.testing.assert_close(
        ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda text: f"TRL {trl.__version__}, {loss_type}: {text}"
    )
    gradients = [torch.autograd.grad(loss, list(trainer.model.parameters())) for loss in (ours, theirs)]
    scale = max(g.abs().max() for g in gradients[1])
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() <= 2e-3 * scale + 1e-7


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "simpo"])
def test_our_cpo_equals_the_installed_trl(tmp_path, loss_type):
    trainer = _trainer("CPO", tmp_path, loss_type=loss_type, cpo_alpha=0.0, beta=0.5, simpo_gamma=0.3)
    logps = [-20 * torch.rand(6, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    theirs = trainer.cpo_loss(*logps)[0]
    loss = loss_from_arguments(trainer.args)
    lengths = [torch.ones(6)] * 2 if loss.needs_lengths else [None, None]  # theirs takes means where it needs them
    torch.testing.assert_close(loss.value(MarginInputs(*logps, None, None, *lengths)), theirs)


def test_resuming_keeps_earlier_lines_and_drops_later_ones(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    _trainer("DPO", tmp_path, [EntanglementCallback(every=1, pairs=2)], **options).train()
    whole = _lines(tmp_path)
    assert [line["step"] for line in whole] == [1, 2, 3, 4]
    _trainer("DPO", tmp_path, [EntanglementCallback(every=1, pairs=2, reference=gpt2())], **options).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    again = _lines(tmp_path)
    assert [line["step"] for line in again] == [1, 2, 3, 4]
    for first, second in zip(whole, again, strict=True):
        assert first["cosine"] == second["cosine"]
        assert first["changes"] == second["changes"]


# --- bad input -------------------------------------------------------------------------------------------------------------------


def test_partial_weights_are_refused():
    model = gpt2()
    refuse_partial_weights(model)
    for attribute, message in (("ds_id", "sharded"), ("quant_state", "quantised")):
        broken = copy.deepcopy(model)
        setattr(broken.transformer.wte.weight, attribute, 1)
        with pytest.raises(ConfigError, match=message):
            refuse_partial_weights(broken)
    broken = torch.nn.Linear(2, 2)
    broken.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ConfigError, match="k bits"):
        refuse_partial_weights(broken)


def test_a_merging_tokenizer_and_other_bad_pairs_are_refused(tmp_path):
    words = tokenizer()
    good = {"prompt": "<bos> the film <answer>", "chosen": " positive", "rejected": " negative"}
    assert encode_pairs(words, [good], add_eos=False).chosen["completion_mask"].tolist() == [[0, 0, 0, 0, 1]]
    batch = encode_pairs(words, [good])
    assert batch.chosen["completion_mask"].tolist() == [[0, 0, 0, 0, 1, 1]]
    with pytest.raises(DatasetError, match=r"merges prompt and completion of pair 1 \(chosen\)"):
        encode_pairs(words, [good, {**good, "chosen": "positive"}])
    with pytest.raises(DatasetError, match="chosen completion of pair 0 is empty"):
        encode_pairs(words, [{**good, "chosen": ""}])
    with pytest.raises(DatasetError, match="raise max_length=4"):
        encode_pairs(words, [good], max_length=4)
    with pytest.raises(DatasetError, match="no prompt_ids"):
        token_rows([{"chosen_ids": [1]}])
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(good) + "\n{}\n")
    with pytest.raises(DatasetError, match="line 2 has no 'prompt'"):
        read_pairs(path)
    assert read_pairs(path, 1) == [good]


def test_unpaired_data_and_unknown_losses_are_refused(tmp_path):
    callback = EntanglementCallback(dataset=[{"prompt": "a", "completion": "b", "label": True}])
    with pytest.raises(DatasetError, match="unpaired and no prompt has"):
        _trainer("DPO", tmp_path, [callback]).train()
    with pytest.raises(ConfigError, match="cannot make pairs of rows with text"):
        _trainer("DPO", tmp_path, [EntanglementCallback(dataset=[{"text": "a"}])]).train()
    rows = [
        {"prompt": p, "completion": c, "label": w}
        for p, c, w in (("a", "x", True), ("b", "y", True), ("a", "z", False))
    ]
    assert pairs_by_prompt(rows, 5) == [{"prompt": "a", "chosen": "x", "rejected": "z"}]
    kto = trl.KTOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, beta=0.2, desirable_weight=1.5)
    assert dict(loss_from_arguments(kto).hyperparameters) == {
        "beta": 0.2,
        "z_ref": 0.0,
        "weight_chosen": 1.5,
        "weight_rejected": 1.0,
    }
    with pytest.raises(ConfigError, match="cannot tell the loss from SFTConfig"):
        loss_from_arguments(trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))
    with pytest.raises(ConfigError, match="unknown remedy 'magic'"):
        _trainer("DPO", tmp_path, [EntanglementCallback(dry_run=("magic",))]).train()
    with pytest.raises(ConfigError, match="every=0"):
        EntanglementCallback(every=0)
    bad = [{"prompt_ids": [1], "chosen_ids": [999], "rejected_ids": [2]}]
    with pytest.raises(ConfigError, match="beyond the model's vocabulary"):
        _trainer("DPO", tmp_path, [EntanglementCallback(dataset=bad)]).train()
