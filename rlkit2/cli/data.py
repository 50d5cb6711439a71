"""`rlkit2 data ...`: list, inspect, check, build, import and relabel datasets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from rlkit2.api import load_dataset
from rlkit2.cli import data_text as text
from rlkit2.cli import output
from rlkit2.cli.parsing import AS_IS, HowToRead, subcommand
from rlkit2.data import audit, read_dataset
from rlkit2.data.cache import cache_folder, clean, entries, verify
from rlkit2.data.environments import make_environment
from rlkit2.data.folders import minari_root
from rlkit2.data.infos import read_infos
from rlkit2.data.load import local_datasets
from rlkit2.data.relabel import load_reward, reward_values
from rlkit2.data.reward_calls import reads_infos
from rlkit2.data.spec import DatasetSpec
from rlkit2.envs.builtin import build_recipe, builtin_id, builtin_recipes, data_root, ensure_builtin
from rlkit2.errors import ConfigError, DatasetError
from rlkit2.progress import progress_bar

Source = Positional[Annotated[str, arg(metavar="DATASET")]]
NewId = Positional[Annotated[str, arg(metavar="NEW_ID")]]
File = Annotated[Path | None, arg(metavar="FILE")]
Id = Annotated[str | None, arg(metavar="ENV")]
Number = Annotated[float | None, arg(metavar="RETURN")]
Text = Annotated[str | None, arg(metavar="TEXT")]


def list_datasets(*, json: bool = False) -> int:
    """Built-in datasets and those in Minari's root.

    Example: rlkit2 data list

    Args:
        json: print JSON.
    """
    found = [text.summary(name, data_root() / name / "data", recipe) for name, recipe in builtin_recipes().items()]
    found += [text.summary(name, path) for name, path in local_datasets().items()]
    if json:
        output.print_json({"minari_root": str(minari_root()), "builtin_root": str(data_root()), "datasets": found})
    else:
        text.print_list(found)
    return 0


def info(
    source: Source, *, reading: HowToRead = AS_IS, trust_env: bool = False, json: bool = False, markdown: bool = False
) -> int:
    """What a dataset holds.

    Example: rlkit2 data info builtin/rooms

    Args:
        source: Minari id, builtin/... id, or a file or folder in a known format.
        reading: how to read it.
        trust_env: where no spaces are stored, build the environment as the file says, which runs the code it names.
        json: print JSON.
        markdown: print a card in Markdown.
    """
    dataset = load_dataset(source, **reading.arguments(), trust_env=trust_env)
    described = text.describe(dataset, source)
    if json:
        output.print_json(described)
    elif markdown:
        text.print_card(described)
    else:
        text.print_info(described)
    return 0


def check(
    source: Source,
    *,
    reading: HowToRead = AS_IS,
    trust_env: bool = False,
    figure: File = None,
    json: bool = False,
) -> int:
    """Check a dataset before training; exit status 1 where something is wrong.

    Example: rlkit2 data check builtin/pendulum --figure pendulum.png

    Args:
        source: Minari id, builtin/... id, or a file or folder in a known format.
        reading: how to read it.
        trust_env: where no spaces are stored, build the environment as the file says, which runs the code it names.
        figure: draw the distributions into this file (.png, .svg, .pdf).
        json: print everything as JSON.
    """
    dataset = load_dataset(source, **reading.arguments(), trust_env=trust_env)
    with progress_bar("checking") as progress:
        report = audit(dataset, progress=progress)
    drawn = report.figure(figure) if figure is not None else None
    if json:
        output.print_json(report.to_dict())
    else:
        text.print_report(report)
        if drawn is not None:
            output.say(f"figure: {drawn}")
    return 0 if report.ok else 1


def build(
    names: Positional[Annotated[tuple[str, ...], arg(metavar="ID...")]] = (),
    *,
    recipe: File = None,
    all: bool = False,
    rebuild: bool = False,
) -> int:
    """Build built-in datasets, or one from a recipe of yours.

    Example: rlkit2 data build builtin/rooms

    Args:
        names: built-in ids or families, such as builtin/rooms.
        recipe: build the dataset of this recipe (TOML) into Minari's root instead.
        all: build all built-in datasets (those of extras that are not installed are left out).
        rebuild: build what is there already anew and put it in its place.
    """
    if bool(names) + bool(recipe) + all != 1:
        raise ConfigError("name built-in datasets, or give --recipe FILE, or --all; `rlkit2 data list` shows the names")
    if recipe is not None:
        with progress_bar(f"building {recipe}") as progress:
            dataset = build_recipe(recipe, progress=progress, rebuild=rebuild)
        output.say(text.built(dataset))
    for name in builtin_recipes() if all else map(builtin_id, names):
        with progress_bar(f"building {name}") as progress:
            try:
                dataset = ensure_builtin(name, progress=progress, rebuild=rebuild)
            except ImportError as error:
                if not all:
                    raise
                output.say(f"{name} is left out: {error}")
                continue
        output.say(text.built(dataset))
    return 0


def import_file(
    file: Positional[Annotated[Path, arg(metavar="FILE")]],
    dataset_id: NewId,
    *,
    reading: HowToRead = AS_IS,
    trust_env: bool = False,
    env: Id = None,
    eval_env: Id = None,
    ref_min_score: Number = None,
    ref_max_score: Number = None,
    description: Text = None,
    format: Literal["hdf5", "arrow"] = "hdf5",
) -> int:
    """Make a Minari dataset of a file in another format.

    Example: rlkit2 data import hopper_medium.hdf5 my/hopper/medium-v0 --env Hopper-v5

    Args:
        file: file or folder in a known format (D4RL, robomimic and d3rlpy HDF5, npz, OGBench npz, CSV, Parquet, a reader of yours).
        dataset_id: id of the new Minari dataset, namespace/name-v0.
        reading: how to read it.
        trust_env: where no spaces are stored, build the environment as the file says, which runs the code it names.
        env: the environment, which also tells the spaces: a Gymnasium id, or my_envs.py:NAME or module:NAME of what makes one (the dataset names it
            only if it is registered); default: none, and spaces as the arrays allow.
        eval_env: the environment to evaluate in; default: the same.
        ref_min_score: return of a random policy there.
        ref_max_score: return of an expert there.
        description: what the data are.
        format: hdf5 or arrow.
    """
    spec = _environment_spec(env, eval_env) if env is not None else None
    if not file.exists():
        raise DatasetError(f"{file} does not exist")
    with progress_bar(f"reading {file}") as progress:
        dataset = read_dataset(
            file, spec=spec, cache=False, progress=progress, **reading.arguments(), trust_env=trust_env
        )
    with progress_bar(f"writing {dataset_id}") as progress:
        written = dataset.to_minari(
            dataset_id,
            data_format=format,
            progress=progress,
            ref_min_score=ref_min_score,
            ref_max_score=ref_max_score,
            description=description or f"imported from {file.name}",
            provenance={"imported_from": file.name, "content_hash": dataset.spec.content_hash},
        )
    output.say(text.built(written))
    for line in text.note_lines(dataset.spec.notes):
        output.say(line)
    if spec is not None and spec.env_spec is None:
        output.say(
            f"{env} is not registered with Gymnasium, so the dataset does not name it; evaluation will need --env {env}"
        )
    if spec is None:
        output.say(
            f"no --env: actions are {text.short(dataset.spec.action_space)}; evaluation will need an environment"
        )
    return 0


def _environment_spec(env: str, eval_env: str | None) -> DatasetSpec:
    made = make_environment(env)
    try:
        other = make_environment(eval_env) if eval_env else made
        other.close()
        return DatasetSpec(
            observation_space=made.observation_space,
            action_space=made.action_space,
            env_spec=made.spec,
            eval_env_spec=other.spec,
        )
    finally:
        made.close()


def relabel(
    source: Source,
    dataset_id: NewId,
    *,
    reward: Annotated[str, arg(metavar="REWARD")],
    reading: HowToRead = AS_IS,
    trust_env: bool = False,
    description: Text = None,
    format: Literal["hdf5", "arrow"] = "hdf5",
) -> int:
    """Make a Minari dataset with other rewards.

    Example: rlkit2 data relabel builtin/rooms my/rooms/distance-v0 --reward rewards.py:distance

    Args:
        source: Minari id, builtin/... id, or a file or folder in a known format.
        dataset_id: id of the new Minari dataset, namespace/name-v0.
        reward: file.py:OBJECT or package.module:OBJECT, a function or torch module of observations, actions, next_observations, terminations and
            infos or some of them, n rows each, giving n numbers, or a reward network; or a file (.npy, .npz, .safetensors) of one per transition.
        reading: how to read it.
        trust_env: where no spaces are stored, build the environment as the file says, which runs the code it names.
        description: what the data are.
        format: hdf5 or arrow.
    """
    dataset = load_dataset(source, **reading.arguments(), trust_env=trust_env)
    function, origin = load_reward(reward)
    infos = read_infos(source) if reads_infos(function) else None
    with progress_bar("relabelling") as progress:
        relabelled = dataset.with_rewards(reward_values(dataset, function, infos=infos, progress=progress))
    with progress_bar(f"writing {dataset_id}") as progress:
        written = relabelled.to_minari(
            dataset_id,
            data_format=format,
            progress=progress,
            description=description or f"{dataset.spec.id} with the rewards of {reward}",
            provenance={"relabelled_from": dataset.spec.id, "content_hash": dataset.spec.content_hash, **origin},
        )
    output.say(text.built(written))
    low, high = (f"{float(value):g}" for value in (relabelled.rewards.min(), relabelled.rewards.max()))
    output.say(
        f"rewards {low} to {high}, mean {float(relabelled.rewards.mean()):g}; all else is as in {dataset.spec.id}"
    )
    return 0


def cache(
    action: Positional[Literal["list", "clean", "verify"]],
    source: Positional[Annotated[str | None, arg(metavar="DATASET")]] = None,
    *,
    reading: HowToRead = AS_IS,
    trust_env: bool = False,
    limit: Annotated[float | None, arg(metavar="GB")] = None,
    json: bool = False,
) -> int:
    """Packed copies of datasets: list, clean, verify.

    Example: rlkit2 data cache clean --limit 20

    Args:
        action: list: what is kept, with sizes; clean: remove all, or down to --limit; verify: hold DATASET's copy against its source.
        source: the dataset to verify.
        reading: how to read it.
        trust_env: where no spaces are stored, build the environment as the file says, which runs the code it names.
        limit: keep what was used last, up to so many gigabytes; what has lost its source goes first.
        json: print JSON.
    """
    if action == "verify":
        if source is None:
            raise ConfigError("name the dataset: rlkit2 data cache verify DATASET")
        kept = load_dataset(source, **reading.arguments(), trust_env=trust_env)
        same = verify(kept, load_dataset(source, cache=False, **reading.arguments(), trust_env=trust_env))
        output.say(
            f"{source}: the cached copy {'is the same as' if same else 'DIFFERS from'} its source ({kept.spec.content_hash[:12]})"
        )
        return 0 if same else 1
    if limit is not None and (action != "clean" or limit < 0):
        raise ConfigError("--limit is a number of gigabytes of at least 0, for: rlkit2 data cache clean")
    found = entries() if action == "list" else clean(limit=None if limit is None else int(limit * 1e9))
    total = sum(entry.bytes for entry in found)
    if json:
        rows = [{**asdict(entry), "folder": str(entry.folder)} for entry in found]
        output.print_json(
            {"folder": str(cache_folder()), "bytes": total, "removed": action == "clean", "entries": rows}
        )
        return 0
    for entry in found:
        used = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        output.say(
            f"{entry.bytes / 1e6:10,.1f} MB  {used}  {entry.dataset}{'  (its source is gone)' if entry.stale else ''}"
        )
    done = "removed" if action == "clean" else "kept"
    output.say(
        f"{len(found)} dataset{'' if len(found) == 1 else 's'}, {total / 1e6:,.1f} MB {done} in {cache_folder()} (RLKIT2_CACHE)"
    )
    return 0


SUBCOMMANDS: dict[str, Callable[..., int]] = {
    "list": list_datasets,
    "info": info,
    "check": check,
    "build": build,
    "import": import_file,
    "relabel": relabel,
    "cache": cache,
}


def run(arguments: Sequence[str]) -> int | None:
    """Entry of the command line."""
    return subcommand("data", SUBCOMMANDS, arguments, config=(FlagCreatePairsOff,))
