"""`rlkit2 compare RUN...`: final scores of runs side by side, with intervals and the probability of improvement."""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from rlkit2.api import evaluate, load_run
from rlkit2.cli.evaluate import episode_bar
from rlkit2.cli.parsing import command
from rlkit2.evaluation.evaluation import Evaluation
from rlkit2.reporting.comparison import compare as compare_runs
from rlkit2.training.run import Run

DESCRIPTION = """Compare the final scores of runs: mean, IQM, 95 % intervals and probability of improvement over a baseline.

Example: rlkit2 compare runs/bc-* runs/odice-* --baseline bc"""


def compare(
    runs: Positional[tuple[Path, ...]],
    *,
    baseline: str | None = None,
    episodes: int | None = None,
    last: int = 5,
    json: bool = False,
    markdown: bool = False,
) -> int:
    """Compare.

    Args:
        runs: folders of runs.
        baseline: agent, label or run folder the others are held against; default: the first run.
        episodes: play this many episodes per seed with the final policies, instead of reading the last evaluation of the training.
        last: number of evaluations in the column "last evaluations".
        json: print JSON.
        markdown: print a Markdown table.
    """

    def score(run: Run) -> Evaluation:
        assert episodes is not None
        with episode_bar(run.path.name) as progress:
            return evaluate(run, episodes=episodes, env=run.config.get("env"), progress=progress)

    scorer = None if episodes is None else score
    comparison = compare_runs([load_run(path) for path in runs], baseline=baseline, last=last, evaluate=scorer)
    out = Console(width=None if sys.stdout.isatty() else 160)
    if json:
        out.print_json(json_format.dumps(comparison.to_dict(), allow_nan=False))
    elif markdown:
        out.print(comparison.markdown(), end="", markup=False, highlight=False, soft_wrap=True)
    else:
        table = Table()
        for index, name in enumerate(comparison.header):
            table.add_column(name, justify="left" if index < 2 else "right")
        for cells in comparison.cells():
            table.add_row(*cells)
        out.print(table)
        for note in comparison.notes:
            out.print(note, highlight=False)
    return 0


def run(arguments: Sequence[str]) -> int | None:
    """Entry of the command line."""
    return command(compare, arguments, prog="rlkit2 compare", description=DESCRIPTION)
