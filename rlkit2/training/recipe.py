"""Recipes: TOML files with everything a run needs, and the configs and overrides that are read in the same way.

agent = "odice"
dataset = "zoo/hopper/medium-replay-v0"
[config]      # fields of the agent's config
[data]        # fields of DataOptions
[training]    # fields of TrainingOptions
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import itertools
import os
import tokenize
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rlkit2.agents import agent_class, plain_name
from rlkit2.errors import ConfigError
from rlkit2.recipes import recipe_folder
from rlkit2.training.options import DataOptions, TrainingOptions

SECTIONS = {"data": DataOptions, "training": TrainingOptions}


@dataclass(frozen=True)
class Recipe:
    """One recipe: the agent's config and the options that were given; what was not given keeps its default."""

    path: Path
    agent: str
    dataset: str
    config: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any]


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read and check a recipe file.

    Raises:
        ConfigError: the file is missing, no TOML, or has an unknown section, agent or field, or a value of the wrong type.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"recipe {path} does not exist") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"recipe {path} is no readable TOML: {error}") from error
    for name in ("agent", "dataset"):
        if not isinstance(content.get(name), str):
            raise ConfigError(f'recipe {path} does not name its {name}; add a line {name} = "..." at the top')
    known = {"agent", "dataset", "config", *SECTIONS}
    for name, value in content.items():
        if name not in known:
            raise ConfigError(f"recipe {path} has an unknown entry {name!r}{_hint(name, known)}")
        if name not in ("agent", "dataset") and not isinstance(value, dict):
            raise ConfigError(f"recipe {path}: {name} must be a section, [{name}]")
    try:
        config = read_fields(agent_class(content["agent"]).config_class, content.get("config", {}))
        sections = {name: read_fields(cls, content.get(name, {})) for name, cls in SECTIONS.items()}
    except ConfigError as error:
        raise ConfigError(f"recipe {path}: {error}") from error
    return Recipe(path, content["agent"], content["dataset"], config, **sections)


def find_recipe(agent: str, dataset: str) -> Recipe | None:
    """The shipped recipe `agents/<agent>/*.toml` for a dataset, or None; a preset without a folder of its own shares its agent's."""
    try:
        folder = recipe_folder("agents")
    except ConfigError:
        return None
    name = agent if (folder / agent).is_dir() else plain_name(agent)
    for path in sorted((folder / name).glob("*.toml")):
        recipe = load_recipe(path)
        if recipe.dataset == dataset and recipe.agent == name:
            return recipe
    return None


def read_overrides(config_class: type[Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Fields from `name=value` texts, values as in TOML; text needs no quotes.

    Raises:
        ConfigError: no `=`, an unknown field, or a value of the wrong type.
    """
    values = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is no setting; write name=value")
        try:
            values[name.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            values[name.strip()] = {"True": True, "False": False}.get(text.strip(), text.strip())
    return read_fields(config_class, values)


def read_fields(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Check values from TOML, JSON or the command line against the fields of a dataclass and give them the fields' types.

    Raises:
        ConfigError: an unknown field or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    fields = {}
    for name, value in values.items():
        if name not in names:
            raise ConfigError(f"{cls.__name__} has no field {name!r}{_hint(name, names)}")
        try:
            fields[name] = _read(value, hints[name])
        except TypeError as error:
            raise ConfigError(f"{cls.__name__}.{name} must be {_describe(hints[name])}, not {value!r}") from error
    return fields


def describe_fields(cls: type[Any]) -> list[tuple[str, str, Any, str]]:
    """Name, type, default and meaning (the comment behind it, or above it, in the source) of every field of a config."""
    comments = _comments(cls)
    hints = typing.get_type_hints(cls)
    rows = []
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        rows.append((field.name, _describe(hints[field.name]), default, comments.get(field.name, "")))
    return rows


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
    return found


def _read(value: Any, hint: Any) -> Any:
    """`value` as the annotated type; TypeError where it is none."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or (value == "none" and type(None) in arguments):
            hint = type(None)
            value = None
        for argument in arguments:
            try:
                return _read(value, argument)
            except TypeError:
                continue
        raise TypeError
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise TypeError
    if origin is tuple and isinstance(value, (list, tuple)):
        if arguments[1:] == (Ellipsis,):
            return tuple(_read(item, arguments[0]) for item in value)
        if len(arguments) == len(value):
            return tuple(_read(item, argument) for item, argument in zip(value, arguments, strict=True))
        raise TypeError
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():  # 1e6
        return int(value)
    if hint is type(None) and value is None:
        return None
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise TypeError


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return "[" + ", ".join("..." if argument is Ellipsis else _describe(argument) for argument in arguments) + "]"
    plain = {type(None): "none", float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    return plain.get(hint, str(hint))


def _hint(name: str, known: typing.Iterable[str]) -> str:
    close = get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(known))}"
