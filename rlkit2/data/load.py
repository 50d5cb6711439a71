"""Finding a dataset: what `rlkit2.load_dataset` accepts, where it looks, and what it says when it finds nothing."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias
from urllib.request import getproxies

from minari import MinariDataset

from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.episodes import Progress
from rlkit2.data.folders import minari_root
from rlkit2.data.sources.d4rl import read_arrays, read_d4rl_file
from rlkit2.data.sources.minari import HDF5_FILE, read_minari_dataset, read_minari_folder
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import ConfigError, DatasetError, DatasetNotFoundError, first_line

Source: TypeAlias = str | os.PathLike[str] | MinariDataset | Mapping[str, Any] | TransitionDataset


def read_dataset(
    source: Source,
    *,
    observation_keys: Sequence[str] | None = None,
    cache: bool = True,
    spec: DatasetSpec | None = None,
    progress: Progress | None = None,
) -> TransitionDataset:
    """A dataset that exists on disk, at Minari's remotes or in memory; see `rlkit2.load_dataset`.

    `spec` gives spaces and environment to sources that have none (D4RL files, arrays). `progress` is called with (rows done, rows in all)
    while files are read.
    """
    options: dict[str, Any] = {"observation_keys": observation_keys, "cache": cache, "progress": progress}
    if isinstance(source, MinariDataset):
        return read_minari_dataset(source, **options)
    path = None if isinstance(source, TransitionDataset | Mapping) else Path(source)
    if path is not None and path.name == HDF5_FILE:
        path = path.parent  # somebody pointed at the data of a Minari dataset
    if observation_keys is not None and (path is None or path.is_file()):
        chosen = source.spec.observation_keys if isinstance(source, TransitionDataset) else None
        if chosen != tuple(observation_keys):
            raise ConfigError(
                f"observation_keys={list(observation_keys)} choose from the Dict of a Minari dataset only"
            )
    if isinstance(source, TransitionDataset):
        return source
    if isinstance(source, Mapping):
        return read_arrays(source, spec)
    assert path is not None
    if path.is_file():
        return read_d4rl_file(path, cache=cache, spec=spec, progress=progress)
    data_path = minari_data(path) or minari_data(minari_root() / path)
    if data_path is not None:
        return read_minari_folder(data_path, **options)
    if path.is_dir():
        raise DatasetError(f"{path} is a folder but no dataset: neither metadata.json nor data/metadata.json is in it")
    if isinstance(source, os.PathLike) or path.is_absolute() or path.suffix in (".hdf5", ".h5"):
        raise DatasetNotFoundError(f"{path} does not exist")
    return read_minari_folder(_download(str(source)), **options)


def minari_data(folder: Path) -> Path | None:
    """The folder with Minari's metadata in or under `folder`; None where there is none."""
    for candidate in (folder / "data", folder):
        if (candidate / "metadata.json").exists() or (candidate / HDF5_FILE).exists():
            return candidate
    return None


def local_datasets() -> dict[str, Path]:
    """Ids of the Minari datasets under Minari's root and their `data` folders."""
    root = minari_root()
    found = {}
    for folder, folders, files in os.walk(root):
        if "metadata.json" in files and os.path.basename(folder) == "data":
            data_path = Path(folder)
            found[data_path.parent.relative_to(root).as_posix()] = data_path
        # Below metadata are episodes, in hidden folders datasets that are still being written.
        folders[:] = [] if "metadata.json" in files else [name for name in folders if not name.startswith(".")]
    return dict(sorted(found.items()))


def _download(dataset_id: str) -> Path:
    """Fetch `dataset_id` through Minari (its own progress bar); `DatasetNotFoundError` says what was searched and which ids are close."""
    import minari

    known = list(local_datasets())
    if not re.search(r"-v\d+$", dataset_id):
        reason = "it is not a complete Minari id, which ends in a version such as -v0"
    elif not _online():
        reason = "there is no network to download it"
    else:
        try:
            minari.download_dataset(dataset_id)
            return minari_root() / dataset_id / "data"
        except Exception as error:  # noqa: BLE001 - the remotes' clients raise many kinds
            reason = f"Minari could not download it ({first_line(error)})"
    close = get_close_matches(dataset_id, known, 3, 0.5)
    hint = f"; close ids here: {', '.join(close)}" if close else f"; ids here: {', '.join(known[:8]) or 'none'}"
    raise DatasetNotFoundError(f"no dataset {dataset_id!r} in {minari_root()}, and {reason}{hint}")


def _online() -> bool:
    """Whether a download has a chance: the clients of Minari's remotes retry for half a minute before they say that no name can be resolved."""
    if getproxies():
        return True
    try:
        socket.getaddrinfo("minari.farama.org", 443)
    except OSError:
        return False
    return True
