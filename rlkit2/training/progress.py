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

PLAIN_EVERY = 5.0  # seconds between two plain lines about progress, at first; later a twentieth of the time so far


class Progress:
    """Shows one line per seed (loss, value, last score), the speed, the time left and the memory.

    Args:
        console: where to show it; None: nowhere.
    """

    def __init__(self, console: Console | None) -> None:
        self.console = console
        self._live: Live | None = None
        self._rows: dict[int, dict[str, str]] = {}
        self._status = ""
        self._now: Callable[[], int] = lambda: 0
        self._steps = 0
        self._first = 0
        self._began = 0.0
        self._shown = 0.0

    def start(self, seeds: Sequence[int], steps: int, now: Callable[[], int]) -> None:
        """Begin to show a run of `steps` updates of which `now()` are done."""
        self._rows = {seed: {} for seed in seeds}
        self._now, self._steps, self._first, self._began = now, steps, now(), time.perf_counter()
        if self.console is not None and self.console.is_terminal:
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
            for column, value in (
                ("loss", _first(line, "loss")),
                ("value", line.get("value/mean")),
                ("score", line.get("evaluation/score")),
            ):
                if value is not None:
                    row[column] = f"{value:.4g}"
        scored = any("evaluation/score" in line for line in lines)
        if (
            self.console is not None
            and self._live is None
            and lines
            and (scored or time.perf_counter() > self._shown + max(PLAIN_EVERY, (self._shown - self._began) / 20))
        ):
            self._shown = time.perf_counter()
            seeds = "; ".join(
                f"seed {seed}: " + ", ".join(f"{name} {value}" for name, value in row.items())
                for seed, row in self._rows.items()
            )
            self.message(f"{self._speed()} | {seeds}")

    def _speed(self) -> str:
        step = self._now()
        rate = (step - self._first) / max(time.perf_counter() - self._began, 1e-9)
        left = f", {_duration((self._steps - step) / rate)} left" if rate > 0 and step < self._steps else ""
        return f"step {step}/{self._steps}, {rate:.0f} updates/s{left}, {_memory()}" + (
            f", {self._status}" if self._status else ""
        )

    def _table(self) -> Table:
        table = Table(caption=self._speed(), caption_justify="left")
        for column in ("seed", "loss", "value", "score"):
            table.add_column(column, justify="right")
        for seed, row in self._rows.items():
            table.add_row(str(seed), *(row.get(column, "-") for column in ("loss", "value", "score")))
        return table


def console_progress() -> Progress:
    """Progress on standard error, so that standard output stays free for results."""
    return Progress(Console(stderr=True))


def _first(line: Mapping[str, Any], ending: str) -> float | None:
    names = sorted((name for name in line if name.endswith(ending)), key=lambda name: not name.startswith("policy/"))
    return line[names[0]] if names else None


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
