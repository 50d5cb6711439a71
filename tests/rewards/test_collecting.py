"""Episodes played for a distance: what is recorded, coverage policies, and distances from a simulator against exact ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from rlkit2.errors import ConfigError, EnvironmentUnavailableError, RewardError
from rlkit2.rewards import SampledStarc, TabularMDP, starc_distance
from rlkit2.rewards.sampled.collecting import collect
from rlkit2.rewards.sampled.features import EncodedFeatures, FeatureMap, Features, FourierFeatures
from tests.rewards.test_sampled import analytic_lqr


class Steps(gymnasium.Env[Any, Any]):
    """Counts to a limit; a Dict observation, an info of every step, and never an end of its own unless told."""

    def __init__(self, end: int | None = None, action_space: spaces.Space[Any] | None = None) -> None:
        self.observation_space = spaces.Dict({"count": spaces.Box(0, 100, (1,)), "last": spaces.Discrete(3)})
        self.action_space = action_space or spaces.Discrete(3)
        self.end = end

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return self._seen(0), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count += 1
        done = self.count == self.end
        return self._seen(int(action)), float(action), done, False, {"twice": 2 * self.count, "text": "left out"}

    def _seen(self, action: int) -> Any:
        return {"count": np.array([self.count], np.float32), "last": action}


def test_what_is_recorded() -> None:
    data, infos = collect(lambda: Steps(end=4), episodes=3, seed=1)
    assert data.episode_lengths.tolist() == [4, 4, 4]
    assert data.terminations.tolist() == [False, False, False, True] * 3
    assert not data.truncations.any()
    assert infos["twice"].tolist() == [2, 4, 6, 8] * 3
    assert set(infos) == {"twice"}
    assert data.observations[:, 0].tolist() == [0, 1, 2, 3] * 3
    assert torch.equal(data.next_observations[:, 1:].argmax(1), data.actions)
    assert torch.equal(data.rewards, data.actions.float())
    cut, _ = collect(lambda: Steps(end=4), episodes=2, max_steps=3)
    assert cut.truncations.tolist() == [False, False, True] * 2
    assert not cut.terminations.any()
    again, _ = collect(lambda: Steps(end=4), episodes=3, seed=1)
    assert torch.equal(again.actions, data.actions)
    assert not torch.equal(collect(lambda: Steps(end=4), episodes=3, seed=2)[0].actions, data.actions)


def test_mixtures_are_drawn_for_each_step() -> None:
    seen: list[Any] = []

    def first(observation: Any) -> int:
        seen.append(observation["count"])
        return 0

    data, _ = collect(lambda: Steps(end=50), episodes=40, policy=[(3.0, first), (1.0, lambda observation: 2)])
    assert set(data.actions.tolist()) == {0, 2}
    assert abs(float((data.actions == 0).double().mean()) - 0.75) < 0.04
    assert len({tuple(part.tolist()) for part in data.actions.split(50)}) == 40
    assert len(seen) == int((data.actions == 0).sum())


def test_what_cannot_be_played_is_refused() -> None:
    unbounded = spaces.Box(-np.inf, np.inf, (1,))
    for call, error, message in (
        (lambda: collect("No-Such-v0"), EnvironmentUnavailableError, "environment No-Such-v0 cannot be built"),
        (lambda: collect(lambda: Steps(4, unbounded)), ConfigError, "no bounds to draw from"),
        (lambda: collect(lambda: Steps(4), policy=[(0.0, "uniform")]), ConfigError, "weight above 0"),
        (lambda: collect(lambda: Steps(4), policy=lambda o: "up"), ConfigError, "does not fit Steps"),
        (lambda: collect(lambda: Steps(4), policy=3), ConfigError, "a policy is 'uniform'"),  # type: ignore[arg-type]
        (lambda: collect(lambda: Steps(4), episodes=0), ConfigError, "at least 1"),
        (
            lambda: SampledStarc(discount=0.9).fit(analytic_lqr(2, 0)[0], [], episodes=3),
            ConfigError,
            "belong to an env",
        ),
    ):
        with pytest.raises(error, match=message):
            call()


def test_distance_in_a_simulator_is_the_exact_one() -> None:
    """FrozenLake by the uniform policy, against the tabular code at the weights of the visits."""
    mdp, _ = TabularMDP.from_gym("FrozenLake-v1", 0.9)
    progress: list[tuple[int, int]] = []
    rewards = {
        "far": lambda obs, act, next_obs: next_obs[:, 8:].sum(1),
        "idle": lambda act: (act == 0) * 1.0,
        "own": "recorded",
    }
    starc = SampledStarc(discount=0.9, bootstrap=20)
    found = starc.fit("FrozenLake-v1", rewards, episodes=400, progress=lambda *call: progress.append(call))
    assert progress[399] == (400, 400)
    data, _ = collect("FrozenLake-v1", episodes=400)
    visits, far, idle = np.zeros((16, 4)), np.zeros((16, 4, 16)), np.zeros((16, 4))
    np.add.at(visits, (data.observations.argmax(1).numpy(), data.actions.numpy()), 1)
    far[..., 8:], idle[:, 0] = 1, 1
    ends = [5, 7, 11, 12, 15]
    far[ends], idle[ends] = 0, 0
    exact = starc_distance(far, np.broadcast_to(idle[..., None], far.shape).copy(), mdp, weights=visits)
    assert found.ci is not None
    assert found.ci[0, 1, 0] <= exact <= found.ci[0, 1, 1]
    same = starc.fit(data, rewards)
    np.testing.assert_array_equal(same.values, found.values)


def test_saved_policies_play(tmp_path: Path) -> None:
    from rlkit2.agents import make_agent
    from rlkit2.data import DatasetSpec

    with gymnasium.make("Pendulum-v1") as env:
        spec = DatasetSpec(observation_space=env.observation_space, action_space=env.action_space)
    agent = make_agent("bc", spec, seeds=2)
    agent.policy.save(tmp_path / "policy", {"spec": spec.to_json()})
    data, _ = collect("Pendulum-v1", policy=[(1.0, tmp_path / "policy"), (1.0, "uniform")], episodes=2, max_steps=30)
    assert len(data) == 60
    assert float(data.actions.abs().max()) <= 2


def images(values: torch.Tensor) -> torch.Tensor:
    """Numbers [n, 1] as grey pictures of 6 x 6 bytes whose brightness they are."""
    level = ((values + 6) / 12 * 255).clamp(0, 255).round().to(torch.uint8)
    return level[:, :, None, None].expand(-1, 6, 6, 1)


def brightness(pictures: torch.Tensor) -> torch.Tensor:
    """The encoder: what the pictures were made of, up to their 256 levels."""
    return pictures.float().flatten(1).mean(1, keepdim=True) / 255 * 12 - 6


@pytest.mark.parametrize("features", ["auto", "quadratic", FourierFeatures(16)])
def test_images_through_an_encoder(features: Any) -> None:
    batch, rewards = analytic_lqr(60, 1)
    pictures = type(batch)(
        **{
            **vars(batch),
            "observations": images(batch.observations),
            "next_observations": images(batch.next_observations),
        }
    )
    shapes: set[tuple[int, ...]] = set()

    def base(obs: torch.Tensor, act: torch.Tensor) -> torch.Tensor:
        shapes.add(tuple(obs.shape[1:]))
        value: torch.Tensor = -(brightness(obs)[:, 0].double() ** 2) - 0.1 * act[:, 0] ** 2
        return value

    given = {"base": base, "other": lambda next_obs: brightness(next_obs)[:, 0]}
    found = SampledStarc(EncodedFeatures(brightness, features), discount=0.95, bootstrap=30).fit(pictures, given)
    assert shapes == {(6, 6, 1)}  # rewards see the pictures
    assert found.values[0, 1] == pytest.approx(np.sqrt(2), abs=0.15)
    assert "encoder" in found.diagnostics["features"]
    assert "misfit" in found.diagnostics
    plain = SampledStarc("quadratic", discount=0.95, bootstrap=30).fit(
        batch, {name: rewards[name] for name in ("base", "other")}
    )
    assert found.ci is not None
    assert found.ci[0, 1, 0] <= plain.values[0, 1] <= found.ci[0, 1, 1]


def test_an_encoder_that_loses_what_a_reward_is_about_is_seen() -> None:
    batch, rewards = analytic_lqr(60, 1)
    found = SampledStarc(EncodedFeatures(torch.sign, "quadratic"), discount=0.95, bootstrap=0).fit(batch, rewards)
    assert [found.status(k) for k in range(3)] == ["features too poor", "features too poor", ""]


def test_encoders_are_checked_and_left_as_they_are() -> None:
    batch, rewards = analytic_lqr(12, 1)
    net = nn.Sequential(nn.Linear(1, 3), nn.Dropout(0.9)).double().train()
    found = [SampledStarc(EncodedFeatures(net, "linear"), discount=0.95, bootstrap=0).fit(batch, rewards) for _ in "ab"]
    np.testing.assert_array_equal(found[0].values, found[1].values)
    assert net.training
    for encoder, message in (
        (lambda o: o[:5], "gave shape"),
        (lambda o: o @ o, "the encoder failed"),
        (nn.Linear(1, 3), "the encoder failed"),
    ):
        with pytest.raises(RewardError, match=message):
            SampledStarc(EncodedFeatures(encoder, "linear"), discount=0.95).fit(batch, rewards)  # type: ignore[arg-type]


def test_own_features_as_the_page_shows_them() -> None:
    class Squares(Features):
        def fit(self, rows: Any, rewards: Any, discount: float, seed: int) -> FeatureMap:
            def state(o: torch.Tensor) -> torch.Tensor:
                return torch.cat([torch.ones_like(o), o, o**2], 1).double()

            return FeatureMap("squares", state, lambda o, a: torch.cat([state(o), a, a**2, a * o], 1).double())

    batch, rewards = analytic_lqr(40, 0)
    found = SampledStarc(Squares(), discount=0.95, bootstrap=0).fit(batch, rewards)
    same = SampledStarc("quadratic", discount=0.95, bootstrap=0).fit(batch, rewards)
    np.testing.assert_allclose(found.values, same.values, atol=1e-6)
