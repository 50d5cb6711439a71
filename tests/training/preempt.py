"""Runs a sweep of one run by submitit's local executor, and lets its job be preempted once while it trains."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import submitit

from rlkit2.sweeps import load_sweep, run_sweep, sweep_runs

JOBS: list[Any] = []


def preempt(out: Path) -> None:
    """Send the job the signal that submitit waits for once the run has a first checkpoint and trains."""
    while not list(out.glob("*/*/*/checkpoints/0*")):
        time.sleep(0.05)
    time.sleep(0.5)
    controller = JOBS[0].job_id
    (task,) = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    os.kill(int(task), signal.SIGUSR2)


def main() -> None:
    submit = submitit.AutoExecutor.map_array

    def remembered(self: Any, *arguments: Any) -> Any:
        JOBS.extend(submit(self, *arguments))
        return JOBS

    submitit.AutoExecutor.map_array = remembered
    sweep, out = load_sweep(sys.argv[1]), Path(sys.argv[2])
    threading.Thread(target=preempt, args=(out,), daemon=True).start()
    statuses = run_sweep(sweep, out=out, engine="slurm", options={"cluster": "local"})
    (run,) = sweep_runs(out, sweep).values()
    starts = [start["step"] for start in run.manifest["starts"]]
    sys.stdout.write("\n" + json.dumps({"status": next(iter(statuses.values())), "starts": starts}) + "\n")


if __name__ == "__main__":
    main()
