"""Scripted teachers that label pairs of segments from rewards, with the imperfections of people.

Source: Lee, Smith, Dragan, Abbeel, "B-Pref: Benchmarking Preference-Based Reinforcement Learning" (NeurIPS 2021), section 4, in the order of
its released code. One difference: the released loop multiplies its thresholds by the share twice after the first round of queries; here
they are applied once.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from rlkit2.data.dataset import TransitionDataset
from rlkit2.errors import ConfigError

Array = NDArray[np.float64]

PRESETS: dict[str, dict[str, float]] = {
    "oracle": {},
    "mistake": {"mistake": 0.1},
    "noisy": {"beta": 1.0},
    "myopic": {"discount": 0.9},
    "skip": {"skip": 0.1},
    "equal": {"equal": 0.1},
}
_DEFAULTS = {"beta": math.inf, "discount": 1.0, "mistake": 0.0, "skip": 0.0, "equal": 0.0}
BETA_SCALES = ("none", "std")


@dataclass(frozen=True)
class TeacherLabels:
    """Answers to N queries.

    Attributes:
        label_mass: `[N]`, 1 where the second segment is preferred, 0 where the first is, 0.5 for "equally good".
        kept: `[N]` bool, False where the teacher skipped the query; its label means nothing.
        equal: `[N]` bool, where the teacher found both equally good.
        probability: `[N]`, probability that the second is preferred, before mistakes.
    """

    label_mass: Array
    kept: NDArray[np.bool_]
    equal: NDArray[np.bool_]
    probability: Array


@dataclass(frozen=True)
class ScriptedTeacher:
    """Answers which of two segments is better by the rewards of their steps.

    In this order: a query is skipped when the better of both sums of rewards is at most the skip threshold; both are equal when the sums
    differ by less than the equal threshold; the score of a segment of H steps is `sum_t discount^(H-1-t) r_t`, so a myopic teacher weighs
    the LAST step most; with a finite `beta` the second is preferred with probability `sigmoid(beta (S_2 - S_1))`, else the larger
    score wins (the first, where they are the same); the answer is flipped with probability `mistake`; "equal" overrides all.

    Args:
        preset: oracle, mistake (10 % flipped), noisy (beta 1), myopic (discount 0.9), skip or equal (thresholds of 10 %).
        beta: inverse temperature above 0; inf: no noise.
        discount: in (0, 1].
        mistake: probability of a flipped answer, in [0, 1].
        skip, equal: thresholds in units of what an average segment earns (`average_segment_return`).
        skip_threshold, equal_threshold: thresholds in units of reward instead.
        beta_scale: "std" divides score differences by their standard deviation over the queries of a call, so that `beta` does not depend on
            the scale of the reward.

    What is not given comes from the preset.

    Raises:
        ConfigError: unknown preset or a value out of range.
    """

    preset: str = "oracle"
    beta: float | None = None
    discount: float | None = None
    mistake: float | None = None
    skip: float | None = None
    equal: float | None = None
    skip_threshold: float | None = None
    equal_threshold: float | None = None
    beta_scale: str = "none"

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ConfigError(f"unknown teacher {self.preset!r}; choose one of: {', '.join(PRESETS)}")
        for name, default in _DEFAULTS.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, PRESETS[self.preset].get(name, default))
        for name, good in (
            ("beta", self.value("beta") > 0),
            ("discount", 0 < self.value("discount") <= 1),
            ("mistake", 0 <= self.value("mistake") <= 1),
            ("skip", self.value("skip") >= 0),
            ("equal", self.value("equal") >= 0),
        ):
            if not good:
                raise ConfigError(f"{name} = {self.value(name)} of the teacher is out of range")
        if self.beta_scale not in BETA_SCALES:
            raise ConfigError(f"beta_scale must be one of {', '.join(BETA_SCALES)}, not {self.beta_scale!r}")

    def value(self, name: str) -> float:
        """A setting as the number it stands for."""
        number: float = getattr(self, name)
        return number

    def scores(self, rewards: ArrayLike) -> Array:
        """Scores `[N]` of segments with step rewards `[N, H]`: discounted sums in which the last step has weight 1."""
        steps = _finite(rewards)
        return np.asarray(steps @ self.value("discount") ** np.arange(steps.shape[-1] - 1, -1, -1.0))

    def probabilities(self, rewards_1: ArrayLike, rewards_2: ArrayLike) -> Array:
        """Probability `[N]` that the second is preferred, before mistakes and without "equal"."""
        difference = self.scores(rewards_2) - self.scores(rewards_1)
        if math.isinf(self.value("beta")):
            return np.asarray(difference > 0, dtype=np.float64)
        if self.beta_scale == "std":
            difference = difference / (difference.std() or 1.0)
        return np.asarray(expit(self.value("beta") * difference))

    def label(
        self,
        rewards_1: ArrayLike,
        rewards_2: ArrayLike,
        *,
        average: float | None = None,
        seed: int | np.random.Generator = 0,
    ) -> TeacherLabels:
        """Answer N queries.

        Args:
            rewards_1, rewards_2: step rewards `[N, H]` of the first and the second segments.
            average: what an average segment earns, the unit of `skip` and `equal`.
            seed: of the noise and the mistakes.

        Raises:
            ConfigError: shapes differ, a reward is not finite, or a threshold has no unit, or a negative one.
        """
        first, second = (
            _finite(rewards, name) for rewards, name in ((rewards_1, "rewards_1"), (rewards_2, "rewards_2"))
        )
        if first.shape != second.shape or first.ndim != 2:
            raise ConfigError(
                f"step rewards have shapes {first.shape} and {second.shape}; both must be [pairs, steps], cut to one length"
            )
        skip, equal = self._threshold("skip", average), self._threshold("equal", average)
        sums = first.sum(1), second.sum(1)
        generator = np.random.default_rng(seed)
        probability = self.probabilities(first, second)
        label = generator.random(len(first)) < probability
        label ^= generator.random(len(first)) < self.value("mistake")
        ties = np.abs(sums[0] - sums[1]) < equal
        kept = np.maximum(*sums) > skip
        return TeacherLabels(np.where(ties, 0.5, label), kept, ties, np.where(ties, 0.5, probability))

    def _threshold(self, name: str, average: float | None) -> float:
        given: float | None = getattr(self, f"{name}_threshold")
        if given is not None:
            return given
        if self.value(name) == 0:
            return -math.inf if name == "skip" else 0.0
        if average is None:
            raise ConfigError(
                f"the teacher's {name} = {self.value(name)} needs to know what an average segment earns: give average"
            )
        if average <= 0:
            raise ConfigError(
                f"the teacher's {name} is a share of what an average segment earns, {average:.3g} here; give {name}_threshold in units of reward"
            )
        return self.value(name) * average

    def to_dict(self) -> dict[str, Any]:
        """The settings that differ from an oracle's, as JSON values."""
        plain = {"preset": "oracle", **_DEFAULTS, "skip_threshold": None, "equal_threshold": None, "beta_scale": "none"}
        return {"teacher": self.preset} | {
            name: value for name, value in asdict(self).items() if name != "preset" and value != plain[name]
        }


def average_segment_return(dataset: TransitionDataset, length: int, rewards: ArrayLike | None = None) -> float:
    """Mean episode return times `length` over the mean episode length: what a segment of an average episode earns."""
    values = _finite(dataset.rewards if rewards is None else rewards)
    return float(values.sum() * length / len(dataset))


def _finite(rewards: ArrayLike, name: str = "rewards") -> Array:
    """Rewards as float64; a teacher cannot judge by a reward that is not a finite number."""
    values = np.asarray(rewards, dtype=np.float64)
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        place = "query" if values.ndim > 1 else "step"
        raise ConfigError(
            f"{name} of {place} {bad[0][0]} hold NaN or infinite rewards: a teacher cannot compare them, leave the segment out"
        )
    return values
