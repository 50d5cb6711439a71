"""D4RL-style files and plain arrays: one row per step, `observations, actions, rewards, terminals, timeouts`, with or without `next_observations`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from rlkit2.data.cache import build_in_memory, fingerprint, open_cached
from rlkit2.data.dataset import TransitionDataset, spec_of_arrays
from rlkit2.data.episodes import Episode, EpisodePacker, Progress
from rlkit2.data.records import RecordWriter, record_dtype
from rlkit2.data.spaces import action_layout
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import CorruptDatasetError, DatasetError

# The names of both ages of Gym's step interface.
TERMINATIONS = ("terminals", "terminations")
TRUNCATIONS = ("timeouts", "truncations")
CHUNK = 1 << 16


def read_d4rl_file(
    path: Path, *, cache: bool = True, spec: DatasetSpec | None = None, progress: Progress | None = None
) -> TransitionDataset:
    """A D4RL-style HDF5 file as a dataset; `spec` gives its spaces and environment (default: those of `spec_of_arrays`).

    `progress` is called with (rows read, rows in all).

    Raises `CorruptDatasetError` for a damaged file and for missing or contradicting arrays.
    """
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        reason = (
            "permission denied"
            if isinstance(error, PermissionError)
            else "not a readable HDF5 file, truncated or damaged"
        )
        raise CorruptDatasetError(f"{path}: {reason} ({error})") from error
    with file:
        arrays = {name: value for name, value in file.items() if isinstance(value, h5py.Dataset)}
        try:
            spec, fill = _filler(arrays, str(path), replace(spec, id=path.stem) if spec else None, path.stem, progress)
            dtype = _record_dtype(spec)
            return (
                open_cached(fingerprint([path], spec.to_json()), dtype, fill) if cache else build_in_memory(dtype, fill)
            )
        except OSError as error:
            raise CorruptDatasetError(f"{path}: truncated or damaged ({error})") from error


def read_arrays(arrays: Mapping[str, Any], spec: DatasetSpec | None = None) -> TransitionDataset:
    """A mapping of per-step arrays under the names of a D4RL file, as a dataset in memory; errors as for a file."""
    spec, fill = _filler({name: np.asarray(value) for name, value in arrays.items()}, "arrays", spec, "arrays")
    return build_in_memory(_record_dtype(spec), fill)


def _record_dtype(spec: DatasetSpec) -> np.dtype[Any]:
    flat, actions = spec.flattener, action_layout(spec.action_space)
    return record_dtype(flat.shape, flat.dtype, actions.shape, actions.dtype)


def _filler(
    arrays: Mapping[str, Any],
    name: str,
    spec: DatasetSpec | None,
    dataset_id: str,
    progress: Progress | None = None,
) -> tuple[DatasetSpec, Callable[[RecordWriter], DatasetSpec]]:
    """The dataset's specification and the function that writes its episodes."""
    missing = [key for key in ("observations", "actions", "rewards") if key not in arrays]
    missing += [] if any(key in arrays for key in TERMINATIONS) else ["terminals"]
    if missing:
        raise CorruptDatasetError(
            f"{name} lacks {', '.join(missing)}; it has {', '.join(sorted(arrays)) or 'no arrays'}"
        )
    if "next_observations" not in arrays and not any(key in arrays for key in TRUNCATIONS):
        raise CorruptDatasetError(
            f"{name} has neither timeouts nor next_observations: where an episode was cut off cannot be told"
        )
    checked = ("observations", "actions", "rewards", "next_observations", *TERMINATIONS, *TRUNCATIONS)
    lengths = {key: len(arrays[key]) for key in checked if key in arrays}
    if len(set(lengths.values())) != 1:
        raise CorruptDatasetError(
            f"{name} has arrays of unequal lengths: {', '.join(f'{k} {n}' for k, n in lengths.items())}"
        )
    if lengths["rewards"] == 0:
        raise CorruptDatasetError(f"{name} has no rows; a dataset needs at least one transition")
    if spec is None:
        kind = np.zeros((0, *arrays["observations"].shape[1:]), arrays["observations"].dtype)
        actions = arrays["actions"]
        spec = spec_of_arrays(kind, actions[:] if np.issubdtype(actions.dtype, np.integer) else actions, dataset_id)
    chosen = spec

    def fill(writer: RecordWriter) -> DatasetSpec:
        packer = EpisodePacker(writer, chosen.flattener, action_layout(chosen.action_space))
        packer.add_all(_episodes(arrays, name), name, progress, lengths["rewards"])
        return replace(chosen, notes=packer.notes)

    return chosen, fill


def _episodes(arrays: Mapping[str, Any], name: str) -> Iterator[Episode]:
    """Cut the rows into episodes; with `next_observations`, also wherever the next row does not go on from it."""
    terminations = _flags(arrays, TERMINATIONS)
    truncations = _flags(arrays, TRUNCATIONS)
    rewards = np.asarray(arrays["rewards"][:]).reshape(-1)
    ends = terminations | truncations
    following = arrays.get("next_observations")
    if following is not None:
        ends[:-1] |= _breaks(arrays["observations"], following)
    ends[-1] = True
    start = 0
    for stop in (np.flatnonzero(ends) + 1).tolist():
        rows = slice(start, stop)
        observations = arrays["observations"][rows]
        if following is not None:
            observations = np.concatenate([observations, following[stop - 1 : stop]])
        actions = arrays["actions"][rows]
        yield Episode(
            f"{name} rows {start}..{stop - 1}",
            observations,
            actions,
            rewards[rows],
            terminations[rows],
            truncations[rows],
        )
        start = stop


def _flags(arrays: Mapping[str, Any], names: tuple[str, ...]) -> NDArray[np.bool_]:
    for name in names:
        if name in arrays:
            return np.asarray(arrays[name][:]).reshape(-1).astype(bool)
    return np.zeros(len(arrays["rewards"]), bool)


def _breaks(observations: Any, following: Any) -> NDArray[np.bool_]:
    """Rows whose next observation is not the observation of the following row, `[N - 1]`, compared in float32."""
    total = len(observations)
    if observations.shape != following.shape:
        raise DatasetError(f"observations {observations.shape} and next_observations {following.shape} differ in shape")
    out = np.zeros(total - 1, bool)
    for start in range(0, total - 1, CHUNK):
        stop = min(start + CHUNK, total - 1)
        after = np.asarray(observations[start + 1 : stop + 1], np.float32).reshape(stop - start, -1)
        told = np.asarray(following[start:stop], np.float32).reshape(stop - start, -1)
        out[start:stop] = ((after != told) & ~(np.isnan(after) & np.isnan(told))).any(axis=1)
    return out
