"""Run the pages: every python block in order in one namespace per page, every console block in a shell, in a folder of the page's own.

Cells of notebooks run as in Jupyter, with the smaller settings of their `:short:` lines.

The blocks of a page build on each other, so in parallel runs a page belongs to one worker (`pytest --dist loadfile`).

`<!-- skip: next -->` on the line before a block leaves it out (what needs a GPU or hours).
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sybil import Document, Example, Region, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from docs.cells import CELL, cell_of, show
from rlkit2.cli.main import main
from tests.built import give_built, named_in, pytest_configure

__all__ = ["pytest_configure"]


def run_console(example: Example) -> None:
    """Do what the lines that begin with `$ ` say; each must succeed.

    A command of rlkit2 by itself runs in this process, which has imported everything already; others are typed into a shell.
    """
    for line in (line[2:] for line in example.parsed.splitlines() if line.startswith("$ ")):
        alone = line.startswith("rlkit2 ") and not set(re.sub(r"'[^']*'", "", line)) & set("|&;<>()`")
        run = in_this_process if alone else in_a_shell
        code, output = run(line)
        assert code == 0, f"{line}\n{output[-4000:]}"


def in_this_process(line: str) -> tuple[int, str]:
    """Exit code and output of a command of rlkit2, whose words are what a shell makes of the line."""
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True).stdout
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written), warnings.catch_warnings():
        code = main(words.split("\0")[1:-1])
    return code, written.getvalue()


def in_this_process_alone(work: str, folders: Sequence[Path], jobs: int, options: Any, report: Any) -> None:
    """The local engine of sweeps and studies without its processes, each of which would import everything again; `tests/sweeps` holds both alike."""
    from rlkit2.sweeps.worker import carry_out

    for folder in folders:
        report(folder, carry_out(work, str(folder)))


def in_a_shell(line: str) -> tuple[int, str]:
    """Exit code and output of a line typed into a shell."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "120"}
    result = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=240)
    return result.returncode, result.stdout + result.stderr


def find_cells(document: Document) -> Iterator[Region]:
    """The cells of a notebook."""
    for match in CELL.finditer(document.text):
        yield Region(match.start(), match.end(), cell_of(match), run_cell)


def run_cell(example: Example) -> None:
    """Do what a cell says, and shorten it."""
    show(example.parsed.code, example.namespace)
    exec(example.parsed.short, example.namespace)


def note_datasets(document: Document) -> list[Region]:
    """A parser that finds no examples: it tells `enter` which built-in datasets the page uses."""
    document.namespace["_datasets"] = named_in(document.text)
    return []


def enter(namespace: dict[str, Any]) -> None:
    """A fresh folder, cache and dataset roots for one page, and in them the built-in datasets that it uses, which it would build itself."""
    folder = TemporaryDirectory(prefix="page-")
    namespace["_page"] = (folder, Path.cwd(), dict(os.environ))
    os.chdir(folder.name)
    for name, place in (("RLKIT2_CACHE", "cache"), ("RLKIT2_DATA", "builtin"), ("MINARI_DATASETS_PATH", "minari")):
        os.environ[name] = str(Path(folder.name, place))
    os.environ.setdefault("MPLBACKEND", "Agg")
    give_built(*namespace["_datasets"])
    from rlkit2.sweeps.engines import ENGINES

    namespace["_engine"], ENGINES["local"] = ENGINES["local"], in_this_process_alone


def leave(namespace: dict[str, Any]) -> None:
    """Back to where the page was entered."""
    from rlkit2.sweeps.engines import ENGINES

    ENGINES["local"] = namespace["_engine"]
    folder, before, environment = namespace["_page"]
    os.chdir(before)
    os.environ.clear()
    os.environ.update(environment)
    folder.cleanup()


pytest_collect_file = Sybil(
    parsers=[note_datasets, find_cells, PythonCodeBlockParser(), CodeBlockParser("console", run_console), SkipParser()],
    patterns=["*.md"],
    excludes=["generated/*"],
    setup=enter,
    teardown=leave,
).pytest()
