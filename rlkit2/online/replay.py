"""What the seeds of a group have collected: the newest transitions in memory for minibatches, all of them on disk."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlkit2.data.batch import LookaheadBatch, RowBatch
from rlkit2.data.dataset import Lookahead
from rlkit2.data.records import FIELDS, OBSERVATIONS, Records, record_dtype
from rlkit2.data.spaces import action_layout
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import RunError
from rlkit2.online.frames import Frames, frame_layout, frames_path, read_frames
from rlkit2.online.record_file import RecordFile

SINGLE_STEPS = Lookahead()


def online_dtype(spec: DatasetSpec) -> np.dtype[Any]:
    """The layout of one collected transition: both observations, or the numbers of the frames in them where they hold images."""
    flat, actions = spec.flattener, action_layout(spec.action_space)
    if spec.images:
        return record_dtype((spec.frame_stack,), np.int64, actions.shape, actions.dtype)
    return record_dtype(flat.shape, flat.dtype, actions.shape, actions.dtype)


def replay_path(run: Path, seed: int) -> Path:
    """The file of a seed's transitions: records of `online_dtype`, one after another, in the order in which they were collected."""
    return run / "replay" / f"seed-{seed}.records"


def read_rows(run: Path, spec: DatasetSpec, seed: int, rows: slice) -> dict[str, NDArray[Any]]:
    """What the files of a run say of these transitions of a seed, as arrays of the fields of a transition, `[n, ...]`."""
    dtype, layout, flat = online_dtype(spec), frame_layout(spec), spec.flattener
    found = np.fromfile(
        replay_path(run, seed), dtype, max(0, rows.stop - rows.start), offset=rows.start * dtype.itemsize
    )
    found = found[:: rows.step]
    fields = {name: found[name] for name in FIELDS}
    if layout is not None:
        for name in OBSERVATIONS:
            seen = read_frames(frames_path(run, seed), layout, fields[name])
            fields[name] = flat.joined(torch.from_numpy(seen)).numpy()
    return fields


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
        self.spec, self.seeds, self.run = spec, tuple(seeds), run
        self.num_envs, self.capacity, self.lookahead, self.reward = num_envs, capacity, lookahead, reward
        dtype = online_dtype(spec)
        self.array = np.zeros((len(seeds), capacity), dtype)  # pages are taken as they are written
        self.records = Records.from_numpy(self.array.reshape(-1))
        self.files = [RecordFile(replay_path(run, seed), dtype) for seed in seeds]
        layout, frames = frame_layout(spec), capacity + num_envs * (spec.frame_stack + 1)
        self.frames = None if layout is None else Frames(layout, seeds, frames, run)
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
        if self.frames is not None:
            step = self._numbered(self.frames, step)
        start = self.count % self.capacity
        for name, values in step.items():
            self.array[name][:, start : start + self.num_envs] = values
        self.count += self.num_envs

    def _numbered(self, frames: Frames, step: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The step with the numbers of its frames, which are kept, in the place of its observations."""
        size, envs = self.spec.frame_stack, self.num_envs
        frames.reserve(envs * (size + 1), self._oldest_frames(envs))
        seen, after = (self.spec.flattener.parted(step[name], size) for name in OBSERVATIONS)
        numbers = {name: np.zeros((len(self.seeds), envs, size), np.int64) for name in OBSERVATIONS}
        begins, last = self._begins()
        for s, e in np.ndindex(begins.shape):
            here = last[s, e]
            if begins[s, e]:  # the first observation is there for those before it
                new = seen[s, e, :1] if (seen[s, e] == seen[s, e, :1]).all() else seen[s, e]
                here = frames.add(s, new) + np.arange(size) * (len(new) > 1)
            numbers["observations"][s, e] = here
            numbers["next_observations"][s, e] = [*here[1:], frames.add(s, after[s, e, -1:])]
        return {**step, **numbers}

    def _begins(self) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Whether an episode of each environment begins with the row to come, `[S, E]`, and what the row before it led to, `[S, E, ...]`."""
        rows = np.arange(self.count - self.num_envs, self.count)
        last = self.array[:, rows % self.capacity]
        cut = np.array([[row in own for row in rows] for own in self.cuts])
        return (self.count == 0) | last["terminations"] | last["truncations"] | cut, last["next_observations"]

    def _oldest_frames(self, more: int) -> NDArray[np.int64]:
        """The smallest number of a frame that is shown by the rows in memory when `more` have come, and by those to come, `[S]`."""
        if not self.count:
            return np.zeros(len(self.seeds), np.int64)
        rows = np.arange(max(0, self.count + more - self.capacity), self.count)[: self.num_envs]
        known = [self.array["observations"][:, rows % self.capacity], self._begins()[1]]
        oldest: NDArray[np.int64] = np.concatenate([part.reshape(len(self.seeds), -1) for part in known], 1).min(1)
        return oldest

    def flush(self) -> None:
        """Write what is not yet in the files."""
        if self.frames is not None:
            self.frames.flush()
        words = self.array.view(np.int64).reshape(*self.array.shape, -1)  # numpy does not copy what lies between fields
        for file, own in zip(self.files, words, strict=True):
            file.append(own[np.arange(file.length, self.count) % self.capacity])

    def sync(self) -> None:
        """Write what is not yet in the files, and wait until all of them are on the disk."""
        self.flush()
        for file in self._all_files:
            file.sync()

    @property
    def _all_files(self) -> list[RecordFile]:
        return self.files + ([] if self.frames is None else self.frames.files)

    def state(self) -> dict[str, Tensor]:
        """What the files hold, with the seed axis in front: their checksums, and how many frames there are."""
        found = {"online.sha256": _digests(self.files)}
        if self.frames is not None:
            found |= {
                "online.frames": torch.tensor(self.frames.counts),
                "online.frames_sha256": _digests(self.frames.files),
            }
        return found

    def load_state(self, count: int, state: Mapping[str, Tensor]) -> None:
        """Continue from the first `count` rows of the files, as they were at `state()`.

        Raises:
            RunError: a file is damaged, or of an earlier version.
        """
        if self.frames is not None and "online.frames" not in state:
            raise RunError(
                f"{self.run} was begun by an earlier version, which kept every image twice; begin the online run again, or continue with that version"
            )
        self.count = count
        rows = np.arange(self.oldest, count)
        for file, digest, own in zip(self.files, state["online.sha256"], self.array, strict=True):
            file.cut(count, bytes(digest.tolist()))
            own[rows % self.capacity] = file.read(self.oldest, count)
        if self.frames is not None:
            digests = [bytes(digest.tolist()) for digest in state["online.frames_sha256"]]
            self.frames.load(state["online.frames"].tolist(), digests, self._oldest_frames(0))

    def past(self, place: int, rows: slice) -> dict[str, NDArray[Any]]:
        """Transitions of the seed at this place from the files, `[n, ...]`."""
        return read_rows(self.run, self.spec, self.seeds[place], rows)

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
            ahead |= {"next_actions": self._stored(after, ("actions",))["actions"], "followed": follows}
        return LookaheadBatch(**fields | ahead, rows=rows)

    def _stored(self, rows: Tensor, names: Collection[str] = FIELDS) -> dict[str, Tensor]:
        return self.records.views(self.records.gather(rows % self.capacity + self._first), names)

    def _fields(self, rows: Tensor) -> dict[str, Tensor]:
        fields = self._stored(rows)
        if self.frames is not None:
            for name in OBSERVATIONS:
                fields[name] = self.spec.flattener.joined(self.frames.gather(fields[name]))
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
        for file in self._all_files:
            file.close()


def _digests(files: Sequence[RecordFile]) -> Tensor:
    return torch.stack([torch.tensor(list(file.digest()), dtype=torch.uint8) for file in files])
