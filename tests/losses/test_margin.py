"""Margin losses: reference values, closed coefficients against autograd, modifiers, bad input."""

import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit2.errors import ConfigError
from rlkit2.losses.margin import (
    MARGIN_LOSSES,
    MarginInputs,
    get_margin_loss,
    length_desensitized_logp,
    margin_coefficients,
    margin_loss,
    mixture,
    on_alpha_reward,
    on_f_divergence,
    weighted,
    wpo,
    wpo_weight,
)

REFERENCE = Path(os.environ.get("RLKIT2_REFERENCE", Path(__file__).parents[1] / "data" / "reference"))
FIELDS = ("pi_w", "pi_l", "ref_w", "ref_l")


@pytest.fixture(scope="module")
def vectors():
    with np.load(REFERENCE / "preferences_losses.npz") as file:
        return {key: file[key] for key in file.files}


def _hyperparameters(key, sets):
    """Our arguments for a reference key such as `b0/form/simpo/beta=0.1/ls=0.1/hp1`."""
    _, family, name, *settings_ = key.split("/")
    raw = dict(part.split("=") for part in settings_ if "=" in part)
    given_ = {k: float(v) for k, v in raw.items() if k in ("beta", "gamma", "tau", "alpha")}
    if "ls" in raw:
        given_["label_smoothing"] = float(raw["ls"])
    if raw.get("fdiv"):
        name = {"forward_kl": "dpo_forward_kl", "js_divergence": "dpo_js"}[raw["fdiv"]]
    if family == "trl_cpo":
        if name == "sigmoid":
            return "cpo", {**given_, "lam": 0.0}
        name = {"hinge": "hinge_free", "ipo": "ipo_free"}.get(name, name)
    sets_ = sets[settings_[-1]] if settings_ and settings_[-1] in sets else {}
    renamed = {
        "rdpo": {"alpha": "rdpo_alpha"},
        "simpo": {"gamma": "gamma"},
        "rrhf": {"lam": "nll"},
        "slic": {"lam": "nll", "delta": "slic_delta"},
        "cpo": {"lam": "nll"},
        "dpop": {"lam": "dpop"},
        "kto": {"z_ref": "z_ref", "weight_chosen": "kto_w", "weight_rejected": "kto_l"},
        "orpo": {"lam": "orpo"},
        "bco_pair": {"delta": "bco_delta"},
        "discopop": {"tau": "tau"},
        "cpl": {"lam": "cpl_bias"},
    }
    if sets_:
        given_ |= {ours: sets_[theirs] for ours, theirs in renamed.get(name, {}).items()}
    if name == "cpl":
        given_["alpha"] = given_.pop("beta")
    return name, given_


def test_all_reference_values_and_gradients(vectors):
    import json

    sets = {key: json.loads(str(vectors[f"{key}/json"])) for key in ("hp0", "hp1")}
    checked, names = 0, set()
    for key, rows in vectors.items():
        match = re.match(r"(b\d)/(form|trl|trl_cpo|trl_batch)/", key)
        if not match:
            continue
        batch = match[1]
        leaves = [torch.tensor(vectors[f"{batch}/{f}"], requires_grad=True) for f in FIELDS]
        inputs = MarginInputs(*leaves, *(torch.tensor(vectors[f"{batch}/len_{side}"]) for side in "wl"))
        name, hyperparameters = _hyperparameters(key, sets)
        if name.startswith("mpo["):
            weights = dict(part.split(":") for part in name[4:-1].split(","))
            loss = mixture({k: float(v) for k, v in weights.items()}, **hyperparameters)
            value, (d_w, d_l) = loss.value(inputs), loss.coefficients(inputs)
        else:
            value = margin_loss(name, inputs, **hyperparameters)
            d_w, d_l = margin_coefficients(name, inputs, **hyperparameters)
        if match[2] == "trl_batch":
            np.testing.assert_allclose(value.mean().item(), rows[0, 0], rtol=1e-10, err_msg=key)
        else:
            np.testing.assert_allclose(value.detach(), rows[0], rtol=1e-10, atol=1e-12, err_msg=key)
        gradients = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
        for row, gradient in enumerate(gradients, start=1):
            ours = torch.zeros_like(leaves[0]) if gradient is None else gradient
            np.testing.assert_allclose(ours, rows[row], rtol=1e-10, atol=1e-12, err_msg=f"{key} row {row}")
        np.testing.assert_allclose(d_w, -rows[1], rtol=1e-10, atol=1e-12, err_msg=key)
        np.testing.assert_allclose(d_l, rows[2], rtol=1e-10, atol=1e-12, err_msg=key)
        checked += 1
        names.add(name)
    assert checked > 900
    assert len(names) > 25


def _batch(kind, dtype, generator):
    n_w, n_l = (torch.randint(1, 40, (64,), generator=generator) for _ in range(2))
    if kind == "tie":
        n_l = n_w
        a = b = a0 = b0 = -(0.1 + torch.rand(64, generator=generator, dtype=torch.float64)) * n_w
    else:
        spread = {"random": 3.0, "extreme": 50.0, "huge": 500.0}[kind]
        a0, b0 = (-(0.1 + torch.rand(64, generator=generator, dtype=torch.float64)) * n for n in (n_w, n_l))
        a, b = (
            r - 0.01 + spread * (2 * torch.rand(64, generator=generator, dtype=torch.float64) - 1) for r in (a0, b0)
        )
        a, b = (torch.minimum(x, -0.01 * n) for x, n in ((a, n_w), (b, n_l)))
        if kind == "huge":
            a[::2], b[1::2] = a0[::2] - 500.0, b0[1::2] - 500.0
    tensors = [x.detach().clone().to(dtype) for x in (a, b, a0, b0)]
    return [t.requires_grad_() for t in tensors], (n_w, n_l)


@pytest.mark.parametrize("name", list(MARGIN_LOSSES))
@pytest.mark.parametrize("kind", ["random", "extreme", "tie", "huge"])
def test_closed_coefficients_equal_autograd(name, kind):
    generator = torch.Generator().manual_seed(0)
    extra = {"alpha": 0.25} if name == "alphapo" else {}
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        leaves, lengths = _batch(kind, dtype, generator)
        inputs = MarginInputs(*leaves, *lengths, context_chosen=lengths[1])
        value = margin_loss(name, inputs, **extra)
        d_w, d_l = margin_coefficients(name, inputs, **extra)
        gradients = torch.autograd.grad(value.sum(), leaves[:2], allow_unused=True)
        g_a, g_b = (torch.zeros_like(leaves[0]) if g is None else g for g in gradients)
        assert value.isfinite().all()
        assert d_w.isfinite().all()
        assert d_l.isfinite().all()
        assert d_w.dtype == value.dtype == dtype
        if kind == "huge" and dtype == torch.float32:
            continue
        scale = 1 + g_a.abs().max() + g_b.abs().max()
        assert (d_w + g_a).abs().max() <= tolerance * scale
        assert (d_l - g_b).abs().max() <= tolerance * scale


@pytest.mark.parametrize("name", list(MARGIN_LOSSES))
def test_seed_axis_equals_separate_seeds(name):
    generator = torch.Generator().manual_seed(1)
    batches = [_batch("random", torch.float64, generator) for _ in range(3)]
    lengths = [torch.stack([b[1][i] for b in batches]) for i in range(2)]
    leaves = (torch.stack([b[0][i] for b in batches]) for i in range(4))
    stacked = MarginInputs(*leaves, *lengths, context_chosen=lengths[1])
    value, (d_w, d_l) = margin_loss(name, stacked), margin_coefficients(name, stacked)
    for seed, (leaves, one) in enumerate(batches):
        inputs = MarginInputs(*leaves, *one, context_chosen=one[1])
        assert torch.equal(value[seed], margin_loss(name, inputs))
        ours = margin_coefficients(name, inputs)
        assert torch.equal(d_w[seed], ours[0])
        assert torch.equal(d_l[seed], ours[1])


@pytest.mark.parametrize(
    "alias", ["sigmoid", "ipo", "sigmoid_norm", "sppo_hard", "pdpo", "aot_pair", "simpo_alphapo", "smaug"]
)
def test_trl_names_are_aliases(alias):
    assert get_margin_loss(alias) is get_margin_loss(get_margin_loss(alias).name)


@settings(deadline=None, max_examples=50)
@given(
    a=st.floats(-40, -0.1),
    b=st.floats(-40, -0.1),
    a0=st.floats(-40, -0.1),
    b0=st.floats(-40, -0.1),
    shift=st.floats(-20, 20),
    beta=st.floats(0.01, 2),
)
def test_reference_shift_changes_nothing_and_swap_negates_the_margin(a, b, a0, b0, shift, beta):
    def inputs(*numbers):
        return MarginInputs(*(torch.tensor([x], dtype=torch.float64) for x in numbers))

    base, moved = inputs(a, b, a0, b0), inputs(a + shift, b, a0 + shift, b0)
    torch.testing.assert_close(
        margin_loss("dpo", base, beta=beta), margin_loss("dpo", moved, beta=beta), rtol=1e-9, atol=1e-9
    )
    assert torch.equal(base.margin, -inputs(b, a, b0, a0).margin)


def test_numpy_in_numpy_out():
    inputs = MarginInputs(
        np.array([-3.0, -4.0], np.float32), np.array([-5.0, -6.0], np.float32), np.zeros(2), np.zeros(2)
    )
    value = margin_loss("dpo", inputs)
    d_w, _ = margin_coefficients("dpo", inputs)
    assert isinstance(value, np.ndarray)
    assert isinstance(d_w, np.ndarray)
    assert value.dtype == np.float32


def test_mixture_and_weighting_scale_values_and_coefficients():
    leaves, lengths = _batch("random", torch.float64, torch.Generator().manual_seed(2))
    inputs = MarginInputs(*leaves, *lengths)
    both = mixture({"dpo": 0.8, "nll": 0.05}, beta=0.3)
    d_w, d_l = both.coefficients(inputs)
    k, _ = margin_coefficients("dpo", inputs, beta=0.3)
    torch.testing.assert_close(d_w, 0.8 * k + 0.05)
    torch.testing.assert_close(d_l, 0.8 * k)
    wpo = weighted("dpo", wpo_weight)
    factor = wpo_weight(inputs)
    value = wpo.value(inputs)
    gradient = torch.autograd.grad(value.sum(), leaves[0])[0]
    torch.testing.assert_close(gradient, -wpo.coefficients(inputs)[0])  # the weight carries no gradient
    torch.testing.assert_close(value, factor * margin_loss("dpo", inputs))


def test_length_desensitizing_scales_only_the_tail():
    logps = -torch.rand(2, 6, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0]])
    other = torch.tensor([2, 4])
    result = length_desensitized_logp(logps, mask, other, 0.3)
    expected = torch.stack([logps[0, 1:3].sum() + 0.3 * logps[0, 3:5].sum(), logps[1, 2:4].sum()])
    torch.testing.assert_close(result, expected)


def _equals_autograd(loss, inputs, leaves, tolerance):
    value, (d_w, d_l) = loss.value(inputs), loss.coefficients(inputs)
    gradients = torch.autograd.grad(value.sum(), leaves[:2], allow_unused=True)
    g_a, g_b = (torch.zeros_like(leaves[0]) if g is None else g for g in gradients)
    assert torch.stack([value, d_w, d_l]).isfinite().all()
    scale = 1 + g_a.abs() + g_b.abs()
    assert ((d_w + g_a).abs() <= tolerance * scale).all(), loss.name
    assert ((d_l - g_b).abs() <= tolerance * scale).all(), loss.name


@pytest.mark.parametrize("name", [n for n, loss in MARGIN_LOSSES.items() if loss.needs_reference])
def test_every_link_on_every_divergence_equals_autograd(name):
    leaves, lengths = _batch("random", torch.float64, torch.Generator().manual_seed(3))
    inputs = MarginInputs(*leaves, *lengths)
    for divergence in ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"):
        for alpha in (0.0, 0.5, 1.0, 1.0 + 1e-9, 2.0) if divergence == "alpha_divergence" else (0.5,):
            if MARGIN_LOSSES[name].couples_batch:
                continue  # ties among capped scores have no derivative
            _equals_autograd(on_f_divergence(name, divergence, alpha=alpha), inputs, leaves, 1e-9)
    same = on_f_divergence(name, "reverse_kl")
    torch.testing.assert_close(same.value(inputs), margin_loss(name, inputs))


@settings(deadline=None, max_examples=40)
@given(step=st.floats(-1e-4, 1e-4), seed=st.integers(0, 1000), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_divergences_have_their_limits(step, seed, dtype):
    """Alpha 1 is reverse KL and alpha 0 forward KL, and nearby alphas are near them: in value and coefficients."""
    generator = torch.Generator().manual_seed(seed)
    a, b, a0, b0 = (-20 + 3 * torch.rand(8, generator=generator, dtype=dtype) for _ in range(4))
    inputs = MarginInputs(a, b, a0, b0)
    for alpha, limit in ((1.0, "dpo"), (0.0, "dpo_forward_kl")):
        for near in (alpha, alpha + step):
            tolerance = {"rtol": 100 * abs(near - alpha) + 2e-5, "atol": 1e-5}
            ours, theirs = margin_loss("dpo_alphadiv", inputs, alpha=near), margin_loss(limit, inputs)
            torch.testing.assert_close(ours, theirs, **tolerance)
            for one, other in zip(
                margin_coefficients("dpo_alphadiv", inputs, alpha=near), margin_coefficients(limit, inputs), strict=True
            ):
                torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("alpha", [-0.3, 0.0, 1e-8, 0.25, 1.0])
@pytest.mark.parametrize("name", ["cpo", "hinge_free", "ipo_free", "simpo", "slic"])
def test_alpha_rewards_equal_autograd_and_alphapo(name, alpha):
    generator = torch.Generator().manual_seed(4)
    lengths = [torch.randint(1, 9, (64,), generator=generator) for _ in range(2)]
    leaves = [-(n * torch.rand(64, generator=generator, dtype=torch.float64)).requires_grad_() for n in lengths]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    inputs = MarginInputs(*leaves, None, None, *lengths)
    loss = on_alpha_reward(name, alpha)
    _equals_autograd(loss, inputs, leaves, 1e-9)
    if name == "simpo":
        for smoothing in (0.0, 0.2):
            ours = margin_loss("alphapo", inputs, alpha=alpha, label_smoothing=smoothing)
            torch.testing.assert_close(loss.value(inputs, label_smoothing=smoothing), ours)


@settings(deadline=None, max_examples=60)
@given(gap=st.floats(0, 1e-3), other=st.floats(1e-4, 5), power=st.floats(1, 9), length=st.integers(1, 50))
def test_orpo_near_certainty_equals_its_own_autograd(gap, other, power, length):
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.float64, 1e-8)):
        means = -torch.tensor([[gap * 10**-power, other], [other, gap * 10**-power]], dtype=torch.float64)
        leaves = [(row * length).to(dtype).requires_grad_() for row in means]
        n = torch.full((2,), length)
        for name in ("orpo", "orpo_batch"):
            _equals_autograd(
                get_margin_loss(name), MarginInputs(*leaves, None, None, n, n, context_chosen=n), leaves, tolerance
            )


def test_wpo_is_aligned_where_the_inputs_say_how_and_refuses_coupled_losses():
    leaves, lengths = _batch("random", torch.float64, torch.Generator().manual_seed(5))
    collision = [-0.3 * n.double() for n in lengths]
    inputs = MarginInputs(*leaves, *lengths, *collision)
    plain = MarginInputs(*leaves, *lengths)
    torch.testing.assert_close(wpo_weight(inputs), wpo_weight(plain) * math.exp(0.6))
    _equals_autograd(wpo("ipo"), inputs, leaves, 1e-9)
    with pytest.raises(ConfigError, match="couples the batch"):
        wpo("aot")
    with pytest.raises(ConfigError, match="give collision_chosen"):
        wpo("dpo").value(plain)


def test_bad_input_is_named():
    a, b = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -3.0])
    ok = MarginInputs(a, b, a, b, torch.tensor([2, 3]), torch.tensor([2, 4]))
    for message, call in {
        "needs reference": lambda: margin_loss("dpo", MarginInputs(a, b)),
        "length-normalised": lambda: margin_loss("simpo", MarginInputs(a, b)),
        "unknown margin loss 'dpoo'; did you mean dpo": lambda: margin_loss("dpoo", ok),
        "no hyper-parameter 'gama'": lambda: margin_loss("simpo", ok, gama=1.0),
        "beta=0 of loss dpo must be above 0": lambda: margin_loss("dpo", ok, beta=0),
        "label_smoothing=0.5 of loss robust": lambda: margin_loss("robust", ok, label_smoothing=0.5),
        "label_smoothing=0.0 of loss exo_pair": lambda: margin_loss("exo_pair", ok, label_smoothing=0.0),
        "logp_rejected of pair 1 is NaN": lambda: MarginInputs(a, torch.tensor([-1.0, float("nan")])),
        "len_chosen of pair 0 is below 1": lambda: MarginInputs(a, b, a, b, torch.tensor([0, 3]), torch.tensor([2, 4])),
        "has shape": lambda: MarginInputs(a, b[:1]),
        "only one of ref_chosen": lambda: MarginInputs(a, b, ref_chosen=a),
        "none of": lambda: mixture({"dpo": 1.0}, gamma=1.0),
    }.items():
        with pytest.raises(ConfigError, match=re.escape(message)):
            call()
