"""A file that only grows, whose length and checksum a checkpoint remembers."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit2.errors import RunError
from rlkit2.files import make_folder, writing

PIECE = 1 << 24  # bytes that are read at once


class RecordFile:
    """A file of records that only grows; what a checkpoint remembers of it is how many there are and their SHA-256.

    Args:
        path: made if it is missing, with its folder.
        dtype: of a record.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path, self.dtype = path, dtype
        make_folder(path.parent)
        with writing(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self.length = 0
        self._hash = hashlib.sha256()

    def cut(self, length: int, digest: bytes) -> None:
        """Go back to the first `length` records, what came behind them is of steps that are done again.

        Raises:
            RunError: there are fewer, or they are not what was written.
        """
        self._hash, left = hashlib.sha256(), length * self.dtype.itemsize
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        while left and (piece := os.read(self._descriptor, min(left, PIECE))):
            self._hash.update(piece)
            left -= len(piece)
        if left or self._hash.digest() != digest:
            what = (
                "is shorter than the run's checkpoint says"
                if left
                else "does not have the checksum it was written with"
            )
            raise RunError(
                f"{self.path} {what}: what the run has collected is damaged; restore the file, or begin the online run again"
            )
        with writing(self.path):
            os.ftruncate(self._descriptor, length * self.dtype.itemsize)
        self.length = length

    def append(self, records: NDArray[Any]) -> None:
        """Add records, one a row; the process may be killed at any moment of it."""
        content = records.tobytes()
        left = memoryview(content)
        with writing(self.path):
            os.lseek(self._descriptor, self.length * self.dtype.itemsize, os.SEEK_SET)
            while left:  # a nearly full disk takes a part of it before it says so
                left = left[os.write(self._descriptor, left) :]
        self._hash.update(content)
        self.length += len(records)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """The records from `start` to before `stop`."""
        return np.fromfile(self.path, self.dtype, stop - start, offset=start * self.dtype.itemsize)

    def digest(self) -> bytes:
        """SHA-256 of all records."""
        return self._hash.digest()

    def sync(self) -> None:
        """Wait until all of them are on the disk."""
        with writing(self.path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
