"""Remedies: what they promise holds for random gradients and in real steps; the probe predicts what happens."""

import json

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from rlkit2.entanglement.mitigation import (
    band_coefficients,
    coefficient_loss,
    differing_tokens,
    filtered_coefficients,
    group_coefficients,
    group_normalised_loss,
    likelihood_coefficients,
    normalised_coefficients,
)
from rlkit2.entanglement.probe import REMEDIES, EntanglementProbe, log_values
from rlkit2.errors import ConfigError
from rlkit2.losses.margin import MarginInputs, margin_coefficients, margin_loss
from rlkit2.preferences.entanglement import GradientGeometry, PairBatch, causal_lm_logp, gram_matrix, pair_geometry
from rlkit2.studies.toy_language import SentimentGrammar, SmallGPT

DOUBLE = torch.float64
vectors = st.lists(st.floats(-5, 5), min_size=3, max_size=3)
positive = st.floats(0.01, 10)


def _geometry(g_w, g_l):
    w, n = (torch.tensor([g], dtype=DOUBLE) for g in (g_w, g_l))
    return GradientGeometry((w * n).sum(1), w.square().sum(1), n.square().sum(1)), w, n


@given(vectors, vectors, positive, positive)
def test_normalised_steps_are_ideal_and_as_long_as_before(g_w, g_l, d_w, d_l):
    geometry, w, n = _geometry(g_w, g_l)
    assume(min(geometry.sqnorm_w, geometry.sqnorm_l) > 1e-6 and geometry.cosine < 0.999)
    for mode in ("per_pair", "reweight"):
        c_w, c_l = normalised_coefficients(geometry, d_w, d_l, mode=mode)
        assert geometry.regime(c_w, c_l).tolist() == [0]
        torch.testing.assert_close(c_w / c_l, (geometry.sqnorm_l / geometry.sqnorm_w).sqrt())
    torch.testing.assert_close((c_w * c_l).sqrt(), torch.full((1,), (d_w * d_l) ** 0.5, dtype=DOUBLE))
    c_w, c_l = normalised_coefficients(geometry, d_w, d_l)
    length, own = (c_w * w - c_l * n).norm(), (d_w * w - d_l * n).norm()
    assert length <= own * (1 + 1e-9)  # shorter only where the cap binds
    cap = 10 * normalised_coefficients(geometry, d_w, d_l, mode="reweight")[0]
    assert abs(length - own) <= 1e-9 * own or abs(c_w - cap) <= 1e-9 * cap


@given(vectors, vectors, positive, positive, st.floats(0, 0.5))
def test_band_clipping_is_ideal_and_least(g_w, g_l, d_w, d_l, margin):
    geometry, _, _ = _geometry(g_w, g_l)
    assume(min(geometry.sqnorm_w, geometry.sqnorm_l) > 1e-6 and geometry.cosine < 0.999)
    c_w, c_l = band_coefficients(geometry, d_w, d_l, margin=margin + 1e-6)
    assert geometry.regime(c_w, c_l).tolist() == [0]
    torch.testing.assert_close(c_w * c_l, torch.full((1,), d_w * d_l, dtype=DOUBLE))
    loose = band_coefficients(geometry, d_w, d_l, margin=0.0)
    if geometry.regime(d_w, d_l).item() == 0:
        torch.testing.assert_close(loose[0], torch.full((1,), d_w, dtype=DOUBLE))
    scores = geometry.scores()
    if geometry.inner > 0:
        assert scores["c_w"] * (1 - 1e-9) <= loose[0] / loose[1] <= (1 + 1e-9) / scores["c_l"]


def test_remedies_keep_inactive_and_negative_pairs_sane():
    geometry, _, _ = _geometry([1.0, 0, 0], [2.0, 1.0, 0])
    for remedy in (normalised_coefficients, band_coefficients):
        assert [x.item() for x in remedy(geometry, 0.0, 0.0)] == [0.0, 0.0]
        assert [x.item() for x in remedy(geometry, 0.5, 0.0)] == [0.5, 0.0]
        c_w, c_l = remedy(geometry, -0.5, -0.5)  # a smoothed loss past its target wants the reverse
        assert c_w < 0 > c_l
        rate_w, rate_l = geometry.rates(c_w, c_l)
        assert rate_w < 0 < rate_l
    parallel, _, _ = _geometry([1.0, 0, 0], [3.0, 0, 0])
    assert all(x.isfinite().all() for x in normalised_coefficients(parallel, 1.0, 1.0))
    zero, _, _ = _geometry([0.0, 0, 0], [3.0, 0, 0])
    assert [x.item() for x in normalised_coefficients(zero, 1.0, 1.0)] == [1.0, 1.0]


def test_likelihood_and_filter():
    inner, w2 = torch.tensor([0.1, 2.0, 0.5, 1.5]), torch.ones(4)
    geometry = GradientGeometry(inner, w2, 4 * w2)
    c_w, c_l = likelihood_coefficients(geometry, 0.1, 0.1, weight=0.3)
    assert torch.equal(c_w, torch.full((4,), 0.1) + 0.3)
    assert torch.equal(c_l, torch.full((4,), 0.1))
    assert filtered_coefficients(geometry, 1.0, 1.0, drop=0.5)[0].tolist() == [1, 0, 1, 0]
    as_numpy = GradientGeometry(inner.numpy(), w2.numpy(), w2.numpy())
    assert isinstance(band_coefficients(as_numpy, 1.0, 1.0)[0], np.ndarray)


# --- on a model ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(0)
    logp = causal_lm_logp(SmallGPT(width=16, layers=1, heads=2).double())
    return logp, SentimentGrammar(4, seed=1).pairs(6)


def _inputs(logp, pairs, params=None):
    sides = [logp.sums(logp.params if params is None else params, rows) for rows in (pairs.chosen, pairs.rejected)]
    reference = [side.detach() - 0.3 for side in sides]
    return MarginInputs(*sides, *reference)


def test_coefficient_loss_has_that_gradient_and_shows_the_value(toy):
    logp, pairs = toy
    inputs = _inputs(logp, pairs)
    value = margin_loss("dpo", inputs)
    c_w, c_l = torch.rand(6, dtype=DOUBLE), torch.rand(6, dtype=DOUBLE)
    loss = coefficient_loss(inputs.a, inputs.b, c_w, c_l, value=value)
    assert torch.equal(loss, value.detach())
    found = torch.autograd.grad(loss.sum(), list(logp.params.values()), retain_graph=True)
    expected = torch.autograd.grad((-c_w * inputs.a + c_l * inputs.b).sum(), list(logp.params.values()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_group_loss_equals_group_coefficients(toy):
    logp, pairs = toy
    model = logp.module
    inputs = _inputs(logp, pairs)
    d_w, d_l = margin_coefficients("dpo", inputs)
    gram = gram_matrix(logp, None, pairs, method="ghost")
    c_w, c_l = group_coefficients(gram, d_w, d_l)
    expected = torch.autograd.grad(
        (-c_w * inputs.a + c_l * inputs.b).mean(), list(logp.params.values()), retain_graph=True
    )
    model.zero_grad()
    value = margin_loss("dpo", inputs)
    loss = group_normalised_loss(inputs.a, inputs.b, d_w, d_l, model.parameters(), value=value)
    torch.testing.assert_close(loss, value.mean().detach())
    loss.backward()
    for p, other in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, other, rtol=1e-7, atol=1e-9)
    own = torch.autograd.grad(margin_loss("dpo", _inputs(logp, pairs)).mean(), list(logp.params.values()))
    length = sum(g.square().sum() for g in own).sqrt()
    torch.testing.assert_close(sum(g.square().sum() for g in expected).sqrt(), length)
    model.zero_grad()


def test_differing_tokens_are_what_is_left_of_the_common_subsequence():
    ids_w = torch.tensor([[9, 1, 2, 3, 4, 0], [9, 5, 6, 7, 0, 0], [9, 1, 2, 0, 0, 0]])
    ids_l = torch.tensor([[9, 8, 2, 3, 5, 4], [9, 6, 7, 0, 0, 0], [9, 1, 2, 3, 0, 0]])
    mask_w = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0]])
    mask_l = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]])
    found = differing_tokens(ids_w, ids_l, mask_w, mask_l)
    assert found[0].tolist() == [
        [0, 1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
    ]  # the last is part of the other: kept
    assert found[1].tolist() == [[0, 1, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]]
    assert mask_w.sum() == 9  # the given masks are left alone


def test_the_probe_predicts_a_real_step_and_its_dry_runs(toy):
    """A gradient step on the probe's own batch: the batch meter, the optimiser meter and reality agree; every remedy does what the dry run said."""
    logp, pairs = toy
    inputs = _inputs(logp, pairs)
    reference = inputs.ref_chosen, inputs.ref_rejected
    probe = EntanglementProbe(logp, pairs, "dpo", reference=reference, dry_run=REMEDIES, group_by="layer")
    start = {name: p.detach().clone() for name, p in logp.params.items()}
    lr = 1e-5
    probe.before()
    inputs = MarginInputs(*(logp.sums(logp.params, rows) for rows in (pairs.chosen, pairs.rejected)), *reference)
    _descend(logp, margin_loss("dpo", inputs).mean(), lr)
    record = probe.after(step=1, lr=lr)
    json.dumps(record, allow_nan=False)
    batch, realised = record["meters"]["batch"], record["meters"]["realised"]
    assert realised["chosen"] == pytest.approx(lr * batch["chosen"], rel=1e-2)
    assert record["meters"]["optimizer"]["rejected"] == pytest.approx(lr * batch["rejected"], rel=1e-6)
    assert set(log_values(record)) >= {"entanglement/cosine_mean", "entanglement/share_both_down"}
    geometry, gram = pair_geometry(logp, start, pairs), gram_matrix(logp, start, pairs)
    d_w, d_l = margin_coefficients("dpo", inputs)
    candidates = {
        "normalised": normalised_coefficients(geometry, d_w, d_l),
        "band": band_coefficients(geometry, d_w, d_l),
        "group_normalised": group_coefficients(gram, d_w, d_l),
        "likelihood": likelihood_coefficients(geometry, d_w, d_l),
    }
    for name, (c_w, c_l) in candidates.items():
        _reset(logp, start)
        before = probe.scores()
        sides = [logp.sums(logp.params, rows) for rows in (pairs.chosen, pairs.rejected)]
        _descend(logp, coefficient_loss(*sides, c_w, c_l).mean(), lr)
        change = [(now - then).mean().item() for now, then in zip(probe.scores(), before, strict=True)]
        assert change[0] == pytest.approx(lr * record["dry_run"][name]["rate_chosen"], rel=2e-2)
        assert change[1] == pytest.approx(lr * record["dry_run"][name]["rate_rejected"], rel=2e-2)
    _reset(logp, start)
    before = probe.scores()
    masks = differing_tokens(
        *(rows[key] for key in ("input_ids", "completion_mask") for rows in (pairs.chosen, pairs.rejected))
    )
    sides = [
        logp.sums(logp.params, {**rows, "completion_mask": mask})
        for rows, mask in zip((pairs.chosen, pairs.rejected), masks, strict=True)
    ]
    _descend(logp, coefficient_loss(*sides, d_w, d_l).mean(), lr)
    change = [(now - then).mean().item() for now, then in zip(probe.scores(), before, strict=True)]
    assert change[0] == pytest.approx(lr * record["dry_run"]["token_mask"]["rate_chosen"], rel=2e-2)
    assert change[1] == pytest.approx(lr * record["dry_run"]["token_mask"]["rate_rejected"], rel=2e-2)
    _reset(logp, start)


def _descend(logp, loss, lr):
    gradients = torch.autograd.grad(loss, list(logp.params.values()))
    with torch.no_grad():
        for p, g in zip(logp.params.values(), gradients, strict=True):
            p -= lr * g


def _reset(logp, start):
    with torch.no_grad():
        for name, p in logp.params.items():
            p.copy_(start[name])


def test_probe_refuses_what_it_cannot_do(toy):
    logp, pairs = toy
    with pytest.raises(ConfigError, match="needs reference log-probabilities"):
        EntanglementProbe(logp, pairs, "dpo")
    EntanglementProbe(logp, pairs, "simpo")
    with pytest.raises(ConfigError, match="needs before"):
        EntanglementProbe(logp, pairs, "dpo", reference="initial").after()
    with pytest.raises(ConfigError, match="unknown remedy 'magic'"):
        EntanglementProbe(logp, pairs, "simpo", dry_run=("magic",))
    with pytest.raises(ConfigError, match="method='head' of a probe"):
        EntanglementProbe(logp, pairs, "simpo", method="head")
    with pytest.raises(ConfigError, match="reference='first' must be \"initial\""):
        EntanglementProbe(logp, pairs, "dpo", reference="first")
    empty = {**pairs.rejected, "completion_mask": torch.zeros_like(pairs.rejected["completion_mask"])}
    with pytest.raises(ConfigError, match="rejected completion of pair 0 is empty"):
        EntanglementProbe(logp, PairBatch(pairs.chosen, empty), "simpo")
