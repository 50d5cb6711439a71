"""The policies that the study of offline evaluation judges: several agents at several checkpoints, and what each of them truly earns.

    python benchmarks/offline_policies.py zoo/hopper/medium-replay-v0 --out runs/judged

Policies are small and trained briefly, so that they differ. Two truths are measured by playing: the discounted return of the process that
the data come from (time limit lifted to 1000 steps, as a value has none), which is what the estimates estimate, and the undiscounted
return in the evaluation environment, which is what a user cares for. What is in the folder already is not made again.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from safetensors.torch import load_file, save_file

import rlkit2
from rlkit2.agents import Agent, make_agent, make_config, make_normalizer
from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.normalizers import observation_statistics
from rlkit2.data.spec import DatasetSpec
from rlkit2.evaluation import evaluate_policy, make_environment

CONTINUOUS = ("bc", "bc10", "td3bc", "iql", "odice")
DISCRETE = ("bc", "bc10", "iql", "odice", "cql", "dqn")
STEPS = {"continuous": (250, 1000, 2500, 5000), "discrete": (250, 1500, 5000)}
WIDTHS = (64, 64)
DISCOUNT = 0.99
HORIZON = 1000


def recipes(dataset: TransitionDataset) -> list[tuple[str, int]]:
    """(agent, step) of every policy; step 0 is an untrained one."""
    discrete = dataset.spec.discrete
    names, steps = (DISCRETE, STEPS["discrete"]) if discrete else (CONTINUOUS, STEPS["continuous"])
    return [("bc", 0), *((name, step) for name in names for step in steps)]


def small_config(name: str) -> Any:
    """The agent's defaults with small networks."""
    known = {f.name for f in fields(type(make_config(name)))}
    wanted = {
        **dict.fromkeys(("hidden_sizes", "value_hidden_sizes", "policy_hidden_sizes"), WIDTHS),
        **({} if name == "odice" else {"learning_rate": 1e-3}),
    }
    name = "odice_released" if name == "odice" else name  # no trainer measures the returns here
    return make_config(name, **{key: value for key, value in wanted.items() if key in known})


def build(name: str, dataset: TransitionDataset, seed: int) -> Agent:
    """The agent, untrained, with standardised observations."""
    mean, std = observation_statistics(dataset)
    normalizer = make_normalizer(dataset.spec, observation_mean=mean, observation_std=std)
    return make_agent(small_config(name), dataset.spec, seeds=[seed], normalizer=normalizer)


def train(name: str, dataset: TransitionDataset, folder: Path, steps: list[int], seed: int) -> None:
    """Train one agent and write its state at `steps`."""
    paths = {step: folder / f"{name}-{step}.safetensors" for step in steps}
    if all(path.is_file() for path in paths.values()):
        return
    agent = build(name, dataset, seed)
    seen = type(agent).prepare_dataset(agent.config, dataset, rlkit2.load_dataset)
    generator = torch.Generator().manual_seed(seed)
    for step in range(max(steps) + 1):
        if step in paths:
            save_file(agent.state_dict(), paths[step])
        agent.update(seen.sample(256, generator=generator))


def load(name: str, step: int, dataset: TransitionDataset, folder: Path, seed: int = 0) -> Agent:
    """An agent as `train` wrote it."""
    agent = build(name, dataset, seed)
    agent.load_state_dict(load_file(folder / f"{name}-{step}.safetensors"))
    return agent


class Discounted(gym.Wrapper[Any, Any, Any, Any]):
    """Rewards times discount**t, so that an undiscounted sum is the discounted return."""

    def reset(self, **options: Any) -> Any:
        """Start at factor 1."""
        self.factor = 1.0
        return self.env.reset(**options)

    def step(self, action: Any) -> Any:
        """The step with its reward discounted."""
        observation, reward, *rest = self.env.step(action)
        reward = float(reward) * self.factor
        self.factor *= DISCOUNT
        return observation, reward, *rest


def truth(agent: Agent, spec: DatasetSpec, episodes: int) -> dict[str, list[float]]:
    """What `episodes` episodes of the deterministic policy earn, discounted and not."""

    def process() -> gym.Env[Any, Any]:
        own = copy.deepcopy(spec.env_spec)
        assert own is not None
        own.max_episode_steps = HORIZON
        return Discounted(make_environment(own))

    discounted = evaluate_policy(agent.policy, spec, episodes=episodes, env=process, max_steps=HORIZON)
    plain = evaluate_policy(agent.policy, spec, episodes=episodes)
    return {"discounted": discounted.returns[0].tolist(), "undiscounted": plain.returns[0].tolist()}


def main() -> None:
    """Train and play what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    for name in given.datasets:
        make(name, given.out, given.episodes, given.seed)


def make(dataset_id: str, out: Path, episodes: int, seed: int) -> dict[str, dict[str, list[float]]]:
    """Every policy of one dataset and its truth, `{"agent-step": {"discounted": [...], "undiscounted": [...]}}`; also in `truth.json`."""
    dataset = rlkit2.load_dataset(dataset_id)
    folder = out / dataset_id.replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = recipes(dataset)
    for name in dict.fromkeys(name for name, _ in wanted):
        train(name, dataset, folder, [step for other, step in wanted if other == name], seed)
    file = folder / "truth.json"
    found: dict[str, dict[str, list[float]]] = json.loads(file.read_text()) if file.is_file() else {}
    for name, step in wanted:
        key = f"{name}-{step}"
        if key not in found:
            found[key] = truth(load(name, step, dataset, folder, seed), dataset.spec, episodes)
            file.write_text(json.dumps(found))
            means = {kind: round(float(np.mean(values)), 1) for kind, values in found[key].items()}
            print(dataset_id, key, means, flush=True)
    return found


if __name__ == "__main__":
    main()
