"""The tabular four rooms of Sutton, Precup and Singh (1999, "Between MDPs and semi-MDPs", section 2), with all of its tables.

States are the 104 free cells in reading order, actions are up, right, down, left. A move into a wall stays; with probability `slip`
the move goes in one of the three other directions. Entering the goal earns 1 and ends the episode; in the tables the goal absorbs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, Space
from numpy.typing import NDArray

from rlkit2.errors import ConfigError

if TYPE_CHECKING:
    from rlkit2.rewards.mdp import TabularMDP

Array = NDArray[Any]

LAYOUT = """\
#############
#     #     #
#     #     #
#           #
#     #     #
#     #     #
## ####     #
#     ### ###
#     #     #
#     #     #
#           #
#     #     #
#############"""
MOVES = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])
START_ROOM = ((8, 1), (11, 5))


@dataclass(frozen=True)
class GridTables:
    """The gridworld as arrays.

    Attributes:
        transitions: [S, A, S] probabilities of the next state.
        rewards: [S, A, S] reward of each transition.
        initial_distribution: [S], uniform over the south-west room.
        goal: index of the absorbing state.
        cells: [S, 2] row and column of each state.
    """

    transitions: Array
    rewards: Array
    initial_distribution: Array
    goal: int
    cells: Array

    def mdp(self, discount: float) -> TabularMDP:
        """The exact process, for the reward metrics: `starc_distance(tables.rewards, other, tables.mdp(0.95))`."""
        from rlkit2.rewards.mdp import TabularMDP

        return TabularMDP(self.transitions, discount, self.initial_distribution)


def four_rooms_tables(slip: float = 0.1, goal: tuple[int, int] = (3, 9)) -> GridTables:
    """Transition tensor, rewards and initial distribution of the tabular four rooms.

    Args:
        slip: probability in [0, 1) that a move goes in one of the three other directions.
        goal: row and column of the goal cell.

    Raises:
        ConfigError: slip out of range, or a goal that is not a free cell.
    """
    if not 0 <= slip < 1:
        raise ConfigError(f"gridworld: slip must lie in [0, 1), not {slip}")
    free = np.array([[cell == " " for cell in row] for row in LAYOUT.splitlines()])
    cells = np.argwhere(free)
    index = np.full(free.shape, -1)
    index[tuple(cells.T)] = np.arange(len(cells))
    if not (0 <= goal[0] < free.shape[0] and 0 <= goal[1] < free.shape[1] and free[tuple(goal)]):
        raise ConfigError(f"gridworld: goal {goal} is not a free cell (row, column)")
    goal_state = int(index[tuple(goal)])

    reached = index[tuple(np.moveaxis(cells[:, None] + MOVES, -1, 0))]
    reached = np.where(reached < 0, np.arange(len(cells))[:, None], reached)
    outcomes = np.eye(len(cells))[reached]
    transitions = (1 - slip) * outcomes + slip / 3 * (outcomes.sum(axis=1, keepdims=True) - outcomes)
    transitions[goal_state] = np.eye(len(cells))[goal_state]
    rewards = np.zeros_like(transitions)
    rewards[:, :, goal_state] = 1.0
    rewards[goal_state] = 0.0
    (top, left), (bottom, right) = START_ROOM
    initial: Array = np.all((cells >= (top, left)) & (cells <= (bottom, right)), axis=1)
    initial[goal_state] = False
    return GridTables(transitions, rewards, initial / initial.sum(), goal_state, cells)


class GridRoomsEnv(gymnasium.Env[Any, np.int64]):
    """The tabular four rooms as an environment.

    Args:
        slip, goal: see `four_rooms_tables`.
        observation: "cell", the number of the cell, or "image", the world from above, uint8 [26, 26, 3].
        start: "room" draws starts from the tables' initial distribution, "anywhere" from all cells but the goal.

    `P[state][action]` lists `(probability, next_state, reward, terminated)`, as Gymnasium's toy-text environments do.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 8}  # type: ignore[misc]

    def __init__(
        self,
        slip: float = 0.1,
        goal: tuple[int, int] = (3, 9),
        start: str = "room",
        render_mode: str | None = None,
        observation: str = "cell",
    ) -> None:
        if observation not in ("cell", "image"):
            raise ConfigError(f"gridworld: observation must be 'cell' or 'image', not {observation!r}")
        if start not in ("room", "anywhere"):
            raise ConfigError(f"gridworld: start must be 'room' or 'anywhere', not {start!r}")
        self.tables = four_rooms_tables(slip, (goal[0], goal[1]))
        self.render_mode = render_mode
        self.state = 0
        states, actions = self.tables.transitions.shape[:2]
        self.observation = observation
        self.observation_space: Space[Any] = Discrete(states)
        if observation == "image":
            self.observation_space = Box(0, 255, self._picture(2).shape, np.uint8)
        self.action_space = Discrete(actions)
        anywhere = np.arange(states) != self.tables.goal
        self.initial_state_distrib = self.tables.initial_distribution if start == "room" else anywhere / anywhere.sum()
        self._cumulative = self.tables.transitions.cumsum(axis=-1)
        self._cumulative[..., -1] = 1.0

    @cached_property
    def P(self) -> dict[int, dict[int, list[tuple[float, int, float, bool]]]]:
        tables = self.tables
        return {
            s: {
                a: [
                    (float(tables.transitions[s, a, n]), int(n), float(tables.rewards[s, a, n]), bool(n == tables.goal))
                    for n in np.flatnonzero(tables.transitions[s, a])
                ]
                for a in range(tables.transitions.shape[1])
            }
            for s in range(tables.transitions.shape[0])
        }

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = int(self.np_random.choice(len(self.initial_state_distrib), p=self.initial_state_distrib))
        return self._seen()

    def step(self, action: np.int64) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        before = self.state
        self.state = int(np.searchsorted(self._cumulative[before, action], self.np_random.random(), side="right"))
        reward = float(self.tables.rewards[before, action, self.state])
        seen, info = self._seen()
        return seen, reward, self.state == self.tables.goal, False, info

    def _seen(self) -> tuple[Any, dict[str, Any]]:
        """The observation, and the state in `info` where it does not tell."""
        if self.observation == "image":
            return self._picture(2), {"state": self.state}
        return np.int64(self.state), {}

    def render(self) -> Array | None:
        return self._picture(12) if self.render_mode == "rgb_array" else None

    def _picture(self, pixels: int) -> Array:
        """The world from above, `pixels` wide and high a cell."""
        rows = LAYOUT.splitlines()
        image = np.full((len(rows), len(rows[0]), 3), 60, np.uint8)
        image[tuple(self.tables.cells.T)] = 255
        image[tuple(self.tables.cells[self.tables.goal])] = (120, 200, 120)
        image[tuple(self.tables.cells[self.state])] = (210, 40, 40)
        return image.repeat(pixels, axis=0).repeat(pixels, axis=1)
