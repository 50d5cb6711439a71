"""`rlkit2 demo`: the main job on a built-in dataset in about two minutes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rlkit2.cli import output
from rlkit2.cli.parsing import command
from rlkit2.studies.demo import run_demo


def demo(*, seeds: int = 4, steps: int | None = None, out: Path = Path("runs/demo"), device: str = "auto") -> int:
    """Build a dataset, audit it, train O-DICE and behaviour cloning with several seeds, compare them and draw what was learnt.

    Example: rlkit2 demo --seeds 4

    Args:
        seeds: training runs per agent, trained together.
        steps: updates per seed; default: those of the recipes.
        out: folder of the runs, the picture and the page.
        device: auto, cpu, cuda or cuda:1.
    """
    began = time.perf_counter()
    result = run_demo(out, seeds=seeds, steps=steps, device=device)
    output.print_table(result.comparison.header, result.comparison.cells(), left=2)
    output.say(
        "scores: per cent of the way from a random policy to an expert; no episode of the data leads from the start to the goal"
    )
    output.say(f"picture {result.picture}\npage    {result.page}\n{time.perf_counter() - began:.0f} s")
    return 0


def run(arguments: Sequence[str]) -> int | None:
    """Entry of the command line."""
    return command(demo, arguments, prog="rlkit2 demo")
