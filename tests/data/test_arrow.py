"""Arrow and Parquet episodes of every length around the sizes at which readers cut, whole and in part, and what is written comes back."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import minari
import numpy as np
import pyarrow
import pytest
import torch
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage

from rlkit2.data import DatasetSpec, dataset_from_arrays, read_dataset
from rlkit2.data.spaces import DatasetWarning
from rlkit2.errors import CorruptDatasetError, DatasetError
from tests import warm
from tests.data.make import FAMILIES, Ending, box, make_minari

AROUND = [(1 << 15) - 2, (1 << 15) - 1, 1 << 15, (1 << 15) + 1, (1 << 17) - 1, 1 << 17, (1 << 17) + 1]


def written(path: Path, lengths: list[int], data_format: str) -> Path:
    """Episodes of these lengths as Minari's own storage writes them with one thread, in order: observation t of episode e is (e, t)."""
    threads = pyarrow.cpu_count()
    pyarrow.set_cpu_count(1)
    try:
        return _written(path, lengths, data_format)
    finally:
        pyarrow.set_cpu_count(threads)


def _written(path: Path, lengths: list[int], data_format: str) -> Path:
    storage = MinariStorage.new(
        path, box(), spaces.Discrete(7), env_spec=None, data_format=data_format, jpeg_encoding=False
    )
    storage.update_episodes(
        EpisodeBuffer(
            id=e,
            observations=np.stack([np.full(n + 1, e), np.arange(n + 1)], 1).astype(np.float32),
            actions=np.arange(n) % 7,
            rewards=np.arange(n, dtype=np.float64),
            terminations=np.zeros(n, bool),
            truncations=np.arange(n) == n - 1,
        )
        for e, n in enumerate(lengths)
    )
    storage.update_metadata({"dataset_id": "test/long-v0", "minari_version": minari.__version__})
    return path


@pytest.mark.parametrize("data_format", ["arrow", "parquet"])
def test_episodes_of_every_length_whole_and_in_part(tmp_path: Path, data_format: str) -> None:
    lengths = [3, *AROUND, 5]
    path = written(tmp_path / "data", lengths, data_format)
    with pytest.warns(DatasetWarning, match="5 Arrow or Parquet episodes have more than 32,767 steps.*may be shuffled"):
        dataset = read_dataset(path)
    assert dataset.episode_lengths.tolist() == lengths
    for number, length in enumerate(lengths):
        episode = dataset.episode(number)
        for name, first in (("observations", 0), ("next_observations", 1)):
            assert (episode[name][:, 0] == number).all()
            assert torch.equal(episode[name][:, 1], torch.arange(first, length + first).float())
    opened = minari.MinariDataset(path)
    for chosen in ([len(lengths) - 1], [1, 4, 8], [8, 3]):
        opened.episode_indices = np.array(chosen)
        part = read_dataset(opened)
        assert part.episode_lengths.tolist() == [lengths[number] for number in chosen]
        assert part.observations[part.episode_starts[:-1], 0].tolist() == chosen


@pytest.mark.parametrize("data_format", ["arrow", "parquet"])
def test_steps_missing_in_one_episode_are_seen_in_a_part_too(tmp_path: Path, data_format: str) -> None:
    path = written(tmp_path / "data", [4, 6, 5], data_format)
    told = path / "1" / "metadata.json"
    told.write_text(json.dumps(json.loads(told.read_text()) | {"total_steps": 9}))
    opened = minari.MinariDataset(path)
    for chosen in ([0, 1, 2], [1]):
        opened.episode_indices = np.array(chosen)
        with pytest.raises(CorruptDatasetError, match="episode 1 holds 6 steps, its metadata say 9"):
            read_dataset(opened)
    opened.episode_indices = np.array([0, 2])
    assert read_dataset(opened).episode_lengths.tolist() == [4, 5]


def arrays(lengths: list[int]) -> dict[str, np.ndarray]:
    """Aligned arrays of cut-off episodes."""
    chains = [np.arange(2 * (n + 1), dtype=np.float32).reshape(-1, 2) for n in lengths]
    ends = np.zeros(sum(lengths), bool)
    ends[np.cumsum(lengths) - 1] = True
    return {
        "observations": np.concatenate([chain[:-1] for chain in chains]),
        "next_observations": np.concatenate([chain[1:] for chain in chains]),
        "actions": np.zeros((len(ends), 1), np.float32),
        "rewards": np.arange(len(ends)),
        "terminations": np.zeros(len(ends), bool),
        "truncations": ends,
    }


@pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
@pytest.mark.parametrize("longest", AROUND[:4])
def test_what_is_written_is_read_by_minari_and_by_us_or_refused(data_format: str, longest: int) -> None:
    dataset = dataset_from_arrays(
        **arrays([3, longest, 4]), spec=DatasetSpec(observation_space=box(), action_space=box(-1, 1, (1,)))
    )
    if data_format != "hdf5" and longest > 32767:
        with pytest.raises(DatasetError, match="use the format hdf5"):
            dataset.to_minari("test/long-v0", data_format=data_format)
        return
    made = dataset.to_minari("test/long-v0", data_format=data_format)
    assert [len(episode) for episode in made] == [3, longest, 4]
    again = read_dataset("test/long-v0")
    assert torch.equal(again.observations, dataset.observations)
    assert torch.equal(again.next_observations, dataset.next_observations)


def _discrete(dtype: str) -> spaces.Space[Any] | None:
    """One of that type; None where Gymnasium has int64 alone (before 1.3)."""
    typed = "dtype" in inspect.signature(spaces.Discrete).parameters
    return spaces.Discrete(100, start=3, dtype=np.dtype(dtype).type) if typed else None


INTEGERS: dict[str, tuple[spaces.Space[Any], spaces.Space[Any]]] = {
    f"{kind} {dtype}": (space, space)
    for dtype in ("int8", "int16", "int32", "int64")
    for kind, space in {
        "discrete": _discrete(dtype),
        "multi discrete": spaces.MultiDiscrete([8, 16], dtype=np.dtype(dtype).type),
        "box": spaces.Box(0, 100, (2,), dtype),
    }.items()
    if space is not None
}


@pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
@pytest.mark.parametrize("family", [*FAMILIES, *INTEGERS])
def test_exports_lie_in_the_spaces_they_declare(family: str, data_format: str) -> None:
    made = make_minari([Ending(4, True, False), Ending(3, False, True)], *{**FAMILIES, **INTEGERS}[family])
    dataset = read_dataset(made)
    copy = dataset.to_minari("test/copy-v0", data_format=data_format)
    for episode in copy:
        for space, values in ((copy.observation_space, episode.observations), (copy.action_space, episode.actions)):
            for step in range(2):
                assert space.contains(_at(values, step)), (space, _at(values, step))
    again = read_dataset("test/copy-v0")
    for name in ("observations", "next_observations", "actions", "rewards", "terminations", "truncations"):
        assert torch.equal(getattr(again, name), getattr(dataset, name))


def _at(values: Any, step: int) -> Any:
    """One step of a batch, or of a tree of batches."""
    if isinstance(values, dict):
        return {key: _at(value, step) for key, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_at(value, step) for value in values)
    return values[step]


FULL = """
import resource, signal, warnings
warnings.simplefilter("ignore")
import numpy as np
from rlkit2.data import read_dataset
from rlkit2.errors import DatasetError
ends = np.arange(6000) % 60 == 59
values = {"observations": np.zeros((6000, 3)), "actions": np.zeros((6000, 1)), "rewards": np.zeros(6000)}
dataset = read_dataset(values | {"terminals": ends, "timeouts": ~ends & False})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for data_format, size in (("hdf5", 0), ("hdf5", 3000), ("hdf5", 100_000), ("hdf5", 400_000), ("arrow", 1000), ("parquet", 1000)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        dataset.to_minari("test/full-v0", data_format=data_format)
    except DatasetError as error:
        print(error)
"""


def test_a_disk_that_is_full_is_one_line(tmp_path: Path) -> None:
    """A limit on the size of files fails writes as a full disk does; HDF5 would crash the process."""
    done = warm.run([sys.executable, "-c", FULL])
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    assert all("cannot write" in line or "could not be written" in line for line in lines), lines
    assert not [path for path in (tmp_path / "minari").rglob("*") if path.is_file()]
