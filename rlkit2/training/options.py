"""What a user chooses about a training run, apart from the agent's own config."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from rlkit2.data.reading import ReadingOptions
from rlkit2.errors import ConfigError
from rlkit2.fields import (
    Checked,
    Count,
    Finite,
    Fraction,
    Function,
    Interval,
    Natural,
    NonNegative,
    Positive,
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

    # shift and scale every observation feature to mean 0 and deviation 1 over the dataset; default: yes, but for bytes and for what begins online
    normalize_observations: bool | None = None
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
    # learning rates of all networks: constant, or falling to zero at the last step, along half a cosine, a line or a curve of their own (refine_from)
    schedule: Schedule = "constant"
    # a run of the same agent, whose gradients shape the "refined" schedule
    refine_from: str | None = None
    # decay of a running mean of the policy's weights, which is then what is evaluated and saved (.999: about the last 1000 updates); 0: as they are;
    # default: the agent's own, 0 for most
    policy_ema: Annotated[float, Interval("[0, 1)")] | None = None
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
        if (self.schedule == "refined") != (self.refine_from is not None):
            raise ConfigError(
                "schedule = 'refined' and refine_from, the run whose gradients shape it, go together; leave both out, or name both"
            )
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


@dataclass(frozen=True, kw_only=True)
class OnlineOptions(Checked):
    """How an agent acts and learns in its environment; all counts are transitions of one seed, which is what a step of an online run is."""

    # environments in which each seed collects, stepped in turn
    num_envs: Count = 1
    # updates per transition; .25: one after every fourth
    update_ratio: Positive = 1.0
    # share of every minibatch that comes from the offline data: half by default, as published for agents of many kinds (RLPD); 0 without such data
    offline_share: Fraction = 0.5
    # transitions before the first update, by the trained policy (from scratch: at random); default: a tenth of the steps, at most 5000
    warmup: Natural | None = None
    # newest transitions of a seed that minibatches are drawn from; all are kept on disk
    capacity: Count = 1_000_000
    # deviation of the noise on the actions of a deterministic policy, in halves of their range
    exploration_noise: NonNegative = 0.1
    # share of random actions of a greedy policy
    epsilon: Fraction = 0.05
    # transitions over which that share falls to `epsilon` from 1; default: none, and from scratch a tenth of the steps
    epsilon_steps: Natural | None = None
    # Minari id, such as own/walks-v0, under which everything that was collected is kept when the run is through
    record: str | None = None

    def settled(self, steps: int, *, scratch: bool, data: bool = True) -> OnlineOptions:
        """The same with what follows from the length of the run, and from whether there is a trained policy and data."""
        warmup = min(5000, steps // 10) if self.warmup is None else self.warmup
        falling = (steps // 10 if scratch else 0) if self.epsilon_steps is None else self.epsilon_steps
        share = self.offline_share if data else 0.0
        return replace(self, warmup=warmup, epsilon_steps=falling, offline_share=share)


SECTIONS = {"training": TrainingOptions, "data": DataOptions, "reading": ReadingOptions}
"""Where the options of a run are written, each once: its keyword arguments, command line, recipe and `config.json` follow from these."""
ONLINE_SECTIONS: Mapping[str, Any] = ChainMap({"online": OnlineOptions}, SECTIONS)  # theirs come first
"""The same for a run in an environment."""


def read_options(given: Mapping[str, Any], sections: Mapping[str, Any] = SECTIONS) -> tuple[dict[str, Any], ...]:
    """Split keyword arguments into the fields of every class of `sections`, in their order, checked.

    Raises:
        ConfigError: an unknown name, or a value of another type or out of range.
    """
    known = [name for cls in sections.values() for name in field_types(cls)]
    for name in given:
        if name not in known and name in field_types(OnlineOptions):
            raise ConfigError(f"{name} is for training in an environment: rlkit2 train --online (rlkit2.train_online)")
        if name not in known:
            raise ConfigError(f"there is no option {name!r}{closest(name, known)}")
    return tuple(
        read_fields(cls, {name: value for name, value in given.items() if name in field_types(cls)})
        for cls in sections.values()
    )


def show_options(function: Function) -> Function:
    """Give a function with `**options` the signature and the docstring of the fields that it takes."""
    return show_fields(*SECTIONS.values(), unset=True)(function)


def show_online_options(function: Function) -> Function:
    """The same with the options of a run in an environment, without the length, which is an argument of its own."""
    return show_fields(*ONLINE_SECTIONS.values(), unset=True, without=("steps",))(function)
