"""AWAC, CRR and ReBRAC equal their references, written out anew in plain torch for one seed: 1, 10 and 50 updates in float64.

The differences that the cards name are written here, too; everything else follows the reference.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlkit2.agents.awac import AWAC, AWACConfig
from rlkit2.agents.base import Agent
from rlkit2.agents.crr import CRR, CRRConfig
from rlkit2.agents.rebrac import ReBRAC, ReBRACConfig
from rlkit2.data import Batch
from rlkit2.data.batch import LookaheadBatch
from rlkit2.nn.random import normal
from tests.agents.naive import network, polyak
from tests.agents.problems import random_batch

ROWS, OBS, ACT, SEEDS = 32, 5, 3, (4, 11)
CHECKED = (1, 10, 50)


class Twin:
    """One seed: networks as torch layers, torch's Adam, and the noise of the agent's own streams."""

    def __init__(self, agent: Any, index: int) -> None:
        self.config, self.seed, self.discrete = agent.config, torch.tensor(SEEDS[index : index + 1]), agent.discrete
        state = agent.state_dict()
        members = range(self.config.num_critics)
        self.qs = nn.ModuleList(network(state, "critic", index, i) for i in members)
        self.q_targets = copy.deepcopy(self.qs)
        self.pi = network(state, "policy", index)
        parameters = list(self.pi.parameters())
        if "policy.log_std" in state:
            self.log_std = nn.Parameter(state["policy.log_std"][index, 0].clone())
            parameters.append(self.log_std)
        self.q_adam = torch.optim.Adam(self.qs.parameters(), lr=self.config.critic_learning_rate, foreach=False)
        decay = getattr(self.config, "policy_weight_decay", 0.0)
        self.pi_adam = torch.optim.Adam(
            parameters, lr=self.config.policy_learning_rate, weight_decay=decay, foreach=False
        )
        self.steps = 0

    def noise(self, rows: int, stream: str) -> Tensor:
        return normal((1, rows, ACT), self.seed, self.steps, stream=stream)[0]

    def q(self, nets: nn.ModuleList, s: Tensor, a: Tensor) -> Tensor:
        """`[M, B]`."""
        if self.discrete:
            return torch.stack([net(s)[torch.arange(len(a)), a] for net in nets])
        return torch.stack([net(torch.cat([s, a], 1)).squeeze(1) for net in nets])

    def distribution(self, s: Tensor) -> torch.distributions.Distribution:
        if self.discrete:
            return torch.distributions.Categorical(logits=self.pi(s))
        scale = self.log_std.clamp(*self.config.log_std_bounds).exp()
        return torch.distributions.Independent(torch.distributions.Normal(self.pi(s).tanh(), scale), 1)

    def act(self, s: Tensor, noise: Tensor) -> Tensor:
        found: Any = self.distribution(s)
        acted: Tensor = (found.base_dist.loc + found.base_dist.scale * noise).clamp(-1.0, 1.0)
        return acted

    def descend(self, adam: torch.optim.Optimizer, loss: Tensor) -> None:
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()

    def parts(self) -> dict[str, nn.Module]:
        return {
            "policy": self.pi,
            **{f"critic/{i}": net for i, net in enumerate(self.qs)},
            **{f"critic_target/{i}": net for i, net in enumerate(self.q_targets)},
        }


class NaiveAWAC(Twin):
    """Nair et al. (2020); the order of steps of CORL, the weights of either code."""

    def value(self, nets: nn.ModuleList, s: Tensor, stream: str) -> Tensor:
        if self.discrete:
            total = torch.zeros(len(s), dtype=s.dtype)
            for action in range(ACT):
                chosen = torch.full((len(s),), action)
                total += self.distribution(s).log_prob(chosen).exp() * self.q(nets, s, chosen).min(0).values
            return total
        return self.q(nets, s, self.act(s, self.noise(len(s), stream))).min(0).values

    def update(self, s: Tensor, a: Tensor, r: Tensor, s2: Tensor, terminated: Tensor) -> dict[str, float]:
        config = self.config
        with torch.no_grad():
            y = r + config.discount * (1.0 - terminated.double()) * self.value(self.q_targets, s2, "next_action")
        q_loss = sum((row - y).square().mean() for row in self.q(self.qs, s, a))
        self.descend(self.q_adam, q_loss)
        with torch.no_grad():
            score = self.q(self.qs, s, a).min(0).values - self.value(self.qs, s, "action")
            if config.weight_normalization == "mean":
                weight = torch.exp(score / config.temperature)
                weight = weight / weight.mean()
            else:
                weight = torch.exp(score / config.temperature).clamp(max=config.weight_clamp)
        pi_loss = -(weight * self.distribution(s).log_prob(a)).mean()
        self.descend(self.pi_adam, pi_loss)
        for target, online in zip(self.q_targets, self.qs, strict=True):
            polyak(target, online, config.target_update_rate)
        self.steps += 1
        return {
            "critic/loss": q_loss.item(),
            "policy/loss": pi_loss.item(),
            "advantage/mean": score.mean().item(),
            "weight/mean": weight.mean().item(),
            "weight/max": weight.max().item(),
        }


class NaiveCRR(Twin):
    """Wang et al. (2020); d3rlpy's order of steps, with soft targets."""

    def __init__(self, agent: Any, index: int) -> None:
        super().__init__(agent, index)
        self.pi_target, self.log_std_target = copy.deepcopy(self.pi), self.log_std.detach().clone()

    def next_action(self, s: Tensor) -> Tensor:
        scale = self.log_std_target.clamp(*self.config.log_std_bounds).exp()
        return (self.pi_target(s).tanh() + scale * self.noise(len(s), "next_action")).clamp(-1.0, 1.0)

    def update(self, s: Tensor, a: Tensor, r: Tensor, s2: Tensor, terminated: Tensor) -> dict[str, float]:
        config = self.config
        with torch.no_grad():
            after = self.q(self.q_targets, s2, self.next_action(s2)).min(0).values
            y = r + config.discount * (1.0 - terminated.double()) * after
        q_loss = sum((row - y).square().mean() for row in self.q(self.qs, s, a))
        self.descend(self.q_adam, q_loss)
        with torch.no_grad():
            noises = self.noise(config.num_samples * len(s), "action").split(len(s))
            values = torch.stack([self.q(self.qs, s, self.act(s, noise)).min(0).values for noise in noises])
            baseline = values.max(0).values if config.advantage == "max" else values.mean(0)
            score = self.q(self.qs, s, a).min(0).values - baseline
            weight = torch.exp(score / config.temperature).clamp(max=config.weight_clamp)
            if config.weight == "binary":
                weight = torch.where(score > 0.0, 1.0, 0.0).double()
        pi_loss = -(weight * self.distribution(s).log_prob(a)).mean()
        self.descend(self.pi_adam, pi_loss)
        for target, online in [*zip(self.q_targets, self.qs, strict=True), (self.pi_target, self.pi)]:
            polyak(target, online, config.target_update_rate)
        rate = config.target_update_rate
        self.log_std_target = (1.0 - rate) * self.log_std_target + rate * self.log_std.detach()
        self.steps += 1
        return {
            "critic/loss": q_loss.item(),
            "policy/loss": pi_loss.item(),
            "advantage/mean": score.mean().item(),
            "weight/mean": weight.mean().item(),
        }

    def parts(self) -> dict[str, nn.Module]:
        return {**super().parts(), "policy_target": self.pi_target}


class NaiveReBRAC(Twin):
    """Tarasov et al. (2023); the authors' losses in TD3's order of steps."""

    def __init__(self, agent: Any, index: int) -> None:
        super().__init__(agent, index)
        self.pi_target = copy.deepcopy(self.pi)

    def update(
        self, s: Tensor, a: Tensor, r: Tensor, s2: Tensor, terminated: Tensor, a2: Tensor, followed: Tensor
    ) -> dict[str, float]:
        config = self.config
        with torch.no_grad():
            limit = config.target_noise_clip
            noise = (self.noise(len(s), "target_noise") * config.target_noise).clamp(-limit, limit)
            acted = (self.pi_target(s2).tanh() + noise).clamp(-1.0, 1.0)
            penalty = torch.zeros_like(r)
            for row in range(len(r)):
                if followed[row]:
                    penalty[row] = config.critic_penalty * ((acted[row] - a2[row]) ** 2).sum()
            after = self.q(self.q_targets, s2, acted).min(0).values - penalty
            y = r + config.discount * (1.0 - terminated.double()) * after
        q_loss = sum((row - y).square().mean() for row in self.q(self.qs, s, a))
        self.descend(self.q_adam, q_loss)
        self.steps += 1
        metrics = {"critic/loss": q_loss.item(), "critic/penalty": penalty.mean().item()}
        if self.steps % config.policy_delay:
            return metrics
        chosen = self.pi(s).tanh()
        values = self.q(self.qs, s, chosen).min(0).values
        scale = 1.0 / values.abs().mean().detach()
        pi_loss = (config.policy_penalty * ((chosen - a) ** 2).sum(1) - scale * values).mean()
        self.descend(self.pi_adam, pi_loss)
        for target, online in [*zip(self.q_targets, self.qs, strict=True), (self.pi_target, self.pi)]:
            polyak(target, online, config.target_update_rate)
        return {**metrics, "policy/loss": pi_loss.item(), "policy/lambda": scale.item()}

    def parts(self) -> dict[str, nn.Module]:
        return {**super().parts(), "policy_target": self.pi_target}


STRESS = {"critic_learning_rate": 3e-3, "policy_learning_rate": 1e-3, "target_update_rate": 0.1, "discount": 0.9}
SMALL = {"hidden_sizes": (16, 12)}
CASES: dict[str, tuple[Any, Any, Any, bool]] = {
    "awac": (AWAC, AWACConfig(**SMALL), NaiveAWAC, False),
    "awac, one choice": (AWAC, AWACConfig(**SMALL, temperature=0.5), NaiveAWAC, True),
    "awac, CORL": (
        AWAC,
        AWACConfig(
            **SMALL, **STRESS, weight_normalization="none", weight_clamp=1.2, policy_weight_decay=0.0, num_critics=3
        ),
        NaiveAWAC,
        False,
    ),
    "crr": (CRR, CRRConfig(**SMALL), NaiveCRR, False),
    "crr, binary": (
        CRR,
        CRRConfig(**SMALL, **STRESS, weight="binary", advantage="max", num_critics=2, num_samples=3),
        NaiveCRR,
        False,
    ),
    "rebrac": (ReBRAC, ReBRACConfig(**SMALL), NaiveReBRAC, False),
    "rebrac, strong penalties": (
        ReBRAC,
        ReBRACConfig(
            **SMALL,
            **STRESS,
            policy_penalty=0.5,
            critic_penalty=0.7,
            policy_layer_norm=True,
            policy_delay=1,
            num_critics=3,
        ),
        NaiveReBRAC,
        False,
    ),
    "rebrac, no norms": (
        ReBRAC,
        ReBRACConfig(
            **SMALL, **STRESS, critic_layer_norm=False, policy_delay=5, target_noise=0.6, target_noise_clip=0.4
        ),
        NaiveReBRAC,
        False,
    ),
}


def rows_of(batch: Batch, i: int) -> tuple[Tensor, ...]:
    names = ("observations", "actions", "rewards", "next_observations", "terminations")
    if isinstance(batch, LookaheadBatch):
        names = (*names, "next_actions", "followed")
    return tuple(getattr(batch, name)[i] for name in names)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_learns_the_same(case: str) -> None:
    make, config, naive, discrete = CASES[case]
    agent = make(config, OBS, ACT, seeds=SEEDS, dtype=torch.float64, discrete=discrete)
    twins = [naive(agent, i) for i in range(len(SEEDS))]
    for t in range(1, CHECKED[-1] + 1):
        ahead = agent.needs_next_actions
        batch = random_batch(
            len(SEEDS), ROWS, OBS, ACT, discrete=discrete, dtype=torch.float64, generator=t, next_actions=ahead
        )
        if (
            not discrete
        ):  # off the bounds, where a sample may be the data's action: whose Q is larger is then up to rounding
            batch = dataclasses.replace(batch, actions=0.99 * batch.actions)
        metrics = agent.update(batch)
        for i, twin in enumerate(twins):
            expected = twin.update(*rows_of(batch, i))
            if t in CHECKED:
                for name, value in expected.items():
                    assert metrics[name][i].item() == pytest.approx(value, rel=1e-10, abs=1e-10), f"{name} at {t}"
                compare(agent, twin, i, t)


def compare(agent: Agent, twin: Twin, seed: int, t: int) -> None:
    state = agent.state_dict()
    for where, module in twin.parts().items():
        name, _, member = where.partition("/")
        for kind, layers in (("layers", nn.Linear), ("norms", nn.LayerNorm)):
            for k, layer in enumerate(part for part in module.modules() if isinstance(part, layers)):
                for what in ("weight", "bias"):
                    found = state[f"{name}.{kind}.{k}.{what}"][seed]
                    found = found[int(member)] if member else found
                    expected = getattr(layer, what).data
                    expected = expected.T if expected.ndim == 2 else expected.unsqueeze(0)
                    torch.testing.assert_close(
                        found, expected, rtol=1e-10, atol=1e-10, msg=f"{where} {kind} {k} at {t}"
                    )


def test_a_difference_is_noticed() -> None:
    """The comparison can fail: another temperature in the twin alone."""
    agent = AWAC(AWACConfig(**SMALL), OBS, ACT, seeds=SEEDS, dtype=torch.float64)
    twin = NaiveAWAC(agent, 0)
    twin.config = dataclasses.replace(agent.config, temperature=1.01)
    batch = random_batch(len(SEEDS), ROWS, OBS, ACT, dtype=torch.float64)
    agent.update(batch)
    twin.update(*rows_of(batch, 0))
    with pytest.raises(AssertionError, match="policy layers 0 at 1"):
        compare(agent, twin, 0, 1)
