"""The default O-DICE has no number that depends on the size of rewards, the horizon or the discount: V counts in returns, R in its spread."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlkit2.agents import make_agent, make_config
from rlkit2.agents.odice import ODICE, ODICEConfig
from rlkit2.data import Batch, dataset_from_arrays
from rlkit2.data.batch import LookaheadBatch
from rlkit2.data.returns import discounted_returns, return_statistics
from rlkit2.nn import Normalizer
from rlkit2.training.building import agent_factory
from tests.agents.odice_problem import ACTIONS, OBSERVATIONS, make_batch, perturb

SMALL: dict[str, Any] = {"hidden_sizes": (8, 8)}


def agent(mean: float = 0.0, std: float = 1.0, *, seeds: Any = 1, **fields: Any) -> ODICE:
    """An agent in float64 that knows the statistics of its data's returns."""
    normalizer = Normalizer(
        return_mean=torch.tensor(mean, dtype=torch.float64),
        return_std=torch.tensor(std, dtype=torch.float64),
        seeds=seeds,
        dtype=torch.float64,
    )
    config = make_config("odice", **{**SMALL, **fields})
    return ODICE(config, OBSERVATIONS, ACTIONS, seeds=seeds, dtype=torch.float64, normalizer=normalizer)


@settings(deadline=None, max_examples=15)
@given(
    scale=st.floats(-6.0, 6.0).map(lambda power: 10.0**power),
    mean=st.floats(-3.0, 3.0),
    fields=st.sampled_from(
        [
            {},
            {"divergence": "rkl"},
            {"weight": "conjugate_grad"},
            {"gradient_rule": "semi", "weight_residual": "sampled"},
        ]
    ),
)
def test_the_size_of_rewards_changes_nothing(scale: float, mean: float, fields: dict[str, Any]) -> None:
    plain, scaled = agent(mean, 2.0, **fields), agent(mean * scale, 2.0 * scale, **fields)
    for t in range(4):
        batch = make_batch(seed=t)
        plain.update(batch)
        scaled.update(replace(batch, rewards=batch.rewards * scale))
    observations = make_batch(seed=9).observations
    torch.testing.assert_close(
        scaled.value(observations), plain.value(observations) * scale, rtol=1e-6, atol=1e-9 * scale
    )
    ours, theirs = scaled.state_dict(), plain.state_dict()
    for name in theirs:
        if name.startswith("policy"):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-9)


@settings(deadline=None, max_examples=15)
@given(mean=st.floats(-50.0, 50.0), std=st.floats(1e-3, 1e3), discount=st.floats(0.0, 1.0))
def test_the_units_of_v_divide_every_residual_by_one_number(mean: float, std: float, discount: float) -> None:
    """R = r + gamma (1 - terminated) V(s') - V(s) of raw rewards and values is sd times the R of the networks', terminations included."""
    made = perturb(agent(mean, std, discount=discount, num_values=1, residual_unit="value"))
    batch = make_batch(seed=3)
    made.value_target.load_state_dict(made.value_network.state_dict())
    found = made.terms(batch).residual_forward[:, 0] * std
    alive = 1.0 - batch.terminations.to(torch.float64)
    expected = batch.rewards + discount * alive * made.value(batch.next_observations) - made.value(batch.observations)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * (abs(mean) + std))


def test_the_spread_is_that_of_the_residuals_so_far() -> None:
    made = agent(residual_scale=3.0)
    seen: list[Tensor] = []
    for t in range(5):
        batch = make_batch(seed=t)
        spread = float(made.residual_spread)
        residual = made.terms(batch).residual_forward * spread / 3.0
        seen.append((residual - residual.mean()).abs().mean() * (torch.pi / 2) ** 0.5)
        metrics = made.update(batch)
        assert float(metrics["temperature/residual_scale"]) == pytest.approx(3.0 / spread)
        assert float(made.residual_spread) == pytest.approx(float(torch.stack(seen).mean()))


@pytest.mark.parametrize(("quantile", "floor"), [(0.2, 0.0), (0.6, 0.2), (0.9, 1.0)])
def test_a_share_of_the_batch_gets_the_floor_and_the_mean_weight_is_one(quantile: float, floor: float) -> None:
    made = perturb(agent(seeds=2, weight_quantile=quantile, weight_floor=floor, weight_clamp=None))
    weight = made.terms(make_batch(2, rows=200)).weight
    least = (weight == weight.amin((1, 2), keepdim=True)).double().mean((1, 2))
    torch.testing.assert_close(least, torch.full_like(least, quantile if floor < 1.0 else 1.0), rtol=0.0, atol=0.02)
    torch.testing.assert_close(weight.mean((1, 2)), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(weight.amin((1, 2)), torch.full((2,), floor, dtype=torch.float64))


@settings(deadline=None, max_examples=30)
@given(values=st.lists(st.integers(-2, 2), min_size=1, max_size=12), quantile=st.floats(0.01, 0.99))
def test_equal_residuals_have_equal_weights_and_the_best_are_always_cloned(values: list[int], quantile: float) -> None:
    """Few distinct residuals, as in a table: the weights rise with them, are never all zero and have a mean of one."""
    made = agent(weight_quantile=quantile, weight_floor=0.0, weight_clamp=None)
    residual = torch.tensor(values, dtype=torch.float64).view(1, 1, -1)
    _, weight = made.weights(residual)
    order = residual.flatten().argsort(stable=True)
    assert (weight.flatten()[order].diff() >= 0).all()
    by_value = {value: {float(w) for v, w in zip(values, weight[0, 0], strict=True) if v == value} for value in values}
    assert all(len(found) == 1 for found in by_value.values())
    assert min(by_value[max(values)]) > 0
    assert float(weight.mean()) == pytest.approx(1.0)


@pytest.mark.parametrize(("kind", "safe"), [("expected", True), ("sampled", False)])
def test_luck_is_not_taken_for_skill(kind: str, safe: bool) -> None:
    """A bandit: action 0 pays 1 for certain, action 1 pays 8 once in ten times and else 0; a weight by the sampled R follows the prize."""
    generator = torch.Generator().manual_seed(0)
    rows = 2000
    actions = torch.arange(rows) % 2
    prize = torch.rand(rows, generator=generator) < 0.1
    rewards = torch.where(actions == 0, 1.0, torch.where(prize, 8.0, 0.0))
    rates = {"value_learning_rate": 0.03, "policy_learning_rate": 0.03}
    made = ODICE(
        make_config("odice", **SMALL, **rates, weight_residual=kind, weight_floor=0.0), 1, 2, seeds=1, discrete=True
    )
    for _ in range(200):
        drawn = torch.randint(rows, (1, 128), generator=generator)
        nothing = torch.zeros(1, 128, 1)
        flags = torch.ones(1, 128, dtype=torch.bool)
        batch = {"observations": nothing, "next_observations": nothing, "terminations": flags, "truncations": ~flags}
        made.update(Batch(actions=actions[drawn], rewards=rewards[drawn], **batch))
    probability = made.actor.log_prob(torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.int64)).exp().item()
    assert probability > 0.9 if safe else probability < 0.2


def test_a_fixed_point_in_units_of_returns_is_that_of_the_scaled_problem() -> None:
    """The dual with V in units of (mean, sd) and scale k is the dual in rewards with scale k / sd: the gradients agree parameter by parameter."""
    mean, std, k = 4.0, 2.5, 0.7
    unit = agent(mean, std, residual_unit="value", residual_scale=k, hidden_sizes=(), num_values=1)
    raw = agent(residual_unit="value", value_unit="reward", residual_scale=k / std, hidden_sizes=(), num_values=1)
    state = raw.state_dict()
    theirs = unit.state_dict()
    for name in [name for name in state if name.startswith("value")]:
        state[name] = theirs[name] * std + (mean if name.endswith("bias") else 0.0)
    raw.load_state_dict(state)
    batch = make_batch()
    for ours, other in zip(unit.value_gradients(batch).total, raw.value_gradients(batch).total, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    discount=st.floats(0.0, 1.0),
    seed=st.integers(0, 99),
    lead=st.sampled_from([(), (3,)]),
)
def test_discounted_returns_are_those_of_the_sum(
    lengths: list[int], discount: float, seed: int, lead: tuple[int, ...]
) -> None:
    rewards = torch.randn(*lead, sum(lengths), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    found = discounted_returns(rewards, starts, discount)
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        for row in range(start, end):
            powers = discount ** torch.arange(end - row, dtype=torch.float64)
            torch.testing.assert_close(found[..., row], (powers * rewards[..., row:end]).sum(-1))


def dataset(rewards: Tensor) -> Any:
    n = len(rewards)
    generator = torch.Generator().manual_seed(0)
    observations = torch.randn(n, 3, generator=generator)
    actions = torch.rand(n, 1, generator=generator) * 2 - 1
    ends = torch.arange(n) % 10 == 9
    return dataset_from_arrays(observations, actions, rewards, observations, ends, torch.zeros(n, dtype=torch.bool))


@pytest.mark.parametrize("rewards", [torch.zeros(40), torch.full((40,), 0.1)])
def test_returns_that_are_all_equal_have_a_unit_of_one(rewards: Tensor) -> None:
    assert float(return_statistics(dataset(rewards), 0.0)[1]) == 1.0


def test_the_trainer_measures_the_returns_and_a_state_brings_them() -> None:
    data = dataset(torch.arange(40.0))
    config = make_config("odice", **SMALL)
    described = {
        "agent": "odice",
        "config": asdict(config),
        "spec": data.spec.to_json(),
        "data": {"normalize_observations": False},
        "training": {},
    }
    made = agent_factory(described, data)([0, 1], "cpu")
    mean, std = return_statistics(data, config.discount)
    torch.testing.assert_close(made.normalizer.return_mean, mean.float().expand(2, 1))
    torch.testing.assert_close(made.normalizer.return_std, std.float().expand(2, 1))
    blank = agent_factory(described)([0, 1], "cpu")
    blank.load_state_dict(made.state_dict())
    torch.testing.assert_close(blank.normalizer.return_std, made.normalizer.return_std)
    assert make_agent("odice_released", data.spec).normalizer.return_std is None


def test_a_run_from_before_the_units_keeps_its_meaning() -> None:
    stored = {"lambda_": 0.6, "policy_hidden_sizes": None, "hidden_sizes": None, "weight": "positive_residual"}
    config = ODICEConfig(**ODICEConfig.former(stored))
    assert (config.value_unit, config.residual_unit, config.weight_residual) == ("reward", "value", "sampled")
    assert config.policy_widths == (1024, 1024)
    assert ODICEConfig.former({"value_unit": "return"}) == {"value_unit": "return"}


@pytest.mark.parametrize("rule", ["orthogonal", "semi", "true"])
def test_returns_of_several_steps_count_in_the_spread_of_returns_too(rule: str) -> None:
    """Three steps at a discount of .9 are one at .729, whatever mean and deviation returns have."""
    first, second = (agent(2.0, 3.0, discount=discount, gradient_rule=rule) for discount in (0.9, 0.9**3))
    for step in range(3):
        batch = make_batch(seed=step)
        parts = {part.name: getattr(batch, part.name) for part in fields(batch)}
        steps = torch.full(batch.rewards.shape, 3)
        first.update(LookaheadBatch(**{"rows": steps, **parts, "steps": steps, "discount": 0.9}))
        second.update(batch)
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(tensor, second.state_dict()[name], rtol=1e-9, atol=1e-11, msg=name)
