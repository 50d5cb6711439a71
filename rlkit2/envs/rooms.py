"""Four rooms in the plane, stepped for n points at once in numpy.

The world is the square [-1, 1]^2, cut into four rooms by two walls of half-thickness 0.06 along the axes. Three doors join the rooms
in a row, north-west, south-west, south-east, north-east: the way from the start (south-west, close to the centre) to the goal
(north-east, close to the centre) leads away from the goal first, and the north-west room is a dead end.

    +-----------+-----------+
    |           |           |
    |    NW     |    NE     |
    |           |  G        |
    +--   ------+-------  --+
    |        S  |           |
    |    SW     |    SE     |
    |                       |
    +-----------+-----------+

A step moves a point by 0.06 per unit of action along x, then along y; each of the two legs ends where a wall begins, so no wall is
ever crossed. Transitions are deterministic, positions are float32, and the observation is the whole state: the position, or a picture of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Space
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.random import Generator
from numpy.typing import NDArray

from rlkit2.errors import ConfigError

Array = NDArray[Any]

SPEED = 0.06
WALL = 0.06
DOOR = 0.14
GOAL_RADIUS = 0.12
# Centres of the doors along each wall: the vertical wall (x = 0) has one in the south, the horizontal wall (y = 0) one on each side.
VERTICAL_WALL_DOORS = (-0.7,)
HORIZONTAL_WALL_DOORS = (-0.7, 0.7)
START = (-0.5, -0.5, -0.15, -0.15)
GOAL = (0.35, 0.35)
OBSERVATIONS = ("position", "image", "image_and_goal")
PIXELS = 32
BLUR = 0.05  # the point in an image is a Gaussian of this width, so that its place shows between the pixels, too


def _in_door(coordinate: Array, doors: Sequence[float]) -> Array:
    # The tolerance lets a point that was clipped to a door post in float32 still stand in the door.
    inside: Array = (np.abs(coordinate[..., None] - np.asarray(doors, np.float32)) <= DOOR + 1e-6).any(axis=-1)
    return inside


def _leg(
    position: Array, across: Array, move: Array, own_doors: Sequence[float], other_doors: Sequence[float]
) -> Array:
    """Move along one axis, clipped to the free interval around each point; `across` is the other coordinate.

    `own_doors` are the doors of the wall that this leg may meet, `other_doors` those of the wall whose doorway the point may stand in.
    """
    side = np.where(position > 0, 1.0, -1.0)
    low, high = np.where(side > 0, WALL, -1.0), np.where(side > 0, 1.0, -WALL)
    doors = np.asarray(other_doors)
    door = doors[np.argmin(np.abs(position[:, None] - doors), axis=1)]
    in_doorway, through = np.abs(across) < WALL, _in_door(across, own_doors)
    low = np.where(through, -1.0, np.where(in_doorway, door - DOOR, low))
    high = np.where(through, 1.0, np.where(in_doorway, door + DOOR, high))
    moved: Array = np.clip(position + move, low.astype(np.float32), high.astype(np.float32))
    return moved


def move(positions: Array, actions: Array) -> Array:
    """Positions after one step.

    Args:
        positions: [n, 2] float32, free points (see `is_free`).
        actions: [n, 2], clipped to [-1, 1].

    Returns:
        [n, 2] float32 free points.
    """
    step = np.float32(SPEED) * np.clip(actions, -1.0, 1.0).astype(np.float32)
    x = _leg(positions[:, 0], positions[:, 1], step[:, 0], VERTICAL_WALL_DOORS, HORIZONTAL_WALL_DOORS)
    y = _leg(positions[:, 1], x, step[:, 1], HORIZONTAL_WALL_DOORS, VERTICAL_WALL_DOORS)
    return np.stack((x, y), axis=1)


def is_free(positions: Array) -> Array:
    """Which points [..., 2] lie inside the world and in no wall: bool [...]."""
    x, y = np.moveaxis(np.asarray(positions, np.float32), -1, 0)
    in_vertical_wall = (np.abs(x) < np.float32(WALL)) & ~_in_door(y, VERTICAL_WALL_DOORS)
    in_horizontal_wall = (np.abs(y) < np.float32(WALL)) & ~_in_door(x, HORIZONTAL_WALL_DOORS)
    free: Array = ~in_vertical_wall & ~in_horizontal_wall & (np.abs(x) <= 1) & (np.abs(y) <= 1)
    return free


class Rooms:
    """The task: where episodes start, where they end, what a step earns. Holds no state; the environments below do.

    Args:
        reward: "sparse" (1 on reaching the goal, else 0) or "dense" (minus the straight distance to the goal after the step).
        start: box (x_low, y_low, x_high, y_high) from which starts are drawn uniformly, walls and goal left out.
        goal: centre of the goal, a disc of radius 0.12.
        observation: "position"; "image", the world from above, uint8 [32, 32, 3]; or "image_and_goal", a dictionary of an image without the goal and
            the goal's centre.

    Raises:
        ConfigError: unknown reward or observation, a goal inside a wall, or a start box without free points.
    """

    def __init__(
        self,
        reward: str = "sparse",
        start: Sequence[float] = START,
        goal: Sequence[float] = GOAL,
        observation: str = "position",
    ) -> None:
        if observation not in OBSERVATIONS:
            raise ConfigError(f"rooms: observation must be one of {', '.join(OBSERVATIONS)}, not {observation!r}")
        self.observation = observation
        if reward not in ("sparse", "dense"):
            raise ConfigError(f"rooms: reward must be 'sparse' or 'dense', not {reward!r}")
        if len(goal) != 2 or not is_free(np.asarray(goal, float)):
            raise ConfigError(f"rooms: goal must be a free point (x, y) of [-1, 1]^2, not {goal!r}")
        if len(start) != 4:
            raise ConfigError(f"rooms: start must be a box (x_low, y_low, x_high, y_high), not {start!r}")
        self.reward = reward
        self.goal = np.asarray(goal, np.float32)
        self.start_low, self.start_high = np.asarray(start[:2], np.float32), np.asarray(start[2:], np.float32)
        grid = np.stack(np.meshgrid(*np.linspace(self.start_low, self.start_high, 21).T), axis=-1).reshape(-1, 2)
        if np.any(self.start_low > self.start_high) or not np.any(is_free(grid) & ~self.at_goal(grid)):
            raise ConfigError(f"rooms: the start box {start!r} holds no free point outside the goal")

    @property
    def observation_space(self) -> Space[Any]:
        """What one point sees."""
        if self.observation == "position":
            return Box(-1.0, 1.0, (2,), np.float32)
        image = Box(0, 255, (PIXELS, PIXELS, 3), np.uint8)
        return image if self.observation == "image" else Dict(image=image, goal=Box(-1.0, 1.0, (2,), np.float32))

    def observe(self, positions: Array) -> Any:
        """What points at [n, 2] see, [n, ...], in memory of its own."""
        if self.observation == "position":
            return positions.copy()
        if self.observation == "image":
            return camera(positions, self.goal)
        return {"image": camera(positions), "goal": np.tile(self.goal, (len(positions), 1))}

    def hidden(self, positions: Array) -> dict[str, Any]:
        """What `info` holds: the positions, where the observations do not tell them."""
        return {} if self.observation == "position" else {"state": positions.copy()}

    def at_goal(self, positions: Array) -> Array:
        """Which points [n, 2] lie in the goal: bool [n]."""
        inside: Array = np.linalg.norm(positions - self.goal, axis=-1) <= GOAL_RADIUS
        return inside

    def draw_start(self, generator: Generator) -> Array:
        """One start position [2]."""
        while True:
            position = generator.uniform(self.start_low, self.start_high).astype(np.float32)
            if is_free(position) and not self.at_goal(position):
                return position

    def rewards(self, positions: Array, next_positions: Array, generators: Sequence[Generator]) -> Array:
        """Rewards [n] float64 of the steps; `generators` are there for tasks whose reward is noisy."""
        if self.reward == "sparse":
            return self.at_goal(next_positions).astype(np.float64)
        distances: Array = np.linalg.norm(next_positions.astype(np.float64) - self.goal, axis=-1)
        return -distances

    def step(self, positions: Array, actions: Array, generators: Sequence[Generator]) -> tuple[Array, Array, Array]:
        """Step n points: next positions [n, 2], rewards [n], terminations [n]."""
        next_positions = move(positions, actions)
        return next_positions, self.rewards(positions, next_positions, generators), self.at_goal(next_positions)


def picture(positions: Array, goal: Array, size: int = 200) -> Array:
    """The world seen from above, uint8 [size, size, 3]: walls dark, goal green, points red."""
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    pixels = np.stack(np.meshgrid(axis, -axis), axis=-1)
    image = np.where(is_free(pixels)[..., None], 255, 60).repeat(3, axis=-1).astype(np.uint8)
    image[np.linalg.norm(pixels - goal, axis=-1) <= GOAL_RADIUS] = (120, 200, 120)
    for position in positions:
        image[np.linalg.norm(pixels - position, axis=-1) <= 0.03] = (210, 40, 40)
    return image


def camera(positions: Array, goal: Array | None = None) -> Array:
    """What a camera above sees of each point [n, 2]: uint8 [n, 32, 32, 3], walls dark, goal green, the point a red spot."""
    axis = (np.arange(PIXELS) + 0.5) / PIXELS * 2 - 1
    nowhere = np.full(2, 9.0)
    world = picture(np.zeros((0, 2)), nowhere if goal is None else goal, PIXELS).astype(np.float32)
    across, up = (np.exp(-((line - positions[:, [i]]) ** 2) / (2 * BLUR**2)) for i, line in enumerate((axis, -axis)))
    share = (up[:, :, None] * across[:, None, :]).astype(np.float32)[..., None]
    image: Array = np.rint(world + share * (np.array([210, 40, 40], np.float32) - world)).astype(np.uint8)
    return image


ACTION_SPACE = Box(-1.0, 1.0, (2,), np.float32)


class RoomsEnv(gymnasium.Env[Any, Array]):
    """One point in the four rooms; keyword arguments are those of `Rooms`. Action: velocity in [-1, 1]^2."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 15}  # type: ignore[misc]
    task_class: ClassVar[type[Rooms]] = Rooms

    def __init__(self, render_mode: str | None = None, **task: Any) -> None:
        self.render_mode = render_mode
        self.task = self.task_class(**task)
        self.observation_space, self.action_space = self.task.observation_space, ACTION_SPACE
        self.position = np.zeros(2, np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.position = self.task.draw_start(self.np_random)
        return self._seen(), self.task.hidden(self.position)

    def step(self, action: Array) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        positions, rewards, terminations = self.task.step(
            self.position[None], np.asarray(action)[None], [self.np_random]
        )
        self.position = positions[0]
        return self._seen(), float(rewards[0]), bool(terminations[0]), False, self.task.hidden(self.position)

    def _seen(self) -> Any:
        seen = self.task.observe(self.position[None])
        return {name: part[0] for name, part in seen.items()} if isinstance(seen, dict) else seen[0]

    def render(self) -> Array | None:
        return picture(self.position[None], self.task.goal) if self.render_mode == "rgb_array" else None


class RoomsVectorEnv(VectorEnv[Any, Array, Array]):
    """`num_envs` points in the four rooms; sub-environment i reset with seed s + i draws what `RoomsEnv` draws with that seed.

    An episode that ended is reset by the next step (`AutoresetMode.NEXT_STEP`), whose reward is 0.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": ["rgb_array"],
        "render_fps": 15,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }
    task_class: ClassVar[type[Rooms]] = Rooms

    def __init__(
        self, num_envs: int = 1, max_episode_steps: int | None = None, render_mode: str | None = None, **task: Any
    ) -> None:
        super().__init__()
        self.num_envs, self.max_episode_steps, self.render_mode = num_envs, max_episode_steps, render_mode
        self.task = self.task_class(**task)
        self.single_observation_space, self.single_action_space = self.task.observation_space, ACTION_SPACE
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.generators: list[Generator] = [seeding.np_random()[0] for _ in range(num_envs)]
        self.positions = np.zeros((num_envs, 2), np.float32)
        self.elapsed = np.zeros(num_envs, np.int64)
        self.ended = np.zeros(num_envs, bool)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        seeds = (
            [seed + i for i in range(self.num_envs)]
            if isinstance(seed, int | np.integer)
            else (seed or [None] * self.num_envs)
        )
        self.generators = [
            generator if own is None else seeding.np_random(int(own))[0]
            for own, generator in zip(seeds, self.generators, strict=True)
        ]
        self.elapsed[:], self.ended[:] = 0, False
        self.positions = np.stack([self.task.draw_start(generator) for generator in self.generators])
        return self.task.observe(self.positions), self.task.hidden(self.positions)

    def step(self, actions: Array) -> tuple[Any, Array, Array, Array, dict[str, Any]]:
        alive, resetting = np.flatnonzero(~self.ended), np.flatnonzero(self.ended)
        rewards, terminations = np.zeros(self.num_envs), np.zeros(self.num_envs, bool)
        self.positions[alive], rewards[alive], terminations[alive] = self.task.step(
            self.positions[alive], np.asarray(actions)[alive], [self.generators[i] for i in alive]
        )
        self.elapsed[alive] += 1
        for i in resetting:
            self.positions[i], self.elapsed[i] = self.task.draw_start(self.generators[i]), 0
        limit = np.inf if self.max_episode_steps is None else self.max_episode_steps
        truncations = self.elapsed >= limit
        self.ended = terminations | truncations
        seen, info = self.task.observe(self.positions), self.task.hidden(self.positions)
        return seen, rewards, terminations, truncations, info

    def render(self) -> tuple[Array, ...] | None:
        if self.render_mode != "rgb_array":
            return None
        return tuple(picture(position[None], self.task.goal) for position in self.positions)
