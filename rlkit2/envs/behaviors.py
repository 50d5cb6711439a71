"""Behaviour policies by name. A behaviour acts for n episodes at once: `behavior(observations, generator) -> actions [n, ...]`.

A behaviour may keep state for each of its n episodes (a target, an action it holds), so make a new one for each batch of episodes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete
from numpy.random import Generator
from numpy.typing import NDArray

from rlkit2.envs.controllers import cart_pole_controller, grid_controller, maze_controller, pendulum_controller
from rlkit2.envs.geodesic import geodesic_behavior
from rlkit2.envs.gridworld import GridRoomsEnv
from rlkit2.envs.rooms import RoomsEnv
from rlkit2.errors import ConfigError

Array = NDArray[Any]
Behavior = Callable[[Any, Generator], Array]


def _count(observations: Any) -> int:
    return _count(next(iter(observations.values()))) if isinstance(observations, dict) else len(observations)


def _uniform_actions(space: gymnasium.Space[Any], count: int, generator: Generator) -> Array:
    if isinstance(space, Discrete):
        discrete: Array = space.start + generator.integers(space.n, size=count)
        return discrete
    if isinstance(space, Box) and space.is_bounded():
        return generator.uniform(space.low, space.high, size=(count, *space.shape)).astype(space.dtype)
    raise ConfigError(f"random actions need a Discrete or a bounded Box action space, not {space}")


def _random(env: gymnasium.Env[Any, Any], hold: float = 1.0) -> Behavior:
    """Uniform actions, each held for `hold` steps on average."""
    if hold < 1:
        raise ConfigError(f"hold must be at least 1 step, not {hold}")
    held: Array | None = None

    def act(observations: Any, generator: Generator) -> Array:
        nonlocal held
        count = _count(observations)
        fresh = _uniform_actions(env.action_space, count, generator)
        if held is not None and len(held) == count:
            keep = generator.random(count) >= 1 / hold
            fresh[keep] = held[keep]
        held = fresh
        return fresh.copy()

    return act


def _rooms(env: gymnasium.Env[Any, Any], targets: Sequence[Sequence[float]] | None = None) -> Behavior:
    """Shortest way to the goal, or from one of the targets to another."""
    task = _core(env, RoomsEnv, "rooms").task
    return geodesic_behavior([task.goal.tolist()] if targets is None else targets)


def _grid(env: gymnasium.Env[Any, Any], discount: float = 0.95) -> Behavior:
    """Optimal policy of the tabular four rooms."""
    return grid_controller(_core(env, GridRoomsEnv, "grid").tables, discount)


def _core(env: gymnasium.Env[Any, Any], kind: type[Any], name: str) -> Any:
    if not isinstance(env.unwrapped, kind):
        raise ConfigError(f"policy {name!r} acts in {kind.__name__} only, not in {type(env.unwrapped).__name__}")
    return env.unwrapped


# name -> maker(env, **options); add an entry to use a behaviour of your own in recipes.
BEHAVIORS: dict[str, Callable[..., Behavior]] = {
    "random": _random,
    "rooms": _rooms,
    "grid": _grid,
    "pendulum": pendulum_controller,
    "cartpole": cart_pole_controller,
    "maze": maze_controller,
}


def make_behavior(
    name: str, env: gymnasium.Env[Any, Any], *, noise: float = 0.0, epsilon: float = 0.0, **options: Any
) -> Behavior:
    """A behaviour policy for n episodes of an environment.

    Args:
        name: a key of `BEHAVIORS`.
        env: the environment acted in, asked for its spaces and its layout only.
        noise: standard deviation of Gaussian noise on continuous actions, in units of half the action range.
        epsilon: probability of a uniform action instead, at each step.
        options: of the behaviour itself.

    Raises:
        ConfigError: unknown name or option, or noise on discrete actions.
    """
    if name not in BEHAVIORS:
        raise ConfigError(f"unknown policy {name!r}; policies: {', '.join(BEHAVIORS)}")
    known = list(inspect.signature(BEHAVIORS[name]).parameters)[1:]
    if unknown := [option for option in options if option not in known]:
        raise ConfigError(f"policy {name!r} has no option {unknown[0]!r}; options: {', '.join(known) or 'none'}")
    space = env.action_space
    if noise and not isinstance(space, Box):
        raise ConfigError(f"noise needs continuous actions, but those of {name!r} here are {space}; use epsilon")
    inner = BEHAVIORS[name](env, **options)

    def act(observations: Any, generator: Generator) -> Array:
        actions = inner(observations, generator)
        if noise and isinstance(space, Box):
            half = (space.high - space.low) / 2
            noisy = actions + noise * half * generator.standard_normal(actions.shape)
            actions = np.clip(noisy, space.low, space.high).astype(space.dtype)
        if epsilon:
            swap = generator.random(len(actions)) < epsilon
            actions[swap] = _uniform_actions(space, len(actions), generator)[swap]
        return actions

    return act
