"""From a dataset's specification to environments that fit its policies."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from typing import TYPE_CHECKING, Any

import gymnasium as gym
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import FrameStackObservation

from rlkit2.data.known_environments import check_named_id, registered_spec
from rlkit2.data.spaces import action_layout, flattener
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import EnvironmentUnavailableError, MissingExtraError, RLKitError, require

if TYPE_CHECKING:
    from rlkit2.training.run import Run

Env = gym.Env[Any, Any]
EnvSource = str | EnvSpec | Callable[[], Env]

# What shows in an entry point or an import error -> (what is missing, the extra that installs it).
SIMULATORS = {
    "gymnasium_robotics": ("gymnasium-robotics", "robotics"),
    "mujoco": ("MuJoCo", "mujoco"),
    "box2d": ("Box2D", "box2d"),
}


def evaluation_source(spec: DatasetSpec, env: EnvSource | None = None, *, trust_env: bool = False) -> EnvSource:
    """The environment to evaluate in: `env` if given, else the dataset's evaluation environment, else the one it was collected in.

    The dataset's is rebuilt from Gymnasium's registry; with `trust_env` it is built as the file says, which runs the code it names.

    Raises `EnvironmentUnavailableError` where there is none, or the file names code that is not registered here.
    """
    if env is not None:
        return env
    stored = spec.eval_env_spec or spec.env_spec
    if stored is None:
        raise EnvironmentUnavailableError(
            f"dataset {spec.id} names no environment; name one with --env ID (env=... in Python)"
        )
    return registered_spec(stored, f"dataset {spec.id}", trust_env=trust_env)


def run_environment(run: Run, *, trust_env: bool = False) -> str | None:
    """The id that a run was told to evaluate in, None for its dataset's environment.

    Raises `EnvironmentUnavailableError` where the run's file names a module to import (`module:Env-v0`), unless `trust_env`.
    """
    name = run.config.get("env")
    if name is not None:
        check_named_id(name, str(run.path), trust_env=trust_env)
    return name


def source_name(source: EnvSource) -> str:
    """A short name of an environment source for messages and reports."""
    if isinstance(source, EnvSpec):
        return source.id
    return source if isinstance(source, str) else getattr(source, "__name__", type(source).__name__)


def make_environment(source: EnvSource) -> Env:
    """One environment, wrappers and keyword arguments of its specification included.

    Raises `MissingExtraError` naming the extra of a missing simulator, `EnvironmentUnavailableError` for an unknown id or anything else that fails.
    """
    try:
        if isinstance(source, EnvSpec):
            with redirect_stderr(StringIO()):  # what simulators print when they are imported
                return gym.make(source, disable_env_checker=True)
        if isinstance(source, str):
            return gym.make(_registered(source), disable_env_checker=True)
        return source()
    except RLKitError:
        raise
    except Exception as error:
        raise _unavailable(source, error) from error


def stacked_environment(source: EnvSource, spec: DatasetSpec) -> Env:
    """One environment whose observations are stacked as those of `spec`; raises as `make_environment`."""
    env = make_environment(source)
    return env if spec.frame_stack == 1 else FrameStackObservation(env, spec.frame_stack)


def _registered(name: str) -> str:
    """The id, after loading the packages of ours and Farama's that register theirs only on import."""
    importlib.import_module("rlkit2.envs")
    try:
        gym.spec(name)
    except gym.error.Error:
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
    if isinstance(error, gym.error.UnregisteredEnv):
        reason += " (ids of another package are written module:ID; PointMaze, AntMaze, Fetch, Adroit and Kitchen need rlkit2[robotics])"
    return EnvironmentUnavailableError(
        f"environment {name} cannot be built: {reason}; name another with --env ID (env=... in Python)"
    )


def check_spaces(env: Env, spec: DatasetSpec, name: str) -> None:
    """Raise `EnvironmentUnavailableError` unless observations and actions of `env` have the layout the dataset's policies work in."""
    try:
        rows = flattener(env.observation_space, spec.observation_keys)
    except RLKitError as error:
        raise EnvironmentUnavailableError(f"environment {name} does not fit dataset {spec.id}: {error}") from error
    expected = spec.flattener
    if rows.size != expected.size or rows.ranges != expected.ranges:
        raise EnvironmentUnavailableError(
            f"environment {name} gives observations of {_layout(rows.size, rows.ranges)}, "
            f"the policy of dataset {spec.id} expects {_layout(expected.size, expected.ranges)}"
        )
    theirs, ours = action_layout(env.action_space), action_layout(spec.action_space)
    if (theirs.shape, theirs.dtype) != (ours.shape, ours.dtype) or _choices(env.action_space) != _choices(
        spec.action_space
    ):
        raise EnvironmentUnavailableError(
            f"environment {name} takes actions in {env.action_space}, the policy of dataset {spec.id} gives actions in {spec.action_space}"
        )


def _layout(size: int, ranges: dict[str, tuple[int, int]]) -> str:
    keys = ", ".join(f"{key} {stop - start}" for key, (start, stop) in ranges.items() if key)
    return f"{size} columns" + (f" ({keys})" if keys else "")


def _choices(space: spaces.Space[Any]) -> Any:
    """Sizes and first values of choices; None for others."""
    return [int(space.n), int(space.start)] if isinstance(space, spaces.Discrete) else action_layout(space).choices
