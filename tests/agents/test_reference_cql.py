"""CQL for continuous actions equals CORL's update, written out anew in plain torch for one seed: 1, 10 and 50 updates, in float64.

The differences that the card names are written here, too: the network puts out the log standard deviation itself, and a terminated step's next
observation is not looked at. And the name `cql` stands for two
algorithms, of which the actions choose one.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

import rlkit2
from rlkit2.agents import agent_class, agent_classes, agent_kinds, class_name, make_agent, make_config, read_config
from rlkit2.agents.cql import CQL, CQLConfig
from rlkit2.agents.cql_continuous import ContinuousCQL, ContinuousCQLConfig
from rlkit2.cli.main import main
from rlkit2.data import Batch, DatasetSpec
from rlkit2.errors import ConfigError
from rlkit2.nn.random import normal, uniform
from rlkit2.training import Run
from tests.agents.naive import network, polyak
from tests.agents.problems import random_batch
from tests.agents.test_reference_actor_critics import compare, rows_of
from tests.training.tiny_problem import tiny_dataset

ROWS, OBS, ACT, SEEDS = 16, 5, 3, (4, 11)
CHECKED = (1, 10, 50)


class Twin:
    """One seed, as CORL has it: losses of all parts at the values before their steps."""

    def __init__(self, agent: ContinuousCQL, index: int) -> None:
        self.config, self.seed = agent.config, torch.tensor(SEEDS[index : index + 1])
        state = agent.state_dict()
        self.qs = nn.ModuleList(network(state, "critic", index, i) for i in range(self.config.num_critics))
        self.q_targets = copy.deepcopy(self.qs)
        self.pi = network(state, "policy", index)
        self.log_tau = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.log_multiplier = nn.Parameter(torch.ones(1, dtype=torch.float64))
        config = self.config
        groups = [
            (self.qs.parameters(), config.critic_learning_rate),
            (self.pi.parameters(), config.policy_learning_rate),
            ([self.log_tau], config.temperature_learning_rate),
            ([self.log_multiplier], config.critic_learning_rate),
        ]
        self.q_adam, self.pi_adam, self.tau_adam, self.multiplier_adam = (
            torch.optim.Adam(group, lr=rate, foreach=False) for group, rate in groups
        )
        self.steps = 0

    def noise(self, count: int, stream: str) -> Tensor:
        """`[count, B, act]`."""
        shape = (1, count * ROWS, ACT)
        return normal(shape, self.seed, self.steps, stream=stream)[0].view(count, ROWS, ACT)

    def act(self, s: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions `[count, B, act]` and their log-densities."""
        mean, log_std = self.pi(s).chunk(2, -1)
        std = log_std.clamp(*self.config.log_std_bounds).exp()
        squashed = TransformedDistribution(Normal(mean, std), TanhTransform(cache_size=1))
        before = mean + std * noise
        action = before.tanh()
        # by the distribution of what was squashed: the inverse of tanh loses digits near the bounds
        log_slope = TanhTransform().log_abs_det_jacobian(before, action)
        assert isinstance(squashed.base_dist, Normal)
        return action, Independent(squashed.base_dist, 1).log_prob(before) - log_slope.sum(-1)

    def q(self, nets: nn.ModuleList, s: Tensor, a: Tensor) -> list[Tensor]:
        """Every critic at actions `[..., B, act]`."""
        return [net(torch.cat([s.expand(*a.shape[:-1], OBS), a], -1)).squeeze(-1) for net in nets]

    def update(self, s: Tensor, a: Tensor, r: Tensor, s2: Tensor, terminated: Tensor) -> dict[str, float]:
        config, count = self.config, self.config.num_samples
        tau = self.log_tau.exp().detach()
        action, log_pi = (part[0] for part in self.act(s, self.noise(1, "action")))
        pi_loss = (tau * log_pi - torch.stack(self.q(self.qs, s, action)).min(0).values).mean()
        tau_loss = -(self.log_tau * (log_pi.detach() - ACT)).mean()

        with torch.no_grad():
            next_action, next_log_pi = (part[0] for part in self.act(s2, self.noise(1, "next_action")))
            following = torch.stack(self.q(self.q_targets, s2, next_action)).min(0).values
            if config.entropy_backup:
                following = following - tau * next_log_pi
            y = r + config.discount * torch.where(terminated, torch.zeros_like(r), following)
            drawn = uniform((1, count, ROWS, ACT), self.seed, self.steps, stream="uniform_action")[0]
            here, here_log = self.act(s, self.noise(count, "sampled"))
            there, there_log = self.act(torch.where(terminated[:, None], s, s2), self.noise(count, "sampled_next"))
        td_loss, gaps = torch.zeros((), dtype=torch.float64), []
        for net in self.qs:
            single = nn.ModuleList([net])
            (of_data,) = self.q(single, s, a)
            td_loss = td_loss + ((of_data - y) ** 2).mean()
            (at_random,), (at_here,), (at_there,) = (
                self.q(single, s, actions) for actions in (2.0 * drawn - 1.0, here, there)
            )
            if config.importance_sampling:
                density = math.log(0.5**ACT)
                columns = [at_random - density, at_there - there_log, at_here - here_log]
            else:
                columns = [at_random, of_data.unsqueeze(0), at_there, at_here]
            stacked = torch.cat(columns, 0)
            soft = torch.logsumexp(stacked / config.softmax_temperature, 0) * config.softmax_temperature
            gaps.append((soft - of_data).mean())
        conservative = torch.stack(gaps).sum()
        q_loss = td_loss + config.alpha * conservative
        if config.gap is not None:
            multiplier = self.log_multiplier.exp().clamp(0.0, 1e6)
            held = [multiplier * config.alpha * (gap - config.gap) for gap in gaps]
            multiplier_loss = -0.5 * sum(part.detach() / multiplier.detach() * multiplier for part in held)
            q_loss = td_loss + sum(config.alpha * multiplier.detach() * (gap - config.gap) for gap in gaps)
        losses = [(self.tau_adam, tau_loss), (self.pi_adam, pi_loss), (self.q_adam, q_loss)]
        gradients = [
            torch.autograd.grad(loss.sum(), adam.param_groups[0]["params"], retain_graph=True) for adam, loss in losses
        ]
        if config.gap is not None:
            losses.append((self.multiplier_adam, multiplier_loss))
            gradients.append(torch.autograd.grad(multiplier_loss.sum(), [self.log_multiplier]))
        for (adam, _), gradient in zip(losses, gradients, strict=True):
            for parameter, part in zip(adam.param_groups[0]["params"], gradient, strict=True):
                parameter.grad = part
            adam.step()
        for target, online in zip(self.q_targets, self.qs, strict=True):
            polyak(target, online, config.target_update_rate)
        self.steps += 1
        return {
            "policy/loss": pi_loss.item(),
            "policy/temperature": tau.item(),
            "critic/loss": td_loss.item(),
            "critic/conservative": conservative.item(),
        }

    def parts(self) -> dict[str, nn.Module]:
        return {
            "policy": self.pi,
            **{f"critic/{i}": net for i, net in enumerate(self.qs)},
            **{f"critic_target/{i}": net for i, net in enumerate(self.q_targets)},
        }


SMALL: dict[str, Any] = {"hidden_sizes": (16, 12), "num_samples": 3}
QUICK = {"critic_learning_rate": 3e-3, "policy_learning_rate": 1e-3, "temperature_learning_rate": 1e-2, "discount": 0.9}
CASES: dict[str, dict[str, Any]] = {
    "CORL": {},
    "lagrange": {**QUICK, "gap": 1.0, "alpha": 2.0, "target_update_rate": 0.1},
    "plain softmax": {**QUICK, "importance_sampling": False, "softmax_temperature": 0.7, "entropy_backup": True},
}


@pytest.mark.parametrize("case", CASES)
def test_the_reference_learns_the_same(case: str) -> None:
    agent = ContinuousCQL(ContinuousCQLConfig(**SMALL, **CASES[case]), OBS, ACT, seeds=SEEDS, dtype=torch.float64)
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
                if "multiplier" in agent._optimizers:
                    held = agent.state_dict()["multiplier.log_value"][i]
                    torch.testing.assert_close(held, twin.log_multiplier.data, rtol=1e-10, atol=1e-10)


def test_defaults_are_those_of_corl() -> None:
    config = ContinuousCQLConfig()
    assert (config.alpha, config.num_samples, config.softmax_temperature, config.gap) == (10.0, 10, 1.0, None)
    assert (config.critic_learning_rate, config.policy_learning_rate, config.target_update_rate) == (3e-4, 3e-5, 0.005)
    assert (config.num_critics, config.hidden_sizes, config.entropy_backup) == (2, (256, 256, 256), False)


def test_more_conservatism_is_lower_values_outside_the_data() -> None:
    """After the same updates Q of uniform actions lies further below Q of the data's with the term than without it."""
    gaps = []
    for alpha in (0.0, 5.0):
        config = ContinuousCQLConfig(**SMALL, alpha=alpha, critic_learning_rate=3e-3)
        agent = ContinuousCQL(config, OBS, ACT)
        for t in range(100):
            batch: Batch = random_batch(1, ROWS, OBS, ACT, generator=t)
            metrics = agent.update(dataclasses.replace(batch, actions=0.7 + 0.1 * batch.actions))
        gaps.append(float(metrics["critic/q_mean"] - metrics["critic/q_uniform"]))
    assert gaps[1] > gaps[0] + 0.5


# --- one name, two algorithms ------------------------------------------------------------------------------------------------------


def spec(action_space: spaces.Space[Any]) -> DatasetSpec:
    return DatasetSpec(observation_space=spaces.Box(-1, 1, (4,)), action_space=action_space)


def test_the_actions_choose_the_algorithm() -> None:
    assert agent_class("cql") is agent_class("cql", "discrete") is CQL
    assert agent_class("cql", "continuous") is ContinuousCQL
    assert agent_classes("cql") == (CQL, ContinuousCQL)
    assert agent_kinds("cql") == ("continuous", "discrete")
    assert class_name(CQL) == class_name(ContinuousCQL) == "cql"
    assert isinstance(make_config("cql", "continuous"), ContinuousCQLConfig)
    assert isinstance(make_agent("cql", spec(spaces.Box(-1, 1, (2,)))), ContinuousCQL)
    assert isinstance(make_agent("cql", spec(spaces.Discrete(3))), CQL)
    assert isinstance(make_agent(CQLConfig(), spec(spaces.Discrete(3))), CQL)
    with pytest.raises(ConfigError, match="several choices at once: choose bc"):
        make_agent("cql", spec(spaces.MultiDiscrete([2, 3])))


def test_a_field_of_the_other_algorithm_is_one_line() -> None:
    assert read_config("cql", {"alpha": 3, "num_samples": 4}) == {"alpha": 3.0, "num_samples": 4}
    assert read_config("cql", {"target": "shared_lcb", "double_q": False}) == {
        "target": "shared_lcb",
        "double_q": False,
    }
    with pytest.raises(
        ConfigError, match=r"^cql has 'double_q' for discrete actions alone; these are continuous: leave it out$"
    ):
        read_config("cql", {"alpha": 3, "double_q": True}, "continuous")
    with pytest.raises(
        ConfigError,
        match=r"^cql has 'double_q' for discrete actions alone and 'gap' for continuous ones: leave one out$",
    ):
        read_config("cql", {"double_q": True, "gap": 1.0})
    with pytest.raises(ConfigError, match="no field 'alfa'; did you mean alpha"):
        read_config("cql", {"alfa": 1.0})
    with pytest.raises(ConfigError, match="alpha must be a number of at least 0"):
        read_config("cql", {"alpha": -1.0}, "continuous")


def test_runs_recipes_sweeps_and_resuming_go_by_the_actions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_dataset().to_minari("tiny/walk-v0")
    words = ["--steps", "4", "--batch-size", "8", "--eval-every", "0", "--hidden-sizes", "8", "--num-samples", "2"]
    assert main(["train", "cql", "--dataset", "tiny/walk-v0", *words]) == 0
    run = Run("runs/cql-tiny-walk-v0-001")
    assert run.config["agent"] == "cql"
    assert run.config["config"]["num_samples"] == 2
    assert isinstance(run.agent, ContinuousCQL)
    assert main(["train", "--resume", str(run.path), "--steps", "6"]) == 0
    whole = rlkit2.train(
        "cql", "tiny/walk-v0", steps=6, batch_size=8, eval_every=0, out="whole", progress=False,
        overrides={"hidden_sizes": (8,), "num_samples": 2},
    )  # fmt: skip
    for name, tensor in Run(run.path).agent.state_dict().items():
        assert torch.equal(tensor, whole.agent.state_dict()[name]), name
    capsys.readouterr()
    assert main(["train", "cql", "--dataset", "tiny/walk-v0", "--no-double-q"]) == 2
    assert (
        capsys.readouterr().err
        == "rlkit2: cql has 'double_q' for discrete actions alone; these are continuous: leave it out\n"
    )
    Path("mine.toml").write_text('agent = "cql"\ndataset = "tiny/walk-v0"\n[config]\ngap = 2.0\nhidden_sizes = [8]\n')
    assert main(["train", "--recipe", "mine.toml", "--steps", "2", "--batch-size", "8", "--eval-every", "0"]) == 0
    assert Run("runs/cql-tiny-walk-v0-002").config["config"]["gap"] == 2.0
    Path("mine.toml").write_text('agent = "cql"\ndataset = "tiny/walk-v0"\n[config]\ngap = 2.0\nvote = "lcb"\n')
    assert main(["train", "--recipe", "mine.toml"]) == 2
    assert "leave one out" in capsys.readouterr().err


def test_the_help_names_both(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "cql", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "CQLConfig (discrete actions) and ContinuousCQLConfig (continuous actions)" in text
    assert "default: discrete actions 1.0, continuous actions 10.0" in text
    assert "continuous actions alone; default: 10" in text
    assert "discrete actions alone; default: true" in text
