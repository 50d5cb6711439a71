"""Work on one folder in a process of its own: `python -m rlkit2.sweeps.worker MODULE:FUNCTION FOLDER`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from rlkit2.api import train
from rlkit2.errors import ConfigError, Preempted, RLKitError, first_line, require
from rlkit2.processes import end_with, preemptible
from rlkit2.sweeps.experiment import find_run
from rlkit2.training.ownership import is_owned, owned
from rlkit2.training.run_files import read_json

SETTINGS = "experiment.json"


def train_experiment(folder: Path) -> str:
    """Train what `experiment.json` in the folder says: begin it, resume it, or leave it alone if it is finished.

    Jobs of a driver that was killed may still be at it: they are waited for, and what they have trained is gone on from.

    Returns:
        The status of the run: `finished`, `failed` (all seeds stopped) or `paused` (at the step that the settings name).
    """
    while is_owned(folder):
        time.sleep(1.0)
    with owned(folder):
        return _train(folder)


def _train(folder: Path) -> str:
    settings: dict[str, Any] = read_json(folder / SETTINGS)
    run = find_run(folder)
    if run is None:
        run = train(
            settings["agent"],
            settings["dataset"],
            seeds=settings["seeds"],
            env=settings["env"],
            out=folder,
            overrides=settings["config"],
            device=settings["device"],
            trust_env=settings["trust_env"],
            loggers=settings["loggers"],
            progress=False,
            until=settings.get("until"),
            recipes=settings.get("recipes", True),
            **settings["data"],
            **settings["training"],
            **settings["reading"],
        )
    elif run.status not in ("finished", "failed"):
        own = settings["agent"] if ":" in settings["agent"] else None
        run = train(
            own,
            resume=run,
            env=settings["env"],
            device=settings["device"],
            trust_env=settings["trust_env"],
            loggers=settings["loggers"],
            progress=False,
            until=settings.get("until"),
        )
    return "paused" if settings.get("until") and run.status == "interrupted" else run.status


def work_name(work: Callable[[Path], str]) -> str:
    """`module:function`, by which another process finds the function.

    Raises:
        ConfigError: it is not a function at the top level of a module of rlkit2.
    """
    name = f"{work.__module__}:{work.__qualname__}"
    if find_work(name) is not work:
        raise ConfigError(f"{name} is not the function that other processes find by that name")
    return name


def find_work(name: str) -> Callable[[Path], str]:
    """The function of `module:function`; only rlkit2's own modules are looked into.

    Raises:
        ConfigError: there is none.
    """
    module, _, function = name.partition(":")
    found = getattr(import_module(module), function, None) if module.startswith("rlkit2.") else None
    if not callable(found):
        raise ConfigError(f"{name} is not a function of rlkit2")
    return found  # type: ignore[no-any-return]


def carry_out(name: str, folder: str) -> str:
    """Call the function of that name on a folder: its status, `interrupted`, or `error: ` and what ended it.

    Whatever is raised ends this piece of work and no other; an error that is not ours leaves its traceback in the folder's `log.txt`.
    """
    try:
        return attempt(name, folder)
    except Preempted:
        return "interrupted"


class SlurmWork:
    """`carry_out` for submitit: work that Slurm wants to stop is saved, then goes back into the queue, where submitit puts it."""

    def __call__(self, name: str, folder: str) -> str:
        """See `carry_out`."""
        try:
            with preemptible():
                return attempt(name, folder)
        except Preempted as preempted:
            if callable(signal.getsignal(preempted.number)):  # submitit's, which waits for one of these signals
                signal.raise_signal(preempted.number)
            return "interrupted"

    def checkpoint(self, name: str, folder: str) -> Any:
        """What submitit puts into the queue: the same work, which finds what it has saved."""
        return require("submitit", extra="slurm").helpers.DelayedSubmission(self, name, folder)


def attempt(name: str, folder: str) -> str:
    """As `carry_out`, but `Preempted` is raised."""
    try:
        return find_work(name)(Path(folder))
    except Preempted:
        raise
    except KeyboardInterrupt:
        return "interrupted"
    except RLKitError as error:
        return f"error: {error}"
    except BaseException as error:  # noqa: BLE001 - memory of a GPU, an agent of the user's own, sys.exit
        log = Path(folder) / "log.txt"
        with suppress(OSError), open(log, "a") as file:
            traceback.print_exc(file=file)
        return f"error: {type(error).__name__}: {first_line(error)}; see {log}"


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    end_with(os.getppid(), lambda: os.kill(os.getpid(), signal.SIGINT))
    status = json.dumps(carry_out(*sys.argv[1:]))
    sys.stdout.write(f"\n{status}\n")  # the last line, whatever was printed before
