"""Actions of several choices, and of whole numbers: every choice is learnt and reached, or the agent is refused with the mend."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.distributions import Categorical

import rlkit2
from rlkit2.agents import agent_class, list_agents, make_agent, make_config, make_normalizer, plain_name
from rlkit2.data import Batch, DatasetSpec, Episode
from rlkit2.data.cache import Unpacked, pack_in_memory
from rlkit2.data.spaces import action_bounds, action_layout
from rlkit2.errors import ConfigError, UnsupportedSpaceError
from rlkit2.evaluation.rollouts import step_action
from rlkit2.nn import Normalizer, load_policy, make_actor
from rlkit2.nn.actors import MultiCategoricalActor
from rlkit2.testing import small_config

LEARNERS = [
    name
    for name in list_agents()
    if plain_name(name) == name
    and "multidiscrete" in agent_class(name).action_kinds
    and getattr(agent_class(name), "learns_from", "transitions") == "transitions"
    and name != "sql"  # it clones what is better than V, which is nothing where there are no rewards
]
OTHERS = [name for name in list_agents() if "multidiscrete" not in agent_class(name).action_kinds]


def several(seed: int) -> spaces.Space[Any]:
    """A space of several choices (or of one, in a column), of every family and shape, starts included."""
    draw = np.random.default_rng(seed)
    columns = int(draw.integers(1, 4))
    sizes, starts = draw.integers(1, 5, columns), draw.integers(-9, 10, columns)
    sizes[0] = max(sizes[0], 2)
    families: list[spaces.Space[Any]] = [
        spaces.MultiDiscrete(sizes, start=starts),
        spaces.MultiDiscrete(np.tile(sizes[:2], (2, 1))),
        spaces.MultiBinary(columns),
        spaces.MultiBinary([columns, 2]),
        spaces.Tuple([spaces.Discrete(int(n), start=int(first)) for n, first in zip(sizes, starts, strict=True)]),
        spaces.Dict({"a": spaces.MultiBinary(2), "b": spaces.Dict({"c": spaces.Discrete(3, start=int(starts[0]))})}),
    ]
    return families[seed % len(families)]


def contexts(space: spaces.Space[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """One observation for each of up to 40 actions, `[n, n]`, and the actions, `[n, k]`: every choice occurs."""
    low, high = (bound.astype(int) for bound in action_bounds(space))
    count = max(8, int((high - low).max()) + 1)
    rows = np.arange(count)[:, None] * (1 + np.arange(len(low)))  # columns turn at different speeds
    rows[: (high - low).max() + 1] = np.arange((high - low).max() + 1)[:, None]
    return torch.eye(count), torch.from_numpy(low + rows % (high - low + 1))


def cloned(name: str, space: spaces.Space[Any], updates: int = 60) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """An agent after cloning a table; its spec maps raw actions."""
    observations, actions = contexts(space)
    spec = DatasetSpec(observation_space=spaces.Box(0, 1, (observations.shape[1],)), action_space=space)
    cls = agent_class(name)
    fields = [f.name for f in dataclasses.fields(cls.config_class)]
    quick: dict[str, Any] = {field: 0.03 for field in fields if field.endswith("learning_rate")}
    quick |= {"weight": "conjugate_grad"} if "divergence" in fields else {}
    agent = make_agent(small_config(partial(make_config, name), cls.config_class, **quick), spec)
    rows = torch.arange(len(observations)).repeat(4).unsqueeze(0)
    flags = torch.ones(rows.shape, dtype=torch.bool)
    batch = Batch(
        observations=observations[rows],
        actions=actions[rows],
        rewards=torch.zeros(rows.shape),
        next_observations=observations[rows],
        terminations=flags,
        truncations=~flags,
    )
    for _ in range(updates):
        agent.update(batch)
    return agent, observations, actions


@pytest.mark.parametrize("seed", range(18))
def test_every_choice_is_reached(seed: int, tmp_path: Path) -> None:
    """Any space, agents in turn: the policy gives the table's own actions, also from its file, and samples stay inside the space."""
    space = several(seed)
    agent, observations, actions = cloned(LEARNERS[seed % len(LEARNERS)], space)
    found = agent.policy(observations)
    assert found.dtype == torch.int64
    assert torch.equal(found, actions)
    agent.policy.save(tmp_path)
    assert torch.equal(load_policy(tmp_path)(observations), actions)
    sampled = agent.policy(observations, deterministic=False, generator=torch.Generator().manual_seed(seed))
    for row in sampled.numpy():
        assert step_action(row.reshape(space.shape or -1), space) in space or space.contains(
            row.reshape(space.shape).astype(space.dtype)
        )


@pytest.mark.parametrize("name", OTHERS)
def test_others_refuse_with_the_mend(name: str) -> None:
    spec = DatasetSpec(observation_space=spaces.Box(-1, 1, (2,)), action_space=spaces.MultiDiscrete([3, 2]))
    with pytest.raises(ConfigError, match="choose bc, iql or odice"):
        make_agent(name, spec)
    assert {"bc", "iql", "odice"} <= set(LEARNERS)


def test_choices_beside_whole_numbers_are_refused() -> None:
    mixed = spaces.Tuple((spaces.Discrete(3), spaces.Box(0, 10, (1,), np.int64)))
    spec = DatasetSpec(observation_space=spaces.Box(-1, 1, (2,)), action_space=mixed)
    with pytest.raises(UnsupportedSpaceError, match="multidiscrete"):
        make_agent("bc", spec)


# The head against torch's own distributions


@pytest.mark.parametrize("choices", [(3, 2), (2,), (1, 4, 2), (2, 2, 2)])
def test_likelihood_is_the_product_of_categoricals(choices: tuple[int, ...]) -> None:
    size = sum(choices)
    actor = make_actor("multicategorical", 3, size, (8,), seeds=[0, 1], choices=choices, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    observations = torch.randn(2, 5, 3, generator=draw, dtype=torch.float64)
    chosen = torch.stack([torch.randint(0, n, (2, 5), generator=draw) for n in choices], -1)
    maps = Normalizer(choices=choices, seeds=2)
    columns = maps.actions(chosen, torch.float64)
    assert torch.equal(maps.environment_actions(columns), chosen)
    parts = actor.network(observations).split(choices, -1)
    expected = sum(Categorical(logits=part).log_prob(chosen[..., i]) for i, part in enumerate(parts))
    found = actor.log_prob(observations, columns)
    torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad(value.sum(), list(actor.parameters()), retain_graph=True) for value in (found, expected)
    ]
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other)
    assert torch.equal(maps.environment_actions(actor(observations)), torch.stack([p.argmax(-1) for p in parts], -1))


def test_samples_follow_the_probabilities() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, observations: torch.Tensor) -> torch.Tensor:
            return torch.tensor([0.5, 0.2, 0.3, 0.9, 0.1]).log().expand(*observations.shape[:2], 5)

    actor = MultiCategoricalActor(Fixed(), (3, 2))
    actor.settings = {"action_size": 5}
    observations = torch.zeros(1, 40_000, 1)
    noise = actor.draw_noise(observations, torch.Generator().manual_seed(0))
    shares = actor(observations, noise).mean((0, 1))
    assert shares.tolist() == pytest.approx([0.5, 0.2, 0.3, 0.9, 0.1], abs=0.012)  # five standard errors


def test_a_choice_outside_its_space_is_no_number() -> None:
    maps = Normalizer(choices=(3, 2), action_start=(1, 0))
    columns = maps.actions(torch.tensor([[[1, 0], [4, 0], [0, 1], [3, 1]]]))
    assert columns.isfinite().all(-1).tolist() == [[True, False, False, True]]


# Whole numbers of a Box


@pytest.mark.parametrize("seed", range(20))
def test_whole_numbers_there_and_back(seed: int) -> None:
    """Every whole number within the bounds comes back as itself, and what lies between goes to the nearest."""
    draw = np.random.default_rng(seed)
    kinds = (np.int8, np.uint8, np.int16, np.int32, np.int64)
    dtype = np.dtype(kinds[seed % 5])
    low = int(draw.integers(max(np.iinfo(dtype).min, -1000), 100))
    high = low + int(draw.integers(1, min(np.iinfo(dtype).max - low, 3000)))
    spec = DatasetSpec(observation_space=spaces.Box(-1, 1, (2,)), action_space=spaces.Box(low, high, (1,), dtype.type))
    maps = make_normalizer(spec).float()
    raw = torch.arange(low, high + 1, dtype=torch.float32).view(1, -1, 1)
    inner = maps.actions(raw)
    assert inner.abs().max() == 1.0
    assert torch.equal(maps.environment_actions(inner), raw)
    shift = 0.98 * torch.rand(raw.shape, generator=torch.Generator().manual_seed(seed)) - 0.49
    assert torch.equal(maps.environment_actions(inner + shift * 2 / (high - low)), raw)
    assert maps.environment_actions(torch.tensor([[[9.0], [-9.0]]])).flatten().tolist() == [high, low]


def test_whole_numbers_without_usable_bounds() -> None:
    """The bounds of int64 are none: the values pass unchanged and are rounded."""
    space = spaces.Box(np.iinfo(np.int64).min, np.iinfo(np.int64).max, (1,), np.int64)
    maps = make_normalizer(DatasetSpec(observation_space=spaces.Box(-1, 1, (2,)), action_space=space)).float()
    assert maps.actions(torch.tensor([[[7.0]]])).item() == 7.0
    assert maps.environment_actions(torch.tensor([[[7.4], [-120.6]]])).flatten().tolist() == [7.0, -121.0]


def test_bounds_of_nested_boxes_count() -> None:
    space = spaces.Dict({"a": spaces.Box(-2, 2, (1,)), "b": spaces.Box(0, 10, (1,))})
    maps = make_normalizer(DatasetSpec(observation_space=spaces.Box(-1, 1, (2,)), action_space=space))
    assert maps.environment_actions(torch.tensor([[[0.5, -1.0]]], dtype=torch.float64)).flatten().tolist() == [1.0, 0.0]


# From a dataset to a score


class Table(gymnasium.Env[Any, Any]):
    """The observation names a row of a table; the reward is minus the distance of the action to that row."""

    def __init__(self, space: spaces.Space[Any]) -> None:
        rows, self.table = contexts(space)
        self.rows = rows.numpy()
        self.action_space = space
        self.observation_space = spaces.Box(0, 1, (len(self.rows),))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps, self.row = 0, int(self.np_random.integers(len(self.rows)))
        return self.rows[self.row], {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        batched = _batched(action)
        reward = -float(
            np.abs(action_layout(self.action_space).flatten(batched)[0] - self.table[self.row].numpy()).sum()
        )
        self.steps, self.row = self.steps + 1, int(self.np_random.integers(len(self.rows)))
        return self.rows[self.row], reward, False, self.steps == 20, {}


def _batched(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _batched(part) for key, part in tree.items()}
    return tuple(map(_batched, tree)) if isinstance(tree, tuple) else np.asarray(tree)[None]


SCORED = {
    "multidiscrete": spaces.MultiDiscrete([3, 2]),
    "multibinary": spaces.MultiBinary(2),
    "whole numbers": spaces.Box(0, 10, (1,), np.int64),
    "tuple": spaces.Tuple((spaces.Discrete(3, start=4), spaces.MultiBinary(2))),
}


@pytest.mark.parametrize("kind", SCORED)
def test_a_cloned_expert_scores_like_the_expert(kind: str, tmp_path: Path) -> None:
    """Return 0, the expert's; the training says nothing in doubt."""
    space = SCORED[kind]
    rows, table = contexts(space)
    chosen = np.random.default_rng(0).integers(len(rows), size=401)
    actions = action_layout(space).unflatten(space, table.numpy()[chosen[:-1]])
    never = np.zeros(400, bool)
    episode = Episode("all", rows.numpy()[chosen], actions, np.zeros(400), never, never)
    spec = DatasetSpec(observation_space=spaces.Box(0, 1, (len(rows),)), action_space=space)
    data = pack_in_memory(Unpacked("table", spec, lambda: [episode]))
    config = make_config("bc", hidden_sizes=(32,), learning_rate=0.02)
    run = rlkit2.train(config, data, steps=150, batch_size=64, eval_every=0, out=tmp_path, progress=False)
    assert "warnings" not in run.manifest
    result = rlkit2.evaluate(run, episodes=5, env=lambda: Table(space))
    assert result.returns.tolist() == [[0.0] * 5]
