"""What the seeds of a group have collected: the newest transitions in memory for minibatches, all of them on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlkit2.data.batch import LookaheadBatch, RowBatch
from rlkit2.data.dataset import Lookahead
from rlkit2.data.records import Records, record_dtype
from rlkit2.data.spaces import action_layout
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import RunError
from rlkit2.files import make_folder, writing

SINGLE_STEPS = Lookahead()
PIECE = 1 << 24  # bytes that are read at once


def online_dtype(spec: DatasetSpec) -> np.dtype[Any]:
    """The layout of one collected transition: both observations whole, images too."""
    flat, actions = spec.flattener, action_layout(spec.action_space)
    return record_dtype(flat.shape, flat.dtype, actions.shape, actions.dtype)


def replay_path(run: Path, seed: int) -> Path:
    """The file of a seed's transitions: records of `online_dtype`, one after another, in the order in which they were collected."""
    return run / "replay" / f"seed-{seed}.records"


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


class Replay:
    """The transitions that S seeds have collected in E environments each; row i of a seed is of its environment i % E.

    So what an environment did after row i is row i + E, unless an episode ended there.

    Args:
        spec: gives the spaces.
        seeds: the integers that name the seeds.
        num_envs: E.
        capacity: rows of a seed that are kept in memory, a multiple of E.
        run: the run's folder, below which the files are.
        lookahead: what minibatches tell of the steps after their own.
        reward: what minibatches show of a reward; the files hold the environment's own.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        seeds: Sequence[int],
        num_envs: int,
        capacity: int,
        run: Path,
        lookahead: Lookahead = SINGLE_STEPS,
        reward: Callable[[Tensor], Tensor] = lambda reward: reward,
    ) -> None:
        self.num_envs, self.capacity, self.lookahead, self.reward = num_envs, capacity, lookahead, reward
        dtype = online_dtype(spec)
        self.array = np.zeros((len(seeds), capacity), dtype)  # pages are taken as they are written
        self.records = Records.from_numpy(self.array.reshape(-1))
        self.files = [RecordFile(replay_path(run, seed), dtype) for seed in seeds]
        self.count = 0  # rows of every seed, those that are overwritten in memory included
        self.cuts: list[set[int]] = [
            set() for _ in seeds
        ]  # rows behind which an episode was given up, whatever their flags say
        self._first = torch.arange(len(seeds)).unsqueeze(1) * capacity

    @property
    def oldest(self) -> int:
        """The first row that is in memory."""
        return max(0, self.count - self.capacity)

    def add(self, step: Mapping[str, NDArray[Any]]) -> None:
        """One step of every environment: fields `[S, E, ...]`."""
        if self.count - self.files[0].length == self.capacity:
            self.flush()
        start = self.count % self.capacity
        for name, values in step.items():
            self.array[name][:, start : start + self.num_envs] = values
        self.count += self.num_envs

    def flush(self) -> None:
        """Write what is not yet in the files."""
        words = self.array.view(np.int64).reshape(*self.array.shape, -1)  # numpy does not copy what lies between fields
        for file, own in zip(self.files, words, strict=True):
            file.append(own[np.arange(file.length, self.count) % self.capacity])

    def load(self, count: int, digests: Sequence[bytes]) -> None:
        """Continue from the first `count` rows of the files.

        Raises:
            RunError: a file is damaged.
        """
        self.count = count
        rows = np.arange(self.oldest, count)
        for file, digest, own in zip(self.files, digests, self.array, strict=True):
            file.cut(count, digest)
            own[rows % self.capacity] = file.read(self.oldest, count)

    def gather(self, rows: Tensor) -> RowBatch:
        """The transitions at `rows [S, B]`, as `TransitionDataset.gather`."""
        fields = self._fields(rows)
        if self.lookahead == SINGLE_STEPS:
            return RowBatch(**fields, rows=rows)
        ahead: dict[str, Any] = {}
        last, total = rows, fields["rewards"].double()
        follows = self._follows(rows, fields)
        for j in range(1, self.lookahead.num_steps):
            last = torch.where(follows, last + self.num_envs, last)
            here = self._fields(last)
            total += torch.where(follows, self.lookahead.discount**j * here["rewards"].double(), 0.0)
            follows = follows & self._follows(last, here)
        if self.lookahead.num_steps > 1:
            end = self._fields(last)
            ahead = {name: end[name] for name in ("next_observations", "terminations", "truncations")}
            ahead |= {"rewards": total.to(fields["rewards"].dtype), "discount": self.lookahead.discount}
            ahead["steps"] = torch.div(last - rows, self.num_envs, rounding_mode="floor") + 1
        if self.lookahead.next_actions:
            after = torch.where(follows, last + self.num_envs, last)
            ahead |= {"next_actions": self._fields(after)["actions"], "followed": follows}
        return LookaheadBatch(**fields | ahead, rows=rows)

    def _fields(self, rows: Tensor) -> dict[str, Tensor]:
        fields = self.records.views(self.records.gather(rows % self.capacity + self._first))
        return {**fields, "rewards": self.reward(fields["rewards"])}

    def _follows(self, rows: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """Whether the row after each of `rows [S, B]` is there and of the same episode."""
        there = rows + self.num_envs < self.count
        for own, cut, row in zip(there, self.cuts, rows, strict=True):
            if cut:
                own &= ~torch.isin(row, torch.tensor(sorted(cut)))
        return there & ~fields["terminations"] & ~fields["truncations"]

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.close()
