"""Every registered agent learns two small problems with known answers: a contextual bandit and a linear-quadratic regulator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rlkit2.agents import agent_class, agent_kinds, list_agents, make_config, plain_name
from rlkit2.agents.base import Agent
from rlkit2.data import Batch
from rlkit2.data.batch import LookaheadBatch
from tests.agents.problems import small_config

UPDATES, AGAIN, ROWS, SIZE = 300, 50, 128, 3000
STARTS = SIZE // 15
DISCRETE_PUSH = torch.tensor([[0.0, 0.0], [0.6, 0.0], [-0.6, 0.0], [0.0, 0.6], [0.0, -0.6]])
SETTINGS: dict[str, dict[str, Any]] = {
    "edac": {"eta": 0.1},  # its diversity term is meant for returns in the thousands
    "fql": {"alpha": 1.0},  # meant to be tuned; rewards are of size one
}
ON_OTHER_DATA = ("odice_il", "p_iql")  # they change the rewards and learn as the class they build on
CLONES = ("bc",)
CASES = [
    (name, kind)
    for name in list_agents()
    for kind in ("continuous", "discrete")
    if plain_name(name) == name
    and name not in ON_OTHER_DATA
    and kind in agent_kinds(name)
    and getattr(agent_class(name), "learns_from", "transitions") == "transitions"
]
every_case = pytest.mark.parametrize(("name", "kind"), CASES, ids=["-".join(case) for case in CASES])


def learns(
    name: str, data: dict[str, Tensor], score: Callable[[Agent], float], wanted: float, actions: int | None = None
) -> bool:
    """Whether a small agent scores more than `wanted` within `UPDATES` updates, and still does `AGAIN` later or at the end.

    At ten times the usual step sizes; `actions` is the number of discrete ones.
    """
    kind = "continuous" if actions is None else "discrete"
    cls = agent_class(name, kind)
    fields = [f.name for f in dataclasses.fields(cls.config_class)]
    quick = {name: 3e-3 for name in fields if name.endswith("learning_rate")}
    quick |= {name: value for name, value in (("target_update_rate", 0.05), ("discount", 0.9)) if name in fields}
    config = small_config(partial(make_config, name, kind), cls.config_class, **quick, **SETTINGS.get(name, {}))
    size = data["observations"].shape[1]
    agent = cls(config, size, actions or data["actions"].shape[1], discrete=actions is not None)
    draw = torch.Generator().manual_seed(0)
    before = False
    for update in range(1, UPDATES + 1):
        rows = torch.randint(0, SIZE, (1, ROWS), generator=draw)
        batch = Batch(**{field: tensor[rows] for field, tensor in data.items()})
        if agent.needs_next_actions:  # steps of the episodes lie `STARTS` rows apart
            after, followed = (rows + STARTS).clamp(max=SIZE - 1), rows + STARTS < SIZE
            batch = LookaheadBatch(**vars(batch), rows=rows, next_actions=data["actions"][after], followed=followed)
        agent.update(batch)
        if update % AGAIN == 0:
            now = score(agent) > wanted
            if now and (before or update == UPDATES):
                return True
            before = now
    return False


def transitions(
    observations: Tensor, actions: Tensor, rewards: Tensor, following: Tensor, ended: bool
) -> dict[str, Tensor]:
    flags = torch.full((len(rewards),), ended)
    return {
        "observations": observations,
        "actions": actions,
        "rewards": rewards,
        "next_observations": following,
        "terminations": flags,
        "truncations": torch.zeros_like(flags),
    }


# Contextual bandit: reward 1 - |a - a*(s)|^2, or 1 for the right one of three choices; every step ends the episode


def best_action(contexts: Tensor) -> Tensor:
    return 0.8 * torch.tanh(2.0 * contexts[:, :2])


def best_choice(contexts: Tensor) -> Tensor:
    return contexts[:, :3].argmax(1)


def bandit_reward(contexts: Tensor, actions: Tensor) -> Tensor:
    if actions.is_floating_point():
        return 1.0 - (actions - best_action(contexts)).square().sum(1)
    return (actions == best_choice(contexts)).float()


def bandit_data(kind: str) -> dict[str, Tensor]:
    """The behaviour goes half of the way, with much noise; discrete: the right choice every second time."""
    draw = torch.Generator().manual_seed(1)
    contexts = torch.randn(SIZE, 3, generator=draw)
    if kind == "discrete":
        random = torch.randint(0, 3, (SIZE,), generator=draw)
        actions = torch.where(torch.rand(SIZE, generator=draw) < 0.4, best_choice(contexts), random)
    else:
        actions = (0.5 * best_action(contexts) + 0.4 * torch.randn(SIZE, 2, generator=draw)).clamp(-1.0, 1.0)
    return transitions(contexts, actions, bandit_reward(contexts, actions), torch.zeros(SIZE, 3), True)


@every_case
def test_bandit(name: str, kind: str) -> None:
    """Far better than the data; agents that see rewards also beat the clone of a continuous behaviour, which reaches 0.80 of 1."""
    data = bandit_data(kind)
    contexts = torch.randn(500, 3, generator=torch.Generator().manual_seed(2))

    def reward(agent: Agent) -> float:
        return bandit_reward(contexts, agent.policy(contexts)).mean().item()

    assert data["rewards"].mean().item() < 0.6
    wanted = 0.9 if kind == "discrete" else 0.7 if name in CLONES else 0.83
    assert learns(name, data, reward, wanted, 3 if kind == "discrete" else None)


# Linear-quadratic regulator in two dimensions: x' = x + 0.5 u, r = -|x|^2 - 0.1 |u|^2, horizon 15 by truncation


def step(x: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    u = actions if actions.is_floating_point() else DISCRETE_PUSH[actions]
    return x + 0.5 * u, -x.square().sum(1) - 0.1 * u.square().sum(1)


def roll(act: Callable[[Tensor], Tensor], starts: int, seed: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """15 steps from random starts: states, actions, rewards and next states of every step."""
    x = torch.randn(starts, 2, generator=torch.Generator().manual_seed(seed))
    found = []
    for _ in range(15):
        actions = act(x)
        following, reward = step(x, actions)
        found.append((x, actions, reward, following))
        x = following
    return found


def behaviour(kind: str, draw: torch.Generator, x: Tensor) -> Tensor:
    """A timid controller with noise; discrete: the push against the larger coordinate, or any."""
    if kind == "continuous":
        return (-0.2 * x + 0.4 * torch.randn(x.shape, generator=draw)).clamp(-1.0, 1.0)
    axis = x.abs().argmax(1)
    against = 1 + 2 * axis + (x.gather(1, axis[:, None]).squeeze(1) > 0).long()
    random = torch.randint(0, 5, (len(x),), generator=draw)
    return torch.where(torch.rand(len(x), generator=draw) < 0.4, against, random)


@every_case
def test_linear_quadratic_regulator(name: str, kind: str) -> None:
    """Less than three quarters of the behaviour's cost; with rewards and continuous actions, less than half (the clone: two thirds)."""
    draw = torch.Generator().manual_seed(3)
    steps = roll(partial(behaviour, kind, draw), STARTS, 4)
    data = transitions(*(torch.cat(column) for column in zip(*steps, strict=True)), False)

    def earned(agent: Agent) -> float:
        return sum(reward for _, _, reward, _ in roll(agent.policy, 200, 5)).mean().item()

    recorded = sum(reward for _, _, reward, _ in steps).mean().item()
    share = 0.5 if kind == "continuous" and name not in CLONES else 0.75
    assert learns(name, data, earned, share * recorded, 5 if kind == "discrete" else None)
