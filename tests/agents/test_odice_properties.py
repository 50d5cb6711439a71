"""Identities of O-DICE's gradients, and what its parts must not do."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlkit2.agents import make_config
from rlkit2.agents.odice import ODICE, ODICEConfig
from rlkit2.data.batch import Batch
from rlkit2.errors import ConfigError
from rlkit2.losses.divergences import DIVERGENCES, f_conjugate
from rlkit2.nn import Image, layer_sizes
from tests.agents.odice_problem import make, make_batch, perturb, pick

RULES = ("orthogonal", "semi", "true")


def flat(parts: list[Tensor] | None) -> Tensor:
    assert parts is not None
    return torch.cat([part.flatten(1) for part in parts], 1)


def assert_same_state(one: dict[str, Tensor], two: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# The projection


def test_eta_zero_is_the_semi_rule() -> None:
    orthogonal, semi = (perturb(make(2, gradient_rule=rule, eta=0.0)) for rule in ("orthogonal", "semi"))
    for step in range(5):
        batch = make_batch(2, seed=step)
        metrics = [agent.update(batch) for agent in (orthogonal, semi)]
        torch.testing.assert_close(metrics[0]["value/grad_norm"], metrics[1]["value/grad_norm"], rtol=1e-12, atol=0.0)
    assert_same_state(orthogonal.state_dict(), semi.state_dict(), 1e-12)


@settings(max_examples=20)
@given(st.floats(0.01, 4.0), st.integers(0, 50), st.sampled_from(DIVERGENCES), st.booleans())
def test_projection(eta: float, seed: int, divergence: str, layer_norm: bool) -> None:
    """What is added is orthogonal to the forward gradient, c is proportional to eta, and c is the least-squares coefficient."""
    agents = [
        perturb(make(2, eta=e, divergence=divergence, value_layer_norm=layer_norm), seed=seed) for e in (1.0, eta)
    ]
    batch = make_batch(2, seed=seed)
    unit, scaled = (agent.value_gradients(batch) for agent in agents)
    torch.testing.assert_close(scaled.coefficient, eta * unit.coefficient, rtol=1e-9, atol=1e-12)
    forward, backward = flat(scaled.forward), flat(scaled.backward)
    added = flat(scaled.total) - flat(scaled.value_term) - forward
    cosine = (added * forward).sum(1) / (added.norm(dim=1) * forward.norm(dim=1))
    assert cosine.abs().max() < 1e-9
    torch.testing.assert_close(added + scaled.coefficient[:, None] * forward, backward, rtol=1e-9, atol=1e-12)
    after = agents[1].update(batch)["projection/cosine_after"]
    assert after.abs().max() < 1e-12


def vector(parts: list[Tensor] | None) -> Tensor:
    """As pullbacks order it, `[S, P]`: one head after the other."""
    assert parts is not None
    return torch.cat([part.flatten(2) for part in parts], 2).flatten(1)


def gradients_of_samples(agent: ODICE, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """g_0 of the batch, and g_f, g_b of every transition alone, `[n, S, P]`: one backward pass each, of the whole objective's terms."""
    batch = agent.normalize(batch)
    residuals = agent.residuals(batch)
    rows = residuals.value.shape[2]
    mean_term, at_value, at_next = agent.cotangents(residuals)
    assert at_next is not None
    forward, backward = [], []
    for i in range(rows):
        only = torch.zeros(rows).double()
        only[i] = 1.0
        forward.append(residuals.pullback(torch.cat([at_value * only, torch.zeros_like(at_next)], 2)))
        backward.append(residuals.pullback(torch.cat([torch.zeros_like(at_value), at_next * only], 2)))
    return residuals.pullback(None, slice(0, rows)) * mean_term, torch.stack(forward), torch.stack(backward)


@settings(max_examples=10)
@given(st.floats(0.01, 4.0), st.integers(0, 50), st.sampled_from(DIVERGENCES), st.booleans(), st.sampled_from([1, 2]))
def test_projection_of_every_sample(eta: float, seed: int, divergence: str, layer_norm: bool, heads: int) -> None:
    """One backward pass equals the loop over transitions, each with the projection of its own gradients."""
    made = {"eta": eta, "divergence": divergence, "value_layer_norm": layer_norm, "num_values": heads}
    agent = perturb(make(2, projection="sample", **made), seed=seed)
    batch = make_batch(2, seed=seed)
    g_0, forward, backward = gradients_of_samples(agent, batch)
    square = (forward * forward).sum(-1, keepdim=True)
    count = len(forward)
    c = (forward * backward).sum(-1, keepdim=True) / square.clamp(min=agent.config.projection_guard / count**2)
    expected = g_0 + (forward + backward - c * forward).sum(0)
    found = agent.value_gradients(batch)
    torch.testing.assert_close(vector(found.total), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.coefficient, c.mean((0, 2)), rtol=1e-9, atol=1e-12)
    batchwise = perturb(make(2, **made), seed=seed).value_gradients(batch)
    torch.testing.assert_close(vector(found.forward), vector(batchwise.forward), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(vector(found.backward), vector(batchwise.backward), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(vector(found.total), vector(batchwise.total), rtol=1e-3)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_projection_of_every_layer(layer_norm: bool) -> None:
    """What is added is orthogonal to the forward gradient in every layer of every head."""
    agent = perturb(make(2, projection="layer", eta=1.0, value_layer_norm=layer_norm))
    batch = make_batch(2)
    found = agent.value_gradients(batch)
    added = vector(found.total) - vector(found.value_term) - vector(found.forward)
    sizes = layer_sizes(agent.value_network)
    assert len(sizes) == 2 * (len(agent.config.value_widths) + 1)
    for one, other, whole in zip(
        *(v.split(sizes, 1) for v in (added, vector(found.forward), vector(found.backward))), strict=True
    ):
        assert (torch.linalg.vecdot(one, other).abs() <= 1e-9 * other.norm() * whole.norm()).all()
        parallel = torch.linalg.vecdot(whole, other) / torch.linalg.vecdot(other, other)
        torch.testing.assert_close(one + parallel[:, None] * other, whole, rtol=1e-9, atol=1e-12)
    removed = agent.update(batch)["projection/removed_share"]
    kept = added.square().sum(1) / vector(found.backward).square().sum(1)
    torch.testing.assert_close(removed, 1.0 - kept, rtol=1e-9, atol=1e-12)


def test_projections_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="gradient_rule = 'semi' projects nothing"):
        ODICEConfig(gradient_rule="semi", projection="layer")
    with pytest.raises(ConfigError, match="does not go through an encoder"):
        ODICE(
            ODICEConfig(projection="sample", encoder="nature"), 3072, 2, images=[Image(0, (32, 32, 3))], discrete=True
        )


def test_coadaptation_is_that_of_pairs() -> None:
    """Written out for one transition after the other from the network's own layers."""
    agent, batch = perturb(make(2, value_layer_norm=False)), make_batch(2)
    found, normalized = agent.coadaptation(batch), agent.normalize(batch)
    views = agent.value_network.named_views()

    def phi(x: Tensor, seed: int, head: int) -> Tensor:
        for i in range(len(agent.config.value_widths)):
            x = (x @ views[f"layers.{i}.weight"][seed, head] + views[f"layers.{i}.bias"][seed, head, 0]).relu()
        return x

    rows = batch.rewards.shape[1]
    for seed in range(2):
        cosines: dict[str, list[Tensor]] = {"": [], "_shuffled": []}
        for head in range(2):
            here = [phi(x, seed, head) for x in normalized.observations[seed]]
            there = [phi(x, seed, head) for x in normalized.next_observations[seed]]
            for i in range(rows):
                for name, j in (("", i), ("_shuffled", i - 1)):
                    cosines[name].append(torch.nn.functional.cosine_similarity(here[i], there[j], dim=0, eps=0.0))
        for name, values in cosines.items():
            expected = torch.stack(values).nan_to_num(0.0).mean()
            torch.testing.assert_close(found[f"coadaptation/cosine{name}"][seed], expected, rtol=1e-9, atol=1e-12)


def test_heads_rows_and_seeds_permute() -> None:
    agent, batch = perturb(make(3)), make_batch(3)
    reference = agent.value_gradients(batch)
    order = torch.randperm(batch.rewards.shape[1], generator=torch.Generator().manual_seed(0))
    shuffled = replace(batch, **{key: getattr(batch, key)[:, order] for key in vars(batch)})
    torch.testing.assert_close(
        flat(agent.value_gradients(shuffled).total), flat(reference.total), rtol=1e-12, atol=1e-13
    )

    swapped, state = make(3), agent.state_dict()
    swapped.load_state_dict(
        {
            name: tensor.flip(1) if name.startswith(("value.", "value_target.")) else tensor
            for name, tensor in state.items()
        }
    )
    for part, other in zip(reference.total, swapped.value_gradients(batch).total, strict=True):
        torch.testing.assert_close(part, other.flip(1), rtol=1e-12, atol=1e-13)

    moved = make(3)
    moved.load_state_dict({name: tensor.roll(1, 0) for name, tensor in state.items()})
    rolled = moved.value_gradients(pick(batch, torch.tensor([2, 0, 1])))
    torch.testing.assert_close(flat(rolled.total), flat(reference.total).roll(1, 0), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rule", RULES)
def test_a_seed_is_not_changed_by_another(rule: str) -> None:
    """Seed 7 beside seed 3 equals seed 7 alone; a seed with infinite rewards spoils only itself."""
    both, alone = make([3, 7], gradient_rule=rule), make([7], gradient_rule=rule)
    for step in range(4):
        batch = make_batch(2, seed=step)
        spoilt = replace(batch, rewards=batch.rewards * torch.tensor([[math.inf], [1.0]]).double())
        both.update(spoilt)
        alone.update(pick(batch, slice(1, 2)))
    assert_same_state({n: t[1:] for n, t in both.state_dict().items()}, alone.state_dict(), 1e-12)


# Rewards, terminations, truncations


@pytest.mark.parametrize("rule", RULES)
def test_a_terminated_successor_has_no_influence(rule: str) -> None:
    agent, batch = perturb(make(gradient_rule=rule)), make_batch()
    elsewhere = torch.where(batch.terminations[..., None], 100.0, batch.next_observations)
    one, two = (agent.value_gradients(b) for b in (batch, replace(batch, next_observations=elsewhere)))
    torch.testing.assert_close(flat(one.total), flat(two.total), rtol=0.0, atol=0.0)
    ended = replace(batch, terminations=torch.ones_like(batch.terminations))
    if rule == "orthogonal":
        assert flat(agent.value_gradients(ended).backward).abs().max() == 0.0


@pytest.mark.parametrize("rule", RULES)
def test_the_truncation_flag_alone_changes_nothing(rule: str) -> None:
    one, two, batch = make(gradient_rule=rule), make(gradient_rule=rule), make_batch()
    one.update(batch)
    two.update(replace(batch, truncations=~batch.truncations))
    assert_same_state(one.state_dict(), two.state_dict())


@pytest.mark.parametrize("rule", RULES)
def test_shifting_rewards_and_values_together_changes_nothing(rule: str) -> None:
    """r + k (1 - gamma) with V + k leaves gradients and weights alone where nothing terminates."""
    agent, shifted, k = perturb(make(gradient_rule=rule)), make(gradient_rule=rule), 3.0
    state = agent.state_dict()
    for name in ("value.layers.2.bias", "value_target.layers.2.bias"):
        state[name] = state[name] + k
    shifted.load_state_dict(state)
    batch = make_batch()
    batch = replace(batch, terminations=torch.zeros_like(batch.terminations))
    moved = replace(batch, rewards=batch.rewards + k * (1.0 - agent.config.discount))
    torch.testing.assert_close(
        flat(shifted.value_gradients(moved).total), flat(agent.value_gradients(batch).total), rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(shifted.terms(moved).weight, agent.terms(batch).weight, rtol=1e-10, atol=1e-12)


# Non-interference and descent


def dual_at(agent: ODICE, batch: Any, direction: Tensor, steps: Tensor) -> Tensor:
    """lambda mean f*(R_f) at V - step * direction (target fixed)."""
    start, found = agent.value_network.flat.detach().clone(), []
    with torch.no_grad():
        for step in steps:
            agent.value_network.flat.copy_(start - step * direction)
            residual = agent.terms(batch).residual_forward
            found.append(agent.config.lambda_ * f_conjugate(agent.config.divergence, residual).mean())
        agent.value_network.flat.copy_(start)
    return torch.stack(found)


def slope(steps: Tensor, changes: Tensor) -> float:
    """Exponent of |change| as a power of the step."""
    x, y = steps.log(), changes.abs().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def test_the_projected_gradient_leaves_the_forward_loss_alone_to_first_order() -> None:
    agent, batch = make(divergence="rkl", value_layer_norm=False), make_batch()  # rkl: smooth everywhere
    perturb(agent, 0.1)
    steps = torch.logspace(-2, -4, 5, dtype=torch.float64)
    # the flat parameter's order is head by head, that of `value_gradients` tensor by tensor: take the vectors of the update itself
    residuals = agent.residuals(agent.normalize(batch))
    _, at_value, at_next = agent.cotangents(residuals)
    assert at_next is not None
    rows = at_value.shape[2]
    forward = residuals.pullback(at_value, slice(0, rows))
    backward = residuals.pullback(at_next, slice(rows, 2 * rows))
    total, _ = agent.orthogonal(forward.clone(), backward, torch.zeros_like(forward), 0.0)
    perpendicular = total - forward
    at_zero = dual_at(agent, batch, backward, torch.zeros(1))
    assert slope(steps, dual_at(agent, batch, perpendicular, steps) - at_zero) == pytest.approx(2.0, abs=0.05)
    assert slope(steps, dual_at(agent, batch, backward, steps) - at_zero) == pytest.approx(1.0, abs=0.05)


def test_descent_condition() -> None:
    """With target = online and without the mean term, the orthogonal gradient descends the true objective iff (1 + c)|f|^2 + eta |b_perp|^2 > 0."""
    signs = []
    for seed in range(100):
        fields: dict[str, Any] = {
            "num_values": 1,
            "divergence": "rkl" if seed % 2 else "pearson",
            "value_hidden_sizes": (8,),
        }
        agent = make([seed], **fields)
        state = perturb(agent, 0.5, seed).state_dict()
        state.update({k.replace("value.", "value_target."): t for k, t in state.items() if k.startswith("value.")})
        agent.load_state_dict(state)
        batch = make_batch(seed=seed, rows=6)
        near = replace(batch, next_observations=batch.observations + 0.1 * batch.next_observations)
        near = replace(near, terminations=torch.zeros_like(near.terminations))
        g = agent.value_gradients(near)
        forward, backward = flat(g.forward), flat(g.backward)
        true = make([seed], gradient_rule="true", **fields)
        true.load_state_dict(state)
        t = true.value_gradients(near)
        torch.testing.assert_close(flat(t.forward), forward + backward, rtol=1e-9, atol=1e-12)
        product = (flat(t.forward) * (flat(g.total) - flat(g.value_term))).sum()
        perpendicular = backward - g.coefficient[:, None] * forward
        predicted = (1.0 + g.coefficient) * (forward * forward).sum() + (perpendicular * perpendicular).sum()
        torch.testing.assert_close(product, predicted.squeeze(), rtol=1e-7, atol=1e-12)
        signs.append(float(predicted) > 0.0)
    assert 0 < sum(signs) < 100, "the problems should hold both cases"


# The temperature


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_residual_scale_is_the_inverse_temperature(divergence: str) -> None:
    """Scale b on the residual equals the objective (1/b) f*(b R): same V as rewards x b with V x b."""
    b, batch = 2.5, make_batch()
    one, two = perturb(make(divergence=divergence, residual_scale=b)), make(divergence=divergence)
    state = one.state_dict()
    scaled = {
        name: tensor * b if name.startswith("value") and "layers.2" in name else tensor
        for name, tensor in state.items()
    }
    two.load_state_dict(scaled)  # a linear last layer: V x b
    terms = one.terms(batch), two.terms(replace(batch, rewards=batch.rewards * b))
    torch.testing.assert_close(terms[0].residual_forward, terms[1].residual_forward, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(terms[0].weight, terms[1].weight, rtol=1e-10, atol=1e-12)
    own = one.value_gradients(batch)
    values = one.terms(batch).value
    metrics = one.update(batch)
    expected = 0.6 * f_conjugate(divergence, terms[0].residual_forward).mean((1, 2)) / b
    torch.testing.assert_close(metrics["value/dual_forward"], expected)
    # directional derivative of (1 - lambda) V + lambda f*(b R)/b along the shift of V: -(lambda (f*)' - (1 - lambda)) on the last bias
    bias = own.value_term[-1] + own.forward[-1]
    assert values.shape == terms[0].weight.shape
    conjugate = metrics["weight/conjugate_mean"]
    torch.testing.assert_close(bias.sum((1, 2, 3)), 0.4 - 0.6 * conjugate, rtol=1e-9, atol=1e-12)


def test_adaptive_scale_reaches_its_share_and_stays() -> None:
    """On rewards of spread 1 and a V that cannot follow them, rkl's share exp(-scale^2) settles at the target; per seed, from either side."""
    agent = make(
        2,
        divergence="rkl",
        target_effective_sample_share=0.4,
        residual_scale_rate=0.03,
        value_learning_rate=1e-5,
        discount=0.0,
    )
    agent.residual_scale.copy_(torch.tensor([0.05, 6.0]))
    shares = []
    for step in range(500):
        batch = make_batch(2, seed=step, rows=256)
        metrics = agent.update(batch)
        if step >= 400:
            shares.append(agent.terms(batch).weight_raw)
    scale = metrics["temperature/residual_scale"]
    torch.testing.assert_close(scale, torch.full_like(scale, math.sqrt(-math.log(0.4))), rtol=0.15, atol=0.0)
    weights = torch.stack(shares)
    share = (weights.mean((2, 3)).square() / weights.square().mean((2, 3))).mean(0)
    torch.testing.assert_close(share, torch.full_like(share, 0.4), rtol=0.1, atol=0.0)


@pytest.mark.parametrize("reward", [400.0, -4000.0])
def test_adaptive_scale_survives_overflow_and_underflow(reward: float) -> None:
    """Weights that all overflow or vanish lower the scale instead of making it NaN."""
    agent = make(divergence="rkl", target_effective_sample_share=0.4, dtype=torch.float32, value_learning_rate=0.0)
    batch = make_batch(dtype=torch.float32)
    batch = replace(batch, rewards=batch.rewards * reward)
    for _ in range(3):
        agent.update(batch)
    assert 0.9 < float(agent.residual_scale) < 1.0


# Numbers that must not blow up; metrics; side effects


@pytest.mark.parametrize("rule", RULES)
def test_metrics_are_present_by_rule(rule: str) -> None:
    """Projection keys exist for the orthogonal rule alone; nothing is NaN; every metric is `[S]`."""
    agent = make(3, gradient_rule=rule, residual_clip=5.0)
    metrics = agent.update(make_batch(3))
    projection = {
        "forward_norm", "backward_norm", "dot", "perpendicular_norm", "coefficient", "cosine", "cosine_after",
        "removed_share", "flow_discount", "guard_active",
    }  # fmt: skip
    found = {key.removeprefix("projection/") for key in metrics if key.startswith("projection/")}
    assert found == (projection if rule == "orthogonal" else set())
    assert ("value/dual_backward" in metrics) == (rule == "orthogonal")
    for name in (
        "value/grad_norm", "value/dual_forward", "value/mean_term", "value/mean", "value/min", "value/max", "value/head_gap",
        "value/bound_min", "value/bound_max", "residual/mean", "residual/min", "residual/max", "residual/clip_share",
        "weight/mean", "weight/max", "weight/zero_share", "weight/clamp_share", "weight/effective_sample_share",
        "weight/conjugate_mean", "policy/loss", "policy/grad_norm",
    ):  # fmt: skip
        assert name in metrics
    for name, value in metrics.items():
        assert value.shape == (3,), name
        assert torch.isfinite(value.double()).all(), name
        assert not value.requires_grad, name


def test_metrics_say_what_the_terms_say() -> None:
    agent, batch = perturb(make(2, weight_clamp=0.5)), make_batch(2)
    terms = agent.terms(batch)
    metrics = agent.update(batch)
    weight, value = terms.weight, terms.value
    expected = {
        "weight/mean": weight.mean((1, 2)),
        "weight/max": weight.amax((1, 2)),
        "weight/zero_share": (weight == 0).double().mean((1, 2)),
        "weight/clamp_share": (weight == 0.5).double().mean((1, 2)),
        "weight/effective_sample_share": weight.sum((1, 2)).square() / (48 * weight.square().sum((1, 2))),
        "weight/conjugate_mean": (terms.residual_forward / 2 + 1).clamp(min=0).mean((1, 2)),
        "value/min": value.amin((1, 2)),
        "value/max": value.amax((1, 2)),
        "value/head_gap": (value[:, 0] - value[:, 1]).abs().mean(1),
        "residual/min": terms.residual_forward.amin((1, 2)),
        "residual/max": terms.residual_forward.amax((1, 2)),
        "value/bound_max": batch.rewards.amax(1) / (1 - 0.99),
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(metrics[name], tensor, msg=lambda m, n=name: f"{n}: {m}")
    assert 0.0 < float(metrics["weight/zero_share"][0]) < 1.0
    assert 0.0 < float(metrics["weight/clamp_share"][0]) < 1.0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("discrete", [False, True])
def test_looking_changes_nothing(rule: str, discrete: bool) -> None:
    agent = make(2, gradient_rule=rule, discrete=discrete)
    batch = make_batch(2, discrete=discrete)
    agent.update(batch)
    before = agent.state_dict()
    agent.terms(batch)
    agent.value_gradients(batch)
    agent.coadaptation(batch)
    agent.value(batch.observations)
    assert_same_state(agent.state_dict(), before)


@pytest.mark.parametrize("head", ["gaussian", "squashed_gaussian", "deterministic", "categorical"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_head_and_divergence_learns_finitely(head: str, divergence: str) -> None:
    discrete = head == "categorical"
    agent = make(2, divergence=divergence, policy_head=head, discrete=discrete, dtype=torch.float32)
    batch = make_batch(2, dtype=torch.float32, discrete=discrete)
    for _ in range(100):
        metrics = agent.update(batch)
    assert all(torch.isfinite(value.double()).all() for value in metrics.values())
    with torch.no_grad():
        final = agent.actor.log_prob(batch.observations, batch.actions)
        first = make(2, divergence=divergence, policy_head=head, discrete=discrete, dtype=torch.float32)
        weight = agent.terms(batch).weight.mean(1)
        assert ((final - first.actor.log_prob(batch.observations, batch.actions)) * weight).sum() > 0.0


def test_gradient_clip_and_weight_normalisation() -> None:
    batch = make_batch(2)
    clipped, free = make(2, max_gradient_norm=1e-3), make(2)
    for agent in (clipped, free):
        agent.update(batch)
    moments = [agent.state_dict()["optimizer.value.flat.exp_avg"].flatten(1).norm(dim=1) for agent in (clipped, free)]
    torch.testing.assert_close(moments[0], torch.full_like(moments[0], 1e-4), rtol=1e-6, atol=0.0)
    assert (moments[1] > moments[0]).all()
    normalized = perturb(make(2, weight_normalization="mean", weight_clamp=None))
    torch.testing.assert_close(normalized.terms(batch).weight.mean((1, 2)), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gradient_rule": "full"}, "orthogonal, semi, true"),
        ({"divergence": "kl"}, "divergence must be one of pearson, rkl"),
        ({"lambda_": 1.0}, "lambda_"),
        ({"eta": -1.0}, "eta"),
        ({"num_values": 0}, "num_values"),
        ({"weight": "advantage"}, "positive_residual, conjugate_grad"),
        ({"residual_scale": 0.0}, "residual_scale"),
        ({"target_effective_sample_share": 0.3}, "conjugate_grad"),
        ({"target_effective_sample_share": 1.0, "divergence": "rkl"}, r"must be a number in \(0, 1\) or none"),
    ],
)
def test_impossible_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config("odice_released", **fields)


def test_presets() -> None:
    assert make_config("odice") == ODICEConfig()
    assert make_config("sdice").gradient_rule == "semi"
    assert make_config("vdice").gradient_rule == "true"


@pytest.mark.parametrize(
    ("name", "fields", "metrics"),
    [
        ("zero_weights", {}, {"weight/zero_share": 0.96}),
        ("clamped_weights", {}, {"weight/clamp_share": 0.6}),
        ("true_offset", {"gradient_rule": "true"}, {}),
        ("overflow", {"divergence": "rkl"}, {"residual/max": 81.0}),
        ("projection", {}, {"projection/coefficient": -3.0}),
    ],
)
def test_warnings(name: str, fields: dict[str, Any], metrics: dict[str, float]) -> None:
    found = ODICE.warnings(make_config("odice_released", **fields), metrics)
    assert list(found) == [name]
    calm = {"weight/zero_share": 0.5, "weight/clamp_share": 0.1, "residual/max": 5.0, "projection/coefficient": -1.0}
    quiet = {"lambda_": 1 / (2 - 0.99)} if name == "true_offset" else {}
    assert ODICE.warnings(make_config("odice_released", **{**fields, **quiet}), calm) == {}
