"""D4RL-style files: one row per step, `observations, actions, rewards, terminals, timeouts`, with or without `next_observations`.

Layout: https://github.com/Farama-Foundation/D4RL (`d4rl.offline_env`), the arrays at the root of an HDF5 file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5py

from rlkit2.data.episodes import Episode
from rlkit2.data.sources.hdf5 import open_hdf5
from rlkit2.data.sources.reader import Reader, ReadOptions
from rlkit2.data.sources.rows import cut_rows

HDF5 = (".hdf5", ".h5")


class D4RLReader(Reader):
    """D4RL-style HDF5 files."""

    name = "D4RL HDF5"

    def detects(self, path: Path) -> bool:
        """Every HDF5 file that no other reader takes."""
        return path.is_file() and (path.suffix in HDF5 or h5py.is_hdf5(path))

    def episodes(self, path: Path, options: ReadOptions) -> Iterator[Episode]:
        """The rows between two ends."""
        with open_hdf5(path) as file:
            arrays = {name: value for name, value in file.items() if isinstance(value, h5py.Dataset)}
            yield from cut_rows(arrays, str(path), options)

    def steps(self, path: Path, options: ReadOptions) -> int:
        """Rows of the file."""
        with open_hdf5(path) as file:
            return len(file["rewards"]) if "rewards" in file else 0
