"""`rlkit2 report RUN... --out report.html`: one self-contained page about runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from rlkit2.cli import output
from rlkit2.cli.parsing import command
from rlkit2.errors import ConfigError
from rlkit2.files import write_atomically
from rlkit2.progress import progress_bar
from rlkit2.reporting.groups import open_runs, split_folders
from rlkit2.reporting.report import report_page
from rlkit2.reporting.watching import served, state_of


def report(
    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN...")]],
    *,
    out: Path = Path("report.html"),
    baseline: str | None = None,
    title: str = "rlkit2 report",
    watch: bool = False,
    port: int = 0,
) -> int:
    """Write one self-contained HTML page about runs: scores with intervals, curves, comparisons, settings, data, computing, diagnostics.

    Example: rlkit2 report runs/* --out report.html
             rlkit2 report runs/* --watch

    Args:
        runs: folders of runs; also folders that `rlkit2 starc ... --out` and `rlkit2 entangle model --out` wrote, for the diagnostics.
        out: file to write.
        baseline: agent, label or run folder the others are held against; default: the first run.
        title: of the page.
        watch: serve the page on this machine instead of writing it, kept up to date while runs are trained, until Ctrl-C.
        port: with --watch; default: a free one.
    """
    paths, folders = split_folders(runs)
    if not paths and folders:
        raise ConfigError("a report needs at least one run besides the folders of measurements")

    def page(stamp: str | None = None, progress: Callable[[int, int], None] = lambda done, total: None) -> str:
        opened, left_out = open_runs(paths)
        if stamp is None:
            for line in left_out:
                output.say(line, stderr=True)
        return report_page(
            opened,
            baseline=baseline,
            title=title,
            folders=folders,
            left_out=left_out,
            stamp=stamp,
            progress=progress,
        )

    if watch:
        page()  # what cannot be shown is said here, not in the browser
        with served(page, lambda: state_of(paths), port=port) as address:
            output.say(f"{address} (Ctrl-C ends it)")
            _until_interrupted()
        return 0
    with progress_bar("report") as bar:
        content = page(progress=bar)
    write_atomically(out, content)
    output.say(f"wrote {out}")
    return 0


def _until_interrupted() -> None:
    with suppress(KeyboardInterrupt):
        threading.Event().wait()


def run(arguments: Sequence[str]) -> int | None:
    """Entry of the command line."""
    return command(report, arguments, prog="rlkit2 report")
