"""Arrays saved by `numpy.savez`, under the names of a D4RL file: one row per step."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rlkit2.data.episodes import Episode
from rlkit2.data.sources.reader import Reader, ReadOptions
from rlkit2.data.sources.rows import cut_rows
from rlkit2.errors import CorruptDatasetError, RLKitError, first_line


class NpzReader(Reader):
    """Plain npz files."""

    name = "npz"

    def detects(self, path: Path) -> bool:
        """Every npz file that no other reader takes."""
        return path.is_file() and path.suffix == ".npz"

    def episodes(self, path: Path, options: ReadOptions) -> Iterator[Episode]:
        """The rows between two ends; `options.columns` names arrays that are called otherwise."""
        with open_npz(path) as file:
            names = {name: name for name in file.files}
            names |= {field: given[0] for field, given in options.columns.items()}
            yield from cut_rows({field: file[name] for field, name in names.items()}, str(path), options)

    def steps(self, path: Path, options: ReadOptions) -> int:
        """Rows of the file."""
        return npz_rows(path, "rewards")


@contextmanager
def open_npz(path: Path) -> Iterator[Any]:
    """An npz file open for reading; `CorruptDatasetError` where it is damaged, lacks an array, or holds Python objects (never unpickled)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except KeyError as error:
        raise CorruptDatasetError(f"{path} lacks an array: {error.args[0]}") from error
    except RLKitError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise every kind
        if "allow_pickle" in str(error):
            raise CorruptDatasetError(
                f"{path} holds Python objects, which are not unpickled; save plain arrays"
            ) from error
        raise CorruptDatasetError(
            f"{path} is not a readable npz file, truncated or damaged ({first_line(error)})"
        ) from error


def npz_rows(path: Path, name: str) -> int:
    """Rows of an array in an npz file; 0 where there is none of that name, or it has no rows."""
    return (*npz_shapes(path).get(name, ()), 0)[0]


def npz_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays in an npz file, from their headers alone; empty where it cannot be read."""
    shapes = {}
    try:
        with zipfile.ZipFile(path) as file:
            for name in file.namelist():
                with file.open(name) as part:
                    version = np.lib.format.read_magic(part)
                    read = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    shapes[name.removesuffix(".npy")] = read(part)[0]
    except Exception:  # noqa: BLE001 - zipfile, zlib and numpy raise every kind; whoever reads the arrays says which
        return {}
    return shapes
