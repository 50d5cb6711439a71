"""Packed transitions: one aligned record `(s, s', a, r, terminated, truncated)` per row, so that a minibatch is a single gather.

A record array is either in memory or a private (copy-on-write) map of a cache file: nothing written to a tensor can reach the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WORD = 8  # bytes; rows are whole words so that a gather copies int64
FIELDS = ("observations", "next_observations", "actions", "rewards", "terminations", "truncations")


def record_dtype(
    observation_shape: tuple[int, ...], observation_dtype: Any, action_shape: tuple[int, ...], action_dtype: Any
) -> np.dtype[Any]:
    """The layout of one record; field offsets are multiples of their item size and the row is a whole number of words."""
    layout = [
        ("actions", np.dtype(action_dtype), action_shape),
        ("observations", np.dtype(observation_dtype), observation_shape),
        ("next_observations", np.dtype(observation_dtype), observation_shape),
        ("rewards", np.dtype(np.float32), ()),
        ("terminations", np.dtype(np.bool_), ()),
        ("truncations", np.dtype(np.bool_), ()),
    ]
    names, formats, offsets, offset = [], [], [], 0
    for name, dtype, shape in layout:
        offset += -offset % dtype.itemsize
        names.append(name)
        formats.append((dtype, shape))
        offsets.append(offset)
        offset += dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": offset + -offset % WORD})


def dtype_to_json(dtype: np.dtype[Any]) -> dict[str, Any]:
    """A record layout as JSON values."""
    fields = {
        name: [dtype.fields[name][0].base.str, list(dtype.fields[name][0].shape), dtype.fields[name][1]]
        for name in dtype.names or ()
        if dtype.fields
    }
    return {"itemsize": dtype.itemsize, "fields": fields}


def dtype_from_json(values: dict[str, Any]) -> np.dtype[Any]:
    """Read what `dtype_to_json` wrote."""
    fields = values["fields"]
    return np.dtype(
        {
            "names": list(fields),
            "formats": [(np.dtype(text), tuple(shape)) for text, shape, _ in fields.values()],
            "offsets": [offset for _, _, offset in fields.values()],
            "itemsize": values["itemsize"],
        }
    )


@dataclass(frozen=True, eq=False)
class Records:
    """Rows of packed transitions as one `[N, words]` int64 tensor with typed views of its columns."""

    words: Tensor
    dtype: np.dtype[Any]

    @classmethod
    def from_numpy(cls, array: NDArray[Any]) -> Records:
        """Wrap a structured array without copying it."""
        words = array.view(np.int64).reshape(len(array), array.dtype.itemsize // WORD)
        return cls(torch.from_numpy(words), array.dtype)

    @classmethod
    def map_file(cls, path: Path, dtype: np.dtype[Any], length: int) -> Records:
        """Map the file of `length` records; pages are shared between processes and never written back."""
        return cls.from_numpy(np.memmap(path, dtype=dtype, mode="c", shape=(length,)))

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def _plan(self) -> list[tuple[torch.dtype, list[int], list[tuple[int, str, tuple[int, ...]]]]]:
        """Per torch dtype: the sizes that cut a row's items into fields and gaps, and which part is which field of what shape."""
        assert self.dtype.fields is not None
        cuts: dict[torch.dtype, tuple[list[int], list[tuple[int, str, tuple[int, ...]]]]] = {}
        for name in sorted(FIELDS, key=lambda field: self.dtype.fields[field][1]):  # type: ignore[index]
            field, offset = self.dtype.fields[name][:2]
            sizes, parts = cuts.setdefault(_TORCH[field.base], ([], []))
            gap = offset // field.base.itemsize - sum(sizes)
            sizes.extend([gap] if gap else [])
            parts.append((len(sizes), name, field.shape))
            sizes.append(int(np.prod(field.shape, dtype=np.int64)))
        for dtype, (sizes, _) in cuts.items():
            rest = self.dtype.itemsize // dtype.itemsize - sum(sizes)
            sizes.extend([rest] if rest else [])
        return [(dtype, *cut) for dtype, cut in cuts.items()]

    def views(self, words: Tensor) -> dict[str, Tensor]:
        """Every field of gathered `words [..., W]` as a strided view `[..., *field shape]`."""
        out = {}
        for dtype, sizes, fields in self._plan:
            parts = words.view(dtype).split_with_sizes(sizes, -1)
            for position, name, shape in fields:
                part = parts[position]
                out[name] = part if len(shape) == 1 else part.view(*words.shape[:-1], *shape)
        return out

    def view(self, name: str) -> Tensor:
        """Field `name` of all rows as a strided view `[N, *field shape]`."""
        return self.views(self.words)[name]

    def gather(self, rows: Tensor) -> Tensor:
        """The words of `rows` (any shape): `[*rows.shape, W]`."""
        return torch.index_select(self.words, 0, rows.flatten()).view(*rows.shape, -1)

    def to(self, device: torch.device | str) -> Records:
        """The records on `device`."""
        return Records(self.words.to(device), self.dtype)


_TORCH = {
    np.dtype(np.float32): torch.float32,
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.bool_): torch.bool,
}


@dataclass(frozen=True)
class Packed:
    """What packing a stream of episodes produced besides the records themselves."""

    length: int
    episode_starts: NDArray[np.int64]
    content_hash: str
    non_finite: int


class RecordWriter:
    """Collects aligned episodes in blocks, hands the bytes of each full block to `sink` (which must not keep them) and hashes what passes."""

    BLOCK_BYTES = 1 << 23

    def __init__(self, dtype: np.dtype[Any], sink: Callable[[NDArray[np.uint8]], object]) -> None:
        self.dtype = dtype
        self.sink = sink
        self.block = np.zeros(max(1, self.BLOCK_BYTES // dtype.itemsize), dtype)
        self.used = 0
        self.length = 0
        self.starts = [0]
        self.non_finite = 0
        self.digest = hashlib.sha256(repr(dtype_to_json(dtype)).encode())

    def add(
        self,
        observations: NDArray[Any],
        next_observations: NDArray[Any],
        actions: NDArray[Any],
        rewards: NDArray[Any],
        terminations: NDArray[Any],
        truncations: NDArray[Any],
    ) -> None:
        """Append one episode of T aligned transitions; arrays have T rows each."""
        done, total = 0, len(rewards)
        values = (observations, next_observations, actions, rewards, terminations, truncations)
        while done < total:
            count = min(total - done, len(self.block) - self.used)
            target = self.block[self.used : self.used + count]
            for name, value in zip(FIELDS, values, strict=True):
                target[name] = value[done : done + count]
            self.used += count
            done += count
            if self.used == len(self.block):
                self._flush()
        self.length += total
        self.starts.append(self.length)

    def _flush(self) -> None:
        block = self.block[: self.used]
        for name in ("observations", "actions", "rewards"):
            if block[name].dtype.kind == "f":
                self.non_finite += int(np.count_nonzero(~np.isfinite(block[name])))
        data = block.view(np.uint8)
        self.digest.update(data.data)
        self.sink(data)
        self.used = 0

    def finish(self) -> Packed:
        """Flush what is left and describe the whole."""
        if self.used:
            self._flush()
        starts = np.asarray(self.starts, np.int64)
        self.digest.update(starts.tobytes())
        return Packed(self.length, starts, self.digest.hexdigest(), self.non_finite)


class MemoryWriter(RecordWriter):
    """A writer whose records stay in memory."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.blocks: list[NDArray[np.uint8]] = []
        super().__init__(dtype, lambda block: self.blocks.append(block.copy()))

    def records(self) -> Records:
        """The records, after `finish`."""
        return Records.from_numpy(np.concatenate(self.blocks).view(self.block.dtype))


def content_hash(records: Records, starts: NDArray[np.int64], block_rows: int = 1 << 16) -> str:
    """The content hash computed afresh, to be held against the stored one."""
    digest = hashlib.sha256(repr(dtype_to_json(records.dtype)).encode())
    for start in range(0, len(records), block_rows):
        digest.update(records.words[start : start + block_rows].numpy().data)
    digest.update(starts.tobytes())
    return digest.hexdigest()
