"""Tables, one row per step: CSV and Parquet, with names (or patterns) of the columns for each field.

Without a mapping, `observations` are the columns `observations`, `observation`, `observation_*`, `obs_*` or `o_*`;
the same for the other fields. A column of lists (Parquet) gives one column per element.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit2.data.episodes import Episode
from rlkit2.data.sources.reader import Reader, ReadOptions
from rlkit2.data.sources.rows import cut_rows
from rlkit2.errors import ConfigError, CorruptDatasetError, DatasetError, first_line

SUFFIXES = (".csv", ".tsv", ".parquet")
# Names under which the fields are looked for, in this order.
NAMES: dict[str, tuple[str, ...]] = {
    "observations": (
        "observations",
        "observation",
        "observations_*",
        "observation_*",
        "observation.*",
        "obs",
        "obs_*",
        "o_*",
    ),
    "actions": ("actions", "action", "actions_*", "action_*", "action.*", "act_*", "a", "a_*"),
    "rewards": ("rewards", "reward", "r"),
    "next_observations": (
        "next_observations",
        "next_observation",
        "next_observations_*",
        "next_observation_*",
        "next_obs_*",
    ),
    "terminations": ("terminations", "termination", "terminals", "terminal", "terminated", "done"),
    "truncations": ("truncations", "truncation", "timeouts", "timeout", "truncated"),
    "episodes": ("episodes", "episode", "episode_id", "episode_index"),
}


class TableReader(Reader):
    """CSV and Parquet tables."""

    name = "CSV or Parquet table"

    def detects(self, path: Path) -> bool:
        """A file by its suffix."""
        return path.is_file() and path.suffix.lower() in SUFFIXES

    def episodes(self, path: Path, options: ReadOptions) -> Iterator[Episode]:
        """The rows between two ends."""
        table = _read(path)
        columns = map_columns(table.column_names, options.columns, str(path))
        arrays = {field: _matrix(table, names, field, path) for field, names in columns.items()}
        yield from cut_rows(arrays, str(path), options)


def read_columns(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Columns of numbers (or of lists of them) of a Parquet file, `[N]` or `[N, ...]` each. Raises `DatasetError`."""
    table = _read(path)
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise CorruptDatasetError(f"{path} has no column {missing[0]!r}; it has {', '.join(table.column_names)}")
    return {name: _column(table.column(name).combine_chunks(), name, name, path) for name in names}


def map_columns(present: Sequence[str], given: Mapping[str, Sequence[str]], name: str) -> dict[str, tuple[str, ...]]:
    """Which columns make up which field: those `given` (names or patterns such as `o_*`, in order), else those of the usual names.

    A pattern gives its columns by number (`o_2` before `o_10`). Raises `ConfigError` for a field that does not exist, `DatasetError` where nothing
    has a given name, or where a column that is needed is not found.
    """
    unknown = [field for field in given if field not in NAMES]
    if unknown:
        raise ConfigError(f"columns are given for {unknown[0]!r}; fields are {', '.join(NAMES)}")
    found: dict[str, tuple[str, ...]] = {}
    for field, usual in NAMES.items():
        if field in given:
            chosen = [_matching(present, pattern) for pattern in given[field]]
            for pattern, columns in zip(given[field], chosen, strict=True):
                if not columns:
                    raise DatasetError(f"{name} has no column {pattern!r} for {field}; it has {', '.join(present)}")
            found[field] = tuple(column for columns in chosen for column in columns)
        else:
            matches = (tuple(_matching(present, pattern)) for pattern in usual)
            first = next((columns for columns in matches if columns), ())
            if first:
                found[field] = first
    for field in ("observations", "actions", "rewards"):
        if field not in found:
            raise DatasetError(
                f"{name} has no column for {field}; it has {', '.join(present)}: name them with "
                f"--columns {field}=NAME or columns={{{field!r}: [...]}}"
            )
    return found


def _matching(present: Sequence[str], pattern: str) -> list[str]:
    if pattern in present:
        return [pattern]
    return sorted((name for name in present if fnmatchcase(name, pattern)), key=_numbers)


def _numbers(text: str) -> list[str | int]:
    """Text with its numbers as numbers, to sort by."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def _read(path: Path) -> Any:
    import pyarrow.csv
    import pyarrow.parquet

    try:
        if path.suffix.lower() == ".parquet":
            return pyarrow.parquet.read_table(path)
        with path.open("rb") as file:
            header = file.readline(1 << 16)
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        if delimiter.encode() not in header and b";" in header:
            raise CorruptDatasetError(
                f"{path}: its columns are parted by semicolons; save it with commas between them and points in its numbers, or as Parquet"
            )
        return pyarrow.csv.read_csv(path, parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter))
    except (OSError, pyarrow.ArrowException) as error:
        raise CorruptDatasetError(f"{path} cannot be read as a table ({first_line(error)})") from error


def _matrix(table: Any, names: Sequence[str], field: str, path: Path) -> NDArray[Any]:
    """Columns side by side, `[N, columns]`; `[N]` for a single one of numbers."""
    parts = [_column(table.column(name).combine_chunks(), name, field, path) for name in names]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def _column(column: Any, name: str, field: str, path: Path) -> NDArray[Any]:
    import pyarrow

    kind = column.type
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind):
        length = len(column)
        flat = _column(column.flatten(), name, field, path)
        if length == 0 or len(flat) % length or len(set(pyarrow.compute.list_value_length(column).to_pylist())) != 1:
            raise CorruptDatasetError(f"{path}: lists in column {name!r} have unequal lengths")
        return flat.reshape(length, -1, *flat.shape[1:])
    if pyarrow.types.is_timestamp(kind) or pyarrow.types.is_date(kind) or not _numeric(kind):
        if field == "episodes":
            values: NDArray[Any] = column.dictionary_encode().indices.to_numpy(zero_copy_only=False)
            return values
        raise DatasetError(
            f"{path}: column {name!r} for {field} holds {kind}, not numbers; map it to numbers or leave it out"
        )
    if column.null_count:
        if field not in ("observations", "next_observations"):
            raise DatasetError(
                f"{path}: column {name!r} for {field} has {column.null_count} empty values; fill them or drop the rows"
            )
        column = column.cast(pyarrow.float64())
    found: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return found


def _numeric(kind: Any) -> bool:
    import pyarrow

    types = pyarrow.types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind))
