"""`rlkit2 demo`: the main job on a built-in dataset in about two minutes."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlkit2.cli.parsing import command
from rlkit2.studies.demo import run_demo

DESCRIPTION = """Build a dataset, audit it, train O-DICE and behaviour cloning with several seeds, compare them and draw what was learnt.

Example: rlkit2 demo --seeds 4"""


def demo(*, seeds: int = 4, steps: int | None = None, out: Path = Path("runs/demo"), device: str = "auto") -> int:
    """Demo.

    Args:
        seeds: training runs per agent, trained together.
        steps: updates per seed; default: those of the recipes.
        out: folder of the runs, the picture and the page.
        device: auto, cpu, cuda or cuda:1.
    """
    began = time.perf_counter()
    result = run_demo(out, seeds=seeds, steps=steps, device=device)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    table = Table()
    for index, name in enumerate(result.comparison.header):
        table.add_column(name, justify="left" if index < 2 else "right")
    for cells in result.comparison.cells():
        table.add_row(*cells)
    console.print(table)
    console.print(
        "scores: per cent of the way from a random policy to an expert; no episode of the data leads from the start to the goal"
    )
    console.print(
        f"picture {result.picture}\npage    {result.page}\n{time.perf_counter() - began:.0f} s", soft_wrap=True
    )
    return 0


def run(arguments: Sequence[str]) -> int | None:
    """Entry of the command line."""
    return command(demo, arguments, prog="rlkit2 demo", description=DESCRIPTION)
