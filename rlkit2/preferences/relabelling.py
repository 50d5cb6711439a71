"""A dataset with the rewards of a learned model in place of its own, and the caution that a learned reward asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.load import read_dataset
from rlkit2.data.weighted import WeightedDataset, with_weights
from rlkit2.errors import ConfigError, RewardError
from rlkit2.fields import read_fields, show_fields
from rlkit2.preferences.options import RelabelOptions
from rlkit2.preferences.reward_ensemble import RewardEnsemble

Reward = RewardEnsemble | ArrayLike | Tensor | Callable[..., Any]


@show_fields(RelabelOptions)
def relabel(
    dataset: TransitionDataset,
    reward: Reward,
    *,
    statistics: TransitionDataset | None = None,
    dataset_id: str | None = None,
    **options: Any,
) -> TransitionDataset:
    """The same transitions with the rewards of a model; terminations and truncations stay.

    Preferences do not determine the offset of a reward. Where episodes end early the offset decides whether living on is good
    or bad, so choose it: "min" makes every step worth at least nothing (living on pays), "max" makes every step cost something (arriving
    pays), "mean" makes an average step worth nothing. Members of an ensemble are aligned before they are reduced: their free offsets
    are taken out and their temperatures made equal.

    Args:
        dataset: what to relabel.
        reward: an ensemble of one seed, rewards `[N]`, or a callable `f(observations, actions, next_observations, terminations)`.
        statistics: the part of the data that all statistics are taken from, normally the training split; None: `dataset`.
        dataset_id: also write a Minari dataset of that id, with the model's hash and everything above as `provenance` in its metadata.
        **options: fields of `RelabelOptions`.

    Returns:
        The relabelled dataset (read back from Minari's root where `dataset_id` is given).

    Raises:
        ConfigError: an unknown option or value.
        RewardError: a model of other spaces or several seeds, or rewards that are not finite or not one per row.
        DatasetError: the Minari id is taken or invalid.
    """
    values, facts = relabelled_rewards(dataset, reward, statistics=statistics, **options)
    relabelled = dataset.with_rewards(values)
    if dataset_id is None:
        return relabelled
    relabelled.to_minari(
        dataset_id,
        algorithm_name="rlkit2",
        description=f"{dataset.spec.id} with the rewards of a model",
        provenance=facts,
    )
    return read_dataset(dataset_id)


def relabelled_rewards(
    dataset: TransitionDataset, reward: Reward, *, statistics: TransitionDataset | None = None, **options: Any
) -> tuple[Tensor, dict[str, Any]]:
    """The new rewards `[N]` (float64) and where they come from, as JSON values; arguments as for `relabel`."""
    how = RelabelOptions(**read_fields(RelabelOptions, options))
    source = dataset if statistics is None else statistics
    alignment = _alignment(reward, source) if isinstance(reward, RewardEnsemble) else None
    values = _reduced(dataset, reward, how.reduce, alignment)
    known = values if source is dataset else _reduced(source, reward, how.reduce, alignment)
    shift = {"none": 0.0, "mean": float(known.mean()), "min": float(known.min()), "max": float(known.max())}[how.offset]
    scale = _scale(known - shift, source, how.normalise)
    facts = {
        "relabelled_from": dataset.spec.id,
        "content_hash": dataset.spec.content_hash,
        **asdict(how),
        "statistics": {
            "shift": shift,
            "scale": scale,
            "transitions": len(source),
            "content_hash": source.spec.content_hash,
        },
    }
    if isinstance(reward, RewardEnsemble):
        facts |= {"reward_model": reward.content_hash, "reward_description": reward.description}
    return (values - shift) * scale, facts


def weigh_by_agreement(
    dataset: TransitionDataset, model: RewardEnsemble, *, temperature: float = 1.0
) -> WeightedDataset:
    """The dataset with steps drawn less often where the members of an ensemble disagree about their reward.

    The weight of a step is `1 / (1 + (temperature * u)^2)` with u the standard deviation over the aligned members, in units of the
    standard deviation of the mean reward over the dataset.

    Args:
        dataset: normally relabelled already.
        model: an ensemble of one seed with at least two members.
        temperature: how sharply disagreement lowers the weight, at least 0.

    Raises:
        ConfigError: a negative temperature; RewardError: an ensemble of several seeds or of one member.
    """
    if temperature < 0:
        raise ConfigError(f"temperature={temperature} must be at least 0")
    if model.members < 2:
        raise RewardError("one member cannot disagree; fit an ensemble of two or more")
    aligned = _aligned(dataset, model, _alignment(model, dataset))
    spread = aligned.mean(0).std(correction=0).clamp(min=1e-12)
    return with_weights(dataset, 1 / (1 + (temperature * aligned.std(0, correction=0) / spread) ** 2))


def _alignment(model: RewardEnsemble, source: TransitionDataset) -> tuple[Tensor, Tensor]:
    """Offset and relative inverse temperature of every member, `[M, 1]` each: `beta r` is what preferences determine, up to its offset."""
    if len(model.seeds) != 1:
        raise RewardError(f"relabelling takes a reward model of one seed, not {len(model.seeds)}; use select_seed")
    beta = model.log_beta[0].detach().double().exp().unsqueeze(-1).cpu()
    return model.dataset_rewards(source)[0].double().mean(-1, keepdim=True), beta / beta.mean()


def _aligned(dataset: TransitionDataset, model: RewardEnsemble, alignment: tuple[Tensor, Tensor]) -> Tensor:
    mean, beta = alignment
    return (model.dataset_rewards(dataset)[0].double() - mean) * beta + mean.mean()


def _reduced(
    dataset: TransitionDataset, reward: Reward, reduce: str, alignment: tuple[Tensor, Tensor] | None
) -> Tensor:
    if isinstance(reward, RewardEnsemble):
        assert alignment is not None
        members = _aligned(dataset, reward, alignment)
        if reduce == "min":
            values = members.amin(0)
        else:
            factor = 0.0 if reduce == "mean" else float(reduce.removeprefix("mean-").removesuffix("*std"))
            values = members.mean(0) - factor * members.std(0, correction=0)
    elif reduce != "mean":
        raise ConfigError(f"reduce={reduce!r} needs the members of a RewardEnsemble")
    elif callable(reward):
        fields = (dataset.observations, dataset.actions, dataset.next_observations, dataset.terminations)
        values = torch.as_tensor(reward(*fields)).detach().cpu().double()
    else:
        values = torch.as_tensor(reward if isinstance(reward, Tensor) else np.asarray(reward)).detach().cpu().double()
    if values.shape != (len(dataset),) or not bool(values.isfinite().all()):
        raise RewardError(
            f"the reward gives shape {list(values.shape)} for {len(dataset)} transitions of {dataset.spec.id}, or values that are not finite"
        )
    return values


def _scale(values: Tensor, source: TransitionDataset, normalise: str) -> float:
    if normalise == "none":
        return 1.0
    if normalise == "std":
        spread = float(values.std(correction=0))
        what = "the predicted rewards are all alike"
    else:
        returns = source.with_rewards(values).episode_returns
        spread = float(returns.max() - returns.min()) / 1000
        what = "all episodes have the same predicted return"
    if not spread > 0:
        raise RewardError(f"cannot normalise by {normalise}: {what}")
    return 1 / spread
