"""Options of reward learning, each written once: keyword arguments, signatures, docstrings and the command line follow from these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from rlkit2.fields import Checked, Count, Interval, NonNegative, Pattern, Positive, Widths

Share = Annotated[float, Interval("[0, 1)")]


@dataclass(frozen=True, kw_only=True)
class FitOptions(Checked):
    """How `fit_reward_model` fits an ensemble to labels."""

    # members of the ensemble
    members: Count = 3
    # hidden layers of every member
    hidden_sizes: Widths = (256, 256, 256)
    # linear, or tanh for rewards in (-1, 1)
    head: Literal["linear", "tanh"] = "linear"
    # mean or sum of the rewards of a segment is its return
    reduce: Literal["mean", "sum"] = "mean"
    # what the reward sees
    inputs: tuple[Literal["observations", "actions", "next_observations"], ...] = ("observations", "actions")
    # fixed inverse temperature; none learns one per member, which makes mean and sum equally easy to fit
    beta: Positive | None = None
    # resample the training pairs for every member
    bootstrap: bool = True
    # most updates; training stops earlier when held-out pairs say so
    steps: Count = 1000
    # pairs per update, seed and member
    batch_size: Count = 64
    # of Adam
    learning_rate: NonNegative = 3e-4
    # of Adam
    weight_decay: NonNegative = 0.0
    # share of answers taken to be coin flips (Christiano et al. assume 0.1)
    assumed_noise: Share = 0.0
    # weight of (R_1 + R_2)^2 in the loss, which fixes the free offset
    centering: NonNegative = 0.0
    # share of the pairs for early stopping (Christiano et al.: 1/e); 0 trains all steps on all pairs
    held_out: Share = 0.2
    # updates between two checks on the held-out pairs
    check_every: Count = 25
    # checks without gain before training stops; none never stops early
    patience: Count | None = 10
    # cpu or cuda
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class RelabelOptions(Checked):
    """What becomes of the rewards of a model before `relabel` puts them into a dataset."""

    # mean, min or mean-k*std (for example mean-1*std) over the members of an ensemble: the latter two are cautious where the members disagree
    reduce: Annotated[
        str, Pattern(r"mean|min|mean-\d+(\.\d+)?\*std", "mean, min or mean-1*std"), arg(name="caution")
    ] = "mean"
    # none; std divides by the standard deviation of the rewards; return_range multiplies by 1000 / (largest - smallest episode return), as
    # pipelines for IQL do
    normalise: Literal["none", "std", "return_range"] = "none"
    # none, mean, min or max of the rewards is subtracted from them (before normalise); where episodes can end early, min says that living on is
    # good and max that arriving is good
    offset: Literal["none", "mean", "min", "max"] = "none"
