"""What agents learn from pictures of a task, beside what they learn from its numbers: the same transitions, updates and options.

.venv/bin/python benchmarks/images.py [--seeds 1] [--only odice]
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from typing import Any

import numpy as np
from common import report

import rlkit2

SMALL = {"hidden_sizes": [64, 64]}
FAST = {"critic_learning_rate": 1e-3, "value_learning_rate": 1e-3, "policy_learning_rate": 1e-3}
VALUES = {**SMALL, "critic_learning_rate": 1e-3, "num_critics": 2, "target_update_rate": 0.02, "discount": 0.95}
ODICE = {**SMALL, "value_learning_rate": 1e-3, "policy_learning_rate": 1e-3, "discount": 0.97}
ROOMS = "builtin/rooms/expert-sparse-v0", "builtin/rooms-images/expert-sparse-v0"
GRID = "builtin/gridworld/mixed-v0", "builtin/gridworld-images/mixed-v0"
SEVERAL = ("iql", "odice")  # agents of several networks: once more with one encoder for all
# agent, numbers, pictures, updates, options of the agent, options of the training on pictures
ROWS: tuple[tuple[str, str, str, int, dict[str, Any], dict[str, Any]], ...] = (
    ("bc", *ROOMS, 500, {**SMALL, "learning_rate": 1e-3}, {}),
    ("iql", *ROOMS, 500, {**SMALL, **FAST, "policy_cosine_steps": None}, {}),
    ("odice", *ROOMS, 1000, ODICE, {}),
    ("iql", ROOMS[0], "builtin/rooms-images/expert-goal-v0", 1500, {**SMALL, **FAST, "policy_cosine_steps": None}, {}),
    ("dqn", *GRID, 3000, VALUES, {}),
    ("cql", *GRID, 1000, VALUES, {}),
    (
        "bc",
        "builtin/cartpole/medium-v0",
        "builtin/cartpole-images/medium-v0",
        1000,
        {**SMALL, "learning_rate": 1e-3},
        {"frame_stack": 2},
    ),
)


def score(agent: str, dataset: str, updates: int, options: dict[str, Any], seeds: int, **training: Any) -> float:
    """Mean normalised score of the last evaluation."""
    with tempfile.TemporaryDirectory() as out:
        run = rlkit2.train(
            agent,
            dataset,
            steps=updates,
            seeds=seeds,
            batch_size=64,
            eval_every=updates,
            eval_episodes=20,
            overrides=options,
            progress=False,
            out=out,
            **training,
        )
        return float(np.mean([line["normalized_scores"] for line in run.evaluations()]))


def main() -> None:
    """Train every row and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="seeds of every row")
    parser.add_argument("--only", default="", help="rows of this agent or with this in the name of the dataset")
    given = parser.parse_args()
    rows = []
    for agent, numbers, pictures, updates, options, training in ROWS:
        if given.only not in f"{agent} {pictures}":
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            before = score(agent, numbers, updates, options, given.seeds)
            began = time.process_time()
            found = score(agent, pictures, updates, options, given.seeds, **training)
            taken = time.process_time() - began
            shared: dict[str, float] = {}
            if agent in SEVERAL:
                began = time.process_time()
                one = score(agent, pictures, updates, {**options, "shared_encoder": True}, given.seeds, **training)
                shared = {"one encoder": one, "time of one encoder": (time.process_time() - began) / taken}
        rows.append(
            {
                "what": f"{agent} {pictures}",
                "updates": updates,
                "numbers": before,
                "pictures": found,
                "difference": found - before,
                "seconds": taken,
                **shared,
            }
        )
        print(rows[-1], flush=True)
    report("images", rows, seeds=given.seeds)


if __name__ == "__main__":
    main()
