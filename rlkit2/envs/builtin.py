"""The built-in datasets: made on first use from the recipes in `envs/`, kept as Minari datasets, the same bytes for the same recipe."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium
import minari
import numpy as np
from gymnasium.envs.registration import EnvSpec
from minari import MinariDataset
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage

from rlkit2.envs.behaviors import make_behavior
from rlkit2.envs.recipe import DatasetRecipe, PolicyRecipe, read_recipe
from rlkit2.envs.rollouts import rollout
from rlkit2.errors import ConfigError, CorruptDatasetError, DatasetError, DatasetNotFoundError
from rlkit2.recipes import recipe_folder

Progress = Callable[[int, int], None]


def data_root() -> Path:
    """Folder of the datasets rlkit2 builds: `$RLKIT2_DATA`, else `rlkit2/datasets` under `$XDG_DATA_HOME` (`~/.local/share`)."""
    if own := os.environ.get("RLKIT2_DATA"):
        return Path(own).expanduser().absolute()
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(home).absolute() / "rlkit2" / "datasets"


def builtin_recipes() -> dict[str, Path]:
    """Recipe file of every built-in dataset, by id, in alphabetical order."""
    folder = recipe_folder("envs")
    files = sorted(folder.glob("**/recipe.toml"))
    return {f"builtin/{file.parent.relative_to(folder).as_posix()}": file for file in files}


def list_builtin() -> tuple[tuple[str, str], ...]:
    """Ids of the built-in datasets, each with a one-line description."""
    return tuple((dataset_id, read_recipe(file).description) for dataset_id, file in builtin_recipes().items())


def ensure_builtin(dataset_id: str, *, progress: Progress | None = None) -> MinariDataset:
    """Open a built-in dataset, building it if it is not there yet.

    Args:
        dataset_id: one of `list_builtin()`.
        progress: called with (episodes done, episodes in all) while building.

    Raises:
        DatasetNotFoundError: no built-in dataset has that id.
        DatasetError: the folder of built datasets cannot be written.
        CorruptDatasetError: what is stored there cannot be read.
        MissingExtraError: the environment needs an extra that is not installed.
    """
    recipes = builtin_recipes()
    if dataset_id not in recipes:
        raise DatasetNotFoundError(f"no built-in dataset {dataset_id!r}; there are {', '.join(recipes)}")
    return _ensure(read_recipe(recipes[dataset_id]), data_root(), progress)


def build_recipe(
    path: str | Path, *, root: str | Path | None = None, progress: Progress | None = None
) -> MinariDataset:
    """Build the dataset of a recipe file, or open it if it has been built from the same recipe before.

    Args:
        path: TOML file, see `rlkit2.envs.recipe.DatasetRecipe`.
        root: folder of datasets; `data_root()` by default. Minari finds the dataset there with MINARI_DATASETS_PATH.
        progress: called with (episodes done, episodes in all) while building.

    Raises:
        ConfigError: a field of the recipe is wrong; the message names it.
        DatasetError: the folder cannot be written, or holds a dataset of that id made from another recipe.
    """
    recipe = read_recipe(path)
    if recipe.id.startswith("builtin/") and recipe_folder("envs") not in Path(path).resolve().parents:
        raise ConfigError(f"{path}: id {recipe.id!r} is in the namespace of the built-in datasets; choose another")
    return _ensure(recipe, data_root() if root is None else Path(root).absolute(), progress)


def _ensure(recipe: DatasetRecipe, root: Path, progress: Progress | None) -> MinariDataset:
    folder = root / recipe.id
    if not folder.exists():
        temporary = root / f".building-{uuid.uuid4().hex}"
        try:
            temporary.mkdir(parents=True)
            write_dataset(recipe, temporary / "data", progress=progress)
            _publish(temporary, folder)
        except OSError as error:
            raise DatasetError(
                f"cannot write {folder} ({error.strerror}); set RLKIT2_DATA to a folder that can be written"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    try:
        dataset = MinariDataset(folder / "data")
        digest = MinariStorage.read_raw_metadata(folder / "data").get("recipe_digest")
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise CorruptDatasetError(
            f"{recipe.id}: {folder} cannot be read ({error}); delete it to build it anew"
        ) from error
    if digest != recipe.digest:
        raise DatasetError(
            f"{recipe.id}: {folder} was made from another recipe; delete it to build it anew, or change the id"
        )
    return dataset


def _publish(temporary: Path, folder: Path) -> None:
    """Put the finished dataset in its place; if another process was faster, its dataset stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.exists():
            raise


def write_dataset(recipe: DatasetRecipe, path: Path, *, progress: Progress | None = None) -> None:
    """Run the recipe and write the dataset into the new folder `path`, which must be absolute."""
    spec, eval_spec = recipe.spec(), recipe.spec(**recipe.evaluation)
    episodes = _collect(recipe, progress)
    # HDF5: Minari writes a thousand short episodes in a second, twenty times faster than Arrow with its folder per episode.
    with closing(gymnasium.make(spec)) as env:
        storage = MinariStorage.new(path, env.observation_space, env.action_space, env_spec=spec, data_format="hdf5")
    storage.update_episodes(episodes)
    scores = reference_scores(recipe)
    storage.update_metadata(
        {
            "dataset_id": recipe.id,
            "minari_version": minari.__version__,
            "eval_env_spec": eval_spec.to_json(),
            "algorithm_name": "scripted behaviours of rlkit2",
            "author": {"rlkit2"},
            "description": recipe.description,
            "recipe_digest": recipe.digest,
            "ref_min_score": scores["random"]["mean"],
            "ref_max_score": scores["expert"]["mean"],
            "num_episodes_average_score": recipe.reference.episodes,
            "reference_scores": scores,
        }
    )


def _collect(recipe: DatasetRecipe, progress: Progress | None) -> list[EpisodeBuffer]:
    """All episodes, shuffled, so that their order says nothing about the behaviour."""
    episodes: list[EpisodeBuffer] = []
    for i, behavior in enumerate(recipe.behaviors):
        seed = int(np.random.SeedSequence((recipe.seed, i)).generate_state(1)[0])
        run = _run(
            recipe.spec(**behavior.kwargs),
            behavior,
            episodes=behavior.episodes,
            seed=seed,
            max_steps=behavior.max_steps,
        )
        for episode in run:
            episodes.append(episode)
            if progress is not None:
                progress(len(episodes), recipe.episodes)
    order = np.random.default_rng(recipe.seed).permutation(len(episodes))
    return [episodes[i] for i in order]


def _run(spec: EnvSpec, policy: PolicyRecipe, **how: Any) -> Sequence[EpisodeBuffer]:
    with closing(gymnasium.make(spec)) as env:
        mixed = {"noise": policy.noise, "epsilon": policy.epsilon}
        return list(rollout(spec, lambda: make_behavior(policy.policy, env, **mixed, **policy.options), **how))


def reference_scores(recipe: DatasetRecipe) -> dict[str, dict[str, Any]]:
    """Returns of uniform actions ("random") and of the expert in the evaluation environment.

    Returns:
        for each, `mean`, `standard_error`, `episodes`, `seed` and `policy` (JSON types).
    """
    scores = {}
    for name, policy in (("random", PolicyRecipe("random")), ("expert", recipe.reference.expert)):
        run = _run(
            recipe.spec(**recipe.evaluation), policy, episodes=recipe.reference.episodes, seed=recipe.reference.seed
        )
        returns = np.array([np.sum(episode.rewards) for episode in run])
        scores[name] = {
            "mean": float(returns.mean()),
            "standard_error": float(returns.std(ddof=1) / np.sqrt(len(returns))),
            "episodes": len(returns),
            "seed": recipe.reference.seed,
            "policy": json.dumps(
                {"policy": policy.policy, "noise": policy.noise, "epsilon": policy.epsilon, **policy.options}
            ),
        }
    return scores
