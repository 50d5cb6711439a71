"""Arguments by tyro, with what does not fit said in one line, as every other error is."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import tyro

from rlkit2.errors import ConfigError


def command(
    function: Callable[..., int | None], arguments: Sequence[str], *, prog: str, description: str
) -> int | None:
    """Call `function` with what the arguments say; its signature and docstring are the options and their help.

    Raises:
        ConfigError: an unknown option, a value missing or of the wrong type.
        SystemExit: after `--help`.
    """

    @functools.wraps(function)
    def bind(*values: Any, **options: Any) -> Callable[[], int | None]:
        return lambda: function(*values, **options)

    bound: Callable[[], int | None] = parse(bind, arguments, prog=prog, description=description)
    return bound()


def parse(target: Any, arguments: Sequence[str], *, prog: str, **options: Any) -> Any:
    """`tyro.cli`, whose framed errors become a `ConfigError` of one line."""
    with redirect_stderr(StringIO()) as text:
        try:
            return tyro.cli(target, args=arguments, prog=prog, **options)
        except SystemExit as end:
            if not end.code:
                raise
    framed = text.getvalue()
    close = re.search(r"Perhaps you meant:\W*?(--[\w-]+)", framed)
    hint = f"did you mean {close[1]}?" if close else f"{prog} --help shows all options"
    raise ConfigError(f"{one_line(framed) or 'the arguments cannot be read'}; {hint}")


def one_line(framed: str) -> str:
    """The words of a message between its title and its first rule (or frame), in one line."""
    found: list[str] = []
    for line in framed.splitlines()[1:]:
        words = line.strip(" │╰╯")
        if words and not words.strip("─-"):
            if found:
                break
            continue
        found.append(words)
    return " ".join(" ".join(found).split()).rstrip(".")
