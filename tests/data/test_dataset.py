"""What a `TransitionDataset` offers, each against a plain computation."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

import rlkit2.data.export as export
from rlkit2.data import (
    Batch,
    DatasetSpec,
    ReplayBuffer,
    TransitionDataset,
    dataset_from_arrays,
    normalizers,
    observation_statistics,
    read_dataset,
    reward_transform,
)
from rlkit2.errors import ConfigError, DatasetError
from tests.data.make import FAMILIES, Ending, make_minari

FIELDS = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
lengths = st.lists(st.integers(1, 9), min_size=1, max_size=7)


def arrays(sizes: list[int], seed: int = 0, *, discrete: bool = False) -> dict[str, np.ndarray]:
    """Random aligned arrays of episodes of the given lengths; every second one terminates."""
    rng = np.random.default_rng(seed)
    total = sum(sizes)
    observations = rng.normal(size=(total + len(sizes), 3)).astype(np.float32)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    rows = np.concatenate([np.arange(n) + starts[e] + e for e, n in enumerate(sizes)])
    ends = np.zeros(total, bool)
    ends[starts[1:] - 1] = True
    even = np.repeat(np.arange(len(sizes)) % 2 == 0, sizes)
    return {
        "observations": observations[rows],
        "actions": rng.integers(0, 4, total) if discrete else rng.uniform(-1, 1, (total, 2)).astype(np.float32),
        "rewards": rng.normal(size=total).astype(np.float32),
        "next_observations": observations[rows + 1],
        "terminations": ends & even,
        "truncations": ends & ~even,
    }


@given(sizes=lengths, discrete=st.booleans())
def test_arrays_come_back_as_given(sizes: list[int], discrete: bool) -> None:
    given_arrays = arrays(sizes, discrete=discrete)
    dataset = dataset_from_arrays(**given_arrays)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(dataset, name).numpy(), given_arrays[name], err_msg=name)
    assert dataset.episode_lengths.tolist() == sizes
    starts = np.concatenate([[0], np.cumsum(sizes)])
    returns = [given_arrays["rewards"][a:b].astype(np.float64).sum() for a, b in pairwise(starts)]
    np.testing.assert_allclose(dataset.episode_returns.numpy(), returns, atol=1e-12)


@given(sizes=lengths.filter(lambda found: len(found) > 1), data=st.data())
def test_select_and_split_keep_whole_episodes(sizes: list[int], data: st.DataObject) -> None:
    dataset = dataset_from_arrays(**arrays(sizes))
    chosen = data.draw(st.lists(st.integers(-len(sizes), len(sizes) - 1), min_size=1, max_size=5))
    part = dataset.select(chosen)
    for position, episode in enumerate(chosen):
        for name, value in part.episode(position).items():
            assert torch.equal(value, dataset.episode(episode)[name]), name
    assert len(part) == sum(sizes[e] for e in chosen)
    again = part.select([0])
    assert torch.equal(again.observations, dataset.episode(chosen[0])["observations"])
    train, held_out = dataset.split(0.4, seed=3)
    assert train.num_episodes + held_out.num_episodes == len(sizes)
    assert sorted([*train.rewards.tolist(), *held_out.rewards.tolist()]) == sorted(dataset.rewards.tolist())
    assert len({dataset.spec.content_hash, train.spec.content_hash, held_out.spec.content_hash}) == 3
    assert torch.equal(dataset.split(0.4, seed=3)[1].rewards, held_out.rewards)


def test_with_rewards_gives_a_new_dataset_and_leaves_the_old_one() -> None:
    dataset = dataset_from_arrays(**arrays([4, 3]))
    before = dataset.rewards.clone()
    values = np.arange(7.0)
    relabelled = dataset.with_rewards(values)
    values[:] = -1
    assert relabelled.rewards.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert torch.equal(dataset.rewards, before)
    assert relabelled.select([1]).rewards.tolist() == [4, 5, 6]
    assert relabelled.episode(1)["rewards"].tolist() == [4, 5, 6]
    indices = torch.tensor([[6, 0], [3, 3]])
    assert relabelled.gather(indices).rewards.tolist() == [[6, 0], [3, 3]]
    assert torch.equal(relabelled.gather(indices).observations, dataset.observations[indices])
    assert relabelled.spec.content_hash != dataset.spec.content_hash
    with pytest.raises(DatasetError, match=r"shape \(6,\) for 7"):
        dataset.with_rewards(np.zeros(6))
    with pytest.raises(DatasetError, match="reward 2 is nan"):
        dataset.with_rewards([0, 0, np.nan, 0, 0, 0, 0])


@given(sizes=lengths, length=st.integers(1, 5), stride=st.integers(1, 3))
def test_segments_are_all_windows_inside_episodes(sizes: list[int], length: int, stride: int) -> None:
    dataset = dataset_from_arrays(**arrays(sizes))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    wanted = [
        list(range(a + t, a + t + length))
        for a, n in zip(starts, sizes, strict=False)
        for t in range(0, n - length + 1, stride)
    ]
    if not wanted:
        with pytest.raises(DatasetError, match="longest has"):
            dataset.segments(length, stride)
    else:
        assert dataset.segments(length, stride).tolist() == wanted


def generators(*seeds: int) -> list[torch.Generator]:
    """One stream per seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_each_seed_draws_the_same_rows_alone_or_with_others() -> None:
    dataset = dataset_from_arrays(**arrays([9, 8, 7]))
    together, alone = generators(5, 6, 7), generators(6)
    for _ in range(3):
        many = dataset.sample(16, seeds=3, generator=together)
        one = dataset.sample(16, generator=alone)
        assert many.observations.shape == (3, 16, 3)
        assert torch.equal(many.observations[1], one.observations[0])
        assert torch.equal(many.terminations[1], one.terminations[0])
    with pytest.raises(ValueError, match="2 generators for 3 seeds"):
        dataset.sample(4, seeds=3, generator=generators(0, 1))
    assert dataset.sample(4, seeds=2, generator=torch.Generator().manual_seed(0)).rewards.shape == (2, 4)


def test_sampled_transitions_are_rows_of_the_dataset_and_all_are_reached() -> None:
    dataset = dataset_from_arrays(**arrays([5, 4]))
    indices = dataset.sample_indices(200, generators(1))
    batch = dataset.gather(indices)
    for name in FIELDS:
        assert torch.equal(getattr(batch, name), getattr(dataset, name)[indices]), name
    assert set(indices.flatten().tolist()) == set(range(9))


def test_a_batch_is_a_copy() -> None:
    dataset = dataset_from_arrays(**arrays([5]))
    before = dataset.observations.clone()
    dataset.sample(8, generator=generators(0)).observations.zero_()
    assert torch.equal(dataset.observations, before)


def test_batch_seed_axis_and_device() -> None:
    fields = {"observations": torch.zeros(4, 3), "next_observations": torch.zeros(4, 3), "actions": torch.zeros(4, 2)}
    flags = {name: torch.zeros(4) for name in ("rewards", "terminations", "truncations")}
    batch = Batch(**fields, **flags)
    assert batch.with_seed_axis().observations.shape == (1, 4, 3)
    assert batch.with_seed_axis().with_seed_axis().rewards.shape == (1, 4)
    assert batch.to("cpu").rewards.shape == (4,)


def test_negative_episode_and_missing_episode() -> None:
    dataset = dataset_from_arrays(**arrays([2, 3]))
    assert len(dataset.episode(-1)["rewards"]) == 3
    with pytest.raises(IndexError, match="episode 2 of a dataset with 2"):
        dataset.episode(2)
    with pytest.raises(IndexError):
        dataset.select([2])
    with pytest.raises(DatasetError, match="no episode"):
        dataset.select(torch.zeros(2, dtype=torch.bool))
    with pytest.raises(DatasetError, match="one episode"):
        dataset.select([0]).split(0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": np.zeros(3)}, "unequal lengths"),
        ({"next_observations": np.zeros((7, 2))}, "differ in shape"),
        ({"actions": np.full((7, 2), "left")}, "are not numbers"),
        ({"rewards": np.zeros((7, 2))}, r"expected \[7\]"),
    ],
)
def test_arrays_that_contradict_each_other(change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        dataset_from_arrays(**(arrays([4, 3]) | change))


def test_arrays_without_rows_and_without_a_last_flag() -> None:
    with pytest.raises(DatasetError, match="no rows"):
        dataset_from_arrays(**{name: value[:0] for name, value in arrays([4]).items()})
    dataset = dataset_from_arrays(**(arrays([4]) | {"terminations": np.zeros(4, bool)}))
    assert dataset.truncations.tolist() == [False, False, False, True]
    assert dataset.spec.notes == {"action_spaces_inferred": 1, "episodes_without_end_flag": 1}


def test_observation_statistics_match_numpy() -> None:
    given_arrays = arrays([30, 40])
    given_arrays["observations"] += 1e4
    mean, std = observation_statistics(dataset_from_arrays(**given_arrays))
    np.testing.assert_allclose(mean, given_arrays["observations"].astype(np.float64).mean(0), rtol=1e-6)
    np.testing.assert_allclose(std, given_arrays["observations"].astype(np.float64).std(0) + 1e-3, rtol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_observation_statistics_are_those_of_finite_values(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalizers, "CHUNK", 16)
    rng, given = np.random.default_rng(seed), arrays([30, 40])
    broken = rng.uniform(size=given["observations"].shape) < 0.1
    broken[0] = seed % 2  # the row that all are counted from
    if seed == 5:
        broken[:, 0] = True  # nothing is known of a column
    given["observations"] = np.where(
        broken, rng.choice([np.nan, np.inf, -np.inf], broken.shape), 1e3 + given["observations"]
    ).astype(np.float32)
    mean, std = observation_statistics(dataset_from_arrays(**given))
    kept = np.ma.masked_array(given["observations"].astype(np.float64), broken)
    np.testing.assert_allclose(mean, kept.mean(0).filled(0.0), rtol=1e-6)
    np.testing.assert_allclose(std, (kept.std(0) + 1e-3).filled(1.0), rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e6, 1e-6])
def test_a_column_that_never_changes_is_not_blown_up(value: float) -> None:
    given = arrays([30, 40])
    given["observations"][:, 0] = value
    _, std = observation_statistics(dataset_from_arrays(**given))
    assert std[0] == 1.0
    assert (std[1:] != 1.0).all()


def test_reward_transforms() -> None:
    dataset = dataset_from_arrays(**arrays([5, 6, 7]))
    returns = dataset.episode_returns
    scaled = dataset.with_rewards(reward_transform("return_range", dataset))
    assert float(scaled.episode_returns.max() - scaled.episode_returns.min()) == pytest.approx(1000, rel=1e-5)
    assert torch.equal(reward_transform("none", dataset), dataset.rewards)
    sparse = dataset.with_rewards((dataset.rewards > 0).float())
    assert set(reward_transform("goal_penalty", sparse).tolist()) == {-3.0, 0.0}
    assert ((reward_transform("goal_penalty", sparse) == 0) == (sparse.rewards == 1)).all()
    with pytest.raises(ConfigError, match="choose from none"):
        reward_transform("scale", dataset)
    with pytest.raises(DatasetError, match="needs a range"):
        reward_transform("return_range", dataset.select([0]))
    assert returns.shape == (3,)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_a_round_trip_through_minari_gives_equal_tensors(family: str, data_format: str) -> None:
    made = make_minari([Ending(3, True, False), Ending(1, False, True), Ending(4, False, False)], *FAMILIES[family])
    dataset = read_dataset(made)
    written = dataset.to_minari("test/round/trip-v0", data_format=data_format)
    again = read_dataset(written)
    assert again.spec.observation_space == dataset.spec.flattener.kept_space
    assert again.spec.observation_ranges == dataset.spec.observation_ranges
    assert again.spec.observation_keys == dataset.spec.observation_keys
    for name in (*FIELDS, "episode_starts"):
        assert torch.equal(getattr(again, name), getattr(dataset, name)), name
    with pytest.raises(DatasetError, match="exists"):
        dataset.to_minari("test/round/trip-v0")


def test_relabelled_selection_survives_the_round_trip() -> None:
    dataset = read_dataset(make_minari([Ending(3, True, False), Ending(2, False, True)], *FAMILIES["box64"]))
    changed = dataset.with_rewards(torch.arange(5) / 3).select([1])
    again = read_dataset(changed.to_minari("test/changed-v0"))
    assert torch.equal(again.rewards, changed.rewards)
    assert torch.equal(again.next_observations, changed.next_observations)


def test_a_faster_process_is_not_overwritten(tmp_path, monkeypatch) -> None:
    slow, fast = (dataset_from_arrays(**arrays([3, 2], seed=seed)) for seed in (0, 1))
    write = export.write_minari

    def late(*arguments, **options) -> None:
        write(*arguments, **options)
        monkeypatch.setattr(export, "write_minari", write)
        fast.to_minari("test/race-v0")

    monkeypatch.setattr(export, "write_minari", late)
    with pytest.raises(DatasetError, match="has been made by another process"):
        slow.to_minari("test/race-v0")
    assert torch.equal(read_dataset("test/race-v0").rewards, fast.rewards)
    assert [path.name for path in (tmp_path / "minari").iterdir()] == ["test"]


def test_a_broken_chain_cannot_be_written_and_leaves_nothing(tmp_path) -> None:
    values = arrays([4])
    values["next_observations"] = values["next_observations"] + 1
    with pytest.raises(DatasetError, match="not contiguous"):
        dataset_from_arrays(**values).to_minari("test/broken-v0")
    with pytest.raises(DatasetError, match="not a dataset id"):
        dataset_from_arrays(**arrays([4])).to_minari("no version")
    with pytest.raises(DatasetError, match=r"could not be written .* No storage implemented for csv"):
        dataset_from_arrays(**arrays([4])).to_minari("test/csv-v0", data_format="csv")
    assert not list((tmp_path / "minari").rglob("*"))


def test_replay_buffer_keeps_the_last_transitions() -> None:
    spec = dataset_from_arrays(**arrays([3])).spec
    buffer = ReplayBuffer(8, spec)
    with pytest.raises(DatasetError, match="empty"):
        buffer.sample(2)
    dataset = dataset_from_arrays(**arrays([5, 6], seed=4))
    for start, stop in ((0, 3), (3, 7), (7, 11)):
        buffer.add(*(getattr(dataset, name)[start:stop] for name in FIELDS))
    assert len(buffer) == 8
    kept = buffer.sample(400, generator=generators(0)).rewards
    assert set(kept.flatten().tolist()) == set(dataset.rewards[3:].tolist())
    large = ReplayBuffer(4, spec)
    large.extend(dataset)
    assert set(large.sample(200, generator=generators(0)).rewards.flatten().tolist()) == set(
        dataset.rewards[-4:].tolist()
    )
    with pytest.raises(DatasetError, match="observations have shape"):
        buffer.add(*(getattr(dataset, name)[:2] if name != "observations" else torch.zeros(2, 5) for name in FIELDS))


def test_spec_of_discrete_arrays() -> None:
    dataset = dataset_from_arrays(**arrays([50], discrete=True))
    assert isinstance(dataset.spec, DatasetSpec)
    assert dataset.spec.action_space == spaces.Discrete(4)
    assert dataset.spec.discrete
    assert dataset.actions.dtype == torch.int64
    assert isinstance(dataset, TransitionDataset)
