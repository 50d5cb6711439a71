"""What a search may choose: ranges and lists of values, and who chooses from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rlkit2.errors import ConfigError, require


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; whole ones where both are. `log`: evenly over their logarithms."""

    low: float
    high: float
    log: bool = False

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are meant."""
        return isinstance(self.low, int) and isinstance(self.high, int)


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]


Space = Mapping[str, Range | Choice]  # name of a field, such as config.learning_rate -> what it may be
Result = tuple[
    float | None, int | None
]  # the metric, None for a trial that failed, and the step at which it was ended early, if it was


def read_space(content: Any) -> dict[str, Range | Choice]:
    """`[search.space]` of a sweep file: a list of values, or `{ low = ..., high = ..., log = true }`.

    Raises:
        ConfigError: nothing to choose from; the message names the field.
    """
    if not isinstance(content, dict) or not content:
        raise ConfigError(
            'search: space must name fields, such as "config.learning_rate" = { low = 1e-4, high = 1e-2, log = true }'
        )
    found: dict[str, Range | Choice] = {}
    for name, value in content.items():
        if isinstance(value, list) and value:
            found[name] = Choice(tuple(value))
        elif isinstance(value, dict) and {"low", "high"} <= value.keys() <= {"low", "high", "log"}:
            found[name] = _range(name, value)
        else:
            raise ConfigError(f"search: {name} must be a list of values or {{ low = ..., high = ... }}, not {value!r}")
    return found


def _range(name: str, value: Mapping[str, Any]) -> Range:
    low, high, log = value["low"], value["high"], value.get("log", False)
    numbers = all(type(end) in (int, float) and math.isfinite(end) for end in (low, high))
    if not numbers or not low < high or (log and not low > 0) or not isinstance(log, bool):
        raise ConfigError(f"search: {name} needs numbers low < high (above 0 with log = true), not {value!r}")
    return Range(low, high, log)


class Sampler(Protocol):
    """Chooses settings: the same ones for the same space, seed and results."""

    def ask(self, count: int) -> list[dict[str, Any]]:
        """The settings of the next `count` trials."""

    def tell(self, results: Sequence[Result]) -> None:
        """What came of them, in the same order."""


class RandomSampler:
    """Every trial by itself, whatever came of the others."""

    def __init__(self, space: Space, seed: int, rising: bool) -> None:
        self.space, self.seed, self.count = space, seed, 0

    def ask(self, count: int) -> list[dict[str, Any]]:
        """See `Sampler`."""
        self.count += count
        return [self._draw(number) for number in range(self.count - count, self.count)]

    def tell(self, results: Sequence[Result]) -> None:
        """See `Sampler`."""

    def _draw(self, number: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, number])
        return {name: _value(rng, part) for name, part in self.space.items()}


def _value(rng: np.random.Generator, part: Range | Choice) -> Any:
    if isinstance(part, Choice):
        return part.values[int(rng.integers(len(part.values)))]
    low, high = float(part.low), float(part.high)
    if part.whole:
        low, high = low - 0.5, high + 0.5  # so that the ends are as likely as the others
    found = math.exp(rng.uniform(math.log(low), math.log(high))) if part.log else float(rng.uniform(low, high))
    if part.whole:
        return int(min(max(round(found), part.low), part.high))
    return min(max(found, float(part.low)), float(part.high))


class OptunaSampler:
    """Tree-structured Parzen estimators: settings like the better ones among the trials so far, by Optuna."""

    def __init__(self, space: Space, seed: int, rising: bool) -> None:
        self.optuna = require("optuna", extra="optuna")
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
        sampler = self.optuna.samplers.TPESampler(seed=seed)
        self.study = self.optuna.create_study(sampler=sampler, direction="maximize" if rising else "minimize")
        self.space = space
        self.asked: list[Any] = []

    def ask(self, count: int) -> list[dict[str, Any]]:
        """See `Sampler`."""
        self.asked = [self.study.ask() for _ in range(count)]
        return [{name: self._suggest(trial, name, part) for name, part in self.space.items()} for trial in self.asked]

    def tell(self, results: Sequence[Result]) -> None:
        """See `Sampler`."""
        states = self.optuna.trial.TrialState
        for trial, (value, pruned_at) in zip(self.asked, results, strict=True):
            if value is None:
                self.study.tell(trial, state=states.FAIL)
            elif pruned_at is None:
                self.study.tell(trial, value)
            else:
                trial.report(value, pruned_at)
                self.study.tell(trial, state=states.PRUNED)

    def _suggest(self, trial: Any, name: str, part: Range | Choice) -> Any:
        if isinstance(part, Choice):
            return part.values[trial.suggest_categorical(name, list(range(len(part.values))))]
        suggest = trial.suggest_int if part.whole else trial.suggest_float
        return suggest(name, part.low, part.high, log=part.log)


SAMPLERS: dict[str, type[RandomSampler] | type[OptunaSampler]] = {"random": RandomSampler, "optuna": OptunaSampler}
