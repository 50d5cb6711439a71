"""Damage to files: flipped bits, cuts, blocks of zeros, and for text other values in the same places."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet

from rlkit2.checksums import ITSELF, KEY, sealed

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, 1e308, float("nan"), float("inf"), 10**30, -(10**30), 2**63, 2**31, "", "x", "none", "../x", "a" * 3000,
    "\x00", "1", [], {}, [None], [[]], {"": None}, ["x"], [1, 2, 3], {"step": -1}, [10**9], json.loads("[" * 60 + "]" * 60),
]  # fmt: skip
NUMBERS = [
    "0",
    "-1",
    "1e308",
    "nan",
    "inf",
    "-inf",
    "1" + "0" * 40,
    "1.5",
    "true",
    '""',
    "[]",
    "{}",
    "[0]",
    "9223372036854775808",
    "1000000000000",
]


def damaged(path: Path, generator: random.Random) -> str:
    """Change one file in one way; says which."""
    ways: list[Callable[[Path, random.Random], None]] = [flip, cut, zeros, insert, doubled, emptied]
    if path.suffix == ".json":
        ways = [entry] * 12 + ways
    elif path.suffix == ".jsonl":
        ways = [line] * 8 + ways
    elif path.suffix == ".toml":
        ways = [number] * 8 + ways
    elif path.suffix in (".npz", ".h5", ".hdf5", ".parquet", ".csv"):
        ways = [array] * 10 + ways
    way = generator.choice(ways)
    way(path, generator)
    return way.__name__


def flip(path: Path, generator: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(generator.choice([1, 1, 1, 2, 8])):
        if data:
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(data)


def cut(path: Path, generator: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: generator.randrange(len(data) + 1)])


def zeros(path: Path, generator: random.Random) -> None:
    data = bytearray(path.read_bytes())
    start = generator.randrange(len(data) + 1)
    stop = min(len(data), start + generator.choice([1, 16, 512, 4096]))
    data[start:stop] = bytes(stop - start)
    path.write_bytes(data)


def insert(path: Path, generator: random.Random) -> None:
    data = path.read_bytes()
    place = generator.randrange(len(data) + 1)
    extra = generator.choice([b"\x00", b"\xff\xfe", b"\n", b"{", b"]" * 9, b"[" * 5000, generator.randbytes(64)])
    path.write_bytes(data[:place] + extra + data[place:])


def doubled(path: Path, generator: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data + data[generator.randrange(len(data) + 1) :])


def emptied(path: Path, generator: random.Random) -> None:
    if generator.random() < 0.5:
        path.unlink()
    else:
        path.write_bytes(b"")


def entry(path: Path, generator: random.Random) -> None:
    """Another value in the place of one of a JSON file, deep within it or not; or without it."""
    value = changed(json.loads(path.read_text()), generator)
    if isinstance(value, dict) and isinstance(value.get(KEY), dict) and generator.random() < 0.7:
        files = {name: digest for name, digest in value.pop(KEY).items() if name != ITSELF}
        value = sealed(value, files)  # as somebody would who means harm
    path.write_text(json.dumps(value))


def line(path: Path, generator: random.Random) -> None:
    """The same within one line of a JSON-lines file, or a line that is none."""
    lines = path.read_text().splitlines()
    if not lines:
        return emptied(path, generator)
    index = generator.randrange(len(lines))
    if generator.random() < 0.2:
        lines[index] = generator.choice(["", "null", "3", '"x"', "{", "[]", lines[index][:9], "\x00" * 9])
    else:
        lines[index] = json.dumps(changed(json.loads(lines[index]), generator))
    path.write_text("\n".join(lines) + generator.choice(["\n", "\n", ""]))
    return None


def number(path: Path, generator: random.Random) -> None:
    """Another value for one of a TOML file."""
    text = path.read_text()
    found = list(re.finditer(r"(?<== )[^\n]+", text)) or [re.search("", text)]
    place = generator.choice([match for match in found if match])
    path.write_text(text[: place.start()] + generator.choice(NUMBERS) + text[place.end() :])


ODD: list[Callable[[Any], Any]] = [
    lambda v: v[:0], lambda v: v[:-1], lambda v: np.concatenate([v, v[-1:]]), lambda v: v[None], lambda v: v[..., None], lambda v: v.reshape(-1),
    lambda v: v.reshape(-1)[0], lambda v: np.zeros((), v.dtype), lambda v: v[::-1], lambda v: v.T, lambda v: v.astype(bool),
    lambda v: v.astype(complex), lambda v: v.astype("S3"), lambda v: v.astype(np.int8), lambda v: v.astype(np.float16), lambda v: v.astype(">f8"),
    lambda v: v.astype(np.uint64) + 2**63, lambda v: v.astype("M8[s]"), lambda v: v * np.float64("nan"), lambda v: v * 1e300, lambda v: -v - 1,
    lambda v: v + 0.5, lambda v: np.where(np.arange(v.size).reshape(v.shape) == v.size // 2, np.inf, v), lambda v: v.astype(str).astype(object),
    lambda v: np.zeros(v.shape, [("a", "i4"), ("b", "f4")]), lambda v: np.broadcast_to(v.reshape(-1)[:1], v.shape), lambda v: None,
]  # fmt: skip


def array(path: Path, generator: random.Random) -> None:
    """Another array in the place of one of a file of arrays or of a table, or none."""
    change, arrays = generator.choice(ODD), {}
    if path.suffix in (".h5", ".hdf5"):
        with h5py.File(path, "r+") as file:
            names: list[str] = []
            file.visit(names.append)
            name = generator.choice([name for name in names if isinstance(file[name], h5py.Dataset)])
            value = _odd(change, np.asarray(file[name][()]))
            del file[name]
            if value is not None:
                file[name] = value.astype("S") if value.dtype.kind in "OM" else value
        return
    if path.suffix == ".npz":
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    else:
        table = pyarrow.parquet.read_table(path) if path.suffix == ".parquet" else pyarrow.csv.read_csv(path)
        arrays = {name: np.array(table.column(name).to_pylist()) for name in table.column_names}
    name = generator.choice(sorted(arrays))
    value = _odd(change, arrays.pop(name))
    arrays |= {} if value is None else {name: value}
    if path.suffix == ".npz":
        np.savez(path, **arrays)
        return
    longest = max((len(value) for value in arrays.values() if value.ndim), default=1)
    columns = {name: (value.tolist() if value.ndim else [value.item()]) for name, value in arrays.items()}
    columns = {name: [*values, *[None] * (longest - len(values))] for name, values in columns.items()}
    try:
        made = pyarrow.table(columns)
        pyarrow.parquet.write_table(made, path) if path.suffix == ".parquet" else pyarrow.csv.write_csv(made, path)
    except (pyarrow.ArrowException, OverflowError):  # no such column
        emptied(path, generator)


def _odd(change: Callable[[Any], Any], value: Any) -> Any:
    try:
        with np.errstate(all="ignore"):
            found = change(value)
    except (ValueError, TypeError, IndexError):  # of strings, or of a single value
        return None
    return None if found is None else np.asarray(found)


def changed(value: Any, generator: random.Random) -> Any:
    """`value` with one of the values within it replaced, removed or renamed."""
    if isinstance(value, dict) and value and generator.random() < 0.92:
        key = generator.choice(list(value))
        rest = {name: item for name, item in value.items() if name != key}
        how = generator.random()
        if how < 0.1:
            return rest
        if how < 0.15:
            return {**rest, key + "x": value[key]}
        return {**value, key: changed(value[key], generator)}
    if isinstance(value, list) and value and generator.random() < 0.8:
        index = generator.randrange(len(value))
        if generator.random() < 0.2:
            return value[:index] + value[index + 1 :]
        return [*value[:index], changed(value[index], generator), *value[index + 1 :]]
    if isinstance(value, str) and value.startswith("{") and generator.random() < 0.8:
        return json.dumps(
            changed(json.loads(value), generator)
        )  # JSON within JSON: specifications of datasets and spaces
    return generator.choice(VALUES)
