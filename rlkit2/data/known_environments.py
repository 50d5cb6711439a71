"""The environment that a file names, rebuilt from what is installed here: nothing that the file names is imported, called or opened.

A stored `EnvSpec` names code in several places: the entry point, the vector entry point, the entry points of further wrappers, an id written
`module:Env-v0`, and arguments that name files or classes. What is used instead is what Gymnasium's registry holds under the id.
"""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator
from typing import Any

from gymnasium import wrappers
from gymnasium.envs.registration import EnvSpec, WrapperSpec, registry

from rlkit2.errors import EnvironmentUnavailableError, MissingExtraError, require
from rlkit2.user_code import is_loaded

# Environment packages that may be imported because a file needs them -> the module that registers their ids.
PACKAGES = {
    "gymnasium": "gymnasium",
    "gymnasium_robotics": "gymnasium_robotics",
    "rlkit2": "rlkit2.envs",
    "minigrid": "minigrid",
    "ale_py": "ale_py",
}
EXTRAS = {"gymnasium_robotics": "robotics"}
# Gymnasium's wrappers that neither write files nor open windows, by class; their arguments are plain values.
WRAPPERS = (
    *("TimeLimit", "OrderEnforcing", "PassiveEnvChecker", "Autoreset", "RecordEpisodeStatistics"),
    *("FlattenObservation", "FilterObservation", "RescaleObservation", "TimeAwareObservation", "FrameStackObservation"),
    *("GrayscaleObservation", "ResizeObservation", "ReshapeObservation", "NormalizeObservation", "DtypeObservation"),
    *("ClipAction", "RescaleAction", "StickyAction", "ClipReward", "NormalizeReward", "MaxAndSkipObservation"),
)
MEND = "name an environment with --env ID (env=... in Python), or --trust-env (trust_env=True) if you trust who made it"
_PLAIN = re.compile(r"[\w +,()-]*(\.xml)?")  # neither a path, nor a dotted name of a class, nor module:attribute


def registered_spec(spec: EnvSpec, owner: str, *, trust_env: bool = False) -> EnvSpec:
    """The specification to build in place of `spec`, which was read from a file of `owner` ("dataset x", "run y").

    Entry points are the registry's, or those of a class that is registered under another id; arguments, time limit and harmless wrappers of
    Gymnasium stay as stored. `trust_env` gives `spec` as it is.

    Raises `EnvironmentUnavailableError` in one line that shows what would be imported, called or opened; `MissingExtraError` where a known package
    is not installed.
    """
    if trust_env or callable(spec.entry_point):  # a callable never came out of a file
        return spec
    name = f"environment {spec.id} of {owner}"
    check_named_id(spec.id, owner)
    here = _registered(spec, name)
    if spec.vector_entry_point and _package(spec.vector_entry_point) not in {*PACKAGES, _package(here.entry_point)}:
        raise _refused(f"{name} would import {spec.vector_entry_point} as its vector entry point")
    check_arguments(spec.kwargs, here.kwargs, name)
    changed = copy.copy(spec)
    changed.entry_point, changed.vector_entry_point = here.entry_point, here.vector_entry_point
    changed.additional_wrappers = tuple(_wrapper(wrapper, name) for wrapper in spec.additional_wrappers)
    return changed


def check_named_id(name: str, owner: str, *, trust_env: bool = False) -> None:
    """Raise `EnvironmentUnavailableError` for an environment out of a file of `owner` that names code to import (`module:Env-v0`, `file.py:make`),
    unless that is loaded."""
    place, colon, _ = name.rpartition(":")
    if colon and not trust_env and not is_loaded(place):
        raise EnvironmentUnavailableError(
            f"environment {name} of {owner} would import {place}; name it yourself with --env {shlex.quote(name)} (env=... in Python), or another "
            "one, or --trust-env (trust_env=True) if you trust who made it"
        )


def check_arguments(arguments: dict[str, Any], known: dict[str, Any], name: str) -> None:
    """Raise `EnvironmentUnavailableError` for arguments out of a file that may name a file or a class, unless they are `known` (registered)."""
    for key, value in arguments.items():
        if key in known and known[key] == value:
            continue
        for text in _texts(value):
            if not _PLAIN.fullmatch(text):
                raise _refused(f"{name} would be built with {key}={text[:80]!r}, which may name a file or a class")


def _registered(spec: EnvSpec, name: str) -> EnvSpec:
    """What the registry holds for a stored specification."""
    entry = spec.entry_point
    assert entry is None or isinstance(entry, str)
    package = _package(entry)
    if spec.id not in registry and package in PACKAGES:
        try:
            require(PACKAGES[package], extra=EXTRAS.get(package, package))
        except MissingExtraError as error:
            if package in EXTRAS:
                raise
            raise EnvironmentUnavailableError(
                f"{name} needs {package}; install it with: pip install {package}"
            ) from error
    here = registry.get(spec.id)
    if here is not None and (entry is None or entry == here.entry_point or _moved(entry, here.entry_point)):
        return here
    for other in list(registry.values()):
        if entry is not None and other.entry_point == entry:
            return other
    if here is not None:
        raise _refused(f"{name} would import {entry}, but {spec.id} is registered here as {here.entry_point}")
    if entry is None:
        raise EnvironmentUnavailableError(
            f"{name} is not registered here; import the package that registers it, or name another with --env ID (env=...)"
        )
    raise _refused(f"{name} would import {entry}, which is not an environment registered here")


def _wrapper(wrapper: WrapperSpec, name: str) -> WrapperSpec:
    """The wrapper of Gymnasium that a stored one names."""
    module, _, kind = str(wrapper.entry_point).partition(":")
    if _package(module) != "gymnasium" or kind not in WRAPPERS or not hasattr(wrappers, kind):
        raise _refused(f"{name} would import {wrapper.entry_point} as a wrapper")
    check_arguments(dict(wrapper.kwargs or {}), {}, f"{name}, wrapper {kind},")
    return WrapperSpec(kind, f"gymnasium.wrappers:{kind}", wrapper.kwargs)


def _moved(stored: str, here: Any) -> bool:
    """Whether two entry points are the same class of one package, which other versions keep in other modules."""
    return isinstance(here, str) and (_package(stored), stored.partition(":")[2]) == (
        _package(here),
        here.partition(":")[2],
    )


def _package(entry: Any) -> str:
    return (
        re.split(r"[.:]", entry)[0] if isinstance(entry, str) else str(getattr(entry, "__module__", "")).split(".")[0]
    )


def _texts(value: Any) -> Iterator[str]:
    """All text within a value that came out of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _refused(what: str) -> EnvironmentUnavailableError:
    return EnvironmentUnavailableError(f"{what}; {MEND}")
