"""Members that differ as Q does between datasets: weights of rows, targets and priors of their own."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from rlkit2.agents import agent_class, make_config
from rlkit2.agents.error_model import CALIBRATED, ErrorModel, ErrorOptions
from rlkit2.agents.uncertain_agent import UncertainAgent
from rlkit2.data import Batch
from rlkit2.data.batch import RowBatch
from rlkit2.errors import ConfigError
from rlkit2.nn import load_policy
from rlkit2.nn.critics import Critic
from rlkit2.testing import NoHostMethods, NoSynchronisation
from tests.agents.problems import random_batch, small_config

AGENTS = {"sacn": False, "edac": False, "td3bc": False, "iql": False, "cql": True, "dqn": True}
OBS, ACT, ROWS, MEMBERS = 4, 3, 16, 3
every_agent = pytest.mark.parametrize("name", AGENTS)


def build(name: str, *, seeds: Any = 1, dtype: torch.dtype = torch.float64, **overrides: Any) -> UncertainAgent:
    known = {f.name for f in fields(agent_class(name).config_class)}
    given = {key: value for key, value in {**CALIBRATED, "num_critics": MEMBERS, **overrides}.items() if key in known}
    config = small_config(partial(make_config, name), agent_class(name).config_class, **given)
    agent = agent_class(name)(config, OBS, ACT, seeds=seeds, dtype=dtype, discrete=AGENTS[name])
    assert isinstance(agent, UncertainAgent)
    return agent


def with_rows(batch: Batch, rows: torch.Tensor) -> RowBatch:
    return RowBatch(**{f.name: getattr(batch, f.name) for f in fields(Batch)}, rows=rows)


def data(agent: UncertainAgent, t: int, count: int = ROWS) -> RowBatch:
    batch = random_batch(len(agent.seeds), count, OBS, ACT, discrete=agent.discrete, dtype=agent.dtype, generator=t)
    rows = torch.randint(1000, (len(agent.seeds), count), generator=torch.Generator().manual_seed(t))
    return with_rows(batch, rows)


def test_weights_are_poisson_numbers_of_seed_member_and_row() -> None:
    agent = build("dqn", seeds=[5, 9])
    rows = torch.arange(5000)
    batch = with_rows(random_batch(2, len(rows), 1, ACT, discrete=True), rows.expand(2, -1))
    weights = agent.row_weights(batch)
    assert weights is not None
    assert weights.shape == (2, MEMBERS, len(rows))
    shares = torch.stack([(weights == k).double().mean(-1) for k in range(4)])
    expected = torch.tensor([0.3679, 0.3679, 0.1839, 0.0613], dtype=torch.float64)
    torch.testing.assert_close(shares, expected.view(4, 1, 1).expand_as(shares), atol=0.03, rtol=0.0)
    flat = weights.flatten(0, 1)
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    assert float(correlation.abs().max()) < 0.06  # members and seeds draw independently
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:50]
    alone = build("dqn", seeds=[9])
    some = with_rows(random_batch(1, 50, 1, ACT, discrete=True), rows[order].unsqueeze(0))
    assert torch.equal(alone.row_weights(some)[0], weights[1][:, order])  # type: ignore[index]


@pytest.mark.parametrize(
    "options", [{"critic": "mse"}, {"critic": "ggd"}, {"critic": "ggd", "coupling": "ggd"}, {"critic": "gaussian"}]
)
def test_a_weight_of_two_is_a_row_seen_twice(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = ErrorModel(ErrorOptions(**options), 1, torch.float64, torch.device("cpu"))
    outputs, targets = torch.randn(1, 1, 8, 1 + model.outputs).double(), torch.randn(1, 8).double()
    counts = torch.tensor([0, 1, 2, 1, 0, 3, 1, 0])
    gradients = []
    model.track = lambda errors: None  # type: ignore[method-assign]  # the running scale follows the rows as they come
    for index, weights in (
        (torch.arange(8), counts.double().view(1, 1, 8)),
        (torch.arange(8).repeat_interleave(counts), None),
    ):
        leaf = outputs.clone().requires_grad_()
        loss, _ = model.loss(leaf[:, :, index], targets[:, index], 0.9, row_weights=weights)
        gradients.append(torch.autograd.grad(loss.sum(), leaf)[0])
    torch.testing.assert_close(*gradients)


@every_agent
def test_calibrated_options_train_resume_and_say_their_limits(name: str) -> None:
    agent, other = build(name, seeds=2), build(name, seeds=2)
    for t in range(3):
        with NoHostMethods(), NoSynchronisation():
            metrics = agent.update(data(agent, t))
        assert all(bool(value.isfinite().all()) for value in metrics.values())
    other.load_state_dict(load(save(agent.state_dict())))
    for resumed in (agent, other):
        resumed.update(data(resumed, 3))
    assert all(torch.equal(a, b) for a, b in zip(agent.state_dict().values(), other.state_dict().values(), strict=True))
    assert bool(agent.epistemic_limits) == agent.moves_values  # cql and edac move Q; the others keep the promise
    assert any("same rows" in limit for limit in build(name, bootstrap="none").epistemic_limits)
    if name not in ("cql", "dqn"):  # whose targets are independent by default
        usual = make_config(name).target
        assert any("shared targets" in limit for limit in build(name, target=usual).epistemic_limits)
    plain = random_batch(2, ROWS, OBS, ACT, discrete=agent.discrete, dtype=agent.dtype)
    with pytest.raises(ConfigError, match=r"dataset\.gather"):
        agent.update(plain)


@every_agent
def test_no_member_learns_from_another(name: str) -> None:
    """Rows that a member does not count, and the other members' networks, leave its step alone."""
    if name == "edac":  # its diversity is between members
        return
    agents = [build(name, critic="mse") for _ in range(2)]
    batch = data(agents[0], 0)
    weights = agents[0].row_weights(batch)
    assert weights is not None
    unseen = weights[0, 0] == 0.0
    assert bool(unseen.any())
    moved = torch.where(unseen, batch.rewards + 10.0, batch.rewards)
    for agent, rewards in zip(agents, (batch.rewards, moved), strict=True):
        with torch.no_grad():
            if agent is agents[1]:
                for module in [agent.critic, agent.critic_target, *([agent.value_network] if name == "iql" else [])]:
                    for view in getattr(module, "network", module).named_views().values():
                        view[:, 1:] += 0.1
        agent.update(RowBatch(**{**{f.name: getattr(batch, f.name) for f in fields(RowBatch)}, "rewards": rewards}))
    first = [[view[:, 0] for view in agent.critic.named_views().values()] for agent in agents]
    for a, b in zip(*first, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(*(agent.critic.named_views()["layers.0.weight"][:, 1] for agent in agents))


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("noise_outputs", [0, 2])
def test_priors(discrete: bool, noise_outputs: int) -> None:
    make = partial(Critic, 5, 3, (8,), members=4, discrete=discrete, noise_outputs=noise_outputs, dtype=torch.float64)
    plain, critic, alone = make(seeds=[3, 7]), make(seeds=[3, 7], prior_scale=2.0), make(seeds=[7], prior_scale=2.0)
    observations = torch.randn(2, 400, 5, dtype=torch.float64)
    actions = torch.randint(3, (2, 400)) if discrete else torch.rand(2, 400, 3, dtype=torch.float64) * 2 - 1
    prior = (critic(observations, actions) - plain(observations, actions)).detach()
    torch.testing.assert_close(critic(observations, actions)[1:], alone(observations[1:], actions[1:]))
    assert 0.8 < float(prior.std(1).square().mean().sqrt()) / 2.0 < 1.25  # the members differ by the scale
    outputs = critic.outputs(observations, actions)
    torch.testing.assert_close(outputs[..., 0], critic(observations, actions))
    torch.testing.assert_close(outputs[..., 1:], plain.outputs(observations, actions)[..., 1:])
    values, pullback = critic.vjp(observations, actions)
    torch.testing.assert_close(values, critic(observations, actions))
    torch.testing.assert_close(
        pullback(torch.ones_like(values)), plain.vjp(observations, actions)[1](torch.ones_like(values))
    )
    if discrete:
        torch.testing.assert_close(critic.every_output(observations)[..., 0], critic.every_action(observations))
    else:
        torch.testing.assert_close(critic.first(observations, actions), values[:, 0])
        torch.testing.assert_close(critic.minimum(observations, actions), values.amin(1))


def test_a_saved_policy_keeps_its_priors(tmp_path: Any) -> None:
    agent = build("dqn", seeds=[4, 2], prior_scale=3.0)
    for t in range(3):
        agent.update(data(agent, t))
    agent.policy.save(tmp_path)
    observations = random_batch(2, 30, OBS, ACT, dtype=torch.float64, generator=9).observations
    torch.testing.assert_close(load_policy(tmp_path).actor.scores(observations), agent.actor.scores(observations))
    one = load_policy(tmp_path, seed_index=1)
    torch.testing.assert_close(one.actor.scores(observations[1:]), agent.actor.scores(observations)[1:])


def test_intervals_widen_with_few_members() -> None:
    agent = build("dqn")
    found = agent.uncertainty(random_batch(1, 5, OBS, ACT, generator=1).observations)
    low, high = found.interval(0.9)
    np.testing.assert_allclose(
        (high - low) / found.epistemic_sd / 2, 2.92 * np.sqrt(4 / 3), rtol=1e-3
    )  # t of 2 degrees of freedom
    np.testing.assert_allclose((high + low) / 2, found.q_mean, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="level"):
        found.interval(90)
    with pytest.raises(ConfigError, match="num_critics"):
        build("dqn", num_critics=1, bootstrap="none").uncertainty(torch.zeros(2, OBS)).interval()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dqn", {"bootstrap": "rows", "num_critics": 1}, "between members"),
        ("edac", {"prior_scale": 1.0}, "diversity"),
        ("iql", {"prior_scale": -1.0}, "prior_scale"),
    ],
)
def test_options_that_do_not_fit(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(name, **options)
