"""Thresholds, regimes and rates as properties; closed forms of small models; seeds; reports; bad input."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit2.entanglement.gradients import CountSketch
from rlkit2.errors import ConfigError
from rlkit2.preferences.entanglement import (
    REGIMES,
    GradientGeometry,
    PairBatch,
    PairGradients,
    batch_rates,
    causal_lm_logp,
    entanglement_report,
    gram_matrix,
    pair_geometry,
    predicted_change,
    segment_return,
    token_cosines,
    token_geometry,
    update_alignment,
)
from rlkit2.studies.toy_language import WORDS, SentimentGrammar, SmallGPT
from tests.entanglement.tiny_trl import gpt2

DOUBLE = torch.float64


def _geometry(g_w, g_l):
    g_w, g_l = (torch.as_tensor(g, dtype=DOUBLE) for g in (g_w, g_l))
    products = ((a * b).sum(-1) for a, b in ((g_w, g_l), (g_w, g_w), (g_l, g_l)))
    return GradientGeometry(*products, (g_w * (g_w - g_l)).sum(-1), (g_l * (g_w - g_l)).sum(-1))


@pytest.mark.parametrize("u", [1.0, 7 / 3, 2.0])
def test_the_threshold_flips_where_it_should(u):
    """`g_w = e1, g_l = t e1 + e2`: the chosen's rate is `u - t`, the rejected's `u t - t^2 - 1`."""
    t = torch.cat([u + torch.tensor([-1e-12, 1e-12], dtype=DOUBLE), torch.linspace(-3, 3, 25, dtype=DOUBLE)])
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    found = _geometry(torch.stack([one, zero], 1), torch.stack([t, one], 1))
    rate_w, rate_l = found.rates(u, 1.0)
    torch.testing.assert_close(rate_w, u - t, rtol=1e-9, atol=2e-15)
    torch.testing.assert_close(rate_l, u * t - t.square() - 1)
    assert rate_w[0] > 0 > rate_w[1]
    regime = found.regime(u, 1.0)
    assert regime[0] == (0 if rate_l[0] < 0 else 2)
    assert regime[1] == (1 if rate_l[1] < 0 else 3 if rate_l[1] > 0 else 4)
    if u == 1.0:
        assert (rate_l < 0).all()
    upper_w, upper_l = found.thresholds(u, 1.0)
    assert torch.equal(rate_w > 0, found.inner < upper_w)
    assert torch.equal(rate_l < 0, found.inner < upper_l)


@given(st.floats(0.05, 20), st.floats(0.01, 0.99))
def test_a_short_rejected_gradient_makes_both_rise(t, fraction):
    scale = fraction * t / (t * t + 1)
    found = _geometry([[1.0, 0.0]], [[scale * t, scale]])
    assert found.regime(1.0, 1.0).tolist() == [2]


vectors = st.lists(st.floats(-10, 10), min_size=4, max_size=4)


@given(vectors, vectors, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_positive_coefficients_never_invert(g_w, g_l, d_w, d_l):
    for first, second in ((g_w, g_l), (g_w, g_w), (g_w, [d_w / d_l * x for x in g_w]), (g_w, [0.0] * 4)):
        for geometry in (_geometry([first], [second]), _plain(first, second)):
            assert geometry.regime(d_w, d_l).item() in (0, 1, 2, 4)
            assert geometry.regime(-d_w, -d_l).item() != 0


@pytest.mark.parametrize("method", ["loop", "vmap", "ghost", "sketch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("suffix", [0, 5])
def test_identical_pairs_in_a_batch_are_undecided_whatever_rounding_says(method, dtype, suffix):
    torch.manual_seed(0)
    model = SmallGPT(len(WORDS), width=32).to(dtype)
    pairs = SentimentGrammar(suffix, 0).pairs(6)
    rejected = {name: tensor.clone() for name, tensor in pairs.rejected.items()}
    for name, tensor in rejected.items():
        tensor[[1, 4]] = pairs.chosen[name][[1, 4]]
    geometry = pair_geometry(causal_lm_logp(model), None, PairBatch(pairs.chosen, rejected), method=method)
    for u in (0.3, 1.0):
        regime = geometry.regime(torch.full((6,), u * 0.05, dtype=DOUBLE), 0.05)
        names = [REGIMES[code] for code in regime.tolist()]
        if u == 1:
            assert {names[1], names[4]} == {"undecided"}
        assert ((regime == REGIMES.index("undecided")) == geometry.undecided(u * 0.05, 0.05)).all()
        if suffix == 0 and u == 1 and method != "sketch" and dtype != torch.bfloat16:
            assert {names[i] for i in (0, 2, 3, 5)} == {"ideal"}


@given(st.integers(0, 10_000), st.floats(0.2, 5))
@settings(max_examples=15, deadline=None)
def test_what_a_short_format_decides_a_long_one_decides_alike(seed, u):
    """Rates near zero by design: the ratio of the coefficients is put next to a pair's own threshold."""
    torch.manual_seed(seed)
    model = SmallGPT(len(WORDS), width=16)
    pairs = SentimentGrammar(seed % 13, seed).pairs(4)
    short = pair_geometry(causal_lm_logp(model), None, pairs, method="ghost")
    long = pair_geometry(causal_lm_logp(copy.deepcopy(model).double()), None, pairs, method="loop")
    near = (long.inner / long.sqnorm_w).abs().float() * (1 + 1e-6 * torch.linspace(-30, 30, 4))
    for ratio in (near, torch.full((4,), u)):
        decided = ~short.undecided(ratio, 1.0) & ~long.undecided(ratio.double(), 1.0)
        assert torch.equal(short.regime(ratio, 1.0)[decided], long.regime(ratio.double(), 1.0)[decided])
    assert bool((~short.undecided(1.0, 1.0)).any())


@pytest.mark.parametrize("family", ["gpt2", "plain"])
@pytest.mark.parametrize("model_pad", [0, None])
def test_left_padding_is_the_same_with_a_mask_and_refused_without(family, model_pad):
    torch.manual_seed(0)
    if family == "gpt2":
        model = gpt2(dropout=0.0)
        model.config.pad_token_id = model_pad
    elif model_pad is None:
        model = SmallGPT(len(WORDS), width=16)
    else:
        return
    pairs = SentimentGrammar(2, 0).pairs(4)

    def shifted(rows):
        pads = torch.tensor([0, 3, 2, 5])
        width = rows["input_ids"].shape[1] + 5
        found = {
            name: torch.zeros(4, width, dtype=torch.long) for name in ("input_ids", "completion_mask", "attention_mask")
        }
        for i, pad in enumerate(pads.tolist()):
            for name in found:
                row = rows[name][i] if name in rows else torch.ones_like(rows["input_ids"][i])
                found[name][i, pad : pad + len(row)] = row
        return found

    score = causal_lm_logp(model)
    expected = pair_geometry(score, None, pairs, method="loop")
    moved = PairBatch(shifted(pairs.chosen), shifted(pairs.rejected))
    for method in ("loop", "ghost", "vmap"):
        found = pair_geometry(score, None, moved, method=method)
        torch.testing.assert_close(found.inner, expected.inner, rtol=1e-3, atol=1e-4 * float(expected.sqnorm_w.max()))
    bare = PairBatch(
        *({k: v for k, v in rows.items() if k != "attention_mask"} for rows in (moved.chosen, moved.rejected))
    )
    with pytest.raises(ConfigError, match="as if padded on the left, and no attention_mask says so"):
        pair_geometry(score, None, bare)


def _plain(g_w, g_l):
    full = _geometry([g_w], [g_l])
    return GradientGeometry(full.inner, full.sqnorm_w, full.sqnorm_l)


@given(vectors, vectors, st.floats(1e-3, 10))
def test_swapping_sides_swaps_scores_and_equal_coefficients_widen_the_margin(g_w, g_l, k):
    one, other = _geometry([g_w], [g_l]), _geometry([g_l], [g_w])
    a, b = one.scores(), other.scores()
    assert torch.equal(a["c_w"], b["c_l"])
    assert torch.equal(a["cosine"], b["cosine"])
    rate = one.margin_rate(k, k)
    apart = torch.tensor([[x - y for x, y in zip(g_w, g_l, strict=True)]], dtype=DOUBLE).square().sum()
    torch.testing.assert_close(rate.sum(), k * apart, rtol=1e-9, atol=1e-9)
    assert rate.item() >= 0


def test_unequal_coefficients_may_shrink_the_margin():
    found = _geometry([[1.0, 0.0]], [[1.5, 0.1]])
    assert found.margin_rate(1.0, 1.0) > 0
    rate = found.margin_rate(1.4, 0.2)
    torch.testing.assert_close(rate, torch.tensor([1.4 - 1.6 * 1.5 + 0.2 * 2.26], dtype=DOUBLE))
    assert rate < 0


@given(vectors, vectors)
def test_normalised_weights_are_ideal(g_w, g_l):
    found = _geometry([g_w], [g_l])
    if min(found.sqnorm_w, found.sqnorm_l) < 1e-12 or found.cosine > 1 - 1e-9:
        return
    rate_w, rate_l = found.rates(*found.pngd_weights())
    torch.testing.assert_close(rate_w, found.sqnorm_w.sqrt() * (1 - found.cosine), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(rate_l, -found.sqnorm_l.sqrt() * (1 - found.cosine), rtol=1e-6, atol=1e-9)
    assert found.regime(*found.pngd_weights()).item() == 0


def test_the_gap_decides_where_subtraction_cannot():
    """In float32 `|g_w|^2 - <g_w, g_l>` of nearly parallel gradients is noise; the measured gap keeps its sign."""
    generator = torch.Generator().manual_seed(0)
    g_w = torch.randn(64, 10_000, generator=generator, dtype=DOUBLE)
    g_l = g_w + 1e-5 * torch.randn(64, 10_000, generator=generator, dtype=DOUBLE)
    truth = (g_w * (g_w - g_l)).sum(1)
    single = [x.float() for x in (g_w, g_l)]
    products = [(a * b).sum(1) for a, b in ((single[0], single[1]), (single[0], single[0]), (single[1], single[1]))]
    with_gap = GradientGeometry(
        *products, (single[0] * (single[0] - single[1])).sum(1), (single[1] * (single[0] - single[1])).sum(1)
    )
    without = GradientGeometry(*products)
    right = [(g.rates(1.0, 1.0)[0].sign() == truth.sign()).double().mean() for g in (with_gap, without)]
    assert right[0] > 0.95 > right[1]
    assert without.undecided(1.0, 1.0).double().mean() > 0.9


# --- closed forms ----------------------------------------------------------------------------------------------------------------


def test_single_token_head_is_always_ideal():
    """Only the output matrix is trained, one token, one context h: `ip = |h|^2 (|p|^2 - p_w - p_l)` and so on."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        weight = torch.randn(7, 5, generator=generator, dtype=DOUBLE)
        h = torch.randn(5, generator=generator, dtype=DOUBLE)

        def logp(params, item, h=h):
            return (params["weight"] @ h).log_softmax(0)[item["token"]]

        found = pair_geometry(logp, {"weight": weight}, ({"token": torch.tensor([2])}, {"token": torch.tensor([4])}))
        p = (weight @ h).softmax(0)
        size, p_w, p_l = h.square().sum(), p[2], p[4]
        torch.testing.assert_close(found.inner[0], size * (p.square().sum() - p_w - p_l), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.gap_w[0], size * (1 - p_w + p_l), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(-found.gap_l[0], size * (1 - p_l + p_w), rtol=1e-12, atol=1e-12)
        assert found.regime(0.3, 0.3).tolist() == [0]


def test_free_logits_of_different_contexts_never_interact():
    def logp(params, item):
        rows = params["logits"][item["context"]].log_softmax(-1)
        return rows.gather(1, item["token"][:, None]).sum()

    chosen = {"context": torch.tensor([[0, 1]]), "token": torch.tensor([[2, 3]])}
    rejected = {"context": torch.tensor([[0, 2]]), "token": torch.tensor([[1, 3]])}
    logits = torch.randn(3, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    for method in ("loop", "vmap"):
        found = pair_geometry(logp, {"logits": logits}, (chosen, rejected), method=method)
        p = logits[0].softmax(0)
        torch.testing.assert_close(found.inner[0], p.square().sum() - p[1] - p[2])
        assert found.regime(1.0, 1.0).tolist() == [0]


def test_sketch_is_unbiased_also_where_all_numbers_are_positive():
    """Without its signs a count sketch would add `sum(x) sum(y) / dim`."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(1, 500, generator=generator, dtype=DOUBLE) for _ in range(2))
    found = []
    for seed in range(200):
        sketch = CountSketch({"w": x[0]}, 64, seed)
        first, second = sketch({"w": x})["w"], sketch({"w": y})["w"]
        assert first.shape == (1, 64)
        found.append((first * second).sum())
    products = torch.stack(found)
    assert abs(products.mean() - (x * y).sum()) < 3 * products.std() / np.sqrt(len(products))
    assert products.std() < np.sqrt(2 / 64) * x.norm() * y.norm()


# --- batches, seeds, tokens ------------------------------------------------------------------------------------------------------


def test_batch_rates_split_into_own_and_cross():
    gradients = torch.randn(6, 9, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    gram, d_w, d_l = gradients @ gradients.T, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.3, 0.1, 0.2])
    rates = batch_rates(gram, d_w.double(), d_l.double())
    own_w, own_l = _geometry(gradients[:3], gradients[3:]).rates(d_w, d_l)
    torch.testing.assert_close(rates.own_w, own_w / 3)
    torch.testing.assert_close(rates.own_l, own_l / 3)
    step = (d_w[:, None] * gradients[:3] - d_l[:, None] * gradients[3:]).mean(0)
    torch.testing.assert_close(torch.cat([rates.chosen, rates.rejected]), gradients @ step)
    torch.testing.assert_close(predicted_change(gram, d_w, d_l, 0.5), 0.5 * gradients @ step)


def test_a_seed_axis_is_reduced_per_seed():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, 2, dtype=DOUBLE, generator=generator)

    def stacked(params, item):
        return (item["x"] @ params["w"]).tanh().sum((-2, -1))

    batch = tuple({"x": torch.randn(5, 6, 4, dtype=DOUBLE, generator=generator)} for _ in range(2))
    for method in ("loop", "vmap"):
        found = pair_geometry(stacked, {"w": weight}, batch, method=method)
        gram = gram_matrix(stacked, {"w": weight}, batch, method=method)
        assert found.inner.shape == (3, 5)
        for seed in range(3):
            one = pair_geometry(stacked, {"w": weight[seed]}, batch, method=method)
            torch.testing.assert_close(found.inner[seed], one.inner)
            torch.testing.assert_close(found.sqnorm_w[seed], one.sqnorm_w)
            torch.testing.assert_close(gram[seed], gram_matrix(stacked, {"w": weight[seed]}, batch, method=method))
        report = entanglement_report(found, (0.1, 0.1), gram=gram)
        assert len(report["seeds"]) == 3
        delta = {"w": torch.randn(weight.shape, dtype=DOUBLE, generator=generator)}
        along = update_alignment(stacked, {"w": weight}, batch, delta, method=method)
        each = update_alignment(stacked, {"w": weight[1]}, batch, {"w": delta["w"][1]}, method=method)
        torch.testing.assert_close(along[0][1], each[0])


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(0)
    return causal_lm_logp(SmallGPT(width=16, layers=1, heads=2)), SentimentGrammar(2, seed=1).pairs(5)


def test_shared_prefix_tokens_have_one_gradient(toy):
    """Completions that agree up to their last token: the shared tokens' gradients are the same and cancel in `g_w - g_l`."""
    logp, pairs = toy
    ids = pairs.chosen["input_ids"].clone()
    ids[:, -1] = 7
    batch = PairBatch(pairs.chosen, {**pairs.rejected, "input_ids": ids})
    products = [token_geometry(logp, None, batch, sides=sides) for sides in ("wl", "ww", "ll")]
    cosines = token_cosines(*products)
    torch.testing.assert_close(cosines.diagonal()[:-1], torch.ones(3), rtol=1e-5, atol=1e-5)
    assert cosines.diagonal()[-1] < 0.9
    geometry = pair_geometry(logp, None, batch)
    torch.testing.assert_close(geometry.gap_w, geometry.rates(1.0, 1.0)[0])


def test_layers_add_up_and_measuring_leaves_the_model_alone(toy):
    logp, pairs = toy
    model = logp.module.train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for method in ("loop", "vmap", "ghost", "sketch", "head"):
        found = pair_geometry(logp, None, pairs, method=method, group_by="layer")
        torch.testing.assert_close(sum(part.inner for part in found.parts.values()), found.inner)
    found = pair_geometry(logp, None, pairs, method="ghost", group_by="layer")
    assert set(found.parts) == {"transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.ln_f"}
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert torch.equal(p.grad, torch.ones_like(p))
    model.zero_grad()


def test_ghost_notices_a_weight_used_outside_its_layer():
    class Sneaky(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)

        def forward(self, x):
            return (self.layer(x) @ self.layer.weight).sum(-1)

    score = segment_return(Sneaky())
    batch = PairBatch(*({"observations": torch.randn(2, 4, 2), "actions": torch.randn(2, 4, 1)} for _ in range(2)))
    pair_geometry(score, None, batch, method="vmap")
    with pytest.raises(ConfigError, match=r"use of parameter 'layer.weight' outside its own layer"):
        pair_geometry(score, None, batch, method="ghost")


def test_report_is_json_and_says_where_the_meters_disagree(toy):
    logp, pairs = toy
    geometry = pair_geometry(logp, None, pairs, method="vmap", group_by="layer")
    gram = gram_matrix(logp, None, pairs, method="vmap")
    realised = torch.full((5,), -1.0), torch.full((5,), -1.0)
    report = entanglement_report(geometry, (0.05, 0.05), gram=gram, realised=realised)
    json.dumps(report, allow_nan=False)
    assert sum(report["regimes"].values()) == pytest.approx(1)
    assert set(report["regimes"]) == set(REGIMES)
    assert report["meters"]["realised"]["share_both_down"] == 1
    pair_up = (geometry.rates(0.05, 0.05)[0] > 0).double().mean().item()
    assert report["disagreement"]["realised"]["chosen"] == pytest.approx(pair_up)
    assert sum(part["inner_share"] for part in report["parts"].values()) == pytest.approx(1)
    own = geometry.rates(0.05, 0.05)[0] / 5
    torch.testing.assert_close(
        batch_rates(gram, torch.full((5,), 0.05), torch.full((5,), 0.05)).own_w, own, rtol=1e-4, atol=1e-7
    )
    assert "pair" not in entanglement_report(geometry, (0.05, 0.05), gram=gram, pairwise=False)["meters"]


# --- bad input -------------------------------------------------------------------------------------------------------------------


def test_bad_input_is_named(toy):
    logp, pairs = toy
    empty = {**pairs.chosen, "completion_mask": pairs.chosen["completion_mask"].clone()}
    empty["completion_mask"][3] = 0
    segments = {"observations": torch.zeros(2, 4, 3), "actions": torch.zeros(2, 4, 1)}
    shorter = {name: x[:, :3] for name, x in segments.items()}
    score = segment_return(torch.nn.Linear(4, 1))
    nan = {**segments, "actions": torch.full((2, 4, 1), float("nan"))}
    ones = torch.ones(3)
    for message, call in {
        "chosen completion of pair 3 is empty": lambda: pair_geometry(logp, None, (empty, pairs.rejected)),
        "segments have 4 and 3 steps": lambda: pair_geometry(score, None, (segments, shorter)),
        "actions of the rejected segments hold NaN": lambda: pair_geometry(score, None, (segments, nan)),
        "unknown method 'gohst'": lambda: pair_geometry(logp, None, pairs, method="gohst"),
        "use loop or vmap for a bare function": lambda: pair_geometry(
            lambda p, i: p["x"], {"x": ones}, pairs, method="ghost"
        ),
        "is not a parameter of the model": lambda: pair_geometry(logp, {"nope": ones}, pairs),
        "group_by='layers'": lambda: pair_geometry(logp, None, pairs, group_by="layers"),
        "microbatch=0": lambda: pair_geometry(logp, None, pairs, microbatch=0),
        "pair=9 is not one of the batch's 5 pairs": lambda: token_geometry(logp, None, pairs, pair=9),
        "sides='lw?'": lambda: token_geometry(logp, None, pairs, sides="lw?"),
        "sqnorm_w has shape": lambda: GradientGeometry(ones, ones[:2], ones),
        "inner holds NaN": lambda: GradientGeometry(ones * float("nan"), ones, ones),
        "is a squared norm": lambda: GradientGeometry(ones, -ones, ones),
        "a Gram matrix of P pairs": lambda: predicted_change(torch.eye(4), ones, ones, 0.1),
        "delta has no change": lambda: update_alignment(logp, None, pairs, {}),
        "disagree on the number of pairs": lambda: pair_geometry(
            logp, None, (pairs.chosen, pairs.select(slice(0, 2)).rejected)
        ),
        "have no completion_mask": lambda: pair_geometry(logp, None, ({"input_ids": ones},) * 2),
        "sketch_dim=0": lambda: pair_geometry(logp, None, pairs, method="sketch", sketch_dim=0),
    }.items():
        with pytest.raises(ConfigError, match=re.escape(message)):
            call()


def test_a_model_with_nan_weights_is_refused(toy):
    _, pairs = toy
    model = SmallGPT(width=16, layers=1, heads=2)
    with torch.no_grad():
        model.transformer["ln_f"].weight[0] = float("nan")
    with pytest.raises(ConfigError, match="NaN or infinite"):
        pair_geometry(causal_lm_logp(model), None, pairs)
    assert np.isfinite(float(pair_geometry(causal_lm_logp(SmallGPT(width=16)), None, pairs).inner[0]))


def test_every_regime_can_be_drawn():
    from rlkit2.reporting.entanglement_figures import COLORS, regime_map

    assert set(COLORS) == set(REGIMES)
    count = len(REGIMES)
    pairs = {name: [1.0] * count for name in ("c_w", "c_l", "d_w", "d_l")}
    regime_map({"per_pair": {**pairs, "regime": list(REGIMES)}})


class _Bigram(torch.nn.Module):
    """An embedding with a padding row, a layer, an output layer: with a bias and tied if wanted."""

    def __init__(self, vocabulary, width, *, bias, tied):
        super().__init__()
        self.wte = torch.nn.Embedding(vocabulary, width, padding_idx=2)
        self.mix = torch.nn.Linear(width, width)
        self.lm_head = torch.nn.Linear(width, vocabulary, bias=bias)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, ids):
        return self.lm_head(torch.tanh(self.mix(self.wte(ids))).cumsum(1))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("vocabulary", "width", "length"), [(11, 4, 9), (300, 40, 5), (300, 3, 12), (40, 64, 6)])
def test_ghost_equals_the_loop_whichever_form_is_smaller(vocabulary, width, length, bias, tied):
    """Gradients as matrices, as factors, as indices, and as sums of these."""
    torch.manual_seed(0)
    model = _Bigram(vocabulary, width, bias=bias, tied=tied).double()
    sides = []
    for extra in (0, 2):  # rejected rows are longer, so their gradients may take another form
        ids = torch.randint(3, vocabulary, (4, length + extra))
        ids[1, 2] = 2
        mask = torch.zeros_like(ids)
        for i in range(4):
            mask[i, 1 + i % 3 : length - i % 2] = 1
        sides.append({"input_ids": ids, "completion_mask": mask})
    pairs, score = PairBatch(*sides), causal_lm_logp(model)
    assert score.hidden is not None
    found = [PairGradients(score, None, pairs, method=method, microbatch=3) for method in ("ghost", "loop")]
    for name in ("gram", "geometry"):
        ours, theirs = (getattr(one, name)() for one in found)
        for a, b in [(ours, theirs)] if name == "gram" else [(ours.inner, theirs.inner), (ours.gap_l, theirs.gap_l)]:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    delta = {name: torch.randn_like(p) for name, p in score.params.items()}
    for a, b in zip(found[0].along(delta), found[1].along(delta), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        assert model(pairs.chosen["input_ids"]).shape[-1] == vocabulary  # the output layer is itself again


def test_capped_or_scaled_logits_do_not_take_the_short_way():
    model = gpt2(dropout=0.0)
    assert causal_lm_logp(model).hidden is not None
    for name, value in (("final_logit_softcapping", 30.0), ("logit_scale", 0.1), ("logits_scaling", 8.0)):
        other = copy.deepcopy(model)
        setattr(other.config, name, value)
        assert causal_lm_logp(other).hidden is None
