"""What every registered agent must do; a new name in the registry is tested without another line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rlkit2.agents import agent_class, list_agents, make_agent, make_config
from rlkit2.agents.base import Agent
from rlkit2.agents.preference_agent import PreferenceAgent
from rlkit2.data import Batch, DatasetSpec, dataset_from_arrays
from rlkit2.errors import ConfigError
from rlkit2.fields import describe_fields
from rlkit2.nn import StackedMLP
from rlkit2.training.updates import choose_update
from tests.agents.problems import map_batch, random_batch, random_preferences, small_config

OBS, ACT, ROWS = 4, 2, 24
KINDS = ("continuous", "discrete")
# Those that learn from preferences take other batches: tests/preferences/test_agents.py.
AGENTS = [name for name in list_agents() if getattr(agent_class(name), "learns_from", "transitions") == "transitions"]
CASES = [(name, kind) for name in AGENTS for kind in KINDS if kind in agent_class(name).action_kinds]
every_case = pytest.mark.parametrize(("name", "kind"), CASES, ids=[f"{name}-{kind}" for name, kind in CASES])
every_agent = pytest.mark.parametrize("name", AGENTS)


def learns_from_preferences(name: str) -> bool:
    return issubclass(agent_class(name), PreferenceAgent)


FROM_TRANSITIONS = [case for case in CASES if not learns_from_preferences(case[0])]
every_case_of_transitions = pytest.mark.parametrize(
    ("name", "kind"), FROM_TRANSITIONS, ids=["-".join(case) for case in FROM_TRANSITIONS]
)
every_agent_of_transitions = pytest.mark.parametrize("name", sorted({name for name, _ in FROM_TRANSITIONS}))


def build(name: str, kind: str = "continuous", *, seeds: Any = 1, dtype: torch.dtype = torch.float64) -> Agent:
    """A small agent of a registered name."""
    config = small_config(partial(make_config, name), agent_class(name).config_class)
    return agent_class(name)(config, OBS, ACT, seeds=seeds, dtype=dtype, discrete=kind == "discrete")


def batches(
    name: str, kind: str, count: int, *, seeds: int = 1, dtype: torch.dtype = torch.float64, start: int = 0
) -> list[Any]:
    """What the agent learns from: batches of transitions, or of preferences."""
    make = random_preferences if learns_from_preferences(name) else random_batch
    return [
        make(seeds, ROWS, OBS, ACT, discrete=kind == "discrete", dtype=dtype, generator=start + t) for t in range(count)
    ]


def train(agent: Agent, data: list[Any]) -> dict[str, Tensor]:
    """Metrics of the last update."""
    metrics: dict[str, Tensor] = {}
    for batch in data:
        metrics = agent.update(batch)
    return metrics


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert left.keys() == right.keys()
    different = [name for name, tensor in left.items() if not torch.equal(tensor, right[name])]
    assert not different


# Seeds


def rows_of_seed(k: int, values: Tensor) -> Tensor:
    return values[k : k + 1]


@every_case
def test_a_seed_learns_the_same_alone_and_beside_others(name: str, kind: str) -> None:
    """To 1e-10 in float64, not bit for bit: a batch of products may sum in another order than one, and Adam divides by small numbers."""
    seeds = [7, 0, 3]
    together = build(name, kind, seeds=seeds)
    data = batches(name, kind, 12, seeds=len(seeds))
    metrics = train(together, data)
    state = together.state_dict()
    for k, seed in enumerate(seeds):
        alone = build(name, kind, seeds=[seed])
        own_metrics = train(alone, [map_batch(partial(rows_of_seed, k), batch) for batch in data])
        for part, tensor in alone.state_dict().items():
            torch.testing.assert_close(
                state[part][k : k + 1], tensor, rtol=1e-10, atol=1e-10, msg=f"{part}, seed {seed}"
            )
        for metric, value in own_metrics.items():
            torch.testing.assert_close(
                metrics[metric][k : k + 1], value, rtol=1e-8, atol=1e-10, msg=f"{metric}, seed {seed}"
            )


@every_case
def test_seeds_start_and_stay_different(name: str, kind: str) -> None:
    agent = build(name, kind, seeds=2)
    train(agent, [map_batch(lambda t: t.expand(2, *t.shape[1:]), batch) for batch in batches(name, kind, 3)])
    weights = {n: t for n, t in agent.state_dict().items() if n.endswith("weight") and not n.startswith("optimizer")}
    assert weights
    assert all(not torch.equal(tensor[0], tensor[1]) for n, tensor in weights.items() if ".norms." not in n)


# State


@every_case
def test_resumed_training_ends_bit_for_bit_the_same(name: str, kind: str) -> None:
    data = batches(name, kind, 12, seeds=2)
    whole = build(name, kind, seeds=[5, 6])
    train(whole, data[:7])
    stored = save(whole.state_dict())
    metrics = train(whole, data[7:])
    resumed = build(name, kind, seeds=[5, 6])
    train(resumed, batches(name, kind, 2, seeds=2, start=100))  # whatever it was before is forgotten
    resumed.load_state_dict(load(stored))
    assert_same(train(resumed, data[7:]), metrics)
    assert_same(resumed.state_dict(), whole.state_dict())


@every_case
def test_training_is_deterministic(name: str, kind: str) -> None:
    first, second = build(name, kind, seeds=2), build(name, kind, seeds=2)
    data = batches(name, kind, 6, seeds=2)
    torch.manual_seed(1)
    metrics = train(first, data)
    torch.manual_seed(2)  # global randomness has no part in it
    assert_same(train(second, data), metrics)
    assert_same(first.state_dict(), second.state_dict())


@every_case
def test_state_leads_with_the_seeds_and_is_a_copy(name: str, kind: str) -> None:
    agent = build(name, kind, seeds=3)
    before = agent.state_dict()
    assert all(tensor.shape[0] == 3 and tensor.is_contiguous() for tensor in before.values())
    kept = {n: t.clone() for n, t in before.items()}
    train(agent, batches(name, kind, 4, seeds=3))
    assert_same(before, kept)
    after = agent.state_dict()
    assert (after["step"] == 4).all()
    changed = {n.partition(".")[0] for n in after if not torch.equal(after[n], before[n])}
    assert changed >= {"policy", "optimizer", "step"}
    with pytest.raises(ConfigError, match="missing from the state"):
        agent.load_state_dict({n: t for n, t in after.items() if n != "step"})


# What update returns and how it runs


@every_case
def test_metrics(name: str, kind: str) -> None:
    agent = build(name, kind, seeds=2)
    for batch in batches(name, kind, 4, seeds=2):
        for metric, value in agent.update(batch).items():
            group, _, rest = metric.partition("/")
            assert group, metric
            assert rest, metric
            assert value.shape == (2,), metric
            assert not value.requires_grad, metric
            assert value.dtype in (torch.float64, torch.bool), metric


@every_case
def test_three_hundred_updates_stay_finite(name: str, kind: str) -> None:
    agent = build(name, kind, dtype=torch.float32)
    seen: dict[str, bool] = {}
    for batch in batches(name, kind, 300, dtype=torch.float32):
        for metric, value in agent.update(batch).items():
            seen[metric] = seen.get(metric, True) and bool(value.isfinite().all())
    assert all(seen.values()), [metric for metric, finite in seen.items() if not finite]
    assert all(tensor.isfinite().all() for tensor in agent.state_dict().values() if tensor.is_floating_point())


FORBIDDEN_METHODS = {
    "item",
    "tolist",
    "numpy",
    "cpu",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__array__",
    "__len__",
}
FORBIDDEN_OPERATIONS = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique",
    "bincount",
    "repeat_interleave",
)


class HostSynchronisationError(AssertionError):
    """An update asked the device for a value."""


class NoSynchronisation(TorchDispatchMode):
    """Raises on operations whose result or output shape the host must wait for."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        base = str(operation).split(".")[1]
        if base in FORBIDDEN_OPERATIONS or base.startswith("unique"):
            raise HostSynchronisationError(str(operation))
        indices = args[1] if base in ("index", "index_put_", "index_put") else ()
        if any(index is not None and index.dtype == torch.bool for index in indices):
            raise HostSynchronisationError(f"{operation} with a mask")
        return operation(*args, **(kwargs or {}))


class NoHostMethods(TorchFunctionMode):
    """Raises on methods that bring a tensor to the host; on a CPU they would pass unseen."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        method = getattr(function, "__name__", "")
        if method in FORBIDDEN_METHODS - {"__len__"}:
            raise HostSynchronisationError(f"Tensor.{method}")
        return function(*args, **(kwargs or {}))


@every_case
def test_update_never_waits_for_the_device(name: str, kind: str) -> None:
    agent = build(name, kind, seeds=2, dtype=torch.float32)
    data = batches(name, kind, 4, seeds=2, dtype=torch.float32)
    with NoHostMethods(), NoSynchronisation():
        train(agent, data)


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
@every_case_of_transitions
def test_compiled_update_is_used_and_equals_the_plain_one(name: str, kind: str) -> None:
    """`choose_update` itself compares the compiled update with the plain one and says why it was not used.

    In float64: where gradients nearly cancel (`vdice`), Adam's first steps follow the rounding errors of float32.
    """
    agent = build(name, kind, seeds=1, dtype=torch.float64)
    data = random_batch(1, 400, OBS, ACT, discrete=kind == "discrete")
    dataset = dataset_from_arrays(**{field: value[0] for field, value in vars(data).items()}, spec=spec_of(kind))
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


# Flags


@every_case_of_transitions
def test_a_terminated_step_ignores_what_follows(name: str, kind: str) -> None:
    ended = [dataclasses.replace(b, terminations=torch.ones_like(b.terminations)) for b in batches(name, kind, 4)]
    elsewhere = [dataclasses.replace(b, next_observations=b.next_observations + 5.0) for b in ended]
    first, second = build(name, kind), build(name, kind)
    train(first, ended)
    train(second, elsewhere)
    trained = {n: t for n, t in first.state_dict().items() if n.startswith(("policy", "critic", "value"))}
    assert trained
    assert_same(trained, {n: t for n, t in second.state_dict().items() if n in trained})


@every_case_of_transitions
def test_a_truncated_step_bootstraps_like_any_other(name: str, kind: str) -> None:
    data = batches(name, kind, 4)
    cut = [dataclasses.replace(b, truncations=torch.ones_like(b.truncations)) for b in data]
    first, second = build(name, kind), build(name, kind)
    train(first, data)
    train(second, cut)
    assert_same(first.state_dict(), second.state_dict())


@every_case_of_transitions
def test_values_bootstrap_from_the_next_observation(name: str, kind: str) -> None:
    going_on = [dataclasses.replace(b, terminations=torch.zeros_like(b.terminations)) for b in batches(name, kind, 4)]
    elsewhere = [dataclasses.replace(b, next_observations=b.next_observations + 5.0) for b in going_on]
    first, second = build(name, kind), build(name, kind)
    train(first, going_on)
    train(second, elsewhere)
    estimates = [n for n in first.state_dict() if n.startswith(("critic.", "value.")) and n.endswith("weight")]
    for part in estimates:
        assert not torch.equal(first.state_dict()[part], second.state_dict()[part]), part


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
@every_agent_of_transitions
def test_every_space(name: str, family: str) -> None:
    """From raw spaces to actions the environment accepts, for two seeds."""
    observation_space, action_space = SPACES[family]
    spec = DatasetSpec(observation_space=observation_space, action_space=action_space)
    config = small_config(partial(make_config, name), agent_class(name).config_class)
    kind = "discrete" if spec.discrete else "continuous"
    if kind not in agent_class(name).action_kinds:
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
        metrics = agent.update(Batch(**{k: torch.from_numpy(v).expand(2, *v.shape) for k, v in both.items()}))
    assert all(value.isfinite().all() for value in metrics.values())
    observed = torch.from_numpy(rows[:20]).expand(2, -1, -1)
    for deterministic in (True, False):
        acted = agent.policy(observed, deterministic=deterministic)
        assert acted.shape == ((2, 20) if spec.discrete else (2, 20, 2))
        for action in acted.flatten(0, 1).numpy():
            assert action_space.contains(action.astype(action_space.dtype)), action


# Configurations


@every_agent
def test_config_is_frozen_and_explained(name: str) -> None:
    config = make_config(name)
    first = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, first, None)
    unexplained = [field for field, _, _, comment in describe_fields(type(config)) if not comment]
    assert not unexplained
    assert type(config).__doc__


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
