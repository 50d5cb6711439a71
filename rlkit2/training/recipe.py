"""Recipes: TOML files with everything a run needs, and the configs and overrides that are read in the same way.

agent = "odice"
dataset = "zoo/hopper/medium-replay-v0"
[config]      # fields of the agent's config
[data]        # fields of DataOptions
[training]    # fields of TrainingOptions
"""

from __future__ import annotations

import inspect
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit2.agents import agent_class, plain_name
from rlkit2.errors import ConfigError
from rlkit2.fields import closest, read_fields
from rlkit2.recipes import recipe_folder
from rlkit2.training.options import SECTIONS


@dataclass(frozen=True)
class Recipe:
    """One recipe: the agent's config and the options that were given; what was not given keeps its default."""

    path: Path
    agent: str
    dataset: str
    config: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any]


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read and check a recipe file.

    Raises:
        ConfigError: the file is missing, no TOML, or has an unknown section, agent or field, or a value of the wrong type.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"recipe {path} does not exist") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"recipe {path} is not readable TOML: {error}") from error
    for name in ("agent", "dataset"):
        if not isinstance(content.get(name), str):
            raise ConfigError(f'recipe {path} does not name its {name}; add a line {name} = "..." at the top')
    known = {"agent", "dataset", "config", *SECTIONS}
    for name, value in content.items():
        if name not in known:
            raise ConfigError(f"recipe {path} has an unknown entry {name!r}{closest(name, known)}")
        if name not in ("agent", "dataset") and not isinstance(value, dict):
            raise ConfigError(f"recipe {path}: {name} must be a section, [{name}]")
    try:
        config = read_fields(agent_class(content["agent"]).config_class, content.get("config", {}))
        sections = {name: read_fields(cls, content.get(name, {})) for name, cls in SECTIONS.items()}
    except ConfigError as error:
        raise ConfigError(f"recipe {path}: {error}") from error
    return Recipe(path, content["agent"], content["dataset"], config, **sections)


def find_recipe(agent: str, dataset: str) -> Recipe | None:
    """The recipe of an agent for a dataset, or None.

    Shipped ones are `agents/<agent>/*.toml`; a preset without a folder of its own shares its agent's. Those of an agent of the user's own
    are `recipes/*.toml` beside its file.
    """
    wanted = agent_class(agent)
    try:
        folder = recipe_folder("agents") / (agent if (recipe_folder("agents") / agent).is_dir() else plain_name(agent))
    except ConfigError:
        folder = Path()
    if ":" in agent:  # an agent of the user's own
        folder = Path(inspect.getfile(wanted)).parent / "recipes"
    for path in sorted(folder.glob("*.toml")):
        recipe = load_recipe(path)
        if recipe.dataset == dataset and (recipe.agent == folder.name or agent_class(recipe.agent) is wanted):
            return recipe
    return None
