"""Files in the layouts that their makers document, each read into the transitions they hold; where rows become episodes; readers of a user."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from rlkit2.data import DatasetWarning, Episode, Reader, ReadOptions, TransitionDataset, local_datasets, read_dataset
from rlkit2.data import sources as all_sources
from rlkit2.errors import ConfigError, CorruptDatasetError, DatasetError
from tests.data.make import FAMILIES, Ending, make_minari

LENGTHS = [4, 1, 6, 3]
STEPS = sum(LENGTHS)
# the columns of a table of one's own
MAPPING = {
    "observations": "s_*",
    "next_observations": "n_*",
    "actions": ["left", "right"],
    "rewards": "earned",
    "terminations": "over",
    "truncations": "cut",
}
TERMINATED = [True, False, False, True]


def episode(number: int, steps: int) -> dict[str, np.ndarray]:
    """An episode whose values say which it is: T + 1 observations, T actions and rewards."""
    rng = np.random.default_rng(number)
    return {
        "observations": np.stack(
            [np.full(steps + 1, number), np.arange(steps + 1), rng.normal(size=steps + 1)], 1
        ).astype(np.float32),
        "actions": rng.uniform(-1, 1, (steps, 2)).astype(np.float32),
        "rewards": 100.0 * number + np.arange(steps),
    }


EPISODES = [episode(number, steps) for number, steps in enumerate(LENGTHS)]


def rows(name: str, stop: int | None = None) -> np.ndarray:
    """One field of all episodes, row by row."""
    return np.concatenate(
        [made[name][: len(made["rewards"])] if stop is None else made[name][:stop] for made in EPISODES]
    )


def ends(which: bool) -> np.ndarray:
    """Flags at the last step of the episodes that terminate (True) or are cut off (False)."""
    return np.concatenate(
        [(np.arange(n) == n - 1) & (ended is which) for n, ended in zip(LENGTHS, TERMINATED, strict=True)]
    )


def following() -> np.ndarray:
    return np.concatenate([made["observations"][1:] for made in EPISODES])


def read(path: Any, **options: Any) -> TransitionDataset:
    """Read without the notices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DatasetWarning)
        return read_dataset(path, **options)


def whole(dataset: TransitionDataset, terminated: list[bool] = TERMINATED) -> None:
    """All transitions are there, with their true next observations and endings."""
    assert dataset.episode_lengths.tolist() == LENGTHS
    np.testing.assert_array_equal(dataset.observations.numpy(), rows("observations"))
    np.testing.assert_array_equal(dataset.next_observations.numpy(), following())
    np.testing.assert_array_equal(dataset.actions.numpy(), rows("actions"))
    last = dataset.episode_starts[1:] - 1
    assert dataset.terminations[last].tolist() == terminated
    assert dataset.truncations[last].tolist() == [not ended for ended in terminated]


def write_npz(path: Path) -> dict[str, Any]:
    np.savez(
        path,
        observations=rows("observations"),
        actions=rows("actions"),
        rewards=rows("rewards"),
        next_observations=following(),
        terminals=ends(True),
        timeouts=ends(False),
    )
    return {}


def write_ogbench(path: Path) -> dict[str, Any]:
    """T + 1 rows per trajectory; the last one is flagged, and its action stands for nothing."""
    last = np.concatenate([np.arange(n + 1) == n for n in LENGTHS])
    actions = np.concatenate([np.concatenate([made["actions"], np.full((1, 2), 9.0, np.float32)]) for made in EPISODES])
    masks = np.concatenate(
        [np.append((np.arange(n) != n - 1) | (not ended), True) for n, ended in zip(LENGTHS, TERMINATED, strict=True)]
    )
    rewards = np.concatenate([np.append(made["rewards"], 0) for made in EPISODES])
    arrays = {"actions": actions, "terminals": last.astype(np.float32), "masks": masks.astype(np.float32)}
    np.savez(path, observations=np.concatenate([made["observations"] for made in EPISODES]), rewards=rewards, **arrays)
    return {}


def write_robomimic(path: Path) -> dict[str, Any]:
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"], data.attrs["env_args"] = sum(LENGTHS), "{}"
        for number, (made, ended) in enumerate(zip(EPISODES, TERMINATED, strict=True)):
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = len(made["rewards"])
            for name in ("actions", "rewards"):
                demo[name] = made[name]
            demo["dones"] = ((np.arange(len(made["rewards"])) == len(made["rewards"]) - 1) & ended).astype(int)
            demo["states"] = np.zeros((len(made["rewards"]), 5))
            for group, part in (("obs", made["observations"][:-1]), ("next_obs", made["observations"][1:])):
                demo[f"{group}/a_place"], demo[f"{group}/b_rest"] = part[:, :1], part[:, 1:]
    return {}


def write_table(path: Path) -> dict[str, Any]:
    observations, after, actions = rows("observations"), following(), rows("actions")
    columns = {f"s_{column}": observations[:, column] for column in range(3)}
    columns |= {f"n_{column}": after[:, column] for column in range(3)}
    columns |= {
        "left": actions[:, 0],
        "right": actions[:, 1],
        "earned": rows("rewards"),
        "over": ends(True),
        "cut": ends(False),
    }
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, path) if path.suffix == ".parquet" else pyarrow.csv.write_csv(table, path)
    return {"columns": MAPPING}


LAYOUTS = {
    "own.npz": write_npz,
    "ogbench.npz": write_ogbench,
    "robomimic.hdf5": write_robomimic,
    "own.csv": write_table,
    "own.parquet": write_table,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_transition_of_a_documented_layout(tmp_path: Path, name: str) -> None:
    options = LAYOUTS[name](tmp_path / name)
    dataset = read(tmp_path / name, **options)
    whole(dataset)
    np.testing.assert_array_equal(dataset.rewards.numpy(), rows("rewards"))
    assert torch.equal(read(tmp_path / name, **options).observations, dataset.observations)  # from the cache
    with pytest.warns(DatasetWarning, match="inferred"):
        read_dataset(tmp_path / name, **options)
    copy = dataset.to_minari("test/imported-v0")
    whole(read(copy))


def test_ogbench_files_without_rewards_end_nowhere_for_good(tmp_path: Path) -> None:
    write_ogbench(tmp_path / "file.npz")
    with np.load(tmp_path / "file.npz") as file:
        kept = {name: file[name] for name in ("observations", "actions", "terminals")}
    np.savez(tmp_path / "file.npz", **kept)
    whole(read(tmp_path / "file.npz"), [False] * 4)


def write_d3rlpy(path: Path, version: int) -> None:
    with h5py.File(path, "w") as file:
        if version == 1:
            file["observations"], file["actions"], file["rewards"] = (
                rows("observations"),
                rows("actions"),
                rows("rewards"),
            )
            file["terminals"], file["episode_terminals"] = (
                ends(True).astype(float),
                (ends(True) | ends(False)).astype(float),
            )
        else:
            file["columns"] = ["observations", "actions", "rewards", "terminated"]
            file["num_episodes"], file["version"] = 4, "2.1"
            for number, (made, ended) in enumerate(zip(EPISODES, TERMINATED, strict=True)):
                file[f"observations_{number}"] = made["observations"][:-1]
                file[f"actions_{number}"] = made["actions"]
                file[f"rewards_{number}"] = made["rewards"][:, None]
                file[f"terminated_{number}"] = ended


@pytest.mark.parametrize("version", [1, 2])
def test_d3rlpy_replay_buffers_of_both_versions(tmp_path: Path, version: int) -> None:
    """Neither stores the observation after the last action."""
    write_d3rlpy(tmp_path / "buffer.h5", version)
    dataset = read(tmp_path / "buffer.h5")
    assert dataset.episode_lengths.tolist() == [4, 5, 3]  # the episode of one step has nothing left
    assert dataset.terminations.nonzero().flatten().tolist() == [3, 11]
    assert dataset.spec.notes["last_steps_dropped_for_want_of_a_next_observation"] == 2
    alive = ~dataset.terminations
    assert (dataset.next_observations[alive, 1] == dataset.observations[alive, 1] + 1).all()


def write_lerobot(path: Path, version: int, more: dict[str, Any] | None = None, keys: int = 1) -> None:
    """Frames of every episode: a file each (version 2), or all in two files that cut an episode in half (version 3)."""
    names = [f"observation.{name}" for name in ("state", "environment_state")[:keys]]
    frames: dict[str, Any] = {"episode_index": [], "frame_index": [], "action": rows("actions").tolist()}
    for name, columns in zip(names, np.split(rows("observations"), [2] if keys == 2 else [], axis=1), strict=True):
        frames[name] = columns.tolist()
    for number, steps in enumerate(LENGTHS):
        frames["episode_index"] += [number] * steps
        frames["frame_index"] += range(steps)
    frames |= more or {}
    features: dict[str, Any] = {name: {"dtype": "float32", "shape": [1]} for name in frames}
    features |= {"observation.images.top": {"dtype": "video", "shape": [3, 96, 96]}, "task": {"dtype": "string"}}
    info = {"codebase_version": f"v{version}.0", "total_episodes": 4, "total_frames": 14, "features": features}
    (path / "meta").mkdir(parents=True)
    (path / "meta" / "info.json").write_text(json.dumps(info))
    folder = path / "data" / "chunk-000"
    folder.mkdir(parents=True)
    table, cuts = pyarrow.table(frames), np.cumsum([0, *LENGTHS])
    if version == 3:
        cuts = np.array([0, 7, 14])
    for number, (start, stop) in enumerate(itertools.pairwise(cuts.tolist())):
        name = f"file-{number:03d}" if version == 3 else f"episode_{number:06d}"
        pyarrow.parquet.write_table(table.slice(start, stop - start), folder / f"{name}.parquet")


def rewarded() -> dict[str, Any]:
    """Rewards and ends of LeRobot's frames."""
    return {"next.reward": rows("rewards"), "next.done": ends(True) | ends(False), "next.success": ends(True)}


@pytest.mark.parametrize("version", [2, 3])
def test_lerobot_folders_of_both_versions(tmp_path: Path, version: int) -> None:
    """The observation after the last action is not stored; success is an end, another end is a cut; cameras are left out, and said."""
    write_lerobot(tmp_path / "set", version, rewarded())
    dataset = read(tmp_path / "set")
    assert dataset.episode_lengths.tolist() == [4, 5, 3]  # the episode of one step has nothing left
    assert dataset.terminations.nonzero().flatten().tolist() == [3, 11]
    kept = np.delete(np.arange(14), [4, 10])
    np.testing.assert_array_equal(dataset.observations.numpy(), rows("observations")[kept])
    np.testing.assert_array_equal(dataset.actions.numpy(), rows("actions")[kept])
    np.testing.assert_array_equal(dataset.rewards.numpy(), rows("rewards")[kept])
    alive = ~dataset.terminations
    assert (dataset.next_observations[alive, 1] == dataset.observations[alive, 1] + 1).all()
    assert dataset.spec.notes["cameras_left_out"] == 1
    assert "done_taken_as_termination" not in dataset.spec.notes


def test_lerobot_without_rewards_or_reasons(tmp_path: Path) -> None:
    """Rewards are 0 and said; a bare done flag ends an episode, unless the task never terminates; several observations are a Dict."""
    write_lerobot(tmp_path / "plain", 2, keys=2)
    plain = read(tmp_path / "plain")
    assert not plain.terminations.any()
    assert not plain.rewards.any()
    assert plain.spec.notes["steps_without_rewards"] == 14
    assert plain.spec.observation_ranges == {"environment_state": (0, 1), "state": (1, 3)}
    write_lerobot(tmp_path / "done", 3, {"next.done": ends(True) | ends(False), "next.reward": rows("rewards")})
    done = read(tmp_path / "done")
    assert int(done.terminations.sum()) == 4 == done.spec.notes["done_taken_as_termination"]
    assert not read(tmp_path / "done", never_terminates=True).terminations.any()


@pytest.mark.parametrize("version", [2, 3])
def test_lerobot_folders_with_something_missing(tmp_path: Path, version: int) -> None:
    write_lerobot(tmp_path / "set", version)
    max((tmp_path / "set" / "data").rglob("*.parquet")).unlink()
    with pytest.raises(CorruptDatasetError, match=r"holds .* episodes, meta/info.json says 4|do not follow"):
        read(tmp_path / "set")
    (tmp_path / "set" / "meta" / "info.json").write_text('{"features": 3}')
    with pytest.raises(CorruptDatasetError, match="not LeRobot's description"):
        read(tmp_path / "set")


def write_vd4rl(folder: Path, layout: str) -> None:
    folder.mkdir()
    parts = []
    for made, ended in zip(EPISODES, TERMINATED, strict=True):
        steps = len(made["rewards"])
        last = np.arange(steps + 1) == steps
        image = np.repeat(made["observations"][:, :1, None, None] * 10 + made["observations"][:, 1:2, None, None], 3, 3)
        part = {
            "image": image.astype(np.uint8),
            "action": np.concatenate([np.full((1, 2), 0.0, np.float32), made["actions"]]),
            "reward": np.concatenate([[0.0], made["rewards"]]),
        }
        if layout == "older":
            part["discount"] = np.where(last & ended, 0.0, 1.0)
        else:
            part |= {"is_first": np.arange(steps + 1) == 0, "is_last": last, "is_terminal": last & ended}
        parts.append(part)
    if layout == "one file":
        np.savez(folder / "all.npz", **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    else:
        for number, part in enumerate(parts):
            np.savez_compressed(folder / f"2022-{number}.npz", **part)


@pytest.mark.parametrize("layout", ["a file an episode", "one file", "older"])
def test_vd4rl_episodes(tmp_path: Path, layout: str) -> None:
    """Row t holds the action that led to image t; the first row's belongs to no step."""
    folder = tmp_path / "64px"
    write_vd4rl(folder, layout)
    dataset = read(folder)
    assert dataset.observations.shape == (14, 1, 1, 3)
    assert dataset.episode_lengths.tolist() == LENGTHS
    assert (
        dataset.observations[:, 0, 0, 0].tolist()
        == (rows("observations")[:, 0] * 10 + rows("observations")[:, 1]).tolist()
    )
    assert (dataset.next_observations == dataset.observations + 1).all()
    np.testing.assert_array_equal(dataset.actions.numpy(), rows("actions"))
    np.testing.assert_array_equal(dataset.rewards.numpy(), rows("rewards"))
    assert dataset.terminations[dataset.episode_starts[1:] - 1].tolist() == TERMINATED
    if layout == "one file":
        assert torch.equal(read(folder / "all.npz").rewards, dataset.rewards)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reward": np.float32(1.0)}, "lacks|has shape|no usable"),
        ({"action": np.zeros((3, 2))}, r"has 5 rewards, but action has shape \(3, 2\)"),
        ({"is_terminal": np.zeros(4, bool)}, "has 5 rewards, but is_terminal"),
    ],
)
def test_vd4rl_files_that_contradict_themselves(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    arrays = {
        "image": np.zeros((5, 2, 2, 3), np.uint8),
        "action": np.zeros((5, 2)),
        "reward": np.zeros(5),
        "is_terminal": np.zeros(5, bool),
    }
    np.savez(tmp_path / "one.npz", **(arrays | changed))
    with pytest.raises(CorruptDatasetError, match=message):
        read(tmp_path / "one.npz")


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "terminals"])
@pytest.mark.parametrize("layout", [write_npz, write_ogbench])
def test_a_single_value_where_an_array_belongs(tmp_path: Path, layout: Any, name: str) -> None:
    layout(tmp_path / "file.npz")
    with np.load(tmp_path / "file.npz") as file:
        arrays = {key: file[key] for key in file.files}
    np.savez(tmp_path / "file.npz", **(arrays | {name: np.float32(1)}))
    with pytest.raises(CorruptDatasetError, match=r"is a single value|differ in length"):
        read(tmp_path / "file.npz")


NO_NUMBERS = [np.zeros(4, [("a", "i4")]), np.array([b"x"] * 4), np.zeros(4, complex), np.float32(1)]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: str(value.dtype))
@pytest.mark.parametrize("name", ["actions_0", "actions_2", "rewards_0", "rewards_2", "observations_2", "terminated_0"])
def test_what_is_no_array_of_numbers_is_refused_wherever_it_comes(tmp_path: Path, name: str, value: Any) -> None:
    """In the first episode or a later one, of the right length or not."""
    if name == "terminated_0" and not value.shape:
        return  # a single flag is what belongs there
    write_d3rlpy(tmp_path / "buffer.h5", 2)
    with h5py.File(tmp_path / "buffer.h5", "r+") as file:
        del file[name]
        file[name] = value
    with pytest.raises(DatasetError):
        read(tmp_path / "buffer.h5")


def test_steps_that_do_not_add_up_are_named() -> None:
    """A Minari file that has lost steps of an episode, or gained some."""
    for change in (-1, 1):
        made = make_minari(
            [Ending(3, True, False), Ending(5, False, True)], *FAMILIES["box32"], dataset_id=f"test/lost{change + 1}-v0"
        )
        with h5py.File(Path(made.storage.data_path) / "main_data.hdf5", "a") as file:
            for name in ("observations", "actions", "rewards", "terminations", "truncations"):
                values = file["episode_1"][name][()]
                del file["episode_1"][name]
                file["episode_1"][name] = values[:change] if change < 0 else np.concatenate([values, values[-1:]])
        with pytest.raises(CorruptDatasetError, match=f"holds {8 + change} steps, its metadata say 8"):
            read(made.spec.dataset_id)


def test_d3rlpy_tuples_become_tuples(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "buffer.h5", "w") as file:
        file["columns"], file["num_episodes"] = ["observations", "actions", "rewards", "terminated"], 1
        file["observations_0_0"], file["observations_0_1"] = np.zeros((5, 2)), np.ones((5, 3))
        file["actions_0"], file["rewards_0"], file["terminated_0"] = np.arange(5)[:, None] % 3, np.zeros((5, 1)), True
    dataset = read(tmp_path / "buffer.h5")
    assert isinstance(dataset.spec.observation_space, spaces.Tuple)
    assert dataset.observations[0].tolist() == [0, 0, 1, 1, 1]
    assert dataset.spec.action_space == spaces.Discrete(3)


def test_columns_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    header = ["day", *(f"o_{column}" for column in (10, 2, 1)), "a", "reward", "done"]
    lines = [[f"2020-01-0{day}", 10 + step, 2, 1, step % 2, 0.5, int(step == 2)] for day in (1, 2) for step in range(3)]
    path.write_text("\n".join(",".join(map(str, line)) for line in [header, *lines]))
    dataset = read(path, columns={"episodes": "day"})
    assert dataset.episode_lengths.tolist() == [3, 3]
    assert dataset.observations[:, 2].tolist() == [10, 11, 12] * 2  # o_1, o_2, o_10
    assert dataset.terminations.tolist() == [False, False, True] * 2
    with pytest.raises(DatasetError, match="neither timeouts nor next_observations"):
        read(path)
    with pytest.raises(DatasetError, match="no column 'x_\\*' for observations; it has day"):
        read(path, columns={"observations": "x_*", "episodes": "day"})
    with pytest.raises(ConfigError, match="fields are observations"):
        read(path, columns={"states": "o_*"})
    with pytest.raises(DatasetError, match=r"column 'day' for rewards holds .*, not numbers"):
        read(path, columns={"rewards": "day", "episodes": "day"})
    pyarrow.parquet.write_table(
        pyarrow.table(
            {
                "observation": [[1.0, 2.0], [3.0, 4.0]],
                "action": [0, 1],
                "reward": [0.0, 1.0],
                "episode": [0, 0],
                "done": [False, True],
            }
        ),
        tmp_path / "lists.parquet",
    )
    assert read(tmp_path / "lists.parquet").observations.tolist() == [[1, 2], [3, 4]]
    path.write_text("o_1,a,reward,done,episode\n1,,0,0,1\n2,1,0,1,1\n")
    with pytest.raises(DatasetError, match="column 'a' for actions has 1 empty values"):
        read(path)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), limit=st.integers(2, 6), seed=st.integers(0, 5))
def test_a_step_limit_stands_in_for_timeouts(sizes: list[int], limit: int, seed: int) -> None:
    """Runs that are cut every `limit` steps: only terminations are flagged."""
    total = sum(sizes)
    terminals = np.zeros(total, bool)
    terminals[np.cumsum(sizes) - 1] = True
    values = {
        "observations": np.arange(total)[:, None].astype(float),
        "actions": np.zeros((total, 1)),
        "rewards": np.zeros(total),
        "terminals": terminals,
    }
    with pytest.raises(CorruptDatasetError, match="--max-episode-steps"):
        read(values)
    expected = []
    for size in sizes:
        cut = [limit - 1] * (size // limit) if size % limit else [limit - 1] * (size // limit - 1) + [limit]
        expected += [length for length in [*cut, size % limit] if length]
    if not expected:
        with pytest.raises(CorruptDatasetError, match="no usable episode"):
            read(values, max_episode_steps=limit)
        return
    dataset = read(values, max_episode_steps=limit)
    assert dataset.episode_lengths.tolist() == expected
    assert int(dataset.terminations.sum()) == len(sizes)


def test_never_terminates_takes_ends_as_cuts() -> None:
    values = {
        "observations": np.arange(9.0)[:, None],
        "actions": np.zeros((9, 1)),
        "rewards": np.zeros(9),
        "terminals": np.arange(9) % 3 == 2,
    }
    with pytest.warns(DatasetWarning, match="3 terminations count as truncations"):
        dataset = read_dataset(values, never_terminates=True)
    assert not dataset.terminations.any()
    assert dataset.episode_lengths.tolist() == [2, 2, 2]


@given(size=st.sampled_from([1e-3, 1.0, 1e4]), offset=st.sampled_from([0.0, 1e3]), seed=st.integers(0, 5))
def test_noise_of_one_step_of_float32_cuts_no_episode(size: float, offset: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    chains = [(offset + size * np.cumsum(rng.normal(size=(101, 3)), 0)).astype(np.float32) for _ in range(10)]
    after = np.concatenate([chain[1:] for chain in chains])
    noisy = np.where(rng.random(after.shape) < 0.5, np.nextafter(after, np.float32(np.inf)), after)
    values = {
        "observations": np.concatenate([chain[:-1] for chain in chains]),
        "next_observations": noisy,
        "actions": rng.uniform(-1, 1, (1000, 1)),
        "rewards": np.zeros(1000),
        "terminals": np.zeros(1000, bool),
    }
    with pytest.warns(DatasetWarning, match="rounding only"):
        dataset = read_dataset(values)
    assert dataset.episode_lengths.tolist() == [100] * 10
    assert dataset.spec.notes["episodes_cut_at_a_jump"] == 9


def walk(flagged: list[bool], restart: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A walk with small steps that jumps away every `restart` rows, when it times out."""
    rng = np.random.default_rng(seed)
    total = len(flagged)
    places = 0.01 * np.cumsum(rng.uniform(-1, 1, (total, 2)), 0) + 10.0 * (np.arange(total) // restart)[:, None]
    timeouts = np.arange(total) % restart == restart - 1
    return {
        "observations": places,
        "actions": np.zeros((total, 1)),
        "rewards": np.asarray(flagged, float),
        "terminals": np.asarray(flagged),
        "timeouts": timeouts,
    }


def test_a_run_of_terminations_ends_one_episode_with_its_true_next_observation() -> None:
    """As in antmaze: every step at the goal is flagged, while the episode goes on until it times out."""
    flagged = ([False] * 30 + [True] * 20) * 4
    values = walk(flagged, 50)
    with pytest.warns(DatasetWarning, match="76 rows recorded after a termination"):
        dataset = read_dataset(values)
    assert dataset.episode_lengths.tolist() == [31] * 4
    for number in range(4):
        last = dataset.episode(number)["next_observations"][-1].numpy()
        np.testing.assert_array_equal(last, values["observations"][50 * number + 31].astype(np.float32))
    assert int(dataset.terminations.sum()) == 4


def test_episodes_of_one_step_stay_episodes() -> None:
    """A bandit ends after each step; nothing says that its rows follow each other."""
    rng = np.random.default_rng(0)
    values = {
        "observations": rng.normal(size=(40, 2)),
        "actions": np.zeros((40, 1)),
        "rewards": np.zeros(40),
        "terminals": np.ones(40, bool),
        "timeouts": np.zeros(40, bool),
    }
    assert read(values).num_episodes == 40


def test_a_file_that_nobody_reads_says_which_formats_there_are(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(
        DatasetError, match=r"not in a known format; formats: Minari folder, robomimic HDF5, .*OGBench npz"
    ):
        read(tmp_path / "file.txt")
    (tmp_path / "file.pkl").write_bytes(b"x")
    with pytest.raises(DatasetError, match=r"is a pickle, .* not read; save its arrays with numpy.savez"):
        read(tmp_path / "file.pkl")
    (tmp_path / "file.npz").write_bytes(b"PK")
    with pytest.raises(CorruptDatasetError, match="npz"):
        read(tmp_path / "file.npz")
    np.savez(tmp_path / "objects.npz", observations=np.array([{}], object))
    with pytest.raises(CorruptDatasetError, match="not unpickled"):
        read(tmp_path / "objects.npz")
    (tmp_path / "file.parquet").write_bytes(b"x")
    with pytest.raises(CorruptDatasetError, match="cannot be read as a table"):
        read(tmp_path / "file.parquet")


def test_an_episode_without_steps_is_left_out_with_a_notice() -> None:
    made = make_minari([Ending(3, True, False), Ending(5, False, True)], *FAMILIES["box32"])
    with h5py.File(Path(made.storage.data_path) / "main_data.hdf5", "a") as file:
        for name in ("observations", "actions", "rewards", "terminations", "truncations"):
            values = file["episode_0"][name][: int(name == "observations")]
            del file["episode_0"][name]
            file["episode_0"][name] = values
    with pytest.warns(DatasetWarning, match="1 episodes without a single step were left out"):
        dataset = read_dataset(made.spec.dataset_id)
    assert dataset.episode_lengths.tolist() == [5]


def test_namespaces_behind_links_are_listed_and_circles_end(tmp_path: Path) -> None:
    make_minari([Ending(3, True, False)], *FAMILIES["box32"], dataset_id="real/place-v0")
    root = tmp_path / "minari"
    (root / "real").rename(tmp_path / "elsewhere")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(root)
    assert "linked/place-v0" in local_datasets()
    assert len(read("linked/place-v0")) == 3


class CountingReader(Reader):
    """A reader of a user: a text file that holds the length of each episode."""

    name = "counts"

    def detects(self, path: Path) -> bool:
        return path.suffix == ".counts"

    def episodes(self, path: Path, options: ReadOptions) -> Iterator[Episode]:
        for number, text in enumerate(path.read_text().split()):
            steps = int(text)
            last = np.arange(steps) == steps - 1
            yield Episode(
                f"{path} line {number}",
                np.arange(steps + 1.0)[:, None],
                np.arange(steps) % 2,
                np.ones(steps),
                last,
                ~last & False,
            )


def test_a_reader_of_a_user_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name, value = "counts", "tests:CountingReader"

        def load(self) -> Any:
            return self.loaded

    point = Point()
    (tmp_path / "own.counts").write_text("3 5")
    monkeypatch.setattr(all_sources, "entry_points", lambda group: [point] if group == "rlkit2.readers" else [])
    for loaded, message in ((CountingReader, None), (dict, "does not derive from"), (None, "cannot be loaded")):
        point.loaded = loaded
        all_sources.readers.cache_clear()
        if message is None:
            assert read(tmp_path / "own.counts").episode_lengths.tolist() == [3, 5]
        else:
            with pytest.raises(ConfigError, match=message):
                read(tmp_path / "own.counts")
    all_sources.readers.cache_clear()


@given(
    lengths=st.lists(st.integers(2, 4), min_size=1, max_size=5),
    lots=st.lists(st.integers(0, 4), max_size=20),
    same=st.booleans(),
)
def test_rows_of_an_episode_that_lie_apart_are_refused(lengths: list[int], lots: list[int], same: bool) -> None:
    """Logs of several environments in any order of their rows are read as they were, or refused; a number may be used again for one that is over."""
    left = [[(number, step) for step in range(length)] for number, length in enumerate(lengths)]
    order = [left[lot].pop(0) for lot in lots if lot < len(left) and left[lot]]
    order += [row for rest in left for row in rest]
    truth = np.array([number for number, _ in order])
    values = {
        "observations": np.array(order, np.float32),
        "actions": np.zeros((len(order), 1)),
        "rewards": np.zeros(len(order)),
        "terminals": np.array([same and step == lengths[number] - 1 for number, step in order]),
        "episodes": truth % 2 if same else truth,
    }
    apart = any(np.ptp(np.flatnonzero(truth == number)) >= length for number, length in enumerate(lengths))
    if apart and not same:
        with pytest.raises(CorruptDatasetError, match="comes back at row"):
            read_dataset(values)
    elif not apart:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = read_dataset(values)
        found = [set(dataset.episode(k)["observations"][:, 0].tolist()) for k in range(dataset.num_episodes)]
        assert found == [{number} for number in dict.fromkeys(truth.tolist())]


def test_numbers_of_episodes_that_cannot_be(tmp_path: Path) -> None:
    values = {"observations": np.zeros((4, 1)), "actions": np.zeros((4, 1)), "rewards": np.zeros(4)}
    with pytest.raises(CorruptDatasetError, match="episode 7 comes back at row 2 after rows of others"):
        read_dataset({**values, "episodes": np.array([7, 8, 7, 8])})
    for wrong in (np.array([0, 0, np.nan, np.nan]), np.zeros((4, 2))):
        with pytest.raises(CorruptDatasetError, match="one number per row, and none may be missing"):
            read_dataset({**values, "episodes": wrong})
    with pytest.raises(CorruptDatasetError, match="nothing that ends an episode; it takes terminals"):
        read_dataset(values)
    path = tmp_path / "log.csv"
    path.write_text("o_0;a;r;episode\n0,5;1,5;0;1\n")
    with pytest.raises(CorruptDatasetError, match="parted by semicolons"):
        read_dataset(path)
