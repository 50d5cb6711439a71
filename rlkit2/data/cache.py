"""The cache of packed datasets: one folder per dataset, read-only, shared between processes, complete or absent.

A folder holds `records.bin` (packed rows), `blocks.npy` (checksums of its blocks), the same for images (`frames.bin`, `frame_blocks.npy`),
`episode_starts.npy` and `dataset.json` (with checksums of the others and of itself). It is written under another name and renamed when complete;
whoever renames first wins and the others use that one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from rlkit2.checksums import digest, opened, sealed
from rlkit2.data.blocks import BlockChecks, BlockSums
from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.episodes import Episode, EpisodePacker, Fill, Progress, column_means
from rlkit2.data.folders import OWNER, claim, home, remove_leftovers
from rlkit2.data.records import (
    MemoryWriter,
    Packed,
    Records,
    RecordWriter,
    content_hash,
    dtype_from_json,
    dtype_to_json,
)
from rlkit2.data.spaces import DatasetWarning
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import CorruptDatasetError

FORMAT = 4
BLOCK = 4096  # bytes of a sampled block
SAMPLES = 256  # blocks sampled from the files of a dataset
STARTS = "episode_starts.npy"
BLOCKS = {"records.bin": "blocks.npy", "frames.bin": "frame_blocks.npy"}  # where the checksums of their blocks are


def cache_folder() -> Path:
    """Where packed datasets are kept: `$RLKIT2_CACHE`, else `$XDG_CACHE_HOME/rlkit2`, else `~/.cache/rlkit2`."""
    own = os.environ.get("RLKIT2_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or home("RLKIT2_CACHE") / ".cache") / "rlkit2"


@dataclass(frozen=True)
class Unpacked:
    """A dataset before it is packed: its specification and the function that gives its episodes.

    `name` is for messages. `steps`: rows in all, 0 where unknown; `progress` is called with (rows done, rows in all). `checked`: actions outside
    the specification's space are refused, `observed`: observations too. `fill`: what observations that are NaN become, see `rlkit2.load_dataset`.
    """

    name: str
    spec: DatasetSpec
    episodes: Callable[[], Iterable[Episode]]
    steps: int = 0
    progress: Progress | None = None
    checked: bool = False
    observed: bool = False
    fill: str | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The record layout."""
        return self.spec.record_dtype

    def write(self, writer: RecordWriter) -> tuple[DatasetSpec, Packed]:
        """Write all episodes; the specification with what was counted, and what describes the records."""
        flat = self.spec.flattener
        fill = Fill(self.fill, column_means(self.episodes(), flat)) if self.fill and flat.dtype != np.uint8 else None
        packer = EpisodePacker(
            writer, flat, self.spec.action_space, checked=self.checked, observed=self.observed, fill=fill
        )
        packer.add_all(self.episodes(), self.name, self.progress, self.steps)
        packed = writer.finish()
        notes = {**self.spec.notes, **packer.notes}
        notes |= {"non_finite_values": packed.non_finite} if packed.non_finite else {}
        return replace(self.spec, content_hash=packed.content_hash, notes=notes), packed


@dataclass(frozen=True)
class Key:
    """Where a dataset is cached: `source` tells which data and options, `state` how its files are now."""

    source: str
    state: str
    files: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder's name."""
        return f"{self.source}-{self.state}"


def cache_key(files: Sequence[Path], *what: Any) -> Key:
    """The key of data in `files` read in the way `what` tells (JSON values).

    Its state changes with the names, sizes, times (of content and of inode, which copies and restored backups cannot keep), inodes, and with
    256 blocks of 4 KiB sampled from the content, so that an open costs no more for a large dataset.
    """
    source = hashlib.sha256(json.dumps([FORMAT, what], default=str).encode()).hexdigest()[:16]
    digest = hashlib.sha256()
    share = max(1, SAMPLES // max(len(files), 1))
    every = max(1, -(-len(files) // SAMPLES))
    for number, path in enumerate(files):
        info = path.stat()
        told = (str(path.resolve()), info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino)
        digest.update(repr(told).encode())
        if number % every == 0:
            digest.update(_sampled(path, info.st_size, share))
    return Key(source, digest.hexdigest()[:16], tuple(str(path.resolve()) for path in files[:1]))


def _sampled(path: Path, size: int, blocks: int) -> bytes:
    """Blocks of a file at equal distances, the first and the last among them."""
    with path.open("rb", buffering=0) as file:
        if size <= blocks * BLOCK:
            return file.read()
        parts = []
        for number in range(blocks):
            file.seek((size - BLOCK) * number // max(blocks - 1, 1))
            parts.append(file.read(BLOCK))
        return b"".join(parts)


def find(key: Key) -> TransitionDataset | None:
    """The dataset under `key`; None where it is missing or damaged (which is said)."""
    folder = cache_folder() / "datasets" / key.name
    if not folder.is_dir():
        return None
    try:
        found = _read(folder)
    except (OSError, ValueError, LookupError, TypeError, CorruptDatasetError) as error:
        warnings.warn(f"cache entry {folder} is damaged ({error}); it is built again", DatasetWarning, stacklevel=3)
        _remove(folder)
        return None
    with contextlib.suppress(OSError):
        os.utime(folder)  # when it was last used
    return found


def store(key: Key, unpacked: Unpacked) -> TransitionDataset:
    """Pack into the cache, in place of older states of the same source; in memory where the cache cannot be written, with a message."""
    root = cache_folder() / "datasets"
    folder = root / key.name
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(root, ".*-*")
        temporary = Path(tempfile.mkdtemp(prefix=f".{key.name}-", dir=root))
        claim(temporary)
    except OSError as error:
        return _in_memory(unpacked, error)
    try:
        _write(temporary, key, unpacked)
    except _CacheWriteError as error:
        return _in_memory(unpacked, error)
    else:
        (temporary / OWNER).unlink()
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # not the other process that came first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in root.glob(f"{key.source}-*"):
        if old != folder:
            _remove(old)
    return _read(folder)


class _CacheWriteError(Exception):
    """The cache could not be written (as opposed to: the source could not be read)."""


def pack_in_memory(unpacked: Unpacked) -> TransitionDataset:
    """Pack without a cache."""
    writer = MemoryWriter(unpacked.dtype, unpacked.spec.layout)
    spec, packed = unpacked.write(writer)
    return TransitionDataset(writer.records(), torch.from_numpy(packed.episode_starts), spec)


def verify(dataset: TransitionDataset, source: TransitionDataset | None = None) -> bool:
    """Whether the records still have the content hash of the specification (reads everything; for datasets straight from a source).

    `source`: the same data read afresh, `load_dataset(..., cache=False)`, whose content must be the same too.
    """
    own = content_hash(dataset.records, dataset.episode_starts.numpy()) == dataset.spec.content_hash
    return own and (source is None or source.spec.content_hash == dataset.spec.content_hash)


@dataclass(frozen=True)
class Entry:
    """One dataset in the cache. `used`: when it was last opened, in seconds since 1970; `stale`: its source is gone."""

    folder: Path
    dataset: str
    source: str
    bytes: int
    used: float
    stale: bool


def entries() -> list[Entry]:
    """The datasets in the cache, the one that was not used for longest first; damaged ones are stale."""
    found = []
    for folder in (cache_folder() / "datasets").glob("[!.]*"):
        try:
            size = sum(file.stat().st_size for file in folder.iterdir())
            used = folder.stat().st_mtime
        except OSError:
            continue  # another process has removed it
        try:
            described = json.loads((folder / "dataset.json").read_text())
            dataset, source = json.loads(described["spec"])["id"], str((described.get("files") or [""])[0])
        except (OSError, ValueError, LookupError, TypeError):
            dataset, source = folder.name, ""
        found.append(Entry(folder, dataset, source, size, used, not os.path.exists(source)))
    return sorted(found, key=lambda entry: entry.used)


def cached_dataset(content_hash: str) -> TransitionDataset | None:
    """The dataset of this content, if it is in the cache; nothing is downloaded or built."""
    for folder in (cache_folder() / "datasets").glob("[!.]*"):
        try:
            described = json.loads((folder / "dataset.json").read_text())
            if json.loads(described["spec"])["content_hash"] == content_hash:
                return _read(folder)
        except (OSError, ValueError, LookupError, TypeError, CorruptDatasetError):
            continue  # damaged, or just being removed
    return None


def clean(*, limit: int | None = None) -> list[Entry]:
    """Remove entries and return them: all (`limit=None`), or stale ones and then those not used for longest, until `limit` bytes are left."""
    found = entries()
    left = sum(entry.bytes for entry in found)
    removed = []
    for entry in sorted(found, key=lambda entry: not entry.stale):
        if limit is None or entry.stale or left > limit:
            _remove(entry.folder)
            left -= entry.bytes
            removed.append(entry)
    return removed


def _in_memory(unpacked: Unpacked, error: Exception) -> TransitionDataset:
    message = f"dataset cache {cache_folder()} cannot be written ({error}); the data stay in memory. Set RLKIT2_CACHE to a writable folder"
    warnings.warn(message, DatasetWarning, stacklevel=3)
    return pack_in_memory(unpacked)


def _write(folder: Path, key: Key, unpacked: Unpacked) -> None:
    dtype, layout = unpacked.dtype, unpacked.spec.layout
    sums: dict[str, BlockSums] = {}
    with contextlib.ExitStack() as open_files:

        def sink(name: str, row_bytes: int) -> Callable[[NDArray[np.uint8]], None]:
            try:
                file = open_files.enter_context(open(folder / name, "wb", buffering=0))
            except OSError as error:
                raise _CacheWriteError(error) from error
            sums[name] = BlockSums(row_bytes)

            def write(block: NDArray[np.uint8]) -> None:
                view = block.data.cast("B")
                sums[name].update(view)
                try:
                    while view:
                        view = view[file.write(view) or 0 :]
                except OSError as error:
                    raise _CacheWriteError(error) from error

            return write

        records = sink("records.bin", dtype.itemsize)
        frames = (layout, sink("frames.bin", layout.nbytes)) if layout else ()
        spec, packed = unpacked.write(RecordWriter(dtype, records, *frames))
    try:
        arrays: dict[str, NDArray[Any]] = {
            STARTS: packed.episode_starts,
            **{BLOCKS[name]: found.finish() for name, found in sums.items()},
        }
        for name, array in arrays.items():
            np.save(folder / name, array)
        described = {
            "format": FORMAT,
            "files": key.files,
            "length": packed.length,
            "frames": packed.frames,
            "records": dtype_to_json(dtype),
            "spec": spec.to_json(),
        }
        digests = {name: digest((folder / name).read_bytes()) for name in arrays}
        (folder / "dataset.json").write_text(json.dumps(sealed(described, digests)))
    except OSError as error:
        raise _CacheWriteError(error) from error


def _read(folder: Path) -> TransitionDataset:
    described, digests = opened(json.loads((folder / "dataset.json").read_text()))
    spec = DatasetSpec.from_json(described["spec"])
    names = list(BLOCKS)[: 1 if spec.layout is None else 2]
    if digests is None or {BLOCKS[name] for name in names} - set(digests):
        raise CorruptDatasetError("it was written without checksums, by an older rlkit2")
    starts, *sums = (_read_array(folder / name, digests[name]) for name in (STARTS, *(BLOCKS[name] for name in names)))
    dtype = dtype_from_json(described["records"])
    rows, checks = _map(folder / "records.bin", described["length"], dtype.itemsize, sums[0], "rows")
    records = replace(Records.from_numpy(rows.view(dtype)[:, 0]), checks=checks)
    if spec.layout is not None:
        frames, checks = _map(folder / "frames.bin", described["frames"], spec.layout.nbytes, sums[1], "images")
        records = replace(records.with_frames(frames, spec.layout), frame_checks=checks)
    return TransitionDataset(records, torch.from_numpy(starts), spec)


def _map(
    path: Path, length: int, row_bytes: int, sums: NDArray[np.uint32], what: str
) -> tuple[NDArray[np.uint8], BlockChecks]:
    """The bytes of a file of rows, `[length, row_bytes]`, and its checksums, which are compared where a row is first read.

    Pages are shared between processes and never written back.
    """
    size, folder = path.stat().st_size, path.parent
    if size != length * row_bytes:
        raise CorruptDatasetError(f"{path.name} has {size} bytes, {length * row_bytes} expected")

    def damaged(first: int, last: int) -> NoReturn:
        _remove(folder)
        mend = f"remove {folder}" if folder.exists() else "it is removed"
        raise CorruptDatasetError(
            f"{what} {first} to {last} of the cached copy {folder} are damaged; {mend}, then the same command (for a run, its --resume) reads the "
            "dataset anew"
        )

    data = np.memmap(path, dtype=np.uint8, mode="c", shape=(length, row_bytes))
    return data, BlockChecks(data.reshape(-1), sums, row_bytes, damaged)


def _read_array(path: Path, checksum: str) -> NDArray[Any]:
    data = path.read_bytes()
    if digest(data) != checksum:
        raise CorruptDatasetError(f"{path.name} does not have the checksum it was written with")
    array: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    return array


def _remove(folder: Path) -> None:
    """Move a folder out of the way in one step, then delete it; another process may be reading its files."""
    try:
        grave = Path(tempfile.mkdtemp(prefix=".old-", dir=folder.parent))
        folder.rename(grave / "entry")
        shutil.rmtree(grave, ignore_errors=True)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
