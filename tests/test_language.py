"""Messages, help lines and docstrings are plain present-day English."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "rlkit2"
FILES = sorted(ROOT.rglob("*.py"))
# What was written and should read: "is not a folder", "resume", "continue", "distribution".
OLD = re.compile(
    r"(?<!there )(?<!There )\b(is|was) no (?!longer\b|more\b|less\b|better\b)[a-z]+|\bgo(es|ne)? on with\b|\bgoes on\b|\blaws?\b"
)


def texts(path: Path) -> list[tuple[int, str]]:
    """Every string of a file with its line, docstrings and the parts of f-strings included."""
    return [
        (node.lineno, node.value)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_words_are_todays(path: Path) -> None:
    found = [f"{line}: {match[0]!r}" for line, text in texts(path) if (match := OLD.search(text))]
    assert not found


@pytest.mark.parametrize(
    "old", ["{x} is no folder", "labels are gone on with", "go on with: rlkit2", "the law of the noise", "is no run"]
)
def test_the_old_words_are_noticed(old: str) -> None:
    assert OLD.search(old)


@pytest.mark.parametrize(
    "good", ["there is no network to download it", "the distance is no longer exact", "is not a folder"]
)
def test_good_words_are_left_alone(good: str) -> None:
    assert not OLD.search(good)
