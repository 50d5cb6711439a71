"""What every agent must do, as checks that need nothing but the agent: for agents of your own, and for rlkit2's.

    from rlkit2.testing import check_agent
    check_agent(MyAgent)

Each check is named, and says in one line what went wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rlkit2.agents.base import Agent, as_seeds
from rlkit2.agents.ppo import RolloutBatch
from rlkit2.data.batch import Batch, LookaheadBatch
from rlkit2.data.preferences import PreferenceBatch
from rlkit2.data.sequences import SequenceBatch
from rlkit2.errors import ConfigError
from rlkit2.fields import Checked, describe_fields
from rlkit2.nn import Normalizer

OBSERVATIONS, ACTIONS, ROWS = 4, 2, 24
CHOICES, STARTS = (3, 2), (0, -1)  # of the actions that make several


class Problem:
    """An agent's class with small networks on transitions without structure.

    Args:
        agent: the class.
        kind: "continuous", "discrete" or "multidiscrete" actions.
        config: default: the config class with its defaults, two layers of 16 units in every network.
    """

    def __init__(self, agent: type[Agent], kind: str, config: Any = None) -> None:
        self.agent, self.kind = agent, kind
        self.config = small_config(agent.config_class, agent.config_class) if config is None else config

    def __repr__(self) -> str:
        return f"{self.agent.__name__} with {self.kind} actions"

    @property
    def from_transitions(self) -> bool:
        """Whether its batches are transitions (else preferences, sequences or rollouts)."""
        return self.agent.learns_from == "transitions"

    def build(self, seeds: Any = 1, dtype: torch.dtype = torch.float64) -> Agent:
        """The agent, small."""
        if self.kind == "multidiscrete":
            named = as_seeds(seeds)
            maps = Normalizer(choices=CHOICES, action_start=STARTS, seeds=len(named))
            return self.agent(self.config, OBSERVATIONS, sum(CHOICES), seeds=named, dtype=dtype, normalizer=maps)
        return self.agent(
            self.config, OBSERVATIONS, ACTIONS, seeds=seeds, dtype=dtype, discrete=self.kind == "discrete"
        )

    def batches(self, count: int, *, seeds: int = 1, dtype: torch.dtype = torch.float64, start: int = 0) -> list[Any]:
        """What it learns from; the same numbers at every call."""
        make = batch_maker(self.agent)
        sizes = (seeds, ROWS, OBSERVATIONS, ACTIONS)
        options: dict[str, Any] = {"discrete": self.kind == "discrete", "dtype": dtype}
        if self.kind == "multidiscrete":
            options = {"choices": (CHOICES, STARTS), "dtype": dtype}
        return [make(*sizes, **options, generator=start + t) for t in range(count)]


def check_agent(agent: type[Agent], config: Any = None) -> None:
    """Hold an agent's class to the contract: every check, with every kind of actions that it takes.

    Args:
        agent: a subclass of `Agent`.
        config: of small networks; default: the config class with its defaults, two layers of 16 units in every network.

    Raises:
        AssertionError: the first check that fails, with its name and what went wrong.
    """
    for name, check in agent_checks(agent, config):
        try:
            check()
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error


def agent_checks(agent: type[Agent], config: Any = None) -> Iterator[tuple[str, Callable[[], None]]]:
    """The checks of `check_agent` one by one, with their names: to be parametrised over by a test suite."""
    for kind in agent.action_kinds:
        problem = Problem(agent, kind, config)
        for check in CHECKS:
            if problem.from_transitions or check not in OF_TRANSITIONS:
                yield f"{check.__name__.removeprefix('check_')} ({kind})", partial(check, problem)


def train(agent: Agent, data: list[Any]) -> dict[str, Tensor]:
    """Metrics of the last update."""
    metrics: dict[str, Tensor] = {}
    for batch in data:
        metrics = dict(agent.update(batch))
    return metrics


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], what: str = "numbers") -> None:
    """Bit for bit."""
    assert left.keys() == right.keys(), f"{what} have other names: {sorted(left.keys() ^ right.keys())[:3]}"
    different = [name for name, tensor in left.items() if not torch.equal(tensor, right[name])]
    assert not different, f"{what} differ: {', '.join(different[:5])}"


def _assert_close(found: Tensor, expected: Tensor, name: str, rtol: float) -> None:
    assert found.shape == expected.shape, f"{name} has shape {list(found.shape)}, {list(expected.shape)} expected"
    assert torch.allclose(found, expected, rtol=rtol, atol=1e-10, equal_nan=True), f"{name} differs"


# The checks


def check_seeds_learn_alone_as_beside_others(problem: Problem) -> None:
    """To 1e-10 in float64, not bit for bit: a batch of products may sum in another order than one, and Adam divides by small numbers."""
    seeds = [7, 0, 3]
    together = problem.build(seeds)
    data = problem.batches(12, seeds=len(seeds))
    metrics = train(together, data)
    state = together.state_dict()
    for k, seed in enumerate(seeds):
        alone = problem.build([seed])
        own_metrics = train(alone, [map_batch(partial(_rows_of_seed, k), batch) for batch in data])
        for part, tensor in alone.state_dict().items():
            _assert_close(state[part][k : k + 1], tensor, f"{part} of seed {seed} beside others", 1e-10)
        for metric, value in own_metrics.items():
            _assert_close(metrics[metric][k : k + 1], value, f"{metric} of seed {seed} beside others", 1e-8)


def _rows_of_seed(k: int, values: Tensor) -> Tensor:
    return values[k : k + 1]


def check_seeds_start_and_stay_different(problem: Problem) -> None:
    """Other seeds have other weights."""
    agent = problem.build(2)
    train(agent, [map_batch(lambda t: t.expand(2, *t.shape[1:]), batch) for batch in problem.batches(3)])
    weights = {n: t for n, t in agent.state_dict().items() if n.endswith("weight") and not n.startswith("optimizer")}
    assert weights, "the state holds no weights"
    same = [n for n, tensor in weights.items() if ".norms." not in n and torch.equal(tensor[0], tensor[1])]
    assert not same, f"two seeds have the same {same[0]}"


def check_resumed_training_ends_the_same(problem: Problem) -> None:
    """Bit for bit, from a state dict, whatever the agent was before."""
    data = problem.batches(12, seeds=2)
    whole = problem.build([5, 6])
    train(whole, data[:7])
    stored = whole.state_dict()
    metrics = train(whole, data[7:])
    resumed = problem.build([5, 6])
    train(resumed, problem.batches(2, seeds=2, start=100))  # whatever it was before is forgotten
    resumed.load_state_dict(stored)
    assert_same(train(resumed, data[7:]), metrics, "metrics after resuming")
    assert_same(resumed.state_dict(), whole.state_dict(), "states after resuming")


def check_training_is_deterministic(problem: Problem) -> None:
    """Global randomness has no part in it."""
    first, second = problem.build(2), problem.build(2)
    data = problem.batches(6, seeds=2)
    torch.manual_seed(1)
    metrics = train(first, data)
    torch.manual_seed(2)
    assert_same(train(second, data), metrics, "metrics of two runs")
    assert_same(first.state_dict(), second.state_dict(), "states of two runs")


def check_state_leads_with_the_seeds_and_is_a_copy(problem: Problem) -> None:
    """A state dict is a snapshot whose tensors all lead with the seed axis."""
    agent = problem.build(3)
    before = agent.state_dict()
    odd = [n for n, tensor in before.items() if tensor.shape[0] != 3 or not tensor.is_contiguous()]
    assert not odd, f"{odd[0]} does not lead with the seed axis, or is not contiguous"
    kept = {n: t.clone() for n, t in before.items()}
    train(agent, problem.batches(4, seeds=3))
    assert_same(before, kept, "the state dict changed with training: its tensors")
    after = agent.state_dict()
    assert (after["step"] == 4).all(), "step does not count the updates"
    changed = {n.partition(".")[0] for n in after if not torch.equal(after[n], before[n])}
    assert changed >= {"policy", "optimizer", "step"}, f"training changed {sorted(changed)} only"
    try:
        agent.load_state_dict({n: t for n, t in after.items() if n != "step"})
    except ConfigError:
        return
    raise AssertionError("a state dict with a part missing is loaded")


def check_metrics(problem: Problem) -> None:
    """`group/name` -> `[S]`, without gradients."""
    agent = problem.build(2)
    for batch in problem.batches(4, seeds=2):
        for metric, value in agent.update(batch).items():
            group, _, rest = metric.partition("/")
            assert group and rest, f"metric {metric!r} is not called group/name"  # noqa: PT018
            assert value.shape == (2,), f"{metric} has shape {list(value.shape)}, not one number per seed"
            assert not value.requires_grad, f"{metric} carries a gradient"
            assert value.dtype in (torch.float64, torch.bool), f"{metric} is {value.dtype}, not the agent's dtype"


def check_three_hundred_updates_stay_finite(problem: Problem) -> None:
    """In float32, on rewards of size one."""
    agent = problem.build(dtype=torch.float32)
    data = problem.batches(100, dtype=torch.float32)
    finite: dict[str, list[Tensor]] = {}
    for batch in data * 3:
        for metric, value in agent.update(batch).items():
            finite.setdefault(metric, []).append(value.isfinite())
    infinite = [metric for metric, seen in finite.items() if not torch.cat([part.flatten() for part in seen]).all()]
    assert not infinite, f"{', '.join(infinite)} did not stay finite"
    odd = [n for n, t in agent.state_dict().items() if t.is_floating_point() and not t.isfinite().all()]
    assert not odd, f"{odd[0]} did not stay finite"


def check_update_never_waits_for_the_device(problem: Problem) -> None:
    """No `.item()`, no `if tensor`, no mask, no copy to the host."""
    agent = problem.build(2, torch.float32)
    data = problem.batches(4, seeds=2, dtype=torch.float32)
    with NoHostMethods(), NoSynchronisation():  # type: ignore[no-untyped-call]
        train(agent, data)


def check_terminated_steps_ignore_what_follows(problem: Problem) -> None:
    """A terminated step bootstraps nothing."""
    ended = [dataclasses.replace(b, terminations=torch.ones_like(b.terminations)) for b in problem.batches(4)]
    elsewhere = [dataclasses.replace(b, next_observations=b.next_observations + 5.0) for b in ended]
    first, second = problem.build(), problem.build()
    train(first, ended)
    train(second, elsewhere)
    trained = {n: t for n, t in first.state_dict().items() if n.startswith(("policy", "critic", "value"))}
    assert trained, "the state holds no policy, critic or value"
    other = {n: t for n, t in second.state_dict().items() if n in trained}
    assert_same(trained, other, "a terminated step bootstraps: weights")


def check_truncated_steps_bootstrap(problem: Problem) -> None:
    """A truncated step is like any other."""
    data = problem.batches(4)
    cut = [dataclasses.replace(b, truncations=torch.ones_like(b.truncations)) for b in data]
    first, second = problem.build(), problem.build()
    train(first, data)
    train(second, cut)
    assert_same(first.state_dict(), second.state_dict(), "truncations change what is learned: weights")


def check_values_bootstrap_from_the_next_observation(problem: Problem) -> None:
    """Values of a step that does not end depend on where it leads."""
    running = [dataclasses.replace(b, terminations=torch.zeros_like(b.terminations)) for b in problem.batches(4)]
    elsewhere = [dataclasses.replace(b, next_observations=b.next_observations + 5.0) for b in running]
    first, second = problem.build(), problem.build()
    train(first, running)
    train(second, elsewhere)
    estimates = [n for n in first.state_dict() if n.startswith(("critic.", "value.")) and n.endswith("weight")]
    for part in estimates:
        assert not torch.equal(first.state_dict()[part], second.state_dict()[part]), (
            f"{part} does not depend on the next observations"
        )


def check_returns_of_several_steps(problem: Problem) -> None:
    """k steps are worth gamma^k: as an agent that discounts so in every step; an agent that has no use for such returns refuses them."""
    data = problem.batches(4)
    if not problem.agent.several_steps:
        try:
            train(problem.build(), [_of_steps(batch, 3, 0.5) for batch in data])
        except ConfigError:
            return
        raise AssertionError(
            "returns of several steps are taken for rewards; set several_steps, or refuse them (normalize does)"
        )
    gamma = 0.9
    first, second = (
        Problem(problem.agent, problem.kind, dataclasses.replace(problem.config, discount=discount)).build()
        for discount in (gamma, gamma**3)
    )
    train(first, [_of_steps(batch, 3, gamma) for batch in data])
    train(second, data)
    expected = second.state_dict()
    for name, tensor in first.state_dict().items():
        _assert_close(tensor, expected[name], f"{name} after returns of three steps", 1e-8)


def _of_steps(batch: Any, count: int, discount: float) -> LookaheadBatch:
    """The batch as one whose rewards are returns of `count` steps."""
    parts = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    steps = torch.full(batch.rewards.shape, count)
    return LookaheadBatch(**{"rows": steps, **parts, "steps": steps, "discount": discount})


def check_config_is_frozen_and_explained(problem: Problem) -> None:
    """A frozen dataclass on `rlkit2.fields.Checked`, with a comment above every field."""
    cls = type(problem.config)
    assert dataclasses.is_dataclass(cls), f"{cls.__name__} is not a dataclass"
    assert issubclass(cls, Checked), f"{cls.__name__} does not build on rlkit2.fields.Checked"
    first = dataclasses.fields(cls)[0].name
    try:
        setattr(problem.config, first, getattr(problem.config, first))
    except dataclasses.FrozenInstanceError:
        pass
    else:
        raise AssertionError(f"{cls.__name__} is not frozen")
    unexplained = [field for field, _, _, comment in describe_fields(cls) if not comment]
    assert not unexplained, f"{cls.__name__}.{unexplained[0]} has no comment, which is its help"
    assert cls.__doc__, f"{cls.__name__} has no docstring"


OF_TRANSITIONS = (
    check_terminated_steps_ignore_what_follows,
    check_truncated_steps_bootstrap,
    check_values_bootstrap_from_the_next_observation,
    check_returns_of_several_steps,
)
CHECKS: tuple[Callable[[Problem], None], ...] = (
    check_config_is_frozen_and_explained,
    check_metrics,
    check_state_leads_with_the_seeds_and_is_a_copy,
    check_training_is_deterministic,
    check_resumed_training_ends_the_same,
    check_seeds_start_and_stay_different,
    check_seeds_learn_alone_as_beside_others,
    check_update_never_waits_for_the_device,
    *OF_TRANSITIONS,
    check_three_hundred_updates_stay_finite,
)


# What asks the device for a value

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


class NoSynchronisation(TorchDispatchMode):  # type: ignore[no-untyped-call]
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


# Batches and configs


def random_batch(
    seeds: int,
    rows: int,
    observation_size: int,
    action_size: int,
    *,
    discrete: bool = False,
    choices: tuple[Sequence[int], Sequence[int]] | None = None,
    dtype: torch.dtype = torch.float32,
    generator: int = 0,
    termination_rate: float = 0.2,
    next_actions: bool = False,
) -> Batch:
    """Transitions without structure; actions reach the bounds exactly now and then, as recorded ones do.

    `discrete`: int64 choices `[S, B]`; `choices`: sizes and first values of several, int64 `[S, B, k]`. `next_actions`: a `LookaheadBatch`.
    """
    draw = torch.Generator().manual_seed(generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(seeds, rows, *shape, generator=draw, dtype=torch.float64).to(dtype)

    actions = (1.5 * torch.rand(seeds, rows, action_size, generator=draw, dtype=torch.float64) - 0.75) * 2.0
    chosen = torch.randint(0, action_size, (seeds, rows), generator=draw)
    if choices is not None:
        several = [
            torch.randint(0, size, (seeds, rows), generator=draw) + first for size, first in zip(*choices, strict=True)
        ]
        chosen = torch.stack(several, -1)
    ends = torch.rand(seeds, rows, generator=draw)
    batch = Batch(
        observations=normal(observation_size),
        actions=chosen if discrete or choices is not None else actions.clamp(-1.0, 1.0).to(dtype),
        rewards=normal(),
        next_observations=normal(observation_size),
        terminations=ends < termination_rate,
        truncations=ends > 0.9,
    )
    if not next_actions:
        return batch
    following = batch.actions.roll(1, 1)
    followed = torch.rand(seeds, rows, generator=draw) < 0.7
    number = torch.arange(rows).expand(seeds, -1)
    return LookaheadBatch(**vars(batch), rows=number, next_actions=following, followed=followed)


def random_preferences(
    seeds: int, rows: int, observation_size: int, action_size: int, *, generator: int = 0, **options: Any
) -> PreferenceBatch:
    """Pairs of segments of 3 steps with labels of every kind, and two transitions beside each."""
    steps = random_batch(seeds, rows * 6, observation_size, action_size, generator=generator, **options)
    draw = torch.Generator().manual_seed(1000 + generator)
    return PreferenceBatch(
        segments=map_batch(lambda t: t.view(seeds, rows, 2, 3, *t.shape[2:]), steps),
        label_mass=torch.randint(0, 3, (seeds, rows), generator=draw) / 2.0,
        transitions=random_batch(seeds, rows * 2, observation_size, action_size, generator=generator, **options),
    )


def random_sequences(
    seeds: int, rows: int, observation_size: int, action_size: int, *, generator: int = 0, **options: Any
) -> SequenceBatch:
    """Windows of 4 steps without structure, most of which reach beyond the end of an episode."""
    length = 4
    steps = random_batch(seeds, rows * length, observation_size, action_size, generator=generator, **options)
    draw = torch.Generator().manual_seed(2000 + generator)
    windows = map_batch(lambda t: t.view(seeds, rows, length, *t.shape[2:]), steps)
    many = torch.randint(1, length + 1, (seeds, rows, 1), generator=draw)
    place = torch.arange(length)
    first = torch.randint(0, 900, (seeds, rows, 1), generator=draw)
    return SequenceBatch(
        observations=windows.observations,
        actions=windows.actions,
        returns_to_go=windows.rewards.flip(-1).cumsum(-1).flip(-1),
        timesteps=first + torch.minimum(place, many - 1),
        known=place < many,
        best_return=windows.rewards.new_full((seeds,), 3.0),
    )


def random_rollouts(
    seeds: int, rows: int, observation_size: int, action_size: int, *, generator: int = 0, **options: Any
) -> RolloutBatch:
    """Transitions without structure with what one member would make of them."""
    steps = random_batch(seeds, rows, observation_size, action_size, generator=generator, **options)
    draw = torch.Generator().manual_seed(3000 + generator)
    drawn = [torch.randn((seeds, *lead, rows), generator=draw).to(steps.rewards) for lead in ((), (), (1,))]
    own = {field.name: getattr(steps, field.name) for field in dataclasses.fields(Batch)}
    return RolloutBatch(**own, log_probs=drawn[0] - 2.0, advantages=drawn[1], returns=drawn[2])


def batch_maker(agent: type[Agent]) -> Callable[..., Any]:
    """What makes random batches for an agent's class; arguments as for `random_batch`."""
    kind = agent.learns_from
    if kind == "transitions":
        return partial(random_batch, next_actions=agent.needs_next_actions)
    return {"preferences": random_preferences, "sequences": random_sequences, "rollouts": random_rollouts}[kind]


def map_batch(change: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """A batch, or a batch of batches, with `change` done to every tensor."""
    parts = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    changed = {
        name: change(part) if isinstance(part, Tensor) else map_batch(change, part)
        for name, part in parts.items()
        if isinstance(part, Tensor) or dataclasses.is_dataclass(part)
    }
    return dataclasses.replace(batch, **changed)


def small_config(make: Callable[..., Any], config_class: type[Any], **overrides: Any) -> Any:
    """What `make` makes, with two layers of 16 in every network; lists of widths are found by their name."""
    widths = {
        f.name: (16, 16)
        for f in dataclasses.fields(config_class)
        if f.name == "hidden_sizes" or f.name.endswith("_hidden_sizes")
    }
    return make(**{**widths, **overrides})
