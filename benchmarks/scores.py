"""Train and score agents on the recorded datasets, and print the table that the cards in `agents/` quote.

    python benchmarks/scores.py --out runs/scores                    # everything that is not there yet, then the table
    python benchmarks/scores.py --only odice zoo/hopper --table-only # the table of what is there

    python benchmarks/scores.py --tuned --only odice                 # O-DICE with settings that were tuned for each dataset

Every cell is `rlkit2.train(AGENT, DATASET)` with the shipped recipe, or without one the default setting on standardised
observations; `--width` replaces the hidden sizes of every network by two layers of that
width. A finished run is not trained again, an interrupted one goes on where it stopped. The column "last evaluations" is the mean over the last
five evaluations of each seed: single evaluations of one run swing by many points on these datasets.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from common import RAW_UNITS

from rlkit2 import load_run, train
from rlkit2.agents import agent_class
from rlkit2.agents.odice import ODICE
from rlkit2.errors import RLKitError
from rlkit2.reporting.comparison import compare
from rlkit2.training.recipe import find_recipe
from rlkit2.training.run import Run

CONTINUOUS = (
    "zoo/halfcheetah/medium-replay-v0",
    "zoo/hopper/medium-replay-v0",
    "zoo/hopper/medium-expert-v0",
    "zoo/pointmaze-umaze/scripted-v0",
)
DISCRETE = ("zoo/cartpole/mixed-v0", "zoo/lunarlander/mixed-v0")
# The temperature of each dataset, found by hand; beside it V and R in units of reward and the released weight.
TUNED = {
    "zoo/halfcheetah/medium-replay-v0": {"residual_scale": 0.3, "lambda_": 0.6},
    "zoo/hopper/medium-replay-v0": {"residual_scale": 0.05},
    "zoo/hopper/medium-expert-v0": {"residual_scale": 0.1, "weight": "conjugate_grad"},
    "zoo/pointmaze-umaze/scripted-v0": {"residual_scale": 1.0},
    "zoo/cartpole/mixed-v0": {"residual_scale": 0.1},
    "zoo/lunarlander/mixed-v0": {"residual_scale": 0.2, "weight": "conjugate_grad"},
}
CELLS = [
    *((agent, dataset) for dataset in CONTINUOUS for agent in ("bc", "bc10", "td3bc", "iql", "odice")),
    ("sdice", "zoo/hopper/medium-replay-v0"),
    ("vdice", "zoo/hopper/medium-replay-v0"),
    *((agent, dataset) for dataset in DISCRETE for agent in ("bc", "iql", "odice")),
]


def main() -> int:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scores"), help="folder of the runs")
    parser.add_argument("--only", nargs="*", default=[], help="cells whose agent or dataset begins with one of these")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=None, help="default: those of the recipes")
    parser.add_argument("--width", type=int, default=None, help="hidden width of every network")
    parser.add_argument(
        "--tuned", action="store_true", help="O-DICE and its presets with TUNED in place of the default"
    )
    parser.add_argument("--table-only", action="store_true")
    options = parser.parse_args()
    runs = []
    for agent, dataset in CELLS:
        if not _wanted(agent, dataset, options.only):
            continue
        tuned = options.tuned and issubclass(agent_class(agent), ODICE)
        folder = options.out / (f"{agent}-tuned" if tuned else agent) / dataset.replace("/", "-")
        found = sorted(folder.glob("*/config.json"))
        try:
            run = load_run(found[-1].parent) if found else None
            if not options.table_only and (run is None or run.manifest["status"] != "finished"):
                run = _train(agent, dataset, folder, run, options, RAW_UNITS | TUNED[dataset] if tuned else {})
        except RLKitError as error:
            sys.stderr.write(f"{agent} on {dataset}: {error}\n")
            continue
        if run is not None and run.evaluations():
            runs.append(run)
    if runs:
        sys.stdout.write(
            compare(runs, baseline="bc" if any(r.config["agent"] == "bc" for r in runs) else None).markdown()
        )
    return 0


def _wanted(agent: str, dataset: str, only: list[str]) -> bool:
    agents = [name for name in only if "/" not in name]
    places = [name for name in only if "/" in name]
    return (not agents or agent in agents) and (not places or any(dataset.startswith(name) for name in places))


def _train(
    agent: str, dataset: str, folder: Path, run: Run | None, options: argparse.Namespace, own: dict[str, Any]
) -> Run:
    if run is not None:
        return train(resume=run)
    names = [field.name for field in dataclasses.fields(agent_class(agent).config_class)]
    widths = {n: (options.width, options.width) for n in names if n.endswith("hidden_sizes")} if options.width else {}
    settings: dict[str, Any] = {"steps": options.steps}
    if find_recipe(agent, dataset) is None:
        steps = options.steps or 50_000
        settings = {"steps": steps, "eval_every": steps // 10, "eval_episodes": 20, "normalize_observations": True}
    return train(agent, dataset, seeds=options.seeds, out=folder, overrides=widths | own, **settings)


if __name__ == "__main__":
    sys.exit(main())
