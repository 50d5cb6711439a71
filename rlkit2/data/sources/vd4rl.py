"""V-D4RL files, and others of Dreamer's layout: a folder of npz files, an episode each, with images.

Layout: https://github.com/conglu1997/v-d4rl (`64px`, `conversion_scripts`). An episode of T steps has T + 1 rows of `image` uint8 `[T + 1, H, W, C]`,
`action`, `reward` and `is_terminal` (older files: `discount`, 0 at a termination): row t holds the action that led to image t and what it earned,
so the first row's action and reward belong to no step. `is_first` starts an episode where a file holds several.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rlkit2.data.episodes import Episode
from rlkit2.data.flags import as_flags
from rlkit2.data.sources.npz import npz_rows, npz_shapes, open_npz
from rlkit2.data.sources.reader import Reader, ReadOptions
from rlkit2.errors import CorruptDatasetError

REQUIRED, ENDS = {"image", "action", "reward"}, {"is_terminal", "discount"}
READ = sorted(REQUIRED | ENDS | {"is_first"})


class VD4RLReader(Reader):
    """V-D4RL npz files."""

    name = "V-D4RL npz"

    def detects(self, path: Path) -> bool:
        """An npz file with `image, action, reward` and ends, or a folder of them."""
        first = next(iter(self.files(path)), None)
        names = set() if first is None else set(npz_shapes(first))
        return names >= REQUIRED and bool(names & ENDS)

    def files(self, path: Path) -> list[Path]:
        """The episodes."""
        if path.is_dir():
            return sorted(path.glob("*.npz"))
        return [path] if path.suffix == ".npz" else []

    def episodes(self, path: Path, options: ReadOptions) -> Iterator[Episode]:
        """An episode between two rows that are first."""
        for file in self.files(path):
            with open_npz(file) as stored:
                arrays = {name: stored[name] for name in stored.files}
            missing = REQUIRED - set(arrays) or ({"is_terminal"} if not ENDS & set(arrays) else set())
            if missing:
                raise CorruptDatasetError(
                    f"{file} lacks {', '.join(sorted(missing))}; it has {', '.join(arrays) or 'nothing'}"
                )
            total = arrays["reward"].size
            odd = [name for name in READ if name in arrays and arrays[name].shape[:1] != (total,)]
            if odd:
                raise CorruptDatasetError(f"{file} has {total} rewards, but {odd[0]} has shape {arrays[odd[0]].shape}")
            ended = "is_terminal" in arrays
            terminal = as_flags(arrays["is_terminal"], f"{file}: is_terminal") if ended else arrays["discount"] == 0
            firsts = as_flags(arrays.get("is_first", np.arange(total) == 0), f"{file}: is_first").reshape(-1)
            firsts[:1] = True
            starts = [*np.flatnonzero(firsts).tolist(), total]
            for start, stop in itertools.pairwise(starts):
                steps = slice(start + 1, stop)
                terminated = terminal[steps].reshape(-1) & (not options.never_terminates)
                last = np.arange(stop - start - 1) == stop - start - 2
                yield Episode(
                    f"{file} rows {start}..{stop - 1}",
                    arrays["image"][start:stop],
                    arrays["action"][steps],
                    arrays["reward"][steps].reshape(-1),
                    terminated & last,
                    last & ~terminated,
                )

    def steps(self, path: Path, options: ReadOptions) -> int:
        """Rows less one in each file."""
        return sum(max(npz_rows(file, "reward") - 1, 0) for file in self.files(path))
