"""Where the recipes are: at the top level of a checkout, under `rlkit2/_recipes` in an installed wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rlkit2.errors import ConfigError


def recipe_folder(kind: Literal["agents", "envs"]) -> Path:
    """Folder that holds the recipes of a kind.

    Args:
        kind: "agents" (hyper-parameters, one TOML per dataset) or "envs" (built-in datasets, one folder each).

    Raises:
        ConfigError: neither the installed package nor a checkout around it holds that folder.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "_recipes" / kind, package.parent / kind):
        if folder.is_dir():
            return folder
    raise ConfigError(f"no {kind} recipes beside {package}; reinstall rlkit2")
