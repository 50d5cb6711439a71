"""What an evaluation found: returns of every seed and episode, scores, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit2.evaluation.reference_scores import ReferenceScores
from rlkit2.evaluation.statistics import bootstrap, pooled_iqm, standard_errors

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """Results of `evaluate_policy`; S policies (training seeds) by E episodes, episode k from the same environment seed for every policy.

    `returns` `[S, E]`: undiscounted, in the environment's rewards; NaN where a policy gave a non-finite action. `lengths` `[S, E]`: steps.
    `successes` `[S, E]`: whether the environment reported success at any step, None where it never reports it. `normalization` says where the
    reference returns come from, or why there are none.
    """

    returns: Array
    lengths: NDArray[np.int64]
    successes: NDArray[np.bool_] | None
    seeds: tuple[int, ...]
    episode_seeds: tuple[int, ...]
    environment: str
    dataset: str
    deterministic: bool
    reference: ReferenceScores | None
    normalization: str

    @property
    def normalized_scores(self) -> Array | None:
        """Scores `[S, E]` in per cent of the way from the random to the expert reference return, or None (`normalization` says why)."""
        if self.reference is None:
            return None
        low, high = self.reference.minimum, self.reference.maximum
        return 100.0 * (self.returns - low) / (high - low)

    def summary(self) -> dict[str, Any]:
        """Mean, interquartile mean over seeds and 95 % intervals of the return, and the same of the normalised score under `normalized`.

        Keys: `mean`, `interval`, `iqm`, `iqm_interval` (`[None, None]` where there is none; `interval_method`, `iqm_interval_method`: how they were
        found, and over how many seeds), `between_seed_error`, `within_policy_error` (standard errors of the mean, see
        `statistics.standard_errors`), `per_seed`, `minimum`, `maximum`; and `normalized`, `normalization`, `success_rate`, `mean_length`, `seeds`,
        `episodes`.
        """
        scores = self.normalized_scores
        return {
            **summarize(self.returns),
            "normalized": None if scores is None else summarize(scores),
            "normalization": self.normalization,
            "success_rate": None if self.successes is None else float(self.successes.mean()),
            "mean_length": float(self.lengths.mean()),
            "seeds": list(self.seeds),
            "episodes": self.returns.shape[1],
        }

    def lines(self) -> list[dict[str, Any]]:
        """One JSON line per seed, as `evaluations.jsonl` of a run stores them (the trainer adds the step)."""
        scores = self.normalized_scores
        lines = []
        for index, seed in enumerate(self.seeds):
            line: dict[str, Any] = {
                "seed": seed,
                "returns": json_numbers(self.returns[index]),
                "lengths": self.lengths[index].tolist(),
                "normalized_scores": None if scores is None else json_numbers(scores[index]),
                "deterministic": self.deterministic,
            }
            if self.successes is not None:
                line["successes"] = self.successes[index].tolist()
            lines.append(line)
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "dataset": self.dataset,
            "environment": self.environment,
            "deterministic": self.deterministic,
            "episode_seeds": list(self.episode_seeds),
            "summary": self.summary(),
            "results": self.lines(),
        }


def summarize(scores: Array) -> dict[str, Any]:
    """The statistics of one array of scores `[S, E]` that every summary and table shows."""
    mean, iqm = bootstrap([scores]), bootstrap([scores], pooled_iqm)
    between, within = standard_errors(scores)
    return {
        "mean": number(mean.value),
        "interval": json_numbers([mean.low, mean.high]),
        "interval_method": mean.method,
        "iqm": number(iqm.value),
        "iqm_interval": json_numbers([iqm.low, iqm.high]),
        "iqm_interval_method": iqm.method,
        "between_seed_error": number(between),
        "within_policy_error": number(within),
        "per_seed": json_numbers(scores.mean(axis=1)),
        "minimum": number(float(scores.min())),
        "maximum": number(float(scores.max())),
    }


def mean_text(statistics: Mapping[str, Any]) -> str:
    """The mean of `summarize` with its interval and how that was found: "14.4 (95 % interval 9.9 to 18.5, t over 2 seeds)"."""
    if statistics["mean"] is None:
        return "n/a"
    low, high = statistics["interval"]
    interval = (
        statistics["interval_method"]
        if low is None
        else f"95 % interval {low:.1f} to {high:.1f}, {statistics['interval_method']}"
    )
    return f"{statistics['mean']:.1f} ({interval})"


def number(value: float | None) -> float | None:
    """A finite float, else None: JSON has no NaN."""
    return float(value) if value is not None and math.isfinite(value) else None


def json_numbers(values: Any) -> list[float | None]:
    """The values as JSON numbers, None for what is not finite."""
    return [number(value) for value in values]
