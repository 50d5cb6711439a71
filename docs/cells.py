"""Notebooks among the pages: MyST files whose `{code-cell}` blocks run here, in the tests, in Jupyter (by jupytext), and as a download.

`python docs/cells.py [NAME...]` runs notebooks whole and keeps what they print and draw in `docs/images/notebooks/`, from where the site shows it
below each cell; so a build of the site trains nothing. The tests run the same cells with the smaller settings of their `:short:` lines, and refuse
kept outputs of other code.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import json
import os
import re
import sys
import time
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

PAGES = Path(__file__).parent / "notebooks"
KEPT = Path(__file__).parent / "images" / "notebooks"
CELL = re.compile(r"^```\{code-cell\} ipython3\n((?::\w+: [^\n]*\n)*)\n?(.*?)^```$", re.M | re.S)
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


@dataclass(frozen=True)
class Cell:
    """A block of code; `alt` is said of its pictures, `short` are settings that the tests put in the place of its own."""

    code: str
    alt: str = ""
    short: str = ""


def cell_of(match: re.Match[str]) -> Cell:
    """What a match of `CELL` holds."""
    options = dict(re.findall(r"^:(\w+): (.*)$", match[1], re.M))
    return Cell(match[2].rstrip("\n"), options.get("alt", ""), options.get("short", ""))


def notebooks() -> list[Path]:
    """The pages that are notebooks."""
    return sorted(PAGES.glob("*.md"))


def code_of(page: Path) -> str:
    """What kept outputs belong to: a digest of all cells."""
    cells = [cell_of(match).code for match in CELL.finditer(page.read_text())]
    return hashlib.sha256("\0".join(cells).encode()).hexdigest()


def show(code: str, namespace: dict[str, Any]) -> tuple[str, list[Any]]:
    """Run a cell as Jupyter does: what it printed, with the value of a last line that is an expression, and the figures that it made or ends in."""
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    body = ast.parse(code).body
    shown = body and isinstance(body[-1], ast.Expr) and not code.endswith(";")
    last = body.pop() if shown else None
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(ast.Module(body, []), "<cell>", "exec"), namespace)
        value = (
            eval(compile(ast.Expression(last.value), "<cell>", "eval"), namespace)
            if isinstance(last, ast.Expr)
            else None
        )
        if value is not None and not isinstance(value, Figure):
            sys.stdout.write(f"{value!r}\n")
    figures = [plt.figure(number) for number in plt.get_fignums()]
    plt.close("all")
    return printed.getvalue(), figures + [value] * (isinstance(value, Figure) and value not in figures)


def record(page: Path) -> tuple[float, float]:
    """Run a notebook in an empty folder and keep its outputs; returns the seconds, and those of processors, that it took."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    kept, pictures, began, busy, before = [], {}, time.perf_counter(), time.process_time(), Path.cwd()
    with TemporaryDirectory(prefix="notebook-") as folder:
        os.chdir(folder)
        try:
            for number, match in enumerate(CELL.finditer(page.read_text())):
                text, figures = show(cell_of(match).code, namespace)
                names = [f"{page.stem}-{number}{chr(97 + i)}.png" for i in range(len(figures))]
                pictures |= dict(zip(names, figures, strict=True))
                kept.append({"text": text, "figures": names})
        finally:
            os.chdir(before)
    KEPT.mkdir(parents=True, exist_ok=True)
    for old in KEPT.glob(f"{page.stem}-*.png"):
        old.unlink()
    for name, figure in pictures.items():
        figure.savefig(KEPT / name, dpi=90, metadata={"Software": None})
    (KEPT / f"{page.stem}.json").write_text(json.dumps({"code": code_of(page), "cells": kept}, indent=1) + "\n")
    return time.perf_counter() - began, time.process_time() - busy


def outputs(page: Path) -> dict[str, Any]:
    """What `record` kept: `code`, the digest of the cells, and for each cell its `text` and the names of its `figures`."""
    found: dict[str, Any] = json.loads((KEPT / f"{page.stem}.json").read_text())
    return found


def as_ipynb(page: Path) -> str:
    """The page as a Jupyter notebook without outputs."""
    text = page.read_text()
    start = text.index("---\n", 4) + 4  # behind the front matter
    cells: list[dict[str, Any]] = []

    def prose(part: str) -> None:
        if part := re.sub(r"^\{download\}.*\n", "", part, flags=re.M).strip():
            part = re.sub(r"\[([^]]+)\]\(\.\.[^)]*\)", r"\1", part)  # links lead to pages of the site
            cells.append({"cell_type": "markdown", "metadata": {}, "source": part})

    for match in CELL.finditer(text):
        prose(text[start : match.start()])
        code = {"execution_count": None, "outputs": [], "source": cell_of(match).code}
        cells.append({"cell_type": "code", "metadata": {}, **code})
        start = match.end()
    prose(text[start:])
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    return json.dumps({"cells": cells, "metadata": KERNEL, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


def write_ipynbs(folder: Path) -> None:
    """Every notebook as a file to download; files that would not change are left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for page in notebooks():
        path, text = folder / f"{page.stem}.ipynb", as_ipynb(page)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this: `{code-cell}` shows its code and, below it, what was kept of its output."""
    from docutils import nodes
    from docutils.parsers.rst import directives
    from sphinx.util.docutils import SphinxDirective

    class CodeCell(SphinxDirective):
        has_content = True
        optional_arguments = 1
        option_spec: ClassVar = {"alt": directives.unchanged, "short": directives.unchanged}

        def run(self) -> list[nodes.Node]:
            page = Path(self.env.doc2path(self.env.docname))
            number = self.env.temp_data.setdefault("cells", 0)
            self.env.temp_data["cells"] = number + 1
            code = "\n".join(self.content)
            found: list[nodes.Node] = [nodes.literal_block(code, code, language="python")]
            self.env.note_dependency(str(KEPT / f"{page.stem}.json"))
            kept = outputs(page)["cells"][number]
            if kept["text"]:
                found.append(
                    nodes.literal_block(kept["text"], kept["text"].rstrip(), language="text", classes=["output"])
                )
            alt = self.options.get("alt", "")
            found += [nodes.image(uri=f"/images/notebooks/{name}", alt=alt) for name in kept["figures"]]
            return found

    app.add_directive("code-cell", CodeCell)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def main() -> int:
    """Run notebooks whole and keep their outputs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of files in docs/notebooks, without .md; default: all")
    names = parser.parse_args().names
    os.environ["MPLBACKEND"] = "agg"
    for page in notebooks():
        if not names or page.stem in names:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                seconds, busy = record(page)
                sys.stdout.write(f"{page.stem}: {seconds:.0f} s, {busy:.0f} s of processors\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
