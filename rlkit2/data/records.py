"""Packed transitions: one aligned record `(s, s', a, r, terminated, truncated)` per row, so that a minibatch is a single gather.

A record array is either in memory or a private (copy-on-write) map of a cache file: nothing written to a tensor can reach the file.

Observations that hold images are kept once, as frames beside the records, which then hold two numbers of frames in place of two observations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlkit2.data.blocks import BlockChecks
from rlkit2.errors import DatasetError

WORD = 8  # bytes; rows are whole words so that a gather copies int64
OBSERVATIONS = ("observations", "next_observations")
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


@dataclass(frozen=True)
class FrameLayout:
    """How a flattened observation with images is kept as bytes: columns that are not bytes first, as float32, then the images.

    `shape` and `dtype` are those of the observation, uint8 or float32; `images` the columns `(start, stop)` of the images.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    images: tuple[tuple[int, int], ...]

    @cached_property
    def parts(self) -> tuple[tuple[int, int, int, bool], ...]:
        """First and last column, first byte, and whether it is bytes, of every part of a row."""
        size = int(np.prod(self.shape))
        if self.dtype == np.uint8:
            return ((0, size, 0, True),)
        edges = [0, *(edge for image in self.images for edge in image), size]
        plain = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
        found, byte = [], 0
        for whole, columns in ((False, plain), (True, self.images)):
            for start, stop in columns:
                found.append((start, stop, byte, whole))
                byte += (stop - start) * (1 if whole else 4)
        return tuple(found)

    @property
    def nbytes(self) -> int:
        """Bytes of a frame, a whole number of words."""
        start, stop, byte, whole = self.parts[-1]
        end = byte + (stop - start) * (1 if whole else 4)
        return end + -end % WORD

    def encode(self, observations: NDArray[Any]) -> NDArray[np.uint8]:
        """Frames `[n, nbytes]` of flattened observations `[n, *shape]`; raises `DatasetError` where a pixel is not a byte."""
        rows = observations.reshape(len(observations), -1)
        if rows.dtype == self.dtype == np.uint8 and rows.shape[1] == self.nbytes:
            return rows
        frames = np.zeros((len(rows), self.nbytes), np.uint8)
        for start, stop, byte, whole in self.parts:
            if not whole:
                frames[:, byte : byte + 4 * (stop - start)] = np.ascontiguousarray(rows[:, start:stop], "<f4").view(
                    np.uint8
                )
                continue
            target = frames[:, byte : byte + stop - start]
            with np.errstate(invalid="ignore"):
                target[:] = rows[:, start:stop]
            if rows.dtype != np.uint8 and not (target == rows[:, start:stop]).all():
                raise DatasetError(
                    "images hold other values than whole numbers from 0 to 255, but their space is one of bytes"
                )
        return frames

    def decode(self, words: Tensor) -> Tensor:
        """Observations `[..., *shape]` of the words `[..., nbytes / 8]` of frames."""
        bits = words.view(torch.uint8)
        if self.dtype == np.uint8:
            return bits[..., : int(np.prod(self.shape))].view(*words.shape[:-1], *self.shape)
        numbers = words.view(torch.float32)
        rows = torch.empty((*words.shape[:-1], *self.shape), device=words.device)
        for start, stop, byte, whole in self.parts:
            width = stop - start
            rows[..., start:stop] = (
                bits[..., byte : byte + width] if whole else numbers[..., byte // 4 : byte // 4 + width]
            )
        return rows


@dataclass(frozen=True, eq=False)
class Records:
    """Rows of packed transitions as one `[N, words]` int64 tensor with typed views of its columns.

    `frames`: the observations, `[F, words]`, where `dtype` has numbers of frames in their place; `layout` says how to read them.
    `checks`, `frame_checks`: checksums of the files that rows and frames are mapped from, compared where one is first read.
    """

    words: Tensor
    dtype: np.dtype[Any]
    frames: Tensor | None = None
    layout: FrameLayout | None = None
    checks: BlockChecks | None = None
    frame_checks: BlockChecks | None = None

    @classmethod
    def from_numpy(cls, array: NDArray[Any]) -> Records:
        """Wrap a structured array without copying it."""
        words = array.view(np.int64).reshape(len(array), array.dtype.itemsize // WORD)
        return cls(torch.from_numpy(words), array.dtype)

    def with_frames(self, frames: NDArray[np.uint8], layout: FrameLayout) -> Records:
        """The same records with the bytes of their frames."""
        words = torch.from_numpy(frames.view(np.int64).reshape(-1, layout.nbytes // WORD))
        return replace(self, frames=words, layout=layout)

    @property
    def row_bytes(self) -> int:
        """Bytes of a transition; a frame counts once."""
        return int(self.dtype.itemsize) + (0 if self.layout is None else self.layout.nbytes)

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

    def views(self, words: Tensor, names: Collection[str] = FIELDS) -> dict[str, Tensor]:
        """Fields of gathered `words [..., W]` as strided views `[..., *field shape]`; observations are copied out of the frames."""
        found = self._stored(words)
        for name in OBSERVATIONS if self.layout is not None else ():
            if name in names:
                found[name] = self._seen(found[name])
        return found if names is FIELDS else {name: found[name] for name in names}

    def _seen(self, index: Tensor) -> Tensor:
        """The observations of frames `index [...]`."""
        assert self.layout is not None
        return self.layout.decode(self._frame_words(index))

    def _frame_words(self, index: Tensor) -> Tensor:
        """The words of frames `index [...]`: `[..., W]`."""
        assert self.frames is not None
        found = torch.index_select(self.frames, 0, index.flatten()).view(*index.shape, -1)
        if self.frame_checks is not None:
            self.frame_checks.see(index)
        return found

    def contents(self, words: Tensor) -> Tensor:
        """What the rows `words [n, W]` say as words, frames in place of their numbers."""
        if self.frames is None:
            return words
        stored = self._stored(words)
        plain = words.clone()
        for name in OBSERVATIONS:
            self._stored(plain)[name].zero_()
        return torch.cat([plain, *(self._frame_words(stored[name]) for name in OBSERVATIONS)], -1)

    def _stored(self, words: Tensor) -> dict[str, Tensor]:
        out = {}
        for dtype, sizes, fields in self._plan:
            parts = words.view(dtype).split_with_sizes(sizes, -1)
            for position, name, shape in fields:
                part = parts[position]
                out[name] = part if len(shape) == 1 else part.view(*words.shape[:-1], *shape)
        return out

    def view(self, name: str) -> Tensor:
        """Field `name` of all rows as a strided view `[N, *field shape]`; a copy for observations that are frames."""
        if self.checks is not None:
            self.checks.see_all()
        return self.views(self.words, (name,))[name]

    def gather(self, rows: Tensor) -> Tensor:
        """The words of `rows` (any shape): `[*rows.shape, W]`."""
        found = torch.index_select(self.words, 0, rows.flatten()).view(*rows.shape, -1)
        if self.checks is not None:
            self.checks.see(rows)
        return found

    def check(self) -> None:
        """Compare the checksums of all rows and frames that were not read before."""
        for checks in (self.checks, self.frame_checks):
            if checks is not None:
                checks.see_all()

    def to(self, device: torch.device | str) -> Records:
        """The records on `device`."""
        self.check()
        frames = None if self.frames is None else self.frames.to(device)
        return replace(self, words=self.words.to(device), frames=frames, checks=None, frame_checks=None)


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
    frames: int


class RecordWriter:
    """Collects aligned episodes in blocks, hands the bytes of each full block to `sink` (which must not keep them) and hashes what passes.

    With a `layout` observations go to `frame_sink`, each once.
    """

    BLOCK_BYTES = 1 << 23

    def __init__(
        self,
        dtype: np.dtype[Any],
        sink: Callable[[NDArray[np.uint8]], object],
        layout: FrameLayout | None = None,
        frame_sink: Callable[[NDArray[np.uint8]], object] = lambda frames: None,
    ) -> None:
        self.dtype = dtype
        self.sink = sink
        self.layout, self.frame_sink = layout, frame_sink
        self.frames = 0
        self.frame_digest = hashlib.sha256()
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
        if self.layout is not None:
            observations, next_observations = self._add_frames(self.layout, observations, next_observations)
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

    def _add_frames(
        self, layout: FrameLayout, observations: NDArray[Any], next_observations: NDArray[Any]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Write the frames of T steps; their numbers `[T]`, before and after each step, shared with the step before where one follows the other."""
        here, after = layout.encode(observations), layout.encode(next_observations[-1:])
        follows = np.zeros(len(here), bool)
        follows[:-1] = _same_rows(observations[1:], next_observations[:-1])
        own = np.flatnonzero(~follows)  # steps whose next frame nothing else shows
        if len(own) > 1:
            after = layout.encode(next_observations[own])
        parts = (np.insert(here, own + 1, after, axis=0),) if len(own) > 1 else (here, after)
        before = self.frames + np.arange(len(here)) + np.searchsorted(own, np.arange(len(here)))
        self.frames += sum(map(len, parts))
        floats = [here[:, byte : byte + 4 * (stop - start)] for start, stop, byte, whole in layout.parts if not whole]
        self.non_finite += sum(int((~np.isfinite(np.ascontiguousarray(part).view("<f4"))).sum()) for part in floats)
        for frames in map(np.ascontiguousarray, parts):
            self.frame_digest.update(frames.data)
            self.frame_sink(frames)
        return before, before + 1

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
        if self.layout is not None:
            self.digest.update(self.frame_digest.digest())
        return Packed(self.length, starts, self.digest.hexdigest(), self.non_finite, self.frames)


def _same_rows(one: NDArray[Any], other: NDArray[Any]) -> Any:
    """Which rows are equal, `[n]`; all of them where both are the same memory, which is not read then."""
    if len(one) and one.__array_interface__ == other.__array_interface__ and one.dtype.kind == "u":
        return True
    same = one == other
    return same.all(axis=tuple(range(1, same.ndim)))


class MemoryWriter(RecordWriter):
    """A writer whose records stay in memory."""

    def __init__(self, dtype: np.dtype[Any], layout: FrameLayout | None = None) -> None:
        self.blocks: list[NDArray[np.uint8]] = []
        self.frame_blocks: list[NDArray[np.uint8]] = []
        super().__init__(
            dtype,
            lambda block: self.blocks.append(block.copy()),
            layout,
            lambda frames: self.frame_blocks.append(frames.copy()),
        )

    def records(self) -> Records:
        """The records, after `finish`."""
        found = Records.from_numpy(np.concatenate(self.blocks).view(self.block.dtype))
        return found if self.layout is None else found.with_frames(np.concatenate(self.frame_blocks), self.layout)


def content_hash(records: Records, starts: NDArray[np.int64], block_rows: int = 1 << 16) -> str:
    """The content hash computed afresh, to be held against the stored one."""
    digest = hashlib.sha256(repr(dtype_to_json(records.dtype)).encode())
    for start in range(0, len(records), block_rows):
        digest.update(records.words[start : start + block_rows].numpy().data)
    digest.update(starts.tobytes())
    if records.frames is not None:
        frames = hashlib.sha256()
        for start in range(0, len(records.frames), block_rows):
            frames.update(records.frames[start : start + block_rows].numpy().data)
        digest.update(frames.digest())
    return digest.hexdigest()
