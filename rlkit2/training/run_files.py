"""Files of a run: JSON that is read through a check, and JSON lines that grow and can be cut back to a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rlkit2.errors import RunError, first_line
from rlkit2.files import writing

LARGEST = 2**30  # bytes of a file that is read as a whole


def read_json(path: Path, check: Callable[[Any], None] | None = None) -> dict[str, Any]:
    """Read a JSON object; `check` raises `SchemaError` (or any `ValueError`) for entries that are not as they must be.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        value = parse_json(_read(path))
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
        if check is not None:
            check(value)
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing; is {path.parent} the folder of a run?") from error
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({first_line(error)}); it is damaged") from error
    return value


def _read(path: Path) -> bytes:
    """The content of a file that is read as a whole."""
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"it has {size} bytes, more than any file of this kind")
    return path.read_bytes()


def parse_json(data: bytes | str) -> Any:
    """JSON of any depth and content; `ValueError` where it is none."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


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

    def cut(self, size: int) -> None:
        """Take back what was appended beyond `size` bytes."""
        with writing(self.path):
            os.ftruncate(self._descriptor, size)
        self.size = size

    def sync(self) -> None:
        """Wait until everything appended is on the disk (before a checkpoint refers to it)."""
        with writing(self.path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def read_json_lines(path: Path, check: Callable[[Any], None] | None = None) -> list[dict[str, Any]]:
    """All whole lines of a JSON-lines file; no file means no lines. `check`: see `read_json`.

    A last line that a kill or a power failure cut off is left out; damage before it is not.

    Raises:
        RunError: the file cannot be read, or a line within it is damaged; the message names the line.
    """
    try:
        lines = _read(path).split(b"\n")
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({first_line(error)}); the run is damaged") from error
    found = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            value = parse_json(line)
            if check is not None:
                check(value)
        except ValueError as error:
            if not any(rest.strip(b"\0 ") for rest in lines[number:]) and not line.strip(b"\0 "):
                break  # nothing but the zeros of a block that was never written
            raise RunError(f"{path}: line {number} is damaged ({first_line(error)})") from error
        found.append(value)
    return found
