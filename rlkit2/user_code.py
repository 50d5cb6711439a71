"""Code of the user's own, by what was typed for it: `path/file.py:NAME` or `package.module:NAME`. One way in for agents, environments and rewards.

To be called with what a user has typed, never with what a file says.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from rlkit2.errors import ConfigError, first_line
from rlkit2.fields import closest


def import_place(place: str) -> ModuleType:
    """The module of a file (`path/file.py`) or of a name (`package.module`, also from the current folder); runs that code.

    A file's module is called by its stem, so that it is found again; it finds modules beside it, as a script does.

    Raises:
        ConfigError: no such file or module, another module of that name is loaded, or the code fails.
    """
    try:
        return _file_module(Path(place)) if place.endswith(".py") else _module(place)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{place} cannot be imported: {type(error).__name__}: {first_line(error)}") from error


def is_loaded(place: str) -> bool:
    """Whether that file or module has been imported."""
    if not place.endswith(".py"):
        return place in sys.modules
    loaded = getattr(sys.modules.get(Path(place).stem), "__file__", None)
    return loaded is not None and Path(loaded).resolve() == Path(place).resolve()


def attribute_of(module: ModuleType, place: str, name: str) -> Any:
    """What `place` calls `name`.

    Raises:
        ConfigError: nothing.
    """
    try:
        return getattr(module, name)
    except AttributeError as error:
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise ConfigError(f"{place} has no {name!r}{closest(name, own) if own else ''}") from error


def typed_again(name: str) -> str:
    """What to type for `name` from any folder: `/path/file.py:NAME` for a file, else the name as it is."""
    place, colon, called = name.rpartition(":")
    return f"{Path(place).resolve()}:{called}" if colon and place.endswith(".py") else name


def _file_module(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise ConfigError(f"{path} does not exist")
    loaded = sys.modules.get(path.stem)
    if loaded is not None:
        if is_loaded(str(path)):
            return loaded
        raise ConfigError(f"the name {path.stem} is taken by another module; rename {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} cannot be imported")
    if (
        str(path.parent) not in sys.path
    ):  # at the end: the file shall find its neighbours, and nothing else shall find them first
        sys.path.append(str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def _module(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:  # the command is a script: Python puts its folder there, not the current one
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)
