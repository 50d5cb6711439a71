"""What a user chooses about an evaluation without an environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from rlkit2.errors import ConfigError
from rlkit2.fields import Checked, Count, Inside, Interval, Natural, Positive, Rate, Widths


@dataclass(frozen=True, kw_only=True)
class OfflineOptions(Checked):
    """Sizes and budgets of the estimators; all networks are alike."""

    # hidden layers of Q and of the cloned behaviour; empty: linear, which is tabular for one-hot observations
    hidden_sizes: Widths = (64, 64)
    # estimates of Q and of the occupancy ratios, every one fitted to its own resample of the episodes
    members: Annotated[int, Interval("[3, inf)")] = 8
    # updates of Q and of the cloned behaviour
    steps: Count = 6000
    # transitions per update and member
    batch_size: Count = 128
    # Adam's step size at the start; it falls to zero along half a cosine
    learning_rate: Positive = 1e-3
    # Polyak rate of the target Q: the share of one Bellman backup that an update makes
    target_update_rate: Rate = 0.1
    # "gaussian" or "ggd": fitted Q also learns the noise of its targets and says whether that is calibrated
    critic: Literal["mse", "gaussian", "ggd"] = "mse"
    # "iv": transitions count by the inverse of that noise where Q is fitted
    sample_weighting: Literal["none", "iv"] = "none"
    # random features of the occupancy ratios beside the observations and actions themselves; 0: linear
    features: Natural = 256
    # pull of the occupancy ratios towards 1 (the data as they are), in units of (1 - discount)^2
    regularization: Positive = 0.01
    # resamples of the episodes behind the intervals of what needs no network of its own
    resamples: Annotated[int, Interval("[20, inf)")] = 400
    # actions drawn per state from a stochastic policy with continuous actions
    draws: Count = 8
    # nominal level of the intervals
    confidence: Inside = 0.95
    # states of other episodes whose actions say what the data know about a state
    neighbors: Count = 10
    # of resamples, initial weights and batches
    seed: Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.critic == "mse" and self.sample_weighting != "none":
            raise ConfigError("weights between samples need critic = 'gaussian' or 'ggd'")
