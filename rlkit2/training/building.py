"""From a run's config to agents: the same for a fresh run, a resumed one and one that is only looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from rlkit2.agents import Agent, agent_class, list_agents, make_agent, make_normalizer
from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.normalizers import observation_statistics, reward_transform
from rlkit2.data.spec import DatasetSpec
from rlkit2.fields import read_fields
from rlkit2.training.options import DataOptions, TrainingOptions

AgentFactory = Callable[[Sequence[int], "torch.device | str"], Agent]


def agent_name(config: object) -> str:
    """The registered name for a config object, or `module:Class` for an agent of the user's own."""
    return class_name(agent_class(config))


def class_name(cls: type[Agent]) -> str:
    """The registered name of an agent's class, or `module:Class`."""
    names = [name for name in list_agents() if agent_class(name) is cls]
    return min(names, key=len) if names else f"{cls.__module__}:{cls.__qualname__}"


def prepare_dataset(
    dataset: TransitionDataset,
    config: Any,
    options: DataOptions,
    load: Callable[[str], TransitionDataset] | None = None,
) -> TransitionDataset:
    """The dataset as an agent with `config` shall see it: rewards transformed and scaled, the agent's own selection of the training episodes made.

    `load` opens further datasets by id; None: Minari's alone.
    """
    training, _ = split_dataset(dataset, options)
    prepared: TransitionDataset = agent_class(config).prepare_dataset(config, training, load)
    return prepared


def split_dataset(
    dataset: TransitionDataset, options: DataOptions
) -> tuple[TransitionDataset, TransitionDataset | None]:
    """Training and held-out episodes (None where none are held out), rewards transformed and scaled: the same split every time."""
    if options.reward_transform != "none" or options.reward_scale != 1.0:
        dataset = dataset.with_rewards(reward_transform(options.reward_transform, dataset) * options.reward_scale)
    return dataset.split(options.held_out, seed=0) if options.held_out else (dataset, None)


def place_dataset(dataset: TransitionDataset, device: torch.device) -> TransitionDataset:
    """The dataset on the device where it takes less than half of the free memory there, else where it is."""
    if device.type != "cuda" or dataset.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return dataset
    return dataset.to(device)


def check_config(config: Any) -> Any:
    """The config itself, or `ConfigError` where it is not a dataclass that an agent names as its own."""
    agent_class(config)
    return config


def agent_config(run_config: Mapping[str, Any]) -> Any:
    """The agent's config object of a run."""
    config_class = agent_class(run_config["agent"]).config_class
    return config_class(**read_fields(config_class, run_config["config"]))


def agent_factory(run_config: Mapping[str, Any], dataset: TransitionDataset | None = None) -> AgentFactory:
    """A function that builds the run's agent for some seeds on a device.

    Args:
        run_config: `Run.config`.
        dataset: source of the observation statistics; None leaves them at zero and one, for a state dict to overwrite.
    """
    spec = DatasetSpec.from_json(run_config["spec"])
    config = agent_config(run_config)
    mean = std = None
    if run_config["data"]["normalize_observations"]:
        size = spec.observation_size
        mean, std = (torch.zeros(size), torch.ones(size)) if dataset is None else observation_statistics(dataset)

    def build(seeds: Sequence[int], device: torch.device | str) -> Agent:
        normalizer = make_normalizer(spec, seeds=len(seeds), observation_mean=mean, observation_std=std)
        return make_agent(config, spec, seeds=seeds, device=device, normalizer=normalizer)

    return build


def unreachable_actions(agent: Agent, dataset: TransitionDataset) -> str | None:
    """One line where the data's actions lie beyond what the policy's head can put out: a tanh in a space without bounds, which nothing rescales."""
    space, actor = dataset.spec.action_space, agent.policy.actor
    bounded_head = actor.head in ("squashed_gaussian", "deterministic") or getattr(actor, "tanh_mean", False)
    if not isinstance(space, spaces.Box) or not bounded_head:
        return None
    free = ~(np.isfinite(space.low) & np.isfinite(space.high)).reshape(-1)
    if not free.any():
        return None
    largest = dataset.actions[:, torch.from_numpy(free)].abs().max().item()
    if largest <= 1.0:
        return None
    mend = (
        "set tanh_mean = false"
        if getattr(actor, "tanh_mean", False)
        else "give the space its bounds, so that actions are rescaled"
    )
    return f"the actions of {dataset.spec.id} have no bounds and go up to {largest:.3g}, but the policy's stay within 1: {mend}"


def run_config(
    *,
    agent: str,
    config: Any,
    dataset: TransitionDataset,
    source: str,
    seeds: Sequence[int],
    data: DataOptions,
    training: TrainingOptions,
    env: str | None,
    recipe: str | None,
    agent_source: str | None = None,
) -> dict[str, Any]:
    """The content of `config.json`: all that decides the numbers of a run.

    Args:
        source: what `load_dataset` can find the dataset by again.
        env: id of the environment to evaluate in, where it is not the dataset's.
        recipe: the file that the hyper-parameters came from.
        agent_source: `file.py:Class` or `module:Class` of an agent of the user's own, for people to read and never to import.
    """
    return {
        "format": 1,
        "agent": agent,
        **({} if agent_source is None else {"agent_source": agent_source}),
        "config": dataclasses.asdict(config),
        "dataset": {
            "id": dataset.spec.id,
            "source": source,
            "content_hash": dataset.spec.content_hash,
            "transitions": len(dataset),
            "observation_keys": dataset.spec.observation_keys,
        },
        "seeds": list(seeds),
        "data": dataclasses.asdict(data),
        "training": dataclasses.asdict(training),
        "env": env,
        "recipe": recipe,
        "spec": dataset.spec.to_json(),
    }
