"""Files of a run: whole files appear by atomic rename, growing ones are JSON lines that can be cut back to a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rlkit2.errors import RunError


class WriteError(RunError):
    """A full disk or a read-only folder."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write (full disk, read-only folder) below `path` into one clear `WriteError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WriteError(f"cannot write {path}: {reason}; make room there or name another place") from error


def sync_folder(path: Path) -> None:
    """Make renames inside a folder survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace `path` in one step: a reader, or a kill at any moment, sees the old or the new content, never a part.

    Raises:
        RunError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            write_synced(temporary, data.encode() if isinstance(data, str) else data)
            os.replace(temporary, path)
            sync_folder(path.parent)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, indented for people."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing; is {path.parent} the folder of a run?") from error
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); the run is damaged") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} holds no JSON object; the run is damaged")
    return value


class JsonLines:
    """A file of JSON objects, one a line, that grows; `size` is what a checkpoint remembers of it.

    Args:
        path: the file, made if it is missing.
        size: cut the file back to this many bytes first (lines written after the checkpoint that is resumed).

    Raises:
        RunError: the file is shorter than `size`, or cannot be written.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self.path = path
        with writing(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            if os.fstat(self._descriptor).st_size < size:
                os.close(self._descriptor)
                raise RunError(f"{path} is shorter than its checkpoint says ({size} bytes); the run is damaged")
            os.ftruncate(self._descriptor, size)
        self.size = size

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append objects; readers see them at once."""
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        with writing(self.path):
            while data:  # a nearly full disk takes a part of it before it says so
                written = os.write(self._descriptor, data)
                self.size += written
                data = data[written:]

    def sync(self) -> None:
        """Wait until everything appended is on the disk (before a checkpoint refers to it)."""
        with writing(self.path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a JSON-lines file; a last line cut off by a kill is left out; no file means no lines."""
    if not path.exists():
        return []
    whole, newline, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.split("\n")] if newline else []
