"""Reading TOML files that people write, or are sent."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from rlkit2.errors import ConfigError, first_line


def read_toml(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """The content of a TOML file; `what` it is ("recipe", "sweep") stands in errors.

    Raises:
        ConfigError: no such file, or not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{what} {path} does not exist") from error
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{what} {path} is not readable TOML: {first_line(error)}") from error
