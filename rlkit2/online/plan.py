"""What a run in an environment is to do: begun from an offline run or from scratch, or prolonged."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from rlkit2.agents import Agent, agent_class, make_config, read_config
from rlkit2.agents.base import as_seeds
from rlkit2.data.dataset import Lookahead, TransitionDataset
from rlkit2.data.environments import EnvSource, make_environment, named_source, source_name
from rlkit2.data.normalizers import reward_rule
from rlkit2.data.reading import ReadingOptions
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import ConfigError, RunError
from rlkit2.fields import read_fields
from rlkit2.online.collector import refuse_instance
from rlkit2.online.group import OnlineGroup
from rlkit2.online.rollouts import RolloutGroup
from rlkit2.training.building import (
    AgentFactory,
    agent_config,
    agent_name,
    own_agent,
    run_class,
    run_config,
    settled_training,
    stored_config,
    stored_spec,
)
from rlkit2.training.options import DataOptions, OnlineOptions, TrainingOptions
from rlkit2.training.run import Run, RunWarning, agent_state, fitting

REPLAYING = ("offline_share", "warmup", "capacity", "update_ratio", "exploration_noise", "epsilon", "epsilon_steps")
NEEDING_DATA = ("normalize_observations", "held_out", "reward_transform")
OPTIONAL_PARTS = (
    "policy_average.",
    "labelling_value.",
)  # parts of an agent that one of two runs may have without the other
INHERITED = ("batch_size", "eval_episodes", "policy_ema")  # of the training that a run in an environment continues


def begin_from(
    run: Run, steps: int, overrides: Mapping[str, Any], given: Mapping[str, Mapping[str, Any]], env: str | None
) -> dict[str, Any]:
    """The config of a new run that continues an offline one in the environment.

    Args:
        run: offline; it stays as it is.
        steps: transitions of each seed.
        overrides: fields of the agent's config that change, where its networks stay what they are.
        given: options by section.
        env: name of the environment, where it is not that of the offline run.

    Raises:
        ConfigError: the agent cannot learn in an environment, or an option is that of the offline data.
        RunError: the run has no checkpoint.
    """
    cls = run_class(run.config)
    if (refused := cls.online_refusal()) is not None:
        raise ConfigError(refused)
    _require_constant(given)
    for section in ("data", "reading"):
        for name, value in given[section].items():
            if run.config.get(section, {}).get(name) != value:
                raise ConfigError(
                    f"{run.path} has {name} = {run.config.get(section, {}).get(name)}; what it learns online must be seen as what it has learnt: "
                    "leave it out"
                )
    config = _settled(cls, stored_config(cls, {**run.config["config"], **read_fields(cls.config_class, overrides)}))
    inherited = {name: run.config["training"][name] for name in INHERITED if name in run.config["training"]}
    training = TrainingOptions(**{**inherited, **given["training"], "steps": steps})
    training = settled_training(cls, config, training)
    options = check_options(OnlineOptions(**given["online"]), DataOptions(**run.config["data"]))
    options = options.settled(steps, scratch=False)
    checkpoint = run.checkpoint(run.step)
    return {
        **run.config,
        **own_agent(cls),
        "config": dataclasses.asdict(config),
        "training": dataclasses.asdict(training),
        "online": dataclasses.asdict(options),
        "origin": {"run": str(run.path.resolve()), "id": run.id, "step": checkpoint.step},
        "env": run.config["env"] if env is None else env,
        "recipe": None,
    }


def _settled(cls: type[Agent], config: Any) -> Any:
    """The config with what needs whole episodes replaced, which is said."""
    config, text = cls.settled(config)
    if text is not None:
        warnings.warn(text, RunWarning, stacklevel=4)
    return config


def begin_afresh(
    agent: Any,
    steps: int,
    source: EnvSource | None,
    overrides: Mapping[str, Any],
    given: Mapping[str, Mapping[str, Any]],
    seeds: int | Sequence[int],
    env: str | None,
    dataset: tuple[str, TransitionDataset] | None,
) -> dict[str, Any]:
    """The config of a new run of an agent that begins without a policy.

    Args:
        agent: a registered name, the name of a class of the user's own, or a config object.
        steps: transitions of each seed.
        source: the environment; it may be left out where a dataset names it.
        overrides: fields of the agent's config.
        given: options by section.
        seeds: as for `train`.
        env: what the environment is called by.
        dataset: offline data to mix in, and where they come from; None: none.

    Raises:
        ConfigError: an option needs data, or the agent cannot learn in an environment.
        EnvironmentUnavailableError: the environment cannot be made.
    """
    data = DataOptions(**{"normalize_observations": False, **given["data"]})
    if dataset is None:
        if source is None:
            raise ConfigError(
                "no environment is named; name one with --env ID or --env my_envs.py:make_env (env=... in Python)"
            )
        for name, value in given["data"].items():
            if name in NEEDING_DATA and value and value != getattr(DataOptions(), name):
                raise ConfigError(f"{name} needs data to begin with; leave it out, or give some with --dataset")
        spec = environment_spec(source, given["reading"].get("observation_keys"))
    else:
        spec = dataset[1].spec
    kind = spec.action_kind
    cls = agent_class(agent, kind) if isinstance(agent, str) else agent_class(agent)
    if (refused := cls.online_refusal()) is not None:
        raise ConfigError(refused)
    _require_constant(given)
    if isinstance(agent, str):
        config = make_config(agent, kind, **read_config(agent, overrides, kind))
    else:
        config = dataclasses.replace(agent, **read_fields(type(agent), overrides))
    config = _settled(cls, config)
    options = check_options(OnlineOptions(**given["online"]), data)
    options = options.settled(steps, scratch=True, data=dataset is not None)
    if cls.learns_from == "rollouts":
        _check_rollouts(cls, config.rollout_steps, given["online"], options.num_envs, dataset)
    plan = run_config(
        agent=agent if isinstance(agent, str) else agent_name(agent),
        config=config,
        dataset=spec if dataset is None else dataset[1],
        source="" if dataset is None else dataset[0],
        seeds=as_seeds(seeds),
        data=data,
        training=TrainingOptions(
            **{"policy_ema": 0.0, **given["training"], "steps": steps}
        ),  # a mean lags behind what improves
        env=env,
        recipe=None,
        reading=ReadingOptions(**given["reading"]),
    )
    return {**plan, "online": dataclasses.asdict(options), "origin": None}


def _check_rollouts(cls: type[Agent], rollout: int, given: Mapping[str, Any], envs: int, dataset: object) -> None:
    """Raise `ConfigError` where an agent that learns from what it has just done is given data, options about old transitions, or part of a step."""
    odd = [name for name in REPLAYING if name in given]
    if dataset is not None or odd:
        what = f"{odd[0]} is about older transitions" if odd else "data are of other policies"
        raise ConfigError(f"{cls.__name__} learns from what it has just done itself, and {what}: leave that out")
    if rollout % envs:
        raise ConfigError(
            f"rollout_steps = {rollout} cannot be shared out over {envs} environments; choose a multiple of them"
        )


def environment_spec(source: EnvSource, observation_keys: Sequence[str] | None = None) -> DatasetSpec:
    """What an environment says of itself, as a dataset of it would.

    Raises:
        EnvironmentUnavailableError: it cannot be made.
        UnsupportedSpaceError: its spaces cannot be learnt from.
    """
    if isinstance(named_source(source), gym.Env):
        refuse_instance()
    env = make_environment(source)
    spec = DatasetSpec(
        observation_space=env.observation_space,
        action_space=env.action_space,
        env_spec=env.spec,
        id=source_name(source),
        observation_keys=None if observation_keys is None else tuple(observation_keys),
    )
    env.close()
    spec.flattener  # noqa: B018 - spaces that cannot be flattened are refused here
    return spec


def _require_constant(given: Mapping[str, Mapping[str, Any]]) -> None:
    if given["training"].get("schedule", "constant") != "constant":
        raise ConfigError("learning rates are constant online; leave schedule out")


def prolonged(run: Run, steps: int | None) -> dict[str, Any]:
    """The config of a run in an environment that is resumed, with as many steps or more.

    Raises:
        ConfigError: it was asked for more already.
    """
    before = run.config["training"]["steps"]
    if steps is not None and steps < before:
        raise ConfigError(f"{run.path} is a run of {before} steps; it cannot be resumed with {steps}")
    training = {**run.config["training"], "steps": before if steps is None else steps}
    return {**run.config, **own_agent(run_class(run.config)), "training": training}


def check_options(options: OnlineOptions, data: DataOptions) -> OnlineOptions:
    """The options, or `ConfigError` where two of them do not go together."""
    if options.record is not None and data.frame_stack > 1:
        raise ConfigError("record keeps single observations; leave it out, or frame_stack at 1")
    return options


def needs_dataset(plan: Mapping[str, Any]) -> bool:
    """Whether the offline data are read: for minibatches, or for the range of their returns."""
    has = bool(plan["dataset"]["content_hash"])
    return has and (plan["online"]["offline_share"] > 0.0 or plan["data"].get("reward_transform") == "return_range")


def continuing(factory: AgentFactory, plan: Mapping[str, Any]) -> AgentFactory:
    """`factory`, whose agents begin as the checkpoint that the plan begins from has them; with fresh weights where there is none.

    Raises:
        RunError: that checkpoint is gone.
    """
    origin = plan.get("origin")
    if origin is None:
        return factory
    run = Run(origin["run"])
    if run.id != origin["id"]:
        raise RunError(
            f"{run.path} is another run than the one that is to be continued; put that back, or begin again from this one"
        )
    checkpoint = run.checkpoint(origin["step"])
    state, seeds = agent_state(checkpoint), list(run.config["seeds"])

    def make(chosen: Sequence[int], device: torch.device | str) -> Agent:
        agent = factory(chosen, device)
        places = [seeds.index(seed) for seed in chosen]
        own = agent.state_dict()
        kept = {name: tensor for name, tensor in own.items() if name.startswith(OPTIONAL_PARTS)}
        with fitting(checkpoint, run.path):
            known = {
                name: part[places] for name, part in state.items() if name in own or not name.startswith(OPTIONAL_PARTS)
            }
            agent.load_state_dict(kept | known)
        if agent.policy_ema and not any(name.startswith("policy_average.") for name in state):
            agent.follow_policy()
        return agent

    return make


def group_maker(
    run: Run,
    source: EnvSource,
    raw: TransitionDataset | None,
    prepared: TransitionDataset | None,
    device: torch.device,
    compile: str,
) -> Callable[[Agent], OnlineGroup]:
    """What makes of an agent a group that learns in the environment of a run.

    Args:
        run: with its config.
        source: what an environment is made from.
        raw, prepared: the offline data as they were loaded, and as the agent shall see them; None where they are not read.
        device, compile: as for `Trainer`.
    """
    plan, cls = run.config, run_class(run.config)
    data, options, training = DataOptions(**plan["data"]), OnlineOptions(**plan["online"]), plan["training"]
    config = agent_config(plan)
    spans = data.num_steps > 1
    lookahead = Lookahead(data.num_steps, config.discount if spans else 1.0, next_actions=cls.needs_next_actions)
    change = reward_rule(data.reward_transform, raw)

    def reward(rewards: Tensor) -> Tensor:
        return change(rewards) * data.reward_scale

    kind: Any = RolloutGroup if cls.learns_from == "rollouts" else OnlineGroup

    def make(agent: Agent) -> OnlineGroup:
        group: OnlineGroup = kind(
            agent,
            offline=prepared,
            spec=stored_spec(plan),
            source=source,
            run=Path(run.path),
            options=options,
            batch_size=training["batch_size"],
            steps=training["steps"],
            scratch=plan.get("origin") is None,
            device=device,
            compile=compile,
            lookahead=lookahead,
            reward=reward,
        )
        return group

    return make
