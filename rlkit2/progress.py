"""One progress bar for everything that may take seconds: on a terminal or in a notebook, never in a pipe."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rlkit2.errors import RLKitError
from rlkit2.terminal import asked, live, make_console

PATIENCE = 0.5  # seconds; what is done sooner shows no bar
POLL = 1.0  # seconds
SHARES = 1000  # parts into which a share is counted


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
            if not bar.disable:  # one that was never shown would print an empty line in older versions of rich
                bar.stop()
                live.remove(bar.console)


@contextmanager
def polled(measure: Callable[[], float], progress: Callable[[int, int], None] | None) -> Iterator[None]:
    """While the block runs, tell `progress` about every second which share of the work is done; `measure` gives it, in [0, 1]."""
    if progress is None:
        yield
        return
    ended = threading.Event()

    def poll() -> None:
        while not ended.wait(POLL):
            with suppress(RLKitError, OSError):  # a file that is just being written
                progress(round(SHARES * measure()), SHARES)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


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
    if not bar.disable:
        bar.start()
        live.append(console)
    return bar, bar.add_task(label, total=None)
