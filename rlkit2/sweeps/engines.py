"""Where the runs of a sweep are trained. Every engine calls `train_experiment` on the same folders, so the numbers are the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from rlkit2.api import load_dataset
from rlkit2.errors import ConfigError, require
from rlkit2.sweeps.experiment import Experiment, Sweep, find_run
from rlkit2.sweeps.worker import SETTINGS, train_experiment
from rlkit2.training.files import write_json, writing
from rlkit2.training.groups import available_cores

Report = Callable[[Path, str], None]  # folder of an experiment that has ended, and its status


def run_sweep(
    sweep: Sweep,
    *,
    out: str | os.PathLike[str] = "runs",
    engine: str = "local",
    jobs: int | None = None,
    device: str = "auto",
    options: Mapping[str, Any] | None = None,
    report: Callable[[Experiment, str], None] = lambda experiment, status: None,
) -> dict[Experiment, str]:
    """Train every run of a sweep that is not finished; what was half done goes on from its newest checkpoint.

    Args:
        sweep: from `load_sweep`.
        out: the runs are in `out/<name of the sweep>/<settings>/`.
        engine: `local` (processes on this machine), `ray` or `slurm`.
        jobs: runs trained at the same time (local); default: as many as there are cores for, given the seeds of one run.
        device: see `rlkit2.train`.
        options: for `ray.init`, or for submitit's `update_parameters` (`partition`, `timeout_min`, ...).
        report: called with each experiment that has ended and its status.

    Returns:
        The status of every experiment: `finished`, `failed`, or the error that ended it.

    Raises:
        ConfigError, DatasetError: an unknown engine, or a dataset that cannot be opened, before anything is trained.
        MissingExtraError: the engine is not installed.
        KeyboardInterrupt: the runs that were going on are saved; the same call goes on.
    """
    if engine not in ENGINES:
        raise ConfigError(f"unknown engine {engine!r}; there are {', '.join(ENGINES)}")
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs must be at least 1, not {jobs}")
    root = Path(out).resolve() / sweep.name
    folders = {root / experiment.folder: experiment for experiment in sweep.experiments}
    status = {folder: run.manifest["status"] for folder in folders if (run := find_run(folder)) is not None}
    waiting = [folder for folder in folders if status.get(folder) not in ("finished", "failed")]
    for source in dict.fromkeys(folders[folder].dataset for folder in waiting):
        load_dataset(source)  # fetched, built and cached once, not by every run
    for folder in waiting:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS, {**asdict(folders[folder]), "device": device})

    def ended(folder: Path, text: str) -> None:
        status[folder] = text
        report(folders[folder], text)

    if waiting:
        width = min(max(len(folders[folder].seeds) for folder in waiting), available_cores())
        ENGINES[engine](waiting, jobs or max(1, available_cores() // width), dict(options or {}), ended)
    return {experiment: status.get(folder, "not begun") for folder, experiment in folders.items()}


def run_locally(folders: Sequence[Path], jobs: int, options: Mapping[str, Any], report: Report) -> None:
    """`jobs` processes at a time; Ctrl-C is passed on to each once, so that all of them save."""
    waiting, running = list(folders), dict[Path, subprocess.Popen[str]]()

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                folder = waiting.pop(0)
                running[folder] = _start(folder)
            time.sleep(0.1)
            for folder in [folder for folder, process in running.items() if process.poll() is not None]:
                report(folder, _ended(running.pop(folder), folder))
    except BaseException:
        for process in running.values():
            process.send_signal(signal.SIGINT)
        for folder, process in running.items():
            process.wait()
            report(folder, _ended(process, folder))
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _start(folder: Path) -> subprocess.Popen[str]:
    """A process of its own session: a terminal's Ctrl-C reaches it through this one alone."""
    with open(folder / "log.txt", "a") as log:
        command = [sys.executable, "-m", "rlkit2.sweeps.worker", str(folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)


def _ended(process: subprocess.Popen[str], folder: Path) -> str:
    """What the process said, or that it died."""
    text = process.communicate()[0]
    try:
        return str(json.loads(text))
    except ValueError:
        return f"error: ended with status {process.returncode}; see {folder / 'log.txt'}"


def run_on_ray(folders: Sequence[Path], jobs: int, options: Mapping[str, Any], report: Report) -> None:
    """One Ray task a run, wherever the cluster has room; the folders must be on a file system that all nodes share."""
    ray = require("ray", extra="ray")
    if not ray.is_initialized():
        ray.init(**options)
    task = ray.remote(train_experiment)
    waiting = {task.remote(str(folder)): folder for folder in folders}
    while waiting:
        done, _ = ray.wait(list(waiting))
        for reference in done:
            report(waiting.pop(reference), ray.get(reference))


def run_on_slurm(folders: Sequence[Path], jobs: int, options: Mapping[str, Any], report: Report) -> None:
    """One array of Slurm jobs, by submitit; the folders must be on a file system that all nodes share."""
    submitit = require("submitit", extra="slurm")
    executor = submitit.AutoExecutor(folder=folders[0].parent / "slurm", cluster=options.get("cluster"))
    executor.update_parameters(**{name: value for name, value in options.items() if name != "cluster"})
    for job, folder in zip(executor.map_array(train_experiment, map(str, folders)), folders, strict=True):
        try:
            report(folder, job.result())
        except submitit.core.utils.FailedJobError as error:
            report(folder, f"error: {str(error).partition(chr(10))[0]}")


ENGINES: dict[str, Callable[[Sequence[Path], int, Mapping[str, Any], Report], None]] = {
    "local": run_locally,
    "ray": run_on_ray,
    "slurm": run_on_slurm,
}
