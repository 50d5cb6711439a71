"""Steps the environments of a group of seeds, and comes back to where they were after a kill.

An episode is reset by a seed of its own, which the seed of the run, the number of the environment and that of the episode decide. What it was at any
step is therefore known from that number and its actions, which the replay holds: a resumed run plays an episode in progress again up to where it
was, and sees by every observation, reward and flag whether it came back there. No environment has to say how its state can be saved. One that does
not come back (its steps depend on more than its seed and actions) begins a new episode instead; the old one is cut at its last transition.

There is no automatic reset: an environment whose episode has ended is reset before the next step, so that every step of an environment is a
transition, and none leads from the end of an episode to the beginning of the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlkit2.data.environments import Env, EnvSource, named_source, source_name
from rlkit2.data.spaces import action_bounds, action_layout
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import ConfigError, EpisodeError, RLKitError, first_line
from rlkit2.evaluation.environments import check_spaces, stacked_environment
from rlkit2.evaluation.rollouts import environment_actions, stack, step_action
from rlkit2.online.exploration import Explorer
from rlkit2.online.replay import Replay

ENDED, RETURNS, LENGTHS, LOWEST, HIGHEST = range(5)  # columns of a seed's tally


def refuse_instance() -> NoReturn:
    """Raise `ConfigError`: an environment that is there cannot serve several seeds and evaluation at once."""
    raise ConfigError(
        "training online makes environments, for every seed and for evaluation: give an id, file.py:NAME or a function that makes one, not an "
        "environment that is there"
    )


def try_source(source: EnvSource, spec: DatasetSpec) -> None:
    """See that environments can be made and fit, before anything is written.

    Raises:
        ConfigError: an environment that is there.
        EnvironmentUnavailableError: it cannot be made, or has other spaces.
    """
    if isinstance(named_source(source), gym.Env):
        refuse_instance()
    env = stacked_environment(source, spec)
    check_spaces(env, spec, source_name(source))
    env.close()


class Collector:
    """`num_envs` environments for each seed.

    Args:
        source: what an environment is made from.
        spec: of the observations and actions.
        seeds: the integers that name the seeds.
        replay: where transitions go.
        explorer: chooses actions.

    Attributes:
        episodes: how many each environment has begun, `[S, E]`.
        began: how many rows the replay had when its current one did, `[S, E]`.
        tally: of each seed since the last log line the episodes that ended, their returns and lengths in all; the smallest and largest
            reward ever, `[S, 5]`.
    """

    def __init__(
        self, source: EnvSource, spec: DatasetSpec, seeds: Sequence[int], replay: Replay, explorer: Explorer
    ) -> None:
        self.spec, self.seeds, self.replay, self.explorer = spec, tuple(seeds), replay, explorer
        self.name, self.flat, self.layout = source_name(source), spec.flattener, action_layout(spec.action_space)
        shape = (len(seeds), replay.num_envs)
        self.envs: list[list[Env]] = [[stacked_environment(source, spec) for _ in range(shape[1])] for _ in seeds]
        self.space = self.envs[0][0].action_space
        self.bounds = action_bounds(self.space)
        self.rows = np.zeros((*shape, *self.flat.shape), self.flat.dtype)
        self.episodes, self.began = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        self.earned = np.zeros(shape)
        self.tally = np.zeros((len(seeds), 5))
        self.tally[:, LOWEST], self.tally[:, HIGHEST] = np.inf, -np.inf

    # One step of all

    def collect(self, step: int) -> None:
        """One transition of every environment; `step`: how many each seed has.

        Raises:
            EpisodeError: an environment raises, or gives numbers that are none; nothing of this step is kept.
        """
        before = self.explorer.state()
        try:
            self._collect(step)
        except EpisodeError:
            self.explorer.load_state(before)
            raise

    def _collect(self, step: int) -> None:
        """What can fail comes first, then it is kept."""
        shape = self.episodes.shape
        if not self.replay.count:
            self._begin(list(np.ndindex(shape)))
        actions = self.stored(self.explorer.act(self.rows, step).reshape(*shape, -1))
        taken = environment_actions(actions, self.space)
        rewards, terminated, truncated = np.zeros(shape), np.zeros(shape, bool), np.zeros(shape, bool)
        seen = []
        for key in np.ndindex(shape):
            observation, rewards[key], terminated[key], truncated[key] = self._step(key, taken[key])
            seen.append(observation)
        try:
            following = self._flattened(seen).reshape(self.rows.shape)
        except Exception as error:
            raise self._failed(error, "step", (0, 0)) from error
        self._require_numbers(following)
        ended = [(int(s), int(e)) for s, e in np.argwhere(terminated | truncated)]
        fresh = [self._reset(key) for key in ended]
        self.replay.add(
            {
                "observations": self.rows,
                "actions": actions.reshape(*shape, *self.layout.shape),
                "rewards": rewards,
                "next_observations": following,
                "terminations": terminated,
                "truncations": truncated,
            }
        )
        self.rows = following
        self.earned += rewards
        self.tally[:, LOWEST] = np.minimum(self.tally[:, LOWEST], rewards.min(1))
        self.tally[:, HIGHEST] = np.maximum(self.tally[:, HIGHEST], rewards.max(1))
        for s, e in ended:
            length = (self.replay.count - self.began[s, e]) // shape[1]
            self.tally[s, [ENDED, RETURNS, LENGTHS]] += 1, self.earned[s, e], length
        self._begin(ended, fresh)

    def _begin(self, keys: Sequence[tuple[int, ...]], rows: Sequence[NDArray[Any]] | None = None) -> None:
        """New episodes, from their first observations (default: those of a reset now)."""
        rows = [self._reset(key) for key in keys] if rows is None else rows
        for key, row in zip(keys, rows, strict=True):
            self.rows[key], self.earned[key], self.began[key] = row, 0.0, self.replay.count
            self.episodes[key] += 1

    def stored(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Actions `[S, E, n]` as the environment takes them and the replay keeps them: in its bounds, in the types that data have."""
        if self.layout.dtype == np.float32:
            actions = np.nan_to_num(actions)  # of a policy that has diverged: its seed stops at the next log line
            actions = np.clip(actions, *self.bounds)
        kept: NDArray[Any] = actions.astype(self.layout.dtype)
        return kept

    def episode_seed(self, key: tuple[int, ...]) -> int:
        """What the environment is reset with for the episode after those that it has begun: below those of evaluations."""
        words = np.random.SeedSequence([self.seeds[key[0]], key[1], int(self.episodes[key])]).generate_state(1)
        return int(words[0]) >> 2

    def _reset(self, key: tuple[int, ...]) -> NDArray[Any]:
        try:
            observation, _ = self.envs[key[0]][key[1]].reset(seed=self.episode_seed(key))
            row: NDArray[Any] = self._flattened([observation])[0]
            return row
        except Exception as error:
            raise self._failed(error, "reset", key) from error

    def _step(self, key: tuple[int, ...], action: NDArray[Any]) -> tuple[Any, float, bool, bool]:
        try:
            observation, reward, terminated, truncated, _ = self.envs[key[0]][key[1]].step(
                step_action(action, self.space)
            )
            reward = float(reward)
        except Exception as error:
            raise self._failed(error, "step", key) from error
        if not math.isfinite(reward):
            raise self._failed(ValueError(f"the reward was {reward}"), "step", key)
        return observation, reward, bool(terminated), bool(truncated)

    def _flattened(self, observations: Sequence[Any]) -> NDArray[Any]:
        return self.flat.flatten(stack(observations)).astype(self.flat.dtype)

    def _require_numbers(self, rows: NDArray[Any]) -> None:
        if rows.dtype.kind == "f" and not np.isfinite(rows).all():
            key = tuple(np.argwhere(~np.isfinite(rows))[0][:2])
            raise self._failed(ValueError("the observation holds values that are not numbers"), "step", key)

    def _failed(self, error: Exception, what: str, key: tuple[int, ...]) -> RLKitError:
        """What the environment raised, or gave, in words that let it be found again."""
        if isinstance(error, RLKitError):
            return error
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        number = (self.replay.count - self.began[key]) // self.episodes.shape[1] + 1
        where = f"step {number}" if what == "step" else "the reset"
        return EpisodeError(
            f"environment {self.name} failed in {where} of an episode of seed {self.seeds[key[0]]} (environment {key[1]}, at {self.replay.count} "
            f"transitions): {kind}{first_line(error)}"
        )

    # Checkpoints

    def state(self) -> dict[str, Tensor]:
        """Which episodes are going on and what was counted, each with the seed axis in front."""
        return {
            "online.episodes": torch.tensor(self.episodes),
            "online.began": torch.tensor(self.began),
            "online.tally": torch.tensor(self.tally),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
        """Continue from `state()`, with the replay of then; returns the environments `(seed's place, number)` that did not come back."""
        self.episodes, self.began = state["online.episodes"].numpy().copy(), state["online.began"].numpy().copy()
        self.tally = state["online.tally"].numpy().copy()
        lost = []
        for key in np.ndindex(self.episodes.shape) if self.replay.count else ():
            if not self._play_again(key):
                lost.append(key)
                if self.began[key] < self.replay.count:
                    self.replay.cuts[key[0]].add(self.replay.count - self.episodes.shape[1] + key[1])
                self._begin([key])
        return lost

    def _play_again(self, key: tuple[int, ...]) -> bool:
        """Whether the episode in progress, played again, is the same in every bit."""
        s, e = key
        self.episodes[key] -= 1  # those before it
        try:
            row = self._reset(key)
            self.earned[key] = 0.0
            past = self.replay.past(s, slice(int(self.began[key]) + e, self.replay.count, self.episodes.shape[1]))
            columns = past["actions"].reshape(1, len(past["actions"]), max(1, math.prod(self.layout.shape)))
            for t, action in enumerate(environment_actions(columns, self.space)[0]):
                observation, reward, *ends = self._step(key, action)
                following = self._flattened([observation])[0]
                if not (
                    np.array_equal(row, past["observations"][t])
                    and np.array_equal(following, past["next_observations"][t])
                    and np.float32(reward) == past["rewards"][t]
                    and ends == [past["terminations"][t], past["truncations"][t]]
                ):
                    return False
                row, self.earned[key] = following, self.earned[key] + reward
            self.rows[key] = row
        except EpisodeError:
            return False
        finally:
            self.episodes[key] += 1
        return True

    def close(self) -> None:
        """Close the environments."""
        for env in (env for own in self.envs for env in own):
            env.close()
