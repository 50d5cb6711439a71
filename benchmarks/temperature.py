"""The temperature of O-DICE: fixed residual scales against one that adapts to a wanted effective sample share.

    python benchmarks/temperature.py --out runs/temperature

Weights (f*)'(scale R) of reverse KL or Pearson, normalised to mean one; everything else is the default, with V and R in
units of reward. Same scales for all datasets: what
adapting must buy is that nobody has to know the size of the rewards. A finished run is not trained again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from common import RAW_UNITS, report

import rlkit2

DATASETS = {
    "zoo/halfcheetah/medium-replay-v0": 128,
    "zoo/lunarlander/mixed-v0": 64,
    "zoo/pointmaze-umaze/scripted-v0": 128,
    "zoo/hopper/medium-replay-v0": 128,
}
SCALES = (0.03, 0.3, 3.0)
LAMBDAS = {"rkl": 0.731, "pearson": 0.5}  # at these V has no cost of living where episodes terminate
LAST = 3  # evaluations that are averaged


def main() -> None:
    """Train what is missing, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--divergence", choices=list(LAMBDAS), default="rkl")
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--rate", type=float, default=5e-3, help="speed of the adaptation, see residual_scale_rate")
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=list(DATASETS))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    settings: dict[str, dict[str, Any]] = {f"scale {scale:g}": {"residual_scale": scale} for scale in SCALES}
    for start in (SCALES[0], SCALES[-1]):
        adaptive = {"target_effective_sample_share": given.share, "residual_scale_rate": given.rate}
        settings[f"share {given.share:g} from {start:g}"] = {"residual_scale": start, **adaptive}
    rows = []
    for dataset in given.datasets:
        for name, own in settings.items():
            rows.append({"dataset": dataset, "setting": name, **measured(trained(given, dataset, name, own))})
            report(f"temperature_{given.divergence}", rows, steps=given.steps, seeds=given.seeds)


def trained(given: Any, dataset: str, name: str, own: dict[str, Any]) -> rlkit2.Run:
    """The finished run of a setting: found, resumed, or trained from the start."""
    folder = given.out / dataset.replace("/", "-") / name.replace(" ", "-")
    runs = sorted(folder.glob("*/config.json"))
    if runs:
        run = rlkit2.load_run(runs[-1].parent)
        return run if run.manifest["status"] in ("finished", "failed") else rlkit2.train(resume=run)
    layers = (DATASETS[dataset],) * 2
    fixed = RAW_UNITS | {
        "divergence": given.divergence,
        "weight": "conjugate_grad",
        "weight_normalization": "mean",
        "lambda_": LAMBDAS[given.divergence],
        "residual_clip": 10.0,
        "value_hidden_sizes": layers,
        "policy_hidden_sizes": layers,
    }
    return rlkit2.train(
        "odice",
        dataset,
        steps=given.steps,
        seeds=given.seeds,
        eval_every=given.steps // 5,
        eval_episodes=20,
        normalize_observations=True,
        out=folder,
        overrides=fixed | own,
    )


def measured(run: rlkit2.Run) -> dict[str, float]:
    """Mean score of the last evaluations; share of the weights and scale at the end."""
    evaluations = run.evaluations()[-LAST * len(run.config["seeds"]) :]
    scores = [np.mean(row["normalized_scores"]) for row in evaluations]
    last = [row for row in run.metrics() if row["step"] == run.manifest["step"]]
    scale = [row.get("temperature/residual_scale", run.config["config"]["residual_scale"]) for row in last]
    return {
        "score": float(np.mean(scores)),
        "effective sample share": float(np.mean([row["weight/effective_sample_share"] for row in last])),
        "residual scale": float(np.exp(np.mean(np.log(scale)))),
    }


if __name__ == "__main__":
    main()
