"""Arguments by tyro, with what does not fit said in one line, as every other error is."""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from difflib import get_close_matches
from io import StringIO
from typing import Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes

from rlkit2.data.reading import ReadingOptions
from rlkit2.errors import ConfigError

HowToRead = Annotated[ReadingOptions, OmitArgPrefixes]
"""The options of a command that opens a dataset."""
AS_IS = ReadingOptions()


def command(function: Callable[..., int | None], arguments: Sequence[str], *, prog: str, **options: Any) -> int | None:
    """Call `function` with what the arguments say; its signature is the options, its docstring the help and their meaning.

    Args:
        options: further arguments of `tyro.cli`.

    Raises:
        ConfigError: an unknown option, a value missing or of the wrong type.
        SystemExit: after `--help`.
    """

    return bound(function, arguments, prog=prog, **options)()


def bound(
    function: Callable[..., int | None], arguments: Sequence[str], *, prog: str, **options: Any
) -> Callable[[], int | None]:
    """`function` with what the arguments say, to be called without any; raises as `command`."""

    @functools.wraps(function)
    def bind(*values: Any, **named: Any) -> Callable[[], int | None]:
        return lambda: function(*values, **named)

    found: Callable[[], int | None] = parse(bind, arguments, prog=prog, description=help_text(function), **options)
    return found


def help_text(function: Callable[..., Any]) -> str:
    """A function's docstring up to its arguments: what the command does, and an example."""
    return (inspect.getdoc(function) or "").partition("\n\nArgs:")[0].strip()


def subcommand(
    group: str, commands: Mapping[str, Callable[..., int | None]], arguments: Sequence[str], **options: Any
) -> int | None:
    """Find one command of a group and call it as `command` does.

    Raises:
        ConfigError: unknown command, or as `command`.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, commands))
        lines = [f"  {name:<{width}}  {summary(function)}" for name, function in commands.items()]
        more = f"rlkit2 {group} COMMAND --help explains a command and shows an example."
        sys.stdout.write("\n".join([f"usage: rlkit2 {group} COMMAND [OPTIONS]", "", *lines, "", more, ""]))
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in commands:
        close = get_close_matches(name, commands, 1)
        hint = f"did you mean {close[0]}?" if close else f"commands: {', '.join(commands)}"
        raise ConfigError(f"unknown command '{group} {name}'; {hint}")
    return command(commands[name], rest, prog=f"rlkit2 {group} {name}", **options)


def summary(function: Callable[..., Any]) -> str:
    """The first line of a function's docstring as a phrase."""
    first = help_text(function).partition("\n")[0].rstrip(".")
    return first[0].lower() + first[1:]


def name_values(texts: Sequence[str], option: str) -> dict[str, Any]:
    """`["timeout_min=5", "partition=gpu"]` as a dictionary; a value is read as JSON (numbers, true, [64, 64]) where it is that, else as text.

    Raises:
        ConfigError: no equals sign.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{option} {text!r} is not a setting; write name=value")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def as_seeds(text: str) -> int | list[int]:
    """`4`, a number of seeds, or `3,7`, the seeds themselves.

    Raises:
        ConfigError: neither.
    """
    try:
        return [int(part) for part in text.split(",") if part.strip()] if "," in text else int(text)
    except ValueError as error:
        raise ConfigError(f"--seeds must be a number of seeds or seeds with commas between, not {text!r}") from error


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
