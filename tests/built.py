"""Built-in datasets that many tests and pages use: built once, by whichever process asks first, kept in pytest's cache, and copied to everyone else.

What is kept was made by the same code, recipes and libraries: whatever a dataset follows from is in the name of its folder.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from tempfile import mkdtemp

import pytest

SHARED = "RLKIT2_TESTS_BUILT"  # inherited by the workers of pytest-xdist
REPOSITORY = Path(__file__).parents[1]
MADE_BY = ("rlkit2/*.py", "rlkit2/data/**/*.py", "rlkit2/envs/**/*.py", "envs/**/recipe.toml")
MADE_WITH = ("gymnasium", "h5py", "minari", "numpy", "scipy")
DAY = 86400.0


def pytest_configure(config: pytest.Config) -> None:
    """Name the folder, which the workers inherit; every `conftest.py` that uses it imports this hook."""
    if SHARED not in os.environ:
        try:
            os.environ[SHARED] = str(kept(config.cache.mkdir("built")))  # type: ignore[union-attr]
        except (AttributeError, OSError):  # without pytest's cache: for this run alone
            os.environ[SHARED] = mkdtemp(prefix="rlkit2-built-")
            config.add_cleanup(lambda: shutil.rmtree(os.environ[SHARED], ignore_errors=True))
        config.add_cleanup(lambda: os.environ.pop(SHARED, None))


def kept(cache: Path) -> Path:
    """The folder of what is made today; those of other code go when no run has used them for a day."""
    made = sha256(platform.platform().encode() + platform.python_version().encode())
    for file in sorted(path for pattern in MADE_BY for path in REPOSITORY.glob(pattern)):
        made.update(file.relative_to(REPOSITORY).as_posix().encode() + b"\0" + file.read_bytes())
    for library in MADE_WITH:
        made.update(f"{library} {version(library)}".encode())
    folder = cache / made.hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    os.utime(folder)
    for other in cache.iterdir():
        if time.time() - other.stat().st_mtime > DAY:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def give_built(*names: str, root: Path | None = None) -> Path:
    """Put these datasets into a folder, by default where `RLKIT2_DATA` says, as if they had been built there; returns the folder."""
    from rlkit2.envs.builtin import (
        build_recipe,
        builtin_id,
        builtin_recipes,
        data_root,
    )  # this file is read before the tests begin

    root = data_root() if root is None else root
    for name in map(builtin_id, names):
        if not (root / name).exists():
            build_recipe(builtin_recipes()[name], root=os.environ[SHARED])
            shutil.copytree(Path(os.environ[SHARED], name), root / name)
    return root


def named_in(text: str) -> list[str]:
    """The built-in datasets that the code of a page names."""
    from rlkit2.envs.builtin import builtin_id
    from rlkit2.errors import DatasetNotFoundError

    blocks = re.findall(r"^```(?:python|console|toml|\{code-cell\} ipython3)\n(.*?)^```", text, re.S | re.M)
    found = []
    for name in sorted({match for block in blocks for match in re.findall(r"builtin/[\w/-]*\w", block)}):
        try:
            found.append(builtin_id(name))
        except DatasetNotFoundError:  # a page may show what a wrong name leads to
            continue
    return sorted(set(found))
