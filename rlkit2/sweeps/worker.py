"""Trains one experiment of a sweep in a process of its own: `python -m rlkit2.sweeps.worker FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rlkit2.api import train
from rlkit2.errors import RLKitError
from rlkit2.sweeps.experiment import find_run
from rlkit2.training.files import read_json

SETTINGS = "experiment.json"


def train_experiment(folder: str | Path) -> str:
    """Train what `experiment.json` in the folder says: begin it, go on with it, or leave it alone if it is finished.

    Returns:
        The status of the run: `finished`, `failed` (all seeds stopped) or `interrupted`, or the error that ended it.
    """
    folder = Path(folder)
    try:
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
                progress=False,
                **settings["data"],
                **settings["training"],
            )
        elif run.manifest["status"] not in ("finished", "failed"):
            run = train(resume=run, device=settings["device"], progress=False)
        return str(run.manifest["status"])
    except KeyboardInterrupt:
        return "interrupted"
    except RLKitError as error:
        return f"error: {error}"


if __name__ == "__main__":
    status = train_experiment(sys.argv[1])
    sys.stdout.write(json.dumps(status))
