"""Writing files: each appears whole by atomic rename, and whatever keeps it from being written is one clear line."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlkit2.errors import ConfigError, DatasetError, RewardError, RunError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WriteError(RunError, DatasetError, RewardError):
    """A file of any kind cannot be written: a full disk, a read-only folder."""


@contextmanager
def writing(path: str | os.PathLike[str], mend: str = "make room there or name another place") -> Iterator[None]:
    """Turn a failed write of `path`, or of anything below it, into one clear `WriteError`."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(f"{write_failure(error, path)}; {mend}") from error


def write_failure(error: OSError, path: str | os.PathLike[str] | None) -> str:
    """`cannot write PATH: REASON`, with the space that is left where there was too little of it; without a path it is what was printed."""
    free = _free(Path(path)) if path is not None and error.errno in FULL else ""
    return f"cannot write {'the output' if path is None else path}: {error.strerror or error}{free}"


def _free(path: Path) -> str:
    for place in (path, *path.absolute().parents):
        try:
            return f" ({shutil.disk_usage(place).free / 2**20:,.1f} MiB free)"
        except OSError:  # not made yet
            continue
    return ""


def make_folder(path: Path) -> None:
    """Make a folder and those above it; `WriteError` where that is not possible."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def sync_folder(path: Path) -> None:
    """Make renames inside a folder survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write a file and wait until it is on the disk. A private file can be read by its owner alone, from its first byte on."""
    if private:
        path.unlink(missing_ok=True)  # its permissions would stay
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: str | os.PathLike[str], data: bytes | str, *, private: bool = False) -> None:
    """Replace `path` in one step: a reader, or a kill at any moment, sees the old or the new content, never a part.

    Raises:
        WriteError: the disk is full or the folder cannot be written; the message names the file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            write_synced(temporary, data.encode() if isinstance(data, str) else data, private=private)
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, indented for people."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def save_figure(figure: Any, path: str | os.PathLike[str], **options: Any) -> Path:
    """Write a matplotlib figure atomically, in the format of the path's suffix; returns the path.

    Raises:
        ConfigError: matplotlib knows no such format.
        WriteError: as for `write_atomically`.
    """
    path, image = Path(path), io.BytesIO()
    kind = path.suffix[1:].lower()
    if kind not in figure.canvas.get_supported_filetypes():
        raise ConfigError(f"{path}: a figure needs a suffix such as .png, .svg or .pdf")
    figure.savefig(image, format=kind, **options)
    write_atomically(path, image.getvalue())
    return path
