"""Work in processes of this machine that end with what started them, and whose death is one clear line."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rlkit2.errors import Preempted, RunError

PREEMPTING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))


@contextmanager
def preemptible() -> Iterator[None]:
    """Let signals by which a machine is asked for raise `Preempted` in here; in the main thread, elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Preempted(number)

    before = {number: signal.signal(number, stop) for number in PREEMPTING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def this_machine() -> str:
    """What no other machine is called, and this one no more after it was started anew."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else uuid.getnode()}"


def is_alive(process: int) -> bool:
    """Whether there is a process of that number on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def run_jobs(jobs: Sequence[tuple[Any, ...]], workers: int) -> Iterator[Any]:
    """Yield the results of jobs `(function, *arguments)` as they finish: in `workers` processes with one torch thread each, here where one is enough.

    Raises:
        RunError: a process was killed. Whatever a job raises is raised here; either ends the other processes.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        for function, *arguments in jobs:
            yield function(*arguments)
        return
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _begin, (os.getpid(),)) as pool:
        try:
            for future in as_completed([pool.submit(_call, *job) for job in jobs]):
                yield future.result()
        except BrokenProcessPool as error:
            raise RunError(
                "a worker process was killed (the system does that where memory is short); what is finished is kept: run the same command again "
                "to go on, with fewer workers if memory was short"
            ) from error
        except BaseException:
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
            raise


def _begin(parent: int) -> None:
    """How a worker starts: interrupts are its parent's to answer, and it ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(parent, lambda: os._exit(1))


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    torch = sys.modules.get("torch")  # not imported for work that does without
    if torch is not None:
        torch.set_num_threads(1)
    return function(*arguments)


def end_with(parent: int, end: Callable[[], object]) -> None:
    """Call `end` in a thread when the process `parent`, which started this one, is gone: what was killed must not run on beside what is started
    in its place."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        end()

    threading.Thread(target=watch, daemon=True).start()
