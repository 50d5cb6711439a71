"""IQL and TD3+BC equal a naive second implementation step by step, in float64, for every seed of a stack."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlkit2.agents.base import Agent
from rlkit2.agents.iql import IQL, IQLConfig
from rlkit2.agents.td3bc import TD3BC, TD3BCConfig
from rlkit2.data import Batch
from rlkit2.nn.random import normal
from tests.agents.naive import NaiveIQL, NaiveTD3BC
from tests.agents.problems import random_batch

STEPS, ROWS, OBS, ACT = 20, 32, 5, 3
SEEDS = [4, 11]
IQL_SETTINGS = {
    "paper": IQLConfig(hidden_sizes=(24, 16)),
    # large temperature and step sizes: the clamp on weights, both branches of the expectile and the schedule's end are met
    "stress": IQLConfig(
        hidden_sizes=(16, 16),
        expectile=0.9,
        inverse_temperature=10.0,
        weight_clamp=5.0,
        critic_learning_rate=3e-3,
        value_learning_rate=1e-2,
        policy_learning_rate=1e-3,
        policy_cosine_steps=15,
        target_update_rate=0.1,
        num_critics=3,
        discount=0.9,
    ),
}
TD3BC_SETTINGS = {
    "paper": TD3BCConfig(hidden_sizes=(24, 16)),
    "stress": TD3BCConfig(
        hidden_sizes=(16, 16),
        alpha=10.0,
        target_noise=0.5,
        target_noise_clip=0.3,
        policy_delay=3,
        critic_learning_rate=3e-3,
        policy_learning_rate=1e-3,
        target_update_rate=0.1,
        num_critics=3,
        discount=0.9,
    ),
}


def follow_iql(agent: IQL, steps: int = STEPS) -> None:
    """Train `agent` and its naive twins on the same batches and compare them."""
    state = agent.state_dict()
    hp = dataclasses.asdict(agent.config)
    if hp["policy_cosine_steps"] == "run":
        hp["policy_cosine_steps"] = 15
        agent.follow_schedule("constant", 15)
    twins = [NaiveIQL(state, i, discrete=agent.discrete, **numbers(hp)) for i in range(len(SEEDS))]

    def step(twin: NaiveIQL, batch: Batch, i: int, t: int) -> dict[str, float]:
        return twin.update(*rows_of(batch, i))

    follow(agent, twins, step, steps)


def follow_td3bc(agent: TD3BC, steps: int = STEPS) -> None:
    hp = dataclasses.asdict(agent.config)
    twins = [NaiveTD3BC(agent.state_dict(), i, **numbers(hp)) for i in range(len(SEEDS))]

    def step(twin: NaiveTD3BC, batch: Batch, i: int, t: int) -> dict[str, float]:
        noise = normal((1, ROWS, ACT), torch.tensor(SEEDS[i : i + 1]), t, stream="target_noise")[0]
        return twin.update(*rows_of(batch, i), noise)

    follow(agent, twins, step, steps)


def numbers(hp: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in hp.items() if isinstance(value, int | float)}


def rows_of(batch: Batch, i: int) -> tuple[Tensor, ...]:
    return (
        batch.observations[i],
        batch.actions[i],
        batch.rewards[i],
        batch.next_observations[i],
        batch.terminations[i],
    )


def follow(agent: Agent, twins: list[Any], step: Any, steps: int) -> None:
    for t in range(steps):
        batch = random_batch(len(SEEDS), ROWS, OBS, ACT, discrete=agent.discrete, dtype=torch.float64, generator=t)
        metrics = agent.update(batch)
        for i, twin in enumerate(twins):
            expected = step(twin, batch, i, t)
            for name, value in expected.items():
                assert metrics[name][i].item() == pytest.approx(value, rel=1e-9, abs=1e-12), f"{name} at {t}"
            missing = {"critic/loss", "policy/loss"} & (metrics.keys() ^ expected.keys())
            assert not missing, f"{missing} at {t}"
    state = agent.state_dict()
    for i, twin in enumerate(twins):
        for where, module in twin.parts().items():
            compare(state, where, module, i)


def compare(state: dict[str, Tensor], where: str, module: nn.Module, seed: int) -> None:
    """Every weight to 1e-9: both sum in float64, in another order, and Adam divides by small numbers."""
    name, _, member = where.partition("/")
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    for k, linear in enumerate(linears):
        weight, bias = (state[f"{name}.layers.{k}.{kind}"][seed] for kind in ("weight", "bias"))
        if member:
            weight, bias = weight[int(member)], bias[int(member)]
        torch.testing.assert_close(weight, linear.weight.data.T, rtol=1e-9, atol=1e-10, msg=f"{where} layer {k}")
        torch.testing.assert_close(bias.flatten(), linear.bias.data, rtol=1e-9, atol=1e-10, msg=f"{where} bias {k}")


@pytest.mark.parametrize("setting", IQL_SETTINGS)
@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "discrete"])
def test_iql(setting: str, discrete: bool) -> None:
    follow_iql(IQL(IQL_SETTINGS[setting], OBS, ACT, seeds=SEEDS, dtype=torch.float64, discrete=discrete))


@pytest.mark.parametrize("setting", TD3BC_SETTINGS)
def test_td3bc(setting: str) -> None:
    follow_td3bc(TD3BC(TD3BC_SETTINGS[setting], OBS, ACT, seeds=SEEDS, dtype=torch.float64))
