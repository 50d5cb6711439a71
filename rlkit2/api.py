"""The functions most users need: load a dataset, train, evaluate with an environment or without, and open what was trained."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from rlkit2.agents.policy_interface import with_interface
from rlkit2.data.actions import check_actions
from rlkit2.data.audit.glance import glance
from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.infer import SpaceLike
from rlkit2.data.known_environments import check_named_id
from rlkit2.data.load import Columns, Source, read_dataset
from rlkit2.data.reading import ReadingOptions
from rlkit2.data.spaces import DatasetWarning
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import ConfigError, DatasetError, EnvironmentUnavailableError, MissingExtraError, RunError
from rlkit2.fields import read_fields
from rlkit2.nn.policy import Policy, holds_policy
from rlkit2.nn.policy import load_policy as read_policy
from rlkit2.progress import progress_bar
from rlkit2.training.options import (
    ONLINE_SECTIONS,
    SECTIONS,
    DataOptions,
    read_options,
    show_online_options,
    show_options,
)
from rlkit2.training.progress import Progress, console_progress
from rlkit2.training.run import Run, RunWarning
from rlkit2.user_code import typed_again

if TYPE_CHECKING:
    from rlkit2.agents import Agent
    from rlkit2.deploy import Export
    from rlkit2.evaluation import EnvSource, Evaluation
    from rlkit2.evaluation import Evaluator as EpisodeEvaluator
    from rlkit2.evaluation.offline import OfflineEvaluation, OfflineOptions
    from rlkit2.training.building import AgentFactory
    from rlkit2.training.groups import SeedGroup


def load_dataset(
    source: Source,
    *,
    observation_keys: Sequence[str] | None = None,
    cache: bool = True,
    spec: DatasetSpec | None = None,
    observation_space: SpaceLike | None = None,
    action_space: SpaceLike | None = None,
    columns: Columns | None = None,
    max_episode_steps: int | None = None,
    never_terminates: bool = False,
    fill_missing: Literal["previous", "mean"] | None = None,
    trust_env: bool = False,
) -> TransitionDataset:
    """A dataset as aligned tensors.

    Args:
        source: a Minari id (looked for locally, then at Minari's remotes), a built-in id (`builtin/rooms`, built on
            first use; `rlkit2 data list` shows all), a `minari.MinariDataset`, a file (D4RL, robomimic and d3rlpy HDF5, npz, OGBench npz, CSV,
            Parquet, or the format of a reader of yours), a folder, or arrays by name.
        observation_keys: the keys of Dict observations to use, in order; default: all.
        cache: keep aligned records on disk, so that the next time takes milliseconds.
        spec: spaces and environment of data that do not tell them.
        observation_space, action_space: a space, or text such as `box(-2,2)`, `discrete(4)`, `discrete`, `continuous`. What is told by neither the
            caller nor the files is inferred from the values, with a `DatasetWarning`. Values outside a given space are refused.
        columns: names (or patterns, `o_*`) of the columns or arrays that make up `observations, actions, rewards, terminations, truncations,
            episodes`, where they are not the usual ones.
        max_episode_steps: steps after which an episode was cut off, for files that do not tell.
        never_terminates: what is flagged as an end is a cut.
        fill_missing: what observations that are NaN become: `previous`, the value before them in the episode (at its start the column's mean), or
            the column's `mean`; None leaves them.
        trust_env: where a Minari dataset stores no spaces, build its environment as the file says, which runs the code it names.

    Raises:
        DatasetNotFoundError: nothing of that name in any place.
        DatasetError: it is there but cannot be used; the message names the episode or field.
    """
    if isinstance(source, str) and source.startswith("builtin/"):
        from rlkit2.envs.builtin import builtin_id, ensure_builtin

        with progress_bar(f"building {builtin_id(source)}") as progress:
            source = ensure_builtin(source, progress=progress)
    with progress_bar("reading the dataset") as progress:
        return read_dataset(
            source,
            observation_keys=observation_keys,
            cache=cache,
            spec=spec,
            observation_space=observation_space,
            action_space=action_space,
            columns=columns,
            max_episode_steps=max_episode_steps,
            never_terminates=never_terminates,
            fill_missing=fill_missing,
            trust_env=trust_env,
            progress=progress,
        )


@show_options
def train(
    agent: str | os.PathLike[str] | object | None = None,
    dataset: Source | None = None,
    *,
    seeds: int | Sequence[int] = 1,
    out: str | os.PathLike[str] = "runs",
    device: str = "auto",
    resume: str | os.PathLike[str] | Run | None = None,
    overrides: Mapping[str, Any] | None = None,
    env: EnvSource | None = None,
    compile: str = "auto",
    loggers: Sequence[str] = (),
    progress: bool | Progress = True,
    trust_env: bool = False,
    until: int | None = None,
    recipes: bool = True,
    **options: Any,
) -> Run:
    """Train an agent on a dataset, several seeds together, into a new run folder.

    What is not given comes from the recipe, else from the defaults of the options. A recipe is used when
    `agent` is a recipe file, or when `agents/<agent>/` has one for the dataset.

    Args:
        agent: a name of `rlkit2.agents.list_agents()`, a config object, a recipe file, or an agent of your own as its class,
            `my_agents.py:MyAgent` or `package.module:MyAgent`.
        dataset: a `TransitionDataset` or anything `load_dataset` takes; default: that of the recipe.
        seeds: n for seeds 0 to n - 1, or the integers themselves.
        out: folder in which `<agent>-<dataset>-<number>` is made; nothing is ever overwritten.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
        resume: a run to resume from its newest checkpoint; its own agent, dataset and options hold, but a larger `steps` prolongs it.
        overrides: fields of the agent's config that replace those of the recipe or the defaults.
        env: environment to evaluate in: an id, `file.py:NAME` or `module:NAME` of what makes one, a function that makes one, or an environment;
            default: the dataset's.
        compile: `auto` (a CUDA graph where there is a GPU), `on` (also `torch.compile` on a CPU) or `off`.
        loggers: any of `tensorboard`, `wandb`, `trackio`.
        progress: show a table (lines, without a terminal) on standard error.
        trust_env: build the environment as the files of the dataset or run say, which runs the code they name.
        until: stop after this step, saved as by an interruption; `resume` continues, to the same numbers.
        recipes: look for a shipped recipe; False: what is not given comes from the defaults alone.
        **options: fields of `TrainingOptions`, `DataOptions` and `ReadingOptions`; None is as good as not given.

    Returns:
        The run. Seeds whose loss became non-finite are in `run.manifest["stopped"]`; the others are trained to the end.

    Raises:
        ConfigError, DatasetError: something does not fit, before any training starts.
        RunError: the folder cannot be written, is in use, or the dataset of a resumed run has changed.
        KeyboardInterrupt: after SIGINT, and as `Preempted` after SIGTERM, SIGUSR1 or SIGUSR2; the run is saved and can be resumed.
    """
    from rlkit2.agents import Agent, class_name, import_agent
    from rlkit2.evaluation.scores import below_its_data
    from rlkit2.training.building import (
        agent_config,
        agent_factory,
        describe_images,
        place_dataset,
        prepare_dataset,
        run_class,
        unreachable_actions,
    )

    if resume is not None:
        run = resume if isinstance(resume, Run) else Run(resume)
        if "online" in run.config:
            given = {"agent": agent, "overrides": overrides, **options}
            if seeds != 1 or any(value is not None for value in given.values()):
                raise ConfigError(
                    f"{run.path} learns in an environment: resume it without other options; --online N (train_online(run, steps=N)) prolongs it"
                )
            more: dict[str, Any] = {"env": env, "device": device, "compile": compile, "loggers": loggers}
            return train_online(run, dataset, **more, progress=progress, trust_env=trust_env, until=until)
    session = _Session(device, compile, loggers, progress, env, trust_env, until)
    training, data, reading = read_options({name: value for name, value in options.items() if value is not None})
    if isinstance(agent, str) and ":" in agent:
        agent = import_agent(agent)
    if isinstance(agent, type) and issubclass(agent, Agent):
        agent = class_name(agent)
    if resume is None:
        given = {"training": training, "data": data, "reading": reading}
        plan, transitions = _plan(agent, dataset, seeds, overrides or {}, given, env, session.shown, trust_env, recipes)
        begun = None
        changed: list[str] = []
    else:
        begun = run
        options = {**training, **data, **(overrides or {})}
        plan, transitions = _continued(run, agent, dataset, seeds, options, reading, trust_env)
        changed = [text for text in (_changed_code(run.config, plan), _changed_schedule(run, plan)) if text]
    check_actions(transitions)
    same_way = partial(
        load_dataset, **ReadingOptions(**read_fields(ReadingOptions, plan.get("reading", {}))).arguments()
    )
    prepared = prepare_dataset(transitions, run_class(plan), agent_config(plan), DataOptions(**plan["data"]), same_way)
    factory = agent_factory(plan, prepared)
    trial = session.try_out(plan, factory, prepared.spec)
    doubts = [text for text in (unreachable_actions(trial, transitions), glance(transitions)) if text]
    for doubt in doubts:
        warnings.warn(doubt, DatasetWarning, stacklevel=2)
    for change in changed:
        doubts.append(change)
        warnings.warn(change, RunWarning, stacklevel=2)
    with session.evaluator(plan) as evaluator:
        done = session.open(begun, plan, out, doubts)
        returns, lengths = transitions.episode_returns.double().mean(), transitions.episode_lengths.double().mean()
        data_facts = {"mean_return": float(returns) if returns.isfinite() else None, "mean_length": float(lengths)}
        done.update_manifest(data=data_facts)
        if seen := describe_images(trial, prepared, len(plan["seeds"]), plan["training"]["batch_size"]):
            session.shown.message(seen)
        session.fit(done, place_dataset(prepared, session.target), factory, evaluator)
    if done.manifest["status"] == "finished" and (text := below_its_data(done)):
        session.shown.message(f"warning: {text}")
        said = done.manifest.get("warnings", [])
        done.update_manifest(warnings=said if text in said else [*said, text])
    return done


@show_online_options
def train_online(
    agent: Run | str | os.PathLike[str] | object,
    dataset: Source | None = None,
    *,
    steps: int | None = None,
    env: EnvSource | None = None,
    seeds: int | Sequence[int] = 1,
    out: str | os.PathLike[str] = "runs",
    device: str = "auto",
    overrides: Mapping[str, Any] | None = None,
    compile: str = "auto",
    loggers: Sequence[str] = (),
    progress: bool | Progress = True,
    trust_env: bool = False,
    until: int | None = None,
    **options: Any,
) -> Run:
    """Let an agent act in its environment and learn from what it finds there, into a new run folder.

    A step is one transition of every seed. Each seed has environments and a replay of its own. Minibatches mix what was collected with the offline
    data (`offline_share`); observations are normalised as the offline run normalised them. Everything that was collected is kept in the run's
    folder, and a run killed at any moment resumes to the same bits where its environment does the same when it is reset by the same seed and
    given the same actions; where it does not, the episodes in progress are dropped, and that is said.

    Args:
        agent: an offline run (or its folder), which stays as it is: its agent continues in a new run; a run that learns in an environment
            already: it is resumed, with more steps where `steps` is larger; or an agent as for `train`, which begins without a policy.
        dataset: where the offline data of the run are now, default: where they were; for an agent, data to mix in from the first update on.
        steps: transitions of each seed.
        env: environment to act and be evaluated in, as for `train`; default: that of the run, else of its dataset.
        seeds: of an agent that begins from scratch; a run keeps its own.
        out, device, compile, loggers, progress, trust_env, until: as for `train`.
        overrides: fields of the agent's config that change, where its networks stay what they are.
        **options: fields of `OnlineOptions`, and of `TrainingOptions`, whose counts are transitions here.

    Returns:
        The run.

    Raises:
        ConfigError, EnvironmentUnavailableError: something does not fit, before any training starts.
        EpisodeError: the environment raised, or gave numbers that are none; what was learnt before is saved.
        RunError: the folder cannot be written, is in use or damaged.
        KeyboardInterrupt: as for `train`.
    """
    from rlkit2.agents import Agent, class_name, import_agent
    from rlkit2.agents.base import as_seeds
    from rlkit2.data.export import new_minari_folder
    from rlkit2.data.folders import minari_root
    from rlkit2.evaluation.environments import evaluation_source
    from rlkit2.online import record
    from rlkit2.online.collector import try_source
    from rlkit2.online.plan import begin_afresh, begin_from, continuing, group_maker, needs_dataset, prolonged
    from rlkit2.training.building import agent_config, agent_factory, prepare_dataset, run_class, stored_spec

    session = _Session(device, compile, loggers, progress, env, trust_env, until)
    values = {name: value for name, value in options.items() if value is not None}
    given = dict(zip(ONLINE_SECTIONS, read_options(values, ONLINE_SECTIONS), strict=True))
    named = typed_again(env) if isinstance(env, str) else None
    run = _as_run(agent)
    begun = run if run is not None and "online" in run.config else None
    raw = None
    if begun is not None:
        if values or overrides or seeds != 1:
            raise ConfigError(
                f"{begun.path} learns in an environment already and keeps its options; leave all out but --online STEPS (steps=... in Python)"
            )
        plan = prolonged(begun, steps)
    elif steps is None:
        raise ConfigError("say for how many steps: --online STEPS (steps=... in Python)")
    elif run is not None:
        if seeds != 1 and list(as_seeds(seeds)) != run.config["seeds"]:
            raise ConfigError(f"{run.path} has seeds {run.config['seeds']}, which all continue; leave --seeds out")
        plan = begin_from(run, steps, overrides or {}, given, named)
    else:
        if isinstance(agent, str) and ":" in agent:
            agent = import_agent(agent)
        if isinstance(agent, type) and issubclass(agent, Agent):
            agent = class_name(agent)
        own = None
        if dataset is not None:
            raw = load_dataset(dataset, **ReadingOptions(**given["reading"]).arguments(), trust_env=trust_env)
            own = _written(dataset, raw), raw
        plan = begin_afresh(agent, steps, env, overrides or {}, given, seeds, named, own)
    spec = stored_spec(plan)
    source = evaluation_source(spec, session.source(plan), trust_env=trust_env)
    try_source(source, spec)
    if run is not None and needs_dataset(plan):
        raw = _known_dataset(run.path, plan, dataset, {}, trust_env)
    prepared = None
    if raw is not None:
        prepared = prepare_dataset(raw, run_class(plan), agent_config(plan), DataOptions(**plan["data"]))
    factory = agent_factory(plan, prepared)
    if begun is None or not begun.checkpoints:
        factory = continuing(factory, plan)
    session.try_out(plan, factory, spec)
    kept = plan["online"].get("record")
    if kept is not None and (begun is None or plan != begun.config or begun.status != "finished"):
        new_minari_folder(kept)  # a taken or impossible id is said before anything is done
    with session.evaluator(plan) as evaluator:
        done = session.open(begun, plan, out, [])
        make_group = group_maker(done, source, raw, prepared, session.target, compile)
        session.fit(done, None, factory, evaluator, make_group)
    if kept is not None and done.status == "finished" and not (minari_root() / kept).exists():
        record(done, kept)
        session.shown.message(f"what was collected is kept as {kept}")
    return done


def evaluate(
    run_or_policy: Run | Policy | str | os.PathLike[str],
    *,
    episodes: int = 100,
    env: EnvSource | None = None,
    deterministic: bool = True,
    seed: int = 0,
    num_envs: int | None = None,
    max_steps: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    trust_env: bool = False,
    video: str | os.PathLike[str] | None = None,
    video_episodes: int = 3,
    target_return: float | None = None,
) -> Evaluation:
    """Play episodes with every seed of a trained policy.

    Args:
        run_or_policy: a run, a policy, or the folder of either.
        episodes: episodes per seed, counted as they start.
        env: environment (id, `file.py:NAME` or `module:NAME` of what makes one, spec, a function that makes one, or an environment); default: the
            one a run was trained with, else the dataset's evaluation environment, else the one it was collected in.
        deterministic: the policy's mode, else samples.
        seed: which fixed set of episodes; disjoint from anything training used.
        num_envs, max_steps, progress: see `rlkit2.evaluation.evaluate_policy`.
        trust_env: build the environment as the file says, which runs the code it names; otherwise it comes from Gymnasium's registry.
        video: file (.gif, or .mp4 with the extra `video`) that shows the first `video_episodes` episodes of the first seed with their returns.
        target_return: what a policy that is asked for a return (`dt`) is asked for; default: what it was trained with.

    Raises:
        EnvironmentUnavailableError: no environment, one that does not fit or that is not registered here; name one with `env`.
        EpisodeError: the environment raises, or gives a reward that is not a number.
        RunError: the folder holds neither a run nor a policy.
        ConfigError: the policy does not say which dataset it belongs to.
    """
    from rlkit2.evaluation import evaluate_policy
    from rlkit2.evaluation.environments import run_environment
    from rlkit2.evaluation.film import Film

    if isinstance(run_or_policy, str | os.PathLike):
        path = Path(run_or_policy)
        run_or_policy = read_policy(path) if holds_policy(path) else load_run(path)
    policy = run_or_policy.policy if isinstance(run_or_policy, Run) else run_or_policy
    policy = policy if target_return is None else policy.asked_for(target_return)
    if env is None and isinstance(run_or_policy, Run):
        env = run_environment(run_or_policy, trust_env=trust_env)
    description = (run_or_policy.config if isinstance(run_or_policy, Run) else policy.metadata).get("spec")
    if description is None:
        raise ConfigError(
            'the policy carries no dataset specification; save it with metadata {"spec": ...} or evaluate its run'
        )
    film = None if video is None else Film(video, video_episodes)
    found = evaluate_policy(
        policy,
        DatasetSpec.from_json(description),
        episodes=episodes,
        env=env,
        deterministic=deterministic,
        seed=seed,
        num_envs=num_envs,
        max_steps=max_steps,
        progress=progress,
        trust_env=trust_env,
        film=film,
    )
    if film is not None:
        film.write()
    return found


def offline_evaluate(
    policy_or_run: Run | Policy | str | os.PathLike[str] | Sequence[Run | Policy | str | os.PathLike[str]],
    dataset: Source | None = None,
    *,
    methods: Sequence[str] = ("fqe", "dice"),
    discount: float | None = None,
    deterministic: bool = True,
    behavior_log_probs: ArrayLike | Tensor | None = None,
    initial_observations: ArrayLike | Tensor | None = None,
    options: OfflineOptions | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **reading: Any,
) -> OfflineEvaluation:
    """Estimate from data alone what every seed of a policy would earn: its discounted return, in the dataset's own rewards.

    Args:
        policy_or_run: a run, a policy, the folder of either, or several of them, which are then judged side by side.
        dataset: a `TransitionDataset` or anything `load_dataset` takes; default: that of the runs.
        methods: any of `fqe` (fitted Q evaluation), `dice` (marginal weights), `is` (importance sampling), `dr` (doubly robust), `own` (the
            agent's own Q at the initial states).
        discount: gamma in [0, 1); default: that of the training, else 0.99.
        deterministic: judge the policy's mode, else its sampled actions.
        behavior_log_probs: log-probabilities of the data's actions under what collected them, `[N]` (densities per unit of the raw actions);
            default: a policy cloned from the data.
        initial_observations: where episodes will start, raw `[I, obs]`; default: where the data's episodes do.
        options: sizes and budgets, see `rlkit2.evaluation.offline.OfflineOptions`.
        progress: called with (what, done, total).
        **reading: fields of `ReadingOptions`: how to read `dataset`; default: as the runs did.

    Returns:
        `result["fqe"]` (one policy) or `result.estimates["fqe"][k]`: value, interval and whether it can be trusted, with reasons if not.

    Raises:
        ConfigError: unknown method, no dataset, or policies that do not fit it.
        RunError: a folder holds neither a run nor a policy.
    """
    from rlkit2.evaluation.offline import judge
    from rlkit2.evaluation.offline.candidates import (
        as_candidate,
        as_run,
        common_dataset,
        common_discount,
        common_reading,
        common_stack,
    )

    given = [policy_or_run] if isinstance(policy_or_run, Run | Policy | str | os.PathLike) else policy_or_run
    sources = [as_run(source) for source in given]
    source = common_dataset(sources) if dataset is None else dataset
    transitions = (
        source if isinstance(source, TransitionDataset) else load_dataset(source, **common_reading(sources, reading))
    )
    transitions = transitions if transitions.stack > 1 else transitions.stacked(common_stack(sources))
    notes = []
    if discount is None:
        discount, origin = common_discount(sources)
        notes.append(f"discount {discount:g}: {origin}")
    return judge(
        [as_candidate(run, transitions, index) for index, run in enumerate(sources)],
        transitions,
        methods=methods,
        discount=discount,
        deterministic=deterministic,
        behavior_log_probs=behavior_log_probs,
        initial_observations=initial_observations,
        options=options,
        progress=progress,
        notes=notes,
    )


def export(
    run_or_policy: Run | Policy | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    seed: int | None = None,
    sampling: bool = False,
) -> Export:
    """Write one file that acts as a trained policy does, in another program; it is held against the policy on 1,000 observations before it appears.

    Args:
        run_or_policy: a run, a policy, or the folder of either.
        path: the file; nothing is overwritten.
        format: `onnx` (.onnx), `torch.export` (.pt2), `torchscript` (.ts) or `safetensors`; default: as the suffix of `path` says.
        seed: the integer that names the seed; default: the first.
        sampling: actions are samples, driven by an input `noise`; else the mode.

    Raises:
        ConfigError: unknown format or seed, nothing to sample, the file is there already, or it would differ from the policy.
        MissingExtraError: the extra `export`, for ONNX, is not installed.
        RunError: the folder holds neither a run nor a policy.
    """
    from rlkit2.deploy import export_policy

    if isinstance(run_or_policy, str | os.PathLike):
        folder = Path(run_or_policy)
        run_or_policy = load_policy(folder) if holds_policy(folder) else load_run(folder)
    facts: dict[str, Any] = {}
    if isinstance(run_or_policy, Run):
        known, policy = run_or_policy.config, run_or_policy.policy
        policy.metadata = {"spec": known["spec"], **policy.metadata}
        facts = {
            "agent": known["agent"],
            "dataset": known["dataset"]["id"],
            "content_hash": known["dataset"]["content_hash"],
        }
    else:
        policy = run_or_policy
    if seed is not None and seed not in policy.seeds:
        raise ConfigError(f"there is no seed {seed}; seeds: {', '.join(map(str, policy.seeds))}")
    one = policy.select_seed(0 if seed is None else policy.seeds.index(seed))
    return export_policy(one, Path(path), format=format, sampling=sampling, facts=facts)


def load_run(path: str | os.PathLike[str]) -> Run:
    """Open the folder of a run.

    Raises:
        RunError: the folder is not a run.
    """
    return Run(path)


def load_policy(path: str | os.PathLike[str], seed_index: int | None = None) -> Policy:
    """A saved policy, from its own folder or from that of a run.

    Args:
        path: a folder written by `Policy.save`, or a run.
        seed_index: keep only this seed (0 to S - 1); default: all.

    Raises:
        RunError: no policy there.
    """
    folder = Path(path)
    policy = read_policy(folder / "policy" if (folder / "config.json").is_file() else folder, seed_index)
    return with_interface(policy)


def choose_device(name: str) -> torch.device:
    """The device of a name; `auto` is the GPU where there is one.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device {name!r} cannot be used here ({reason}); use auto or cpu") from error
    return device


def _plan(
    agent: Any,
    dataset: Source | None,
    seeds: int | Sequence[int],
    overrides: Mapping[str, Any],
    given: Mapping[str, dict[str, Any]],
    env: EnvSource | None,
    shown: Progress,
    trust_env: bool,
    recipes: bool,
) -> tuple[dict[str, Any], TransitionDataset]:
    """The config of a new run and its dataset: what was given, then the recipe, then the defaults."""
    from rlkit2.agents import agent_class, agent_classes, list_agents, make_config, read_config
    from rlkit2.agents.base import as_seeds
    from rlkit2.envs.builtin import builtin_id
    from rlkit2.training.building import agent_name, check_config, run_config
    from rlkit2.training.recipe import find_recipe, load_recipe

    if agent is None:
        raise ConfigError(f"no agent is named; choose one of: {', '.join(list_agents())}")
    recipe = (
        load_recipe(agent)
        if isinstance(agent, os.PathLike) or (isinstance(agent, str) and agent.endswith(".toml"))
        else None
    )
    name = recipe.agent if recipe else agent if isinstance(agent, str) else agent_name(agent)
    if isinstance(agent, str):
        agent_class(name)  # an unknown name is said before a dataset is fetched
    if dataset is None and recipe is None:
        raise ConfigError(f"no dataset is named; give one, for example: rlkit2 train {name} --dataset builtin/rooms")
    source = recipe.dataset if dataset is None and recipe else dataset
    assert source is not None
    if isinstance(source, str) and source.startswith("builtin/"):
        source = builtin_id(source)
    if recipe is None and isinstance(agent, str) and recipes:
        recipe = find_recipe(
            name, source if isinstance(source, str) else getattr(getattr(source, "spec", None), "id", "")
        )
    if recipe is not None:
        shown.message(f"recipe {recipe.path}")
        given = {name: {**getattr(recipe, name), **values} for name, values in given.items()}
    by_name = isinstance(agent, str | os.PathLike)
    fields = {**(recipe.config if recipe else {}), **overrides} if by_name else read_fields(type(agent), overrides)
    if not by_name:
        config = check_config(dataclasses.replace(agent, **fields))
    elif len(agent_classes(name)) == 1:  # else the kind of actions decides, see below
        config = make_config(name, **read_config(name, fields))
    else:
        read_config(name, fields)  # what suits no kind is said before a dataset is fetched
    chosen = {name: cls(**given[name]) for name, cls in SECTIONS.items()}
    transitions = load_dataset(source, **chosen["reading"].arguments(), trust_env=trust_env)
    if by_name and len(agent_classes(name)) > 1:
        kind = transitions.spec.action_kind
        config = make_config(name, kind, **read_config(name, fields, kind))
    config, text = agent_class(config).settled(config, transitions)
    if text:
        shown.message(text)
    plan = run_config(
        agent=name,
        config=config,
        dataset=transitions,
        source=_written(source, transitions),
        seeds=as_seeds(seeds),
        **chosen,
        env=typed_again(env) if isinstance(env, str) else None,
        recipe=str(recipe.path) if recipe else None,
    )
    if "schedule_curves" in plan:
        known = ", ".join(plan["schedule_curves"])
        shown.message(
            f"learning rates by the gradients of {plan['training']['refine_from']}: {known}; others fall along a line"
        )
    return plan, transitions


def _continued(
    run: Run,
    agent: Any,
    dataset: Source | None,
    seeds: int | Sequence[int],
    options: Mapping[str, Any],
    reading: Mapping[str, Any],
    trust_env: bool,
) -> tuple[dict[str, Any], TransitionDataset]:
    """The config of a resumed run, and its dataset, unchanged; more steps may be asked for, nothing else."""
    from rlkit2.agents.base import as_seeds
    from rlkit2.training.building import own_agent, run_class

    plan = run.config
    cls = run_class(plan)  # before a dataset is opened
    if agent is not None and agent != plan["agent"]:
        mend = f"name that: {run.resume_command}" if ":" in plan["agent"] else "resume it without naming an agent"
        raise ConfigError(f"{run.path} trains {plan['agent']}, not {agent}; {mend}")
    if seeds != 1 and list(as_seeds(seeds)) != plan["seeds"]:
        raise ConfigError(f"{run.path} trains seeds {plan['seeds']}; resume it without --seeds")
    for name, value in options.items():
        own = {**plan["config"], **plan["data"], **plan["training"]}.get(name)
        if name != "steps" and value != own:
            raise ConfigError(f"{run.path} has {name} = {own}; only steps may change when it is resumed")
    steps = options.get("steps", plan["training"]["steps"])
    if steps < plan["training"]["steps"]:
        raise ConfigError(
            f"{run.path} is a run of {plan['training']['steps']} steps; it cannot be resumed with {steps}"
        )
    if steps > plan["training"]["steps"] and plan["training"].get("stop_when") is not None:
        raise ConfigError(
            f"{run.path} ends with the checkpoint that {plan['training']['stop_when']} chooses, which more steps cannot follow; train a new run"
        )
    transitions = _known_dataset(run.path, plan, dataset, reading, trust_env)
    read = {"reading": {**plan.get("reading", {}), **reading}} if reading else {}
    return {**plan, **own_agent(cls), **read, "training": {**plan["training"], "steps": steps}}, transitions


def _known_dataset(
    path: Path, plan: Mapping[str, Any], dataset: Source | None, reading: Mapping[str, Any], trust_env: bool
) -> TransitionDataset:
    """The dataset of a run, as it was then, or from where it is said to be now."""
    from rlkit2.training.building import reading_arguments

    known = plan["dataset"]
    try:
        transitions = load_dataset(
            known["source"] if dataset is None else dataset,
            **reading_arguments(plan, reading),
            trust_env=trust_env,
        )
    except DatasetError as error:
        raise RunError(
            f"the dataset of {path} cannot be opened ({error}); say where it is now: --dataset ID or path "
            "(train(resume=..., dataset=...) in Python)"
        ) from error
    if transitions.spec.content_hash != known["content_hash"]:
        raise RunError(
            f"dataset {known['id']} is not what {path} was trained on (its content was {known['content_hash'][:12]}, "
            f"is {transitions.spec.content_hash[:12]}); restore it or start a new run"
        )
    return transitions


def _changed_schedule(run: Run, plan: Mapping[str, Any]) -> str | None:
    """One line where learning rates that fall over a run rise again because it is prolonged."""
    from rlkit2.training.building import agent_config, run_class

    before, steps = run.config["training"]["steps"], plan["training"]["steps"]
    constant = plan["training"].get("schedule", "constant") == "constant"
    if steps == before or (constant and not run_class(plan).depends_on_steps(agent_config(plan))):
        return None
    return (
        f"learning rates of {run.path} fell towards 0 at step {before} and now do so at step {steps}: they rise again where it continues, so the "
        f"end is not that of a run that was of {steps} steps from the start"
    )


def _changed_code(before: Mapping[str, Any], plan: Mapping[str, Any]) -> str | None:
    """One line where an agent of the user's own is resumed with other code than it was begun with."""
    if before.get("agent_hash") in (None, plan.get("agent_hash")):
        return None
    name = plan.get("agent_source", plan["agent"])
    return f"the code of {name} is not what the run was trained with so far; steps from here on follow the new code"


def _as_run(agent: Any) -> Run | None:
    """The run that this is, or whose folder it names; None for an agent."""
    if isinstance(agent, Run):
        return agent
    folder = isinstance(agent, os.PathLike) or (isinstance(agent, str) and (Path(agent) / "config.json").is_file())
    return Run(agent) if folder else None


def _written(source: Source, transitions: TransitionDataset) -> str:
    """What a run's config says for `load_dataset` to find the dataset by again."""
    origin = str(source) if isinstance(source, str | os.PathLike) else transitions.spec.id
    return str(Path(origin).resolve()) if Path(origin).exists() else origin


class _Session:
    """What the ways to train have in common: where, who is told, and from a plan to a run that is trained. Arguments as for `train`."""

    def __init__(
        self,
        device: str,
        compile: str,
        loggers: Sequence[str],
        progress: bool | Progress,
        env: EnvSource | None,
        trust_env: bool,
        until: int | None,
    ) -> None:
        from rlkit2.training.loggers import check_loggers

        self.shown = progress if isinstance(progress, Progress) else console_progress() if progress else Progress(None)
        self.target = choose_device(device)
        if compile not in ("auto", "on", "off"):
            raise ConfigError(f"compile must be auto, on or off, not {compile!r}")
        check_loggers(loggers)
        self.compile, self.loggers, self.env, self.trust_env, self.until = compile, loggers, env, trust_env, until

    def try_out(self, plan: Mapping[str, Any], factory: AgentFactory, spec: DatasetSpec) -> Agent:
        """The agent of one seed: a config that does not fit the data or the memory says so before a folder is made."""
        from rlkit2.training.building import agent_config, check_memory, check_weights
        from rlkit2.training.memory import out_of_memory

        count = len(plan["seeds"])
        check_weights(agent_config(plan), spec, count, self.target)
        with out_of_memory("the networks of one seed; choose smaller hidden sizes"):
            trial = factory(plan["seeds"][:1], "cpu")
        check_memory(trial, count, plan["training"]["batch_size"], self.target)
        return trial

    def source(self, plan: Mapping[str, Any]) -> EnvSource | None:
        """The environment that was named for this call or for the run; None: that of the dataset."""
        if self.env is None and plan["env"] is not None:
            check_named_id(str(plan["env"]), "the run's config.json", trust_env=self.trust_env)
            return str(plan["env"])
        return self.env

    @contextmanager
    def evaluator(self, plan: Mapping[str, Any]) -> Iterator[EpisodeEvaluator | None]:
        """Plays the episodes of the evaluations during training; None, and one line saying so, where there is no environment."""
        from rlkit2.evaluation import Evaluator
        from rlkit2.training.building import stored_spec

        training = plan["training"]
        if training["eval_every"] == 0:
            yield None
            return
        env = self.source(plan)
        try:
            evaluator = Evaluator(
                stored_spec(plan), episodes=training["eval_episodes"], env=env, trust_env=self.trust_env
            )
        except (EnvironmentUnavailableError, MissingExtraError) as error:
            if env is not None:
                raise
            self.shown.message(f"training without scores: {error}")
            yield None
            return
        with evaluator:
            yield evaluator

    def open(self, run: Run | None, plan: Mapping[str, Any], out: str | os.PathLike[str], doubts: Sequence[str]) -> Run:
        """The folder of the plan: a new one, or that of a run whose config changes at most as it does."""
        if run is None:
            agent = plan["agent"].rpartition(":")[2] + "-online" * ("online" in plan)
            run = Run.create(out, f"{agent}-{plan['dataset']['id']}", plan)
        elif plan != run.config:
            run.rewrite(plan)
        if doubts:
            run.update_manifest(warnings=list(doubts))
        self.shown.message(
            f"{run.path}: {plan['agent']} on {plan['dataset']['id']}, seeds {plan['seeds']}, {plan['training']['steps']} steps, {self.target}"
        )
        return run

    def fit(
        self,
        run: Run,
        prepared: TransitionDataset | None,
        factory: AgentFactory,
        evaluator: EpisodeEvaluator | None,
        make_group: Callable[[Agent], SeedGroup] | None = None,
    ) -> None:
        """Train it."""
        from rlkit2.training.loggers import make_loggers
        from rlkit2.training.trainer import Trainer

        Trainer(
            run,
            prepared,
            factory,
            device=self.target,
            compile=self.compile,
            evaluator=evaluator,
            loggers=make_loggers(self.loggers, run),
            progress=self.shown,
            until=self.until,
            make_group=make_group,
        ).fit()
