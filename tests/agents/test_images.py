"""Agents on images: the contract that all agents keep on vectors, and what is said where images cannot be learnt from."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from rlkit2 import load_policy
from rlkit2.agents import agent_class, list_agents, make_agent, make_config
from rlkit2.agents.base import Agent
from rlkit2.data import Batch, DatasetSpec
from rlkit2.errors import ConfigError
from rlkit2.nn import Image
from rlkit2.testing import (
    Problem,
    check_metrics,
    check_resumed_training_ends_the_same,
    check_seeds_learn_alone_as_beside_others,
    check_update_never_waits_for_the_device,
    random_batch,
    small_config,
)

# What an encoder could break; the others do not look at observations.
CHECKS = (
    check_metrics,
    check_resumed_training_ends_the_same,
    check_seeds_learn_alone_as_beside_others,
    check_update_never_waits_for_the_device,
)
SHAPE, ACTIONS, ROWS = (8, 7, 2), 3, 6
SIZE = 8 * 7 * 2
CASES = [
    ("bc", "discrete", {"random_shift": 2}),
    ("iql", "continuous", {"random_shift": 1}),
    ("iql", "discrete", {"encoder": "impala"}),
    ("odice", "continuous", {"encoder": "none"}),
    ("odice", "discrete", {}),
    ("td3bc", "continuous", {}),
    ("rebrac", "continuous", {}),
    ("awac", "discrete", {}),
    ("crr", "continuous", {}),
    ("dqn", "discrete", {"critic": "ggd"}),
    ("cql", "discrete", {}),
    ("iql", "discrete", {"shared_encoder": True}),
    ("odice", "continuous", {"shared_encoder": True}),
    ("odice", "discrete", {"shared_encoder": True, "projection": "layer"}),
    ("td3bc", "continuous", {"shared_encoder": True}),
]


class Seen(Problem):
    """An agent on small images."""

    def build(self, seeds: Any = 1, dtype: torch.dtype = torch.float64) -> Agent:
        images = [Image(0, SHAPE)]
        discrete = self.kind == "discrete"
        return self.agent(self.config, SIZE, ACTIONS, seeds=seeds, dtype=dtype, discrete=discrete, images=images)

    def batches(self, count: int, *, seeds: int = 1, dtype: torch.dtype = torch.float64, start: int = 0) -> list[Batch]:
        ahead = self.agent.needs_next_actions
        return [images(seeds, self.kind == "discrete", dtype, start + t, ahead) for t in range(count)]


def images(
    seeds: int, discrete: bool, dtype: torch.dtype = torch.float32, generator: int = 0, next_actions: bool = False
) -> Batch:
    """Transitions between images without structure."""
    batch = random_batch(
        seeds, ROWS, 1, ACTIONS, discrete=discrete, dtype=dtype, generator=generator, next_actions=next_actions
    )
    draw = torch.Generator().manual_seed(generator)
    seen = [torch.randint(0, 256, (seeds, ROWS, *SHAPE), generator=draw, dtype=torch.uint8) for _ in range(2)]
    return dataclasses.replace(batch, observations=seen[0], next_observations=seen[1])


def problem(name: str, kind: str, options: dict[str, Any]) -> Seen:
    cls = agent_class(name)
    return Seen(cls, kind, small_config(partial(make_config, name), cls.config_class, **options))


@pytest.mark.parametrize(("name", "kind", "options"), CASES)
@pytest.mark.parametrize("check", CHECKS)
def test_contract_on_images(check: Any, name: str, kind: str, options: dict[str, Any]) -> None:
    check(problem(name, kind, options))


@pytest.mark.parametrize(("name", "kind", "options"), CASES)
def test_a_saved_policy_acts_as_before(name: str, kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    agent = problem(name, kind, options).build([4, 2], torch.float32)
    batch = images(2, kind == "discrete", next_actions=agent.needs_next_actions)
    agent.update(batch)
    agent.policy.save(tmp_path)
    seen = batch.observations
    assert torch.equal(load_policy(tmp_path)(seen), agent.policy(seen))
    torch.testing.assert_close(load_policy(tmp_path, 1)(seen[1]), agent.policy(seen)[1])
    assert torch.equal(agent.policy(seen), agent.policy(seen.flatten(2).float()))  # rows of numbers are as good
    sample = agent.policy(seen, deterministic=False, generator=torch.Generator().manual_seed(0))
    assert sample.shape == agent.policy(seen).shape


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
@pytest.mark.parametrize("name", [name for name in list_agents() if agent_class(name).sees_images])
def test_a_shared_encoder_is_trained_by_one_network_alone(name: str, kind: str) -> None:
    if kind not in agent_class(name).action_kinds or agent_class(name).learns_from != "transitions":
        pytest.skip("not for these actions or batches")
    agents = [problem(name, kind, {"shared_encoder": shared}).build(2) for shared in (False, True)]
    for step in range(3):
        batch = images(2, kind == "discrete", torch.float64, step, agents[0].needs_next_actions)
        for agent in agents:
            agent.learn(batch)
    own, shared = (agent.state_dict() for agent in agents)
    encoders = [
        key for key in own if ".encoders." in key and not key.startswith("optimizer.") and "_target." not in key
    ]
    lender = "policy" if hasattr(agents[0].config, "policy_head") else "critic"
    trained = [
        {key.split(".")[1] for key in state if key.startswith("optimizer.") and ".encoders." in key}
        for state in (own, shared)
    ]
    assert trained[1] == {lender}
    for key in encoders:
        assert torch.equal(shared[key], shared[f"{lender}.{key.partition('.')[2]}"])
    differ = any(not torch.equal(own[key], own[f"{lender}.{key.partition('.')[2]}"]) for key in encoders)
    assert differ == (len(trained[0]) > 1)
    moved = problem(name, kind, {"shared_encoder": True}).build(2)
    moved.load_state_dict(shared)
    assert all(torch.equal(a, shared[key]) for key, a in moved.state_dict().items())


def test_learning_tells_a_bright_side_from_a_dark_one() -> None:
    """A task with one pixel-sized cause: the action is the side of the image that is bright."""
    agent = problem("bc", "discrete", {"learning_rate": 3e-3}).build(2, torch.float32)
    draw = torch.Generator().manual_seed(0)

    def bright(rows: int) -> tuple[Tensor, Tensor]:
        actions = torch.randint(0, 2, (2, rows), generator=draw)
        seen = torch.randint(0, 100, (2, rows, *SHAPE), generator=draw, dtype=torch.uint8)
        for action, half in ((0, slice(0, 4)), (1, slice(4, 8))):
            seen[:, :, half] += 100 * (actions == action)[..., None, None, None].to(torch.uint8)
        return seen, actions

    for _ in range(60):
        seen, actions = bright(ROWS)
        agent.update(dataclasses.replace(images(2, True), observations=seen, actions=actions))
    seen, actions = bright(50)
    assert (agent.policy(seen) == actions).float().mean() > 0.95


@pytest.mark.parametrize("name", [n for n in list_agents() if not agent_class(n).sees_images])
def test_other_agents_refuse_images_in_one_line(name: str) -> None:
    cls = agent_class(name)
    kind = spaces.Box(-1, 1, (2,), np.float32) if "continuous" in cls.action_kinds else spaces.Discrete(3)
    for space in (spaces.Box(0, 255, SHAPE, np.uint8), spaces.Dict(a=spaces.Box(0, 255, SHAPE, np.uint8))):
        spec = DatasetSpec(observation_space=space, action_space=kind)
        with pytest.raises(
            ConfigError,
            match=r"does not learn from images; choose bc, td3bc, rebrac, iql, sql, xql, awac, crr, odice, dqn or cql",
        ) as info:
            make_agent(make_config(name), spec)
        assert "\n" not in str(info.value)


def test_networks_that_cannot_fit_are_refused_before_they_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlkit2.training import building

    spec = DatasetSpec(observation_space=spaces.Box(0, 255, (512, 512, 3), np.uint8), action_space=spaces.Discrete(3))
    monkeypatch.setattr(building, "total_memory", lambda device: 8 << 30)
    device = torch.device("cpu")
    with pytest.raises(
        ConfigError, match=r"a layer of 256 units on 786432 inputs takes at least 9 GiB with 1 seed, .* encoder"
    ):
        building.check_weights(make_config("bc", encoder="none"), spec, 1, device)
    building.check_weights(make_config("bc"), spec, 1, device)
    with pytest.raises(ConfigError, match="with 20 seeds"):
        building.check_weights(make_config("bc"), spec, 20, device)


def test_what_images_cost_is_said() -> None:
    from rlkit2.training.building import describe_images, update_memory

    agent = problem("iql", "discrete", {"encoder": "impala"}).build(1, torch.float32)
    plain = problem("iql", "discrete", {"encoder": "none"}).build(1, torch.float32)
    assert update_memory(agent, 1, 10) > update_memory(plain, 1, 10)
    data = type("Data", (), {"nbytes": 3 << 20})()
    assert str(describe_images(agent, data, 2, 10)).startswith(  # type: ignore[arg-type]
        "images of 8 x 7 pixels with 2 channels, encoder impala; memory at least: weights and optimisers "
    )
