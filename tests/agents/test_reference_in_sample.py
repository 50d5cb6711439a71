"""SQL and XQL equal their references' updates, written out anew in plain torch for one seed: 1, 10 and 50 updates from the same weights, in float64.

The differences that the cards name are written here, too (both losses at the values before V's step); everything else follows the released code.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlkit2.agents.iql import IQL
from rlkit2.agents.sql import SQL, SQLConfig
from rlkit2.agents.xql import XQL, XQLConfig
from rlkit2.data import Batch
from tests.agents.naive import network, polyak
from tests.agents.problems import random_batch
from tests.agents.test_against_naive import rows_of

ROWS, OBS, ACT, SEEDS = 32, 5, 3, (4, 11)
CHECKED = (1, 10, 50)
RUN = 40  # updates after which the policy's rate is zero
SMALL: dict[str, Any] = {"hidden_sizes": (24, 16)}
STRESS: dict[str, Any] = {
    "hidden_sizes": (16, 16),
    "critic_learning_rate": 3e-3,
    "value_learning_rate": 1e-2,
    "policy_learning_rate": 1e-3,
    "target_update_rate": 0.1,
    "num_critics": 3,
    "discount": 0.9,
}


class Twin:
    """One seed: networks as torch layers, torch's Adam."""

    def __init__(self, agent: Any, index: int) -> None:
        self.config, self.discrete = agent.config, agent.discrete
        state = agent.state_dict()
        self.v = network(state, "value", index)
        self.qs = nn.ModuleList(network(state, "critic", index, i) for i in range(self.config.num_critics))
        self.targets = copy.deepcopy(self.qs)
        self.pi = network(state, "policy", index)
        parameters = list(self.pi.parameters())
        if not self.discrete:
            self.log_std = nn.Parameter(state["policy.log_std"][index, 0].clone())
            parameters.append(self.log_std)
        rates = (self.config.value_learning_rate, self.config.critic_learning_rate, self.config.policy_learning_rate)
        self.adams = [
            torch.optim.Adam(group, lr=rate, foreach=False)
            for group, rate in zip((self.v.parameters(), self.qs.parameters(), parameters), rates, strict=True)
        ]
        self.steps = 0

    def q(self, nets: nn.ModuleList, s: Tensor, a: Tensor) -> Tensor:
        """`[M, B]`."""
        if self.discrete:
            return torch.stack([net(s)[torch.arange(len(a)), a] for net in nets])
        return torch.stack([net(torch.cat([s, a], 1)).squeeze(1) for net in nets])

    def log_prob(self, s: Tensor, a: Tensor) -> Tensor:
        if self.discrete:
            return torch.distributions.Categorical(logits=self.pi(s)).log_prob(a)
        scale = self.log_std.clamp(*self.config.log_std_bounds).exp()
        return torch.distributions.Normal(self.pi(s).tanh(), scale).log_prob(a).sum(1)

    def value_loss(self, q: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def weight(self, advantage: Tensor) -> Tensor:
        raise NotImplementedError

    def critic_loss(self, error: Tensor) -> Tensor:
        return (error**2).mean()

    def update(self, s: Tensor, a: Tensor, r: Tensor, s2: Tensor, terminated: Tensor) -> dict[str, float]:
        with torch.no_grad():
            least = self.q(self.targets, s, a).min(0).values
            y = r + self.config.discount * torch.where(terminated, torch.zeros_like(r), self.v(s2).squeeze(1))
        v = self.v(s).squeeze(1)
        v_loss = self.value_loss(least, v)
        q_loss = torch.stack([self.critic_loss(y - q) for q in self.q(self.qs, s, a)]).sum()
        weight = self.weight((least - v).detach())
        pi_loss = -(weight * self.log_prob(s, a)).mean()
        done = min(self.steps / RUN, 1.0)
        self.adams[2].param_groups[0]["lr"] = self.config.policy_learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))
        for adam, loss in zip(self.adams, (v_loss, q_loss, pi_loss), strict=True):
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
        for target, online in zip(self.targets, self.qs, strict=True):
            polyak(target, online, self.config.target_update_rate)
        self.steps += 1
        return {"value/loss": v_loss.item(), "critic/loss": q_loss.item(), "policy/loss": pi_loss.item()}

    def parts(self) -> dict[str, nn.Module]:
        numbered = {f"critic/{i}": net for i, net in enumerate(self.qs)}
        return {
            "value": self.v,
            "policy": self.pi,
            **numbered,
            **{f"critic_target/{i}": net for i, net in enumerate(self.targets)},
        }


class TwinSQL(Twin):
    """update_v and update_actor of the released code's SQL."""

    def value_loss(self, q: Tensor, v: Tensor) -> Tensor:
        term = (q - v) / self.config.alpha + 0.5
        return (torch.where(term > 0, 1.0, 0.0) * term**2 + v / self.config.alpha).mean()

    def weight(self, advantage: Tensor) -> Tensor:
        return torch.clamp(torch.maximum(advantage, torch.zeros_like(advantage)), 0.0, self.config.weight_clamp)


class TwinXQL(Twin):
    """The rescaled Gumbel loss and the Huber loss of the released code."""

    def value_loss(self, q: Tensor, v: Tensor) -> Tensor:
        z = torch.minimum((q - v) / self.config.temperature, torch.tensor(self.config.exponent_clip, dtype=v.dtype))
        largest = z.max().detach()
        largest = torch.where(largest < -1.0, -torch.ones_like(largest), largest)
        return (torch.exp(z - largest) - z * torch.exp(-largest) - torch.exp(-largest)).mean()

    def critic_loss(self, error: Tensor) -> Tensor:
        return F.huber_loss(error, torch.zeros_like(error), delta=self.config.huber_delta)

    def weight(self, advantage: Tensor) -> Tensor:
        return torch.minimum(
            (advantage * self.config.inverse_temperature).exp(), torch.tensor(self.config.weight_clamp)
        )


def follow(agent: IQL, twin_class: type[Twin], scale: float) -> list[dict[str, float]]:
    """Train an agent beside its twins, compare them; metrics of the last update by seed."""
    agent.follow_schedule("constant", RUN)
    twins = [twin_class(agent, index) for index in range(len(SEEDS))]
    found: list[dict[str, float]] = []
    for step in range(1, max(CHECKED) + 1):
        batch: Batch = random_batch(
            len(SEEDS), ROWS, OBS, ACT, discrete=agent.discrete, dtype=torch.float64, generator=step
        )
        batch.rewards.mul_(scale)
        metrics = agent.update(batch)
        found = [twin.update(*rows_of(batch, index)) for index, twin in enumerate(twins)]
        if step not in CHECKED:
            continue
        state = agent.state_dict()
        for index, twin in enumerate(twins):
            for name, value in found[index].items():
                assert metrics[name][index].item() == pytest.approx(value, rel=1e-9, abs=1e-11), f"{name} at {step}"
            for where, module in twin.parts().items():
                part, _, member = where.partition("/")
                linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
                for k, linear in enumerate(linears):
                    weight = state[f"{part}.layers.{k}.weight"][index]
                    weight = weight[int(member)] if member else weight
                    torch.testing.assert_close(
                        weight, linear.weight.data.T, rtol=1e-10, atol=1e-10, msg=f"{where} {k} at {step}"
                    )
    return found


@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "discrete"])
@pytest.mark.parametrize(("options", "scale"), [(SMALL, 1.0), (STRESS | {"alpha": 0.3, "weight_clamp": 1.5}, 5.0)])
def test_sql(options: dict[str, Any], scale: float, discrete: bool) -> None:
    config = SQLConfig(**options)
    follow(SQL(config, OBS, ACT, seeds=SEEDS, dtype=torch.float64, discrete=discrete), TwinSQL, scale)


@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "discrete"])
@pytest.mark.parametrize(
    ("options", "scale"),
    [(SMALL, 1.0), (STRESS | {"temperature": 0.3, "exponent_clip": 1.5, "huber_delta": 0.5, "weight_clamp": 3.0}, 5.0)],
)
def test_xql(options: dict[str, Any], scale: float, discrete: bool) -> None:
    config = XQLConfig(**options)
    follow(XQL(config, OBS, ACT, seeds=SEEDS, dtype=torch.float64, discrete=discrete), TwinXQL, scale)


def test_the_values_are_the_regularised_ones_of_the_actions_in_the_data() -> None:
    """One state, known Q: SQL's V is the multiplier at which E[max(1 + 2 A / alpha, 0)] = 1, XQL's is beta log E[exp(Q / beta)]."""
    q = torch.tensor([0.0, 1.0, 2.0, 4.0], dtype=torch.float64)
    for agent, known in (
        (SQL(SQLConfig(alpha=3.0), 1, 1), lambda v: float((1.0 + 2.0 * (q - v) / 3.0).clamp(min=0.0).mean()) - 1.0),
        (XQL(XQLConfig(temperature=0.7), 1, 1), lambda v: float(v - 0.7 * torch.exp(q / 0.7).mean().log())),
    ):
        value = torch.zeros(1, 1, dtype=torch.float64)
        for _ in range(4000):
            _, slope = agent.value_term(value.expand(1, 4), q - value)
            value = value - 0.1 * slope.sum()
        assert known(float(value)) == pytest.approx(0.0, abs=1e-6)


def test_options_are_those_of_the_released_code() -> None:
    sql, xql = SQLConfig(), XQLConfig()
    assert (sql.alpha, sql.value_layer_norm, sql.critic_layer_norm, sql.weight_clamp) == (2.0, True, True, 100.0)
    assert (xql.temperature, xql.exponent_clip, xql.huber_delta, xql.inverse_temperature) == (2.0, 7.0, 20.0, 3.0)
    assert (xql.value_layer_norm, xql.critic_layer_norm) == (True, False)
