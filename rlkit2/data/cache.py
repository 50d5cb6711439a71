"""The cache of packed datasets: one folder per dataset, read-only, shared between processes, complete or absent.

A folder holds `records.bin` (packed rows), `episode_starts.npy` and `dataset.json`. It is written under another name and renamed when
complete; whoever renames first wins and the others use that one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlkit2.data.dataset import TransitionDataset, write_in_memory
from rlkit2.data.folders import remove_leftovers
from rlkit2.data.records import Packed, Records, RecordWriter, content_hash, dtype_from_json, dtype_to_json
from rlkit2.data.spaces import DatasetWarning
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import CorruptDatasetError

FORMAT = 1
Fill = Callable[[RecordWriter], DatasetSpec]


def cache_folder() -> Path:
    """Where packed datasets are kept: `$RLKIT2_CACHE`, else `$XDG_CACHE_HOME/rlkit2`, else `~/.cache/rlkit2`."""
    own = os.environ.get("RLKIT2_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlkit2"


def fingerprint(files: list[Path], *extra: Any) -> str:
    """A key that changes with the names, sizes and times of `files`, or with `extra` (JSON values)."""
    stats = [(str(path.resolve()), (info := path.stat()).st_size, info.st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps([FORMAT, stats, extra], default=str).encode()).hexdigest()[:32]


def open_cached(key: str, dtype: np.dtype[Any], fill: Fill) -> TransitionDataset:
    """The dataset under `key`, packed by `fill` where it is missing or damaged; in memory where the cache cannot be written.

    `dtype` is the record layout.
    """
    folder = cache_folder() / "datasets" / key
    if folder.is_dir():
        try:
            return _read(folder)
        except (OSError, ValueError, LookupError, TypeError, CorruptDatasetError) as error:
            warnings.warn(f"cache entry {folder} is damaged ({error}); it is built again", DatasetWarning, stacklevel=2)
            _remove(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent, ".*-*")
        temporary = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=folder.parent))
    except OSError as error:
        return _in_memory(dtype, fill, error)
    try:
        _write(temporary, dtype, fill)
    except _CacheWriteError as error:
        return _in_memory(dtype, fill, error)
    else:
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # not the other process that came first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _read(folder)


class _CacheWriteError(Exception):
    """The cache could not be written (as opposed to: the source could not be read)."""


def build_in_memory(dtype: np.dtype[Any], fill: Fill) -> TransitionDataset:
    """Pack without a cache."""
    spec: list[DatasetSpec] = []
    records, packed = write_in_memory(dtype, lambda writer: spec.append(fill(writer)))
    return TransitionDataset(records, torch.from_numpy(packed.episode_starts), _complete(spec[0], packed))


def verify(dataset: TransitionDataset) -> bool:
    """Whether the records still have the content hash of the specification (reads everything; for datasets straight from a source)."""
    return content_hash(dataset.records, dataset.episode_starts.numpy()) == dataset.spec.content_hash


def _complete(spec: DatasetSpec, packed: Packed) -> DatasetSpec:
    notes = dict(spec.notes) | ({"non_finite_values": packed.non_finite} if packed.non_finite else {})
    return replace(spec, content_hash=packed.content_hash, notes=notes)


def _in_memory(dtype: np.dtype[Any], fill: Fill, error: Exception) -> TransitionDataset:
    message = f"dataset cache {cache_folder()} cannot be written ({error}); the data stay in memory. Set RLKIT2_CACHE to a writable folder"
    warnings.warn(message, DatasetWarning, stacklevel=3)
    return build_in_memory(dtype, fill)


def _write(folder: Path, dtype: np.dtype[Any], fill: Fill) -> None:
    try:
        file = open(folder / "records.bin", "wb", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise _CacheWriteError(error) from error
    with file:

        def sink(block: NDArray[np.uint8]) -> None:
            view = block.data
            try:
                while view:
                    view = view[file.write(view) or 0 :]
            except OSError as error:
                raise _CacheWriteError(error) from error

        writer = RecordWriter(dtype, sink)
        spec = fill(writer)
        packed = writer.finish()
    try:
        np.save(folder / "episode_starts.npy", packed.episode_starts)
        described = {
            "format": FORMAT,
            "length": packed.length,
            "records": dtype_to_json(dtype),
            "spec": _complete(spec, packed).to_json(),
        }
        (folder / "dataset.json").write_text(json.dumps(described))
    except OSError as error:
        raise _CacheWriteError(error) from error


def _read(folder: Path) -> TransitionDataset:
    described = json.loads((folder / "dataset.json").read_text())
    dtype = dtype_from_json(described["records"])
    length = described["length"]
    size = (folder / "records.bin").stat().st_size
    if size != length * dtype.itemsize:
        raise CorruptDatasetError(f"records.bin has {size} bytes, {length * dtype.itemsize} expected")
    starts = np.load(folder / "episode_starts.npy", allow_pickle=False)
    if (
        starts.dtype != np.int64
        or starts.ndim != 1
        or starts[0] != 0
        or starts[-1] != length
        or (np.diff(starts) <= 0).any()
    ):
        raise CorruptDatasetError("episode_starts.npy does not fit records.bin")
    spec = DatasetSpec.from_json(described["spec"])
    return TransitionDataset(Records.map_file(folder / "records.bin", dtype, length), torch.from_numpy(starts), spec)


def _remove(folder: Path) -> None:
    """Move a folder out of the way in one step, then delete it; another process may be reading its files."""
    try:
        grave = Path(tempfile.mkdtemp(prefix=".old-", dir=folder.parent))
        folder.rename(grave / "entry")
        shutil.rmtree(grave, ignore_errors=True)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
