"""Which of two checkpoints is the better one: by a metric, over the seeds that both have."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlkit2.errors import ConfigError
from rlkit2.fields import closest

SCORE = "evaluation/score"
FALLING = ("loss", "nll")  # what is minimised by its name


@dataclass(frozen=True)
class Goal:
    """A metric and whether more of it is better."""

    metric: str
    rising: bool

    def better(self, value: float, than: float) -> bool:
        """Whether `value` beats `than`; what is not finite beats nothing and is beaten by whatever is."""
        if not math.isfinite(value) or not math.isfinite(than):
            return math.isfinite(value)
        return value > than if self.rising else value < than


def read_goal(text: str) -> Goal:
    """`min:METRIC`, `max:METRIC`, or the metric alone where its name says which is better: a loss, the score.

    Raises:
        ConfigError: the name does not say it.
    """
    way, colon, metric = text.partition(":")
    if colon and way in ("min", "max") and metric:
        return Goal(metric, way == "max")
    if text == SCORE or text.rpartition("/")[2].endswith(FALLING):
        return Goal(text, text == SCORE)
    raise ConfigError(f"{text!r} does not say which values are better: write min:{text} or max:{text}")


class StopRule:
    """Ends a training at the checkpoint that serves a goal best, once `patience` checkpoints in a row were no better.

    A checkpoint stands for the log lines since the one before it, an evaluation for itself.

    Args:
        text: see `read_goal`.
        patience: checkpoints, or evaluations.
    """

    def __init__(self, text: str, patience: int) -> None:
        self.goal = read_goal(text)
        self.patience = patience
        self.chosen: dict[str, Any] | None = None  # step, value, and the last step of the checkpoint before it
        self.judged = self.waited = 0
        self.ended = False

    @property
    def facts(self) -> dict[str, Any]:
        """All that a resume needs, as JSON."""
        return {"chosen": self.chosen, "judged": self.judged, "waited": self.waited, "ended": self.ended}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Take up `facts`."""
        self.chosen, self.judged = facts["chosen"], facts["judged"]
        self.waited, self.ended = facts["waited"], facts["ended"]

    def check(self, known: Collection[str]) -> None:
        """Raise `ConfigError` unless the metric is among the known ones."""
        if self.goal.metric not in known:
            raise ConfigError(f"no metric {self.goal.metric!r} to stop by{closest(self.goal.metric, [*known])}")

    def judge(self, step: int, value: Callable[[str, int, int], float], *, last: bool) -> None:
        """Compare the checkpoint of `step` with the best one; `value(metric, after, until)` is a mean over log lines, see `mean_over`."""
        metric = self.goal.metric
        after = step - 1 if metric == SCORE else self.judged
        found = value(metric, after, step)
        if self.chosen is not None:  # over the seeds that still learn, as `found`
            self.chosen["value"] = value(metric, self.chosen["after"], self.chosen["step"])
        if math.isfinite(found):
            self.judged = step
            if self.goal.better(found, self.chosen["value"] if self.chosen else math.nan):
                self.chosen, self.waited = {"step": step, "after": after, "value": found}, 0
            else:
                self.waited += 1
        self.ended = self.chosen is not None and (last or self.waited >= self.patience)


def mean_over(lines: Iterable[Mapping[str, Any]], metric: str, seeds: Collection[int], after: int, until: int) -> float:
    """Mean of a metric over the lines of some seeds with a step in (after, until]; NaN where none has it."""
    values = [
        line[metric] for line in lines if line["seed"] in seeds and after < line["step"] <= until and metric in line
    ]
    return float(np.mean(values)) if values else math.nan


def mean_score(line: Mapping[str, Any]) -> float:
    """The score of one line of `evaluations.jsonl`: mean normalised score, or mean return where there is none."""
    scores = line.get("normalized_scores") or line["returns"]
    return float(np.mean([np.nan if score is None else score for score in scores]))


def score_lines(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lines of `evaluations.jsonl` as metrics."""
    return [{"step": line["step"], "seed": line["seed"], SCORE: mean_score(line)} for line in lines]
