"""From the spaces of a dataset or an environment to fixed-size rows, in one stated order.

Order: a Dict is read key by key in the order of the space (Gymnasium sorts plain mappings alphabetically), a Tuple by position, nested spaces
depth first. Goal dictionaries (`observation`, `achieved_goal`, `desired_goal`) give `observation` then `desired_goal` unless
`observation_keys` says otherwise. Box entries are raveled in C order; Discrete and MultiDiscrete observations become one-hot; MultiBinary stays 0/1.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor

from rlkit2.errors import ConfigError, UnsupportedSpaceError

GOAL_KEYS = frozenset({"observation", "achieved_goal", "desired_goal"})
Path = tuple[str | int, ...]
ROUNDING = 1e-4  # of the action range: a smaller excess over the bounds is rounding


class DatasetWarning(UserWarning):
    """Something about a dataset was handled in a way its owner should know."""


@dataclass(frozen=True)
class Leaf:
    """One elementary space inside an observation or action space and the columns it fills."""

    path: Path
    space: spaces.Space[Any]
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The path as text, e.g. `desired_goal/microwave`."""
        return "/".join(map(str, self.path))

    def pick(self, tree: Any) -> Any:
        """The part of a (possibly nested) batch that belongs to this leaf."""
        for key in self.path:
            tree = tree[key]
        return tree

    def columns(self, values: Any) -> NDArray[Any]:
        """Values `[n, ...]` of this leaf as `[n, stop - start]`."""
        array = np.asarray(values)
        if isinstance(self.space, spaces.Discrete):
            return _one_hot(array.reshape(-1, 1) - self.space.start, np.array([self.space.n]))
        if isinstance(self.space, spaces.MultiDiscrete):
            nvec = self.space.nvec.reshape(-1)
            return _one_hot(array.reshape(len(array), -1) - self.space.start.reshape(-1), nvec)
        return array.reshape(len(array), self.stop - self.start)

    def values(self, columns: NDArray[Any]) -> NDArray[Any]:
        """The inverse of `columns`: values `[n, *shape]` of this leaf, in the type of `stored_space`."""
        space = self.space
        if isinstance(space, spaces.Discrete):
            return np.asarray(columns.argmax(axis=1) + space.start).astype(space.dtype)
        if isinstance(space, spaces.MultiDiscrete):
            ends = np.cumsum(space.nvec.reshape(-1))
            chosen = np.stack([part.argmax(axis=1) for part in np.split(columns, ends[:-1], axis=1)], axis=1)
            return np.asarray(chosen.reshape(-1, *space.shape) + space.start).astype(space.dtype)
        return columns.reshape(-1, *(space.shape or ())).astype(stored_space(space).dtype)


def tree_of(leaves: Sequence[Leaf], arrays: Sequence[Any]) -> Any:
    """Nest the arrays of leaves under their paths, as the flatteners expect them."""
    root: dict[Any, Any] = {}
    for leaf, array in zip(leaves, arrays, strict=True):
        if not leaf.path:
            return array
        node = root
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = array
    return root


def stored_space(space: spaces.Space[Any]) -> spaces.Space[Any]:
    """An elementary space as rows hold its values: float64 boxes become float32."""
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating) and space.dtype != np.float32:
        with np.errstate(over="ignore"):
            return spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32)
    return space


def _rebuild(space: spaces.Space[Any], path: Path, parts: Mapping[Path, Any], nodes: tuple[Any, Any]) -> Any:
    """The tree of `space` with `parts` at its leaves; what has no part is left out (None where nothing is left).

    `nodes` make an inner node from a dict and from a tuple.
    """
    if path in parts:
        return parts[path]
    if isinstance(space, spaces.Dict):
        below = {key: _rebuild(value, (*path, key), parts, nodes) for key, value in space.spaces.items()}
        kept = {key: value for key, value in below.items() if value is not None}
        return nodes[0](kept) if kept else None
    if isinstance(space, spaces.Tuple):
        return nodes[1](tuple(_rebuild(value, (*path, i), parts, nodes) for i, value in enumerate(space.spaces)))
    return None


def _one_hot(indices: NDArray[Any], sizes: NDArray[Any]) -> NDArray[np.float32]:
    indices = indices.astype(np.int64)
    if (indices < 0).any() or (indices >= sizes).any():
        raise UnsupportedSpaceError(
            f"a discrete value lies outside its space of size {sizes.tolist()}; the dataset's metadata and data disagree"
        )
    out = np.zeros((len(indices), int(sizes.sum())), np.float32)
    np.put_along_axis(out, indices + np.concatenate([[0], np.cumsum(sizes)[:-1]]), 1.0, axis=1)
    return out


def _width(space: spaces.Space[Any]) -> int:
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return int(space.nvec.sum())
    return int(np.prod(space.shape or (1,)))


def _walk(space: spaces.Space[Any], path: Path) -> Iterator[tuple[Path, spaces.Space[Any]]]:
    if isinstance(space, spaces.Dict):
        for key, value in space.spaces.items():
            if isinstance(value, spaces.Text):
                warnings.warn(
                    f"text entry {'/'.join(map(str, (*path, key)))!r} is left out of the observations",
                    DatasetWarning,
                    stacklevel=2,
                )
                continue
            yield from _walk(value, (*path, key))
    elif isinstance(space, spaces.Tuple):
        for position, value in enumerate(space.spaces):
            yield from _walk(value, (*path, position))
    elif isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        yield path, space
    else:
        where = f" at {'/'.join(map(str, path))!r}" if path else ""
        raise UnsupportedSpaceError(
            f"{type(space).__name__} space{where} has no fixed-size rows; "
            "supported: Box, Discrete, MultiDiscrete, MultiBinary, Dict and Tuple of them"
        )


def _choose(space: spaces.Space[Any], keys: Sequence[str] | None) -> list[tuple[Path, spaces.Space[Any]]]:
    if keys is None and isinstance(space, spaces.Dict) and set(space.spaces) >= GOAL_KEYS:
        keys = ["observation", "desired_goal", *(key for key in space.spaces if key not in GOAL_KEYS)]
    if keys is None:
        return list(_walk(space, ()))
    if not isinstance(space, spaces.Dict):
        raise ConfigError(f"observation_keys={list(keys)} needs a Dict observation space, not {type(space).__name__}")
    if len(set(keys)) != len(keys) or not keys:
        raise ConfigError(f"observation_keys={list(keys)} must name each key once and at least one")
    chosen: list[tuple[Path, spaces.Space[Any]]] = []
    for key in keys:
        part: spaces.Space[Any] = space
        for step in key.split("/"):
            if not isinstance(part, spaces.Dict) or step not in part.spaces:
                raise ConfigError(
                    f"observation key {key!r} is not in the observation space; keys: {', '.join(space.spaces)}"
                )
            part = part.spaces[step]
        chosen.extend(_walk(part, tuple(key.split("/"))))
    return chosen


class SpaceFlattener:
    """Flattens batches of raw observations into rows; the same object serves datasets and environments.

    `size`: columns of a row. `dtype`: uint8 when every leaf is a uint8 Box, else float32. `shape`: `(size,)`, or the image shape for a single
    uint8 Box of two or more dimensions, which keeps it. `ranges`: columns `(start, stop)` of every key. `keys`: the keys used, None unless a Dict.
    """

    def __init__(self, space: spaces.Space[Any], observation_keys: Sequence[str] | None = None) -> None:
        self.space = space
        self.leaves: list[Leaf] = []
        column = 0
        for path, leaf in _choose(space, observation_keys):
            self.leaves.append(Leaf(path, leaf, column, column + _width(leaf)))
            column += _width(leaf)
        if not column:
            raise UnsupportedSpaceError(f"nothing is left of the observation space {space} to train on")
        self.size = column
        all_bytes = all(isinstance(leaf.space, spaces.Box) and leaf.space.dtype == np.uint8 for leaf in self.leaves)
        self.dtype = np.dtype(np.uint8 if all_bytes else np.float32)
        single = self.leaves[0].space if len(self.leaves) == 1 and not self.leaves[0].path else None
        image = all_bytes and single is not None and len(single.shape or ()) > 1
        self.shape: tuple[int, ...] = tuple(single.shape or ()) if image and single is not None else (self.size,)
        self.keys: tuple[str, ...] | None = (
            tuple(dict.fromkeys(str(leaf.path[0]) for leaf in self.leaves)) if isinstance(space, spaces.Dict) else None
        )
        if observation_keys is not None:
            self.keys = tuple(observation_keys)

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """Columns `(start, stop)` of every leaf and of every enclosing key."""
        found: dict[str, tuple[int, int]] = {}
        for leaf in self.leaves:
            for depth in range(1, len(leaf.path) + 1):
                name = "/".join(map(str, leaf.path[:depth]))
                start, stop = found.get(name, (leaf.start, leaf.stop))
                found[name] = (min(start, leaf.start), max(stop, leaf.stop))
        return found

    def flatten(self, observations: Any) -> NDArray[Any]:
        """A batch of raw observations (arrays, dicts or tuples with a leading axis n) as rows `[n, *shape]`; a float64 leaf may stay float64."""
        if len(self.leaves) == 1:
            rows = self.leaves[0].columns(self.leaves[0].pick(observations))
            return rows.reshape(len(rows), *self.shape) if self.dtype == np.uint8 else rows
        parts = [leaf.columns(leaf.pick(observations)) for leaf in self.leaves]
        out = np.empty((len(parts[0]), self.size), self.dtype)
        for leaf, part in zip(self.leaves, parts, strict=True):
            out[:, leaf.start : leaf.stop] = part
        return out

    def joined(self, frames: Tensor) -> Tensor:
        """Rows `[..., *shape]` of a stack from the flattened observations in it, `[..., n, size / n]`, oldest first."""
        n = frames.shape[-2]
        parts = [frames[..., leaf.start // n : leaf.stop // n].flatten(-2) for leaf in self.leaves]
        return torch.cat(parts, -1).view(*frames.shape[:-2], *self.shape)

    def parted(self, rows: NDArray[Any], count: int) -> NDArray[Any]:
        """The inverse of `joined`: the `count` observations in each of the rows `[..., *shape]`, `[..., count, size / count]`."""
        columns = rows.reshape(*rows.shape[: rows.ndim - len(self.shape)], self.size)
        parts = [columns[..., leaf.start : leaf.stop].reshape(*columns.shape[:-1], count, -1) for leaf in self.leaves]
        return np.concatenate(parts, -1)

    @property
    def kept_space(self) -> spaces.Space[Any]:
        """The part of the observation space that rows hold, which `unflatten` gives values of."""
        parts = {leaf.path: stored_space(leaf.space) for leaf in self.leaves}
        kept: spaces.Space[Any] = _rebuild(self.space, (), parts, (spaces.Dict, spaces.Tuple))
        return kept

    def unflatten(self, rows: NDArray[Any]) -> Any:
        """The inverse of `flatten`: rows `[n, *shape]` as a batch of `kept_space` (arrays, dicts or tuples with a leading axis n)."""
        columns = rows.reshape(len(rows), self.size)
        parts = {leaf.path: leaf.values(columns[:, leaf.start : leaf.stop]) for leaf in self.leaves}
        return _rebuild(self.space, (), parts, (dict, tuple))


def flattener(space: spaces.Space[Any], observation_keys: Sequence[str] | None = None) -> SpaceFlattener:
    """The `SpaceFlattener` of an observation space.

    Raises `UnsupportedSpaceError` naming a space without fixed-size rows, `ConfigError` for unknown `observation_keys`.
    """
    return SpaceFlattener(space, observation_keys)


def stacked_space(space: spaces.Space[Any], count: int) -> spaces.Space[Any]:
    """The space of the last `count` observations, oldest first, as `gymnasium.wrappers.FrameStackObservation` has it.

    Raises `UnsupportedSpaceError` for a space whose stack has other columns than the observations have.
    """
    stacked = batch_space(space, count)
    if flattener(stacked).size != count * flattener(space).size:
        raise UnsupportedSpaceError(
            f"observations in {space} cannot be stacked: MultiDiscrete entries lose their choices"
        )
    return stacked


@dataclass(frozen=True)
class ActionLayout:
    """How actions are stored: float32 columns for Box, int64 values (never shifted) for the discrete families."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    leaves: tuple[Leaf, ...]

    @property
    def choices(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Sizes and first values of the choices where an action makes several (or one, `[n, 1]`); None for others.

        Raises `UnsupportedSpaceError` where whole numbers within bounds stand beside choices.
        """
        if self.dtype != np.int64 or not self.shape:
            return None
        whole = {isinstance(leaf.space, spaces.Box) for leaf in self.leaves}
        if whole == {True}:
            return None
        if len(whole) > 1:
            raise UnsupportedSpaceError(
                "the action space mixes choices with whole numbers of a Box, which no policy puts out together; "
                "give all of them as choices, for example --action-space 'multidiscrete(3,11)'"
            )
        low, high = _bounds([leaf.space for leaf in self.leaves])
        return tuple((high - low + 1).astype(int).tolist()), tuple(low.astype(int).tolist())

    def flatten(self, actions: Any) -> NDArray[Any]:
        """A batch of raw actions as `[n, *shape]`."""
        arrays = [np.asarray(leaf.pick(actions)) for leaf in self.leaves]
        parts = [array.reshape(len(array), -1) for array in arrays]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        if joined.shape[1] != int(np.prod(self.shape or (1,))):
            raise UnsupportedSpaceError(
                f"actions have {joined.shape[1]} columns where the action space has {int(np.prod(self.shape or (1,)))}"
            )
        return joined.reshape(len(joined), *self.shape)

    def kept_space(self, space: spaces.Space[Any]) -> spaces.Space[Any]:
        """The action space `space` of this layout in the types actions are stored in."""
        kept: spaces.Space[Any] = _rebuild(
            space, (), {leaf.path: stored_space(leaf.space) for leaf in self.leaves}, (spaces.Dict, spaces.Tuple)
        )
        return kept

    def unflatten(self, space: spaces.Space[Any], actions: NDArray[Any]) -> Any:
        """The inverse of `flatten`: stored actions `[n, *shape]` as a batch of `kept_space(space)`."""
        columns = actions.reshape(len(actions), -1)
        parts = {
            leaf.path: columns[:, leaf.start : leaf.stop]
            .reshape(-1, *(leaf.space.shape or ()))
            .astype(stored_space(leaf.space).dtype)
            for leaf in self.leaves
        }
        return _rebuild(space, (), parts, (dict, tuple))


def action_layout(space: spaces.Space[Any]) -> ActionLayout:
    """The `ActionLayout` of an action space; `UnsupportedSpaceError` for mixtures of continuous and discrete parts."""
    leaves: list[Leaf] = []
    for path, leaf in _walk(space, ()):
        start = leaves[-1].stop if leaves else 0
        leaves.append(Leaf(path, leaf, start, start + int(np.prod(leaf.shape or (1,)))))
    if not leaves:
        raise UnsupportedSpaceError(f"action space {space} has no entries")
    continuous = {
        isinstance(leaf.space, spaces.Box) and np.issubdtype(leaf.space.dtype, np.floating) for leaf in leaves
    }
    if len(continuous) > 1:
        raise UnsupportedSpaceError(f"action space {space} mixes continuous and discrete parts")
    dtype = np.dtype(np.float32 if continuous == {True} else np.int64)
    shape = () if isinstance(space, spaces.Discrete) else (leaves[-1].stop,)
    return ActionLayout(shape, dtype, tuple(leaves))


def action_bounds(space: spaces.Space[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Lowest and highest value of every action column, in the type the actions are stored in where that is float32."""
    return _bounds([leaf.space for leaf in action_layout(space).leaves])


def observation_bounds(flat: SpaceFlattener) -> tuple[NDArray[Any], NDArray[Any]]:
    """Lowest and highest value of every observation column; one-hot columns lie in 0..1."""
    one_hot = (spaces.Discrete, spaces.MultiDiscrete)
    return _bounds(
        [
            spaces.MultiBinary(_width(leaf.space)) if isinstance(leaf.space, one_hot) else leaf.space
            for leaf in flat.leaves
        ]
    )


def _bounds(leaves: Sequence[spaces.Space[Any]]) -> tuple[NDArray[Any], NDArray[Any]]:
    low: list[NDArray[Any]] = []
    high: list[NDArray[Any]] = []
    for leaf in leaves:
        if isinstance(leaf, spaces.Box):
            kind = np.float32 if leaf.dtype.kind == "f" else np.float64
            pair = leaf.low.ravel().astype(kind), leaf.high.ravel().astype(kind)
        elif isinstance(leaf, spaces.Discrete | spaces.MultiDiscrete):
            start = np.ravel(leaf.start)
            pair = start, start + np.ravel(leaf.n if isinstance(leaf, spaces.Discrete) else leaf.nvec) - 1
        else:
            count = int(np.prod(leaf.shape or (1,)))
            pair = np.zeros(count), np.ones(count)
        low.append(pair[0])
        high.append(pair[1])
    return np.concatenate(low), np.concatenate(high)


def outside(columns: NDArray[Any], low: NDArray[Any], high: NDArray[Any]) -> NDArray[np.bool_]:
    """Which values `[n, columns]` lie outside the bounds by more than rounding."""
    width = high - low
    slack = ROUNDING * np.where(np.isfinite(width), width, 1.0) if columns.dtype.kind == "f" else 0
    return np.asarray((columns < low - slack) | (columns > high + slack))
