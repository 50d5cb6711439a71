"""A new agent is one short file: `tests/agents/awac.py`, held to what every agent must do, and to learning."""

from __future__ import annotations

from pathlib import Path

import torch

from rlkit2.data import Batch
from tests.agents import awac
from tests.agents.problems import random_batch, small_config


def make(seeds: int = 2, **options: float) -> awac.AWAC:
    return awac.AWAC(small_config(awac.AWACConfig, awac.AWACConfig, **options), 4, 2, seeds=seeds, dtype=torch.float64)


def test_it_is_short() -> None:
    assert Path(awac.__file__).read_text().count("\n") <= 120


def test_it_resumes_bit_for_bit() -> None:
    data = [random_batch(2, 24, 4, 2, dtype=torch.float64, generator=t) for t in range(8)]
    whole, resumed = make(), make()
    for batch in data[:4]:
        whole.update(batch)
    resumed.load_state_dict(whole.state_dict())
    for batch in data[4:]:
        assert all(
            torch.equal(a, b) for a, b in zip(whole.update(batch).values(), resumed.update(batch).values(), strict=True)
        )


def test_it_finds_the_rewarded_action() -> None:
    """One-step episodes: reward 1 for actions near (0.5, -0.5) among random ones."""
    agent = make(1, temperature=0.5, policy_learning_rate=3e-3, critic_learning_rate=1e-3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(400):
        states = torch.randn(1, 256, 4, generator=draw, dtype=torch.float64)
        actions = torch.rand(1, 256, 2, generator=draw, dtype=torch.float64) * 2 - 1
        distance = (actions - torch.tensor([0.5, -0.5], dtype=torch.float64)).square().sum(-1)
        rewards, ends = 10.0 * torch.exp(-4.0 * distance), torch.ones(1, 256, dtype=torch.bool)
        batch = Batch(
            observations=states,
            actions=actions,
            rewards=rewards,
            next_observations=states,
            terminations=ends,
            truncations=~ends,
        )
        agent.update(batch)
    found = agent.policy(torch.randn(64, 4, generator=draw, dtype=torch.float64)).mean(0)
    torch.testing.assert_close(found, torch.tensor([0.5, -0.5], dtype=found.dtype), atol=0.2, rtol=0.0)
