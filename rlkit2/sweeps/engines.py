"""Where the runs of a sweep, or any other work that is split into folders, are carried out.

Every engine calls the same function on the same folders, so the numbers are the same.
"""

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
from typing import Any

from rlkit2.agents import agent_class, agent_source
from rlkit2.api import load_dataset
from rlkit2.data.reading import ReadingOptions
from rlkit2.errors import ConfigError, require
from rlkit2.files import make_folder, write_json, writing
from rlkit2.processes import preemptible
from rlkit2.progress import polled
from rlkit2.sweeps.experiment import ENDED, Experiment, Sweep, share_done, steps_done, sweep_status
from rlkit2.sweeps.worker import SETTINGS, SlurmWork, carry_out, train_experiment, work_name
from rlkit2.training.groups import available_cores
from rlkit2.training.loggers import check_loggers
from rlkit2.user_code import typed_again

Work = Callable[[Path], str]  # does what a folder says and returns its status
Report = Callable[[Path, str], None]  # folder whose work has ended, and its status


def run_sweep(
    sweep: Sweep,
    *,
    out: str | os.PathLike[str] = "runs",
    engine: str = "local",
    jobs: int | None = None,
    device: str = "auto",
    options: Mapping[str, Any] | None = None,
    report: Callable[[Experiment, str], None] = lambda experiment, status: None,
    until: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Experiment, str]:
    """Train every run of a sweep that is not finished; what was half done is resumed from its newest checkpoint.

    Args:
        sweep: from `load_sweep`.
        out: the runs are in `out/<name of the sweep>/<settings>/`.
        engine: `local` (processes on this machine), `ray` or `slurm`.
        jobs: runs trained at the same time (local); default: as many as there are cores for, given the seeds of one run.
        device: see `rlkit2.train`.
        options: for `ray.init`, or for submitit's `update_parameters` (`partition`, `timeout_min`, ...).
        report: called with each experiment that has ended and its status.
        until: train up to this step only; a later call continues, to the same numbers.
        progress: called about every second with thousandths of the updates of all runs that are done, and 1,000.

    Returns:
        The status of every experiment: `finished`, `failed`, `paused` (at `until`), or the error that ended it.

    Raises:
        ConfigError, DatasetError: an unknown engine, or a dataset that cannot be opened, before anything is trained.
        MissingExtraError: the engine is not installed.
        KeyboardInterrupt: the runs in progress are saved; the same call resumes them.
    """
    check_engine(engine, jobs)
    check_loggers([name for experiment in sweep.experiments for name in experiment.loggers])
    root = Path(out).resolve() / sweep.name
    folders = {root / experiment.folder: experiment for experiment in sweep.experiments}
    status = {folder: sweep_status(folder) for folder in folders}
    if until is not None:
        status |= {
            folder: "paused" for folder, text in status.items() if text == "interrupted" and steps_done(folder) >= until
        }
    waiting = [folder for folder in folders if status.get(folder) not in ("finished", "failed", "paused")]
    opened = {(one.dataset, ReadingOptions(**one.reading)) for one in (folders[folder] for folder in waiting)}
    for source, reading in sorted(opened, key=str):
        load_dataset(source, **reading.arguments(), trust_env=sweep.trust_env)  # cached once, not by every run
    for folder in waiting:
        make_folder(folder)
        (folder / ENDED).unlink(missing_ok=True)
        settings = {**asdict(folders[folder]), "device": device, "trust_env": sweep.trust_env, "until": until}
        if ":" in settings["agent"]:  # as a process in any folder finds it; loaded here, so somebody has named it
            settings["agent"] = agent_source(agent_class(settings["agent"])) or settings["agent"]
        settings["env"] = settings["env"] and typed_again(settings["env"])
        write_json(folder / SETTINGS, settings)

    def ended(folder: Path, text: str) -> None:
        status[folder] = text
        write_json(folder / ENDED, {"status": text})
        report(folders[folder], text)

    width = max((len(folders[folder].seeds) for folder in waiting), default=1)
    with polled(lambda: sum(map(share_done, folders)) / len(folders), progress):
        run_folders(train_experiment, waiting, engine=engine, jobs=jobs, width=width, options=options, report=ended)
    return {experiment: status[folder] for folder, experiment in folders.items()}


def check_engine(engine: str, jobs: int | None) -> None:
    """Raise `ConfigError` for an engine that does not exist or less than one job."""
    if engine not in ENGINES:
        raise ConfigError(f"unknown engine {engine!r}; there are {', '.join(ENGINES)}")
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs must be at least 1, not {jobs}")


def run_folders(
    work: Work,
    folders: Sequence[Path],
    *,
    engine: str = "local",
    jobs: int | None = None,
    width: int = 1,
    options: Mapping[str, Any] | None = None,
    report: Report = lambda folder, status: None,
) -> None:
    """Call `work` on every folder, each in a process of its own; work that ends with an error does not stop the rest.

    Args:
        work: a function at the top level of a module of rlkit2, so that other processes and machines find it. It leaves its results
            in the folder and returns `finished`, or another status.
        folders: exist already; all that `work` needs to know is in them.
        engine, jobs, options: see `run_sweep`.
        width: cores that one call uses, for the default of `jobs`.
        report: called with each folder whose work has ended and its status, which for whatever was raised, or killed it, is `error: ...`.

    Raises:
        ConfigError: an unknown engine, or a function that other processes cannot find.
        MissingExtraError: the engine is not installed.
        KeyboardInterrupt: passed on to all that was going on, which has ended.
    """
    check_engine(engine, jobs)
    name = work_name(work)
    if folders:
        cores = available_cores()
        ENGINES[engine](name, folders, jobs or max(1, cores // min(width, cores)), dict(options or {}), report)


def run_locally(work: str, folders: Sequence[Path], jobs: int, options: Mapping[str, Any], report: Report) -> None:
    """`jobs` processes at a time; Ctrl-C is passed on to each once, so that all of them save."""
    waiting, running = list(folders), dict[Path, subprocess.Popen[str]]()

    with preemptible():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    folder = waiting.pop(0)
                    running[folder] = _start(work, folder)
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


def _start(work: str, folder: Path) -> subprocess.Popen[str]:
    """A process of its own session: a terminal's Ctrl-C reaches it through this one alone."""
    with writing(folder / "log.txt"), open(folder / "log.txt", "a") as log:
        command = [sys.executable, "-m", "rlkit2.sweeps.worker", work, str(folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)


def _ended(process: subprocess.Popen[str], folder: Path) -> str:
    """What the process said, or how it died."""
    text = process.communicate()[0]
    try:
        return str(json.loads(text.splitlines()[-1]))
    except (ValueError, IndexError):
        code = process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return f"error: {how}; see {folder / 'log.txt'}"


def run_on_ray(work: str, folders: Sequence[Path], jobs: int, options: Mapping[str, Any], report: Report) -> None:
    """One Ray task a folder, wherever the cluster has room; the folders must be on a file system that all nodes share.

    A task whose worker or node is lost is begun again by Ray, which resumes its run; one that is lost for good has an error of its own.
    """
    ray = require("ray", extra="ray")
    if not ray.is_initialized():
        ray.init(**options)
    task = ray.remote(carry_out)
    waiting = {task.remote(work, str(folder)): folder for folder in folders}

    def result(reference: Any) -> str:
        try:
            return str(ray.get(reference))
        except ray.exceptions.TaskCancelledError:
            return "interrupted"
        except ray.exceptions.RayError as error:
            return f"error: {type(error).__name__}: {_last_line(error)}"

    try:
        while waiting:
            done, _ = ray.wait(list(waiting))
            for reference in done:
                report(waiting.pop(reference), result(reference))
    except BaseException:
        for reference in waiting:
            ray.cancel(reference)  # a KeyboardInterrupt in its worker
        for reference, folder in waiting.items():
            report(folder, result(reference))
        raise


def run_on_slurm(work: str, folders: Sequence[Path], jobs: int, options: Mapping[str, Any], report: Report) -> None:
    """One array of Slurm jobs, by submitit; the folders must be on a file system that all nodes share."""
    submitit = require("submitit", extra="slurm")
    executor = submitit.AutoExecutor(folder=folders[0].parent / "slurm", cluster=options.get("cluster"))
    executor.update_parameters(**{name: value for name, value in options.items() if name != "cluster"})
    waiting = dict(
        zip(folders, executor.map_array(SlurmWork(), [work] * len(folders), list(map(str, folders))), strict=True)
    )

    def result(job: Any) -> str:
        try:
            return str(job.result())
        except submitit.core.utils.UncompletedJobError as error:  # killed, out of time or memory, its node lost
            return f"error: job {job.job_id} ended without a result ({job.state}): {_last_line(error)}"

    try:
        while waiting:
            for folder in [folder for folder, job in waiting.items() if job.done()]:
                report(folder, result(waiting.pop(folder)))
            if waiting:
                time.sleep(0.2 if options.get("cluster") in ("local", "debug") else 2.0)
    except BaseException:
        for job in waiting.values():
            job.cancel(check=False)
        for folder, job in waiting.items():
            report(folder, result(job))
        raise


def _last_line(error: BaseException) -> str:
    """Where libraries that print another process's output put the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__


ENGINES: dict[str, Callable[[str, Sequence[Path], int, Mapping[str, Any], Report], None]] = {
    "local": run_locally,
    "ray": run_on_ray,
    "slurm": run_on_slurm,
}
