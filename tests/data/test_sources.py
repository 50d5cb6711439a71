"""Finding and reading: D4RL files of both ages, arrays, folders, episodes of T observations, and every kind of bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from rlkit2.data import DatasetWarning, TransitionDataset, local_datasets, read_dataset
from rlkit2.errors import ConfigError, CorruptDatasetError, DatasetError, DatasetNotFoundError
from tests.data.make import FAMILIES, Ending, box, make_minari

ENDINGS = [Ending(3, True, False), Ending(5, False, True), Ending(2, True, False)]


def minari_file(made: object) -> Path:
    """The HDF5 file of a made dataset."""
    return Path(made.storage.data_path) / "main_data.hdf5"


def d4rl(
    path: Path,
    sizes: list[int],
    *,
    new_names: bool = False,
    following: bool = False,
    timeouts: bool = True,
    cut: bool = False,
) -> dict[str, np.ndarray]:
    """A D4RL-style file; odd episodes time out, even ones terminate; `cut` leaves the last one without a flag."""
    total = sum(sizes)
    ends = np.cumsum(sizes) - 1
    episodes, steps = np.repeat(np.arange(len(sizes)), sizes), np.concatenate([np.arange(n) for n in sizes])
    flags = np.zeros((2, total), bool)
    for episode, end in enumerate(ends):
        flags[episode % 2, end] = not (cut and end == ends[-1])
    values = {
        "observations": np.stack([episodes, steps], 1).astype(np.float64),
        "actions": np.stack([episodes, steps], 1).astype(np.float32) / 100,
        "rewards": 100.0 * episodes + steps,
        "terminations" if new_names else "terminals": flags[0],
    }
    if timeouts:
        values["truncations" if new_names else "timeouts"] = flags[1]
    if following:
        values["next_observations"] = np.stack([episodes, steps + 1], 1).astype(np.float32)
    with h5py.File(path, "w") as file:
        for name, value in values.items():
            file[name] = value
        file.create_group("infos")["qpos"] = np.zeros((total, 2))
    return values


def expected(sizes: list[int], dataset: TransitionDataset, *, following: bool, cut: bool) -> None:
    """Rows kept: all with next observations; else none of the last steps that did not terminate."""
    rows = []
    for episode, size in enumerate(sizes):
        ended = episode % 2 == 0 and not (cut and episode == len(sizes) - 1)
        rows += [(episode, step) for step in range(size if following or ended else size - 1)]
    np.testing.assert_array_equal(dataset.observations.numpy(), np.array(rows, np.float32).reshape(-1, 2))
    after = dataset.next_observations.numpy()
    for (episode, step), seen, ended in zip(rows, after, dataset.terminations.tolist(), strict=True):
        assert tuple(seen) == (episode, step + 1) or (ended and not following and tuple(seen) == (episode, step))
    np.testing.assert_array_equal(dataset.rewards.numpy(), [100 * e + t for e, t in rows])
    assert (dataset.terminations | dataset.truncations)[dataset.episode_starts[1:] - 1].all()
    assert int((dataset.terminations | dataset.truncations).sum()) == dataset.num_episodes


sizes_lists = st.lists(st.integers(1, 5), min_size=1, max_size=5).filter(lambda sizes: sizes[0] > 1)


@given(sizes=sizes_lists, new_names=st.booleans(), following=st.booleans(), timeouts=st.booleans(), cut=st.booleans())
def test_d4rl_files_of_both_ages(
    tmp_path: Path, sizes: list[int], new_names: bool, following: bool, timeouts: bool, cut: bool
) -> None:
    path = tmp_path / "file.hdf5"
    values = d4rl(path, sizes, new_names=new_names, following=following, timeouts=timeouts or not following, cut=cut)
    dataset = read_dataset(path)
    expected(sizes, dataset, following=following, cut=cut)
    assert dataset.spec.action_space == spaces.Box(-1, 1, (2,), np.float32)
    from_mapping = read_dataset(values)
    assert torch.equal(from_mapping.observations, dataset.observations)
    assert torch.equal(from_mapping.terminations, dataset.terminations)


def test_d4rl_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "file.hdf5"
    d4rl(path, [3, 4], timeouts=False)
    with pytest.raises(CorruptDatasetError, match="neither timeouts nor next_observations"):
        read_dataset(path)
    d4rl(path, [3, 4])
    with h5py.File(path, "a") as file:
        del file["rewards"]
    with pytest.raises(CorruptDatasetError, match="lacks rewards; it has actions"):
        read_dataset(path)
    d4rl(path, [3, 4])
    with h5py.File(path, "a") as file:
        del file["actions"]
        file["actions"] = np.zeros((6, 2), np.float32)
    with pytest.raises(CorruptDatasetError, match="unequal lengths: observations 7, actions 6"):
        read_dataset(path)
    d4rl(path, [3, 4])
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(CorruptDatasetError, match="truncated or damaged"):
        read_dataset(path)
    path.write_bytes(b"")
    with pytest.raises(CorruptDatasetError, match="not a readable HDF5 file"):
        read_dataset(path)
    d4rl(path, [2])
    with h5py.File(path, "a") as file:
        for name in ("observations", "actions", "rewards", "terminals", "timeouts"):
            values = file[name][:0]
            del file[name]
            file[name] = values
    with pytest.raises(CorruptDatasetError, match="no rows"):
        read_dataset(path)


def test_unknown_ids_say_where_was_searched_and_what_is_close() -> None:
    made = make_minari(ENDINGS, *FAMILIES["box32"], dataset_id="test/hopper/medium-v0")
    assert len(read_dataset("test/hopper/medium-v0")) == 10
    with pytest.raises(
        DatasetNotFoundError,
        match=r"'test/hopper/medum-v0' in .*/minari, and there is no network.*close ids here: test/hopper/medium-v0",
    ):
        read_dataset("test/hopper/medum-v0")
    with pytest.raises(DatasetNotFoundError, match="not a complete Minari id"):
        read_dataset("something")
    with pytest.raises(DatasetNotFoundError, match="does not exist"):
        read_dataset("missing/file.hdf5")
    assert made.total_steps == 10


def test_folders(tmp_path: Path) -> None:
    made = make_minari(ENDINGS, *FAMILIES["box32"])
    data_path = Path(made.storage.data_path)
    assert torch.equal(read_dataset(data_path).rewards, read_dataset(data_path.parent).rewards)
    moved = tmp_path / "elsewhere"
    shutil.copytree(data_path.parent, moved)
    assert len(read_dataset(str(moved))) == 10
    assert len(read_dataset(moved / "data" / "main_data.hdf5")) == 10
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="a folder but not a dataset"):
        read_dataset(tmp_path / "empty")


def test_observation_keys_are_for_dict_observations_only(tmp_path: Path) -> None:
    values = d4rl(tmp_path / "file.hdf5", [3, 2])
    for source in (tmp_path / "file.hdf5", values, read_dataset(values)):
        with pytest.raises(ConfigError, match="Dict of a Minari dataset only"):
            read_dataset(source, observation_keys=["observation"])
    goal = read_dataset(make_minari(ENDINGS, *FAMILIES["goal"]))
    assert read_dataset(goal, observation_keys=["observation", "desired_goal"]) is goal


def test_datasets_that_are_still_being_written_are_not_listed(tmp_path: Path) -> None:
    made = make_minari(ENDINGS, *FAMILIES["box32"])
    folder = Path(made.storage.data_path).parent
    shutil.copytree(folder, tmp_path / "minari" / ".building-x" / "new")
    assert list(local_datasets()) == [made.spec.dataset_id]


def test_progress_counts_the_steps_read(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    made = make_minari(ENDINGS, *FAMILIES["box32"])
    read_dataset(made, progress=lambda *call: calls.append(call))
    d4rl(tmp_path / "file.hdf5", [3, 2], following=True)
    read_dataset(tmp_path / "file.hdf5", progress=lambda *call: calls.append(call))
    assert calls == [(3, 10), (8, 10), (10, 10), (3, 5), (5, 5)]


def damage(data_path: Path, what: str) -> None:
    """Damage a Minari dataset in one way."""
    file_path, metadata_path = data_path / "main_data.hdf5", data_path / "metadata.json"
    if what == "truncated":
        file_path.write_bytes(file_path.read_bytes()[: file_path.stat().st_size // 2])
        return
    if what == "no file":
        file_path.unlink()
        return
    if what == "bad json":
        metadata_path.write_text("{")
        return
    if what == "no metadata":
        metadata_path.unlink()
        return
    if what == "bad space":
        metadata_path.write_text(
            json.dumps(json.loads(metadata_path.read_text()) | {"observation_space": '{"type": "Box"}'})
        )
        return
    with h5py.File(file_path, "a") as file:
        group = file["episode_1"]
        if what == "missing array":
            del group["rewards"]
        elif what == "missing episode":
            del file["episode_1"]
        else:
            name, shape = {
                "wrong lengths": ("rewards", (3,)),
                "mixed shapes": ("observations", (6, 3)),
                "too many": ("observations", (9, 2)),
            }[what]
            del group[name]
            group[name] = np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", "truncated or damaged"),
        ("no file", "has no main_data.hdf5"),
        ("bad json", "not valid JSON"),
        ("no metadata", "no metadata.json"),
        ("bad space", "observation_space cannot be read"),
        ("missing array", "episode 1 lacks an array: .*rewards"),
        ("missing episode", "holds 2 episodes, its metadata say 3"),
        ("wrong lengths", "episode 1 has 5 actions, 3 rewards"),
        ("mixed shapes", "episode 1: observations or actions do not fit the spaces"),
        ("too many", "episode 1 has 9 observations for 5 actions; 6 expected"),
    ],
)
def test_damaged_minari_datasets_are_refused_and_leave_nothing(tmp_path: Path, what: str, message: str) -> None:
    made = make_minari(ENDINGS, *FAMILIES["box32"])
    damage(Path(made.storage.data_path), what)
    with pytest.raises(DatasetError, match=message):
        read_dataset(made.spec.dataset_id)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_damaged_arrow_dataset() -> None:
    made = make_minari(ENDINGS, *FAMILIES["box32"], "arrow")
    part = next(Path(made.storage.data_path).rglob("*.arrow"))
    part.write_bytes(part.read_bytes()[:200])
    with pytest.raises(CorruptDatasetError, match="cannot be read"):
        read_dataset(made.spec.dataset_id)


def test_no_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_minari(ENDINGS, *FAMILIES["box32"])

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(CorruptDatasetError, match="permission denied"):
        read_dataset(made.spec.dataset_id)


def test_zero_episodes() -> None:
    made = make_minari(ENDINGS, *FAMILIES["box32"])
    file_path = minari_file(made)
    with h5py.File(file_path, "a") as file:
        for name in list(file):
            del file[name]
    metadata_path = file_path.with_name("metadata.json")
    metadata_path.write_text(
        json.dumps(json.loads(metadata_path.read_text()) | {"total_episodes": 0, "total_steps": 0})
    )
    with pytest.raises(CorruptDatasetError, match="no usable episode"):
        read_dataset(made.spec.dataset_id)
    made.episode_indices = np.zeros(0, np.int64)
    with pytest.raises(DatasetError, match="no episodes left"):
        read_dataset(made)


def test_episodes_with_as_many_observations_as_actions() -> None:
    made = make_minari(ENDINGS, *FAMILIES["box32"])
    with h5py.File(minari_file(made), "a") as file:
        for name in file:
            values = file[name]["observations"][:-1]
            del file[name]["observations"]
            file[name]["observations"] = values
    dataset = read_dataset(made.spec.dataset_id)
    assert dataset.episode_lengths.tolist() == [3, 4, 2]
    assert dataset.terminations.nonzero().flatten().tolist() == [2, 8]
    assert dataset.truncations.nonzero().flatten().tolist() == [6]
    assert dataset.spec.notes == {
        "episodes_without_final_observation": 2,
        "last_steps_dropped_for_want_of_a_next_observation": 1,
    }
    alive = ~dataset.terminations
    assert torch.equal(dataset.next_observations[alive], dataset.observations[alive] + torch.tensor([0.0, 1.0]))


def test_episodes_may_be_stored_in_different_types() -> None:
    made = make_minari(ENDINGS, *FAMILIES["box32"])
    with h5py.File(minari_file(made), "a") as file:
        for name, dtype in (("episode_0", np.int32), ("episode_2", np.float32)):
            values = file[name]["rewards"][:]
            del file[name]["rewards"]
            file[name]["rewards"] = values.astype(dtype)
        file["episode_1"]["rewards"][1] = 0.75
        flags = file["episode_1"]["truncations"][:]
        del file["episode_1"]["truncations"]
        file["episode_1"]["truncations"] = flags.astype(np.uint8)
    dataset = read_dataset(made.spec.dataset_id)
    assert dataset.rewards.tolist() == [0, 1, 2, 100, 0.75, 102, 103, 104, 200, 201]
    assert dataset.truncations.nonzero().flatten().tolist() == [7]


def test_nan_is_counted_not_hidden() -> None:
    made = make_minari(ENDINGS, *FAMILIES["box32"])
    with h5py.File(minari_file(made), "a") as file:
        file["episode_1"]["rewards"][2] = np.nan
    dataset = read_dataset(made.spec.dataset_id)
    assert dataset.spec.notes == {"non_finite_values": 1}
    assert bool(dataset.rewards[5].isnan())


def test_an_environment_that_cannot_be_rebuilt_does_not_matter() -> None:
    made = make_minari(ENDINGS, box(), box())
    metadata_path = Path(made.storage.data_path) / "metadata.json"
    metadata = json.loads(metadata_path.read_text())
    gone = {"id": "Gone-v0", "entry_point": "no.such:Env", "additional_wrappers": [], "field_of_the_future": 1}
    metadata_path.write_text(
        json.dumps(metadata | {"env_spec": json.dumps(gone), "eval_env_spec": "not json", "minari_version": "99.0"})
    )
    dataset = read_dataset(made.spec.dataset_id)
    assert dataset.spec.env_spec is not None
    assert dataset.spec.env_spec.id == "Gone-v0"
    assert dataset.spec.eval_env_spec is None


# id: steps, episodes, mean return, smallest, largest, terminated, truncated, observation size (the cards that came with the recordings)
RECORDED = {
    "zoo/hopper/expert-v0": (100000, 103, 3516.64, 98.38, 3635.81, 5, 98, 11),
    "zoo/hopper/medium-v0": (100000, 274, 1309.66, 759.38, 3496.52, 272, 2, 11),
    "zoo/hopper/medium-replay-v0": (100000, 871, 298.97, 4.88, 2186.96, 870, 1, 11),
    "zoo/hopper/medium-expert-v0": (100000, 189, 1908.78, 112.64, 3642.65, 140, 49, 11),
    "zoo/halfcheetah/medium-v0": (100000, 100, 4141.67, -87.89, 5401.33, 0, 100, 17),
    "zoo/halfcheetah/medium-replay-v0": (100000, 100, 1008.77, -898.25, 5187.66, 0, 100, 17),
    "zoo/halfcheetah/medium-expert-v0": (100000, 100, 7834.66, -66.96, 12069.05, 0, 100, 17),
    "zoo/pendulum/mixed-v0": (30000, 150, -627.38, -1738.97, -0.49, 0, 150, 3),
    "zoo/cartpole/mixed-v0": (20000, 143, 139.86, 10.0, 500.0, 116, 27, 4),
    "zoo/lunarlander/mixed-v0": (50000, 115, 2.38, -396.44, 279.13, 77, 38, 8),
    "zoo/pointmaze-umaze/scripted-v0": (50000, 435, 0.84, 0.0, 1.0, 0, 435, 6),
}


@pytest.mark.parametrize("dataset_id", RECORDED)
def test_recorded_datasets_equal_their_cards(real_datasets: Path, dataset_id: str) -> None:
    import minari

    steps, episodes, mean, low, high, terminated, truncated, size = RECORDED[dataset_id]
    dataset = read_dataset(dataset_id)
    returns = dataset.episode_returns
    assert (len(dataset), dataset.num_episodes, dataset.spec.observation_size) == (steps, episodes, size)
    assert (int(dataset.terminations.sum()), int(dataset.truncations.sum())) == (terminated, truncated)
    np.testing.assert_allclose([returns.mean(), returns.min(), returns.max()], [mean, low, high], atol=6e-3)
    assert dataset.spec.notes == {}
    assert dataset.spec.eval_env_spec is not None
    for index in (0, episodes // 2, episodes - 1):
        episode = minari.load_dataset(dataset_id)[index]
        rows = dataset.spec.flattener.flatten(episode.observations).astype(np.float32)
        mine = dataset.episode(index)
        np.testing.assert_array_equal(mine["observations"].numpy(), rows[:-1])
        np.testing.assert_array_equal(mine["next_observations"].numpy(), rows[1:])
        np.testing.assert_array_equal(mine["actions"].numpy(), episode.actions)
        np.testing.assert_array_equal(mine["rewards"].numpy(), episode.rewards.astype(np.float32))


@pytest.mark.parametrize("flag", ["terminations", "truncations"])
def test_flags_in_mid_episode_are_said(flag: str) -> None:
    made = make_minari(ENDINGS, *FAMILIES["box32"])
    with h5py.File(minari_file(made), "a") as file:
        file["episode_1"][flag][0] = True
    with pytest.warns(DatasetWarning, match="1 steps in mid-episode are flagged as ends"):
        dataset = read_dataset(made.spec.dataset_id)
    assert dataset.spec.notes["flags_in_mid_episode"] == 1
    assert getattr(dataset, flag)[int(dataset.episode_starts[1])]
