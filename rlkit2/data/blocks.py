"""Checksums of a file of records, block by block: each block is checked when it is first read, never the whole file before it is needed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

BLOCK_BYTES = 1 << 14  # a batch of random rows reads little more than its own pages; the sums take 4 bytes a block


def rows_per_block(row_bytes: int) -> int:
    """Whole rows that make up one block."""
    return max(1, BLOCK_BYTES // row_bytes)


class BlockSums:
    """CRC-32 of every block of a stream of rows that arrives in pieces of any size.

    Args:
        row_bytes: bytes of one row.
    """

    def __init__(self, row_bytes: int) -> None:
        self._size = row_bytes * rows_per_block(row_bytes)
        self._sums: list[int] = []
        self._sum = self._used = 0

    def update(self, view: memoryview) -> None:
        """Take up the next bytes."""
        while view:
            part = view[: self._size - self._used]
            self._sum = zlib.crc32(part, self._sum)
            self._used += len(part)
            view = view[len(part) :]
            if self._used == self._size:
                self._close()

    def finish(self) -> NDArray[np.uint32]:
        """The sums of all blocks, the last of which may be shorter: `[K]`."""
        if self._used:
            self._close()
        return np.asarray(self._sums, np.uint32)

    def _close(self) -> None:
        self._sums.append(self._sum)
        self._sum = self._used = 0


@dataclass(eq=False)
class BlockChecks:
    """Which blocks of records have been found whole.

    Args:
        data: all bytes of the records, `[N * row_bytes]` uint8, mapped or in memory.
        sums: what `BlockSums.finish` gave when they were written.
        row_bytes: bytes of one row.
        damaged: called with the first and the last row of a block that does not have its sum; raises.
    """

    data: NDArray[np.uint8]
    sums: NDArray[np.uint32]
    row_bytes: int
    damaged: Callable[[int, int], NoReturn]
    left: int = field(init=False)  # blocks not read so far

    def __post_init__(self) -> None:
        self._rows = rows_per_block(self.row_bytes)
        self._seen = np.zeros(len(self.sums), np.bool_)
        self.left = len(self.sums)

    def see(self, rows: Tensor) -> None:
        """Check the blocks of some rows (any shape, on the CPU), those that were checked before excepted."""
        if self.left:
            blocks = np.unique(rows.numpy() // self._rows)
            self._check(blocks[~self._seen[blocks]].tolist())

    def see_all(self) -> None:
        """Check every block that was not checked before."""
        if self.left:
            self._check(np.flatnonzero(~self._seen).tolist())

    def _check(self, blocks: Sequence[int]) -> None:
        size, data = self._rows * self.row_bytes, self.data.data
        for block in blocks:
            if zlib.crc32(data[block * size : (block + 1) * size]) != self.sums[block]:
                last = min((block + 1) * self._rows, len(self.data) // self.row_bytes) - 1
                self.damaged(block * self._rows, last)
            self._seen[block] = True
        self.left = len(self._seen) - int(np.count_nonzero(self._seen))
