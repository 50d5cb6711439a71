"""The callback with the real trainers of TRL on a tiny model made on the spot."""

import copy
import importlib
import json
import random
import warnings

import numpy as np
import pytest
import torch

trl = pytest.importorskip("trl")

from rlkit2.entanglement.callback import EntanglementWarning  # noqa: E402
from rlkit2.entanglement.language_pairs import encode_pairs, pairs_by_prompt, token_rows  # noqa: E402
from rlkit2.entanglement.probe import REMEDIES, EntanglementProbe  # noqa: E402
from rlkit2.entanglement.scores import as_pair_batch  # noqa: E402
from rlkit2.entanglement.trainers import loss_from_arguments, refuse_partial_weights  # noqa: E402
from rlkit2.errors import ConfigError, DatasetError  # noqa: E402
from rlkit2.losses.margin import MarginInputs  # noqa: E402
from rlkit2.preferences import EntanglementCallback  # noqa: E402
from rlkit2.preferences.entanglement import causal_lm_logp  # noqa: E402
from tests.entanglement.tiny_trl import gpt2, make_trainer, text_pairs, tokenizer, training_state  # noqa: E402

_trainer, _states = make_trainer, training_state


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
        found.append(_states(trainer))
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
    assert line["loss"] == {"CPO": "1*cpo+1*sft", "ORPO": "orpo_batch", "Reward": "bradley_terry"}[kind]
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


@pytest.mark.parametrize(
    ("dataset", "reason"),
    [
        ([{"prompt": "a", "completion": "b", "label": True}], "unpaired and no prompt has"),
        ([{"text": "a"}], "cannot make pairs of rows with text"),
        ([{"prompt_ids": [1], "chosen_ids": [999], "rejected_ids": [2]}], "beyond the model's vocabulary"),
        ([{"prompt_ids": [4] * 40, "chosen_ids": [5], "rejected_ids": [6]}], "41 tokens but the model 32 positions"),
        ([{"prompt": 3, "chosen": "a", "rejected": "b"}], "prompt of pair 0 is int"),
        ([{"prompt": "a", "chosen": None, "rejected": "b"}], "chosen of pair 0 is null"),
        ([{"prompt": [{"role": "user", "content": "a"}], "chosen": "x", "rejected": "y"}], "prompt of chat messages but chosen is text"),
        ([1, 2], "cannot make pairs of int rows"),
        (7, "cannot take pairs from int"),
        ([], None),
    ],
)  # fmt: skip
def test_bad_pairs_switch_the_callback_off_and_the_training_goes_on(tmp_path, dataset, reason):
    callback = EntanglementCallback(every=1, dataset=dataset)
    trainer = _trainer("DPO", tmp_path, [callback], max_steps=1, max_length=None)
    if reason is None:  # an empty dataset: the next source is taken
        trainer.train()
        assert callback.off is None
        return
    with pytest.warns(EntanglementWarning, match=reason) as said:
        trainer.train()
    assert len([w for w in said if w.category is EntanglementWarning]) == 1
    assert reason in callback.off
    assert trainer.state.global_step == 1
    assert not (tmp_path / "entanglement.jsonl").exists()


def test_kto_and_unknown_trainers(tmp_path):
    rows = [
        {"prompt": p, "completion": c, "label": w}
        for p, c, w in (("a", "x", True), ("b", "y", True), ("a", "z", False))
    ]
    assert pairs_by_prompt(rows, 5) == [{"prompt": "a", "chosen": "x", "rejected": "z"}]
    prepared = [
        {"prompt_ids": [1], "completion_ids": [n], "label": n > 4, "prompt": "a", "completion": str(n)} for n in (4, 5)
    ]
    assert pairs_by_prompt(prepared, 5) == [{"prompt_ids": [1], "chosen_ids": [5], "rejected_ids": [4]}]
    kto = trl.KTOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, beta=0.2, desirable_weight=1.5)
    assert dict(loss_from_arguments(kto).hyperparameters) == {
        "beta": 0.2,
        "z_ref": 0.0,
        "weight_chosen": 0.75,  # the trainer's mean is over rows, of which a pair has two
        "weight_rejected": 0.5,
    }
    with pytest.raises(ConfigError, match="cannot tell the loss from SFTConfig"):
        loss_from_arguments(trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))
    with pytest.raises(ConfigError, match="unknown remedy 'magic'"):
        EntanglementCallback(dry_run=("magic",))
    with pytest.raises(ConfigError, match="every=0"):
        EntanglementCallback(every=0)
    with pytest.raises(ConfigError, match="reference='final'"):
        EntanglementCallback(reference="final")


# --- nothing ends a training -----------------------------------------------------------------------------------------------------

_FAULTS = [
    ("rlkit2.entanglement.callback", name)
    for name in ("calling_trainer", "refuse_partial_weights", "loss_from_arguments", "refuse_router_loss", "trained_pairs", "check_vocabulary",
                 "check_positions", "causal_lm_logp", "sums_of_sides", "EntanglementProbe", "CoefficientCheck", "log_values", "_rows", "_score",
                 "RowForm.of")
] + [
    ("rlkit2.entanglement.probe", name)
    for name in ("pair_gradients", "entanglement_report", "margin_inputs", "batch_rates", "EntanglementProbe.before", "EntanglementProbe.after",
                 "EntanglementProbe.scores", "EntanglementProbe.inputs", "EntanglementProbe._try")
] + [
    ("rlkit2.entanglement.trainer_check", f"CoefficientCheck.{name}")
    for name in ("compare", "close", "_forward", "_keep_tokens", "_completions", "_pairs")
] + [("rlkit2.entanglement.callback", f"EntanglementCallback.{name}") for name in ("_choose", "_reference", "_scorer", "_keep_lines",
                                                                                       "_hold_against_trainer")]  # fmt: skip


_DROPOUT = {"max_steps": 2, "logging_steps": 1, "disable_dropout": False}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    trainer = _trainer("DPO", tmp_path_factory.mktemp("plain"), **_DROPOUT, reference=gpt2(dropout=0.0))
    trainer.train()
    return _states(trainer)


@pytest.mark.parametrize(("module", "name"), _FAULTS)
def test_a_fault_anywhere_is_one_warning_and_the_training_is_the_same(tmp_path, monkeypatch, undisturbed, module, name):
    """The fault also leaves random states, modes and gradients behind as it should not."""
    home = importlib.import_module(module)
    *owner, last = name.split(".")
    target = getattr(home, owner[0]) if owner else home
    calls = []

    def fault(*args, **kwargs):
        calls.append(name)
        torch.rand(3)
        random.random()
        np.random.rand(2)  # noqa: NPY002
        trainer.model.eval()
        for p in trainer.model.parameters():
            p.grad = None
            p.requires_grad_(False)
        raise IndexError("index 40 is out of range")

    callback = EntanglementCallback(every=1, pairs=2)
    trainer = _trainer("DPO", tmp_path, [callback], **_DROPOUT, reference=gpt2(dropout=0.0))
    monkeypatch.setattr(target, last, fault)
    with pytest.warns(EntanglementWarning, match="IndexError: index 40 is out of range") as said:
        trainer.train()
    assert calls
    assert len([w for w in said if w.category is EntanglementWarning]) == 1
    assert callback.off is not None
    assert callback.probe is None
    state = _states(trainer)
    for key, tensor in undisturbed.items():
        assert torch.equal(tensor, state[key]), key


def test_warnings_that_are_errors_end_no_training_either(tmp_path, capsys):
    callback = EntanglementCallback(dataset=[{"text": "a"}])
    trainer = _trainer("DPO", tmp_path, [callback], max_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EntanglementWarning)
        trainer.train()
    assert "cannot make pairs of rows with text" in capsys.readouterr().err


# --- what is measured ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), [
    ("DPO", {"max_length": 12}), ("DPO", {"max_length": 12, "truncation_mode": "keep_end"}), ("DPO", {"max_length": None}),
    ("CPO", {"max_length": 12}), ("ORPO", {"max_length": 13}), ("Reward", {"max_length": 16}), ("Reward", {}),
])  # fmt: skip
@pytest.mark.parametrize("given", ["texts", "training data", "evaluation data"])
def test_rows_are_those_of_the_trainers_own_batches(tmp_path, kind, options, given):
    texts = [pair for suffix in (6, 1, 4) for pair in text_pairs(2, suffix=suffix, seed=suffix)]
    callback = EntanglementCallback(every=1, pairs=4, dataset=texts if given == "texts" else None)
    others = text_pairs(8, seed=3)
    trainer = _trainer(kind, tmp_path, [callback], train=texts if given == "training data" else others,
                       evaluation=texts if given == "evaluation data" else None, max_steps=1, disable_dropout=True,
                       eval_strategy="no", per_device_eval_batch_size=6, **options)  # fmt: skip
    kept = []
    monkey = EntanglementProbe.__init__

    def spy(self, *args, **kwargs):
        monkey(self, *args, **kwargs)
        kept.append(self.batch)

    EntanglementProbe.__init__ = spy
    try:
        trainer.train()
    finally:
        EntanglementProbe.__init__ = monkey
    assert callback.off is None, callback.off
    assert callback._origin == {"texts": "dataset"}.get(given, given)
    source = trainer.train_dataset
    if given != "training data":
        evaluation = importlib.import_module("datasets").Dataset.from_list(texts)
        source = _trainer(kind, tmp_path / "again", train=texts, **options).train_dataset
        assert len(source) <= len(evaluation)
    rows = [source[i] for i in range(min(4, len(source)))]
    names = ("chosen_ids", "rejected_ids", "prompt_ids")
    if kind in ("DPO", "Reward"):
        rows = [{k: row[k] for k in names if k in row} for row in rows]
    batch = trainer.data_collator(rows)
    for side, name in enumerate(("chosen", "rejected")):
        ours = (kept[0].chosen, kept[0].rejected)[side]
        if kind in ("CPO", "ORPO"):
            theirs = [r[r != -100].tolist() for r in batch[f"{name}_labels"]]
        else:
            half = {k: v.chunk(2)[side] for k, v in batch.items()}
            mask = half.get("completion_mask", half["attention_mask"]).bool()
            theirs = [ids[m].tolist() for ids, m in zip(half["input_ids"], mask, strict=True)]
        mask = ours.get("completion_mask", ours.get("attention_mask")).bool()
        assert [ids[m].tolist() for ids, m in zip(ours["input_ids"], mask, strict=True)] == theirs


def test_a_reference_that_moves_is_followed_or_refused(tmp_path):
    options = {
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        "ref_model_mixup_alpha": 1.0,
        "max_steps": 3,
        "disable_dropout": True,
        "learning_rate": 1e-2,
    }
    moving, still = (EntanglementCallback(every=1, pairs=2) for _ in range(2))
    _trainer("DPO", tmp_path / "a", [moving], **options).train()
    _trainer("DPO", tmp_path / "b", [still], **{**options, "sync_ref_model": False}).train()
    assert [line["per_pair"]["d_w"] for line in _lines(tmp_path / "a")] == [
        pytest.approx([0.05] * 2, abs=1e-7)
    ] * 3  # the reference is the policy at every step
    last = _lines(tmp_path / "b")[-1]["per_pair"]["d_w"]
    assert max(abs(d - 0.05) for d in last) > 1e-5
    refused = EntanglementCallback(every=1, pairs=2, reference="initial")
    with pytest.warns(EntanglementWarning, match="sync_ref_model moves the reference"):
        _trainer("DPO", tmp_path / "c", [refused], **options).train()


@pytest.mark.parametrize(("kind", "batch"), [("ORPO", 4), ("TPO", 4), ("KTO", 8)])
def test_batch_meter_is_the_step_on_the_trainers_loss(tmp_path, kind, batch):
    """A plain gradient step on the loss of the measured pairs changes them as the batch meter says, also where the loss trains more than the pairs
    (prompts, gold completions) or single completions."""
    pairs = text_pairs(4, suffix=4)
    if kind == "TPO":
        pairs = [
            {**pair, "reference": gold["chosen"]} for pair, gold in zip(pairs, text_pairs(4, suffix=2), strict=True)
        ]
    callback = EntanglementCallback(every=1, pairs=4, dataset=pairs)
    options = {
        "optim": "sgd",
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "lr_scheduler_type": "constant",
        "disable_dropout": True,
        "per_device_train_batch_size": batch,
    }
    _trainer(kind, tmp_path, [callback], train=pairs, **options).train()
    (line,) = _lines(tmp_path)
    for side in ("chosen", "rejected"):
        assert 1e-3 * line["meters"]["batch"][side] == pytest.approx(line["meters"]["optimizer"][side], rel=1e-3)


def test_ktos_reference_point_is_the_trainers_own_on_the_same_rows(tmp_path):
    """The trainer logs its estimate for every batch; here the pairs are its batch, and the reference is another model."""
    pairs, frozen = text_pairs(4, suffix=4), gpt2(dropout=0.0)
    with torch.no_grad():
        for i, p in enumerate(frozen.parameters()):
            p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    options = {"max_steps": 3, "per_device_train_batch_size": 8, "logging_steps": 1, "learning_rate": 1e-2, "beta": 0.5}
    callback = EntanglementCallback(every=1, pairs=4)
    trainer = _trainer("KTO", tmp_path, [callback], train=pairs, reference=frozen, **options)
    trainer.train()
    assert callback.off is None
    lines = _lines(tmp_path)
    logged = [0.5 * line["kl"] for line in trainer.state.log_history if "kl" in line]
    found = [line["reference_point"] for line in lines]
    assert max(found) > 0.01
    # both rotate completions by one row: the trainer through all chosen, then all rejected, the callback within each side
    assert found == pytest.approx(logged, rel=0.35, abs=0.02)
    assert lines[0]["trainer_check"]["agree"]
    alone = EntanglementCallback(every=1, pairs=1)
    with pytest.warns(EntanglementWarning, match="measure at least two pairs"):
        _trainer("KTO", tmp_path / "one", [alone], max_steps=1).train()
    columns = [{**pair, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for pair in pairs]
    blind = EntanglementCallback(every=1, pairs=2, dataset=columns, reference="initial")
    with pytest.warns(EntanglementWarning, match="needs more than the pairs' ref_chosen_logps"):
        _trainer("KTO", tmp_path / "blind", [blind], max_steps=1).train()


def test_tpo_needs_its_gold_completions(tmp_path):
    callback = EntanglementCallback(every=1, pairs=2, dataset=text_pairs(3))
    with pytest.warns(EntanglementWarning, match="give the pairs a field reference"):
        _trainer("TPO", tmp_path, [callback], max_steps=1).train()


def test_labels_that_are_ignored_in_the_middle_do_not_count():
    rows = [{"prompt_input_ids": [1, 4], "chosen_input_ids": [1, 4, 5, 6, 7, 8], "chosen_labels": [-100, -100, 5, -100, 7, 8],
             "rejected_input_ids": [1, 4, 9], "rejected_labels": [-100, -100, 9]}]  # fmt: skip
    batch = token_rows(rows)
    assert batch.chosen["completion_mask"].tolist() == [[0, 0, 1, 0, 1, 1]]
    assert batch.rejected["completion_mask"].tolist() == [[0, 0, 1]]
