"""Small environments that do odd things, and an offline run to continue in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

import rlkit2
from rlkit2.training import Run
from tests.training.tiny_problem import ACTIONS, Walk, tiny_dataset

DATASET = tiny_dataset()
QUICK: dict[str, Any] = {
    "progress": False,
    "log_every": 7,
    "eval_every": 20,
    "checkpoint_every": 15,
    "eval_episodes": 2,
}


class LongWalk(Walk):
    """Terminates when the first observation is large, is cut off after seven steps, and depends on its own last action."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, _, _, info = super().step(action)
        self._observation = (observation + 0.1 * np.sum(action)).astype(np.float32)
        return self._observation, reward, bool(self._observation[0] > 1.5), self._step == 7, info


class Forgetful(LongWalk):
    """What it does depends on a count that no reset resets."""

    steps = 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        type(self).steps += 1
        observation, reward, _, truncated, info = super().step(action)
        return observation + np.float32(type(self).steps), reward, False, truncated, info


class Breaking(LongWalk):
    """Fails at one step of the run, once."""

    at, error, steps = 50, ZeroDivisionError("a joint is broken"), 0
    reward: float | None = None
    observation: float | None = None

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        cls = type(self)
        cls.steps += 1
        observation, reward, terminated, truncated, info = super().step(action)
        if cls.steps == cls.at:
            if cls.reward is not None:
                return observation, cls.reward, terminated, truncated, info
            if cls.observation is not None:
                return observation * np.float32(cls.observation), reward, terminated, truncated, info
            raise cls.error
        return observation, reward, terminated, truncated, info


class Narrow(LongWalk):
    action_space = spaces.Box(-1.0, 1.0, ACTIONS.shape, np.float32)


class Wide(LongWalk):
    action_space = spaces.Box(-1.0, 1.0, (3,), np.float32)


def offline_run(folder: Path, agent: str = "sacn", seeds: int = 2, **options: Any) -> Run:
    """A few updates of a tiny agent."""
    from rlkit2.agents import agent_class

    fields = agent_class(agent).config_class.__dataclass_fields__
    sizes = {name: (8,) for name in fields if name.endswith("hidden_sizes")}
    more = {"num_critics": 3} if "num_critics" in fields and agent in ("sacn", "edac") else {}
    return rlkit2.train(
        agent, DATASET, seeds=seeds, out=folder, steps=20, eval_every=0, batch_size=8, progress=False,
        overrides={**sizes, **more, **options.pop("overrides", {})}, **options,
    )  # fmt: skip


def online(run: Run | Path, folder: Path, **options: Any) -> Run:
    """That run continued in an environment, for 60 steps in three of them, unless said otherwise."""
    return rlkit2.train_online(
        run, DATASET, **{"steps": 60, "num_envs": 3, "warmup": 10, "env": LongWalk, "out": folder, **QUICK, **options}
    )
