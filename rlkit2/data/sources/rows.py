"""From aligned rows, one per step, to episodes: where they end, what was cut, and which next observations are true."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit2.data.episodes import Episode
from rlkit2.data.flags import as_flags
from rlkit2.data.sources.reader import ReadOptions
from rlkit2.errors import CorruptDatasetError, DatasetError

# The names of both ages of Gym's step interface.
TERMINATIONS = ("terminals", "terminations")
TRUNCATIONS = ("timeouts", "truncations")
REQUIRED = ("observations", "actions", "rewards")
CHUNK = 1 << 16
ROUNDING = 1e-5  # of a column's standard deviation: a smaller difference between two observations is rounding
Flags = NDArray[np.bool_]


def check_rows(arrays: Mapping[str, Any], name: str, options: ReadOptions) -> int:
    """The number of rows; `CorruptDatasetError` where an array is missing, they have unequal lengths, or ends cannot be told."""
    present = ", ".join(sorted(arrays)) or "no arrays"
    missing = [key for key in REQUIRED if key not in arrays]
    if missing:
        raise CorruptDatasetError(f"{name} lacks {', '.join(missing)}; it has {present}")
    if not options.max_episode_steps and not {*TERMINATIONS, *TRUNCATIONS, "episodes"} & set(arrays):
        raise CorruptDatasetError(
            f"{name} has {present} and nothing that ends an episode; it takes terminals, timeouts or episodes "
            "(tables: --columns terminations=NAME, ...), or --max-episode-steps N"
        )
    told = {"next_observations", "episodes", *TRUNCATIONS} & set(arrays)
    if not told and not options.max_episode_steps and not options.never_terminates:
        raise CorruptDatasetError(
            f"{name} has neither timeouts nor next_observations: where an episode was cut off cannot be told; say it with "
            "--max-episode-steps N (an episode has N steps at most) or --never-terminates (every end is a cut)"
        )
    checked = (*REQUIRED, "next_observations", "episodes", *TERMINATIONS, *TRUNCATIONS)
    single = [key for key in checked if key in arrays and not arrays[key].shape]
    if single:
        raise CorruptDatasetError(f"{name}: {single[0]} is a single value, not one per step")
    lengths = {key: len(arrays[key]) for key in checked if key in arrays}
    if len(set(lengths.values())) != 1:
        raise CorruptDatasetError(
            f"{name} has arrays of unequal lengths: {', '.join(f'{k} {n}' for k, n in lengths.items())}"
        )
    if lengths["rewards"] == 0:
        raise CorruptDatasetError(f"{name} has no rows; a dataset needs at least one transition")
    return lengths["rewards"]


def cut_rows(arrays: Mapping[str, Any], name: str, options: ReadOptions) -> Iterator[Episode]:
    """The episodes of aligned rows (anything that can be sliced, such as an HDF5 dataset).

    An episode ends at a termination, a truncation, a change of `episodes`, after `max_episode_steps`, and, where there are `next_observations`,
    where the next row does not start from them; equal up to rounding counts as equal. Where rows go on after a termination until the
    episode is cut off (antmaze flags every step at the goal), the first termination ends the episode, its next observation is the row
    after it, and the other flagged rows are left out.
    """
    total = check_rows(arrays, name, options)
    terminations, truncations = _flags(arrays, TERMINATIONS, total), _flags(arrays, TRUNCATIONS, total)
    notes: dict[str, int] = {}
    if options.never_terminates and terminations.any():
        notes["terminations_taken_as_cuts"] = int(terminations.sum())
        terminations, truncations = np.zeros(total, bool), truncations | terminations
    if "episodes" in arrays:
        changes = _changes_of_episode(arrays["episodes"], terminations | truncations, name)
        truncations[:-1] |= changes & ~terminations[:-1]
    ends = terminations | truncations
    following = arrays.get("next_observations")
    after_end = np.zeros(total, bool)
    if following is None:
        after_end = _after_termination(arrays["observations"], terminations, truncations)
    else:
        breaks, rounded = _breaks(arrays["observations"], following)
        _count(notes, "episodes_cut_at_a_jump", int((breaks & ~ends[:-1]).sum()))
        _count(notes, "next_observations_within_rounding", int((rounded & ~ends[:-1]).sum()))
        ends[:-1] |= breaks
    _count(notes, "rows_after_a_termination", int(after_end.sum()))
    ends[-1] = True
    if options.max_episode_steps:
        limited = _limit(ends, options.max_episode_steps)
        _count(notes, "episodes_cut_at_the_step_limit", int((limited & ~ends).sum()))
        truncations |= limited & ~ends
        ends |= limited
    rewards = np.asarray(arrays["rewards"][:]).reshape(-1)
    start = 0
    for stop in (np.flatnonzero(ends) + 1).tolist():
        rows = slice(start, stop)
        start = stop
        if after_end[stop - 1]:  # such a row is an episode of its own here
            continue
        observations = arrays["observations"][rows]
        if following is not None:
            observations = np.concatenate([observations, following[stop - 1 : stop]])
        elif stop < total and after_end[stop]:
            observations = arrays["observations"][rows.start : stop + 1]
        yield Episode(
            f"{name} rows {rows.start}..{stop - 1}",
            observations,
            arrays["actions"][rows],
            rewards[rows],
            terminations[rows],
            truncations[rows],
            notes,
        )
        notes = {}


def _changes_of_episode(episodes: Any, ends: Flags, name: str) -> Flags:
    """Rows after which another episode stands, `[N - 1]`; `CorruptDatasetError` where that does not say which rows belong together.

    An episode that comes back after others had not ended (logs of several environments, row by row) or its number was given twice (files
    that were joined): nothing tells which.
    """
    ids = np.asarray(episodes[:])
    if ids.size != len(ends) or (ids.dtype.kind == "f" and not np.isfinite(ids).all()):
        raise CorruptDatasetError(f"{name}: episodes must be one number per row, and none may be missing")
    ids = ids.reshape(-1)
    changes = np.asarray(ids[1:] != ids[:-1])
    starts = np.flatnonzero(np.concatenate([[True], changes]))
    stops = np.concatenate([starts[1:], [len(ids)]]) - 1
    order = np.argsort(ids[starts], kind="stable")  # stretches of one number stand together, in the order of the rows
    again = (ids[starts][order][1:] == ids[starts][order][:-1]) & ~ends[stops][order][:-1]
    if again.any():
        row = int(starts[order][1:][again].min())
        raise CorruptDatasetError(
            f"{name}: episode {ids[row]} comes back at row {row} after rows of others and had not ended; put the rows of an episode side by side "
            "(sort by episode, then by time), or give joined files episodes of different numbers"
        )
    return changes


def _count(notes: dict[str, int], what: str, number: int) -> None:
    if number:
        notes[what] = number


def _flags(arrays: Mapping[str, Any], names: tuple[str, ...], total: int) -> Flags:
    for name in names:
        if name in arrays:
            return as_flags(arrays[name][:], name).reshape(-1)
    return np.zeros(total, bool)


def _limit(ends: Flags, most: int) -> Flags:
    """Rows that are the `most`-th, 2 x `most`-th, ... of their episode."""
    starts = np.concatenate([[0], np.flatnonzero(ends)[:-1] + 1])
    step = np.arange(len(ends)) - np.repeat(starts, np.diff(np.concatenate([starts, [len(ends)]])))
    return np.asarray((step + 1) % most == 0)


def _blocks(total: int) -> Iterator[slice]:
    for start in range(0, total, CHUNK):
        yield slice(start, min(start + CHUNK, total))


def _wide(array: Any, rows: slice) -> NDArray[Any]:
    values = np.asarray(array[rows])
    return values.reshape(len(values), -1).astype(np.float64, copy=False)


def _rounding(observations: Any) -> NDArray[Any]:
    """The difference per column that counts as rounding: one part in 100,000 of the standard deviation, or four float32 steps."""
    count, total, squares, largest = 0.0, np.zeros(1), np.zeros(1), np.zeros(1)
    first: NDArray[Any] | None = None
    for rows in _blocks(len(observations)):
        values = _wide(observations, rows)
        first = values[:1] if first is None else first
        good = np.isfinite(values)
        shifted = np.where(good, values - np.where(np.isfinite(first), first, 0), 0)
        count = count + good.sum(axis=0)
        total, squares = total + shifted.sum(axis=0), squares + np.square(shifted).sum(axis=0)
        largest = np.maximum(largest, np.where(good, np.abs(values), 0).max(axis=0))
    number = np.maximum(count, 1)
    spread = np.sqrt(np.maximum(squares / number - np.square(total / number), 0))
    steps = 4 * np.finfo(np.float32).eps * largest
    return np.asarray(np.maximum(ROUNDING * spread, np.where(spread > 0, np.minimum(steps, spread / 10), steps)))


def _breaks(observations: Any, following: Any) -> tuple[Flags, Flags]:
    """Rows whose next observation is not the observation of the row after, and rows where it is so up to rounding only; `[N - 1]` each."""
    total = len(observations)
    if observations.shape != following.shape:
        raise DatasetError(f"observations {observations.shape} and next_observations {following.shape} differ in shape")
    breaks, rounded = np.zeros(total - 1, bool), np.zeros(total - 1, bool)
    tolerance: NDArray[Any] | None = None
    for rows in _blocks(total - 1):
        after = np.asarray(observations[rows.start + 1 : rows.stop + 1], np.float32).reshape(rows.stop - rows.start, -1)
        told = np.asarray(following[rows], np.float32).reshape(rows.stop - rows.start, -1)
        different = ((after != told) & ~(np.isnan(after) & np.isnan(told))).any(axis=1)
        if not different.any():
            continue
        if tolerance is None:
            tolerance = _rounding(observations)
        gaps = np.abs(after[different].astype(np.float64) - told[different])
        far = ~((gaps <= tolerance) | (np.isnan(after[different]) & np.isnan(told[different]))).all(axis=1)
        breaks[rows][different] = far
        rounded[rows][different] = ~far
    return breaks, rounded


def _changes(observations: Any, rows: slice) -> NDArray[Any]:
    """How far each column moves from each of `rows` to the row after it."""
    return np.abs(np.diff(_wide(observations, slice(rows.start, rows.stop + 1)), axis=0))


def _after_termination(observations: Any, terminations: Flags, truncations: Flags) -> Flags:
    """Rows that are flagged as terminations although the episode had ended with the row before, `[N]`.

    Runs of terminations are one episode that continues only where the rows in them follow each other like the steps inside episodes do and
    restarts do not: no column changes more than twice as much as it ever does in a step, while nine in ten of the starts after a truncation
    jump further.
    """
    total = len(terminations)
    repeated = np.zeros(total, bool)
    repeated[1:] = terminations[1:] & terminations[:-1] & ~truncations[:-1]
    restarts = np.flatnonzero(truncations[:-1])
    inside = ~(terminations | truncations)[:-1]
    if not repeated.any() or not len(restarts) or not inside.any():
        return np.zeros(total, bool)
    blocks = list(_blocks(total - 1))
    largest = np.max(
        [np.where(inside[rows, None], _changes(observations, rows), 0).max(axis=0) for rows in blocks], axis=0
    )
    far = np.concatenate([(_changes(observations, rows) > 2 * largest).any(axis=1) for rows in blocks])
    if far[restarts].mean() < 0.9:
        return np.zeros(total, bool)
    repeated[1:] &= ~far
    return repeated


def split_at_terminations(
    name: str, observations: Any, actions: Any, rewards: NDArray[Any], terminations: Flags
) -> Iterator[Episode]:
    """A trajectory of T steps with its T + 1 observations (an array or a dict of arrays) as episodes that end at each termination.

    Steps that are flagged again right after a termination were recorded while the trajectory went on at the goal; they are left out, counted.
    """
    total = len(rewards)
    if not total:
        yield Episode(f"{name}", observations, actions, rewards, terminations, np.zeros(0, bool))
        return
    repeated = terminations & np.concatenate([[False], terminations[:-1]])
    ends = terminations.copy()
    ends[-1] = True
    notes = {"rows_after_a_termination": int(repeated.sum())} if repeated.any() else {}
    start = 0
    for stop in (np.flatnonzero(ends) + 1).tolist():
        rows, with_last = slice(start, stop), slice(start, stop + 1)
        start = stop
        if repeated[stop - 1]:
            continue
        tree = (
            {key: value[with_last] for key, value in observations.items()}
            if isinstance(observations, Mapping)
            else observations[with_last]
        )
        cut = np.zeros(stop - rows.start, bool)
        cut[-1] = not terminations[stop - 1]
        yield Episode(
            f"{name} from step {rows.start}", tree, actions[rows], rewards[rows], terminations[rows], cut, notes
        )
        notes = {}
