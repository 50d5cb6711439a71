"""What a user chooses about a training run, apart from the agent's own config."""

from __future__ import annotations

from dataclasses import dataclass

from rlkit2.errors import ConfigError

REWARD_TRANSFORMS = ("none", "return_range", "goal_penalty")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How the dataset is seen by the agent."""

    normalize_observations: bool = (
        False  # shift and scale every observation feature to mean 0 and deviation 1 over the dataset
    )
    reward_transform: str = (
        "none"  # none, return_range (x 1000 / range of episode returns) or goal_penalty (0 -> -3, else 0)
    )
    reward_scale: float = 1.0  # factor on every reward, after the transform
    held_out: float = 0.0  # share of the episodes kept out of training, for diagnostics (`rlkit2 uncertainty`)

    def __post_init__(self) -> None:
        if self.reward_transform not in REWARD_TRANSFORMS:
            raise ConfigError(
                f"reward_transform must be one of {', '.join(REWARD_TRANSFORMS)}, not {self.reward_transform!r}"
            )
        if not 0.0 <= self.held_out < 1.0:
            raise ConfigError(f"held_out must be a share of the episodes in [0, 1), not {self.held_out}")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How long and how closely watched a run is; all counts are updates. Every unset interval is chosen from `steps`."""

    steps: int = 100_000  # updates per seed
    batch_size: int = 256  # transitions per update and seed
    log_every: int | None = (
        None  # updates between two lines of metrics; default: a hundredth of the steps, at most 1000
    )
    eval_every: int | None = None  # updates between two evaluations; 0: none at all; default: one, at the end
    eval_episodes: int = 10  # episodes per evaluation and seed
    checkpoint_every: int | None = (
        None  # updates between two checkpoints; default: a twentieth of the steps, at most 10000
    )

    def __post_init__(self) -> None:
        defaults = {
            "log_every": max(1, min(1000, self.steps // 100)),
            "eval_every": self.steps,
            "checkpoint_every": max(1, min(10_000, self.steps // 20)),
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("steps", "batch_size", "log_every", "eval_episodes", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.interval("eval_every") < 0:
            raise ConfigError(f"eval_every must be 0 (never) or more, not {self.eval_every}")

    def interval(self, name: str) -> int:
        """`log_every`, `eval_every` or `checkpoint_every` as the number it stands for."""
        value: int = getattr(self, name)
        return value
