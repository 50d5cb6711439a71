"""How often nominal 95 % intervals over few seeds hold the truth: those of rlkit2 beside the percentile bootstrap.

    python benchmarks/intervals.py

Every cell: the share of independent trials in which the interval of that many seeds covers the true value. Normal scores; gamma scores (shape 4,
skewness 1), as of runs with a long good tail; exponential scores (skewness 2). Mean and interquartile mean; probability of improvement of one such
agent over another that is one standard deviation worse, with as many seeds on both sides.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlkit2.evaluation.statistics import (
    Estimate,
    bootstrap,
    interquartile_mean,
    pooled_iqm,
    pooled_mean,
    probability_of_improvement,
)

Array = NDArray[np.float64]
SEEDS = (2, 3, 4, 5, 7, 10, 15, 20, 30, 50)
DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Array]] = {
    "normal": lambda g, shape: g.normal(size=shape),
    "gamma": lambda g, shape: g.gamma(4.0, size=shape) / 2,
    "exponential": lambda g, shape: g.exponential(size=shape),
}


def truths(name: str) -> dict[str, float]:
    """Mean, interquartile mean and probability of improvement, from two million draws."""
    generator = np.random.default_rng(0)
    draw = DISTRIBUTIONS[name]
    first, second = draw(generator, (2_000_000,)), draw(generator, (2_000_000,))
    mean = {"normal": 0.0, "gamma": 2.0, "exponential": 1.0}[name]
    return {
        "mean": mean,
        "IQM": float(interquartile_mean(first)),
        "probability": float(np.mean(first + 1 > second)),
    }


def coverage(find: Callable[[int], Estimate], truth: float, trials: int) -> float:
    """Share of the trials whose interval holds the truth."""
    found = [find(k) for k in range(trials)]
    return float(np.mean([estimate.low <= truth <= estimate.high for estimate in found]))


def measure(trials: int, resamples: int) -> list[dict[str, object]]:
    """One row per distribution, statistic and method."""
    rows: list[dict[str, object]] = []
    for name, draw in DISTRIBUTIONS.items():
        truth = truths(name)
        for what in truth:
            for method in ("auto", "percentile"):
                shares = {}
                for seeds in SEEDS:
                    generator = np.random.default_rng(seeds)
                    scores, others = draw(generator, (trials, seeds)), draw(generator, (trials, seeds))

                    def find(k: int, scores: Array = scores, others: Array = others, method: str = method) -> Estimate:
                        how = {"method": method, "resamples": resamples, "seed": k}
                        if what == "probability":  # noqa: B023
                            return probability_of_improvement([scores[k] + 1], [others[k]], **how)
                        return bootstrap([scores[k]], pooled_mean if what == "mean" else pooled_iqm, **how)  # noqa: B023

                    shares[seeds] = coverage(find, truth[what], trials)
                rows.append({"scores": name, "statistic": what, "method": method, "coverage": shares})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "intervals.json")
    options = parser.parse_args()
    rows = measure(options.trials, options.resamples)
    header = ["scores", "statistic", "interval", *(f"{seeds}" for seeds in SEEDS)]
    print("| " + " | ".join(header) + " |\n| " + " | ".join(["---"] * len(header)) + " |")
    for row in rows:
        shares = row["coverage"]
        assert isinstance(shares, dict)
        kind = "rlkit2" if row["method"] == "auto" else "percentile bootstrap"
        print(
            f"| {row['scores']} | {row['statistic']} | {kind} | "
            + " | ".join(f"{share:.2f}" for share in shares.values())
            + " |"
        )
    error = 1.96 * np.sqrt(0.95 * 0.05 / options.trials)
    print(f"\n{options.trials} trials a cell (+- {error:.3f}), {options.resamples} resamples")
    if options.json:
        options.json.write_text(
            json.dumps({"trials": options.trials, "resamples": options.resamples, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
