"""What a user sees of a run: a live table on a terminal, plain lines elsewhere, nothing without a console."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from rlkit2.terminal import asked, make_console

PLAIN_EVERY = 5.0  # seconds between two plain lines about progress, at first; later a twentieth of the time so far
# Columns and the metrics that fill them, the first that an agent reports; a column that none fills is not shown.
COLUMNS: dict[str, tuple[str, ...]] = {
    "policy loss": ("policy/loss",),
    "critic loss": ("critic/loss", "value/loss"),
    "value": ("value/mean", "critic/q_mean", "policy/value"),
    "accuracy": ("preference/accuracy",),
    "score": ("evaluation/score",),
    "return": ("evaluation/return",),
    "return online": ("online/return",),
}


class Progress:
    """Shows one line per seed (losses, value, last score or return), the speed, the time left and the memory.

    Args:
        console: where to show it; None: nowhere.
        quiet: only messages, no table and no lines about progress.
    """

    def __init__(self, console: Console | None, *, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self._live: Live | None = None
        self._rows: dict[int, dict[str, str]] = {}
        self._status = ""
        self._now: Callable[[], int] = lambda: 0
        self._steps, self._unit = 0, "updates"
        self._first = 0
        self._began = 0.0
        self._shown = 0.0

    def start(self, seeds: Sequence[int], steps: int, now: Callable[[], int], unit: str = "updates") -> None:
        """Begin to show a run of `steps` steps, each a `unit`, of which `now()` are done."""
        self._unit = unit
        self._rows = {seed: {} for seed in seeds}
        self._now, self._steps, self._first, self._began = now, steps, now(), time.perf_counter()
        if self.console is not None and self.console.is_terminal and not self.quiet:
            self._live = Live(get_renderable=self._table, console=self.console, refresh_per_second=2)
            self._live.start()

    def stop(self) -> None:
        """End the live table and leave its last state on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    close = stop

    def message(self, text: str) -> None:
        """Say something that stays on the screen."""
        if self.console is not None:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def status(self, text: str) -> None:
        """Say what is being done besides updates, until the next log."""
        self._status = text

    def log(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Take up the newest numbers of each seed."""
        self._status = ""
        for line in lines:
            row = self._rows.setdefault(line["seed"], {})
            row.update({column: f"{value:.4g}" for column, value in _shown(line).items()})
        scored = any(name.startswith("evaluation/") for line in lines for name in line)
        if (
            self.console is not None
            and not self.quiet
            and self._live is None
            and lines
            and (scored or time.perf_counter() > self._shown + max(PLAIN_EVERY, (self._shown - self._began) / 20))
        ):
            self._shown = time.perf_counter()
            seeds = "; ".join(
                f"seed {seed}: " + ", ".join(f"{name} {row[name]}" for name in self._columns() if name in row)
                for seed, row in self._rows.items()
            )
            self.message(f"{self._speed()} | {seeds}")

    def _columns(self) -> list[str]:
        """Those that at least one seed fills, in their order."""
        filled = {name for row in self._rows.values() for name in row}
        return [name for name in (*COLUMNS, "loss") if name in filled]

    def _speed(self) -> str:
        step = self._now()
        rate = (step - self._first) / max(time.perf_counter() - self._began, 1e-9)
        left = f", {_duration((self._steps - step) / rate)} left" if rate > 0 and step < self._steps else ""
        return f"step {step}/{self._steps}, {rate:.0f} {self._unit}/s{left}, {_memory()}" + (
            f", {self._status}" if self._status else ""
        )

    def _table(self) -> Table:
        table = Table(caption=self._speed(), caption_justify="left")
        columns = self._columns()
        for column in ("seed", *columns):
            table.add_column(column, justify="right")
        for seed, row in self._rows.items():
            table.add_row(str(seed), *(row.get(column, "") for column in columns))
        return table


def console_progress() -> Progress:
    """Progress on standard error, so that standard output stays free for results."""
    return Progress(make_console(stderr=True), quiet=asked.quiet)


def _shown(line: Mapping[str, Any]) -> dict[str, float]:
    """What a line of metrics or of an evaluation puts into the columns; an agent without the usual names shows its first loss."""
    found = {
        column: next((line[name] for name in names if line.get(name) is not None), None)
        for column, names in COLUMNS.items()
    }
    if not any(value is not None for value in found.values()):
        found["loss"] = next((line[name] for name in sorted(line) if name.endswith("loss")), None)
    return {column: value for column, value in found.items() if value is not None}


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def _memory() -> str:
    """Memory in use: peak of the process, and of the GPU where there is one."""
    try:
        import resource
    except ImportError:  # not on this system
        return ""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    gpu = f", GPU {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
    return f"{kilobytes / 2**20:.1f} GiB{gpu}"
