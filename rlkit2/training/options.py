"""What a user chooses about a training run, apart from the agent's own config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from rlkit2.data.reading import ReadingOptions
from rlkit2.errors import ConfigError
from rlkit2.fields import (
    Checked,
    Count,
    Finite,
    Function,
    Interval,
    Natural,
    closest,
    field_types,
    read_fields,
    show_fields,
)
from rlkit2.nn.optim import Schedule
from rlkit2.training.selection import read_goal


@dataclass(frozen=True, kw_only=True)
class DataOptions(Checked):
    """How the dataset is seen by the agent."""

    # shift and scale every observation feature to mean 0 and deviation 1 over the dataset
    normalize_observations: bool = False
    # show the last so many observations as one, oldest first; before the first of an episode stands the first
    frame_stack: Annotated[int, Interval("[1, 255]")] = 1
    # targets hold the discounted rewards of up to so many steps of an episode, then the value behind them; for agents with critics
    num_steps: Count = 1
    # none, return_range (x 1000 / range of episode returns) or goal_penalty (0 -> -3, else 0)
    reward_transform: Literal["none", "return_range", "goal_penalty"] = "none"
    # factor on every reward, after the transform
    reward_scale: Finite = 1.0
    # share of the episodes kept out of training, for diagnostics (`rlkit2 uncertainty`)
    held_out: Annotated[float, Interval("[0, 1)")] = 0.0


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Checked):
    """How long and how closely watched a run is; all counts are updates. Every unset interval is chosen from `steps`."""

    # updates per seed
    steps: Count = 100_000
    # transitions per update and seed
    batch_size: Count = 256
    # learning rates of all networks: constant, or falling to zero at the last step, along half a cosine or a line
    schedule: Schedule = "constant"
    # updates between two lines of metrics; default: a hundredth of the steps, at most 1000
    log_every: Count | None = None
    # updates between two evaluations; 0: none at all; default: one, at the end
    eval_every: Natural | None = None
    # episodes per evaluation and seed
    eval_episodes: Count = 10
    # updates between two checkpoints; default: a twentieth of the steps, at most 10000
    checkpoint_every: Count | None = None
    # min:METRIC or max:METRIC (a loss or evaluation/score needs no min or max): end with the checkpoint at which it is best; default: the last one
    stop_when: str | None = None
    # checkpoints in a row without a new best (evaluations, for evaluation/score) after which `stop_when` ends the training
    patience: Count = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop_when is not None:
            read_goal(self.stop_when)
        defaults = {
            "log_every": max(1, min(1000, self.steps // 100)),
            "eval_every": self.steps,
            "checkpoint_every": max(1, min(10_000, self.steps // 20)),
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def interval(self, name: str) -> int:
        """`log_every`, `eval_every` or `checkpoint_every` as the number it stands for."""
        value: int = getattr(self, name)
        return value


SECTIONS = {"training": TrainingOptions, "data": DataOptions, "reading": ReadingOptions}
"""Where the options of a run are written, each once: its keyword arguments, command line, recipe and `config.json` follow from these."""


def read_options(given: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Split keyword arguments into the fields of every class of `SECTIONS`, in their order, checked.

    Raises:
        ConfigError: an unknown name, or a value of another type or out of range.
    """
    known = [name for cls in SECTIONS.values() for name in field_types(cls)]
    for name in given:
        if name not in known:
            raise ConfigError(f"there is no option {name!r}{closest(name, known)}")
    return tuple(
        read_fields(cls, {name: value for name, value in given.items() if name in field_types(cls)})
        for cls in SECTIONS.values()
    )


def show_options(function: Function) -> Function:
    """Give a function with `**options` the signature and the docstring of the fields that it takes."""
    return show_fields(*SECTIONS.values(), unset=True)(function)
