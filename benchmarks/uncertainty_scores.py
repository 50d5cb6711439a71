"""Critic ensembles with and without a noise model on recorded data: scores, whether they know what they do not know, whether their noise is true.

    python benchmarks/uncertainty_scores.py --out runs/uncertainty              # everything that is not there yet, then the tables
    python benchmarks/uncertainty_scores.py --out runs/uncertainty --table-only # the tables of what is there

Every cell is `rlkit2.train(AGENT, DATASET, critic=...)` with the shipped recipe but for width and updates, a tenth of the episodes held out, all
seeds in one process. AUROC: the critics' disagreement about uniformly random actions against the data's, at held-out states (see also
`disagreement`). What could be had: the same for a classifier that is trained to tell the data's actions from random ones. Calibration error, coverage
and likelihood: TD errors of the held-out episodes. Intervals: 95 %, t over seeds.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import report
from scipy import stats
from torch import Tensor, nn

import rlkit2
from rlkit2.data import TransitionDataset
from rlkit2.errors import ConfigError
from rlkit2.evaluation.calibration import auroc, random_actions, td_diagnostics
from rlkit2.training.building import split_dataset
from rlkit2.training.options import DataOptions

DATASETS = {"zoo/pendulum/mixed-v0": (64, 10_000), "zoo/hopper/medium-replay-v0": (128, 12_000)}  # width, updates
HELD_OUT = 0.1
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
    parser.add_argument("--width", type=int, help="of two hidden layers; default: 64 on the pendulum, 128 on hopper")
    parser.add_argument("--steps", type=int, help="updates; default: 10 000 on the pendulum, 12 000 on hopper")
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows = []
    ceilings = {dataset: ceiling(*split(dataset, DataOptions(held_out=HELD_OUT))) for dataset in given.datasets}
    for dataset in given.datasets:
        for agent in given.agents:
            for variant in given.variants:
                run = trained(given, dataset, agent, variant)
                if run is not None:
                    rows.append({"dataset": dataset, "agent": agent, "critic": variant, **measured(run)})
    found = {name: dict(zip(("AUROC", "same state"), pair, strict=True)) for name, pair in ceilings.items()}
    report("uncertainty_scores", rows, seeds=given.seeds, classifier=found)
    print(markdown(rows))
    for dataset, (pooled, paired) in ceilings.items():
        print(f"A classifier of actions on {dataset}: AUROC {pooled:.3g}, same state {paired:.3g}.")


def split(dataset: str, options: DataOptions) -> tuple[TransitionDataset, TransitionDataset]:
    """Training and held-out episodes, as every cell has them."""
    training, held_out = split_dataset(rlkit2.load_dataset(dataset), options)
    assert held_out is not None
    return training, held_out


def trained(given: Any, dataset: str, agent: str, variant: str) -> rlkit2.Run | None:
    """The finished run of a cell: found, resumed, or trained from the start; None if it is missing and only the table is wanted."""
    width, steps = (own or default for own, default in zip((given.width, given.steps), DATASETS[dataset], strict=True))
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
        held_out=HELD_OUT,
        out=folder,
        overrides=overrides,
    )


def measured(run: rlkit2.Run) -> dict[str, str]:
    """Final scores, and for a noise model the diagnostics, each as a mean with its interval."""
    final = [row for row in run.evaluations() if row["step"] == run.manifest["step"]]
    found = {"score": interval([float(np.mean(row["normalized_scores"])) for row in final], 5)}
    _, held_out = split(run.config["dataset"]["source"], DataOptions(**run.config["data"]))
    try:
        told = td_diagnostics(run.agent, held_out)
    except ConfigError:  # no noise model: nothing to calibrate
        return found
    values = {"AUROC": told.auroc, **disagreement(run.agent, held_out)}
    values |= {"calibration error": told.calibration_error, "coverage of 90 %": told.coverage[0.9]}
    values |= {"NLL": told.nll, "NLL, best constant GGD": told.nll_ggd, "excess kurtosis": told.conditional_kurtosis}
    return found | {name: interval(array) for name, array in values.items()}


@torch.no_grad()
def disagreement(agent: Any, episodes: TransitionDataset, draws: int = 12) -> dict[str, np.ndarray]:
    """Deviation of the critics about random actions and about the data's at the same states, per seed.

    "same state": how often it is larger for the random one. "over states": correlation of the two. "action part": mean deviation of what is left of a
    critic once its own mean over random actions is taken out, for the data's action and for a random one.
    """
    generator = np.random.default_rng(0)
    known = agent.heads_at(episodes.observations, episodes.actions).q
    random, *others = (
        agent.heads_at(episodes.observations, random_actions(episodes, len(episodes), generator)).q
        for _ in range(draws)
    )
    centre = torch.stack(others).mean(0)
    deviations = torch.stack([known.std(1), random.std(1)], 1).double()
    correlation = torch.stack([torch.corrcoef(pair)[0, 1] for pair in deviations])
    found = {
        "same state": (deviations[:, 1] > deviations[:, 0]).double().mean(1),
        "over states": correlation,
        "action part, data": (known - centre).std(1).mean(1),
        "action part, random": (random - centre).std(1).mean(1),
    }
    return {name: values.double().cpu().numpy() for name, values in found.items()}


def ceiling(training: TransitionDataset, held_out: TransitionDataset, steps: int = 3000) -> tuple[float, float]:
    """AUROC and same-state share, on held-out episodes, of a classifier that tells random actions from the data's."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    std, mean = torch.std_mean(training.observations.float(), 0)
    sizes = (training.observations.shape[1] + training.actions.shape[1], 64, 64, 1)
    first, second, last = (nn.Linear(a, b) for a, b in pairwise(sizes))
    network = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)

    def logits(episodes: TransitionDataset, rows: Tensor) -> tuple[Tensor, Tensor]:
        observations = (episodes.observations[rows].float() - mean) / (std + 1e-3)
        both = episodes.actions[rows].float(), random_actions(episodes, len(rows), generator).float()
        known, random = (network(torch.cat([observations, actions], 1)).squeeze(1) for actions in both)
        return known, random

    for _ in range(steps):
        known, random = logits(training, torch.randint(len(training), (256,)))
        loss = nn.functional.softplus(known).mean() + nn.functional.softplus(-random).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    with torch.no_grad():
        known, random = logits(held_out, torch.arange(len(held_out)))
    return auroc(random.double().numpy(), known.double().numpy()), float((random > known).double().mean())


def markdown(rows: list[dict[str, str]]) -> str:
    """The rows as a table for a page."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([row.get(c, "") for c in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def interval(values: Any, digits: int = 3) -> str:
    """`mean [low, high]`: 95 % by Student's t over seeds."""
    array = np.asarray(values, float)
    if len(array) < 2:
        return f"{array.mean():.{digits}g}"
    reach = stats.t.ppf(0.975, len(array) - 1) * stats.sem(array)
    low, mean, high = (f"{x:.{digits}g}" for x in (array.mean() - reach, array.mean(), array.mean() + reach))
    return f"{mean} [{low}, {high}]"


if __name__ == "__main__":
    main()
