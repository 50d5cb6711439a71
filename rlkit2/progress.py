"""One progress bar for everything that may take seconds: on a terminal or in a notebook, never in a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rlkit2.terminal import asked, make_console

PATIENCE = 0.5  # seconds; what is done sooner shows no bar


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, moved by the function it gives: (done, in all). Nothing is imported or shown for short work."""
    shown: list[tuple[Any, Any]] = []
    began = time.monotonic()

    def show(done: int, total: int) -> None:
        if not shown:
            if time.monotonic() - began < PATIENCE:
                return
            shown.append(_start(label))
        bar, task = shown[0]
        bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        for bar, _ in shown:
            bar.stop()


def _start(label: str) -> tuple[Any, Any]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = make_console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bar = Progress(
        *columns,
        console=console,
        transient=True,
        disable=asked.quiet or not (console.is_terminal or console.is_jupyter),
    )
    bar.start()
    return bar, bar.add_task(label, total=None)
