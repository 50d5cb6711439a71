"""How well policies are ranked from data alone: rank correlation, regret and errors of every estimator against what the policies truly earn.

    python benchmarks/offline_evaluation.py zoo/hopper/medium-replay-v0 zoo/pendulum/mixed-v0 --out runs/judged

The policies and their truth are those of `offline_policies.py`, made first where they are missing. Every policy plays its mode; with continuous
actions that leaves importance sampling and doubly robust out. The table and `results/offline_evaluation.json` have a row per dataset and method:
rank correlation and regret against the discounted returns that are estimated, and (", return") against the undiscounted ones in the evaluation
environment.
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
from rlkit2.evaluation.offline import METHODS, Candidate, OfflineOptions, agreement, judge, regret_at_k


def judged(dataset_id: str, given: argparse.Namespace) -> dict[str, Any]:
    """All estimates of one dataset and the mean true returns, from the folder where they are there already."""
    file: Path = given.out / dataset_id.replace("/", "-") / "judged.json"
    if not file.is_file():
        truth = make(dataset_id, given.out, given.episodes, 0)
        dataset = rlkit2.load_dataset(dataset_id)
        candidates = []
        for name, step in recipes(dataset):
            agent = load(name, step, dataset, file.parent)
            candidates.append(Candidate(f"{name}-{step}", agent.policy, agent))
        methods = METHODS if dataset.spec.discrete else tuple(name for name in METHODS if name not in ("is", "dr"))
        began = time.time()
        options = OfflineOptions(members=given.members, steps=given.steps)
        found = judge(candidates, dataset, methods=methods, discount=DISCOUNT, options=options)
        means = {key: {kind: float(np.mean(values)) for kind, values in one.items()} for key, one in truth.items()}
        file.write_text(json.dumps({"seconds": time.time() - began, "truth": means, **found.to_dict()}))
    found_before: dict[str, Any] = json.loads(file.read_text())
    return found_before


def row(dataset_id: str, method: str, found: dict[str, Any]) -> dict[str, Any]:
    """The figures of one method on one dataset; errors in units of the spread of the true discounted returns."""
    estimates, labels = found["estimates"][method], found["policies"]
    values = np.array([np.nan if one["value"] is None else one["value"] for one in estimates])
    trusted = np.array([one["trusted"] for one in estimates])
    discounted, plain = (
        np.array([found["truth"][label][kind] for label in labels]) for kind in ("discounted", "undiscounted")
    )
    known = np.isfinite(values)
    errors = (values - discounted) / np.ptp(discounted)
    inside = [
        one["low"] <= value <= one["high"]
        for one, value in zip(estimates, discounted, strict=True)
        if one["low"] is not None
    ]
    against, beside = agreement(values, discounted), agreement(values, plain)

    def median(numbers: Any) -> float | None:
        return float(np.median(numbers)) if len(numbers) else None

    figures = {
        "rank": against["rank_correlation"],
        "regret@1": against["regret@1"],
        "regret@5": against["regret@5"],
        "regret@1, trusted first": regret_at_k(values - 1e9 * ~trusted, discounted),
        "rank, return": beside["rank_correlation"],
        "regret@1, return": beside["regret@1"],
        "regret@5, return": beside["regret@5"],
        "bias": median(errors[known]),
        "error": median(np.abs(errors[known])),
        "error, trusted": median(np.abs(errors[known & trusted])),
        "error, in doubt": median(np.abs(errors[known & ~trusted])),
        "in interval": float(np.mean(inside)) if inside else None,
    }
    return {
        "dataset": dataset_id,
        "method": method,
        "estimates": f"{int(known.sum())}/{len(values)}",
        "trusted": int(trusted.sum()),
        **{name: None if value is None or np.isnan(value) else value for name, value in figures.items()},
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""

    def text(value: Any) -> str:
        return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([text(value) for value in one.values()] for one in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


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
    found = {dataset: judged(dataset, given) for dataset in given.datasets}
    rows = [row(dataset, method, one) for dataset, one in found.items() for method in one["estimates"]]
    facts = {"episodes": given.episodes, "members": given.members, "steps": given.steps, "discount": DISCOUNT}
    report("offline_evaluation", rows, **facts)
    print(markdown(rows))


if __name__ == "__main__":
    main()
