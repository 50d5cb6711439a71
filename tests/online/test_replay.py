"""What is collected: rows that follow each other, minibatches that mix, files that say what they hold."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch

from rlkit2.data.dataset import Lookahead
from rlkit2.errors import RunError
from rlkit2.files import WriteError
from rlkit2.online.mixing import MixedIndices, Mixture
from rlkit2.online.replay import Replay, replay_path
from tests.online.walks import DATASET

SPEC, ENVS = DATASET.spec, 3


def steps(count, seeds=2, seed=0, share=0.15):
    """Random transitions of every environment, as `Replay.add` takes them."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        shape = (seeds, ENVS)
        ends = rng.uniform(size=shape) < share
        yield {
            "observations": rng.normal(size=(*shape, 3)),
            "actions": rng.uniform(-2, 2, (*shape, 2)),
            "rewards": rng.normal(size=shape),
            "next_observations": rng.normal(size=(*shape, 3)),
            "terminations": ends & (rng.uniform(size=shape) < 0.5),
            "truncations": ends,
        }


def filled(folder, count=20, capacity=60, **options):
    replay = Replay(SPEC, [4, 7], ENVS, capacity, folder, **options)
    taken = list(steps(count))
    for step in taken:
        replay.add(step)
    joined = {name: np.concatenate([step[name] for step in taken], 1) for name in taken[0]}  # [S, rows, ...]
    return replay, joined


def test_rows_are_what_was_added_and_the_oldest_make_room(tmp_path):
    replay, joined = filled(tmp_path, capacity=24)
    assert (replay.count, replay.oldest) == (60, 36)
    rows = torch.arange(36, 60).expand(2, -1)
    batch = replay.gather(rows)
    for name, values in joined.items():
        np.testing.assert_array_equal(
            getattr(batch, name).numpy(), values[:, 36:].astype(getattr(batch, name).numpy().dtype)
        )
    replay.flush()
    assert len(replay.files[0].read(0, 60)) == 60  # all of them are kept
    np.testing.assert_array_equal(replay.files[1].read(0, 60)["rewards"], joined["rewards"][1].astype(np.float32))


@pytest.mark.parametrize("num_steps", [1, 3])
def test_steps_ahead_stay_in_their_environment_and_episode(tmp_path, num_steps):
    look = Lookahead(num_steps, 0.9 if num_steps > 1 else 1.0, next_actions=True)
    replay, joined = filled(tmp_path, lookahead=look, reward=lambda reward: 2.0 * reward)
    replay.cuts[1] = {31}
    batch = replay.gather(torch.arange(60).expand(2, -1))
    broken = 0

    def ends(s, row):
        return bool(
            joined["truncations"][s, row] or joined["terminations"][s, row] or row + ENVS >= 60 or row in replay.cuts[s]
        )

    for s in range(2):
        for row in range(60):
            last, total = row, 2.0 * joined["rewards"][s, row].astype(np.float32).astype(float)
            while (last - row) // ENVS + 1 < num_steps and not ends(s, last):
                last += ENVS
                total += look.discount ** ((last - row) // ENVS) * 2.0 * joined["rewards"][s, last].astype(np.float32)
            if num_steps > 1:
                assert batch.steps[s, row] == (last - row) // ENVS + 1
            assert batch.rewards[s, row].item() == pytest.approx(total, rel=1e-5)
            np.testing.assert_array_equal(
                batch.next_observations[s, row].numpy(), joined["next_observations"][s, last].astype(np.float32)
            )
            assert batch.terminations[s, row] == joined["terminations"][s, last]
            assert batch.followed[s, row] == (not ends(s, last))
            broken += ends(s, last)
            after = last if ends(s, last) else last + ENVS
            np.testing.assert_array_equal(
                batch.next_actions[s, row].numpy(), joined["actions"][s, after].astype(np.float32)
            )
    assert 0 < broken < 120


def test_a_minibatch_has_its_share_of_offline_rows(tmp_path):
    replay, joined = filled(tmp_path)
    mixture = Mixture(DATASET, replay, 8, 0.25)
    indices = MixedIndices(mixture, [4, 7], 8)
    seen = [indices.next() for _ in range(300)]
    rows = torch.cat(seen, 1)
    assert {0, len(DATASET) - 1} <= set(torch.cat([part[:, :2] for part in seen], 1).flatten().tolist())
    new = torch.cat([part[:, 2:] for part in seen], 1)
    assert (int(new.min()), int(new.max()), int(rows.max())) == (0, 59, len(DATASET) - 1)
    batch = mixture.gather(seen[0])
    np.testing.assert_array_equal(batch.observations[:, :2], DATASET.observations[seen[0][:, :2]])
    np.testing.assert_array_equal(batch.rewards[1, 2:], joined["rewards"][1, seen[0][1, 2:]].astype(np.float32))
    assert torch.equal(batch.rows[:, 2:], seen[0][:, 2:] + len(DATASET))  # no row of one is taken for one of the other


def test_a_seed_draws_the_same_rows_beside_any_other(tmp_path):
    replay, _ = filled(tmp_path)
    both, alone = (MixedIndices(Mixture(DATASET, replay, 8, 0.5), seeds, 8) for seeds in ([4, 7], [7]))
    for _ in range(3):
        assert torch.equal(both.next()[1:], alone.next())
    state = both.state()
    after = [both.next() for _ in range(2)]
    both.load_state(state)
    assert all(torch.equal(both.next(), rows) for rows in after)


def test_a_torn_or_changed_file_is_seen(tmp_path):
    replay, joined = filled(tmp_path)
    replay.flush()
    state = replay.state()
    for step in steps(5, seed=1):
        replay.add(step)
    replay.flush()
    replay.load_state(60, state)  # what came after the checkpoint is cut off
    assert replay_path(tmp_path, 4).stat().st_size == 60 * replay.array.itemsize
    np.testing.assert_array_equal(
        replay.gather(torch.tensor([[59], [59]])).rewards[:, 0], joined["rewards"][:, 59].astype(np.float32)
    )
    data = bytearray(replay_path(tmp_path, 7).read_bytes())
    data[100] ^= 1
    replay_path(tmp_path, 7).write_bytes(data)
    with pytest.raises(RunError, match=r"seed-7.records does not have the checksum"):
        replay.load_state(60, state)
    os.truncate(replay_path(tmp_path, 4), 1000)
    with pytest.raises(RunError, match=r"seed-4.records is shorter than the run's checkpoint says"):
        replay.load_state(60, state)


def test_a_full_disk_loses_nothing_that_was_written(tmp_path, monkeypatch):
    replay, _ = filled(tmp_path)
    replay.flush()
    digests = [file.digest() for file in replay.files]
    for step in steps(5, seed=1):
        replay.add(step)

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(WriteError, match=r"cannot write .*seed-4.records: No space left"):
            replay.flush()
    assert replay.files[0].digest() == digests[0]
    replay.flush()
    assert (replay.files[0].length, replay.files[1].length) == (75, 75)
