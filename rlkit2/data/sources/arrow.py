"""Minari's Arrow and Parquet episodes, read by their own files: a folder per episode with T + 1 rows, the last one padding but for the observation.

Minari's own reader takes the batches of a scanner for episodes. A scanner cuts batches at 32,768 rows, so that from the first longer episode on the
episodes are shifted without a word. Here every folder is read whole and held against the steps its `metadata.json` states. Minari's writer stores
such an episode in pieces whose order is not kept where Arrow has several threads, which nothing in the file gives away: that is said.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from minari.dataset.minari_storage import is_image_space
from numpy.typing import NDArray

from rlkit2.data.episodes import Episode
from rlkit2.data.spaces import Leaf, tree_of
from rlkit2.errors import CorruptDatasetError, DatasetError, first_line

MOST_STEPS = (1 << 15) - 1  # of an episode that Minari's own reader takes in one piece, with its last observation


def arrow_episodes(
    data_path: Path, numbers: Iterable[int], parquet: bool, leaves: dict[str, tuple[Leaf, ...]], jpeg: bool
) -> Iterator[Episode]:
    """The episodes of these numbers; `leaves` are those of `observations` and `actions`. Raises `CorruptDatasetError`."""
    for number in numbers:
        where = f"{data_path} episode {number}"
        folder = data_path / str(number)
        try:
            table = _table(folder, ".parquet" if parquet else ".arrow")
            steps = table.num_rows - 1
            fields: list[Any] = []
            for kind, parts in leaves.items():
                column = table.column(kind).combine_chunks()
                rows = steps + (kind == "observations")
                fields.append(tree_of(parts, [_values(_pick(column, leaf), leaf.space, jpeg)[:rows] for leaf in parts]))
            flat = (table.column(kind).combine_chunks() for kind in ("rewards", "terminations", "truncations"))
            fields += [column.to_numpy(zero_copy_only=False)[:steps] for column in flat]
        except DatasetError:
            raise
        except Exception as error:  # pyarrow and PIL raise many kinds
            raise CorruptDatasetError(
                f"{where} cannot be read ({type(error).__name__}: {first_line(error)})"
            ) from error
        told = _told_steps(folder)
        if told is not None and told != steps:
            raise CorruptDatasetError(
                f"{where} holds {steps} steps, its metadata say {told}; files are missing or damaged"
            )
        episode = Episode(where, *fields)
        yield replace(episode, notes={"long_arrow_episodes": 1}) if steps > MOST_STEPS else episode


def _table(folder: Path, suffix: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    number = lambda path: [int(part) for part in re.findall(r"\d+", path.stem)]  # noqa: E731
    parts = sorted(folder.glob(f"*{suffix}"), key=number)
    if not parts:
        raise CorruptDatasetError(f"{folder} has no {suffix} file; files are missing")
    if suffix == ".parquet":
        tables = [pyarrow.parquet.ParquetFile(part).read() for part in parts]
    else:
        tables = []
        for part in parts:
            with pyarrow.memory_map(str(part)) as source:
                tables.append(pyarrow.ipc.open_file(source).read_all())
    return tables[0] if len(tables) == 1 else pyarrow.concat_tables(tables)


def _pick(column: Any, leaf: Leaf) -> Any:
    for key in leaf.path:
        column = column.field(str(key))
    return column


def _values(column: Any, space: spaces.Space[Any], jpeg: bool) -> NDArray[Any]:
    """A column as values `[n, *shape]` of an elementary space."""
    if jpeg and is_image_space(space):
        from PIL import Image

        return np.stack([np.asarray(Image.open(io.BytesIO(frame.as_py()))) for frame in column])
    if isinstance(space, spaces.Discrete):
        values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
        return values
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False)).reshape(len(column), *(space.shape or ()))


def _told_steps(folder: Path) -> int | None:
    try:
        told = json.loads((folder / "metadata.json").read_text()).get("total_steps")
    except (OSError, ValueError, AttributeError):
        return None
    return None if told is None else int(told)
