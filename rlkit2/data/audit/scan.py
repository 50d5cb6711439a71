"""The pass over a dataset's records, in chunks, that an audit is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from gymnasium import spaces

from rlkit2.data.audit.findings import BINS, Array, Distribution, Finding, Place, Severity
from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.spaces import ROUNDING, SpaceFlattener, action_bounds, action_layout, observation_bounds, outside

CHUNK_BYTES = 1 << 26
MOST_PLACES = 10  # places listed per finding
MOST_SAMPLES = 1 << 20  # rows behind the action histograms
FAR = 30.0  # times the distance from the median that 99 in 100 of the other rewards keep


def chunks(dataset: TransitionDataset) -> Iterator[tuple[int, Array, dict[str, Array]]]:
    """First row, record words `[n, W]` and fields `[n, ...]` of consecutive pieces of the dataset."""
    count = max(1, CHUNK_BYTES // dataset.records.row_bytes)
    dataset.records.check()
    for start in range(0, len(dataset), count):
        rows = slice(start, start + count)
        words = dataset.records.words[rows] if dataset.rows is None else dataset.records.gather(dataset.rows[rows])
        words = words.cpu()
        fields = {name: value.numpy() for name, value in dataset.records.views(words).items()}
        if dataset.new_rewards is not None:
            fields["rewards"] = dataset.new_rewards[rows].cpu().numpy()
        yield start, dataset.records.contents(words).numpy(), fields


class _Tally:
    """How often something occurs, and its first places."""

    def __init__(self, scan: Scan) -> None:
        self.scan = scan
        self.count = 0
        self.places: list[Place] = []

    def add(self, start: int, bad: Array) -> None:
        """`bad`: bool `[n]` or `[n, columns]` for the rows from `start`."""
        found = np.argwhere(bad)
        self.count += len(found)
        for row, *column in found[: MOST_PLACES - len(self.places)].tolist():
            self.places.append(self.scan.place(start + row, *column))

    def finding(self, severity: Severity, code: str, message: str) -> Iterator[Finding]:
        """The finding, if it occurred: the number, `message`, and the first place."""
        if self.count:
            at = ", ".join(f"{key} {value}" for key, value in self.places[0].items())
            yield Finding(severity, code, f"{self.count} {message}, the first in {at}", tuple(self.places))


class Scan:
    """Everything that is gathered in the pass over the records."""

    def __init__(self, dataset: TransitionDataset) -> None:
        self.spec = dataset.spec
        self.starts = dataset.episode_starts.cpu().numpy()
        self.lengths = np.diff(self.starts)
        self.returns = np.zeros(len(self.lengths))
        self.rewards = np.zeros(len(dataset), np.float32)
        self.endings = {"terminated": 0, "truncated": 0, "both": 0}
        self.bad_values = {name: _Tally(self) for name in ("observations", "next_observations", "actions", "rewards")}
        self.mid_flags, self.both_flags, self.breaks, self.outside = (_Tally(self) for _ in range(4))
        self.low, self.high = action_bounds(self.spec.action_space)
        self.observation_bounds = observation_bounds(self.spec.flattener)
        self.strays, self.outliers = _Tally(self), _Tally(self)
        self.worst = 0.0
        self.observed: tuple[Array, Array] | None = None
        self.share = min(1.0, MOST_SAMPLES / len(dataset))
        self.samples: list[Array] = []
        self.random = np.random.default_rng(0)
        self.digest = hashlib.blake2b(digest_size=16)
        self.episode_of: dict[bytes, int] = {}
        self.duplicates: list[tuple[int, int]] = []
        self.last_next: Array | None = None

    def place(self, row: int, *column: int) -> Place:
        """Episode and step of a row, and the column of a field."""
        episode = int(np.searchsorted(self.starts, row, "right")) - 1
        place: Place = {"episode": episode, "step": row - int(self.starts[episode])}
        return {**place, "column": column[0]} if column else place

    def add(self, start: int, words: Array, fields: dict[str, Array]) -> None:
        """Take in the rows from `start`."""
        with np.errstate(invalid="ignore", over="ignore"):  # values that are not finite are what is looked for
            self._add(start, words, fields)

    def _add(self, start: int, words: Array, fields: dict[str, Array]) -> None:
        stop = start + len(words)
        first = int(np.searchsorted(self.starts, start, "right")) - 1
        last = int(np.searchsorted(self.starts, stop, "left"))  # episodes first..last-1 have rows here
        cuts = np.maximum(self.starts[first:last], start) - start
        self.rewards[start:stop] = fields["rewards"]
        self.returns[first:last] += np.add.reduceat(fields["rewards"].astype(np.float64), cuts)
        for name, tally in self.bad_values.items():
            if fields[name].dtype.kind == "f" and not np.isfinite(fields[name]).all():
                values = fields[name]
                tally.add(start, ~np.isfinite(values.reshape(len(values), -1) if values.ndim > 1 else values))
        self._flags(start, stop, fields)
        self._chain(start, stop, fields)
        self._columns(fields["observations"])
        rows = fields["observations"].reshape(len(words), -1)
        if rows.dtype.kind == "f":
            self.strays.add(start, outside(rows, *self.observation_bounds))
        self._actions(start, fields["actions"])
        self._hash(start, words, first, cuts)

    def _flags(self, start: int, stop: int, fields: dict[str, Array]) -> None:
        terminated, truncated = fields["terminations"], fields["truncations"]
        ends = self.starts[(self.starts > start) & (self.starts <= stop)] - start - 1
        middle = terminated | truncated
        middle[ends] = False
        self.mid_flags.add(start, middle)
        both = terminated & truncated
        self.both_flags.add(start, both)
        for name, flags in (("terminated", terminated), ("truncated", truncated), ("both", both)):
            self.endings[name] += int(flags[ends].sum())

    def _chain(self, start: int, stop: int, fields: dict[str, Array]) -> None:
        """Rows whose next observation is not the observation of the step after them in the same episode, compared as bits."""
        observations, following = (_bits(fields[name]) for name in ("observations", "next_observations"))
        before = following[:1] if self.last_next is None else self.last_next
        broken = (observations != np.concatenate([before, following[:-1]])).reshape(len(observations), -1).any(1)
        broken[self.starts[(self.starts >= start) & (self.starts < stop)] - start] = False
        self.breaks.add(start, broken)
        self.last_next = following[-1:].copy()

    def _columns(self, observations: Array) -> None:
        rows = observations.reshape(len(observations), -1)
        low, high = np.fmin.reduce(rows, axis=0), np.fmax.reduce(rows, axis=0)
        if self.observed is not None:
            low, high = np.fmin(low, self.observed[0]), np.fmax(high, self.observed[1])
        self.observed = low, high

    def _actions(self, start: int, actions: Array) -> None:
        columns = actions.reshape(len(actions), -1)
        excess = np.maximum(self.low - columns, columns - self.high)
        if (excess > 0).any():
            self.outside.add(start, excess > 0)
            spread = np.where(np.isfinite(self.high - self.low), self.high - self.low, 1.0)
            self.worst = max(self.worst, float(np.nanmax(excess / np.maximum(spread, 1e-12))))
        taken = columns if self.share == 1 else columns[self.random.random(len(columns)) < self.share]
        self.samples.append(taken.copy())

    def _hash(self, start: int, words: Array, first: int, cuts: Array) -> None:
        """Find episodes with the same bytes as an earlier one."""
        for episode, (cut, end) in enumerate(zip(cuts, [*cuts[1:], len(words)], strict=True), first):
            self.digest.update(words[cut:end].data)
            if start + end == self.starts[episode + 1]:
                earlier = self.episode_of.setdefault(self.digest.digest(), episode)
                if earlier != episode:
                    self.duplicates.append((episode, earlier))
                self.digest = hashlib.blake2b(digest_size=16)

    def action_distributions(self) -> tuple[Distribution | None, ...]:
        """One per action column; discrete actions get a bin each, bounded ones bins over their range."""
        columns = np.concatenate(self.samples).T
        out = []
        for low, high, column in zip(self.low.tolist(), self.high.tolist(), columns, strict=True):
            if column.dtype.kind == "f":
                inside = np.isfinite([low, high]).all() and (column >= low).all() and (column <= high).all()
                out.append(Distribution.of(column, np.linspace(low, high, BINS + 1) if inside and low < high else None))
            elif column.max() - column.min() < 1000:
                out.append(Distribution.of(column, np.arange(column.min(), column.max() + 2) - 0.5))
            else:
                out.append(Distribution.of(column))
        return tuple(out)

    def findings(self) -> Iterator[Finding]:
        """What the records themselves say."""
        for name, tally in self.bad_values.items():
            yield from tally.finding("error", f"non_finite_{name}", f"values of {name} are NaN or infinite")
        yield from self.mid_flags.finding("error", "flag_in_mid_episode", "steps in mid-episode are flagged as ends")
        yield from self.both_flags.finding(
            "warning", "terminated_and_truncated", "steps are both terminated and truncated (nothing is bootstrapped)"
        )
        yield from self.breaks.finding(
            "warning", "broken_chain", "steps do not start from the next observation of the step before"
        )
        discrete = action_layout(self.spec.action_space).dtype == np.int64
        excess = "" if discrete else f" by up to {100 * self.worst:.2g} % of its range"
        yield from self.outside.finding(
            "error" if discrete or self.worst > ROUNDING else "warning",
            "actions_out_of_bounds",
            f"action values lie outside {space_text(self.spec.action_space)}{excess}",
        )
        yield from self.strays.finding(
            "warning", "observations_out_of_bounds", "observation values lie outside the observation space"
        )
        yield from self._duplicate_findings()
        yield from self._constant_findings()
        self.outliers.add(0, np.isin(np.arange(len(self.rewards)), reward_outliers(self.rewards)))
        yield from self.outliers.finding("warning", "reward_outliers", "rewards lie far from all others")

    def _duplicate_findings(self) -> Iterator[Finding]:
        if self.duplicates:
            (episode, earlier), count = self.duplicates[0], len(self.duplicates)
            message = f"{count} of {len(self.lengths)} episodes repeat an earlier one byte for byte, the first is episode {episode} (as {earlier})"
            places: tuple[Place, ...] = tuple({"episode": e, "same_as": f} for e, f in self.duplicates[:MOST_PLACES])
            yield Finding("warning", "duplicate_episodes", message, places)

    def _constant_findings(self) -> Iterator[Finding]:
        assert self.observed is not None
        constant = np.flatnonzero(self.observed[0] == self.observed[1]).tolist()
        if constant and len(self.rewards) > 1:
            shown = ", ".join(_column(self.spec.flattener, column) for column in constant[:MOST_PLACES])
            more = ", ..." if len(constant) > MOST_PLACES else ""
            image = self.spec.flattener.dtype == np.uint8
            message = f"{len(constant)} of {len(self.observed[0])} observation columns never change: {shown}{more}"
            message += "" if image else "; normalised, they explode when the environment changes them"
            places: tuple[Place, ...] = tuple({"column": column} for column in constant[:MOST_PLACES])
            yield Finding("info" if image else "warning", "constant_observations", message, places)
        if len(self.rewards) > 1 and (self.rewards == self.rewards[0]).all():
            yield Finding("info", "constant_rewards", f"every reward is {self.rewards[0]:g}")


def reward_outliers(rewards: Array) -> Array:
    """Rows `[K]` of the rewards `[N]` that lie far from all others: more than `FAR` times as far from the median as 99 in 100 of those that differ
    from it, and at most one in a hundred of these. Sparse rewards of one size have none."""
    finite = np.isfinite(rewards)
    if not finite.any():
        return np.zeros(0, np.int64)
    distance = np.where(finite, np.abs(rewards - np.median(rewards[finite])), 0.0)
    usual = distance[distance > 0]
    if not len(usual):
        return np.zeros(0, np.int64)
    return np.flatnonzero(distance > FAR * np.quantile(usual, 0.99, method="lower"))


def _bits(values: Array) -> Array:
    """Values to be compared as bits, so that NaN equals itself."""
    return values.view(np.int32) if values.dtype == np.float32 else values


def space_text(space: spaces.Space[Any]) -> str:
    """A space in few characters."""
    text = " ".join(str(space).split())
    return text if len(text) < 60 else f"the {type(space).__name__} action space"


def _column(flat: SpaceFlattener, column: int) -> str:
    """A column by the key it belongs to."""
    for leaf in flat.leaves:
        if leaf.name and leaf.start <= column < leaf.stop:
            return f"{leaf.name}[{column - leaf.start}]"
    return str(column)
