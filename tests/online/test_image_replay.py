"""Images that are collected: each is kept once, and every transition still shows what the environment did."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

import rlkit2
from rlkit2.data.dataset import Lookahead
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import RunError
from rlkit2.online import collected
from rlkit2.online.replay import Replay, read_rows
from rlkit2.training import Run

PIXELS = spaces.Box(0, 255, (4, 3, 1), np.uint8)
MIXED = spaces.Dict({"seen": PIXELS, "speed": spaces.Box(-1.0, 1.0, (2,), np.float32), "map": PIXELS})
CASES = [
    # space, stack, environments, capacity, steps, share of steps that end an episode
    (PIXELS, 1, 1, 10, 40, 0.2),
    (PIXELS, 1, 3, 24, 30, 0.0),
    (PIXELS, 4, 2, 20, 60, 0.15),
    (PIXELS, 3, 1, 12, 80, 1.0),  # twice as many frames as rows
    (PIXELS, 2, 2, 2, 9, 0.3),  # the newest row alone
    (MIXED, 1, 2, 16, 30, 0.2),
    (MIXED, 3, 2, 16, 50, 0.5),
]


class Pictures(gym.Env):
    """A dot that walks over a small picture, cut off after a while."""

    observation_space, action_space = spaces.Box(0, 255, (6, 6, 1), np.uint8), spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._place, self._step = int(self.np_random.integers(36)), 0
        return self._seen(), {}

    def step(self, action):
        self._place, self._step = (self._place + int(action) - 1) % 36, self._step + 1
        return self._seen(), float(self._place == 0), self._place == 0, self._step == 9, {}

    def _seen(self):
        picture = np.zeros(36, np.uint8)
        picture[self._place] = 255
        return picture.reshape(6, 6, 1)


def spec_of(space: spaces.Space, stack: int) -> DatasetSpec:
    return DatasetSpec(observation_space=space, action_space=spaces.Discrete(3)).stacked(stack)


def walks(spec: DatasetSpec, envs: int, count: int, share: float, seeds: int = 2, seed: int = 0, padded: bool = True):
    """Steps as `Replay.add` takes them, of environments whose stacks are those of `FrameStackObservation`."""
    rng, n, flat = np.random.default_rng(seed), spec.frame_stack, spec.flattener
    size = flat.size // n

    def frame():
        row = np.zeros(size, flat.dtype)
        for start, shape in spec.images:
            row[start // n : (start + int(np.prod(shape))) // n] = rng.integers(0, 256, int(np.prod(shape)) // n)
        return np.where(row == 0, rng.integers(0, 2, size), row).astype(flat.dtype)

    def row(stack):
        return flat.joined(torch.from_numpy(np.stack(stack))).numpy()

    def first():
        return [frame()] * n if padded else [frame() for _ in range(n)]

    now = {key: first() for key in np.ndindex(seeds, envs)}
    for _ in range(count):
        shape = (seeds, envs)
        ends, final = rng.uniform(size=shape) < share, rng.uniform(size=shape) < 0.5
        after = {key: [*stack[1:], frame()] for key, stack in now.items()}
        yield {
            "observations": np.stack([row(now[key]) for key in now]).reshape(*shape, *flat.shape),
            "next_observations": np.stack([row(after[key]) for key in now]).reshape(*shape, *flat.shape),
            "actions": rng.integers(0, 3, shape),
            "rewards": rng.normal(size=shape),
            "terminations": ends & final,
            "truncations": ends & ~final,
        }
        now = {key: first() if ends[key] else after[key] for key in now}


def agree(replay: Replay, taken: list[dict]) -> None:
    """Every row that is in memory shows what was added."""
    rows = torch.arange(replay.oldest, replay.count).expand(len(replay.seeds), -1)
    batch = replay.gather(rows)
    for name in taken[0]:
        joined = np.concatenate([step[name] for step in taken], 1)
        found = getattr(batch, name).numpy()
        np.testing.assert_array_equal(found, joined[:, replay.oldest :].astype(found.dtype), err_msg=name)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(("space", "stack", "envs", "capacity", "count", "share"), CASES)
def test_every_transition_shows_what_was_added_in_memory_on_disk_and_after_a_kill(
    tmp_path, space, stack, envs, capacity, count, share, padded
):
    spec, taken = spec_of(space, stack), []
    every = list(walks(spec, envs, count, share, padded=padded))
    replay = Replay(spec, [4, 7], envs, capacity, tmp_path)
    for number, step in enumerate(every):
        replay.add(step)
        taken.append(step)
        if number % 7 == 0 or number > count - 3:
            agree(replay, taken)
        if number == count // 2:
            replay.sync()
            state, kept = {name: value.clone() for name, value in replay.state().items()}, replay.count
    replay.sync()
    joined = {name: np.concatenate([step[name] for step in taken], 1) for name in taken[0]}
    for place, seed in enumerate((4, 7)):
        for rows in (slice(0, replay.count, 1), slice(envs - 1, replay.count, envs), slice(0, 0, 1)):
            fields = read_rows(tmp_path, spec, seed, rows)
            for name, values in fields.items():
                np.testing.assert_array_equal(values, joined[name][place, rows].astype(values.dtype))
    replay.close()
    again = Replay(spec, [4, 7], envs, capacity, tmp_path)
    again.load_state(kept, state)
    agree(again, every[: count // 2 + 1])
    assert all(file.length == kept for file in again.files)
    for step in every[count // 2 + 1 :]:
        again.add(step)
    agree(again, every)


def test_a_frame_is_kept_once(tmp_path):
    spec = spec_of(PIXELS, 4)
    replay = Replay(spec, [0], 1, 100, tmp_path)
    taken = list(walks(spec, 1, 200, 0.1, seeds=1))
    for step in taken:
        replay.add(step)
    replay.sync()
    episodes = 1 + int(sum((step["truncations"] | step["terminations"]).sum() for step in taken[:-1]))
    assert replay.frames is not None
    assert int(replay.frames.counts[0]) == 200 + episodes
    assert (tmp_path / "replay" / "seed-0.frames").stat().st_size == (200 + episodes) * 16  # 12 pixels in whole words
    assert replay.frames.array.nbytes < 150 * 16  # not the 8 * 100 of two stacks a row


def test_an_episode_that_was_given_up_is_followed_by_a_first_observation(tmp_path):
    spec = spec_of(PIXELS, 2)
    replay = Replay(spec, [0], 1, 50, tmp_path)
    first, second = (list(walks(spec, 1, 6, 0.0, seeds=1, seed=seed)) for seed in (1, 2))
    for step in first:
        replay.add(step)
    replay.cuts[0].add(5)
    for step in second:
        replay.add(step)
    agree(replay, first + second)


def test_steps_ahead_of_images(tmp_path):
    spec = spec_of(PIXELS, 2)
    replay = Replay(spec, [0], 2, 100, tmp_path, Lookahead(3, 0.9, next_actions=True))
    taken = list(walks(spec, 2, 30, 0.2, seeds=1))
    for step in taken:
        replay.add(step)
    joined = {name: np.concatenate([step[name] for step in taken], 1)[0] for name in taken[0]}
    batch = replay.gather(torch.arange(60).unsqueeze(0))
    last = torch.arange(60) + 2 * (batch.steps[0] - 1)
    np.testing.assert_array_equal(batch.next_observations[0].numpy(), joined["next_observations"][last.numpy()])
    after = torch.where(batch.followed[0], last + 2, last)
    np.testing.assert_array_equal(batch.next_actions[0].numpy(), joined["actions"][after.numpy()])


def test_a_damaged_file_of_frames_is_seen_and_an_earlier_version_told_apart(tmp_path):
    spec = spec_of(PIXELS, 1)
    replay = Replay(spec, [0], 1, 50, tmp_path)
    for step in walks(spec, 1, 20, 0.2, seeds=1):
        replay.add(step)
    replay.sync()
    state = replay.state()
    with pytest.raises(RunError, match="was begun by an earlier version, which kept every image twice"):
        replay.load_state(20, {"online.sha256": state["online.sha256"]})
    path = tmp_path / "replay" / "seed-0.frames"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match=r"seed-0.frames does not have the checksum"):
        replay.load_state(20, state)
    path.unlink()
    with pytest.raises(RunError, match=r"seed-0.frames is missing, which holds what the run has seen"):
        read_rows(tmp_path, spec, 0, slice(0, 20, 1))


@pytest.mark.parametrize("stack", [1, 3])
def test_a_run_that_sees_images_is_resumed_bit_for_bit(tmp_path, monkeypatch, stack):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    options = {
        "env": Pictures, "steps": 60, "warmup": 20, "num_envs": 2, "seeds": 2, "frame_stack": stack, "batch_size": 8, "eval_every": 0,
        "log_every": 10, "checkpoint_every": 13, "capacity": 30, "progress": False, "out": tmp_path,
        "overrides": {"hidden_sizes": (8,), "encoder": "none"},
    }  # fmt: skip
    whole = rlkit2.train_online("dqn", **options)
    part = rlkit2.train_online("dqn", **options, until=33)
    again = rlkit2.train(resume=part, env=Pictures, progress=False)
    ends = [run.checkpoint().tensors for run in (whole, again)]
    assert all(bool((ends[0][name] == ends[1][name]).all()) for name in ends[0])
    for seed in (0, 1):
        names = [f"replay/seed-{seed}.{kind}" for kind in ("records", "frames")]
        assert all((whole.path / name).read_bytes() == (again.path / name).read_bytes() for name in names)
    assert isinstance(again, Run)
    if stack == 1:
        data = collected(again)
        assert len(data) == 120
        inside = ~(data.terminations | data.truncations)[:-1]
        assert torch.equal(data.next_observations[:-1][inside], data.observations[1:][inside])
