"""What observations and actions look like outside of a policy: the entries of their spaces, in the order of the columns of a row.

All arithmetic is torch's, so an array of an environment, a tensor and the graph of an exported file go the same way. The layout of rows is that of
`rlkit2.data.spaces`: entry by entry, numbers raveled, choices one-hot, and of a stack of frames every entry's frames side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlkit2.errors import ConfigError, first_line

Bounds = tuple[float | None, ...]


@dataclass(frozen=True)
class Entry:
    """One elementary part of an observation or action.

    Attributes:
        path: the keys (Dict) and positions (Tuple) that lead to it; empty where the space is elementary.
        shape: of one value, as the environment has it.
        dtype: of one value, by its name in numpy.
        low, high: bounds of its numbers in C order, or one pair for all; None where a number has none.
        choices: its numbers are choices, each of them as many one-hot columns of a row as lie between its bounds (observations only).
    """

    path: tuple[str | int, ...] = ()
    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    low: Bounds = (None,)
    high: Bounds = (None,)
    choices: bool = False

    @property
    def name(self) -> str:
        """The path as text: `desired_goal/microwave`; "" where there is none."""
        return "/".join(map(str, self.path))

    @property
    def numbers(self) -> int:
        """How many numbers one value has."""
        return math.prod(self.shape)

    @cached_property
    def bounds(self) -> tuple[Bounds, Bounds]:
        """Of every number."""
        low, high = (bound * self.numbers if len(bound) == 1 else bound for bound in (self.low, self.high))
        return low, high

    @cached_property
    def places(self) -> tuple[list[int], list[int]]:
        """Of choices: which of them each column of a row belongs to, and the value it stands for."""
        of = [(which, value) for which, ends in enumerate(zip(*self.bounds, strict=True)) for value in _between(*ends)]
        return [which for which, _ in of], [value for _, value in of]

    @property
    def columns(self) -> int:
        """Columns of a row that it fills."""
        return len(self.places[0]) if self.choices else self.numbers

    @cached_property
    def limits(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest values, `[numbers]` float64; infinite where a number has no bound."""
        low, high = (
            torch.tensor([end if value is None else value for value in bound], dtype=torch.float64)
            for bound, end in zip(self.bounds, (-math.inf, math.inf), strict=True)
        )
        return low, high

    @cached_property
    def bounded(self) -> bool:
        """Whether any number has a bound."""
        return any(bound is not None for bound in (*self.low, *self.high))

    def row(self, values: Tensor) -> Tensor:
        """Values `[*lead, *shape]` as columns `[*lead, columns]`."""
        lead = values.shape[: values.ndim - len(self.shape)]
        flat = values.reshape(*lead, self.numbers)
        if not self.choices:
            return flat
        which, stands_for = (torch.tensor(found, device=flat.device) for found in self.places)
        return (flat.to(torch.int64).index_select(-1, which) == stands_for).to(torch.float32)

    def array(self, value: Tensor) -> Any:
        """A value as an array of its type; a whole number without axes as a number of numpy's, which also serves as a key."""
        found = value.cpu().numpy().astype(self.dtype, copy=False)
        return found[()] if found.dtype.kind in "iu" else found

    def read(self, value: Any, frames: int = 0, most: int = 1) -> Tensor:
        """A value as the environment gives it, `shape`, or a batch of them, `[B, *shape]`, as a tensor.

        Args:
            frames: if above 0, every value is a stack of so many, `[frames, *shape]`.
            most: axes that may stand before it.

        Raises:
            ConfigError: another shape or type, a number that is not finite, or a choice outside of its space.
        """
        what = f"entry {self.name!r} of the observation" if self.path else "the observation"
        try:
            found = as_tensor(value)
        except ConfigError as error:
            raise ConfigError(f"{what} is {error}") from error
        shape = (frames, *self.shape) if frames else self.shape
        extra = found.ndim - len(shape)
        if not 0 <= extra <= most or tuple(found.shape[extra:]) != shape:
            text = ", ".join(map(str, shape))
            batch = f"[B, {text}]" if shape else "[B]"
            raise ConfigError(f"{what} has shape {list(found.shape)}; this policy takes [{text}] or a batch {batch}")
        if (self.choices or self.dtype == "uint8") and found.is_floating_point():
            meaning = "choices as whole numbers" if self.choices else "bytes, 0 to 255"
            raise ConfigError(f"{what} is of type {found.dtype}; this policy takes {meaning}".replace("torch.", ""))
        if self.choices:
            low, high = self.limits
            flat = found.reshape(-1, self.numbers).cpu()
            if bool(((flat < low) | (flat > high)).any()):
                raise ConfigError(f"{what} is {found.tolist()}, which lies outside of its space")
        elif found.is_floating_point() and not bool(found.isfinite().all()):
            raise ConfigError(f"{what} holds a number that is not finite")
        return found


@dataclass(frozen=True)
class Interface:
    """The spaces a policy was trained for.

    Attributes:
        observation: the entries of one observation of the environment (one frame, where the policy sees a stack), in the order of a row's columns.
        action: the entries of an action, in the order of its columns.
        frames: how many observations the policy sees at once.
    """

    observation: tuple[Entry, ...]
    action: tuple[Entry, ...]
    frames: int = 1

    @cached_property
    def frame_size(self) -> int:
        """Columns of one frame."""
        return sum(entry.columns for entry in self.observation)

    @property
    def size(self) -> int:
        """Columns of the rows that the policy sees."""
        return self.frames * self.frame_size

    @cached_property
    def row_dtype(self) -> torch.dtype:
        """Bytes where every entry is bytes, as images are kept, else float32."""
        return torch.uint8 if all(entry.dtype == "uint8" for entry in self.observation) else torch.float32

    def read(self, observation: Any, *, frames: bool = False, most: int = 1) -> list[Tensor]:
        """The entries of an observation, or of a batch of them, as tensors; entries that the policy does not use are left alone.

        Args:
            frames: it is a stack.
            most: axes that may stand before it.

        Raises:
            ConfigError: an entry is missing or does not fit (see `Entry.read`), or entries differ in their batch.
        """
        stack = self.frames if frames else 0
        values = [entry.read(pick(observation, entry), stack, most) for entry in self.observation]
        leads = {
            tuple(value.shape[: value.ndim - len(entry.shape)])
            for value, entry in zip(values, self.observation, strict=True)
        }
        if len(leads) > 1:
            raise ConfigError(f"the entries of the observation are batches of different sizes: {sorted(leads)}")
        return values

    def frame(self, values: Sequence[Tensor]) -> Tensor:
        """One frame `[*lead, frame_size]` from the values of its entries, `[*lead, *shape]` each."""
        rows = [entry.row(value).to(self.row_dtype) for entry, value in zip(self.observation, values, strict=True)]
        return rows[0] if len(rows) == 1 else torch.cat(rows, -1)

    def rows(self, history: Tensor) -> Tensor:
        """What the policy sees, `[*lead, size]`, of the last frames, `[*lead, frames, frame_size]`, oldest first."""
        if len(self.observation) == 1:
            return history.flatten(-2)
        widths = [entry.columns for entry in self.observation]
        return torch.cat([part.flatten(-2) for part in history.split_with_sizes(widths, -1)], -1)

    def advance(self, history: Tensor, frame: Tensor, start: Tensor) -> Tensor:
        """The last frames `[*lead, frames, frame_size]` after `frame [*lead, frame_size]`.

        Where an episode starts (`start [*lead]`, bool) its first frame stands for those before it, as in `gymnasium.wrappers.FrameStackObservation`.
        """
        newest = frame.unsqueeze(-2)
        moved = torch.cat([history[..., 1:, :], newest], -2)
        return torch.where(start[..., None, None], newest.expand_as(moved), moved)

    def values(self, actions: Tensor) -> list[Tensor]:
        """The entries `[*lead, *shape]` of a policy's actions (`[*lead, columns]`, one choice `[*lead]`), within their bounds to the last bit."""
        one = self.action[0]
        if not one.path and not one.shape and not actions.is_floating_point():  # one choice has no axis
            return [_within(one, actions)]
        parts = actions.split_with_sizes([entry.numbers for entry in self.action], -1)
        return [
            _within(entry, part).reshape((*actions.shape[:-1], *entry.shape))
            for entry, part in zip(self.action, parts, strict=True)
        ]

    def to_json(self) -> dict[str, Any]:
        """As JSON values; `from_json` reverses it."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Interface:
        """Read what `to_json` gave; anything may be raised where it is damaged."""

        def read(entry: Mapping[str, Any]) -> Entry:
            found: dict[str, Any] = {
                key: tuple(part) if isinstance(part, list) else part for key, part in entry.items()
            }
            return Entry(**found)

        observation, action = (tuple(map(read, values[name])) for name in ("observation", "action"))
        return cls(observation, action, int(values["frames"]))


def plain_interface(settings: Mapping[str, Any]) -> Interface:
    """What the settings of an actor say: observations are rows, or one image in its own shape, and actions have no bounds but those of the policy."""
    size, images = settings["observation_size"], (settings.get("encoder") or {}).get("images", ())
    shapes = [tuple(shape) for _, shape in images]
    image = len(shapes) == 1 and math.prod(shapes[0]) == size
    observation = Entry(shape=shapes[0], dtype="uint8") if image else Entry(shape=(size,))
    if settings.get("choices"):
        action = Entry(shape=(len(settings["choices"]),), dtype="int64")
    elif settings["head"] in ("categorical", "greedy"):
        action = Entry(dtype="int64")
    else:
        action = Entry(shape=(settings["action_size"],))
    return Interface((observation,), (action,))


def as_tensor(value: Any) -> Tensor:
    """An array, a number or a list as a tensor, with the memory of the array.

    Raises:
        ConfigError: it does not consist of numbers.
    """
    if isinstance(value, Tensor):
        return value
    try:
        array = np.asarray(value, order="C")
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"not an array of numbers ({first_line(error)})") from error


def pick(tree: Any, entry: Entry) -> Any:
    """The part of an observation that belongs to an entry.

    Raises:
        ConfigError: there is none.
    """
    for depth, key in enumerate(entry.path):
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError) as error:
            there = f"it has {', '.join(map(str, tree))}" if isinstance(tree, Mapping) else f"it is {_kind(tree)}"
            where = (
                f"entry {'/'.join(map(str, entry.path[:depth]))!r} of the observation" if depth else "the observation"
            )
            raise ConfigError(f"{where} has no entry {key!r}, which this policy reads; {there}") from error
    if isinstance(tree, Mapping | tuple) and not entry.path:
        keys = f" with entries {', '.join(map(str, tree))}" if isinstance(tree, Mapping) else ""
        raise ConfigError(f"the observation is {_kind(tree)}{keys}; this policy takes an array {list(entry.shape)}")
    return tree


def nested(entries: Sequence[Entry], values: Sequence[Any]) -> Any:
    """The values of entries under their paths, in dicts and tuples."""
    if not entries[0].path:
        return values[0]
    below: dict[str | int, tuple[list[Entry], list[Any]]] = {}
    for entry, value in zip(entries, values, strict=True):
        inside = below.setdefault(entry.path[0], ([], []))
        inside[0].append(Entry(entry.path[1:]))
        inside[1].append(value)
    found = {key: nested(*inside) for key, inside in below.items()}
    return tuple(found.values()) if isinstance(entries[0].path[0], int) else found


def _between(low: float | None, high: float | None) -> range:
    """The values of a choice."""
    assert low is not None
    assert high is not None
    return range(int(low), int(high) + 1)


def _kind(value: Any) -> str:
    """What a thing is, in words for messages."""
    return f"an array {list(value.shape)}" if hasattr(value, "shape") else f"a {type(value).__name__}"


def _within(entry: Entry, actions: Tensor) -> Tensor:
    """Actions `[..., numbers]` clipped to the entry's bounds, in its type where torch has that."""
    dtype = getattr(torch, entry.dtype, torch.int64)
    if entry.bounded and actions.is_floating_point():  # choices lie within already
        exact = actions.to(dtype if dtype.is_floating_point else torch.float64)
        low, high = (limit.to(exact) for limit in entry.limits)
        actions = torch.minimum(torch.maximum(exact, low), high)
    return actions.to(dtype)
