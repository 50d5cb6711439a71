"""Segments, labelled pairs on disk and as minibatches."""

import json
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlkit2.data.preferences import JSON_FILE, PreferenceDataset, SegmentIndex, transitions_hash
from rlkit2.errors import ConfigError, CorruptDatasetError, DatasetError, DatasetNotFoundError
from rlkit2.preferences import ScriptedTeacher, collect_preferences
from tests import warm
from tests.preferences.make import changed, generators, linear_dataset


@pytest.fixture(scope="module")
def dataset():
    return linear_dataset(episodes=12, steps=15)


@given(st.integers(1, 17), st.integers(1, 6))
def test_segments_are_all_windows_inside_one_episode(length, stride):
    dataset = linear_dataset(episodes=4, steps=15)  # 15, 16, 17, 15 steps
    index = SegmentIndex(dataset, length, stride)
    expected = [
        (episode, start)
        for episode, steps in enumerate(dataset.episode_lengths.tolist())
        for start in range(0, steps - length + 1, stride)
    ]
    assert [tuple(pair) for pair in index.segments.tolist()] == expected
    rows = index.rows()
    assert (rows == dataset.segments(length, stride)).all()
    owner = torch.repeat_interleave(torch.arange(dataset.num_episodes), dataset.episode_lengths)
    assert (owner[rows] == index.segments[:, :1]).all()
    assert (rows[:, 0] - dataset.episode_starts[index.segments[:, 0]] == index.segments[:, 1]).all()


def test_the_last_start_of_an_episode_counts(dataset):
    assert len(SegmentIndex(dataset, int(dataset.episode_lengths.max()))) == 4


def test_a_segment_longer_than_every_episode_is_refused(dataset):
    with pytest.raises(DatasetError, match=r"no episode of .* has 18 steps; the longest has 17"):
        SegmentIndex(dataset, 18)


def _labels(dataset, **how):
    return collect_preferences(dataset, ScriptedTeacher("noisy", equal=0.1, equal_threshold=0.5), 40, length=6, **how)


def test_saved_labels_come_back_equal(dataset, tmp_path):
    labels = _labels(dataset)
    labels.save(tmp_path / "labels")
    again = PreferenceDataset.load(tmp_path / "labels")
    for name in ("segments_w", "segments_l", "label_mass"):
        assert torch.equal(getattr(labels, name), getattr(again, name))
    assert (again.source, again.length, again.dataset_id) == (labels.source, 6, dataset.spec.id)
    assert all(torch.equal(a, b) for a, b in zip(again.rows(dataset), labels.rows(dataset), strict=True))
    labels.select(torch.arange(5)).save(tmp_path / "labels")  # replaces, and leaves nothing behind
    assert len(PreferenceDataset.load(tmp_path / "labels")) == 5
    assert len(list((tmp_path / "labels").iterdir())) == 2


def test_labels_follow_new_rewards_but_no_other_dataset(dataset):
    labels = _labels(dataset)
    labels.rows(dataset.with_rewards(np.zeros(len(dataset))))
    assert transitions_hash(dataset) == transitions_hash(linear_dataset(episodes=12, steps=15))
    for other in (changed(dataset), dataset.select(range(11)), linear_dataset(episodes=12, steps=15, seed=1)):
        with pytest.raises(DatasetError, match="belong to arrays"):
            labels.rows(other)


@pytest.mark.parametrize("bad", [-0.1, 1.2, float("nan")])
def test_a_label_outside_the_unit_interval_is_refused(dataset, bad):
    labels = _labels(dataset)
    mass = labels.label_mass.clone()
    mass[3] = bad
    with pytest.raises(ConfigError, match=r"label 3 is .* in \[0, 1\]"):
        replace(labels, label_mass=mass)


def test_bad_pairs_are_named(dataset):
    rows = dataset.segments(6)
    with pytest.raises(ConfigError, match="6 and 5 steps"):
        PreferenceDataset.from_rows(dataset, rows[:3], rows[:3, :5], torch.zeros(3), "test")
    broken = rows[:3].clone()
    broken[1, 4] += 1
    with pytest.raises(ConfigError, match="first segment of pair 1 is not a run"):
        PreferenceDataset.from_rows(dataset, broken, rows[:3], torch.zeros(3), "test")
    with pytest.raises(DatasetError, match=r"second segment of pair 0 .* is not inside an episode"):
        PreferenceDataset.from_starts(
            dataset, torch.tensor([0]), dataset.episode_starts[1:2] - 3, torch.zeros(1), "test", length=6
        )
    with pytest.raises(ConfigError, match=r"segments_l has shape \[2, 2\] for 3 labels"):
        PreferenceDataset(torch.zeros(3, 2), torch.zeros(2, 2), torch.zeros(3), length=4)


def test_damaged_files_are_named(dataset, tmp_path):
    with pytest.raises(DatasetNotFoundError, match="no labels in"):
        PreferenceDataset.load(tmp_path / "nothing")
    folder = tmp_path / "labels"
    _labels(dataset).save(folder)
    tensors = next(folder.glob("*.safetensors"))
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:50])
    with pytest.raises(CorruptDatasetError, match="are damaged"):
        PreferenceDataset.load(folder)
    tensors.write_bytes(whole)
    (folder / JSON_FILE).write_text((folder / JSON_FILE).read_text()[:40])
    with pytest.raises(CorruptDatasetError, match="cannot be read"):
        PreferenceDataset.load(folder)
    (folder / JSON_FILE).write_text(json.dumps({"format": 99}))
    with pytest.raises(CorruptDatasetError, match="not in format 1"):
        PreferenceDataset.load(folder)


_SAVER = """
import itertools, sys, torch
from rlkit2.data.preferences import PreferenceDataset
for n in itertools.count(1):
    segments = torch.full((n, 2), n)
    PreferenceDataset(segments, segments, torch.full((n,), 0.5), "loop", length=3).save(sys.argv[1])
    print(n, flush=True)
"""


def test_a_kill_while_saving_leaves_whole_labels(tmp_path):
    for wait in (0.0, 0.013, 0.031):
        with warm.Popen([sys.executable, "-c", _SAVER, tmp_path / "l"], stdout=warm.PIPE) as saver:
            assert saver.stdout.readline() == "1\n"
            time.sleep(wait)
            saver.kill()
            confirmed = [1, *map(int, saver.stdout)][-1]
        labels = PreferenceDataset.load(tmp_path / "l")
        assert len(labels) >= confirmed
        assert (labels.segments_w == len(labels)).all()


def test_split_and_extend_keep_every_pair(dataset):
    labels = _labels(dataset)
    train, held_out = labels.split(0.25, seed=3)
    assert (len(train), len(held_out)) == (30, 10)
    joined = train.extend(held_out)
    key = lambda x: sorted(map(tuple, torch.cat([x.segments_w, x.segments_l], 1).tolist()))  # noqa: E731
    assert key(joined) == key(labels)
    with pytest.raises(ConfigError, match="cannot be joined"):
        labels.extend(collect_preferences(dataset, ScriptedTeacher(), 4, length=5))


@pytest.mark.parametrize("replay", [0, 3])
def test_minibatches_hold_the_right_steps_of_the_right_pair(dataset, replay):
    labels = _labels(dataset)
    pairs = labels.pairs(dataset, replay=replay)
    rows = pairs.sample_indices(16, generators(2))
    assert torch.equal(rows[1:], pairs.sample_indices(16, generators(2)[1:]))  # a seed draws the same alone
    batch = pairs.gather(rows)
    which = rows % len(labels)
    windows = torch.stack(labels.rows(dataset), 1)[which]  # [S, B, 2, H]
    assert torch.equal(batch.segments.observations, dataset.observations[windows])
    assert torch.equal(batch.segments.actions, dataset.actions[windows])
    assert torch.equal(batch.label_mass, labels.label_mass[which].float())
    if not replay:
        assert batch.transitions is None
        return
    assert batch.transitions.rewards.shape == (2, 48)
    counts = torch.zeros(len(dataset))
    everything = pairs.gather(torch.arange(len(pairs))[None]).transitions
    lookup = {tuple(row): i for i, row in enumerate(dataset.observations.tolist())}
    for row in everything.observations[0, ::7].tolist():
        counts[lookup[tuple(row)]] += 1
    assert len(everything.rewards[0]) == replay * len(labels) * len(dataset)
    assert (counts > 0).all()  # every transition takes part
