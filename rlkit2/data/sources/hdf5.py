"""Opening HDF5 files: what is damaged, or would be read out of another file, is said in one line that names the file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from rlkit2.errors import CorruptDatasetError, RLKitError, first_line

LARGE, MOST = 2**26, 1100  # bytes of an array from which on its compression is looked at; more than gzip's best ratio


@contextmanager
def open_hdf5(path: Path, *, arrays: bool = True) -> Iterator[Any]:
    """An HDF5 file open for reading; `CorruptDatasetError` where it, or what is read from it, is damaged or points into other files.

    `arrays=False` leaves `check_array` to the reader (a look at every array of a file with thousands takes half as long as reading them).
    """
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        denied = isinstance(error, PermissionError)
        reason = "permission denied" if denied else "not a readable HDF5 file, truncated or damaged"
        raise CorruptDatasetError(f"{path}: {reason} ({error})") from error
    with file:
        try:
            _check_links(file, path, arrays)
            yield file
        except RLKitError:
            raise
        except Exception as error:  # HDF5 raises every kind
            reason = first_line(error) if isinstance(error, OSError) else f"{type(error).__name__}: {first_line(error)}"
            raise CorruptDatasetError(f"{path}: truncated or damaged ({reason})") from error


def _check_links(file: Any, path: Path, arrays: bool) -> None:
    def outside(name: bytes, link: Any) -> bytes | None:
        return name if link.type == h5py.h5l.TYPE_EXTERNAL else None

    link = file.id.links.visit(
        outside, info=True
    )  # ends at the first name that is returned; an exception must not cross HDF5
    if link is not None:
        raise CorruptDatasetError(
            f"{path}: {link.decode(errors='replace')} is a link to another file, which is not opened"
        )
    names: list[bytes] = []
    if arrays:
        h5py.h5o.visit(
            file.id, lambda name, it: names.append(name) if it.type == h5py.h5o.TYPE_DATASET else None, info=True
        )
    for name in names:
        check_array(h5py.h5d.open(file.id, name), f"{path}: {name.decode(errors='replace')}")


def check_array(dataset: Any, where: str) -> None:
    """Raise `CorruptDatasetError` for an array whose values lie in other files, or that claims more values than were ever stored."""
    check_values(dataset, math.prod(dataset.shape or ()) * dataset.get_type().get_size(), where)


def check_values(dataset: Any, size: int, where: str) -> None:
    """`check_array` for a dataset whose values take `size` bytes."""
    if dataset.get_offset() is None and not _in_chunks(dataset):  # what is contiguous or in chunks lies in the file
        how = dataset.get_create_plist()  # takes twice the time of both
        if how.get_layout() == h5py.h5d.VIRTUAL or how.get_external_count():
            raise CorruptDatasetError(
                f"{where} takes its values from another file, which is not opened; store them in the file itself"
            )
    if size > LARGE and size > MOST * dataset.get_storage_size():
        raise CorruptDatasetError(
            f"{where} claims {size / 2**30:.3g} GiB, of which {dataset.get_storage_size()} bytes are stored; it is damaged"
        )


def _in_chunks(dataset: Any) -> bool:
    try:
        return bool(dataset.get_num_chunks())
    except (RuntimeError, ValueError):  # another layout
        return False


def hdf5_names(path: Path, group: str = "/") -> set[str]:
    """The names in a group of a file; none where the file is not readable HDF5 or has no such group."""
    try:
        with h5py.File(path, "r") as file:
            outside = file.get(group, getlink=True) if group.strip("/") else None
            found = None if isinstance(outside, h5py.ExternalLink) else file.get(group)
            return set(found) if isinstance(found, h5py.Group) else set()
    except (OSError, RuntimeError, KeyError, ValueError):
        return set()
