"""Labelled segments as arrays: every layout says the same labels, found in the dataset or made into one of its own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit2.cli.main import main
from rlkit2.data.preferences import PreferenceDataset, SegmentIndex
from rlkit2.errors import ConfigError, CorruptDatasetError, DatasetNotFoundError
from rlkit2.preferences import SegmentArrays
from tests.preferences.make import linear_dataset

STEPS = 6


@pytest.fixture(scope="module")
def dataset():
    return linear_dataset(episodes=6, steps=15)


def cut(dataset, pairs=5, seed=0):
    """Starts of the pairs and their arrays: `[2, P, H, ...]`."""
    index = SegmentIndex(dataset, STEPS)
    which = torch.from_numpy(np.random.default_rng(seed).choice(len(index), (2, pairs), replace=False))
    rows = index.rows(which)
    arrays = {name: getattr(dataset, name)[rows].numpy() for name in ("observations", "actions", "rewards")}
    return index.starts[which], arrays


def layouts(arrays, mass):
    """The same pairs in every layout."""
    obs, act, rew = (arrays[name] for name in ("observations", "actions", "rewards"))
    rng = np.random.default_rng(1)
    low = rng.normal(size=len(mass))
    scores = np.concatenate([low, low + np.sign(2 * mass - 1)])
    whole = {"obs": np.concatenate(obs), "action": np.concatenate(act), "reward": np.concatenate(rew)}
    return {
        "pairs": {"obs_1": obs[0], "obs_2": obs[1], "action_1": act[0], "action_2": act[1],
                  "reward_1": rew[0], "reward_2": rew[1], "label": mass},
        "pairs of float64 in columns": {"obs_1": obs[0].astype(float), "obs_2": obs[1].astype(float),
                                        "action_1": act[0], "action_2": act[1], "label": mass[:, None]},
        "stacked": {**whole, "rl_sum": scores},
        "batch": {"observations": obs[0], "observations_2": obs[1], "actions": act[0], "actions_2": act[1], "labels": np.stack([1 - mass, mass], 1)},
    }  # fmt: skip


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 6), st.integers(0, 99))
def test_every_layout_gives_the_segments_it_was_cut_from(dataset, tmp_path_factory, pairs, seed):
    starts, arrays = cut(dataset, pairs, seed)
    mass = np.random.default_rng(seed).choice([0.0, 0.5, 1.0], pairs)
    for name, stored in layouts(arrays, mass).items():
        path = tmp_path_factory.getbasetemp() / "segments.npz"
        np.savez(path, **stored)
        found = SegmentArrays.read(path)
        labels = found.find(dataset)
        rows = labels.rows(dataset)
        assert [side[:, 0].tolist() for side in rows] == starts.tolist(), name
        assert labels.label_mass.tolist() == mass.tolist(), name
        own, theirs = found.as_dataset()
        first, second = (own.observations[side].numpy() for side in theirs.rows(own))
        assert np.array_equal(first, arrays["observations"][0][:, :-1])
        assert np.array_equal(second, arrays["observations"][1][:, :-1])
        assert torch.equal(
            own.next_observations[theirs.rows(own)[0]][:, -1], torch.as_tensor(arrays["observations"][0][:, -1])
        )
        assert not own.terminations.any()
        assert own.truncations.sum() == 2 * pairs
        assert theirs.label_mass.tolist() == mass.tolist()


def test_what_does_not_fit_is_named(dataset, tmp_path):
    _, arrays = cut(dataset)
    mass = np.array([0, 1, 0.5, 1, 0])
    every = layouts(arrays, mass)

    def read(stored, **options):
        np.savez(tmp_path / "s.npz", **stored)
        return SegmentArrays.read(tmp_path / "s.npz", **options)

    pairs, stacked, batch = (every[name] for name in ("pairs", "stacked", "batch"))
    for message, stored, options in (
        ("label -1 of pair 0 is not in .*some files mean equal by it, others unanswered", {**pairs, "label": mass - 1}, {}),
        ("label 2 of pair 1", {**pairs, "label": 2 * mass}, {}),
        ("do not add up to 1", {**batch, "labels": np.ones((5, 2))}, {}),
        ("4 labels for 5 pairs", {**pairs, "label": mass[:4]}, {}),
        ("no action arrays", {k: v for k, v in pairs.items() if k != "action_2"}, {}),
        ("shapes .* expected", {**pairs, "action_2": pairs["action_2"][:, :3]}, {}),
        ("obs holds NaN", {**pairs, "obs_1": pairs["obs_1"] * np.nan}, {}),
        ("2 scores per segment .a, rl_sum.; name the one", {**stacked, "a": np.zeros(10)}, {}),
        ("0 scores per segment", {k: v for k, v in stacked.items() if k != "rl_sum"}, {}),
        ("'b' must be one of them", stacked, {"label_key": "b"}),
        ("no array 'score' of labels", pairs, {"label_key": "score"}),
        ("holds x; labelled segments are", {"x": mass}, {}),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            read(stored, **options)
    with pytest.raises(DatasetNotFoundError, match="does not exist"):
        SegmentArrays.read(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04nothing")
    with pytest.raises(CorruptDatasetError, match="not a readable npz file"):
        SegmentArrays.read(tmp_path / "bad.npz")
    moved = {**pairs, "obs_2": pairs["obs_2"] + 1}
    with pytest.raises(ConfigError, match="the second segment of pair 0 of s"):
        read(moved).find(dataset)
    with pytest.raises(ConfigError, match="it is another dataset"):
        read({**pairs, "obs_1": pairs["obs_1"][..., :1], "obs_2": pairs["obs_2"][..., :1]}).find(dataset)


def test_the_command_line_imports_both_ways(dataset, tmp_path, roots, capsys):
    _, arrays = cut(dataset)
    np.savez(tmp_path / "s.npz", **layouts(arrays, np.array([0, 1, 0.5, 1, 0]))["stacked"])
    dataset.to_minari("test/cut-v0")
    given = ["--people", str(tmp_path / "s.npz"), "--label-key", "rl_sum"]
    assert main(["prefs", "label", "test/cut-v0", *given, "--out", str(tmp_path / "a")]) == 0
    assert "5 pairs of 6 steps of test/cut-v0; first preferred 2, second 2, equal 1" in capsys.readouterr().out
    assert main(["prefs", "label", "test/own-v0", *given, "--as-dataset", "--out", str(tmp_path / "b")]) == 0
    assert "10 segments as episodes of 5 steps, with the file's rewards" in capsys.readouterr().out
    labels = [PreferenceDataset.load(tmp_path / name) for name in "ab"]
    assert labels[0].label_mass.tolist() == labels[1].label_mass.tolist()
    assert [one.length for one in labels] == [6, 5]
    assert main(["prefs", "label", "test/own-v0", "--label-key", "rl_sum", "--out", str(tmp_path / "c")]) == 2
    assert "are for an .npz file" in capsys.readouterr().err
