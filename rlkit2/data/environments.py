"""Environments by what somebody names them with: an id, a file or module of the user's own, a specification, a function, or one that is there."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from typing import Any, TypeAlias

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from rlkit2.errors import ConfigError, EnvironmentUnavailableError, MissingExtraError, RLKitError, require
from rlkit2.user_code import attribute_of, import_place

Env: TypeAlias = gym.Env[Any, Any]
EnvSource: TypeAlias = str | EnvSpec | Env | Callable[[], Env]
"""Text is an id of Gymnasium's (`Hopper-v5`, `package:Env-v0`), or `file.py:NAME` or `package.module:NAME`, a function or class that makes one."""

# What shows in an entry point or an import error -> (what is missing, the extra that installs it).
SIMULATORS = {
    "gymnasium_robotics": ("gymnasium-robotics", "robotics"),
    "mujoco": ("MuJoCo", "mujoco"),
    "box2d": ("Box2D", "box2d"),
}
FORMS = (
    "an id (ids of another package: module:ID), file.py:NAME or module:NAME of a function or class that makes one without arguments; PointMaze, "
    "AntMaze, Fetch, Adroit and Kitchen need rlkit2[robotics]"
)


def source_name(source: EnvSource) -> str:
    """A short name of an environment source for messages and reports."""
    if isinstance(source, EnvSpec):
        return source.id
    if isinstance(source, gym.Env):
        return source.spec.id if source.spec is not None else type(source.unwrapped).__name__
    return source if isinstance(source, str) else getattr(source, "__name__", type(source).__name__)


def named_source(source: EnvSource) -> EnvSource:
    """The source itself, or what a name of the user's own code (`file.py:make_env`, `module:Class`) stands for, which is imported.

    To be called with what a user has typed, never with what a file says.

    Raises:
        EnvironmentUnavailableError: there is no such file, module or name in it, or its code fails.
    """
    if not isinstance(source, str) or ":" not in source:
        return source
    place, _, called = source.rpartition(":")
    try:
        module = import_place(place)
        if not place.endswith(".py") and _is_registered(called):
            return source
        found = attribute_of(module, place, called)
    except ConfigError as error:
        raise EnvironmentUnavailableError(
            f"environment {source} cannot be built: {error}; name it by {FORMS}"
        ) from error
    if isinstance(found, EnvSpec | gym.Env) or callable(found):
        return found  # type: ignore[no-any-return]
    raise EnvironmentUnavailableError(
        f"environment {source} cannot be built: {called} is a {type(found).__name__}; name it by {FORMS}"
    )


def make_environment(source: EnvSource, *, render_mode: str | None = None) -> Env:
    """One environment, wrappers and keyword arguments of its specification included; one that is there already is given as it is.

    Args:
        source: see `EnvSource`.
        render_mode: asked for where it is given; what makes environments of the user's own is asked only if it takes an argument of that name.

    Raises:
        MissingExtraError: a simulator is missing; the message names the extra.
        EnvironmentUnavailableError: an unknown id or anything else that fails.
    """
    asked: dict[str, Any] = {} if render_mode is None else {"render_mode": render_mode}
    try:
        found = named_source(source)
        if isinstance(found, gym.Env):
            return found
        if isinstance(found, EnvSpec):
            with redirect_stderr(StringIO()):  # what simulators print when they are imported
                return gym.make(found, disable_env_checker=True, **asked)
        if isinstance(found, str):
            return gym.make(_registered(found), disable_env_checker=True, **asked)
        made = found(**(asked if _takes(found, "render_mode") else {}))
        if not isinstance(made, gym.Env):
            raise TypeError(f"it gave a {type(made).__name__}, which is not a gymnasium.Env")
        return made
    except RLKitError:
        raise
    except Exception as error:
        raise _unavailable(source, error) from error


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has an argument of that name."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # not written in Python
        return False
    return name in parameters or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())


def _is_registered(name: str) -> bool:
    try:
        gym.spec(name)
    except gym.error.Error:
        return False
    return True


def _registered(name: str) -> str:
    """The id, after loading the packages of ours and Farama's that register theirs only on import."""
    importlib.import_module("rlkit2.envs")
    if not _is_registered(name):
        try:
            gym.register_envs(require("gymnasium_robotics", extra="robotics"))
        except MissingExtraError:
            return name
    return name


def _unavailable(source: EnvSource, error: Exception) -> RLKitError:
    name = source_name(source)
    entry = source.entry_point if isinstance(source, EnvSpec) else ""
    if isinstance(error, ImportError | gym.error.DependencyNotInstalled):
        text = f"{entry} {error}".lower()
        for word, (simulator, extra) in SIMULATORS.items():
            if word in text:
                return MissingExtraError(
                    f"environment {name} needs {simulator}, which is not installed; install it with: pip install 'rlkit2[{extra}]'"
                )
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, gym.error.UnregisteredEnv) or "No registered env" in reason:
        reason += f" (an environment is named by {FORMS})"
    return EnvironmentUnavailableError(
        f"environment {name} cannot be built: {reason}; name another with --env (env=... in Python)"
    )
