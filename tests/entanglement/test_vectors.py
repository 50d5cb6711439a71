"""Gradient geometry of language models and segment models against the reference vectors and against real steps."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from rlkit2.errors import ConfigError
from rlkit2.losses.margin import MARGIN_LOSSES, MarginInputs, margin_coefficients, margin_loss
from rlkit2.preferences.entanglement import (
    GradientGeometry,
    PairBatch,
    batch_rates,
    causal_lm_logp,
    ches_scores,
    gram_matrix,
    pair_geometry,
    predicted_change,
    segment_logp,
    segment_return,
    token_geometry,
    token_rates,
    update_alignment,
)
from tests.entanglement.reference_models import Vectors
from tests.reference import ROOT

HYPERPARAMETERS = {"simpo": {"beta": 2.0}, "rrhf": {"lam": 1.0}}


@pytest.fixture(scope="module", params=["gpt2", "gpt2sft"])
def vectors(request):
    return Vectors(request.param)


@pytest.fixture(scope="module")
def logp(vectors):
    return causal_lm_logp(vectors.small_gpt())


def _check_geometry(found, vectors, names, rtol):
    for key in ("inner", "sqnorm_w", "sqnorm_l", "cosine"):
        np.testing.assert_allclose(getattr(found, key), vectors[key], rtol=rtol, atol=rtol, err_msg=key)
    for key in ("inner", "sqnorm_w", "sqnorm_l"):
        ours = np.stack([getattr(found.parts[name], key) for name in names], 1)
        scale = np.abs(vectors[f"per_param_{key}"]).max()
        np.testing.assert_allclose(ours, vectors[f"per_param_{key}"], rtol=rtol, atol=rtol * scale, err_msg=key)
        np.testing.assert_allclose(ours.sum(1), vectors[key], rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("method", ["loop", "vmap", "ghost"])
def test_geometry_gram_and_regimes(vectors, logp, method):
    found = pair_geometry(logp, None, vectors.batch, method=method, group_by="parameter")
    _check_geometry(found, vectors, vectors["param_names"], 1e-9)
    gram = gram_matrix(logp, None, vectors.batch, method=method)
    np.testing.assert_allclose(gram, vectors["gram"], rtol=1e-9, atol=1e-9)
    assert torch.allclose(gram, gram.mT, rtol=1e-12, atol=1e-12)
    assert torch.linalg.eigvalsh(gram).min() > -1e-9 * gram.trace()
    for row, name in enumerate(vectors["loss_names"]):
        coefficients = vectors["loss_d_w"][row], vectors["loss_d_l"][row]
        np.testing.assert_array_equal(found.regime(*coefficients), vectors["regime"][row], err_msg=name)
        for ours, key in zip(found.rates(*coefficients), ("pred_rate_w", "pred_rate_l"), strict=True):
            np.testing.assert_allclose(ours, vectors[key][row], rtol=1e-8, atol=1e-8, err_msg=name)
        assert not found.undecided(*coefficients).any()


@pytest.mark.parametrize("method", ["loop", "vmap", "ghost"])
def test_transformers_llama(method):
    vectors = Vectors("llama")
    found = pair_geometry(
        causal_lm_logp(vectors.transformers_model()), None, vectors.batch, method=method, group_by="parameter"
    )
    _check_geometry(found, vectors, vectors["param_names"], 1e-4)


@pytest.mark.parametrize("method", ["loop", "vmap", "ghost"])
def test_transformers_gpt2_equals_our_own(method):
    """transformers' Conv1D layers and their tied output embedding; `state_dict` names the tied tensor twice and counts it once."""
    vectors = Vectors("gpt2sft")
    model = vectors.transformers_model()
    found = pair_geometry(causal_lm_logp(model), model.state_dict(), vectors.batch, method=method, group_by="parameter")
    _check_geometry(found, vectors, vectors["param_names"], 1e-9)


def test_coefficients_of_the_stored_losses(vectors):
    keys = ("seq_logps_w", "seq_logps_l", "ref_logps_w", "ref_logps_l", "len_w", "len_l")
    inputs = MarginInputs(*(vectors[key] for key in keys))
    for row, name in enumerate(vectors["loss_names"]):
        d_w, d_l = margin_coefficients(str(name), inputs, **HYPERPARAMETERS.get(str(name), {}))
        np.testing.assert_allclose(d_w, vectors["loss_d_w"][row], rtol=1e-10, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(d_l, vectors["loss_d_l"][row], rtol=1e-10, atol=1e-12, err_msg=name)


def test_microbatches_and_padding_change_nothing(vectors, logp):
    whole = pair_geometry(logp, None, vectors.batch, method="vmap")
    for method, size in (("vmap", 3), ("ghost", 2), ("loop", 4)):
        parts = pair_geometry(logp, None, vectors.batch, method=method, microbatch=size)
        np.testing.assert_allclose(parts.inner, whole.inner, rtol=1e-9)
    moved = {}
    for side in "wl":  # the same rows padded on the left and longer
        ids, mask, attended = (
            vectors.tensor(f"{key}_{side}") for key in ("input_ids", "completion_mask", "attention_mask")
        )
        room = torch.zeros(len(ids), 3, dtype=ids.dtype)
        moved[f"input_ids_{side}"] = torch.cat([room, ids], 1)
        moved[f"completion_mask_{side}"] = torch.cat([room, mask], 1)
        moved[f"attention_mask_{side}"] = torch.cat([room, attended], 1)
    found = pair_geometry(logp, None, moved, method="ghost")
    np.testing.assert_allclose(found.inner, whole.inner, rtol=1e-9)
    trl = {
        key[:-2]: torch.cat([vectors.batch[key], vectors.batch[f"{key[:-2]}_l"]])
        for key in vectors.batch
        if key.endswith("_w")
    }
    prefixed = {f"{('chosen', 'rejected')[key.endswith('_l')]}_{key[:-2]}": x for key, x in vectors.batch.items()}
    named = {"chosen": trl_half(trl, 0), "rejected": trl_half(trl, 1)}
    for batch in (trl, prefixed, named):
        np.testing.assert_allclose(pair_geometry(logp, None, batch, method="ghost").inner, whole.inner, rtol=1e-9)


def trl_half(batch, side):
    return {key: x.chunk(2)[side] for key, x in batch.items()}


def test_token_products_add_up(vectors, logp):
    geometry = pair_geometry(logp, None, vectors.batch)
    for pair in (0, 2):
        products = {
            sides: token_geometry(logp, None, vectors.batch, pair=pair, sides=sides) for sides in ("wl", "ww", "ll")
        }
        for sides, found in products.items():
            stored = vectors[f"token_inner_{sides}"][pair][: found.shape[0], : found.shape[1]]
            np.testing.assert_allclose(found, stored, rtol=1e-9, atol=1e-9)
        assert products["wl"].sum().item() == pytest.approx(vectors["inner"][pair], rel=1e-9)
        d_w, d_l = vectors["loss_d_w"][4][pair], vectors["loss_d_l"][4][pair]
        rates = token_rates(logp, None, vectors.batch, d_w, d_l, pair=pair)
        np.testing.assert_allclose(
            rates[0], d_w * products["ww"].sum(1) - d_l * products["wl"].sum(1), rtol=1e-8, atol=1e-9
        )
        for side, whole in zip(rates, geometry.rates(d_w, d_l), strict=True):
            assert side.sum().item() == pytest.approx(whole[pair].item(), rel=1e-8)


def test_head_proxy_and_ches(vectors, logp):
    proxy = pair_geometry(logp, None, vectors.batch, method="head")
    assert proxy.method == "head"
    found = np.stack([proxy.inner, proxy.sqnorm_w, proxy.sqnorm_l], 1)
    np.testing.assert_allclose(found, vectors["head_only"], rtol=1e-9, atol=1e-9)
    assert proxy.undecided(
        *(torch.ones(len(proxy), dtype=torch.float64),) * 2
    ).all()  # no error bar, so nothing is decided
    np.testing.assert_allclose(ches_scores(logp, None, vectors.batch), vectors["ches"], rtol=1e-9, atol=1e-9)


def test_sketch_is_close_and_unbiased(vectors, logp):
    truth = pair_geometry(logp, None, vectors.batch)
    found = pair_geometry(logp, None, vectors.batch, method="sketch", sketch_dim=1024)
    assert np.abs(np.asarray(found.cosine) - vectors["cosine"]).max() < 0.03
    assert 0 < found.relative_error <= np.sqrt(2 / 1024)
    gaps = [
        (
            pair_geometry(logp, None, _select(vectors, 2), method="sketch", sketch_dim=32, seed=seed).inner
            - truth.inner[2]
        )
        for seed in range(60)
    ]
    gaps = torch.cat(gaps)
    assert abs(gaps.mean()) < 3 * gaps.std() / np.sqrt(len(gaps))
    bar = np.sqrt(2 / 32) * (truth.sqnorm_w[2] * truth.sqnorm_l[2]).sqrt()
    assert gaps.std() < bar


def _select(vectors, pair):
    return {key: value[pair : pair + 1] for key, value in vectors.batch.items()}


def _after(logp, direction, lr, sides):
    """Real change of the scores after a step of size lr along `direction`."""
    params = logp.params
    moved = {name: p + lr * direction[name] for name, p in params.items()}
    with torch.no_grad():
        return torch.stack([logp.sums(moved, rows) - logp.sums(params, rows) for rows in sides])


def _direction(logp, rows, coefficients):
    """`sum_i c_i grad score_i` by autograd, for checking."""
    leaves = {name: p.detach().requires_grad_() for name, p in logp.params.items()}
    total = sum((c * logp.sums(leaves, side)).sum() for side, c in zip(rows, coefficients, strict=True))
    found = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True, allow_unused=True)
    return dict(zip(leaves, found, strict=True))


def _second_order(errors):
    """Each tenth of the step leaves a hundredth of the error."""
    assert errors[0] > 0
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(100, abs=10)


LRS = (1e-4, 1e-5, 1e-6)


def test_first_order_law(vectors, logp):
    """Pairs, the batch, the normalised step and Adam's first step: the prediction is off by the square of the step."""
    batch = logp.prepare(
        PairBatch(*({k[:-2]: v for k, v in vectors.batch.items() if k.endswith(end)} for end in ("_w", "_l")))
    )
    sides = batch.chosen, batch.rejected
    d_w, d_l = vectors.tensor("loss_d_w"), vectors.tensor("loss_d_l")
    geometry = pair_geometry(logp, None, batch, method="vmap")
    for loss, pair in ((0, 0), (4, 1), (2, 3)):
        one = batch.select(slice(pair, pair + 1))
        c = d_w[loss, pair], -d_l[loss, pair]
        direction = _direction(logp, (one.chosen, one.rejected), c)
        rates = [rate[pair] for rate in geometry.rates(d_w[loss], d_l[loss])]
        changes = [_after(logp, direction, lr, (one.chosen, one.rejected))[:, 0] for lr in vectors["lrs"]]
        np.testing.assert_allclose(torch.stack(changes), vectors["actual_delta"][loss, pair], rtol=1e-6, atol=1e-12)
        _second_order(
            [abs(_after(logp, direction, lr, (one.chosen, one.rejected))[0, 0] - lr * rates[0]) for lr in LRS]
        )
    gram = gram_matrix(logp, None, batch, method="ghost")
    rates = batch_rates(gram, d_w[0], d_l[0])
    np.testing.assert_allclose(torch.cat([rates.chosen, rates.rejected]), vectors["batch_pred_rate"], rtol=1e-9)
    direction = _direction(logp, sides, (d_w[0] / len(batch), -d_l[0] / len(batch)))
    _second_order(
        [
            (_after(logp, direction, lr, sides).flatten() - predicted_change(gram, d_w[0], d_l[0], lr)).norm()
            for lr in LRS
        ]
    )
    adam = {name: g / (g.abs() + 1e-8) for name, g in direction.items()}
    for method in ("loop", "vmap", "ghost"):
        along = torch.stack(update_alignment(logp, None, batch, adam, method=method))
        np.testing.assert_allclose(along.flatten(), vectors["batch_adam1_pred_rate"], rtol=1e-9, atol=1e-9)
    _second_order([(_after(logp, adam, lr, sides) - lr * along).norm() for lr in (1e-4, 1e-5, 1e-6)])


def test_normalised_step_disentangles_every_pair(vectors, logp):
    geometry = pair_geometry(logp, None, vectors.batch, method="ghost")
    weights = geometry.pngd_weights()
    rate_w, rate_l = geometry.rates(*weights)
    np.testing.assert_allclose(torch.stack([rate_w, rate_l], 1), vectors["pngd_pred_rate"], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(rate_w, geometry.sqnorm_w.sqrt() * (1 - geometry.cosine), rtol=1e-8, atol=1e-10)
    assert (rate_w >= 0).all()
    assert (rate_l <= 0).all()
    for pair in range(len(geometry)):
        one = logp.prepare(
            PairBatch(*({k[:-2]: v for k, v in _select(vectors, pair).items() if k.endswith(e)} for e in ("_w", "_l")))
        )
        direction = _direction(logp, (one.chosen, one.rejected), (weights[0][pair], -weights[1][pair]))
        change = _after(logp, direction, 1e-5, (one.chosen, one.rejected))
        if geometry.cosine[pair] < 1 - 1e-9:
            assert change[0] > 0 > change[1]


# --- segments --------------------------------------------------------------------------------------------------------------------


class _Reward(torch.nn.Module):
    def __init__(self, state):
        super().__init__()
        self.net = _mlp(state, 7, 1)

    def forward(self, observations, actions):
        return self.net(torch.cat([observations, actions], -1))


class _Policy(torch.nn.Module):
    def __init__(self, state):
        super().__init__()
        self.net = _mlp({k: v for k, v in state.items() if "log_std" not in k}, 5, 2)
        self.log_std = torch.nn.Parameter(state["log_std"])

    def forward(self, observations):
        return torch.distributions.Normal(self.net(observations), self.log_std.exp())


def _mlp(state, inputs, outputs):
    net = torch.nn.Sequential(
        torch.nn.Linear(inputs, 16),
        torch.nn.Tanh(),
        torch.nn.Linear(16, 16),
        torch.nn.Tanh(),
        torch.nn.Linear(16, outputs),
    ).double()
    net.load_state_dict(state)
    return net


@pytest.fixture(scope="module")
def segments():
    with np.load(ROOT / "preferences_segments.npz") as file:
        arrays = {
            key: torch.tensor(file[key]) for key in file.files if file[key].dtype.kind == "f" or key.endswith("regime")
        }
    batch = PairBatch(*({"observations": arrays[f"obs_{s}"], "actions": arrays[f"act_{s}"]} for s in "wl"))
    return arrays, batch


def _weights(arrays, prefix):
    return {key.split("/")[1]: value for key, value in arrays.items() if key.startswith(prefix)}


@pytest.mark.parametrize("method", ["loop", "vmap", "ghost"])
def test_bradley_terry_and_contrastive_models(segments, method):
    arrays, batch = segments
    reward = segment_return(_Reward(_weights(arrays, "reward_weights/")))
    policy = segment_logp(_Policy(_weights(arrays, "policy_weights/")))
    cases = [(reward, "bt_model", "bt_model/gram")]
    cases += [(policy, f"cpl_model/alpha=0.1/lambda={lam}", "cpl_model/gram") for lam in ("1", "0.5")]
    for score, key, gram_key in cases:
        if method == "ghost" and score is policy:
            with pytest.raises(ConfigError, match="use method='loop'"):  # log_std is used outside a layer
                pair_geometry(score, None, batch, method=method)
            continue
        gram = gram_matrix(score, None, batch, method=method)
        np.testing.assert_allclose(gram, arrays[gram_key], rtol=1e-9, atol=1e-9)
        geometry = pair_geometry(score, None, batch, method=method)
        coefficients = arrays[f"{key}/d_w"], arrays[f"{key}/d_l"]
        np.testing.assert_array_equal(geometry.regime(*coefficients), arrays[f"{key}/regime"])
        np.testing.assert_allclose(
            torch.stack(geometry.rates(*coefficients), 1), arrays[f"{key}/pred_rate"], rtol=1e-8, atol=1e-9
        )
        direction = _direction(score, _one(batch), (coefficients[0][:1], -coefficients[1][:1]))
        rate = geometry.rates(*coefficients)[0][0]
        _second_order([abs(_after(score, direction, lr, _one(batch))[0, 0] - lr * rate) for lr in (1e-2, 1e-3, 1e-4)])
    name = f"{'bt' if method == 'ghost' else 'cpl'}_model/step_inner_wl_pair1"
    found = token_geometry(reward if method == "ghost" else policy, None, batch, pair=1)
    np.testing.assert_allclose(found, arrays[name], rtol=1e-9, atol=1e-9)


def _one(batch):
    first = batch.select(slice(0, 1))
    return first.chosen, first.rejected


def test_every_loss_gives_a_gradient_made_of_its_coefficients(vectors, logp):
    """End to end: autograd of the loss through the model is `-d_w g_w + d_l g_l`."""
    batch = logp.prepare(
        PairBatch(*({k[:-2]: v for k, v in vectors.batch.items() if k.endswith(e)} for e in ("_w", "_l")))
    )
    keys = ("ref_logps_w", "ref_logps_l", "len_w", "len_l")
    for name in MARGIN_LOSSES:
        leaves = {n: p.detach().requires_grad_() for n, p in logp.params.items()}
        inputs = MarginInputs(
            logp.sums(leaves, batch.chosen),
            logp.sums(leaves, batch.rejected),
            *(vectors.tensor(k) for k in keys),
            context_chosen=vectors.tensor("len_w"),
        )
        found = torch.autograd.grad(margin_loss(name, inputs).sum(), list(leaves.values()), materialize_grads=True)
        d_w, d_l = margin_coefficients(name, inputs)
        ours = _direction(logp, (batch.chosen, batch.rejected), (-d_w, d_l))
        scale = max(g.abs().max() for g in ours.values())
        for g, expected in zip(found, ours.values(), strict=True):
            assert (g - expected).abs().max() <= 1e-9 * scale, name


def test_geometry_accepts_numpy(vectors):
    geometry = GradientGeometry(vectors["inner"], vectors["sqnorm_w"], vectors["sqnorm_l"])
    np.testing.assert_allclose(geometry.cosine, vectors["cosine"], rtol=1e-12)
    assert isinstance(geometry.regime(vectors["loss_d_w"][0], vectors["loss_d_l"][0]), np.ndarray)
    assert isinstance(batch_rates(vectors["gram"], vectors["loss_d_w"][0], vectors["loss_d_l"][0]).chosen, np.ndarray)
