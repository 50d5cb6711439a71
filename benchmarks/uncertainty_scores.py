"""Critic ensembles with and without a noise model on recorded data: scores, whether they know what they do not know, whether their noise is true.

    python benchmarks/uncertainty_scores.py --out runs/uncertainty              # everything that is not there yet, then the tables
    python benchmarks/uncertainty_scores.py --out runs/uncertainty --table-only # the tables of what is there

Every cell is `rlkit2.train(AGENT, DATASET, critic=...)` with the shipped recipe but for width and updates, a tenth of the episodes held out, all
seeds in one process. AUROC: the critics' disagreement about uniformly random actions against the data's, at held-out states. Calibration error,
coverage and likelihood: TD errors of the held-out episodes. Intervals: 95 %, t over seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from common import report
from scipy import stats

import rlkit2
from rlkit2.errors import ConfigError
from rlkit2.evaluation.uncertainty import td_diagnostics
from rlkit2.training.building import split_dataset
from rlkit2.training.options import DataOptions

DATASETS = {"zoo/pendulum/mixed-v0": (64, 10_000), "zoo/hopper/medium-replay-v0": (128, 12_000)}  # width, updates
AGENTS = ("sacn", "edac")
VARIANTS: dict[str, dict[str, Any]] = {
    "mse": {},
    "gaussian": {"critic": "gaussian"},
    "ggd": {"critic": "ggd"},
    "mse, independent": {"target": "independent", "policy_objective": "lcb"},
    "ggd, independent": {"critic": "ggd", "target": "independent", "policy_objective": "lcb"},
}


def main() -> None:
    """Train what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--agents", nargs="+", default=AGENTS, choices=AGENTS)
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=list(DATASETS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows = []
    for dataset in given.datasets:
        for agent in given.agents:
            for variant in given.variants:
                run = trained(given, dataset, agent, variant)
                if run is not None:
                    rows.append({"dataset": dataset, "agent": agent, "critic": variant, **measured(run)})
                    report("uncertainty_scores", rows, seeds=given.seeds)


def trained(given: Any, dataset: str, agent: str, variant: str) -> rlkit2.Run | None:
    """The finished run of a cell: found, resumed, or trained from the start; None if it is missing and only the table is wanted."""
    width, steps = DATASETS[dataset]
    folder = given.out / dataset.replace("/", "-") / f"{agent}-{variant}".replace(", ", "-")
    runs = sorted(folder.glob("*/config.json"))
    run = rlkit2.load_run(runs[-1].parent) if runs else None
    if run is not None and run.manifest["status"] in ("finished", "failed"):
        return run
    if given.table_only:
        return None
    if run is not None:
        return rlkit2.train(resume=run)
    overrides = {"hidden_sizes": (width, width), **VARIANTS[variant]}
    return rlkit2.train(
        agent,
        dataset,
        steps=steps,
        seeds=given.seeds,
        eval_every=steps // 2,
        held_out=0.1,
        out=folder,
        overrides=overrides,
    )


def measured(run: rlkit2.Run) -> dict[str, str]:
    """Final scores, and for a noise model the diagnostics, each as a mean with its interval."""
    final = [row for row in run.evaluations() if row["step"] == run.manifest["step"]]
    found = {"score": interval([float(np.mean(row["normalized_scores"])) for row in final])}
    _, held_out = split_dataset(rlkit2.load_dataset(run.config["dataset"]["source"]), DataOptions(**run.config["data"]))
    assert held_out is not None
    try:
        told = td_diagnostics(run.agent, held_out)
    except ConfigError:  # no noise model: nothing to calibrate
        return found
    values = {"AUROC": told.auroc, "calibration error": told.calibration_error, "coverage of 90 %": told.coverage[0.9]}
    values |= {"NLL": told.nll, "NLL, best constant GGD": told.nll_ggd, "excess kurtosis": told.conditional_kurtosis}
    return found | {name: interval(array) for name, array in values.items()}


def interval(values: Any) -> str:
    """`mean [low, high]`: 95 % by Student's t over seeds."""
    array = np.asarray(values, float)
    if len(array) < 2:
        return f"{array.mean():.3g}"
    reach = stats.t.ppf(0.975, len(array) - 1) * stats.sem(array)
    return f"{array.mean():.3g} [{array.mean() - reach:.3g}, {array.mean() + reach:.3g}]"


if __name__ == "__main__":
    main()
