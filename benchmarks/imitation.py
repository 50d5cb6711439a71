"""Imitation from few demonstrations: 5 expert episodes beside 50 of random actions, on the pendulum.

    python benchmarks/imitation.py --out runs/imitation

How much of the expert's return do O-DICE with a discriminator's reward (with the expert's actions and without), its released form (zero rewards on
the expert's episodes alone) and cloning of the same five episodes recover? Networks, decay and updates are the same for all. A finished run is not
trained again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import report

import rlkit2
from rlkit2.agents.odice_il import first_episodes

EXPERT, RANDOM = "builtin/pendulum/expert-v0", "builtin/pendulum/random-v0"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "bc, expert episodes": ("bc", {}),
    "odice_il": ("odice_il", {}),
    "odice_il, states alone": ("odice_il", {"discriminator_inputs": "state"}),
    "odice_il, (s, s')": ("odice_il", {"discriminator_inputs": "transition"}),
    "odice_il_zero": ("odice_il_zero", {}),
}


def main() -> None:
    """Train what is missing, evaluate, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demonstrations", type=int, default=5)
    parser.add_argument("--others", type=int, default=50, help="episodes of random actions")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=15_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    expert = first_episodes(rlkit2.load_dataset(EXPERT), given.demonstrations)
    rows = []
    for method in given.methods:
        found = rlkit2.evaluate(trained(given, method), episodes=given.episodes).summary()
        rows.append(
            {"method": method, "return": found["mean"], "low": found["interval"][0], "high": found["interval"][1]}
        )
    shown = {name: value for name, value in vars(given).items() if name not in ("out", "methods")}
    report("imitation", rows, settings=shown, expert_return=float(expert.episode_returns.mean()))


def trained(given: Any, method: str) -> rlkit2.Run:
    """The finished run of a method: found, resumed, or trained from the start."""
    agent, own = METHODS[method]
    others = rlkit2.load_dataset(RANDOM).select(range(given.others))
    dataset = first_episodes(rlkit2.load_dataset(EXPERT), given.demonstrations) if agent == "bc" else others
    folder = given.out / "".join(c if c.isalnum() else "-" for c in method)
    runs = sorted(folder.glob("*/config.json"))
    if runs:
        run = rlkit2.load_run(runs[-1].parent)
        return run if run.manifest["status"] == "finished" else rlkit2.train(resume=run, dataset=dataset)
    layers = (given.width, given.width)
    if agent == "bc":
        own = {"hidden_sizes": layers, "tanh_mean": True, **own}
    else:
        expert = {"expert_dataset": EXPERT, "expert_episodes": given.demonstrations}
        own = {"value_hidden_sizes": layers, "policy_hidden_sizes": layers, **expert, **own}
    return rlkit2.train(
        agent,
        dataset,
        steps=given.steps,
        seeds=given.seeds,
        normalize_observations=True,
        eval_every=0,
        out=folder,
        overrides=own,
    )


if __name__ == "__main__":
    main()
