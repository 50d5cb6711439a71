"""Writing a `TransitionDataset` back as a Minari dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import minari
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from minari.dataset.minari_storage import MinariStorage

from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.folders import minari_root, new_folder
from rlkit2.data.sources.arrow import MOST_STEPS
from rlkit2.data.sources.minari import HDF5_FILE
from rlkit2.data.spaces import action_layout
from rlkit2.data.spec import env_spec_text
from rlkit2.errors import DatasetError
from rlkit2.files import writing

Progress = Callable[[int, int], None]


def to_minari(
    dataset: TransitionDataset,
    dataset_id: str,
    *,
    data_format: str = "hdf5",
    progress: Progress | None = None,
    **metadata: Any,
) -> minari.MinariDataset:
    """Write `dataset` as the Minari dataset `dataset_id` under Minari's root and return it.

    Loading it again gives equal tensors. Dict and Tuple observations are written as such, with the keys the dataset holds. Episodes are
    written one by one, so that a dataset may be larger than memory.

    Args:
        dataset: what to write.
        dataset_id: `namespace/name-v0`.
        data_format: `hdf5`, or `arrow` or `parquet` for episodes of at most 32,767 steps (Minari's own reader shifts longer ones).
        progress: called with (episodes done, episodes in all).
        metadata: JSON values for Minari's metadata (author, description, algorithm_name, ...) and whatever else should be remembered.

    Raises:
        DatasetError: the id is taken or invalid, the folder cannot be written, or the next observation of a step is not the observation of
            the step after it; nothing is left half-written.
    """
    folder = new_minari_folder(dataset_id)
    root = minari_root().absolute()
    longest = int(dataset.episode_lengths.max())
    if data_format != "hdf5" and longest > MOST_STEPS:
        raise DatasetError(
            f"{dataset.spec.id} has an episode of {longest:,} steps; Minari's reader shifts {data_format} episodes above {MOST_STEPS:,} steps, "
            "so they are not written: use the format hdf5"
        )
    spec, flat, actions = dataset.spec, dataset.spec.flattener, action_layout(dataset.spec.action_space)
    described: dict[str, Any] = {
        "eval_env_spec": env_spec_text(spec.eval_env_spec),
        "ref_min_score": spec.ref_min_score,
        "ref_max_score": spec.ref_max_score,
        "observation_keys": None if spec.observation_keys is None else list(spec.observation_keys),
        **metadata,
    }
    try:
        with (
            writing(folder, "set MINARI_DATASETS_PATH to a folder that can be written"),
            new_folder(folder, root) as new,
        ):
            write_minari(
                new / "data",
                dataset_id,
                _episodes(dataset.to("cpu"), progress),
                observation_space=flat.kept_space,
                action_space=actions.kept_space(spec.action_space),
                env_spec=spec.env_spec,
                metadata=described,
                data_format=data_format,
            )
    except ValueError as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{dataset_id} could not be written to {root}: {error}") from error
    return minari.MinariDataset(folder / "data")


def new_minari_folder(dataset_id: str) -> Path:
    """Where the new Minari dataset `dataset_id` will be.

    Raises:
        DatasetError: the id is taken or invalid.
    """
    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError) as error:
        raise DatasetError(
            f"{dataset_id!r} is not a dataset id; it must have the form namespace/name-v0, two letters or more each"
        ) from error
    root = minari_root().absolute()
    if (root / dataset_id).exists():
        raise DatasetError(f"{dataset_id} exists in {root}; choose another id or delete it")
    return root / dataset_id


def write_minari(
    path: Path,
    dataset_id: str,
    episodes: Iterable[EpisodeBuffer],
    *,
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    env_spec: EnvSpec | None,
    metadata: Mapping[str, Any],
    data_format: str = "hdf5",
) -> None:
    """Write episodes into the new folder `path`, which must be absolute; entries of `metadata` that are None are left out.

    This goes through Minari's storage, not through `create_dataset_from_buffers`, which builds the environment where there are reference scores.
    """
    storage = MinariStorage.new(
        path,
        observation_space,
        action_space,
        env_spec=env_spec if env_spec_text(env_spec) else None,
        data_format=data_format,
        jpeg_encoding=False,
    )
    if data_format == "hdf5":
        with _CarefulFile(path / HDF5_FILE) as file:
            storage._file_path = file
            storage.update_episodes(file.while_written(episodes))
        storage._file_path = path / HDF5_FILE
    else:
        measure, storage.get_size = (
            storage.get_size,
            lambda: 0.0,
        )  # Minari measures the whole folder after every episode
        storage.update_episodes(episodes)
        storage.get_size = measure
    storage.update_metadata({"dataset_size": storage.get_size()})
    people = {key: {value} for key, value in metadata.items() if key in ("author", "author_email") and value}
    kept = {key: value for key, value in metadata.items() if value is not None}
    storage.update_metadata({"dataset_id": dataset_id, "minari_version": minari.__version__, **kept, **people})


class _CarefulFile:
    """A file for h5py to write to that never fails: the HDF5 library crashes the process where a write does (a full disk).

    The first error is kept, what comes after it is dropped, and the error is raised between two episodes or at the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error: OSError | None = None

    def __enter__(self) -> _CarefulFile:
        self.file = open(self.path, "r+b", buffering=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.file.close()
        if self.error is not None and kind is None:
            raise self.error

    def while_written(self, episodes: Iterable[EpisodeBuffer]) -> Iterator[EpisodeBuffer]:
        """The episodes, until a write has failed."""
        for episode in episodes:
            yield episode
            if self.error is not None:
                raise self.error

    def read(self, count: int = -1) -> bytes:
        """As a raw file's."""
        return self.file.read(count) or b""

    def readinto(self, buffer: memoryview) -> int:
        """As a raw file's."""
        return self.file.readinto(buffer)

    def seek(self, offset: int, whence: int = 0) -> int:
        """As a raw file's."""
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        """As a raw file's."""
        return self.file.tell()

    def write(self, data: bytes) -> int:
        """Write all of `data`, or keep why that was not possible."""
        view = memoryview(data)
        size = len(view)
        try:
            while view and self.error is None:
                view = view[self.file.write(view) or 0 :]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        """Set the size of the file, or keep why that was not possible."""
        try:
            return self.file.truncate(size) if self.error is None else size or 0
        except OSError as error:
            self.error = error
            return size or 0

    def flush(self) -> None:
        """Nothing is held back."""


def _episodes(dataset: TransitionDataset, progress: Progress | None) -> Iterator[EpisodeBuffer]:
    flat, actions = dataset.spec.flattener, action_layout(dataset.spec.action_space)
    for episode in range(dataset.num_episodes):
        fields = dataset.episode(episode)
        if not torch.equal(_bits(fields["observations"][1:]), _bits(fields["next_observations"][:-1])):
            raise DatasetError(
                f"episode {episode} of {dataset.spec.id} is not contiguous; Minari stores one chain of observations per episode"
            )
        arrays = {name: np.ascontiguousarray(value.numpy()) for name, value in fields.items()}
        chain = np.concatenate([arrays["observations"], arrays["next_observations"][-1:]])
        yield EpisodeBuffer(
            id=episode,
            observations=flat.unflatten(chain),
            actions=actions.unflatten(dataset.spec.action_space, arrays["actions"]),
            rewards=arrays["rewards"],
            terminations=arrays["terminations"],
            truncations=arrays["truncations"],
        )
        if progress is not None:
            progress(episode + 1, dataset.num_episodes)


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Values compared as bits, so that NaN equals itself."""
    return values.contiguous().view(torch.int32) if values.dtype == torch.float32 else values
