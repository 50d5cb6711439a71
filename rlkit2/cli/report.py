"""`rlkit2 report RUN... --out report.html`: one self-contained page about runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tyro.conf import Positional

from rlkit2.cli import output
from rlkit2.cli.parsing import command
from rlkit2.reporting.comparison import open_runs
from rlkit2.reporting.report import write_report


def report(runs: Positional[tuple[Path, ...]], *, out: Path = Path("report.html"), baseline: str | None = None) -> int:
    """Write one self-contained HTML page about runs: final scores, learning curves, diagnostics, configuration, manifest.

    Example: rlkit2 report runs/bc-* runs/odice-* --out report.html

    Args:
        runs: folders of runs.
        out: file to write.
        baseline: agent, label or run folder the others are held against; default: the first run.
    """
    opened, left_out = open_runs(runs)
    for line in left_out:
        output.say(line, stderr=True)
    path = write_report(opened, out, baseline=baseline)
    output.say(f"wrote {path}")
    return 0


def run(arguments: Sequence[str]) -> int | None:
    """Entry of the command line."""
    return command(report, arguments, prog="rlkit2 report")
