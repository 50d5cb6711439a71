"""Opening HDF5 files: what is damaged is said in one line that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from rlkit2.errors import CorruptDatasetError


@contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """An HDF5 file open for reading; `CorruptDatasetError` where it, or what is read from it, is damaged."""
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        denied = isinstance(error, PermissionError)
        reason = "permission denied" if denied else "not a readable HDF5 file, truncated or damaged"
        raise CorruptDatasetError(f"{path}: {reason} ({error})") from error
    with file:
        try:
            yield file
        except OSError as error:
            raise CorruptDatasetError(f"{path}: truncated or damaged ({error})") from error


def hdf5_names(path: Path, group: str = "/") -> set[str]:
    """The names in a group of a file; none where the file is not readable HDF5 or has no such group."""
    try:
        with h5py.File(path, "r") as file:
            found = file.get(group)
            return set(found) if isinstance(found, h5py.Group) else set()
    except OSError:
        return set()
