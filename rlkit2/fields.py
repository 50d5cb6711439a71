"""Fields of configurations and options: their types, ranges and meanings, written once in the dataclass and checked in one place.

    @dataclass(frozen=True)
    class Options(Checked):
        # gamma
        discount: Annotated[float, Interval("[0, 1]")] = 0.99
        # what the targets are: each member's own, or their minimum
        target: Literal["independent", "min"] = "min"

The comment above a field is its help. Values from TOML, JSON, Python or the command line go through the same check.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import itertools
import math
import numbers
import operator
import os
import re
import tokenize
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar

import numpy as np

from rlkit2.errors import ConfigError

Function = TypeVar("Function", bound=Callable[..., Any])
_BOUNDS = {"[": operator.ge, "(": operator.gt, "]": operator.le, ")": operator.lt}


@dataclass(frozen=True)
class Interval:
    """The numbers a field may hold, as mathematics writes them: `"(0, 1]"`, `"[1, inf)"`. Not a number lies in none.

    Args:
        text: two bounds in round (excluded) or square (included) brackets.
    """

    text: str

    def __contains__(self, value: float) -> bool:
        low, high = self.text[1:-1].split(",")
        return bool(_BOUNDS[self.text[0]](value, float(low)) and _BOUNDS[self.text[-1]](value, float(high)))

    def __str__(self) -> str:
        low, high = (part.strip() for part in self.text[1:-1].split(","))
        if high != "inf":
            return f"in {self.text}"
        return "that is finite" if low == "-inf" else f"of at least {low}" if self.text[0] == "[" else f"above {low}"


@dataclass(frozen=True)
class Ascending:
    """Two numbers, the smaller first."""

    def __contains__(self, pair: tuple[float, float]) -> bool:
        return pair[0] < pair[1]

    def __str__(self) -> str:
        return "with the smaller first"


@dataclass(frozen=True)
class Pattern:
    """Text of one form.

    Args:
        text: regular expression of the whole text.
        meaning: the form in words, for messages.
    """

    text: str
    meaning: str

    def __contains__(self, value: str) -> bool:
        return re.fullmatch(self.text, value) is not None

    def __str__(self) -> str:
        return f"such as {self.meaning}"


Rule = Interval | Ascending | Pattern

# What most fields are.
Count = Annotated[int, Interval("[1, inf)")]
Natural = Annotated[int, Interval("[0, inf)")]
Positive = Annotated[float, Interval("(0, inf)")]
NonNegative = Annotated[float, Interval("[0, inf)")]
Finite = Annotated[float, Interval("(-inf, inf)")]
Fraction = Annotated[float, Interval("[0, 1]")]
Rate = Annotated[float, Interval("(0, 1]")]
Inside = Annotated[float, Interval("(0, 1)")]
Bounds = Annotated[tuple[Finite, Finite], Ascending()]
Widths = tuple[Count, ...]


@dataclass(frozen=True)
class Checked:
    """Base of dataclasses whose fields are checked when they are made; a subclass adds what concerns several fields in its own `__post_init__`.

    Raises:
        ConfigError: a value is of another type, not among the choices, or outside its range.
    """

    def __post_init__(self) -> None:
        checked = read_fields(type(self), {name: getattr(self, name) for name in field_types(type(self))})
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def field_types(cls: type[Any]) -> dict[str, Any]:
    """The annotated type of every field that is given at construction, ranges included."""
    if cls not in _TYPES:
        _TYPES[cls] = _resolve(cls)
    return _TYPES[cls]


_TYPES: dict[type[Any], dict[str, Any]] = {}


def _resolve(cls: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def read_fields(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Check values from TOML, JSON or the command line against the fields of a dataclass and give them the fields' types.

    Raises:
        ConfigError: an unknown field, a value of another type, not among the choices, or outside its range.
    """
    known = field_types(cls)
    fields = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{cls.__name__} has no field {name!r}{closest(name, known)}")
        try:
            fields[name] = read_value(value, known[name])
        except TypeError as error:
            raise ConfigError(f"{name} must be {describe_type(known[name])}, not {value!r}") from error
    return fields


def read_value(value: Any, hint: Any) -> Any:
    """`value` as the annotated type, in its range.

    Raises:
        TypeError: it is of another type, not among the choices, or outside its range.
    """
    if isinstance(value, np.generic):  # a name or number out of an array
        value = value.item()
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        read = read_value(value, arguments[0])
        if all(read in rule for rule in arguments[1:] if isinstance(rule, Rule)):
            return read
        raise TypeError
    if origin in (typing.Union, types.UnionType):
        if value is None or (value == "none" and type(None) in arguments):
            hint = type(None)
            value = None
        for argument in arguments:
            try:
                return read_value(value, argument)
            except TypeError:
                continue
        raise TypeError
    if origin is Literal:
        if any(value == argument and type(value) is type(argument) for argument in arguments):
            return value
        raise TypeError
    if origin is tuple and isinstance(value, (list, tuple)):
        if arguments[1:] == (Ellipsis,):
            return tuple(read_value(item, arguments[0]) for item in value)
        if len(arguments) == len(value):
            return tuple(read_value(item, argument) for item, argument in zip(value, arguments, strict=True))
        raise TypeError
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        return _as_float(value)
    if hint is int and isinstance(value, numbers.Real) and not isinstance(value, bool):
        return _as_int(value)  # 1e6 is a whole number
    if hint is type(None) and value is None:
        return None
    if hint is Any:
        return value
    plain = origin or hint
    if isinstance(plain, type) and isinstance(value, plain) and plain not in (int, float):
        return value
    raise TypeError


def read_text(text: str | Iterable[str] | bool, hint: Any) -> Any:
    """A value typed on a command line (several words for a tuple) as what `read_value` takes for that type.

    Raises:
        TypeError: it cannot be one.
    """
    if isinstance(text, bool):
        return text
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return read_text(text, arguments[0])
    if origin in (typing.Union, types.UnionType):
        if text == "none" and type(None) in arguments:
            return None
        return read_text(text, next(argument for argument in arguments if argument is not type(None)))
    if origin is tuple:
        words = text.split() if isinstance(text, str) else list(text)
        return [read_text(word, arguments[0]) for word in words]
    if not isinstance(text, str):
        raise TypeError
    if hint in (int, float):
        try:
            return float(text) if hint is float or not text.lstrip("+-").isdecimal() else int(text)
        except ValueError as error:
            raise TypeError from error
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise TypeError
        return text.lower() == "true"
    return text


def read_texts(cls: type[Any], texts: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a dataclass from what was typed for them; see `read_text` and `read_fields`.

    Raises:
        ConfigError: as `read_fields`.
    """
    known = field_types(cls)
    values: dict[str, Any] = {}
    for name, text in texts.items():
        try:
            values[name] = read_text(text, known[name]) if name in known else text
        except TypeError:
            values[name] = text if isinstance(text, str | bool) else " ".join(text)  # refused below, by name and type
    return read_fields(cls, values)


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise TypeError from error


def _as_int(value: Any) -> int:
    if isinstance(value, numbers.Integral):
        return int(value)
    if math.isfinite(value) and float(value).is_integer():
        return int(value)
    raise TypeError


def describe_type(hint: Any) -> str:
    """A type in words: "a number in (0, 1]", "a whole number of at least 1", "one of a, b", "[a number, ...] or none"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return " ".join([describe_type(arguments[0]), *(str(rule) for rule in arguments[1:] if isinstance(rule, Rule))])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return (
            "[" + ", ".join("..." if argument is Ellipsis else describe_type(argument) for argument in arguments) + "]"
        )
    plain = {type(None): "none", float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    return plain.get(hint, getattr(origin or hint, "__name__", str(hint)))


def describe_fields(cls: type[Any]) -> list[tuple[str, str, Any, str]]:
    """Name, type, default and meaning (the comment above it, or behind it, in the source) of every field of a config."""
    comments = _comments(cls)  # type: ignore[arg-type]  # a metaclass might have no hash
    hints = field_types(cls)
    rows = []
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        rows.append((field.name, describe_type(hints[field.name]), default, comments.get(field.name, "")))
    return rows


def show_fields(
    *classes: type[Any], unset: bool = False, bare: bool = False, without: Collection[str] = ()
) -> Callable[[Function], Function]:
    """Decorate a function with `**options` by the signature and the docstring of the fields of some dataclasses.

    Args:
        classes: dataclasses whose fields it takes; its docstring has a line `**options: ...`, which theirs replace.
        unset: the default of every argument is None, which stands for the field's.
        bare: say what a field means alone, where its type and default are shown anyway.
        without: fields that the function has as arguments of its own.
    """

    def show(function: Function) -> Function:
        signature = inspect.signature(function)
        shown = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        lines = []
        for cls in classes:
            for name, kind, default, meaning in describe_fields(cls):
                if name in without:
                    continue
                annotation, value = field_types(cls)[name], None if unset else default
                shown.append(
                    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=annotation)
                )
                function.__annotations__[name] = annotation  # what tyro and typing.get_type_hints read
                ending = "" if "default:" in meaning else f" (default {default})"
                lines.append(
                    f"        {name}: {meaning}.\n" if bare else f"        {name}: {meaning}{ending}; {kind}.\n"
                )
        doc = function.__doc__ or ""
        start = doc.index("        **options:")
        end = doc.index("\n", start) + 1
        function.__doc__ = doc[:start] + "".join(lines) + doc[end:]
        function.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
        return function

    return show


@functools.cache
def _comments(cls: type[Any]) -> dict[str, str]:
    """Comments on field definitions, base classes first."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        above: list[str] = []
        name = ""
        tokens = list(tokenize.generate_tokens(io.StringIO(inspect.cleandoc("\n" + inspect.getsource(base))).readline))
        for token, following in itertools.pairwise(tokens):
            if token.type == tokenize.NAME and following.string == ":" and token.start[1] == 4:
                name = token.string
                found[name] = " ".join(above)
                above = []
            elif token.type == tokenize.COMMENT:
                text = token.string.lstrip("#: ")
                if token.line.lstrip().startswith("#"):
                    above.append(text)
                elif name:
                    found[name] = f"{found[name]} {text}".strip()
            elif token.type == tokenize.NEWLINE:
                name = ""
                above = []
    return found


def closest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest known one, or all of them."""
    known = list(known)
    close = get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(known))}"
