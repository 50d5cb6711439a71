"""Spaces from data that do not tell them, and spaces from text: what the values allow, said with a notice, and the way to say otherwise."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from rlkit2.errors import ConfigError, DatasetError

Path = tuple[str | int, ...]
MARGIN = 0.05  # of a column's spread, beyond the smallest and the largest action seen
MOST_CHOICES = 1024  # more whole numbers than that in a column are not choices
Array = NDArray[Any]


@dataclass
class Columns:
    """What is known of an array `[N, *shape]` after its blocks have passed: bounds per column, and which whole numbers occur."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    low: Array
    high: Array
    whole: NDArray[np.bool_]
    values: list[set[int]]

    @classmethod
    def of(cls, array: Array, name: str = "values") -> Columns:
        """The columns of a first block `[n, *shape]`; `DatasetError` where there are none."""
        width = int(np.prod(array.shape[1:]))
        if not width:
            raise DatasetError(f"{name} of shape {array.shape} have no columns")
        bounds = np.full(width, np.inf), np.full(width, -np.inf)
        found = cls(name, array.shape[1:], array.dtype, *bounds, np.ones(width, bool), [set() for _ in range(width)])
        found.add(array)
        return found

    def add(self, array: Array) -> None:
        """Take in one block `[n, *shape]`; `DatasetError` where its values are not numbers, or of another shape."""
        if array.dtype.kind not in "fiub":
            raise DatasetError(
                f"{self.name} of dtype {array.dtype} are not numbers; map them to numbers or leave them out"
            )
        if array.shape[1:] != self.shape:
            raise DatasetError(f"{self.name} have shape {self.shape} in one episode and {array.shape[1:]} in another")
        self.dtype = np.promote_types(self.dtype, array.dtype)
        rows = array.reshape(len(array), -1)
        seen = np.where(np.isfinite(rows), rows, np.nan) if rows.dtype.kind == "f" else rows
        self.low = np.fmin(self.low, np.fmin.reduce(seen, axis=0))
        self.high = np.fmax(self.high, np.fmax.reduce(seen, axis=0))
        with np.errstate(invalid="ignore"):
            if rows.dtype.kind == "f":
                self.whole &= (rows == np.rint(rows)).all(axis=0) & (np.abs(rows) < 2**53).all(axis=0)
        if self.shape[1:]:
            return  # images: no choices are looked for
        for column in np.flatnonzero(self.whole):
            if len(self.values[column]) <= MOST_CHOICES:
                self.values[column].update(np.unique(rows[:, column]).astype(np.int64).tolist())

    @property
    def consecutive(self) -> bool:
        """Whether every column takes each whole number between its smallest and its largest, and two at least."""
        choices = self.high - self.low + 1
        return bool(
            self.whole.all() and all(2 <= len(seen) == count for seen, count in zip(self.values, choices, strict=True))
        )

    @property
    def single(self) -> bool:
        """Whether it is one column, `[N]` or `[N, 1]`."""
        return len(self.low) == 1


Request = Callable[[Columns], spaces.Space[Any]]
SpaceLike: TypeAlias = spaces.Space[Any] | str
"""A space, or one in words (`parse_space`) that the columns of the data complete."""


def infer_spaces(
    episodes: Iterable[tuple[Any, Any]], observations: Request | None = None, actions: Request | None = None
) -> tuple[spaces.Space[Any], spaces.Space[Any]]:
    """Observation and action space of a stream of (observations, actions), each an array or a tree of dicts and tuples of arrays.

    `observations`, `actions`: what the spaces were asked to be (default: what the values allow).
    """
    seen: dict[str, dict[Path, Columns]] = {"observations": {}, "actions": {}}
    for pair in episodes:
        for name, tree in zip(seen, pair, strict=True):
            for path, array in _leaves(tree, ()):
                named = f"{name}{'/' if path else ''}{'/'.join(map(str, path))}"
                if not array.ndim:
                    raise DatasetError(f"{named} are a single value in one episode, not one per step")
                if not len(array):
                    continue
                if path not in seen[name]:
                    seen[name][path] = Columns.of(array, named)
                else:
                    seen[name][path].add(array)
    if not seen["actions"] or not seen["observations"]:
        raise DatasetError("there is no usable episode; a dataset needs at least one transition")
    return (
        _nest(seen["observations"], observations or observation_space),
        _nest(seen["actions"], actions or action_space),
    )


def _leaves(tree: Any, path: Path) -> Iterator[tuple[Path, Array]]:
    if isinstance(tree, Mapping | tuple):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _leaves(value, (*path, key))
    else:
        yield path, np.asarray(tree)


def _nest(found: Mapping[Path, Columns], make: Request) -> spaces.Space[Any]:
    if () in found:
        return make(found[()])
    below: dict[str | int, dict[Path, Columns]] = {}
    for path, columns in found.items():
        below.setdefault(path[0], {})[path[1:]] = columns
    parts = {key: _nest(value, make) for key, value in below.items()}
    if all(isinstance(key, int) for key in parts):
        return spaces.Tuple(list(parts.values()))
    return spaces.Dict({str(key): value for key, value in parts.items()})


def observation_space(seen: Columns) -> spaces.Box:
    """Unbounded columns, or bytes as they are."""
    if seen.dtype == np.uint8:
        return spaces.Box(0, 255, seen.shape or (1,), np.uint8)
    return spaces.Box(-np.inf, np.inf, seen.shape or (1,), np.float32)


def action_space(seen: Columns) -> spaces.Space[Any]:
    """The space that the actions of a dataset allow.

    Whole numbers are choices: `Discrete` (one column), `MultiBinary` (several of bool) or `MultiDiscrete`, from the smallest to the largest seen;
    stored as floats only where each number between occurs. Other numbers are continuous: columns within [-1, 1] get these bounds (as in D4RL),
    the others their smallest and largest value with a margin of 5 % of the spread that does not cross zero.
    """
    if seen.dtype.kind == "b" and not seen.single:
        return spaces.MultiBinary(seen.shape[0] if len(seen.shape) == 1 else seen.shape)
    if seen.dtype.kind in "iub" or seen.consecutive:
        return choices(seen)
    return continuous(seen)


def choices(seen: Columns) -> spaces.Space[Any]:
    """`Discrete` or `MultiDiscrete` from the smallest to the largest whole number of each column."""
    if not seen.whole.all():
        raise DatasetError(
            "actions that are not whole numbers cannot be discrete; use --action-space continuous, or round them"
        )
    low, counts = seen.low.astype(np.int64), (seen.high - seen.low).astype(np.int64) + 1
    if counts.max() > MOST_CHOICES:
        raise DatasetError(
            f"actions are whole numbers from {int(seen.low.min())} to {int(seen.high.max())}, too many for choices; "
            "give the space, for example --action-space discrete(5000) or --action-space 'box(0,5000)'"
        )
    if seen.single:
        return spaces.Discrete(int(counts[0]), start=int(low[0]))
    return spaces.MultiDiscrete(counts.reshape(seen.shape), start=low.reshape(seen.shape))


def continuous(seen: Columns) -> spaces.Box:
    """A Box around the values of each column."""
    known = np.isfinite(seen.low) & np.isfinite(seen.high)
    if not known.all():
        raise DatasetError(f"action column {int(np.flatnonzero(~known)[0])} has no finite value")
    margin = MARGIN * np.where(seen.high > seen.low, seen.high - seen.low, np.maximum(np.abs(seen.high), 1.0))
    low, high = _outwards(seen.low, seen.low - margin, -np.inf), _outwards(seen.high, seen.high + margin, np.inf)
    low, high = np.where(seen.low >= 0, np.maximum(low, 0), low), np.where(seen.high <= 0, np.minimum(high, 0), high)
    unit = (seen.low >= -1) & (seen.high <= 1)
    shape = seen.shape or (1,)
    low, high = (np.where(unit, bound, found).astype(np.float32) for bound, found in ((-1, low), (1, high)))
    return spaces.Box(low.reshape(shape), high.reshape(shape), dtype=np.float32)


def _outwards(value: Array, wanted: Array, end: float) -> Array:
    """`wanted` in float32, at least one float32 step beyond `value` in the direction of `end`."""
    step = np.nextafter(value.astype(np.float32), np.float32(end))
    return np.asarray((np.minimum if end < 0 else np.maximum)(wanted.astype(np.float32), step))


def parse_space(text: str) -> Request:
    """A space in words, to be held against the columns of the data, which give the shape.

    `box(-2,2)`, `box([-1,0],[1,5])`, `discrete(4)`, `discrete(3,-1)` (three choices from -1), `multidiscrete(3,2)`, `multibinary(2)`; and
    `discrete` or `continuous` alone, with bounds from the data.

    Raises:
        ConfigError: it is none of these.
    """
    match = re.fullmatch(r"\s*([a-z]+)\s*(?:\((.*)\))?\s*", text.lower())
    name, given = (match[1], match[2]) if match else ("", None)
    if given is None and name in ("discrete", "continuous"):
        return choices if name == "discrete" else continuous
    try:
        numbers = [_number(part) for part in _parts(given or "")]
        if name == "box" and len(numbers) == 2:
            return lambda seen: _box(text, numbers[0], numbers[1], seen.shape or (1,))
        if name == "discrete" and len(numbers) in (1, 2):
            fixed: spaces.Space[Any] = spaces.Discrete(int(numbers[0]), start=int(numbers[1]) if numbers[1:] else 0)
        elif name == "multidiscrete" and numbers:
            fixed = spaces.MultiDiscrete([int(number) for number in numbers])
        elif name == "multibinary" and len(numbers) == 1:
            fixed = spaces.MultiBinary(int(numbers[0]))
        else:
            raise ValueError
    except (ValueError, SyntaxError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"{text!r} is not a space; write for example box(-2,2), box([-1,0],[1,5]), discrete(4), discrete(3,-1), "
            "multidiscrete(3,2), multibinary(2), or discrete or continuous alone"
        ) from error
    return lambda seen: fixed


def _parts(given: str) -> list[str]:
    return re.findall(r"\[[^\]]*\]|[^,\s]+", given)


def _number(text: str) -> Any:
    if text.strip("+-") in ("inf", "infinity"):
        return float(text)
    value = ast.literal_eval(text)
    np.asarray(value, np.float64)
    return value


def _box(text: str, low: Any, high: Any, shape: tuple[int, ...]) -> spaces.Box:
    try:
        bounds = [np.broadcast_to(np.asarray(bound, np.float32), shape).copy() for bound in (low, high)]
    except ValueError as error:
        raise ConfigError(f"{text} does not fit values of shape {shape}") from error
    if not (bounds[0] <= bounds[1]).all():
        raise ConfigError(f"{text} has a lower bound above the upper one")
    return spaces.Box(bounds[0], bounds[1], dtype=np.float32)
