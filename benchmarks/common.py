"""What every benchmark shares: interleaved timing, ratios, a table and a JSON file."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RAW_UNITS = {
    "value_unit": "reward",
    "residual_unit": "value",
    "weight": "positive_residual",
    "weight_residual": "sampled",
    "weight_normalization": "none",
}
"""O-DICE with V and R in units of reward and the released weight, where the temperature has to be known."""


def interleaved(
    cases: dict[str, Callable[[], Any]],
    rounds: int = 7,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every case in every round; the cases take turns, so that a slow minute of the machine hits all of them.

    `clock`: `time.process_time` for work of one thread, which then does not feel other processes.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(-warmup, rounds):
        for name, case in cases.items():
            start = clock()
            case()
            if turn >= 0:
                seconds[name].append(clock() - start)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median over rounds of slow / fast: how many times faster."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def report(name: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Print the rows as a table and write them to `benchmarks/results/NAME.json`."""
    console = Console(width=140)
    table = Table(title=name)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{row[c]:.3g}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns))
    console.print(table)
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    facts |= {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    (folder / f"{name}.json").write_text(json.dumps({"rows": rows, **facts}, indent=1) + "\n")
