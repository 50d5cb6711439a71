"""The score of a run, from its `evaluations.jsonl`: the last evaluation is the headline, everything picked afterwards stands beside it, marked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit2.errors import RunError
from rlkit2.evaluation.evaluation import summarize
from rlkit2.evaluation.reference_scores import reference_scores
from rlkit2.training.building import stored_spec
from rlkit2.training.run import Run

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ScoreHistory:
    """All evaluations of a run. `scores[i]` `[S, E]` belongs to `steps[i]`; a seed that stopped early is NaN from there on.

    `unit`: "normalized score" (per cent) where every evaluation has it, else "return".
    """

    steps: tuple[int, ...]
    scores: tuple[Array, ...]
    seeds: tuple[int, ...]
    unit: str

    @property
    def per_seed(self) -> Array:
        """Score of every evaluation and seed, `[steps, S]`."""
        return np.stack([scores.mean(axis=1) for scores in self.scores])

    @property
    def best(self) -> int:
        """Index of the evaluation with the highest mean over seeds; those with a missing seed come last."""
        means = self.per_seed.mean(axis=1)
        return int(np.argmax(np.where(np.isnan(means), -np.inf, means)))


def score_history(run: Run, *, unit: str | None = None) -> ScoreHistory:
    """Read a run's evaluations, the deterministic ones where there are both kinds.

    `unit="return"`: the returns, also where there are normalised scores.

    Raises `RunError` if the run was never evaluated or its lines contradict each other.
    """
    lines = run.evaluations()
    lines = [line for line in lines if line["deterministic"]] or lines
    if not lines:
        raise RunError(
            f"{run.path} has no evaluations; train with evaluations, or score its policy with: rlkit2 evaluate {run.path}"
        )
    normalized = unit != "return" and all(line["normalized_scores"] is not None for line in lines)
    seeds = tuple(run.config["seeds"])
    by_step: dict[int, dict[int, list[float | None]]] = {}
    for line in lines:
        by_step.setdefault(line["step"], {})[line["seed"]] = line["normalized_scores" if normalized else "returns"]
    if unknown := {seed for found in by_step.values() for seed in found} - set(seeds):
        raise RunError(f"{run.path}: evaluations.jsonl has seeds {sorted(unknown)} that config.json does not name")
    steps = tuple(sorted(by_step))
    tables = []
    for step in steps:
        found = by_step[step]
        widths = {len(scores) for scores in found.values()}
        if len(widths) != 1:
            raise RunError(
                f"{run.path}: evaluations.jsonl has different numbers of episodes at step {step}: {sorted(widths)}"
            )
        missing: list[float | None] = [None] * widths.pop()
        tables.append(np.array([found.get(seed, missing) for seed in seeds], dtype=np.float64))
    return ScoreHistory(steps, tuple(tables), seeds, "normalized score" if normalized else "return")


def score_summary(run: Run, *, last: int = 5) -> dict[str, Any]:
    """Scores of a run as JSON values.

    `final`: the last evaluation, the number to report. `last`: each seed's mean over the last `last` evaluations. `best`: the evaluation with the
    highest mean over seeds; an oracle, since it is picked with the very returns it reports. Each holds the statistics of
    `evaluation.summarize` and its step or number of evaluations. `stopped`: seeds that a non-finite metric ended; their scores are missing, so the
    statistics over seeds are None unless such a seed never was evaluated.
    """
    history = score_history(run)
    recent = history.scores[-last:]
    return {
        "unit": history.unit,
        "seeds": list(history.seeds),
        "final": {"step": history.steps[-1], "episodes": history.scores[-1].shape[1], **summarize(history.scores[-1])},
        "last": {
            "evaluations": len(recent),
            **summarize(np.mean([scores.mean(axis=1, keepdims=True) for scores in recent], axis=0)),
        },
        "best": {"step": history.steps[history.best], "oracle": True, **summarize(history.scores[history.best])},
        "stopped": run.manifest.get("stopped", {}),
    }


def below_its_data(run: Run) -> str | None:
    """One line where the final policy earns less than the data's episodes do on average, by a 95 % interval; None where it does not.

    Nor where the two cannot be compared: no evaluation, another environment than the dataset's, no reference returns or a mean outside them (the
    data's rewards are not the environment's then), or episodes in the data that go on beyond the environment's time limit.
    """
    data, spec = run.manifest.get("data"), stored_spec(run.config)
    environment, known = spec.eval_env_spec or spec.env_spec, reference_scores(spec)
    if (
        not data
        or data["mean_return"] is None
        or run.config.get("env")
        or environment is None
        or known is None
        or not run.evaluations()
    ):
        return None
    if data["mean_length"] > (environment.max_episode_steps or np.inf):
        return None
    found = summarize(score_history(run, unit="return").scores[-1])
    high = found["interval"][1]
    if high is None or not max(high, known.minimum) < data["mean_return"] <= known.maximum:
        return None
    mend = "give it more updates" if run.config["agent"] == "bc" else "compare with agent bc, which copies them"
    return (
        f"the policy's return is {found['mean']:.4g} (95 % interval up to {high:.4g}), but {data['mean_return']:.4g} on average in the data, by its "
        f"rewards: what was learnt is worse than what the data do; {mend}"
    )
