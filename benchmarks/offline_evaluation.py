"""How well policies are ranked from data alone: rank correlation, regret and errors of every estimator against what the policies truly earn.

    python benchmarks/offline_evaluation.py zoo/hopper/medium-replay-v0 zoo/pendulum/mixed-v0 --out runs/judged

The policies and their truth are those of `offline_policies.py`, made first where they are missing. Every policy plays its mode; with continuous
actions that leaves importance sampling and doubly robust out. The table and `results/offline_evaluation.json` have a row per dataset and method;
`discounted` holds the estimates against what they estimate, `undiscounted` against the returns in the evaluation environment.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import report
from offline_policies import DISCOUNT, load, make, recipes

import rlkit2
from rlkit2.evaluation.offline import METHODS, Candidate, OfflineEvaluation, OfflineOptions, agreement, judge


def rows_of(dataset_id: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per method."""
    file = given.out / dataset_id.replace("/", "-") / "judged.json"
    truth = make(dataset_id, given.out, given.episodes, 0)
    if file.is_file():
        rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
        return rows
    dataset = rlkit2.load_dataset(dataset_id)
    candidates = []
    for name, step in recipes(dataset):
        agent = load(name, step, dataset, file.parent)
        candidates.append(Candidate(f"{name}-{step}", agent.policy, agent))
    methods = METHODS if dataset.spec.discrete else tuple(name for name in METHODS if name not in ("is", "dr"))
    options = OfflineOptions(members=given.members, steps=given.steps)
    began = time.time()
    found = judge(candidates, dataset, methods=methods, discount=DISCOUNT, options=options)
    rows = [row(dataset_id, method, found, truth) for method in methods]
    facts = {
        "seconds": time.time() - began,
        "truth": {key: {k: float(np.mean(v)) for k, v in one.items()} for key, one in truth.items()},
    }
    file.write_text(json.dumps({"rows": rows, **facts, **found.to_dict()}))
    return rows


def row(
    dataset_id: str, method: str, found: OfflineEvaluation, truth: dict[str, dict[str, list[float]]]
) -> dict[str, Any]:
    """The figures of one method on one dataset."""
    estimates = found.estimates[method]
    values = np.array([one.value for one in estimates])
    discounted, plain = (
        np.array([np.mean(truth[label][kind]) for label in found.labels]) for kind in ("discounted", "undiscounted")
    )
    known = np.isfinite(values)
    spread = float(np.ptp(discounted))
    inside = [
        one.low <= value <= one.high for one, value in zip(estimates, discounted, strict=True) if np.isfinite(one.value)
    ]
    against, beside = agreement(values, discounted), agreement(values, plain)
    return {
        "dataset": dataset_id,
        "method": method,
        "policies": f"{int(known.sum())}/{len(values)}",
        "trusted": int(sum(one.trusted for one in estimates)),
        "rank": against["rank_correlation"],
        "regret@1": against["regret@1"],
        "regret@5": against["regret@5"],
        "rank (undiscounted)": beside["rank_correlation"],
        "regret@1 (undiscounted)": beside["regret@1"],
        "regret@5 (undiscounted)": beside["regret@5"],
        "error / spread": float(np.median(np.abs(values - discounted)[known])) / spread if known.any() else None,
        "bias / spread": float(np.median((values - discounted)[known])) / spread if known.any() else None,
        "in interval": float(np.mean(inside)) if inside else None,
    }


def main() -> None:
    """Judge, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+")
    parser.add_argument("--episodes", type=int, default=20, help="played for the truth of every policy")
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.manual_seed(0)
    rows = [row for dataset in given.datasets for row in rows_of(dataset, given)]
    facts = {"episodes": given.episodes, "members": given.members, "steps": given.steps, "discount": DISCOUNT}
    report("offline_evaluation", rows, **facts)


if __name__ == "__main__":
    main()
