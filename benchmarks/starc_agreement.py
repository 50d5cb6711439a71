"""Whether estimates of one distance agree within their intervals: from halves of a dataset, and from one dataset with four seeds.

python benchmarks/starc_agreement.py                                     # every zoo dataset and kind of features
python benchmarks/starc_agreement.py --datasets zoo/hopper/medium-v0 --kinds auto --rows 20000

Four rewards a dataset: its own, progress of the first observation, the cost of actions, a random network of everything. Halves are of episodes; two
of them agree where they differ by at most `sqrt(a^2 + b^2)`, a and b the arms of their intervals that point at each other. Two seeds (of folds,
features and resampling) agree where the interval of each holds the other's distance.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from common import report

from rlkit2.api import load_dataset
from rlkit2.data import TransitionDataset
from rlkit2.rewards import RewardDistanceMatrix, SampledStarc

DATASETS = (
    "zoo/pendulum/mixed-v0",
    "zoo/cartpole/mixed-v0",
    "zoo/lunarlander/mixed-v0",
    "zoo/hopper/medium-v0",
    "zoo/hopper/medium-replay-v0",
    "zoo/hopper/medium-expert-v0",
    "zoo/hopper/expert-v0",
    "zoo/halfcheetah/medium-v0",
    "zoo/halfcheetah/medium-replay-v0",
    "zoo/halfcheetah/medium-expert-v0",
    "zoo/pointmaze-umaze/scripted-v0",
)
KINDS = ("auto", "linear", "quadratic", "fourier", "tile", "network")


def rewards_of(data: TransitionDataset) -> dict[str, Any]:
    """Four rewards `[N]`."""
    s, after = data.observations.double(), data.next_observations.double()
    a = data.actions.double().reshape(len(data), -1)
    scaled = torch.cat([(part - part.mean(0)) / part.std(0).clamp(min=1e-6) for part in (s, a, after)], 1)
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(scaled.shape[1], 32, generator=generator, dtype=torch.float64) / scaled.shape[1] ** 0.5
    last = torch.randn(32, generator=generator, dtype=torch.float64)
    cost = -a.square().sum(1) if not data.spec.discrete else -(a[:, 0] == a[:, 0].min()).double()
    return {
        "recorded": data.rewards.double(),
        "progress": after[:, 0] - s[:, 0],
        "cost": cost,
        "random": torch.tanh(scaled @ first) @ last,
    }


def shortened(data: TransitionDataset, rows: int) -> TransitionDataset:
    """Whole episodes, drawn at random, of about so many rows."""
    order = np.random.default_rng(0).permutation(data.num_episodes)
    kept = order[: max(8, int((data.episode_lengths.numpy()[order].cumsum() <= rows).sum()))]
    return data.select(np.sort(kept)) if len(kept) < data.num_episodes else data


def pairs(found: list[RewardDistanceMatrix]) -> Iterator[tuple[tuple[float, Any], tuple[float, Any]]]:
    """Distance and interval of a pair of rewards in each of two estimates that have a number."""
    for first, second in itertools.combinations(found, 2):
        assert first.ci is not None
        assert second.ci is not None
        for i, j in first.pairs():
            if np.isfinite(first.values[i, j]) and np.isfinite(second.values[i, j]):
                yield (first.values[i, j], first.ci[i, j]), (second.values[i, j], second.ci[i, j])


def halves_agree(one: tuple[float, Any], other: tuple[float, Any]) -> bool:
    """Whether two estimates from different data differ by no more than chance does."""
    (low, below), (high, above) = sorted((one, other), key=lambda entry: entry[0])
    return bool(high - low <= np.hypot(below[1] - low, high - above[0]) + 1e-9)


def seeds_agree(one: tuple[float, Any], other: tuple[float, Any]) -> bool:
    """Whether each of two estimates from the same data lies in the interval of the other."""
    return all(
        bounds[0] - 1e-9 <= value <= bounds[1] + 1e-9 for (value, _), (_, bounds) in ((one, other), (other, one))
    )


def agreement(name: str, kind: Any, discount: float, rows: int, bootstrap: int) -> dict[str, Any]:
    """A row: shares of agreement, and how many comparisons there were."""
    data, start = shortened(load_dataset(name), rows), time.perf_counter()

    def estimate(part: TransitionDataset, seed: int) -> RewardDistanceMatrix:
        return SampledStarc(kind, discount=discount, bootstrap=bootstrap, seed=seed).fit(part, rewards_of(part))

    halves = list(pairs([estimate(part, 0) for part in data.split(0.5, seed=0)]))
    seeds = list(pairs([estimate(data, seed) for seed in range(4)]))
    return {
        "dataset": name,
        "features": kind,
        "discount": discount,
        "rows": len(data),
        "half pairs": len(halves),
        "halves agree": sum(halves_agree(*both) for both in halves),
        "seed pairs": len(seeds),
        "seeds agree": sum(seeds_agree(*both) for both in seeds),
        "s": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="*", default=DATASETS)
    parser.add_argument("--kinds", nargs="*", default=KINDS)
    parser.add_argument("--discount", type=float, default=0.95)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--bootstrap", type=int, default=100)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    for name, kind in itertools.product(given.datasets, given.kinds):
        try:
            rows.append(agreement(name, kind, given.discount, given.rows, given.bootstrap))
        except ValueError as error:  # more cells of a grid than can be laid out
            rows.append({"dataset": name, "features": kind, "refused": str(error)})
        print(rows[-1], flush=True)
    total = {
        key: sum(row.get(key, 0) for row in rows) for key in ("half pairs", "halves agree", "seed pairs", "seeds agree")
    }
    report("starc_agreement", [*rows, {"dataset": "all", **total}])


if __name__ == "__main__":
    main()
