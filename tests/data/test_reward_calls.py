"""Rewards of every usual signature are called with what they mean; what cannot be told is refused, and a refusal says what was tried."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from rlkit2.data import Batch, DatasetSpec, DatasetWarning
from rlkit2.data.reward_calls import FIELDS, NAMES, RewardCall, Signature, reads_infos
from rlkit2.errors import RewardError

ROWS = 7


def steps(*, discrete: bool = False, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        observations=torch.randn(ROWS, 3, generator=generator, dtype=dtype),
        actions=torch.arange(ROWS) % 3 + 1 if discrete else torch.randn(ROWS, 2, generator=generator, dtype=dtype),
        rewards=torch.zeros(ROWS),
        next_observations=torch.randn(ROWS, 3, generator=generator, dtype=dtype),
        terminations=torch.arange(ROWS) % 2 == 0,
        truncations=torch.zeros(ROWS, dtype=torch.bool),
    )


def box(size: int) -> spaces.Box:
    return spaces.Box(-10, 10, (size,), np.float32)


CONTINUOUS = DatasetSpec(observation_space=box(3), action_space=box(2))
DISCRETE = DatasetSpec(observation_space=box(3), action_space=spaces.Discrete(3, start=1))
GOALS = DatasetSpec(
    observation_space=spaces.Dict({"observation": box(1), "achieved_goal": box(1), "desired_goal": box(2)}),
    action_space=box(2),
)


def module(forward: Any) -> nn.Module:
    made = nn.Module()
    made.forward = forward  # type: ignore[method-assign]
    return made


def test_every_known_name_in_every_order() -> None:
    """Functions with parameters of known names, in any order and number, get the fields of these names."""
    batch, rng = steps(), np.random.default_rng(0)
    by_field = {field: [name for name, known in NAMES.items() if known == field] for field in FIELDS}
    for count in range(1, 5):
        for fields in itertools.permutations(FIELDS, count):
            names = [str(rng.choice(by_field[field])) for field in fields]
            seen: list[Any] = []
            scope: dict[str, Any] = {"seen": seen, "zeros": torch.zeros(ROWS)}
            exec(f"def f({', '.join(names)}):\n    seen[:] = [{', '.join(names)}]\n    return zeros", scope)
            RewardCall("r", scope["f"])(batch)
            assert all(got is getattr(batch, field) for got, field in zip(seen, fields, strict=True)), names


@pytest.mark.parametrize("kind", ["function", "module"])
def test_places_keywords_and_options(kind: str) -> None:
    batch = steps()
    o, a, n = batch.observations[:, 0], batch.actions[:, 0], batch.next_observations[:, 0]
    cases: list[tuple[Any, torch.Tensor]] = [
        (lambda obs, act: obs[:, 0] * act[:, 0], o * a),
        (lambda x, y, z: x[:, 0] - y[:, 0] + z[:, 0], o - a + n),
        (lambda state, action, next_state, done: next_state[:, 0] * ~done, n * ~batch.terminations),
        (lambda next_obs, action: next_obs[:, 0] + action[:, 0], n + a),
        (lambda obs, *, next_obs: obs[:, 0] + 2 * next_obs[:, 0], o + 2 * n),
        (lambda obs, act, scale=3.0: scale * act[:, 0], 3 * a),
        (lambda obs, act, **rest: act[:, 0], a),
        (lambda *given: given[2][:, 0], n),
        (lambda o, a, n, t: n[:, :1], n),
    ]
    for function, expected in cases:
        reward = module(function) if kind == "module" else function
        torch.testing.assert_close(RewardCall("r", reward)(batch), expected)


def test_what_cannot_be_told_is_refused() -> None:
    for function, message in (
        (lambda: 1, "takes nothing that is known"),
        (lambda obs, timestep: obs[:, 0], "what 'timestep' should be given cannot be told"),
        (lambda x, obs: obs[:, 0], "what 'x' should be given cannot be told"),
        (lambda obs, *, clock: obs[:, 0], "needs 'clock', which no step has"),
        (nn.Linear, "is a class"),
        (lambda obs: obs, r"shape \[7, 3\] for 7 transitions"),
        (lambda obs: obs.sum(), r"shape \[\] for 7 transitions"),
        (lambda obs: "high", "gives no numbers"),
        (lambda obs, infos: infos["speed"], "reads infos, and the data have none"),
        (
            lambda obs, act: obs @ act,
            r"observations, actions \(tensors\): .*; observations, actions \(NumPy arrays\): ",
        ),
        (lambda obs: 1 / 0, "division by zero"),
    ):
        with pytest.raises(RewardError, match=message):
            RewardCall("r", function, CONTINUOUS)(steps())


def test_numpy_functions() -> None:
    batch = steps()
    with pytest.warns(DatasetWarning, match=r"r is called with observations, actions \(NumPy arrays\)"):
        found = RewardCall("r", lambda obs, act: np.abs(obs[:, 0].astype(np.float64)) + act.max(axis=1), CONTINUOUS)(
            batch
        )
    torch.testing.assert_close(found, batch.observations[:, 0].double().abs() + batch.actions.amax(1).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_modules_get_their_own_precision_and_keep_their_state(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.9), nn.BatchNorm1d(4), nn.Linear(4, 1)).to(dtype).train()
    before = {name: part.clone() for name, part in net.state_dict().items()}
    batch = steps(dtype=torch.float64)
    with pytest.warns(DatasetWarning, match="one tensor of observations and actions"):
        found = RewardCall("net", net, CONTINUOUS)(batch)
    assert net.training
    assert not found.requires_grad
    assert all(torch.equal(part, before[name]) for name, part in net.state_dict().items())
    rows = torch.cat([batch.observations, batch.actions], 1).to(dtype)
    torch.testing.assert_close(found, net.eval()(rows).squeeze(1).detach())


def test_discrete_actions_of_modules() -> None:
    """As numbers of choices where a module takes them so (an embedding), one-hot where it does not."""
    batch, embedding = steps(discrete=True), nn.Embedding(4, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = RewardCall("e", module(lambda obs, act: embedding(act)), DISCRETE)(batch)
    torch.testing.assert_close(found, embedding(batch.actions).squeeze(1).detach())
    layer = nn.Linear(6, 1)

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layer(torch.cat([state, action], 1))
            return out

    rows = torch.cat([batch.observations, nn.functional.one_hot(batch.actions - 1, 3).float()], 1)
    with pytest.warns(DatasetWarning, match="actions one-hot"):
        torch.testing.assert_close(RewardCall("j", Joined(), DISCRETE)(batch), layer(rows).squeeze(1).detach())


def test_dict_observations() -> None:
    spec = DatasetSpec(**{**vars(GOALS), "observation_keys": ("achieved_goal", "desired_goal")})
    batch = steps()
    for library in (torch, np):
        function = lambda obs, act, next_obs: library.abs(next_obs["desired_goal"][:, 1] - obs["achieved_goal"][:, 0])  # noqa: E731, B023
        with pytest.warns(DatasetWarning, match="observations by key: achieved_goal, desired_goal"):
            found = RewardCall("r", function, spec)(batch)
        torch.testing.assert_close(
            found, (batch.next_observations[:, 2] - batch.observations[:, 0]).abs(), check_dtype=False
        )
    with pytest.raises(RewardError, match=r"by key: observation, desired_goal\): no key .*achieved_goal"):
        RewardCall("r", lambda obs: obs["achieved_goal"][:, 0], GOALS)(batch)


def test_infos() -> None:
    call = RewardCall("r", lambda obs, info: info["speed"] + obs[:, 0])
    torch.testing.assert_close(call(steps(), {"speed": torch.ones(ROWS)}), 1 + steps().observations[:, 0])
    assert reads_infos(lambda infos: 1)
    assert not reads_infos(lambda obs, act: 1)
    assert not reads_infos(np.zeros(3))
    assert str(Signature.of("r", lambda obs, *, done: 1)) == "observations, done=terminations"


class Network:
    """What imitation's reward networks look like from outside; raw steps of its spaces in, numbers out."""

    def __init__(self, action_space: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = spaces.Box(-10, 10, (3,)), action_space
        self.updated = 0

    def predict_processed(self, state: Any, action: Any, next_state: Any, done: Any, update_stats: bool = True) -> Any:
        self.updated += update_stats
        assert all(isinstance(part, np.ndarray) for part in (state, action, next_state, done))
        assert state.shape == next_state.shape == (ROWS, 3)
        assert action.shape == (ROWS, *(self.action_space.shape or ()))
        assert done.dtype == bool
        return state[:, 0] + action.reshape(ROWS, -1)[:, 0] + 2 * done


@pytest.mark.parametrize("discrete", [False, True])
def test_reward_networks_of_imitation(discrete: bool) -> None:
    batch, spec = steps(discrete=discrete), DISCRETE if discrete else CONTINUOUS
    network = Network(spec.action_space)
    for given in (spec, None):
        found = RewardCall("net", network, given)(batch)  # type: ignore[arg-type]
        expected = batch.observations[:, 0] + batch.actions.reshape(ROWS, -1)[:, 0] + 2 * batch.terminations
        torch.testing.assert_close(found, expected, check_dtype=False)
    assert network.updated == 0


@pytest.mark.parametrize("space", [box(4), spaces.Discrete(6)], ids=["box", "cells"])
@pytest.mark.parametrize("actions", [box(2), spaces.Discrete(3)], ids=["continuous", "discrete"])
def test_the_networks_of_the_real_package(space: spaces.Space[Any], actions: spaces.Space[Any]) -> None:
    nets = pytest.importorskip("imitation.rewards.reward_nets")
    norms = pytest.importorskip("imitation.util.networks")
    spec = DatasetSpec(observation_space=space, action_space=actions)
    state, following = (np.array([space.sample() for _ in range(ROWS)]) for _ in "ab")
    action, done = np.array([actions.sample() for _ in range(ROWS)]), np.arange(ROWS) % 2 == 0
    flat = [torch.as_tensor(spec.flattener.flatten(part)) for part in (state, following)]
    batch = Batch(
        observations=flat[0],
        actions=torch.as_tensor(action),
        rewards=torch.zeros(ROWS),
        next_observations=flat[1],
        terminations=torch.as_tensor(done),
        truncations=torch.zeros(ROWS, dtype=torch.bool),
    )
    basic = nets.BasicRewardNet(space, actions, use_next_state=True, use_done=True)
    shaped = nets.BasicShapedRewardNet(space, actions, discount_factor=0.9)
    for net in (basic, shaped, nets.NormalizedRewardNet(basic, norms.RunningNorm)):
        before = [part.clone() for part in net.state_dict().values()]
        expected = net.predict_processed(state, action, following, done, update_stats=False)
        np.testing.assert_array_equal(RewardCall("net", net, spec)(batch).numpy(), expected)
        assert all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values(), strict=True))
