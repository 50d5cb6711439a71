"""Run the pages: every python block in order in one namespace per page, every console block in a shell, in a folder of the page's own.

The blocks of a page build on each other, so in parallel runs a page belongs to one worker (`pytest --dist loadfile`).

`<!-- skip: next -->` on the line before a block leaves it out (what needs a GPU or hours).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser


def run_console(example: Example) -> None:
    """Type the lines that begin with `$ ` into a shell; each must succeed."""
    lines = [line[2:] for line in example.parsed.splitlines() if line.startswith("$ ")]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "120",
    }
    for line in lines:
        result = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, f"{line}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"


def enter(namespace: dict[str, Any]) -> None:
    """A fresh folder, cache and dataset roots for one page."""
    folder = TemporaryDirectory(prefix="page-")
    namespace["_page"] = (folder, Path.cwd(), dict(os.environ))
    os.chdir(folder.name)
    for name, place in (("RLKIT2_CACHE", "cache"), ("RLKIT2_DATA", "builtin"), ("MINARI_DATASETS_PATH", "minari")):
        os.environ[name] = str(Path(folder.name, place))
    os.environ.setdefault("MPLBACKEND", "Agg")


def leave(namespace: dict[str, Any]) -> None:
    """Back to where the page was entered."""
    folder, before, environment = namespace["_page"]
    os.chdir(before)
    os.environ.clear()
    os.environ.update(environment)
    folder.cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), CodeBlockParser("console", run_console), SkipParser()],
    patterns=["*.md"],
    setup=enter,
    teardown=leave,
).pytest()
