"""LeRobot datasets, versions 2 and 3: a folder with `meta/info.json` and Parquet files under `data/`.

Layout: https://github.com/huggingface/lerobot (`LeRobotDataset`). A row is a frame: `observation.*` and `action` (lists of numbers), `episode_index`,
`frame_index`, and where there are rewards `next.reward`, `next.done`, `next.success`. Version 2 has a file an episode
(`data/chunk-000/episode_000000.parquet`), version 3 many in one (`data/chunk-000/file-000.parquet`). Cameras are videos beside them, which are
not decoded, or columns of images; both are left out. The observation after an episode's last action is not stored.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit2.data.episodes import Episode
from rlkit2.data.flags import as_flags
from rlkit2.data.sources.reader import Reader, ReadOptions
from rlkit2.data.sources.tables import read_columns
from rlkit2.errors import CorruptDatasetError, DatasetError, first_line

INFO = Path("meta", "info.json")
CAMERAS = ("image", "video")


class LeRobotReader(Reader):
    """LeRobot folders."""

    name = "LeRobot folder"

    def detects(self, path: Path) -> bool:
        """A folder with LeRobot's `meta/info.json`."""
        return (path / INFO).is_file()

    def files(self, path: Path) -> list[Path]:
        """The description and the tables, in the order of the episodes."""
        return [path / INFO, *sorted((path / "data").rglob("*.parquet"))]

    def episodes(self, path: Path, options: ReadOptions) -> Iterator[Episode]:
        """Rows of one `episode_index`."""
        info = _info(path)
        features = info["features"]
        kept = {name: feature for name, feature in features.items() if feature.get("dtype") not in (*CAMERAS, "string")}
        observations = [name for name in kept if name.split(".")[0] == "observation"]
        actions = [name for name in kept if name.split(".")[0] == "action"]
        if not observations or not actions:
            what = "observations other than images" if not observations else "actions"
            raise DatasetError(f"{path} has no {what}; its features are {', '.join(features)}")
        more = [name for name in ("next.reward", "next.done", "next.success") if name in kept]
        cameras = sum(feature.get("dtype") in CAMERAS for feature in features.values())
        notes = {"cameras_left_out": cameras} if cameras else {}
        found = 0
        for rows in _episode_rows(path, self.files(path)[1:], [*observations, *actions, *more]):
            yield _episode(path, rows, observations, actions, options, notes)
            notes, found = {}, found + 1
        if found != info.get("total_episodes", found):
            raise CorruptDatasetError(
                f"{path} holds {found} episodes, {INFO} says {info['total_episodes']}; files are missing or damaged"
            )

    def steps(self, path: Path, options: ReadOptions) -> int:
        """The frames that the description states."""
        frames = _info(path).get("total_frames")
        return frames if isinstance(frames, int) else 0


def _info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads((path / INFO).read_text())
        if all(isinstance(feature, dict) for feature in info["features"].values()):
            return dict(info)
        reason = "features are not objects"
    except (OSError, ValueError, RecursionError) as error:
        reason = first_line(error)
    except (LookupError, TypeError, AttributeError):
        reason = "it has no features"
    raise CorruptDatasetError(f"{path / INFO} is not LeRobot's description ({reason})")


def _episode_rows(path: Path, files: list[Path], names: list[str]) -> Iterator[dict[str, NDArray[Any]]]:
    """The arrays of one episode after the other; an episode may go on in the next file."""
    pending: dict[str, NDArray[Any]] | None = None
    for file in files:
        arrays = read_columns(file, [*names, "episode_index", "frame_index"])
        index = arrays["episode_index"].reshape(-1)
        if any(array.shape[:1] != index.shape for array in arrays.values()) or arrays["frame_index"].size != len(index):
            raise CorruptDatasetError(
                f"{file}: its columns differ in length, or episode_index and frame_index are not numbers"
            )
        cuts = [0, *(np.flatnonzero(np.diff(index)) + 1).tolist(), len(index)]
        for start, stop in itertools.pairwise(cuts):
            rows = {name: array[start:stop] for name, array in arrays.items()}
            if stop == start:
                continue
            if pending is not None and pending["episode_index"].flat[0] == index[start]:
                pending = {name: np.concatenate([array, rows[name]]) for name, array in pending.items()}
                continue
            if pending is not None:
                yield pending
            pending = rows
    if pending is None:
        raise CorruptDatasetError(f"{path} has no frames under data/")
    yield pending


def _episode(
    path: Path,
    rows: Mapping[str, NDArray[Any]],
    observations: list[str],
    actions: list[str],
    options: ReadOptions,
    notes: Mapping[str, int],
) -> Episode:
    name = f"{path} episode {rows['episode_index'].flat[0]}"
    frames = rows["frame_index"].reshape(-1)
    total = len(frames)
    if (np.diff(frames) != 1).any():
        raise CorruptDatasetError(f"{name}: its frames do not follow each other; files are missing or damaged")
    tree = {key.partition(".")[2] or key: rows[key] for key in observations}
    joined = [rows[key].reshape(total, -1) for key in actions]
    told = dict(notes)
    if "next.reward" not in rows:
        told["steps_without_rewards"] = total
    flags = {
        key: as_flags(rows[key], f"{name}: {key}").reshape(-1) for key in ("next.done", "next.success") if key in rows
    }
    over = bool(flags["next.done"][-1]) if "next.done" in flags else "next.success" in flags
    terminated = over and bool(flags.get("next.success", [True])[-1]) and not options.never_terminates
    if terminated and "next.success" not in flags:
        told["done_taken_as_termination"] = 1
    last = np.arange(total) == total - 1
    return Episode(
        name,
        next(iter(tree.values())) if len(tree) == 1 else tree,
        joined[0] if len(joined) == 1 else np.concatenate(joined, axis=1),
        rows["next.reward"].reshape(-1) if "next.reward" in rows else np.zeros(total, np.float32),
        last & terminated,
        last & (not terminated),
        told,
    )
