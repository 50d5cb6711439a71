"""Runs on images: interrupted and resumed bit for bit, stacked in training and evaluation, mixed with vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import rlkit2
from rlkit2.data import DatasetSpec, TransitionDataset, dataset_from_arrays
from rlkit2.errors import ConfigError, UnsupportedSpaceError
from rlkit2.evaluation.offline import OfflineOptions

IMAGE = spaces.Box(0, 255, (8, 8, 1), np.uint8)
SMALL = {"hidden_sizes": (8,), "random_shift": 1}
OPTIONS: dict[str, Any] = {"batch_size": 4, "progress": False, "eval_every": 0, "checkpoint_every": 3, "log_every": 3}


class Lights(gymnasium.Env[Any, Any]):
    """Shows a bright half for four steps; the right action is the half that was bright one step before."""

    def __init__(self, mixed: bool = False) -> None:
        self.mixed = mixed
        self.observation_space = spaces.Dict(image=IMAGE, clock=spaces.Box(0, 9, (1,), np.float32)) if mixed else IMAGE
        self.action_space = spaces.Discrete(2)

    def _show(self) -> Any:
        self.before, self.now = self.now, int(self.np_random.integers(2))
        image = np.full((8, 8, 1), 20, np.uint8)
        image[4 * self.now : 4 * self.now + 4] = 220
        return {"image": image, "clock": np.full(1, self.time, np.float32)} if self.mixed else image

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.time, self.now = 0, 0
        return self._show(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = float(action == self.before) if self.time else 0.0
        self.time += 1
        return self._show(), reward, False, self.time == 5, {}


def lights(episodes: int = 6, mixed: bool = False) -> TransitionDataset:
    """Episodes of the right actions."""
    env = Lights(mixed)
    spec = DatasetSpec(observation_space=env.observation_space, action_space=env.action_space)
    rows: dict[str, list[Any]] = {
        name: [] for name in ("observations", "next_observations", "actions", "rewards", "ends")
    }
    for episode in range(episodes):
        seen, _ = env.reset(seed=episode)
        ended = False
        while not ended:
            action = env.before
            after, reward, _, ended, _ = env.step(action)
            for name, value in zip(rows, (flat(spec, seen), flat(spec, after), action, reward, ended), strict=True):
                rows[name].append(value)
            seen = after
    arrays = {name: np.array(values) for name, values in rows.items()}
    ends = arrays.pop("ends")
    return dataset_from_arrays(**arrays, terminations=ends & False, truncations=ends, spec=spec)


def flat(spec: DatasetSpec, seen: Any) -> Any:
    batch = {name: value[None] for name, value in seen.items()} if isinstance(seen, dict) else seen[None]
    return spec.flattener.flatten(batch)[0]


@pytest.mark.parametrize("mixed", [False, True], ids=["image", "mixed"])
def test_a_prolonged_run_is_as_one_that_never_stopped(mixed: bool, tmp_path: Path) -> None:
    data, how = lights(3, mixed), {"frame_stack": 2, "seeds": 2, "overrides": {**SMALL, "policy_cosine_steps": None}}
    whole = rlkit2.train("iql", data, steps=6, out=tmp_path / "a", **OPTIONS, **how)
    part = rlkit2.train("iql", data, steps=3, out=tmp_path / "b", **OPTIONS, **how)
    rlkit2.train(resume=part.path, dataset=data, steps=6, progress=False)
    ours, theirs = (run.checkpoint(6).tensors for run in (whole, part))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("mixed", [False, True], ids=["image", "mixed"])
def test_a_stack_is_learnt_from_and_played_with(mixed: bool, tmp_path: Path) -> None:
    """Nothing but the frame before tells the right action: a reward of 4 an episode needs stacks in training and in evaluation."""
    run = rlkit2.train(
        "bc",
        lights(40, mixed),
        steps=100,
        env=lambda: Lights(mixed),
        out=tmp_path,
        overrides={"hidden_sizes": (32,), "learning_rate": 3e-3},
        **{**OPTIONS, "batch_size": 32, "eval_every": 100, "checkpoint_every": 100, "frame_stack": 2},
    )
    assert np.mean(run.evaluations()[-1]["returns"]) == 4.0
    assert json.loads(run.policy.metadata["spec"])["frame_stack"] == 2
    again = rlkit2.evaluate(run.path / "policy", env=lambda: Lights(mixed), episodes=10)
    assert again.returns.mean() == 4.0


def test_stacks_of_numbers_are_judged_without_an_environment(tmp_path: Path) -> None:
    data = lights(6, mixed=True)
    spec = DatasetSpec(observation_space=spaces.Box(-9, 999, (1,), np.float32), action_space=data.spec.action_space)
    fields = {name: getattr(data, name) for name in ("actions", "rewards", "terminations", "truncations")}
    seen = {name: getattr(data, name)[:, :1] for name in ("observations", "next_observations")}
    clocks = dataset_from_arrays(**seen, **fields, spec=spec)
    runs = [
        rlkit2.train("bc", clocks, steps=1, out=tmp_path, overrides=SMALL, **OPTIONS, frame_stack=stack)
        for stack in (1, 3)
    ]
    options = OfflineOptions(hidden_sizes=(), features=0, steps=2, members=3, resamples=20)
    judged = rlkit2.offline_evaluate(runs[1], clocks, methods=["dice"], discount=0.5, options=options)
    assert np.isfinite(judged["dice"].value)
    with pytest.raises(ConfigError, match="the policies see stacks of 1, 3 observations"):
        rlkit2.offline_evaluate(runs, clocks, methods=["dice"], options=options)


def test_what_takes_no_images_says_so(tmp_path: Path) -> None:
    data = lights(3)
    with pytest.raises(ConfigError, match="normalize_observations off"):
        rlkit2.train("bc", data, steps=1, out=tmp_path, normalize_observations=True, overrides=SMALL, **OPTIONS)
    with pytest.raises(ConfigError, match="EDAC is for continuous actions"):
        rlkit2.train("edac", data, steps=1, out=tmp_path, **OPTIONS)
    run = rlkit2.train("bc", data, steps=1, out=tmp_path, overrides=SMALL, **OPTIONS)
    with pytest.raises(
        UnsupportedSpaceError, match=r"hold images \(8 x 8 x 1\), which an estimate without an environment"
    ):
        rlkit2.offline_evaluate(run, data)
