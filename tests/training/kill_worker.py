"""Runs the same training many times in forked children, kills each at another moment, resumes it, and reports how often.

A process of its own, so that torch is imported once and no child inherits the threads of a test runner.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import rlkit2
import rlkit2.evaluation
import rlkit2.training.building
import rlkit2.training.loggers
from rlkit2 import files
from rlkit2.agents.bc import BCConfig
from rlkit2.training import checkpoints
from tests.training.tiny_problem import Walk, tiny_dataset

DATASET = tiny_dataset()
OPTIONS: dict[str, Any] = {"env": Walk, "eval_episodes": 2, "progress": False}


def train(out: Path) -> None:
    """Start the run in `out`, or go on with the one that is there."""
    found = sorted(out.glob("*/config.json"))
    if found:
        rlkit2.train(dataset=DATASET, resume=found[0].parent, **OPTIONS)
    else:
        config = BCConfig(hidden_sizes=(8,))
        schedule = {"steps": 60, "log_every": 7, "eval_every": 20, "checkpoint_every": 15, "batch_size": 8}
        rlkit2.train(config, DATASET, seeds=3, out=out, normalize_observations=True, **schedule, **OPTIONS)


def install(deadly: int) -> Callable[[], int]:
    """Count what a run does to files and kill the process in the middle of operation number `deadly`."""
    count = 0

    def deadly_now() -> bool:
        nonlocal count
        count += 1
        return count == deadly

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if deadly_now():
                die()
            return function(*arguments, **options)

        return wrapped

    write, write_synced, rmtree = os.write, files.write_synced, shutil.rmtree

    def torn_write(descriptor: int, data: bytes) -> int:
        if deadly_now():
            write(descriptor, data[: len(data) // 2])
            die()
        return write(descriptor, data)

    def torn_file(path: Path, data: bytes, **options: Any) -> None:
        if deadly_now():
            path.write_bytes(data[: len(data) // 2])
            die()
        write_synced(path, data, **options)

    def half_deleted(path: Path, *arguments: Any, **options: Any) -> None:
        if path.exists() and deadly_now():
            next(iter(sorted(path.iterdir()))).unlink()
            die()
        rmtree(path, *arguments, **options)

    os.write, os.replace, os.ftruncate = torn_write, wrap(os.replace), wrap(os.ftruncate)
    shutil.rmtree = half_deleted
    files.write_synced = checkpoints.write_synced = torn_file
    return lambda: count


def child(work: Callable[[], None]) -> int:
    """Do something in a forked child; returns its process number."""
    process = os.fork()
    if process == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001 (a forked child must not return; its parent reads the exit status)
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return process


def wait(process: int) -> bool:
    """Whether the child ended by itself; an error in it ends this program."""
    status = os.waitpid(process, 0)[1]
    if os.WIFSIGNALED(status):
        return False
    if os.WEXITSTATUS(status):
        sys.exit(f"a child failed, status {status}")
    return True


def main(out: Path, at_files: int, at_times: int) -> None:
    """Make `out/whole` and `out/killed-*`, and print how many of the runs really were killed."""
    began = time.perf_counter()

    def whole() -> None:
        operations = install(-1)
        train(out / "whole")
        (out / "operations").write_text(str(operations()))

    wait(child(whole))
    seconds = time.perf_counter() - began
    operations = int((out / "operations").read_text())
    rng = random.Random(0)
    moments = sorted(rng.sample(range(1, operations + 1), at_files))
    killed = 0
    for index in range(at_files + at_times):
        folder = out / f"killed-{index}"

        def doomed(index: int = index, folder: Path = folder) -> None:
            if index < at_files:
                install(moments[index])
            train(folder)

        process = child(doomed)
        if index >= at_files:
            time.sleep(rng.uniform(0.1, 0.9) * seconds)
            os.kill(process, signal.SIGKILL)
        killed += not wait(process)
        wait(child(lambda folder=folder: train(folder)))
    sys.stdout.write(json.dumps({"operations": operations, "killed": killed}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
