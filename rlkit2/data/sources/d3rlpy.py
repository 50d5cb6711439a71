"""d3rlpy replay buffers: `buffer.dump(file)` of version 2 and the `MDPDataset` of version 1, both HDF5.

Layout: https://github.com/takuseno/d3rlpy (`d3rlpy/dataset/io.py`). Version 2 has, per episode i, `observations_i` (or `observations_i_j` for
tuples), `actions_i`, `rewards_i`, `terminated_i`, and `columns`, `num_episodes`, `version`. Version 1 has rows with `terminals` and
`episode_terminals`. Neither stores the observation after an episode's last action.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rlkit2.data.episodes import Episode
from rlkit2.data.flags import as_flags
from rlkit2.data.sources.hdf5 import hdf5_names, open_hdf5
from rlkit2.data.sources.reader import Reader, ReadOptions
from rlkit2.data.sources.rows import cut_rows
from rlkit2.errors import CorruptDatasetError


class D3rlpyReader(Reader):
    """d3rlpy HDF5 files."""

    name = "d3rlpy HDF5"

    def detects(self, path: Path) -> bool:
        """An HDF5 file with `num_episodes` and `columns` (version 2) or `episode_terminals` (version 1)."""
        names = hdf5_names(path) if path.is_file() else set()
        return {"num_episodes", "columns"} <= names or "episode_terminals" in names

    def episodes(self, path: Path, options: ReadOptions) -> Iterator[Episode]:
        """The stored episodes."""
        with open_hdf5(path) as file:
            if "num_episodes" not in file:
                yield from cut_rows(_version_1(file), str(path), options)
                return
            for number in range(int(file["num_episodes"][()])):
                yield _episode(path, file, number, options)


def _version_1(file: Any) -> dict[str, Any]:
    arrays = {name: file[name][()] for name in ("observations", "actions", "rewards", "terminals") if name in file}
    terminals = as_flags(arrays.get("terminals", np.zeros(0)), "terminals").reshape(-1)
    ends = as_flags(file["episode_terminals"][()], "episode_terminals").reshape(-1)
    return arrays | {"timeouts": ends & ~terminals if len(ends) == len(terminals) else ends}


def _episode(path: Path, file: Any, number: int, options: ReadOptions) -> Episode:
    name = f"{path} episode {number}"
    try:
        observations = _array(file, "observations", number)
        actions, rewards = file[f"actions_{number}"][()], file[f"rewards_{number}"][()].reshape(-1)
        terminated = (
            bool(as_flags(file[f"terminated_{number}"][()], f"{name}: terminated")) and not options.never_terminates
        )
    except KeyError as error:
        raise CorruptDatasetError(f"{name} lacks an array: {error.args[0]}") from error
    last = np.arange(len(rewards)) == len(rewards) - 1
    return Episode(name, observations, actions, rewards, last & terminated, last & (not terminated))


def _array(file: Any, name: str, number: int) -> Any:
    """An array, or the tuple of arrays that stands in its place."""
    if f"{name}_{number}" in file:
        return file[f"{name}_{number}"][()]
    parts: list[Any] = []
    while f"{name}_{number}_{len(parts)}" in file:
        parts.append(file[f"{name}_{number}_{len(parts)}"][()])
    if not parts:
        raise KeyError(f"{name}_{number}")
    return tuple(parts)
