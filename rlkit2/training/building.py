"""From a run's config to agents: the same for a fresh run, a resumed one and one that is only looked at."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rlkit2.agents import (
    Agent,
    agent_class,
    agent_classes,
    agent_source,
    class_name,
    code_hash,
    make_agent,
    make_normalizer,
)
from rlkit2.agents.base import single_steps
from rlkit2.data.dataset import Lookahead, TransitionDataset
from rlkit2.data.normalizers import observation_statistics, reward_transform
from rlkit2.data.reading import ReadingOptions
from rlkit2.data.returns import return_statistics
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import ConfigError, RunError
from rlkit2.fields import read_fields
from rlkit2.nn import Image, choose_encoder
from rlkit2.nn.encoders import encoded_size, images_of, plans_of
from rlkit2.training.groups import BLOCK
from rlkit2.training.memory import total_memory
from rlkit2.training.options import DataOptions, TrainingOptions
from rlkit2.training.refinement import refined_curves
from rlkit2.training.run import Run

AgentFactory = Callable[[Sequence[int], "torch.device | str"], Agent]


def agent_name(config: object) -> str:
    """The registered name for a config object, or `module:Class` for an agent of the user's own."""
    return class_name(agent_class(config))


def prepare_dataset(
    dataset: TransitionDataset,
    agent: type[Agent],
    config: Any,
    options: DataOptions,
    load: Callable[[str], TransitionDataset] | None = None,
) -> TransitionDataset:
    """The dataset as the agent shall see it: rewards transformed and scaled, its own selection of the training episodes made.

    `load` opens further datasets by id; None: Minari's alone.
    """
    if dataset.lookahead != Lookahead():
        raise ConfigError(
            "training looks ahead by itself: give the dataset as it was loaded, and num_steps as an option"
        )
    if options.num_steps > 1 and not agent.several_steps:
        raise ConfigError(single_steps(class_name(agent)))
    if agent.counts_rewards and (options.reward_transform != "none" or options.reward_scale != 1.0):
        raise ConfigError(
            f"{class_name(agent)} counts the environment's own rewards while it acts; leave reward_transform and reward_scale at their defaults"
        )
    if agent.counts_rewards and options.frame_stack > 1:
        raise ConfigError(f"{class_name(agent)} remembers the steps before by itself; leave frame_stack at 1")
    training, _ = split_dataset(dataset, options)
    return look_ahead(agent.prepare_dataset(config, training, load), agent, config, options)


def look_ahead(dataset: TransitionDataset, agent: type[Agent], config: Any, options: DataOptions) -> TransitionDataset:
    """The dataset whose batches hold what the agent's targets need of the steps after their own."""
    episodes = agent.needs_episodes(config)
    if options.num_steps == 1 and not (agent.needs_next_actions or episodes):
        return dataset
    discount = config.discount if options.num_steps > 1 or episodes else 1.0
    return dataset.looking_ahead(options.num_steps, discount, next_actions=agent.needs_next_actions, episodes=episodes)


def split_dataset(
    dataset: TransitionDataset, options: DataOptions
) -> tuple[TransitionDataset, TransitionDataset | None]:
    """Training and held-out episodes (None where none are held out), stacked, rewards transformed and scaled: the same split every time."""
    dataset = dataset.stacked(options.frame_stack)
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


def run_class(run_config: Mapping[str, Any]) -> type[Agent]:
    """The class of a run's agent.

    Raises:
        ConfigError: an agent of the user's own that is not loaded; nothing is imported because a file says so.
    """
    name = run_config["agent"]
    try:
        several = len(agent_classes(name)) > 1
        return agent_class(name, stored_spec(run_config).action_kind if several else None)
    except ConfigError as error:
        if "agent_source" not in run_config:
            raise
        typed = shlex.quote(run_config["agent_source"])
        raise ConfigError(
            f"the run's agent is {typed}, which is not loaded, and what a file names is not imported; name it yourself: "
            f"rlkit2 train {typed} --resume ..., or --agent {typed} for the other commands (in Python: import it first)"
        ) from error


def agent_config(run_config: Mapping[str, Any]) -> Any:
    """The agent's config object of a run."""
    return stored_config(run_class(run_config), run_config["config"])


def stored_config(cls: type[Agent], values: Mapping[str, Any]) -> Any:
    """The config object of an agent's class from fields that a file has, those from before a field existed included."""
    config_class = cls.config_class
    stored = read_fields(config_class, values)
    former = getattr(config_class, "former", None)  # what a config says that was stored before a field existed
    return config_class(**(stored if former is None else former(stored)))


def stored_spec(run_config: Mapping[str, Any]) -> DatasetSpec:
    """The specification of a run's dataset.

    Raises:
        RunError: the config has none.
        CorruptDatasetError: it is damaged.
    """
    if "spec" not in run_config:
        raise RunError("the run's config.json has no entry spec, the specification of its dataset; the run is damaged")
    return DatasetSpec.from_json(run_config["spec"])


def dataset_source(run_config: Mapping[str, Any]) -> str:
    """What `load_dataset` finds a run's dataset by.

    Raises:
        ConfigError: the run began in an environment, without data.
    """
    source = str(run_config["dataset"]["source"])
    if not source:
        name = run_config["dataset"]["id"]
        raise ConfigError(
            f"the run began in {name} without data; name some with --dataset ID (dataset=... in Python), such as what it collected with --record ID"
        )
    return source


def reading_arguments(run_config: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """How a run's dataset was read, as keyword arguments of `load_dataset`; what is `given` of `ReadingOptions` goes before it."""
    keys = run_config["dataset"].get("observation_keys")
    own = {name: value for name, value in run_config.get("reading", {}).items() if name != "observation_keys"}
    return ReadingOptions(**read_fields(ReadingOptions, {"observation_keys": keys, **own, **(given or {})})).arguments()


def agent_factory(run_config: Mapping[str, Any], dataset: TransitionDataset | None = None) -> AgentFactory:
    """A function that builds the run's agent for some seeds on a device.

    Args:
        run_config: `Run.config`.
        dataset: source of the observation statistics; None leaves them at zero and one, for a state dict to overwrite.
    """
    spec = stored_spec(run_config)
    cls, config, training = run_class(run_config), agent_config(run_config), TrainingOptions(**run_config["training"])
    mean = std = None
    if run_config["data"]["normalize_observations"]:
        size = spec.observation_size
        mean, std = (torch.zeros(size), torch.ones(size)) if dataset is None else observation_statistics(dataset)
        for start, shape in spec.images:  # the network scales bytes itself
            columns = slice(start, start + math.prod(shape))
            mean[columns], std[columns] = 0.0, 1.0
    return_mean = return_std = None
    if (discount := cls.return_discount(config)) is not None:
        unknown = torch.zeros(()), torch.ones(())
        return_mean, return_std = unknown if dataset is None else return_statistics(dataset, discount)

    def build(seeds: Sequence[int], device: torch.device | str) -> Agent:
        normalizer = make_normalizer(
            spec,
            seeds=len(seeds),
            observation_mean=mean,
            observation_std=std,
            return_mean=return_mean,
            return_std=return_std,
        )
        agent = make_agent(config, spec, seeds=seeds, device=device, normalizer=normalizer, cls=cls)
        agent.average_policy(training.policy_ema or 0.0)
        if "online" not in run_config:  # there every learning rate stays what the config says
            agent.follow_schedule(training.schedule, training.steps, run_config.get("schedule_curves"))
        return agent

    return build


def own_agent(cls: type[Agent]) -> dict[str, str]:
    """What a run's config says about an agent of the user's own; nothing about a registered one."""
    found = {"agent_source": agent_source(cls), "agent_hash": code_hash(cls)}
    return {name: value for name, value in found.items() if value is not None}


def unreachable_actions(agent: Agent, dataset: TransitionDataset) -> str | None:
    """One line where the data's actions lie beyond what the policy's head can put out: a tanh in a space without bounds, which nothing rescales."""
    limit, actor = agent.normalizer.action_limit, agent.policy.actor
    bounded_head = actor.head in ("squashed_gaussian", "deterministic", "one_step") or getattr(
        actor, "tanh_mean", False
    )
    if limit is None or not bounded_head:
        return None
    largest = dataset.actions[:, limit[0, 0].isinf().cpu()].abs().max().item()
    if largest <= 1.0:
        return None
    mend = (
        "set tanh_mean = false"
        if getattr(actor, "tanh_mean", False)
        else "give the space its bounds, so that actions are rescaled"
    )
    return f"the actions of {dataset.spec.id} have no bounds and go up to {largest:.3g}, but the policy's stay within 1: {mend}"


def check_weights(config: Any, spec: DatasetSpec, seeds: int, device: torch.device) -> None:
    """Refuse networks whose first layer cannot fit, before one is built.

    Raises:
        ConfigError: weights, gradients and Adam's two moments of that layer alone are more than the device has.
    """
    given = [getattr(config, name) for name in dir(config) if name.endswith(("hidden_sizes", "_widths"))]
    widths = [sizes[0] for sizes in given if sizes]
    encoder = choose_encoder(getattr(config, "encoder", "auto"), [Image(*image) for image in spec.images])
    inputs = encoded_size(spec.observation_size, encoder)
    weights = inputs * max(widths, default=1)
    needed, there = max(16 * seeds, 48) * weights, total_memory(device)  # one seed is drawn in double precision first
    if needed > there:
        mend = "; encoder = 'nature' or 'impala' makes them fewer" if spec.images else ""
        raise ConfigError(
            f"a layer of {max(widths)} units on {inputs} inputs takes at least {needed / 2**30:.3g} GiB with {seeds} seed{'s' * (seeds != 1)}, and "
            f"{device} has {there / 2**30:.3g} GiB; choose smaller hidden sizes{mend}"
        )


def update_memory(agent: Agent, seeds: int, batch_size: int) -> int:
    """Bytes that an update takes at the very least: its rows, their block of indices, and what the layers of the widest network put out.

    Args:
        agent: for one seed, with weights `[1, (members,) in, out]`.
    """
    outputs: dict[str, int] = {}
    for name, tensor in agent.state_dict().items():
        network = name.partition(".")[0]
        if name.endswith("weight") and network != "optimizer" and tensor.ndim >= 3:
            outputs[network] = outputs.get(network, 0) + tensor[0].numel() // tensor.shape[-2]
    actions = 1 if agent.discrete else agent.action_size
    row = 2 * agent.observation_size + actions + max(outputs.values(), default=0)  # a pair of segments holds more
    pixels = sum(plan.outputs for plan in plans_of(agent.encoder))
    return seeds * batch_size * (4 * (row + pixels) + 8 * BLOCK)


def check_memory(agent: Agent, seeds: int, batch_size: int, device: torch.device) -> None:
    """Refuse a batch that cannot fit.

    Raises:
        ConfigError: the least that an update takes is more than the device has.
    """
    needed, there = update_memory(agent, seeds, batch_size), total_memory(device)
    if needed > there:
        raise ConfigError(
            f"batch_size {batch_size:g} with {seeds} seed{'s' * (seeds != 1)} takes at least {needed / 2**30:.3g} GiB, and {device} has "
            f"{there / 2**30:.3g} GiB; choose at most {max(1, batch_size * there // (2 * needed))}"
        )


def describe_images(agent: Agent, dataset: TransitionDataset, seeds: int, batch_size: int) -> str | None:
    """One line on how images are read and what they cost, before training; None where there are none.

    Args:
        agent: for one seed.
    """
    if agent.encoder is None:
        return None
    seen = ", ".join(
        f"{height} x {width} pixels with {image.channels} channels"
        for image in images_of(agent.encoder)
        for _, height, width, _ in [image.sides]
    )
    state = seeds * sum(tensor.nbytes for tensor in agent.state_dict().values())
    sizes = {
        "weights and optimisers": state,
        "an update": update_memory(agent, seeds, batch_size),
        "the data": dataset.nbytes,
    }
    costs = ", ".join(f"{what} {size / 2**20:.3g} MiB" for what, size in sizes.items())
    return f"images of {seen}, encoder {agent.encoder['name']}; memory at least: {costs}"


def settled_training(cls: type[Agent], config: Any, training: TrainingOptions) -> TrainingOptions:
    """The options with what they leave to the agent filled in."""
    if training.policy_ema is not None:
        return training
    return dataclasses.replace(training, policy_ema=cls.default_policy_ema(config))


def schedule_curves(agent: str, training: TrainingOptions) -> dict[str, Any]:
    """What a run's config keeps of the run that shapes its learning rates: it is resumed without that one.

    Raises:
        ConfigError, RunError: that run is none, or says nothing of this agent.
    """
    if training.refine_from is None:
        return {}
    return {"schedule_curves": refined_curves(Run(training.refine_from), agent)}


def settled_data(options: DataOptions, spec: DatasetSpec) -> DataOptions:
    """The options with what they leave to the data filled in."""
    if options.normalize_observations is not None:
        return options
    return dataclasses.replace(options, normalize_observations=spec.flattener.dtype != np.uint8)


def run_config(
    *,
    agent: str,
    config: Any,
    dataset: TransitionDataset | DatasetSpec,
    source: str,
    seeds: Sequence[int],
    data: DataOptions,
    training: TrainingOptions,
    env: str | None,
    recipe: str | None,
    reading: ReadingOptions | None = None,
) -> dict[str, Any]:
    """The content of `config.json`: all that decides the numbers of a run.

    Args:
        dataset: what is learnt from; the specification of an environment alone where there are no data.
        source: what `load_dataset` can find the dataset by again.
        env: id of the environment to evaluate in, where it is not the dataset's.
        recipe: the file that the hyper-parameters came from.
        reading: how the dataset was read; default: as its files say.

    An agent of the user's own leaves what to type for it (`agent_source`, for people to read and never imported) and the hash of its code.
    """
    spec, rows = (dataset, 0) if isinstance(dataset, DatasetSpec) else (dataset.spec, len(dataset))
    data, training = settled_data(data, spec), settled_training(agent_class(config), config, training)
    return {
        "format": 1,
        "agent": agent,
        **own_agent(agent_class(agent)),
        "config": dataclasses.asdict(config),
        "dataset": {
            "id": spec.id,
            "source": source,
            "content_hash": spec.content_hash,
            "transitions": rows,
            "observation_keys": spec.observation_keys,
        },
        "seeds": list(seeds),
        "data": dataclasses.asdict(data),
        "training": dataclasses.asdict(training),
        **schedule_curves(agent, training),
        "reading": dataclasses.asdict(reading or ReadingOptions()),
        "env": env,
        "recipe": recipe,
        "spec": spec.stacked(data.frame_stack).to_json(),
    }
