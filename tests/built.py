"""Built-in datasets that many tests and pages use: built once in a run of the tests, by whichever process asks first, and copied to everyone else."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from tempfile import mkdtemp

import pytest

SHARED = "RLKIT2_TESTS_BUILT"  # inherited by the workers of pytest-xdist


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder of this run, which goes when it ends; every `conftest.py` that uses it imports this hook."""
    if SHARED not in os.environ:
        os.environ[SHARED] = mkdtemp(prefix="rlkit2-built-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(SHARED), ignore_errors=True))


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
