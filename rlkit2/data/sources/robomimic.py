"""robomimic files: HDF5 with a group `data/demo_i` per trajectory: `actions`, `rewards`, `dones`, `obs/KEY`, `next_obs/KEY`.

Layout: https://robomimic.github.io/docs/datasets/overview.html. Observations are a Dict of the keys. `dones` marks the steps after which the task is
solved (or, in files made so, the last step of a trajectory): terminations, unless the task is said never to terminate.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rlkit2.data.episodes import Episode
from rlkit2.data.flags import as_flags
from rlkit2.data.sources.hdf5 import hdf5_names, open_hdf5
from rlkit2.data.sources.reader import Reader, ReadOptions
from rlkit2.data.sources.rows import split_at_terminations
from rlkit2.errors import CorruptDatasetError


class RobomimicReader(Reader):
    """robomimic HDF5 files."""

    name = "robomimic HDF5"

    def detects(self, path: Path) -> bool:
        """An HDF5 file with `data/demo_...`."""
        return path.is_file() and any(name.startswith("demo_") for name in hdf5_names(path, "data"))

    def episodes(self, path: Path, options: ReadOptions) -> Iterator[Episode]:
        """The demonstrations, in the order of their numbers."""
        with open_hdf5(path) as file:
            demos = [name for name in file["data"] if re.fullmatch(r"demo_\d+", name)]
            for demo in sorted(demos, key=lambda name: int(name.removeprefix("demo_"))):
                yield from _demo(f"{path} {demo}", file["data"][demo], options)

    def steps(self, path: Path, options: ReadOptions) -> int:
        """The total that the file states."""
        with open_hdf5(path) as file:
            return int(file["data"].attrs.get("total", 0))


def _demo(name: str, group: Any, options: ReadOptions) -> Iterator[Episode]:
    missing = [key for key in ("actions", "obs") if key not in group]
    if missing:
        mend = (
            "; make observations from the states with robomimic's dataset_states_to_obs.py" if "obs" in missing else ""
        )
        raise CorruptDatasetError(f"{name} lacks {', '.join(missing)}{mend}")
    actions = group["actions"][()]
    rewards = group["rewards"][()].reshape(-1) if "rewards" in group else np.zeros(len(actions))
    dones = np.zeros(len(actions), bool)
    if "dones" in group:
        dones = as_flags(group["dones"][()], f"{name}: dones").reshape(-1)
    lengths = {"actions": len(actions), "rewards": len(rewards), "dones": len(dones)}
    lengths |= {f"obs/{key}": len(value) for key, value in group["obs"].items()}
    if len(set(lengths.values())) != 1:
        raise CorruptDatasetError(
            f"{name} has unequal lengths: {', '.join(f'{key} {n}' for key, n in lengths.items())}"
        )
    observations = {key: value[()] for key, value in group["obs"].items()}
    if "next_obs" in group:
        last = {key: group["next_obs"][key][-1:] for key in observations}
        observations = {key: np.concatenate([value, last[key]]) for key, value in observations.items()}
    elif len(actions) and dones[-1]:
        observations = {key: np.concatenate([value, value[-1:]]) for key, value in observations.items()}
    else:
        actions, rewards, dones = actions[:-1], rewards[:-1], dones[:-1]
    if options.never_terminates:
        dones = np.zeros(len(dones), bool)
    yield from split_at_terminations(name, observations, actions, rewards, dones)
