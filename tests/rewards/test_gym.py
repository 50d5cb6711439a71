"""Processes from Gymnasium environments: the reference vectors, published optima, absorbing and split states, enumeration."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

from rlkit2.errors import EnvironmentUnavailableError, RewardError
from rlkit2.rewards import TabularMDP, canonicalize, optimal_policy, policy_return, starc_distance, starc_matrix
from rlkit2.rewards.gym import from_table
from tests.rewards.vectors import load


@pytest.mark.parametrize(("prefix", "env"), [("FrozenLake", "FrozenLake-v1"), ("CliffWalking", "CliffWalking-v1")])
@pytest.mark.filterwarnings("ignore::rlkit2.rewards.RewardWarning")
def test_reference(prefix: str, env: str) -> None:
    file = load("starc_gym")
    discount = float(file[f"{prefix}_gamma"])
    mdp, reward = TabularMDP.from_gym(env, discount)
    rewards = file[f"{prefix}_R"]
    np.testing.assert_allclose(mdp.dense.numpy(), file[f"{prefix}_tau"], atol=1e-12)
    np.testing.assert_allclose(mdp.initial_distribution.numpy(), file[f"{prefix}_mu0"], atol=1e-12)
    on_support = mdp.dense.numpy() > 0
    np.testing.assert_allclose(reward[on_support], rewards[0][on_support], atol=1e-12)
    np.testing.assert_allclose(canonicalize(rewards, mdp), file[f"{prefix}_VAL"], atol=1e-9)
    matrix = starc_matrix(dict(zip(file[f"{prefix}_names"].tolist(), rewards, strict=True)), mdp)
    np.testing.assert_allclose(matrix.values, file[f"{prefix}_dist_VAL_2_2"], atol=2e-9)
    assert matrix.values[0, 1] < 1e-9
    assert matrix.values[0, 3] > (0.2 if prefix == "FrozenLake" else 1e-4)  # the shaping that forgets the terminals
    for index, values in enumerate(rewards):
        best = optimal_policy(values, mdp)
        assert policy_return(best, values, mdp) == pytest.approx(file[f"{prefix}_J_opt"][index], abs=1e-9)
        worst = optimal_policy(values, mdp, minimize=True)
        assert policy_return(worst, values, mdp) == pytest.approx(file[f"{prefix}_J_worst"][index], abs=1e-9)
        found = mdp.values(mdp.expected_reward(values), mdp.policy(best)).numpy()
        np.testing.assert_allclose(found, file[f"{prefix}_V_opt"][index], atol=1e-9)


@pytest.mark.parametrize(
    ("env", "options", "discount", "best"),
    [
        ("FrozenLake-v1", {}, 0.99, 0.542026),
        ("FrozenLake-v1", {"map_name": "8x8"}, 0.99, 0.414640),
        ("CliffWalking-v1", {}, 0.9, -7.458134),
        ("CliffWalking-v1", {}, 0.99, -12.247898),
        ("Taxi-v3", {}, 0.99, None),
        ("Taxi-v4", {}, 0.99, 6.327464),
        ("Taxi-v4", {}, 0.9, -1.263323),
    ],
)
def test_known_optima(env: str, options: dict[str, Any], discount: float, best: float | None) -> None:
    if env not in gymnasium.registry:
        pytest.skip(f"this gymnasium has no {env}")
    mdp, reward = TabularMDP.from_gym(gymnasium.make(env, **options), discount)
    found = policy_return(optimal_policy(reward, mdp), reward, mdp)
    if best is not None:
        assert found == pytest.approx(best, abs=1e-6)
    if env == "FrozenLake-v1" and not options:
        assert policy_return(mdp.uniform_policy.numpy(), reward, mdp) == pytest.approx(0.012356, abs=1e-6)


def test_a_state_entered_both_ways_is_split() -> None:
    # From 0: action 0 ends in state 1, action 1 goes through state 1, which pays 1 on its way back.
    table = {
        0: {0: [(1.0, 1, 0.0, True)], 1: [(0.5, 1, 0.0, False), (0.5, 1, 2.0, False)]},
        1: {0: [(1.0, 0, 1.0, False)], 1: [(1.0, 0, 1.0, False)]},
    }
    mdp, reward = from_table(table, 0.5, np.array([1.0, 0.0]))
    assert mdp.num_states == 3
    tau = mdp.dense.numpy()
    assert tau[0, 0].tolist() == [0, 0, 1]
    assert tau[0, 1].tolist() == [0, 1, 0]
    assert (tau[2, :, 2] == 1).all()
    assert reward[0, 1, 1] == 1.0  # the mean of 0 and 2
    assert policy_return([1, 0, 0], reward, mdp) == pytest.approx((1 + 0.5) / (1 - 0.25))


class Corridor(gymnasium.Env[Any, Any]):
    """Cells in a row, moves left and right, the last cell ends the episode and pays; `chance` makes it stochastic."""

    observation_space = gymnasium.spaces.Box(0, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, length: int = 5, chance: float = 0.0) -> None:
        self.length, self.chance, self.cell = length, chance, 0

    def _observation(self) -> Any:
        return np.array([self.cell / self.length], np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.cell = 0
        return self._observation(), {}

    def step(self, action: Any) -> Any:
        move = -1 if action == 0 or self.np_random.random() < self.chance else 1
        self.cell = max(self.cell + move, 0)
        end = self.cell == self.length - 1
        return self._observation(), float(end), end, False, {}


def test_enumeration_of_a_deterministic_environment() -> None:
    mdp, reward = TabularMDP.from_gym(Corridor(), 0.9)
    assert mdp.num_states == 5
    assert policy_return([1] * 5, reward, mdp) == pytest.approx(0.9**3)
    assert starc_distance(reward, 2 * reward, mdp) < 1e-12
    with pytest.raises(RewardError, match=r"stochastic.*SampledStarc"):
        TabularMDP.from_gym(Corridor(chance=0.5), 0.9)
    with pytest.raises(RewardError, match="more than 2000 states"):
        TabularMDP.from_gym(Corridor(length=3000), 0.9)
    with pytest.raises(EnvironmentUnavailableError, match="environment Nowhere-v0 cannot be built"):
        TabularMDP.from_gym("Nowhere-v0", 0.9)
    with pytest.raises(RewardError, match="needs discrete ones"):
        TabularMDP.from_gym("Pendulum-v1", 0.9)
