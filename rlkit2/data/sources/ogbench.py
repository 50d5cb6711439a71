"""OGBench files: npz with `observations, actions, terminals` and, in files with next observations, `next_observations, rewards, masks`.

Layout: https://github.com/seohongpark/ogbench (`ogbench.utils.load_dataset`). A trajectory of T steps has T + 1 rows: its last row, flagged in
`terminals`, holds the final observation and an action that is not used. `terminals` are ends of trajectories, not terminations; `masks`,
where they are, are 0 at a termination. Files of the goal-conditioned tasks hold no rewards: they read as zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rlkit2.data.episodes import Episode
from rlkit2.data.flags import as_flags
from rlkit2.data.sources.npz import npz_rows, npz_shapes, open_npz
from rlkit2.data.sources.reader import Reader, ReadOptions
from rlkit2.data.sources.rows import split_at_terminations
from rlkit2.errors import CorruptDatasetError

REQUIRED = ("observations", "actions", "terminals")
READ = (*REQUIRED, "next_observations", "rewards", "masks")


class OGBenchReader(Reader):
    """OGBench npz files."""

    name = "OGBench npz"

    def detects(self, path: Path) -> bool:
        """An npz file with `masks`, or with ends of trajectories and no rewards."""
        if not path.is_file() or path.suffix != ".npz":
            return False
        names = set(npz_shapes(path))
        return names >= set(REQUIRED) and ("masks" in names or not names & {"rewards", "timeouts", "truncations"})

    def episodes(self, path: Path, options: ReadOptions) -> Iterator[Episode]:
        """A trajectory between two `terminals`."""
        with open_npz(path) as file:
            arrays = {name: file[name] for name in file.files}
        total = arrays["terminals"].size
        odd = [name for name in READ if name in arrays and arrays[name].shape[:1] != (total,)]
        if odd or not total:
            raise CorruptDatasetError(
                f"{path} has {total} terminals; {', '.join(odd) or 'rows'} differ in length or are missing"
            )
        ends = as_flags(arrays["terminals"], f"{path}: terminals").reshape(-1).copy()
        ends[-1] = True
        aligned = "next_observations" in arrays
        rewards = arrays["rewards"].reshape(-1) if "rewards" in arrays else np.zeros(total, np.float32)
        goes_on = as_flags(arrays.get("masks", np.ones(total, bool)), f"{path}: masks").reshape(-1)
        start = 0
        for stop in (np.flatnonzero(ends) + 1).tolist():
            steps = slice(start, stop if aligned else stop - 1)
            observations = arrays["observations"][start:stop]
            if aligned:
                observations = np.concatenate([observations, arrays["next_observations"][stop - 1 : stop]])
            name = f"{path} rows {start}..{stop - 1}"
            yield from split_at_terminations(
                name, observations, arrays["actions"][steps], rewards[steps], ~goes_on[steps]
            )
            start = stop

    def steps(self, path: Path, options: ReadOptions) -> int:
        """Rows of the file."""
        return npz_rows(path, "terminals")
