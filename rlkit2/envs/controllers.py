"""Scripted controllers of Gymnasium's classic tasks, of the tabular four rooms and of the point mazes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import gymnasium
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from rlkit2.envs.gridworld import GridTables

Array = NDArray[Any]
Controller = Callable[[Any, Generator], Array]


def pendulum_controller(
    env: gymnasium.Env[Any, Any], pump: float = 1.0, stiffness: float = 10.0, damping: float = 2.0, catch: float = 0.5
) -> Controller:
    """Swing-up by energy shaping (Astrom and Furuta, 2000), then a linear catch, for Pendulum-v1.

    Args:
        env: unused.
        pump: torque per unit of missing energy and of velocity; smaller is slower.
        stiffness, damping: torque per radian and per radian/s near the top.
        catch: angle from the top, in radians, within which the linear rule takes over.
    """

    def act(observations: Array, generator: Generator) -> Array:
        angle, velocity = np.arctan2(observations[:, 1], observations[:, 0]), observations[:, 2]
        missing = 5 - (velocity**2 / 6 + 5 * np.cos(angle))
        swing = pump * missing * np.where(np.abs(velocity) < 0.1, np.copysign(1.0, velocity), velocity)
        balance = -(stiffness * angle + damping * velocity)
        torque = np.where(np.abs(angle) < catch, balance, swing)
        actions: Array = np.clip(torque, -2, 2).astype(np.float32)[:, None]
        return actions

    return act


def cart_pole_controller(
    env: gymnasium.Env[Any, Any], position: float = 0.1, velocity: float = 0.3, angle: float = 3.0, rate: float = 1.0
) -> Controller:
    """Sign of a linear rule for CartPole-v1: push right when the weighted sum of the four state variables is positive."""
    weights = np.array([position, velocity, angle, rate])

    def act(observations: Array, generator: Generator) -> Array:
        actions: Array = np.where(observations @ weights > 0, 1, 0)
        return actions

    return act


def grid_controller(tables: GridTables, discount: float) -> Controller:
    """Greedy policy of value iteration on the tables; equally good actions are drawn at random."""
    reward = np.einsum("san,san->sa", tables.transitions, tables.rewards)
    values, following = np.full(len(reward), -1.0), np.zeros(len(reward))
    while np.abs(following - values).max() > 1e-10:
        values = following
        action_values = reward + discount * tables.transitions @ values
        following = action_values.max(axis=1)
    best = action_values >= following[:, None] - 1e-8

    def act(observations: Array, generator: Generator) -> Array:
        ranks: Array = np.where(best[observations], generator.random((len(observations), best.shape[1])), -1.0)
        actions: Array = ranks.argmax(axis=1)
        return actions

    return act


def maze_controller(env: gymnasium.Env[Any, Any], stiffness: float = 10.0, damping: float = 1.0) -> Controller:
    """Shortest cell path to the goal with a proportional-derivative controller on the next waypoint, for Gymnasium-Robotics' point mazes."""
    maze = env.unwrapped.maze  # type: ignore[attr-defined]
    walls = np.array([[cell == 1 for cell in row] for row in maze.maze_map])

    @cache
    def cell_distances(goal: tuple[int, int]) -> Array:
        distances = np.full(walls.shape, np.inf)
        distances[goal] = 0
        for _ in range(walls.size):
            padded = np.pad(distances, 1, constant_values=np.inf)
            near = np.minimum.reduce([padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])
            distances = np.where(walls, np.inf, np.minimum(distances, near + 1))
        return distances

    def waypoint(position: Array, goal: Array) -> Array:
        here, there = (tuple(int(i) for i in maze.cell_xy_to_rowcol(xy)) for xy in (position, goal))
        if here == there:
            return goal
        distances = cell_distances((there[0], there[1]))
        around = [(here[0] + i, here[1] + j) for i, j in ((-1, 0), (1, 0), (0, -1), (0, 1))]
        center: Array = maze.cell_rowcol_to_xy(np.array(min(around, key=lambda cell: distances[cell])))
        return center

    def act(observations: dict[str, Array], generator: Generator) -> Array:
        state, goals = observations["observation"], observations["desired_goal"]
        targets = np.stack([waypoint(position, goal) for position, goal in zip(state[:, :2], goals, strict=True)])
        actions: Array = np.clip(stiffness * (targets - state[:, :2]) - damping * state[:, 2:], -1, 1).astype(
            np.float32
        )
        return actions

    return act
