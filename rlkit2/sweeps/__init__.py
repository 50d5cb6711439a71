"""Many runs from one file, on this machine, on Ray or on Slurm; the numbers are those of single runs."""

from rlkit2.sweeps.engines import ENGINES, check_engine, run_folders, run_sweep
from rlkit2.sweeps.experiment import Experiment, Search, Sweep, load_sweep, sweep_runs, sweep_status
from rlkit2.sweeps.search import Trial, run_search
from rlkit2.sweeps.worker import train_experiment

__all__ = [
    "ENGINES",
    "Experiment",
    "Search",
    "Sweep",
    "Trial",
    "check_engine",
    "load_sweep",
    "run_folders",
    "run_search",
    "run_sweep",
    "sweep_runs",
    "sweep_status",
    "train_experiment",
]
