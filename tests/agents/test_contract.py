"""What every registered agent must do; a new name in the registry is tested without another line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from rlkit2.agents import agent_class, agent_classes, agent_kinds, list_agents, make_agent, make_config, plain_name
from rlkit2.agents.awac import AWAC
from rlkit2.agents.base import Agent
from rlkit2.data import Batch, DatasetSpec, dataset_from_arrays
from rlkit2.data.batch import LookaheadBatch
from rlkit2.errors import ConfigError
from rlkit2.nn import StackedMLP
from rlkit2.testing import (
    HostSynchronisationError,
    NoHostMethods,
    NoSynchronisation,
    Problem,
    agent_checks,
    assert_same,
    check_agent,
    random_batch,
    small_config,
)
from rlkit2.training.updates import choose_update
from tests.agents import own

OBS, ACT, ROWS = 4, 2, 24
KINDS = ("continuous", "discrete")
# Those that learn from preferences take other batches: tests/preferences/test_agents.py.
AGENTS = [name for name in list_agents() if getattr(agent_class(name), "learns_from", "transitions") == "transitions"]
CASES = [(name, kind) for name in AGENTS for kind in KINDS if kind in agent_kinds(name)]
every_case = pytest.mark.parametrize(("name", "kind"), CASES, ids=[f"{name}-{kind}" for name, kind in CASES])
every_agent = pytest.mark.parametrize("name", AGENTS)


def small(name: str, kind: str) -> Any:
    """The config of a registered name with small networks."""
    return small_config(partial(make_config, name, kind), agent_class(name, kind).config_class)


def build(name: str, kind: str = "continuous", *, seeds: Any = 1, dtype: torch.dtype = torch.float64) -> Agent:
    """A small agent of a registered name."""
    return agent_class(name, kind)(small(name, kind), OBS, ACT, seeds=seeds, dtype=dtype, discrete=kind == "discrete")


def batches(name: str, kind: str, count: int, *, seeds: int = 1) -> list[Any]:
    """What the agent learns from."""
    return Problem(agent_class(name, kind), kind).batches(count, seeds=seeds)


def problem(name: str, kind: str = "continuous") -> Problem:
    """A registered agent, small, as the checks of the contract take it."""
    return Problem(agent_class(name, kind), kind, small(name, kind))


def marks(name: str, cls: type[Agent], what: str) -> list[pytest.MarkDecorator]:
    """Hundreds of updates: once for every class among the fast tests, for its other kinds of actions and its presets among the slow ones."""
    repeated = plain_name(name) != name or f"({cls.action_kinds[0]})" not in what
    return [pytest.mark.slow] if what.startswith("three_hundred") and repeated else []


CONTRACT = [
    pytest.param(check, id=f"{name}-{what}", marks=marks(name, cls, what))
    for name in list_agents()
    for cls in agent_classes(name)
    for what, check in agent_checks(cls, small(name, cls.action_kinds[0]))
    if "multidiscrete" not in what or name in ("bc", "iql", "odice", "cpl", "ipl")  # the others share their heads
]


@pytest.mark.parametrize("check", CONTRACT)
def test_contract(check: Callable[[], None]) -> None:
    check()


class Mixes(AWAC):
    """Every seed learns from the first one's rewards."""

    def update(self, batch: Batch) -> dict[str, Tensor]:
        return super().update(dataclasses.replace(batch, rewards=batch.rewards[:1].expand_as(batch.rewards)))


class Asks(AWAC):
    """Asks the device for a number."""

    def update(self, batch: Batch) -> dict[str, Tensor]:
        metrics = super().update(batch)
        metrics["policy/loss"] = metrics["policy/loss"] * (1.0 if metrics["policy/loss"].sum().item() > -1e30 else 0.0)
        return metrics


class Forgets(AWAC):
    """Keeps a tensor that the state dict does not hold."""

    def critic_targets(self, batch: Batch) -> Tensor:
        self.hidden = getattr(self, "hidden", 0.0) * 0.5 + batch.rewards.mean()
        return super().critic_targets(batch) + self.hidden


class Dices(AWAC):
    """Draws from the global generator."""

    def critic_targets(self, batch: Batch) -> Tensor:
        return super().critic_targets(batch) + 0.1 * torch.randn_like(batch.rewards)


class BootstrapsAtTheEnd(AWAC):
    """A termination is taken for a truncation."""

    def critic_targets(self, batch: Batch) -> Tensor:
        return super().critic_targets(dataclasses.replace(batch, terminations=torch.zeros_like(batch.terminations)))


class StopsAtCuts(AWAC):
    """A truncation is taken for a termination."""

    def critic_targets(self, batch: Batch) -> Tensor:
        return super().critic_targets(
            dataclasses.replace(batch, terminations=(batch.truncations | (batch.terminations > 0)).to(self.dtype))
        )


class ForgetsTheSteps(AWAC):
    """A return of several steps is taken for one of a single step."""

    def discounts(self, batch: Batch) -> float:
        return self.config.discount


class Averages(AWAC):
    """Metrics are means over the seeds."""

    def update(self, batch: Batch) -> dict[str, Tensor]:
        return {name: value.mean() for name, value in super().update(batch).items()}


class Names(AWAC):
    """Metrics have no group."""

    def update(self, batch: Batch) -> dict[str, Tensor]:
        return {name.replace("/", "_"): value for name, value in super().update(batch).items()}


class Explodes(AWAC):
    """Targets grow without bound."""

    def critic_targets(self, batch: Batch) -> Tensor:
        return super().critic_targets(batch) * 10.0 ** self.step.to(self.dtype).view(-1, 1)


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        (Mixes, "seeds_learn_alone_as_beside_others"),
        (Asks, "update_never_waits_for_the_device"),
        (Forgets, "resumed_training_ends_the_same"),
        (Dices, "training_is_deterministic"),
        (BootstrapsAtTheEnd, "terminated_steps_ignore_what_follows"),
        (StopsAtCuts, "truncated_steps_bootstrap"),
        (ForgetsTheSteps, "returns_of_several_steps"),
        (Averages, "metrics"),
        (Names, "metrics"),
        (Explodes, "three_hundred_updates_stay_finite"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_broken_agent_fails_the_named_check(broken: type[Agent], name: str) -> None:
    with pytest.raises(AssertionError, match=rf"^{name} \(continuous\): ") as failed:
        check_agent(broken)
    assert "\n" not in str(failed.value)


def test_a_good_agent_passes() -> None:
    check_agent(own.Own)


@pytest.mark.parametrize(
    "synchronise",
    [
        lambda x: x.item(),
        lambda x: float(x),
        lambda x: 1 if x > 0 else 0,
        lambda x: x.numpy(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.expand(3)[torch.ones(3, dtype=torch.bool)],
        lambda x: x.expand(3).nonzero(),
    ],
    ids=["item", "float", "if", "numpy", "tolist", "cpu", "mask", "nonzero"],
)
def test_the_watch_for_synchronisation_sees_it(synchronise: Any) -> None:
    with pytest.raises(HostSynchronisationError), NoHostMethods(), NoSynchronisation():
        synchronise(torch.tensor(1.0))


TRACED = [
    pytest.param(*case, id="-".join(case), marks=[] if case == ("iql", "continuous") else pytest.mark.slow)
    for case in CASES
]


@pytest.mark.parametrize(("name", "kind"), TRACED)
def test_traced_update_equals_the_plain_one(name: str, kind: str) -> None:
    """Traced by dynamo and AOT autograd but not compiled: finds what cannot be traced, in some seconds an agent."""
    plain, traced = build(name, kind, seeds=2), build(name, kind, seeds=2)
    torch.compiler.reset()
    update = torch.compile(traced.update, backend="aot_eager", dynamic=False)
    for batch in batches(name, kind, 4, seeds=2):
        expected, found = plain.update(batch), update(batch)
        assert expected.keys() == found.keys()
    for part, tensor in plain.state_dict().items():
        torch.testing.assert_close(traced.state_dict()[part], tensor, rtol=1e-8, atol=1e-9, msg=part)


@pytest.mark.slow
@every_case
def test_compiled_update_is_used_and_equals_the_plain_one(name: str, kind: str) -> None:
    """`choose_update` itself compares the compiled update with the plain one and says why it was not used.

    In float64: where gradients nearly cancel (`vdice`), Adam's first steps follow the rounding errors of float32.
    """
    agent = build(name, kind, seeds=1, dtype=torch.float64)
    data = random_batch(1, 400, OBS, ACT, discrete=kind == "discrete")
    dataset = dataset_from_arrays(**{field: value[0] for field, value in vars(data).items()}, spec=spec_of(kind))
    dataset = dataset.looking_ahead(next_actions=agent.needs_next_actions)
    torch.compiler.reset()
    _, reason = choose_update(agent, dataset, ROWS, torch.device("cpu"), compile="on")
    assert reason is None


# Networks of one's own


class PlainMLP(nn.Module):
    """The function of a `StackedMLP` by einsum on ordinary parameters, as a user would write it."""

    def __init__(self, like: StackedMLP) -> None:
        super().__init__()
        self.scalar, self.members, self.depth = like.output_size is None, like.members, len(like.hidden_sizes) + 1
        self.tensors = nn.ParameterDict({n.replace(".", "_"): v.clone() for n, v in like.named_views().items()})

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs if self.members is None or inputs.ndim == 4 else inputs.unsqueeze(1)
        for i in range(self.depth):
            hidden = hidden @ self.tensors[f"layers_{i}_weight"] + self.tensors[f"layers_{i}_bias"]
            if f"norms_{i}_weight" in self.tensors:
                hidden = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:])
                hidden = hidden * self.tensors[f"norms_{i}_weight"] + self.tensors[f"norms_{i}_bias"]
            if i < self.depth - 1:
                hidden = hidden.relu()
        return hidden.squeeze(-1) if self.scalar else hidden


def trained_parts(name: str, kind: str) -> list[str]:
    return list(build(name, kind)._optimizers)


PARTS = [(name, kind, part) for name, kind in CASES for part in trained_parts(name, kind)]


@pytest.mark.parametrize(("name", "kind", "part"), PARTS, ids=["-".join(case) for case in PARTS])
def test_any_module_can_take_the_place_of_a_network(name: str, kind: str, part: str) -> None:
    """The same function as a plain module learns the same: this also holds the hand-written backward pass against autograd, inside every agent."""
    fast, hackable = build(name, kind, seeds=2), build(name, kind, seeds=2)
    holder = hackable._modules[part]
    network = getattr(holder, "network", holder)
    if not isinstance(network, StackedMLP):
        pytest.skip(f"{part} has no network of its own")
    hackable.replace_network(part, PlainMLP(network))
    for batch in batches(name, kind, 6, seeds=2):
        expected, found = fast.update(batch), hackable.update(batch)
        for metric, value in expected.items():
            torch.testing.assert_close(found[metric], value, rtol=1e-8, atol=1e-9, msg=metric)
    observations = random_batch(2, ROWS, OBS, ACT, dtype=torch.float64).observations
    torch.testing.assert_close(hackable.policy(observations), fast.policy(observations), rtol=1e-8, atol=1e-9)
    again = build(name, kind, seeds=2)
    again.replace_network(part, PlainMLP(network))
    again.load_state_dict(hackable.state_dict())
    assert_same(again.state_dict(), hackable.state_dict())


# Spaces


def spec_of(kind: str) -> DatasetSpec:
    action_space = spaces.Discrete(ACT) if kind == "discrete" else spaces.Box(-1.0, 1.0, (ACT,))
    return DatasetSpec(observation_space=spaces.Box(-np.inf, np.inf, (OBS,)), action_space=action_space)


GOAL = spaces.Dict(
    {
        "observation": spaces.Box(-np.inf, np.inf, (3,)),
        "achieved_goal": spaces.Box(-np.inf, np.inf, (2,)),
        "desired_goal": spaces.Box(-np.inf, np.inf, (2,)),
    }
)
PLAIN = spaces.Box(-np.inf, np.inf, (3,))
SPACES: dict[str, tuple[spaces.Space[Any], spaces.Space[Any]]] = {
    "box": (PLAIN, spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32))),
    "unbounded": (PLAIN, spaces.Box(np.array([-1.0, -np.inf], np.float32), np.array([1.0, np.inf], np.float32))),
    "discrete": (PLAIN, spaces.Discrete(3, start=5)),
    "goal": (GOAL, spaces.Box(-1.0, 1.0, (2,))),
    "discrete observation": (spaces.Discrete(6, start=1), spaces.Discrete(3)),
}


@pytest.mark.parametrize("family", SPACES)
@every_agent
def test_every_space(name: str, family: str) -> None:
    """From raw spaces to actions the environment accepts, for two seeds."""
    observation_space, action_space = SPACES[family]
    spec = DatasetSpec(observation_space=observation_space, action_space=action_space)
    kind = "discrete" if spec.discrete else "continuous"
    config = small(name, kind)
    if kind not in agent_kinds(name):
        with pytest.raises(ConfigError, match="choose another agent"):
            make_agent(config, spec)
        return
    rng = np.random.default_rng(0)
    rows, total = rng.normal(size=(200, spec.observation_size)).astype(np.float32), 200
    if spec.discrete:
        actions = action_space.start + rng.integers(action_space.n, size=total)  # type: ignore[attr-defined]
    else:
        centre = np.where(np.isfinite(action_space.high), (action_space.high + action_space.low) / 2, 0.0)  # type: ignore[attr-defined]
        actions = (centre + rng.uniform(-1, 1, (total, 2))).astype(np.float32)
    agent = make_agent(config, spec, seeds=2)
    for start in range(0, total, 50):
        part = slice(start, start + 50)
        both = {
            "observations": rows[part],
            "actions": actions[part],
            "rewards": rng.normal(size=50).astype(np.float32),
            "next_observations": rows[part],
            "terminations": np.zeros(50, bool),
            "truncations": np.zeros(50, bool),
        }
        batch = Batch(**{k: torch.from_numpy(v).expand(2, *v.shape) for k, v in both.items()})
        if agent.needs_next_actions:
            known = torch.ones_like(batch.terminations)
            batch = LookaheadBatch(**vars(batch), rows=known, next_actions=batch.actions, followed=known)
        metrics = agent.update(batch)
    assert all(value.isfinite().all() for value in metrics.values())
    observed = torch.from_numpy(rows[:20]).expand(2, -1, -1)
    for deterministic in (True, False):
        acted = agent.policy(observed, deterministic=deterministic)
        assert acted.shape == ((2, 20) if spec.discrete else (2, 20, 2))
        for action in acted.flatten(0, 1).numpy():
            assert action_space.contains(action.astype(action_space.dtype)), action


# Configurations


@every_agent
def test_wrong_settings_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*no_such_field"):
        make_config(name, no_such_field=1)
    for field in ("discount", "expectile", "target_update_rate", "fraction", "lambda_"):
        if field in {f.name for f in dataclasses.fields(make_config(name))}:
            with pytest.raises(ConfigError, match=field):
                make_config(name, **{field: 7.0})


@pytest.fixture(autouse=True)
def _no_recompilation_limit() -> Iterator[None]:
    yield
    torch.compiler.reset()
