"""The observations with images that the seeds of a group have seen, each once: the newest in memory, all of them on disk.

A transition names the numbers of its frames, and a frame is one observation of the environment: what follows a step is what the next one sees, and a
stack of k observations shows k - 1 of the one before it, so a step adds one frame, and a new episode one more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlkit2.data.records import WORD, FrameLayout
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import RunError
from rlkit2.online.record_file import RecordFile

GROWTH = 1.25  # of the memory, where short episodes show more frames than there was room for


def frame_layout(spec: DatasetSpec) -> FrameLayout | None:
    """How one observation of the environment is kept, of which `spec` may show stacks; None where observations hold no images."""
    if not spec.images:
        return None
    flat, n = spec.flattener, spec.frame_stack
    images = tuple((start // n, (start + math.prod(shape)) // n) for start, shape in spec.images)
    return FrameLayout((flat.size // n,), flat.dtype, images)


def frames_path(run: Path, seed: int) -> Path:
    """The file of a seed's frames, one after another, by number."""
    return run / "replay" / f"seed-{seed}.frames"


def frames_dtype(layout: FrameLayout) -> np.dtype[Any]:
    """A frame as bytes."""
    return np.dtype((np.void, layout.nbytes))


class Frames:
    """Frame n of a seed is in row n % `room` of its part of the memory, until `room` newer ones have come.

    Args:
        layout: of a frame.
        seeds: the integers that name the seeds.
        room: frames of a seed that there is memory for; more is taken as they need it.
        run: the run's folder, below which the files are.

    Attributes:
        counts: how many frames each seed has had, `[S]`.
    """

    def __init__(self, layout: FrameLayout, seeds: Sequence[int], room: int, run: Path) -> None:
        self.layout = layout
        self.array = np.zeros((len(seeds), room, layout.nbytes), np.uint8)  # pages are taken as they are written
        self.files = [RecordFile(frames_path(run, seed), frames_dtype(layout)) for seed in seeds]
        self.counts = np.zeros(len(seeds), np.int64)

    @property
    def room(self) -> int:
        """Frames of a seed that there is memory for."""
        return self.array.shape[1]

    def reserve(self, count: int, oldest: NDArray[np.int64]) -> None:
        """Make room for `count` more frames of every seed; those from number `oldest [S]` on are still needed, by a minibatch or to be written."""
        needed = int(max(self.counts + count - oldest))
        if needed > self.room:
            self._grow(max(needed, math.ceil(self.room * GROWTH)), oldest)

    def _grow(self, room: int, oldest: NDArray[np.int64]) -> None:
        array = np.zeros((len(self.array), room, self.layout.nbytes), np.uint8)
        for old, new, first, count in zip(self.array, array, oldest, self.counts, strict=True):
            kept = np.arange(first, count)
            new[kept % room] = old[kept % self.room]
        self.array = array

    def add(self, seed: int, observations: NDArray[Any]) -> int:
        """Add observations `[n, size]` of the seed at this place, for which room is reserved; the number of the first."""
        first = int(self.counts[seed])
        rows = np.arange(first, first + len(observations)) % self.room
        self.array[seed][rows] = self.layout.encode(observations)
        self.counts[seed] += len(observations)
        return first

    def gather(self, numbers: Tensor) -> Tensor:
        """The observations of frames `numbers [S, ...]`, `[S, ..., size]`."""
        words = torch.from_numpy(self.array.view(np.int64)).view(-1, self.layout.nbytes // WORD)
        seeds = torch.arange(len(numbers)).view(-1, *[1] * (numbers.dim() - 1))
        rows = numbers % self.room + seeds * self.room
        found = torch.index_select(words, 0, rows.flatten())
        return self.layout.decode(found.view(*numbers.shape, -1))

    def flush(self) -> None:
        """Write what is not yet in the files."""
        for file, own, count in zip(self.files, self.array, self.counts, strict=True):
            file.append(own[np.arange(file.length, count) % self.room])

    def load(self, counts: Sequence[int], digests: Sequence[bytes], oldest: NDArray[np.int64]) -> None:
        """Continue from the first `counts [S]` frames of the files, of which those from number `oldest [S]` on are needed.

        Raises:
            RunError: a file is damaged.
        """
        for file, count, digest in zip(self.files, counts, digests, strict=True):
            file.cut(count, digest)
        self.counts[:] = counts
        self.reserve(0, oldest)
        for file, own, first, count in zip(self.files, self.array, oldest, counts, strict=True):
            own[np.arange(first, count) % self.room] = _as_bytes(file.read(int(first), count))


def read_frames(path: Path, layout: FrameLayout, numbers: NDArray[np.int64]) -> NDArray[Any]:
    """The observations of frames `numbers [...]` in a file, `[..., size]`.

    Raises:
        RunError: the file is missing, as in runs of an earlier version.
    """
    if not numbers.size:
        return np.zeros((*numbers.shape, *layout.shape), layout.dtype)
    if not path.is_file():
        raise RunError(
            f"{path} is missing, which holds what the run has seen; restore it (a run that an earlier version began never had one)"
        )
    first, last = int(numbers.min()), int(numbers.max())
    kept = np.fromfile(path, frames_dtype(layout), last + 1 - first, offset=first * layout.nbytes)
    words = torch.from_numpy(_as_bytes(kept).view(np.int64))
    return layout.decode(words[torch.from_numpy(numbers - first)]).numpy()


def _as_bytes(frames: NDArray[Any]) -> NDArray[np.uint8]:
    return frames.view(np.uint8).reshape(len(frames), frames.dtype.itemsize)
