"""How often the intervals of offline estimates hold the exact value: random finite processes, all estimators tabular.

    python benchmarks/offline_coverage.py --processes 40 --episodes 5 10 30 100

Every process has 5 states, 3 actions, random ends and truncations; behaviour and policy are random and alike enough for importance weights. The
table and `results/offline_coverage.json` give the share of nominal 95 % intervals that hold the truth, of the estimates that were not refused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import report

from rlkit2.evaluation.offline import Candidate, OfflineOptions, judge

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.evaluation.processes import random_policy, random_process, sample, table_policy

METHODS = ("fqe", "dice", "is", "dr")
POLICIES = 3


def covered(process_seed: int, episodes: int, members: int) -> dict[str, list[bool]]:
    """Of one process: method -> whether the interval of each policy holds its exact value."""
    process = random_process(process_seed, discount=0.8)
    behavior = random_policy(process, 1000 + process_seed, 0.5)
    policies = [random_policy(process, POLICIES * process_seed + k, 0.7) for k in range(POLICIES)]
    dataset, log_probs = sample(process, behavior, episodes, 8, process_seed)
    found = judge(
        [Candidate("tables", table_policy(*policies))],
        dataset,
        methods=METHODS,
        discount=0.8,
        deterministic=False,
        behavior_log_probs=log_probs,
        options=OfflineOptions(
            hidden_sizes=(), features=0, steps=400, learning_rate=0.03, members=members, resamples=200
        ),
    )
    return {
        method: [
            one.low <= process.value(policy) <= one.high
            for one, policy in zip(found.estimates[method], policies, strict=True)
            if np.isfinite(one.low)
        ]
        for method in METHODS
    }


def main() -> None:
    """Count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=40)
    parser.add_argument("--episodes", type=int, nargs="+", default=[5, 10, 30, 100])
    parser.add_argument("--members", type=int, default=8)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for episodes in given.episodes:
        runs = [covered(seed, episodes, given.members) for seed in range(given.processes)]
        row: dict[str, Any] = {"episodes": episodes}
        for method in METHODS:
            inside = [held for run in runs for held in run[method]]
            row[method] = float(np.mean(inside)) if inside else None
            row[f"{method} refused"] = given.processes * POLICIES - len(inside)
        rows.append(row)
    report(
        "offline_coverage", rows, processes=given.processes, policies=POLICIES, members=given.members, confidence=0.95
    )


if __name__ == "__main__":
    main()
