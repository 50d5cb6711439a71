"""Damage to files: flipped bits, cuts, blocks of zeros, and for text other values in the same places."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    path.write_text(json.dumps(changed(json.loads(path.read_text()), generator)))


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
