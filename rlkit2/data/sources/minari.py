"""Minari datasets: HDF5 through h5py's low-level interface (the cost is per object, not per byte), Arrow and Parquet by their own files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
from minari.dataset.minari_storage import MinariStorage, is_image_space
from minari.serialization import deserialize_space
from numpy.typing import NDArray

from rlkit2.data.episodes import Episode
from rlkit2.data.known_environments import registered_spec
from rlkit2.data.sources.arrow import arrow_episodes
from rlkit2.data.sources.hdf5 import check_values, open_hdf5
from rlkit2.data.sources.reader import Reader, ReadOptions
from rlkit2.data.spaces import action_layout, tree_of
from rlkit2.data.spec import DatasetSpec, read_env_spec
from rlkit2.errors import CorruptDatasetError, DatasetError, EnvironmentUnavailableError, first_line
from rlkit2.fields import Finite, Natural, describe_type, read_value

HDF5_FILE = "main_data.hdf5"
METADATA = {  # what is read of it, and its types; all of it may be missing or null
    **dict.fromkeys(("total_episodes", "total_steps"), Natural),
    **dict.fromkeys(("ref_min_score", "ref_max_score"), Finite),
    **dict.fromkeys(
        ("data_format", "dataset_id", "observation_space", "action_space", "env_spec", "eval_env_spec"), str
    ),
    "jpeg_encoding": bool,
    "observation_keys": tuple[str, ...],
}


class MinariReader(Reader):
    """Minari datasets: the folder that holds `metadata.json`, or the one above it."""

    name = "Minari folder"

    def detects(self, path: Path) -> bool:
        """A folder with Minari's metadata, or with its HDF5 file."""
        return minari_data(path) is not None

    def spec(self, path: Path, options: ReadOptions) -> DatasetSpec:
        """Spaces and environment of the metadata. Raises `ConfigError` for unknown `observation_keys`."""
        data_path = _data(path)
        spec = _spec(_read_metadata(data_path), data_path, options)
        return replace(spec, observation_keys=spec.flattener.keys)

    def episodes(self, path: Path, options: ReadOptions) -> Iterator[Episode]:
        """The stored episodes, or those of `options.chosen`."""
        data_path = _data(path)
        return _episodes(data_path, _read_metadata(data_path), self.spec(path, options), options.chosen)

    def files(self, path: Path) -> list[Path]:
        """Metadata and data."""
        data_path = _data(path)
        if _read_metadata(data_path).get("data_format", "hdf5") == "hdf5":
            return [file for file in (data_path / "metadata.json", data_path / HDF5_FILE) if file.exists()]
        return sorted(Path(folder) / name for folder, _, names in os.walk(data_path) for name in names)

    def steps(self, path: Path, options: ReadOptions) -> int:
        """The total that the metadata state."""
        return int(_read_metadata(_data(path)).get("total_steps", 0))


def minari_data(folder: Path) -> Path | None:
    """The folder with Minari's metadata in or under `folder`; None where there is none."""
    for candidate in (folder / "data", folder):
        if (candidate / "metadata.json").exists() or (candidate / HDF5_FILE).exists():
            return candidate
    return None


def _data(path: Path) -> Path:
    return minari_data(path) or path


def _read_metadata(data_path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads((data_path / "metadata.json").read_text())
    except FileNotFoundError:
        return _old_metadata(data_path)
    except PermissionError as error:
        raise DatasetError(f"{data_path}/metadata.json cannot be read: {error.strerror}") from error
    except OSError as error:
        raise CorruptDatasetError(f"{data_path}/metadata.json cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptDatasetError(f"{data_path}/metadata.json is not valid JSON ({error})") from error
    if not isinstance(metadata, dict):
        raise CorruptDatasetError(f"{data_path}/metadata.json does not hold an object")
    return _checked(metadata, f"{data_path}/metadata.json")


def _checked(metadata: dict[str, Any], name: str) -> dict[str, Any]:
    """The metadata, with every entry that is read here of its type."""
    hints: dict[str, Any] = METADATA
    for key, hint in hints.items():
        try:
            if metadata.get(key) is not None:
                read_value(metadata[key], hint)
        except TypeError as error:
            raise CorruptDatasetError(
                f"{name}: {key} must be {describe_type(hint)}, not {str(metadata[key])[:60]!r}"
            ) from error
    return {key: value for key, value in metadata.items() if value is not None or key not in METADATA}


def _old_metadata(data_path: Path) -> dict[str, Any]:
    """Minari before 0.5 kept its metadata as attributes of the HDF5 file, and images as they are."""
    with open_hdf5(data_path / HDF5_FILE, arrays=False) as file:
        found = {key: value.item() if isinstance(value, np.generic) else value for key, value in file.attrs.items()}
    if "total_episodes" not in found:
        raise DatasetError(f"{data_path} is not a Minari dataset: it has no metadata.json")
    texts = {key: value.decode() if isinstance(value, bytes) else value for key, value in found.items()}
    return _checked({**texts, "jpeg_encoding": False}, str(data_path / HDF5_FILE))


def _spec(metadata: dict[str, Any], data_path: Path, options: ReadOptions) -> DatasetSpec:
    observation_keys: Sequence[str] | None = options.observation_keys
    env_spec, eval_env_spec = (read_env_spec(metadata.get(key)) for key in ("env_spec", "eval_env_spec"))
    found: dict[str, Any] = {}
    for kind in ("observation_space", "action_space"):
        text = metadata.get(kind)
        try:
            found[kind] = (
                deserialize_space(text)
                if text
                else getattr(_environment(env_spec, data_path, kind, options.trust_env), kind)
            )
        except DatasetError:
            raise
        except Exception as error:  # Minari's and Gymnasium's readers raise anything
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise CorruptDatasetError(f"{data_path}/metadata.json: {kind} cannot be read ({reason})") from error
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


def _environment(env_spec: Any, data_path: Path, kind: str, trust_env: bool) -> gymnasium.Env[Any, Any]:
    """Only for old datasets whose metadata hold no spaces: the environment has to tell them."""
    if env_spec is None:
        raise DatasetError(f"{data_path}/metadata.json has neither {kind} nor a readable env_spec")
    try:
        return gymnasium.make(registered_spec(env_spec, f"dataset {data_path}", trust_env=trust_env))
    except EnvironmentUnavailableError as error:
        raise DatasetError(f"{data_path}/metadata.json has no {kind}, and {error}") from error
    except Exception as error:
        message = (
            f"{data_path}/metadata.json has no {kind} and its environment {env_spec.id} cannot be built here ({error})"
        )
        raise DatasetError(message) from error


def _episodes(
    data_path: Path, metadata: dict[str, Any], spec: DatasetSpec, chosen: Sequence[int] | None
) -> Iterator[Episode]:
    steps, empty = 0, False
    with closing(_stored_episodes(data_path, metadata, spec, chosen)) as stored:
        for episode in stored:
            steps += np.size(episode.rewards)
            empty |= not np.size(episode.rewards)  # said where it is left out
            yield episode
    if chosen is None and not empty and steps != metadata.get("total_steps", steps):
        raise CorruptDatasetError(
            f"{data_path} holds {steps} steps, its metadata say {metadata['total_steps']}; files are missing or damaged"
        )


def _stored_episodes(
    data_path: Path, metadata: dict[str, Any], spec: DatasetSpec, chosen: Sequence[int] | None
) -> Generator[Episode]:
    leaves = {"observations": tuple(spec.flattener.leaves), "actions": action_layout(spec.action_space).leaves}
    jpeg = bool(metadata.get("jpeg_encoding", True))
    stored = metadata.get("data_format", "hdf5")
    if stored in ("arrow", "parquet"):
        numbers = range(int(metadata.get("total_episodes", 0))) if chosen is None else chosen
        yield from arrow_episodes(data_path, numbers, stored == "parquet", leaves, jpeg)
        return
    if not (data_path / HDF5_FILE).exists():
        raise CorruptDatasetError(f"{data_path} has no {HDF5_FILE}")
    if jpeg and any(is_image_space(leaf.space) for parts in leaves.values() for leaf in parts):
        yield from _jpeg_episodes(data_path, metadata, chosen)
    else:
        yield from _hdf5_episodes(data_path / HDF5_FILE, metadata, leaves, chosen)


def _jpeg_episodes(data_path: Path, metadata: dict[str, Any], chosen: Sequence[int] | None) -> Iterator[Episode]:
    """Episodes with JPEG images through Minari's own storage."""
    with open_hdf5(data_path / HDF5_FILE):
        pass  # points into no other file
    try:
        numbers = range(int(metadata["total_episodes"])) if chosen is None else chosen
        for episode in MinariStorage.read(data_path).get_episodes(list(numbers)):
            fields = (episode[key] for key in ("observations", "actions", "rewards", "terminations", "truncations"))
            yield Episode(f"{data_path} episode {episode['id']}", *fields)
    except (DatasetError, GeneratorExit):
        raise
    except Exception as error:  # third-party readers raise many kinds
        raise CorruptDatasetError(
            f"{data_path} cannot be read ({type(error).__name__}: {first_line(error)})"
        ) from error


def _hdf5_episodes(
    path: Path, metadata: dict[str, Any], leaves: dict[str, Any], chosen: Sequence[int] | None
) -> Iterator[Episode]:
    paths = {kind: ["/".join([kind, *map(_hdf5_key, leaf.path)]) for leaf in parts] for kind, parts in leaves.items()}
    with open_hdf5(path, arrays=False) as file:
        numbers = sorted(int(name.removeprefix("episode_")) for name in file if name.startswith("episode_"))
        expected = metadata.get("total_episodes", len(numbers))
        if chosen is None and len(numbers) != expected:
            raise CorruptDatasetError(f"{path} holds {len(numbers)} episodes, its metadata say {expected}")
        types: dict[str, Any] = {}
        for number in numbers if chosen is None else chosen:
            where = f"{path} episode {number}"
            try:
                group = h5py.h5g.open(file.id, f"episode_{number}".encode())
                fields = [
                    tree_of(parts, [_array(group, path, types, where) for path in paths[kind]])
                    for kind, parts in leaves.items()
                ]
                fields += [_array(group, name, types, where) for name in ("rewards", "terminations", "truncations")]
            except KeyError as error:
                raise CorruptDatasetError(f"{where} lacks an array: {error.args[0]}") from error
            except (OSError, RuntimeError, TypeError, MemoryError) as error:
                raise CorruptDatasetError(f"{where} cannot be read ({error})") from error
            yield Episode(where, *fields)


def _hdf5_key(key: str | int) -> str:
    return key if isinstance(key, str) else f"_index_{key}"


def _array(group: Any, path: str, types: dict[str, Any], where: str) -> NDArray[Any]:
    """One dataset of an HDF5 group, read in its stored type.

    `types` remembers the type of each path: making one anew costs a third of the time of a short array.
    """
    dataset = h5py.h5d.open(group, path.encode())
    stored, shape = dataset.get_type(), dataset.shape
    known = types.get(path)
    if known is None or not stored.equal(known[0]):
        known = types[path] = stored, stored.dtype, h5py.h5t.py_create(stored.dtype)
    check_values(dataset, math.prod(shape or ()) * known[1].itemsize, f"{where}: {path}")
    out = np.empty(shape, known[1])
    if out.size:
        dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, out, known[2])
    return out
