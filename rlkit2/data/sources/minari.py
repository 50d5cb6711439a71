"""Reading Minari datasets: HDF5 through h5py's low-level interface (the cost is per object, not per byte), the rest through Minari itself."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
from gymnasium import spaces
from minari import MinariDataset
from minari.dataset.minari_storage import MinariStorage, is_image_space
from minari.serialization import deserialize_space
from numpy.typing import NDArray

from rlkit2.data.cache import build_in_memory, fingerprint, open_cached
from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.episodes import Episode, EpisodePacker, Progress
from rlkit2.data.records import RecordWriter, record_dtype
from rlkit2.data.spaces import Leaf, SpaceFlattener, action_layout
from rlkit2.data.spec import DatasetSpec, read_env_spec
from rlkit2.errors import CorruptDatasetError, DatasetError

HDF5_FILE = "main_data.hdf5"


def read_minari_folder(
    data_path: Path,
    *,
    observation_keys: Sequence[str] | None = None,
    cache: bool = True,
    episodes: NDArray[np.int64] | None = None,
    progress: Progress | None = None,
) -> TransitionDataset:
    """The dataset in the folder that holds Minari's `metadata.json` (the `data` folder of a dataset).

    `episodes`: stored episode numbers to read (default: all). `progress` is called with (steps read, steps in all). Raises
    `CorruptDatasetError` for damaged files, `UnsupportedSpaceError` for spaces without fixed-size rows, `ConfigError` for unknown
    `observation_keys`.
    """
    metadata = _read_metadata(data_path)
    spec = _spec(metadata, data_path, observation_keys)
    flat, actions = spec.flattener, action_layout(spec.action_space)
    spec = replace(spec, observation_keys=flat.keys)

    def fill(writer: RecordWriter) -> DatasetSpec:
        packer = EpisodePacker(writer, flat, actions)
        stored = _episodes(data_path, metadata, spec, flat, episodes)
        packer.add_all(stored, str(data_path), progress, int(metadata.get("total_steps", 0)))
        return replace(spec, notes=packer.notes)

    dtype = record_dtype(flat.shape, flat.dtype, actions.shape, actions.dtype)
    if not cache:
        return build_in_memory(dtype, fill)
    chosen = None if episodes is None else episodes.tolist()
    key = fingerprint(_data_files(data_path, metadata), metadata, observation_keys, chosen)
    return open_cached(key, dtype, fill)


def read_minari_dataset(dataset: MinariDataset, **options: Any) -> TransitionDataset:
    """The episodes that an open `minari.MinariDataset` points to (filters and splits respected)."""
    chosen = np.asarray(dataset.episode_indices, np.int64)
    if len(chosen) == 0:
        raise DatasetError(f"{dataset.spec.dataset_id} has no episodes left; loosen the filter it was made with")
    everything = len(chosen) == dataset.storage.total_episodes and (chosen == np.arange(len(chosen))).all()
    return read_minari_folder(Path(dataset.storage.data_path), episodes=None if everything else chosen, **options)


def _read_metadata(data_path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads((data_path / "metadata.json").read_text())
    except FileNotFoundError:
        raise DatasetError(f"{data_path} is no Minari dataset: it has no metadata.json") from None
    except PermissionError as error:
        raise DatasetError(f"{data_path}/metadata.json cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CorruptDatasetError(f"{data_path}/metadata.json is not valid JSON ({error})") from error
    if not isinstance(metadata, dict):
        raise CorruptDatasetError(f"{data_path}/metadata.json does not hold an object")
    return metadata


def _spec(metadata: dict[str, Any], data_path: Path, observation_keys: Sequence[str] | None) -> DatasetSpec:
    env_spec, eval_env_spec = (read_env_spec(metadata.get(key)) for key in ("env_spec", "eval_env_spec"))
    found: dict[str, Any] = {}
    for kind in ("observation_space", "action_space"):
        text = metadata.get(kind)
        try:
            found[kind] = deserialize_space(text) if text else getattr(_environment(env_spec, data_path, kind), kind)
        except (ValueError, KeyError, TypeError, NotImplementedError) as error:
            raise CorruptDatasetError(f"{data_path}/metadata.json: {kind} cannot be read ({error})") from error
    for score in ("ref_min_score", "ref_max_score"):
        found[score] = None if metadata.get(score) is None else float(metadata[score])
    if observation_keys is None:
        observation_keys = metadata.get("observation_keys")  # written by `to_minari`: JSON forgets the order of a Dict
    return DatasetSpec(
        **found,
        env_spec=env_spec,
        eval_env_spec=eval_env_spec,
        id=str(metadata.get("dataset_id", data_path.parent.name)),
        observation_keys=None if observation_keys is None else tuple(observation_keys),
    )


def _environment(env_spec: Any, data_path: Path, kind: str) -> gymnasium.Env[Any, Any]:
    """Only for old datasets whose metadata hold no spaces: the environment has to tell them."""
    if env_spec is None:
        raise DatasetError(f"{data_path}/metadata.json has neither {kind} nor a readable env_spec")
    try:
        return gymnasium.make(env_spec)
    except Exception as error:
        message = (
            f"{data_path}/metadata.json has no {kind} and its environment {env_spec.id} cannot be built here ({error})"
        )
        raise DatasetError(message) from error


def _data_files(data_path: Path, metadata: dict[str, Any]) -> list[Path]:
    if metadata.get("data_format", "hdf5") == "hdf5":
        return [path for path in (data_path / HDF5_FILE,) if path.exists()]
    return sorted(
        Path(folder) / name for folder, _, names in os.walk(data_path) for name in names if name != "metadata.json"
    )


def _plain(space: spaces.Space[Any], jpeg: bool) -> bool:
    """Whether HDF5 holds the values of this space as a plain numeric array (images may be JPEG byte strings)."""
    return not (jpeg and is_image_space(space))


def _episodes(
    data_path: Path, metadata: dict[str, Any], spec: DatasetSpec, flat: SpaceFlattener, chosen: NDArray[np.int64] | None
) -> Iterator[Episode]:
    if metadata.get("data_format", "hdf5") == "hdf5":
        jpeg = bool(metadata.get("jpeg_encoding", True))
        leaves = [leaf.space for leaf in (*flat.leaves, *action_layout(spec.action_space).leaves)]
        if not (data_path / HDF5_FILE).exists():
            raise CorruptDatasetError(f"{data_path} has no {HDF5_FILE}")
        if all(_plain(space, jpeg) for space in leaves):
            yield from _hdf5_episodes(data_path / HDF5_FILE, metadata, spec, flat, chosen)
            return
    yield from _storage_episodes(data_path, metadata, chosen)


def _storage_episodes(data_path: Path, metadata: dict[str, Any], chosen: NDArray[np.int64] | None) -> Iterator[Episode]:
    """Episodes through Minari's own storage classes (Arrow, Parquet, JPEG images)."""
    try:
        storage = MinariStorage.read(data_path)
        numbers = range(int(metadata["total_episodes"])) if chosen is None else chosen.tolist()
        steps = 0
        for episode in storage.get_episodes(list(numbers)):
            steps += len(np.asarray(episode["rewards"]))
            fields = (episode[key] for key in ("observations", "actions", "rewards", "terminations", "truncations"))
            yield Episode(f"{data_path} episode {episode['id']}", *fields)
    except (DatasetError, GeneratorExit):
        raise
    except Exception as error:  # third-party readers raise many kinds
        raise CorruptDatasetError(f"{data_path} cannot be read ({type(error).__name__}: {error})") from error
    if chosen is None and steps != metadata.get("total_steps", steps):
        raise CorruptDatasetError(
            f"{data_path} holds {steps} steps, its metadata say {metadata['total_steps']}; files are missing or damaged"
        )


def _hdf5_episodes(
    path: Path, metadata: dict[str, Any], spec: DatasetSpec, flat: SpaceFlattener, chosen: NDArray[np.int64] | None
) -> Iterator[Episode]:
    trees = {"observations": flat.leaves, "actions": action_layout(spec.action_space).leaves}
    paths = {kind: ["/".join([kind, *map(_hdf5_key, leaf.path)]) for leaf in leaves] for kind, leaves in trees.items()}
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        reason = (
            "permission denied"
            if isinstance(error, PermissionError)
            else f"not a readable HDF5 file, truncated or damaged ({error})"
        )
        raise CorruptDatasetError(f"{path}: {reason}") from error
    with file:
        numbers = sorted(int(name.removeprefix("episode_")) for name in file if name.startswith("episode_"))
        expected = metadata.get("total_episodes", len(numbers))
        if chosen is None and len(numbers) != expected:
            raise CorruptDatasetError(f"{path} holds {len(numbers)} episodes, its metadata say {expected}")
        types: dict[str, Any] = {}
        for number in numbers if chosen is None else chosen.tolist():
            where = f"{path} episode {number}"
            try:
                group = h5py.h5g.open(file.id, f"episode_{number}".encode())
                fields = [
                    _tree(leaves, [_array(group, path, types) for path in paths[kind]])
                    for kind, leaves in trees.items()
                ]
                fields += [_array(group, name, types) for name in ("rewards", "terminations", "truncations")]
            except KeyError as error:
                raise CorruptDatasetError(f"{where} lacks an array: {error.args[0]}") from error
            except (OSError, RuntimeError, TypeError) as error:
                raise CorruptDatasetError(f"{where} cannot be read ({error})") from error
            yield Episode(where, *fields)


def _hdf5_key(key: str | int) -> str:
    return key if isinstance(key, str) else f"_index_{key}"


def _array(group: Any, path: str, types: dict[str, Any]) -> NDArray[Any]:
    """One dataset of an HDF5 group, read in its stored type.

    `types` remembers the type of each path: making one anew costs a third of the time of a short array.
    """
    dataset = h5py.h5d.open(group, path.encode())
    stored = dataset.get_type()
    known = types.get(path)
    if known is None or not stored.equal(known[0]):
        known = types[path] = stored, stored.dtype, h5py.h5t.py_create(stored.dtype)
    out = np.empty(dataset.shape, known[1])
    if out.size:
        dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, out, known[2])
    return out


def _tree(leaves: Sequence[Leaf], arrays: list[NDArray[Any]]) -> Any:
    """Nest the arrays of leaves under their paths, as the flatteners expect them."""
    root: dict[Any, Any] = {}
    for leaf, array in zip(leaves, arrays, strict=True):
        if not leaf.path:
            return array
        node = root
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = array
    return root
