"""Remedies in TRL's trainers: the gradient that they promise, what they leave alone, resuming, and what they refuse."""

import pytest
import torch

trl = pytest.importorskip("trl")

from rlkit2.entanglement.mitigation import LONGEST_STEP  # noqa: E402
from rlkit2.entanglement.remedy_trainers import normalised_step, with_remedy  # noqa: E402
from rlkit2.entanglement.token_mask import TokenMask, masked_loss  # noqa: E402
from rlkit2.errors import ConfigError  # noqa: E402
from rlkit2.losses.margin import MarginInputs, margin_loss  # noqa: E402
from tests.entanglement.tiny_trl import make_trainer, training_state  # noqa: E402


def _class(kind):
    module = pytest.importorskip(f"trl.experimental.{kind.lower()}") if kind in ("CPO", "ORPO") else trl
    return getattr(module, f"{kind}Trainer")


def _flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize(("kind", "options"), [
    ("DPO", {}), ("DPO", {"loss_type": ["ipo", "sft"], "gradient_checkpointing": False}), ("DPO", {"use_weighting": True}),
    ("CPO", {}), ("ORPO", {}), ("Reward", {"center_rewards_coefficient": 0.1}),
])  # fmt: skip
def test_the_gradient_is_that_of_normalised_descent(tmp_path, kind, options):
    """Against a gradient made by hand from the plain trainer's loss: parts through the chosen and the rejected rows, brought to one length."""
    trainer = make_trainer(kind, tmp_path, trainer_class=with_remedy(_class(kind)), disable_dropout=True, **options)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    params = list(trainer.model.parameters())
    changed = trainer.compute_loss(trainer.model, batch)
    found = torch.autograd.grad(changed, params, allow_unused=True, materialize_grads=True)
    heard = []
    handle = trainer.model.register_forward_hook(lambda m, a, output: heard.append(output))
    plain = _class(kind).compute_loss(trainer, trainer.model, batch)
    handle.remove()
    rows = heard[0].log_probs if getattr(heard[0], "log_probs", None) is not None else heard[0].logits
    assert changed.detach() == plain.detach()
    slope = torch.autograd.grad(plain, rows, retain_graph=True)[0]
    half, parts = len(rows) // 2, []
    for keep in (slice(0, half), slice(half, None)):
        one = torch.zeros_like(slope)
        one[keep] = slope[keep]
        parts.append(
            _flat(torch.autograd.grad(rows, params, one, retain_graph=True, allow_unused=True, materialize_grads=True))
        )
    direction = parts[0] / parts[0].norm() + parts[1] / parts[1].norm()
    expected = direction / direction.norm() * sum(parts).norm()
    scale = min(
        1.0, float(LONGEST_STEP * (parts[0].norm() * parts[1].norm()).sqrt() * direction.norm() / sum(parts).norm())
    )
    torch.testing.assert_close(_flat(found), scale * expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_normalised_training_runs_and_evaluates_as_always(tmp_path):
    options = {"max_steps": 2, "logging_steps": 1, "gradient_accumulation_steps": 2}
    evaluation = [{"prompt": "<bos> the film <answer>", "chosen": " positive", "rejected": " negative"}]
    changed = make_trainer(
        "DPO", tmp_path / "a", trainer_class=with_remedy(trl.DPOTrainer), evaluation=evaluation, **options
    )
    plain = make_trainer("DPO", tmp_path / "b", evaluation=evaluation, **options)
    assert changed.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"])
    states = []
    for trainer in (plain, changed):
        trainer.train()
        states.append(training_state(trainer))
    assert plain.state.log_history[0]["loss"] == changed.state.log_history[0]["loss"]
    assert "rewards/chosen" in changed.state.log_history[0]
    assert any(not torch.equal(states[0][key], states[1][key]) for key in states[0] if key.startswith("p/"))


def test_the_length_of_the_step_is_kept_and_opposite_parts_do_not_blow_up():
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    for weights in ([[1.0, 0, 0], [0, 3.0, 0]], [[1.0, 0, 0], [-1.0, 1e-6, 0]], [[1.0, 0, 0], [0.0, 0, 0]]):
        rows = torch.tensor(weights) @ p
        loss = rows.sum()
        (plain,) = torch.autograd.grad(rows.sum(), p, retain_graph=True)
        (found,) = torch.autograd.grad(normalised_step(loss, rows, [p]), p)
        assert found.isfinite().all()
        assert found.norm() <= plain.norm() * (1 + 1e-5)


# --- the learned mask ------------------------------------------------------------------------------------------------------------


def test_masks_of_ones_are_the_plain_loss_and_sparsity_is_added():
    generator = torch.Generator().manual_seed(0)
    tokens, reference = (
        (-torch.rand(4, 5, generator=generator), -torch.rand(4, 5, generator=generator)) for _ in range(2)
    )
    completions = torch.ones(4, 5), torch.tensor([[1.0, 1, 1, 0, 0]]).expand(4, 5)
    tokens, reference = ([t * c for t, c in zip(pair, completions, strict=True)] for pair in (tokens, reference))
    ones = (torch.ones(4, 5), torch.ones(4, 5))
    plain = margin_loss("dpo", MarginInputs(*(t.sum(1) for t in (*tokens, *reference))))
    torch.testing.assert_close(masked_loss("dpo", tokens, reference, ones, completions, sparsity=0.0), plain)
    torch.testing.assert_close(masked_loss("dpo", tokens, reference, ones, completions, sparsity=0.3), plain + 0.3)
    none = (torch.zeros(4, 5), torch.zeros(4, 5))
    value = masked_loss("dpo", tokens, reference, none, completions, sparsity=0.3)
    torch.testing.assert_close(value, torch.full((4,), 2.0).log())
    with pytest.raises(ConfigError, match="sparsity=-1"):
        masked_loss("dpo", tokens, reference, ones, completions, sparsity=-1)
    with pytest.raises(ConfigError, match="start=1"):
        TokenMask(4, start=1)
    torch.testing.assert_close(TokenMask(4, start=0.7)(torch.randn(2, 3, 4)), torch.full((2, 3), 0.7))


def _masked(folder, **options):
    made = with_remedy(trl.DPOTrainer, "token_mask", sparsity=0.05, mask_learning_rate=0.1)
    given = {"max_steps": 4, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, **options}
    return make_trainer("DPO", folder, trainer_class=made, **given)


def test_the_mask_learns_is_logged_and_is_resumed_with_the_training(tmp_path):
    trainer = _masked(tmp_path)
    trainer.train()
    whole = {**training_state(trainer), **{f"mask/{k}": v for k, v in trainer.token_mask.state_dict().items()}}
    logs = [line for line in trainer.state.log_history if "token_mask/mean" in line]
    assert len(logs) == 4
    assert logs[0]["token_mask/mean"] == pytest.approx(0.9)
    assert abs(logs[-1]["token_mask/mean"] - 0.9) > 0.01
    assert "rewards/chosen" in logs[0]
    resumed = _masked(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again = {**training_state(resumed), **{f"mask/{k}": v for k, v in resumed.token_mask.state_dict().items()}}
    assert whole.keys() == again.keys()
    for key, tensor in whole.items():
        assert torch.equal(tensor, again[key]), key
    (tmp_path / "checkpoint-2" / "token_mask.safetensors").unlink()
    with pytest.raises(ConfigError, match="has no token_mask"):
        _masked(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_what_a_remedy_cannot_do_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="unknown remedy 'magic'"):
        with_remedy(trl.DPOTrainer, "magic")
    with pytest.raises(ConfigError, match="its options: none"):
        with_remedy(trl.DPOTrainer, "normalised", sparsity=1.0)
    with pytest.raises(ConfigError, match="KTO trains others"):
        make_trainer("KTO", tmp_path, trainer_class=with_remedy(trl.KTOTrainer))
    with pytest.raises(ConfigError, match="is for DPO trainers"):
        make_trainer("CPO", tmp_path, trainer_class=with_remedy(_class("CPO"), "token_mask"))
    for options in ({"use_weighting": True}, {"precompute_ref_log_probs": True}, {"ld_alpha": 0.5}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            _masked(tmp_path, **options)
