"""How a terminal is written to: coloured and moving where it can be, plain or quiet where a user asked for that (`--plain`, `--quiet`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Asked:
    """What the user asked for. `quiet`: results, warnings and errors only. `plain`: no colours, no tables or bars that move."""

    quiet: bool = False
    plain: bool = False


asked = Asked()
live: list[Console] = []
"""Consoles on which a bar moves, the newest last: what is printed there appears above it."""


def make_console(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console on standard output or standard error, as asked for."""
    from rich.console import Console

    plain = {"force_terminal": False, "no_color": True, "force_interactive": False} if asked.plain else {}
    return Console(stderr=stderr, width=width, highlight=False, **plain)  # type: ignore[arg-type]


@contextmanager
def options_of(arguments: Sequence[str]) -> Iterator[list[str]]:
    """The arguments without `--quiet` and `--plain`, which hold while the block runs."""
    before = Asked(asked.quiet, asked.plain)
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    found = {name: f"--{name}" in arguments[:end] for name in ("quiet", "plain")}
    asked.quiet, asked.plain = before.quiet or found["quiet"], before.plain or found["plain"]
    try:
        yield [*(word for word in arguments[:end] if word not in ("--quiet", "--plain")), *arguments[end:]]
    finally:
        asked.quiet, asked.plain = before.quiet, before.plain
