"""Other rewards for a dataset: from an array, a batched function or a module, in memory or named by a file."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.reward_calls import RewardCall
from rlkit2.errors import ConfigError, RewardError, first_line
from rlkit2.user_code import import_place

# f(observations, actions, next_observations, terminations) -> rewards [n], or the rewards [N] themselves.
Reward: TypeAlias = Callable[..., Any] | ArrayLike | Tensor
CHUNK = 1 << 16


def reward_values(
    dataset: TransitionDataset,
    reward: Reward,
    *,
    infos: Mapping[str, Any] | None = None,
    chunk: int = CHUNK,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Rewards `[N]` float32 of every transition, for `dataset.with_rewards`.

    Args:
        dataset: the transitions.
        reward: an array `[N]`, or a function or module of observations `[n, obs]`, actions `[n, act]` or `[n]`, next observations
            `[n, obs]`, terminations `[n]` bool and infos, or some of them (see `RewardCall`), without gradients on `chunk` rows at a time.
        infos: what else came with each step, arrays `[N, ...]` by name (`read_infos`), for rewards that read them.
        chunk: rows per call.
        progress: called with (rows done, rows in all).

    Raises:
        RewardError: a function fails, or values do not have one finite number per transition; the message names the rows.
    """
    if not callable(reward):
        return _checked(reward, len(dataset), "the reward array", 0)
    call = RewardCall(f"reward {getattr(reward, '__name__', type(reward).__name__)}", reward, dataset.spec)
    out = torch.empty(len(dataset))
    for start in range(0, len(dataset), chunk):
        rows = torch.arange(start, min(start + chunk, len(dataset)))
        try:
            given = {name: values[rows] for name, values in (infos or {}).items()}
            out[rows] = _checked(call(dataset.gather(rows), given), len(rows), call.name, start)
        except RewardError as error:
            raise RewardError(f"rows {start}..{int(rows[-1])}: {error}") from error
        if progress is not None:
            progress(start + len(rows), len(dataset))
    return out


def _checked(values: Any, count: int, name: str, start: int) -> Tensor:
    try:
        tensor = (values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))).detach().cpu().float()
    except (TypeError, ValueError) as error:
        raise RewardError(f"{name} gives no numbers: {first_line(error)}") from error
    if tensor.shape != (count,):
        raise RewardError(
            f"{name} has shape {list(tensor.shape)} for {count} transitions; give [{count}], one number each"
        )
    bad = (~tensor.isfinite()).nonzero()
    if len(bad):
        raise RewardError(f"{name} is {float(tensor[bad[0]])} at row {start + int(bad[0])}; rewards must be finite")
    return tensor


def load_reward(text: str) -> tuple[Reward, dict[str, str]]:
    """The reward that a text names, and where it comes from (the text and the SHA-256 of the file).

    Args:
        text: `file.py:NAME` or `package.module:NAME`, a function, a module or a reward network (the file is run, the package imported), or a
            file of an array: `.npy`, `.npz` or `.safetensors` (its array `rewards`, or its only one).

    Raises:
        RewardError: no such file, function or array.
    """
    place, colon, function = text.rpartition(":")
    if colon and not place.endswith(".py") and not Path(text).exists() and re.fullmatch(r"[A-Za-z_][\w.]*", place):
        return _imported(place, function), {"reward": text}
    path = Path(place if colon and place.endswith(".py") else text)
    try:
        origin = {"reward": text, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    except OSError as error:
        raise RewardError(f"reward {path} cannot be read ({error.strerror})") from error
    if path.suffix == ".py":
        if not colon:
            raise RewardError(f"reward {text} names no function; write {text}:FUNCTION")
        return _function(path, function), origin
    readers = {".npy": _read_npy, ".npz": _read_npz, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise RewardError(f"reward {text} must be file.py:FUNCTION or a file of type {', '.join(readers)}")
    try:
        return readers[path.suffix](path), origin
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(f"reward {path} cannot be read ({first_line(error)})") from error


def _imported(place: str, name: str) -> Callable[..., Any]:
    try:
        module = import_place(place)
    except ConfigError as error:
        raise RewardError(str(error)) from error
    return _named(module, place, name)


def _function(path: Path, name: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RewardError(f"reward file {path} fails: {type(error).__name__}: {first_line(error)}") from error
    return _named(module, str(path), name)


def _named(module: ModuleType, place: str, name: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if not callable(function):
        found = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RewardError(f"{place} has no function {name!r}; it has {', '.join(found) or 'none'}")
    return function  # type: ignore[no-any-return]


def _read_npy(path: Path) -> Any:
    return np.load(path, allow_pickle=False)


def _read_npz(path: Path) -> Any:
    with np.load(path, allow_pickle=False) as file:
        return file[_pick(list(file), path)]


def _read_safetensors(path: Path) -> Any:
    from safetensors.torch import load_file

    tensors = load_file(path)
    return tensors[_pick(list(tensors), path)]


def _pick(names: list[str], path: Path) -> str:
    if "rewards" in names:
        return "rewards"
    if len(names) != 1:
        raise RewardError(f"{path} must hold one array or one named 'rewards'; it has {', '.join(names) or 'none'}")
    return names[0]
