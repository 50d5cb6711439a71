"""From a dataset's specification to environments that fit its policies."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import FrameStackObservation
from numpy.typing import NDArray

from rlkit2.data.environments import Env, EnvSource, make_environment
from rlkit2.data.known_environments import check_named_id, registered_spec
from rlkit2.data.spaces import ROUNDING, SpaceFlattener, action_bounds, action_layout, flattener, observation_bounds
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import EnvironmentUnavailableError, RLKitError

if TYPE_CHECKING:
    from rlkit2.training.run import Run


class EnvironmentWarning(UserWarning):
    """An environment is used that differs from the data in a way that numbers depend on."""


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
            f"dataset {spec.id} names no environment; name one with --env ID or --env my_envs.py:make_env (env=... in Python)"
        )
    return registered_spec(stored, f"dataset {spec.id}", trust_env=trust_env)


def run_environment(run: Run, *, trust_env: bool = False) -> str | None:
    """What a run was told to evaluate in, None for its dataset's environment.

    Raises `EnvironmentUnavailableError` where the run's file names code to import (`module:Env-v0`, `file.py:make`) that is not loaded, unless
    `trust_env`.
    """
    name = run.config.get("env")
    if name is not None:
        check_named_id(name, str(run.path), trust_env=trust_env)
    return name


def stacked_environment(source: EnvSource, spec: DatasetSpec, *, render_mode: str | None = None) -> Env:
    """One environment whose observations are stacked as those of `spec`; raises as `make_environment`."""
    env = make_environment(source, render_mode=render_mode)
    return env if spec.frame_stack == 1 else FrameStackObservation(env, spec.frame_stack)


def check_spaces(env: Env, spec: DatasetSpec, name: str) -> None:
    """Raise `EnvironmentUnavailableError` unless observations and actions of `env` have the layout the dataset's policies work in.

    An `EnvironmentWarning` says where bounds are others than in the data: nothing is rescaled.
    """
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
    if _bytes(rows) != _bytes(expected):
        raise EnvironmentUnavailableError(
            f"environment {name} gives observations in {env.observation_space}, the policy of dataset {spec.id} expects {spec.observation_space}: "
            "bytes and other numbers are not the same"
        )
    theirs, ours = action_layout(env.action_space), action_layout(spec.action_space)
    if (theirs.shape, theirs.dtype) != (ours.shape, ours.dtype) or _choices(env.action_space) != _choices(
        spec.action_space
    ):
        raise EnvironmentUnavailableError(
            f"environment {name} takes actions in {env.action_space}, the policy of dataset {spec.id} gives actions in {spec.action_space}"
        )

    if theirs.choices is None and ours.shape:
        found = _other_bounds(action_bounds(env.action_space), action_bounds(spec.action_space))
        if found:
            warnings.warn(
                f"environment {name} takes actions in {found[0]}, the policy of dataset {spec.id} gives {found[1]}{found[2]}: nothing is "
                "rescaled, and what lies outside of the environment's bounds is clipped (gymnasium.wrappers.RescaleAction changes its units)",
                EnvironmentWarning,
                stacklevel=3,
            )
    found = _other_bounds(observation_bounds(rows), observation_bounds(expected), finite=True)
    if found:
        warnings.warn(
            f"environment {name} gives observations in {found[0]}, those of dataset {spec.id} lie in {found[1]}{found[2]}: nothing is rescaled",
            EnvironmentWarning,
            stacklevel=3,
        )


def _bytes(flat: SpaceFlattener) -> list[bool]:
    """Which entries of observations are bytes."""
    return [leaf.space.dtype == np.uint8 for leaf in flat.leaves]


Ends = tuple[NDArray[Any], NDArray[Any]]


def _other_bounds(theirs: Ends, ours: Ends, *, finite: bool = False) -> tuple[str, str, str] | None:
    """The first column whose bounds differ by more than rounding: theirs, ours, and which it is of how many; None where they agree.

    `finite`: only where both have bounds.
    """
    theirs, ours = ((low.astype(np.float64), high.astype(np.float64)) for low, high in (theirs, ours))
    with np.errstate(invalid="ignore"):  # of two infinite ones
        width = np.maximum(theirs[1] - theirs[0], ours[1] - ours[0])
        slack = ROUNDING * np.where(np.isfinite(width), width, 1.0)
        apart = [np.abs(a - b) > slack for a, b in zip(theirs, ours, strict=True)]
    differ = apart[0] | apart[1]
    if finite:
        differ &= np.isfinite([*theirs, *ours]).all(0)
    if not differ.any():
        return None
    column = int(differ.argmax())
    texts = [f"{low[column]:g} to {high[column]:g}" for low, high in (theirs, ours)]
    alike = all(len(np.unique(end)) == 1 for end in (*theirs, *ours))
    return texts[0], texts[1], "" if alike else f" (column {column}; {int(differ.sum())} of {len(differ)} differ)"


def _layout(size: int, ranges: dict[str, tuple[int, int]]) -> str:
    keys = ", ".join(f"{key} {stop - start}" for key, (start, stop) in ranges.items() if key)
    return f"{size} columns" + (f" ({keys})" if keys else "")


def _choices(space: spaces.Space[Any]) -> Any:
    """Sizes and first values of choices; None for others."""
    return [int(space.n), int(space.start)] if isinstance(space, spaces.Discrete) else action_layout(space).choices
