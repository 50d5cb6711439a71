"""What every command prints with: one place decides about width, colours, JSON and hints."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlkit2.terminal import asked, live, make_console

WIDTH = 160  # characters where standard output is not a terminal, so that nothing is wrapped in a file


def console(*, stderr: bool = False) -> Console:
    """Standard output, or standard error for what is said during long work: above the bar, while one moves there."""
    if stderr and live:
        return live[-1]
    stream = sys.stderr if stderr else sys.stdout
    return make_console(stderr=stderr, width=None if stream.isatty() else WIDTH)


def say(line: str, *, stderr: bool = False) -> None:
    """Print one line as it is."""
    console(stderr=stderr).print(line, markup=False, soft_wrap=True)


def say_next(*words: object) -> None:
    """Print the command that usually follows, quoted so that it can be pasted; nothing where the user asked for quiet."""
    if not asked.quiet:
        say(f"next: {shlex.join(map(str, words))}")


def print_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, title: str | None = None
) -> None:
    """Print a table whose first `left` columns are words and whose others are numbers.

    Where the terminal is too narrow, an interval stands below its number instead of being broken apart.
    """
    out, listed = console(), [list(cells) for cells in rows]
    table = _table(header, listed, left, title)
    if out.measure(table, options=out.options.update(width=10_000)).maximum > out.width:
        broken = [[cell.replace(" [", "\n[") for cell in cells] for cells in (header, *listed)]
        table = _table(broken[0], broken[1:], left, title)
    out.print(table)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int, title: str | None) -> Table:
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, collapse_padding=True, pad_edge=False
    )
    for index, name in enumerate(header):
        table.add_column(Text(name), justify="left" if index < left else "right")
    for cells in rows:
        table.add_row(*map(Text, cells))
    return table


def print_json(values: Mapping[str, Any]) -> None:
    """Print JSON; numbers that are not finite become null."""
    console().print_json(json.dumps(finite(values), allow_nan=False))


def finite(value: Any) -> Any:
    """The same with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
