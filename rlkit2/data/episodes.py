"""The one place where the T + 1 observations of an episode become aligned pairs `(s_t, s_{t+1})`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from rlkit2.data.flags import as_flags
from rlkit2.data.records import RecordWriter
from rlkit2.data.spaces import SpaceFlattener, action_bounds, action_layout, observation_bounds, outside
from rlkit2.errors import CorruptDatasetError, DatasetError, UnsupportedSpaceError

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Episode:
    """One episode as it is stored: `observations` `[T + 1, ...]` and `actions` `[T, ...]` arrays or trees of arrays, the rest `[T]`.

    `name` is for messages. `notes` counts what a reader had to do to it, under the names of `rlkit2.data.notes`.
    """

    name: str
    observations: Any
    actions: Any
    rewards: NDArray[Any]
    terminations: NDArray[Any]
    truncations: NDArray[Any]
    notes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Fill:
    """What observations that are NaN become: `how` is "previous" (the value before them in the episode, at its start the column's mean) or "mean".

    `means`: of every column of the dataset, `[columns]`.
    """

    how: str
    means: NDArray[np.float64]

    def __call__(self, observations: NDArray[Any]) -> tuple[NDArray[Any], int]:
        """One episode's observations `[T + 1, columns]` without NaN, and how many there were."""
        missing = np.isnan(observations)
        count = int(missing.sum())
        if not count:
            return observations, 0
        filled = np.where(missing, self.means, observations)
        if self.how == "previous":
            known = np.where(missing, -1, np.arange(len(observations))[:, None])
            before = np.maximum.accumulate(known, axis=0)
            filled = np.where(before < 0, filled, np.take_along_axis(observations, before.clip(0), axis=0))
        return filled, count


def column_means(episodes: Iterable[Episode], flat: SpaceFlattener) -> NDArray[np.float64]:
    """Mean of the finite values of every observation column; `DatasetError` for a column without any."""
    total, count = np.zeros(flat.size), np.zeros(flat.size)
    with closing_all(episodes) as stream:
        for episode in stream:
            if _rows(episode.actions):
                rows = flat.flatten(episode.observations).reshape(-1, flat.size).astype(np.float64)
                total += np.where(np.isfinite(rows), rows, 0.0).sum(axis=0)
                count += np.isfinite(rows).sum(axis=0)
    empty = np.flatnonzero(count == 0)
    if len(empty):
        raise DatasetError(f"observation column {empty[0]} has no value at all, so none can be filled in; leave it out")
    return total / count


class EpisodePacker:
    """Aligns episodes and writes them as records; counts in `notes` what was not as it should be.

    An episode normally has one observation more than actions. With as many observations as actions its last next observation was never
    stored: after a termination nothing is bootstrapped, so the last observation stands in for it; otherwise the last step is dropped and the
    step before it is the truncated one. Any other length is refused. An episode that ends without a flag counts as truncated.

    `checked`: actions outside `action_space` are refused; `observed`: so are observations outside their space. `fill`: see `Fill`. Observations
    that float32 cannot tell apart (timestamps) are refused always.
    """

    def __init__(
        self,
        writer: RecordWriter,
        flat: SpaceFlattener,
        action_space: spaces.Space[Any],
        *,
        checked: bool = False,
        observed: bool = False,
        fill: Fill | None = None,
    ) -> None:
        self.writer, self.fill = writer, fill
        self.flat = flat
        self.actions = action_layout(action_space)
        self.bounds = (action_space, *action_bounds(action_space)) if checked else None
        self.observation_bounds = (flat.space, *observation_bounds(flat)) if observed else None
        self.notes: dict[str, int] = {}

    def _count(self, what: str, number: int = 1) -> None:
        self.notes[what] = self.notes.get(what, 0) + number

    def _flatten(self, episode: Episode) -> tuple[NDArray[Any], NDArray[Any]]:
        try:
            observations = self.flat.flatten(episode.observations)
            actions = self.actions.flatten(episode.actions)
        except UnsupportedSpaceError as error:
            raise CorruptDatasetError(f"{episode.name}: {error}") from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise CorruptDatasetError(
                f"{episode.name}: observations or actions do not fit the spaces in the metadata ({error})"
            ) from error
        return observations, actions

    def add(self, episode: Episode) -> None:
        """Align and write one episode; `CorruptDatasetError` names it where lengths or shapes contradict each other."""
        for what, number in episode.notes.items():
            self._count(what, number)
        if np.size(episode.rewards) == 0 and not _rows(episode.actions):
            self._count("episodes_without_steps")
            return
        observations, actions = self._flatten(episode)
        if self.bounds is not None:
            check_whole(episode.name, actions, self.bounds[0])
            check_bounds(episode.name, "action", actions, *self.bounds)
        if self.observation_bounds is not None:
            check_bounds(episode.name, "observation", observations, *self.observation_bounds)
        if self.fill is not None and observations.dtype.kind == "f":
            observations, count = self.fill(observations)
            if count:
                self._count("missing_values_filled", count)
        _check_float32(episode.name, observations)
        rewards, terminations, truncations = (
            np.asarray(a).reshape(-1) for a in (episode.rewards, episode.terminations, episode.truncations)
        )
        if rewards.dtype.kind not in "fiub":
            raise CorruptDatasetError(f"{episode.name}: rewards of dtype {rewards.dtype} are not numbers")
        steps = len(actions)
        if not len(rewards) == len(terminations) == len(truncations) == steps:
            lengths = f"{steps} actions, {len(rewards)} rewards, {len(terminations)} terminations, {len(truncations)} truncations"
            raise CorruptDatasetError(f"{episode.name} has {lengths}; they must be equal")
        terminations = as_flags(terminations, f"{episode.name}: terminations")
        truncations = as_flags(truncations, f"{episode.name}: truncations")
        if len(observations) == steps:
            if terminations[-1]:
                self._count("episodes_without_final_observation")
                observations = np.concatenate([observations, observations[-1:]])
            else:
                self._count("last_steps_dropped_for_want_of_a_next_observation")
                steps -= 1
                if steps == 0:
                    self._count("episodes_dropped")
                    return
                truncations = truncations.copy()
                truncations[steps - 1] = True
        elif len(observations) != steps + 1:
            raise CorruptDatasetError(
                f"{episode.name} has {len(observations)} observations for {steps} actions; {steps + 1} expected"
            )
        if not (terminations[steps - 1] or truncations[steps - 1]):
            self._count("episodes_without_end_flag")
            truncations = truncations.copy()
            truncations[steps - 1] = True
        inside = int((terminations | truncations)[: steps - 1].sum())
        if inside:
            self._count("flags_in_mid_episode", inside)
        rows = slice(0, steps)
        # The next observation of step t is observation t + 1; the last observation is never the start of a transition.
        self.writer.add(
            observations[:steps],
            observations[1 : steps + 1],
            actions[rows],
            rewards[rows],
            terminations[rows],
            truncations[rows],
        )

    def add_all(
        self, episodes: Iterable[Episode], source: str, progress: Progress | None = None, total: int = 0
    ) -> None:
        """Write every episode of `source`; `CorruptDatasetError` where nothing usable is left.

        `progress` is called with (rows done, `total` rows) after each episode.
        """
        with closing_all(episodes) as stream:
            for episode in stream:
                self.add(episode)
                if progress is not None:
                    progress(self.writer.length, max(total, self.writer.length))
        if self.writer.length == 0:
            raise CorruptDatasetError(f"{source} has no usable episode; a dataset needs at least one transition")


@contextmanager
def closing_all(episodes: Iterable[Episode]) -> Iterator[Iterable[Episode]]:
    """The episodes; a generator is closed at the end, so that after an error its file is not left open."""
    try:
        yield episodes
    finally:
        if isinstance(episodes, Generator):
            episodes.close()


def _rows(tree: Any) -> int:
    """Rows of an array or of the first array of a tree."""
    while isinstance(tree, Mapping | tuple):
        tree = next(iter(tree.values() if isinstance(tree, Mapping) else tree))
    return len(np.atleast_1d(tree))


def check_whole(name: str, actions: NDArray[Any], space: spaces.Space[Any]) -> None:
    """Raise `DatasetError` for fractions where the space has choices."""
    if actions.dtype.kind == "f" and action_layout(space).dtype == np.int64 and not (actions == np.rint(actions)).all():
        raise DatasetError(
            f"{name}: actions are not whole numbers, but the given space is {space}; use --action-space continuous"
        )


def check_bounds(
    name: str, what: str, values: NDArray[Any], space: spaces.Space[Any], low: NDArray[Any], high: NDArray[Any]
) -> None:
    """Raise `DatasetError` for values `[N, ...]` beyond the bounds of their columns by more than rounding."""
    columns = values.reshape(len(values), -1)
    bad = outside(columns, low, high)
    if bad.any():
        step, column = np.argwhere(bad)[0].tolist()
        raise DatasetError(
            f"{name}: {int(bad.sum())} {what} values lie outside the given space {' '.join(str(space).split())}, the first in step {step}, "
            f"column {column}: {columns[step, column]:g}; give the space that the data were made in"
        )


LARGE = 1024.0  # below, no column is counted as one that float32 cannot hold


def _check_float32(name: str, observations: NDArray[Any]) -> None:
    """Refuse columns whose steps are smaller than float32 can tell apart at their size, such as seconds since 1970."""
    if (
        len(observations) < 2
        or observations.dtype.kind not in "fiu"
        or observations.dtype.itemsize < 4
        or observations.dtype == np.float32
    ):
        return
    if max(observations.max(), -observations.min()) < LARGE:
        return
    columns = observations.reshape(len(observations), -1).astype(np.float64)
    size = np.abs(columns).max(axis=0)
    step = np.abs(np.diff(columns, axis=0)).mean(axis=0)
    lost = (size >= LARGE) & (step < size * np.finfo(np.float32).eps / 2) & (step > size * 1e-12)
    if lost.any():
        column = int(np.flatnonzero(lost)[0])
        raise DatasetError(
            f"{name}: observation column {column} is as large as {size[column]:.6g} and changes by {step[column]:.3g} a step, "
            "which float32 cannot hold; subtract its first value, or leave the column out"
        )
