"""Recipes: TOML files with everything a run needs, and the configs and overrides that are read in the same way.

agent = "odice"
dataset = "zoo/hopper/medium-replay-v0"
[config]      # fields of the agent's config
[data]        # fields of DataOptions
[training]    # fields of TrainingOptions
[reading]     # fields of ReadingOptions
"""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit2.agents import agent_class, class_name, plain_name, read_config
from rlkit2.errors import ConfigError
from rlkit2.fields import closest, read_fields
from rlkit2.recipes import recipe_folder
from rlkit2.toml import read_toml
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
    reading: dict[str, Any]


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read and check a recipe file.

    Raises:
        ConfigError: the file is missing, no TOML, or has an unknown section, agent or field, or a value of the wrong type.
    """
    path = Path(path)
    content = _read(path)
    known = {"agent", "dataset", "config", *SECTIONS}
    for name, value in content.items():
        if name not in known:
            raise ConfigError(f"recipe {path} has an unknown entry {name!r}{closest(name, known)}")
        if name not in ("agent", "dataset") and not isinstance(value, dict):
            raise ConfigError(f"recipe {path}: {name} must be a section, [{name}]")
    try:
        cls = agent_class(content["agent"])
        config = read_config(content["agent"], content.get("config", {}))
        sections = {name: read_fields(options, content.get(name, {})) for name, options in SECTIONS.items()}
    except ConfigError as error:
        raise ConfigError(f"recipe {path}: {error}") from error
    agent = class_name(cls) if ":" in content["agent"] else content["agent"]
    return Recipe(path, agent, content["dataset"], config, **sections)


def _read(path: Path) -> dict[str, Any]:
    """The content of a recipe that names its agent and dataset."""
    content = read_toml(path, "recipe")
    for name in ("agent", "dataset"):
        if not isinstance(content.get(name), str):
            raise ConfigError(f'recipe {path} does not name its {name}; add a line {name} = "..." at the top')
    return content


def find_recipe(agent: str, dataset: str) -> Recipe | None:
    """The recipe of an agent for a dataset, or None.

    Shipped ones are `agents/<agent>/*.toml`; a preset without a folder of its own shares its agent's. Those of an agent from outside
    are `recipes/*.toml` beside its file.
    """
    wanted = agent_class(agent)
    shipped = wanted.__module__.startswith("rlkit2.")
    try:
        folder = _shipped_folder(agent) if shipped else Path(inspect.getfile(wanted)).parent / "recipes"
    except (ConfigError, OSError, TypeError):  # no recipes in this installation; an agent that was typed into a console
        return None
    names = {folder.name} if shipped else {agent, f"{wanted.__module__}:{wanted.__qualname__}"}
    for path in sorted(folder.glob("*.toml")):
        content = _read(path)  # those of other agents beside it are not loaded, and need not be
        place, colon, called = content["agent"].rpartition(":")
        name = f"{Path(place).stem if place.endswith('.py') else place}{colon}{called}"
        if content["dataset"] == dataset and name in names:
            return load_recipe(path)
    return None


def agent_recipes(agent: str) -> list[Recipe]:
    """The shipped recipes of an agent, in the order of their files; none for an agent from outside."""
    if not agent_class(agent).__module__.startswith("rlkit2."):
        return []
    return [load_recipe(path) for path in sorted(_shipped_folder(agent).glob("*.toml"))]


def _shipped_folder(agent: str) -> Path:
    folder = recipe_folder("agents")
    return folder / (agent if (folder / agent).is_dir() else plain_name(agent))
