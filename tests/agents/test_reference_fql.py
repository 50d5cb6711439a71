"""FQL equals its authors' update, written out anew in plain torch for one seed: 1, 10 and 50 updates from the same weights, in float64.

The differences that the card names are written here, too (ReLU behind layer norms, Q's loss summed over critics).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlkit2.agents.fql import FQL, FQLConfig
from rlkit2.data import Batch
from rlkit2.errors import ConfigError
from rlkit2.nn.random import normal, uniform
from tests.agents.naive import network, polyak
from tests.agents.problems import random_batch
from tests.agents.test_reference_actor_critics import compare, rows_of

ROWS, OBS, ACT, SEEDS = 16, 5, 3, (4, 11)
CHECKED = (1, 10, 50)


class Twin:
    """One seed: one loss of all parts, one Adam, as the authors have it."""

    def __init__(self, agent: FQL, index: int) -> None:
        self.config, self.seed = agent.config, torch.tensor(SEEDS[index : index + 1])
        state = agent.state_dict()
        self.qs = nn.ModuleList(network(state, "critic", index, i) for i in range(self.config.num_critics))
        self.q_targets = copy.deepcopy(self.qs)
        self.flow = network(state, "flow", index)
        self.mu = network(state, "policy", index)
        groups = [
            {"params": list(self.qs.parameters()), "lr": self.config.critic_learning_rate},
            {"params": list(self.mu.parameters()), "lr": self.config.policy_learning_rate},
            {"params": list(self.flow.parameters()), "lr": self.config.flow_learning_rate},
        ]
        self.adam = torch.optim.Adam(groups, foreach=False)
        self.steps = 0

    def noise(self, stream: str) -> Tensor:
        return normal((1, ROWS, ACT), self.seed, self.steps, stream=stream)[0]

    def q(self, nets: nn.ModuleList, s: Tensor, a: Tensor) -> Tensor:
        return torch.stack([net(torch.cat([s, a], 1)).squeeze(1) for net in nets])

    def losses(self, s: Tensor, a: Tensor, r: Tensor, s2: Tensor, terminated: Tensor) -> dict[str, Tensor]:
        config = self.config
        with torch.no_grad():
            a2 = torch.clip(self.mu(torch.cat([s2, self.noise("next_noise")], 1)), -1.0, 1.0)
            following = self.q(self.q_targets, s2, a2)
            following = following.min(0).values if config.target == "min" else following.mean(0)
            y = r + config.discount * torch.where(terminated, torch.zeros_like(r), following)
        critic = sum(((q - y) ** 2).mean() for q in self.q(self.qs, s, a))

        x0 = self.noise("flow_start")
        t = uniform((1, ROWS, 1), self.seed, self.steps, stream="flow_time")[0]
        predicted = self.flow(torch.cat([s, (1.0 - t) * x0 + t * a, t], 1))
        flow = ((predicted - (a - x0)) ** 2).mean()

        z = self.noise("policy_noise")
        with torch.no_grad():
            x = z
            for k in range(config.flow_steps):
                at = torch.full((ROWS, 1), k / config.flow_steps, dtype=torch.float64)
                x = x + self.flow(torch.cat([s, x, at], 1)) / config.flow_steps
            x = torch.clip(x, -1.0, 1.0)
        acted = self.mu(torch.cat([s, z], 1))
        distillation = ((acted - x) ** 2).mean()
        frozen = copy.deepcopy(self.qs)
        value = self.q(frozen, s, torch.clip(acted, -1.0, 1.0)).mean(0)
        weight = 1.0 / value.abs().mean().detach() if config.normalize_q else torch.ones(())
        policy = config.alpha * distillation - weight * value.mean()
        return {
            "critic/loss": critic,
            "flow/loss": flow,
            "policy/loss": policy,
            "policy/distillation_error": distillation,
        }

    def update(self, *rows: Tensor) -> dict[str, float]:
        losses = self.losses(*rows)
        self.adam.zero_grad()
        total = losses["critic/loss"] + losses["flow/loss"] + losses["policy/loss"]
        total.backward()  # type: ignore[no-untyped-call]
        self.adam.step()
        for target, online in zip(self.q_targets, self.qs, strict=True):
            polyak(target, online, self.config.target_update_rate)
        self.steps += 1
        return {name: loss.item() for name, loss in losses.items()}

    def parts(self) -> dict[str, nn.Module]:
        return {
            "policy": self.mu,
            "flow": self.flow,
            **{f"critic/{i}": net for i, net in enumerate(self.qs)},
            **{f"critic_target/{i}": net for i, net in enumerate(self.q_targets)},
        }


CASES: dict[str, dict[str, Any]] = {
    "published": {},
    "stress": {
        "alpha": 0.5,
        "normalize_q": True,
        "target": "min",
        "flow_steps": 3,
        "num_critics": 3,
        "critic_layer_norm": False,
        "policy_layer_norm": True,
        "critic_learning_rate": 3e-3,
        "policy_learning_rate": 1e-2,
        "flow_learning_rate": 1e-3,
        "target_update_rate": 0.1,
        "discount": 0.9,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_the_reference_learns_the_same(case: str) -> None:
    agent = FQL(FQLConfig(hidden_sizes=(16, 12), **CASES[case]), OBS, ACT, seeds=SEEDS, dtype=torch.float64)
    twins = [Twin(agent, i) for i in range(len(SEEDS))]
    for t in range(1, CHECKED[-1] + 1):
        batch: Batch = random_batch(len(SEEDS), ROWS, OBS, ACT, dtype=torch.float64, generator=t)
        metrics = agent.update(batch)
        for i, twin in enumerate(twins):
            expected = twin.update(*rows_of(batch, i))
            if t in CHECKED:
                for name, value in expected.items():
                    assert metrics[name][i].item() == pytest.approx(value, rel=1e-9, abs=1e-10), f"{name} at {t}"
                compare(agent, twin, i, t)  # type: ignore[arg-type]


def test_defaults_are_the_authors() -> None:
    config = FQLConfig()
    assert (config.alpha, config.flow_steps, config.normalize_q, config.target) == (10.0, 10, False, "mean")
    assert config.hidden_sizes == (512, 512, 512, 512)
    assert (config.critic_layer_norm, config.policy_layer_norm, config.num_critics) == (True, False, 2)


def test_the_flow_clones_both_ways_round_an_obstacle() -> None:
    """Two actions are right and their mean is not: the flow's samples are near the two, hardly ever between."""
    config = FQLConfig(hidden_sizes=(32, 32), flow_learning_rate=5e-3, flow_steps=10)
    agent = FQL(config, 1, 1)
    draw = torch.Generator().manual_seed(0)
    for _ in range(400):
        sides = torch.randint(0, 2, (1, 128, 1), generator=draw) * 1.4 - 0.7
        batch: Batch = random_batch(1, 128, 1, 1, generator=0)
        agent.flow_optimizer.minimize(agent.flow_loss(batch.__class__(**{**vars(batch), "actions": sides})))
        agent.step += 1
    noise = torch.randn(1, 500, 1, generator=draw)
    found = agent.flow_actions(torch.zeros(1, 500, 1), noise).abs()
    assert (found > 0.45).float().mean() > 0.85
    assert (found - 0.7).abs().median() < 0.15


def test_a_policy_of_noise_has_no_density_and_zero_noise_is_its_mode() -> None:
    agent = FQL(FQLConfig(hidden_sizes=(8,)), OBS, ACT)
    seen = torch.randn(1, 4, OBS, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match="has no density"):
        agent.actor.log_prob(seen, torch.zeros(1, 4, ACT))
    assert torch.equal(agent.policy(seen), agent.actor.raw(seen, torch.zeros(1, 4, ACT)).clamp(-1.0, 1.0))
    samples = torch.stack([agent.policy(seen, deterministic=False) for _ in range(3)])
    assert not torch.equal(samples[0], samples[1])
    assert samples.abs().max() <= 1.0
