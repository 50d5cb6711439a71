"""A small dataset, its environment and small agents: what the tests of training train."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

from rlkit2.agents import Agent
from rlkit2.agents.bc import BC, BCConfig
from rlkit2.data import Batch, DatasetSpec, TransitionDataset, dataset_from_arrays
from rlkit2.data.folders import minari_root
from rlkit2.evaluation import Evaluator
from rlkit2.training import DataOptions, Run, Trainer, TrainingOptions
from rlkit2.training.building import AgentFactory, agent_factory, agent_name, run_config

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = spaces.Box(-2.0, 2.0, (2,), np.float32)


class Walk(gym.Env[Any, Any]):
    """Five random observations; the reward says how close the action is to the tanh of the observation's first two numbers."""

    observation_space = OBSERVATIONS
    action_space = ACTIONS

    def _observe(self) -> Any:
        self._observation = self.np_random.normal(size=3).astype(np.float32)
        return self._observation

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._step = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._step += 1
        reward = -float(np.square(action - np.tanh(self._observation[:2])).sum())
        return self._observe(), reward, False, self._step == 5, {}


gym.register("TinyWalk-v0", entry_point=Walk)


def tiny_dataset(seed: int = 0, episodes: int = 8, length: int = 25) -> TransitionDataset:
    """Actions are the tanh of the first two observation columns, with noise."""
    rng = np.random.default_rng(seed)
    size = episodes * length
    observations = rng.normal(size=(size, 3)).astype(np.float32)
    actions = np.tanh(observations[:, :2]) + 0.1 * rng.normal(size=(size, 2))
    truncations = np.zeros(size, bool)
    truncations[length - 1 :: length] = True
    return dataset_from_arrays(
        observations,
        actions.astype(np.float32),
        rng.normal(size=size).astype(np.float32),
        np.roll(observations, -1, axis=0),
        np.zeros(size, bool),
        truncations,
        DatasetSpec(observation_space=OBSERVATIONS, action_space=ACTIONS, id="tiny/walk-v0"),
    )


def store_tiny(dataset_id: str = "tiny/walk-v0") -> None:
    """`tiny_dataset()` as a Minari dataset in the folder that the test sees; written once, copied for every test."""
    shutil.copytree(_stored_tiny(dataset_id), minari_root() / dataset_id)


@cache
def _stored_tiny(dataset_id: str) -> Path:
    folder = Path(mkdtemp(prefix="tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with patch.dict(os.environ, MINARI_DATASETS_PATH=str(folder)):
        tiny_dataset().to_minari(dataset_id)
    return folder / dataset_id


@dataclass(frozen=True)
class FaultyConfig(BCConfig):
    """Behaviour cloning that breaks."""

    broken_seed: int = 1  # the seed that breaks
    broken_step: int = 1000  # at this update its loss is not a number
    rare_every: int = 1  # updates between two values of the metric `rare`


class Faulty(BC):
    """Behaviour cloning whose loss and weights become non-finite at one update of one seed."""

    config_class = FaultyConfig
    config: FaultyConfig

    def update(self, batch: Batch) -> dict[str, torch.Tensor]:
        broken = (self.step + 1 == self.config.broken_step) & (self.seed_keys == self.config.broken_seed)
        metrics = super().update(batch)
        with torch.no_grad():
            for parameter in self.actor.parameters():
                parameter[broken] = torch.nan
        metrics["policy/loss"] = torch.where(broken, torch.nan, metrics["policy/loss"])
        if int(self.step[0]) % self.config.rare_every == 0:
            metrics["rare"] = self.step.float()
        return metrics


def tiny_run(folder: Path, config: BCConfig, dataset: TransitionDataset, seeds: list[int], **training: Any) -> Run:
    """A fresh run folder for `Trainer`."""
    options = TrainingOptions(**{"batch_size": 16, **training})
    plan = run_config(
        agent=agent_name(config),
        config=config,
        dataset=dataset,
        source="memory",
        seeds=seeds,
        data=DataOptions(),
        training=options,
        env=None,
        recipe=None,
    )
    return Run.create(folder, "tiny", plan)


def fit(run: Run, dataset: TransitionDataset, *, wrap: Callable[[Agent], None] | None = None, **options: Any) -> Run:
    """Train a run to its end, with two evaluation episodes; `wrap` may change the agents that are built."""
    plain = agent_factory(run.config, dataset)

    def make(seeds: Sequence[int], device: Any) -> Agent:
        agent = plain(seeds, device)
        if wrap is not None:
            wrap(agent)
        return agent

    factory: AgentFactory = make
    with Evaluator(dataset.spec, episodes=2, env=Walk) as evaluator:
        Trainer(run, dataset, factory, **{"evaluator": evaluator, **options}).fit()
    return run


def interrupting(step: int) -> Callable[[Agent], None]:
    """For `fit`: the process gets SIGINT, as from Ctrl-C, when the first agent has done `step` updates."""

    def wrap(agent: Agent) -> None:
        update = agent.update

        def interrupted(batch: Batch) -> dict[str, torch.Tensor]:
            metrics = update(batch)
            if agent.seeds[0] == 0 and int(agent.step[0]) == step:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.5)  # the main thread, which handles it, may be waiting for a core
            return metrics

        agent.update = interrupted  # type: ignore[method-assign]

    return wrap


def contents(run: Run) -> dict[str, Any]:
    """Everything of a finished run that must not depend on how it got there."""
    checkpoint = run.checkpoint()
    return {
        "files": {
            name: (run.path / name).read_bytes() for name in ("metrics.jsonl", "metrics.csv", "evaluations.jsonl")
        },
        "step": checkpoint.step,
        "tensors": {name: (tensor.shape, tensor.numpy().tobytes()) for name, tensor in checkpoint.tensors.items()},
        "facts": checkpoint.facts,
        "policy": {name: tensor.numpy().tobytes() for name, tensor in run.policy.state_dict().items()},
        "checkpoints": list(run.checkpoints),
    }
