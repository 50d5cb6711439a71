"""The built-in datasets: made on first use from the recipes in `envs/`, kept as Minari datasets, the same bytes for the same recipe."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from minari import MinariDataset
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage

from rlkit2.data.export import write_minari
from rlkit2.data.folders import home, minari_root, new_folder
from rlkit2.envs.behaviors import make_behavior
from rlkit2.envs.recipe import DatasetRecipe, PolicyRecipe, read_recipe
from rlkit2.envs.rollouts import rollout
from rlkit2.errors import ConfigError, CorruptDatasetError, DatasetError, DatasetNotFoundError
from rlkit2.files import writing
from rlkit2.recipes import recipe_folder

Progress = Callable[[int, int], None]

# What the name of a family alone stands for: `builtin/rooms` is `builtin/rooms/stitch-sparse-v0`.
DEFAULTS = {
    "rooms": "stitch-sparse-v0",
    "rooms-images": "stitch-sparse-v0",
    "noisy-rooms": "explore-v0",
    "gridworld": "mixed-v0",
    "gridworld-images": "mixed-v0",
    "pendulum": "mixed-v0",
    "cartpole": "mixed-v0",
    "cartpole-images": "medium-v0",
    "pointmaze": "umaze-v0",
}


def data_root() -> Path:
    """Folder of the datasets rlkit2 builds: `$RLKIT2_DATA`, else `rlkit2/datasets` under `$XDG_DATA_HOME` (`~/.local/share`)."""
    if own := os.environ.get("RLKIT2_DATA"):
        return Path(own).expanduser().absolute()
    share = os.environ.get("XDG_DATA_HOME") or home("RLKIT2_DATA") / ".local" / "share"
    return Path(share).absolute() / "rlkit2" / "datasets"


def builtin_recipes() -> dict[str, Path]:
    """Recipe file of every built-in dataset, by id, in alphabetical order."""
    folder = recipe_folder("envs")
    files = sorted(folder.glob("**/recipe.toml"))
    return {f"builtin/{file.parent.relative_to(folder).as_posix()}": file for file in files}


def list_builtin() -> tuple[tuple[str, str], ...]:
    """Ids of the built-in datasets, each with a one-line description."""
    return tuple((dataset_id, read_recipe(file).description) for dataset_id, file in builtin_recipes().items())


def builtin_id(name: str) -> str:
    """The full id of a built-in dataset, also for a family's name alone (`builtin/rooms`).

    Raises:
        DatasetNotFoundError: there is no such dataset; the message names the closest ids.
    """
    recipes = builtin_recipes()
    family = name.removeprefix("builtin/").strip("/")
    wanted = f"builtin/{family}/{DEFAULTS[family]}" if family in DEFAULTS else name
    if wanted in recipes:
        return wanted
    families = [f"builtin/{name}" for name in DEFAULTS]
    close = get_close_matches(wanted, [*recipes, *families], 3, 0.7)
    hint = f"close ids: {', '.join(close)}" if close else f"families: {', '.join(families)}"
    raise DatasetNotFoundError(f"no built-in dataset {name!r}; {hint}; `rlkit2 data list` shows all")


def ensure_builtin(dataset_id: str, *, progress: Progress | None = None, rebuild: bool = False) -> MinariDataset:
    """Open a built-in dataset, building it if it is not there yet.

    Args:
        dataset_id: one of `list_builtin()`, or the name of a family, such as `builtin/rooms`.
        progress: called with (episodes done, episodes in all) while building.
        rebuild: build it even if it is there, and put it in the place of the old one.

    Raises:
        DatasetNotFoundError: no built-in dataset has that id.
        DatasetError: the folder of built datasets cannot be written.
        CorruptDatasetError: what is stored there cannot be read.
        MissingExtraError: the environment needs an extra that is not installed.
    """
    return _ensure(read_recipe(builtin_recipes()[builtin_id(dataset_id)]), data_root(), progress, rebuild)


def build_recipe(
    path: str | Path, *, root: str | Path | None = None, progress: Progress | None = None, rebuild: bool = False
) -> MinariDataset:
    """Build the dataset of a recipe file, or open it if it has been built from the same recipe before.

    Args:
        path: TOML file, see `rlkit2.envs.recipe.DatasetRecipe`.
        root: folder of datasets; by default Minari's own, so that every tool finds the dataset by its id.
        progress: called with (episodes done, episodes in all) while building.
        rebuild: build it even if it is there, and put it in the place of the old one.

    Raises:
        ConfigError: a field of the recipe is wrong; the message names it.
        DatasetError: the folder cannot be written, or holds a dataset of that id made from another recipe.
    """
    recipe = read_recipe(path)
    builtin = recipe.id.startswith("builtin/")
    if builtin and recipe_folder("envs") not in Path(path).resolve().parents:
        raise ConfigError(f"{path}: id {recipe.id!r} is in the namespace of the built-in datasets; choose another")
    own = data_root() if builtin else minari_root()
    return _ensure(recipe, own.absolute() if root is None else Path(root).absolute(), progress, rebuild)


def _ensure(recipe: DatasetRecipe, root: Path, progress: Progress | None, rebuild: bool) -> MinariDataset:
    folder = root / recipe.id
    if rebuild or not folder.exists():
        _build(recipe, root, folder, progress, rebuild)
    try:
        dataset = MinariDataset(folder / "data")
        digest = MinariStorage.read_raw_metadata(folder / "data").get("recipe_digest")
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise CorruptDatasetError(f"{recipe.id}: {folder} cannot be read ({error}); {_mend(recipe)}") from error
    if digest is None:
        raise DatasetError(f"{recipe.id}: {folder} holds a dataset of that id that no recipe made; choose another id")
    if digest != recipe.digest:
        raise DatasetError(f"{recipe.id}: {folder} was made from another recipe; {_mend(recipe)}, or change the id")
    return dataset


def _mend(recipe: DatasetRecipe) -> str:
    what = recipe.id if recipe.id.startswith("builtin/") else "--recipe FILE"
    return f"build it anew with: rlkit2 data build {what} --rebuild"


def _build(recipe: DatasetRecipe, root: Path, folder: Path, progress: Progress | None, rebuild: bool) -> None:
    variable = "RLKIT2_DATA" if recipe.id.startswith("builtin/") else "MINARI_DATASETS_PATH"
    with (
        writing(folder, f"set {variable} to a folder that can be written"),
        suppress(FileExistsError),  # the same dataset, from a faster process
        new_folder(folder, root, replace=rebuild) as new,
    ):
        write_dataset(recipe, new / "data", progress=progress)


def write_dataset(recipe: DatasetRecipe, path: Path, *, progress: Progress | None = None) -> None:
    """Run the recipe and write the dataset into the new folder `path`, which must be absolute."""
    spec, eval_spec = recipe.spec(), recipe.spec(**recipe.evaluation)
    done = itertools.count(1)
    total = recipe.episodes + 2 * recipe.reference.episodes
    count = (lambda: progress(next(done), total)) if progress is not None else (lambda: None)
    episodes = _collect(recipe, count)
    with closing(gymnasium.make(spec)) as env:
        observation_space, action_space = env.observation_space, env.action_space
    scores = reference_scores(recipe, count)
    write_minari(
        path,
        recipe.id,
        episodes,
        observation_space=observation_space,
        action_space=action_space,
        env_spec=spec,
        metadata={
            "eval_env_spec": eval_spec.to_json(),
            "algorithm_name": "scripted behaviours of rlkit2",
            "author": "rlkit2",
            "description": recipe.description,
            "recipe": asdict(recipe),
            "recipe_digest": recipe.digest,
            "ref_min_score": scores["random"]["mean"],
            "ref_max_score": scores["expert"]["mean"],
            "num_episodes_average_score": recipe.reference.episodes,
            "reference_scores": scores,
        },
        # Minari writes a thousand short episodes to HDF5 in a second, twenty times faster than to Arrow with its folder per episode.
        data_format="hdf5",
    )


def _collect(recipe: DatasetRecipe, count: Callable[[], None]) -> list[EpisodeBuffer]:
    """All episodes, shuffled, so that their order says nothing about the behaviour; `count` is called after each."""
    episodes: list[EpisodeBuffer] = []
    for i, behavior in enumerate(recipe.behaviors):
        seed = int(np.random.SeedSequence((recipe.seed, i)).generate_state(1)[0])
        spec = recipe.spec(**behavior.kwargs)
        for episode in _run(spec, behavior, episodes=behavior.episodes, seed=seed, max_steps=behavior.max_steps):
            episodes.append(episode)
            count()
    order = np.random.default_rng(recipe.seed).permutation(len(episodes))
    return [episodes[i] for i in order]


def _run(spec: EnvSpec, policy: PolicyRecipe, **how: Any) -> Iterator[EpisodeBuffer]:
    with closing(gymnasium.make(spec)) as env:
        mixed = {"noise": policy.noise, "epsilon": policy.epsilon}
        yield from rollout(spec, lambda: make_behavior(policy.policy, env, **mixed, **policy.options), **how)


def reference_scores(recipe: DatasetRecipe, count: Callable[[], None] = lambda: None) -> dict[str, dict[str, Any]]:
    """Returns of uniform actions ("random") and of the expert in the evaluation environment; `count` is called after each episode.

    Returns:
        for each, `mean`, `standard_error` (None for a single episode), `episodes`, `seed` and `policy` (JSON types).
    """
    spec, how = recipe.spec(**recipe.evaluation), recipe.reference
    scores = {}
    for name, policy in (("random", PolicyRecipe("random")), ("expert", how.expert)):
        totals: list[float] = []
        for episode in _run(spec, policy, episodes=how.episodes, seed=how.seed):
            totals.append(float(np.sum(episode.rewards)))
            count()
        scores[name] = {
            "mean": float(np.mean(totals)),
            "standard_error": float(np.std(totals, ddof=1) / np.sqrt(len(totals))) if len(totals) > 1 else None,
            "episodes": len(totals),
            "seed": how.seed,
            "policy": json.dumps(
                {"policy": policy.policy, "noise": policy.noise, "epsilon": policy.epsilon, **policy.options}
            ),
        }
    return scores
