"""Fitting Bradley-Terry reward ensembles to labelled pairs, all members and seeds in one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.preferences import PreferenceDataset
from rlkit2.errors import ConfigError
from rlkit2.fields import read_fields, show_fields
from rlkit2.losses.preference import bradley_terry_loss
from rlkit2.nn import Adam, fast_matmul, named_tensors
from rlkit2.preferences.options import FitOptions
from rlkit2.preferences.reward_ensemble import RewardEnsemble

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class _Pairs:
    """Labelled pairs of S seeds as network inputs: `first`, `second` `[S, P, H, in]`, `label [S, P]`."""

    first: Tensor
    second: Tensor
    label: Tensor

    def gather(self, chosen: Tensor) -> _Pairs:
        """The pairs `chosen [S, M, B]` of every seed and member."""
        seeds = torch.arange(len(chosen), device=chosen.device)[:, None, None]
        return _Pairs(self.first[seeds, chosen], self.second[seeds, chosen], self.label[seeds, chosen])


@show_fields(FitOptions)
def fit_reward_model(
    preferences: PreferenceDataset | Sequence[PreferenceDataset],
    dataset: TransitionDataset,
    *,
    seeds: int | Sequence[int] = 1,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
    **options: Any,
) -> RewardEnsemble:
    """Fit an ensemble by the Bradley-Terry likelihood of its labels (Christiano et al., "Deep Reinforcement Learning from Human Preferences",
    NeurIPS 2017, section 2.2.3; settings of B-Pref and of the Markovian model in Preference Transformer).

    The probability that the second segment is preferred is `sigmoid(beta (R_2 - R_1))` with R the mean or sum of predicted rewards.
    Every member starts from weights of its own and, with `bootstrap`, sees a resample of the pairs. Every member keeps the weights that were best
    on held-out pairs; training stops when no member has improved for `patience` checks.

    Args:
        preferences: labels of `dataset`; a sequence gives every seed its own labels (equally many).
        dataset: where the segments are.
        seeds: n for seeds 0 to n-1, or the integers themselves; they decide weights, bootstraps, minibatches and the held-out pairs.
        dtype: of all floating tensors.
        progress: called with (updates done, updates at most, mean held-out or training loss).
        **options: fields of `FitOptions`.

    Returns:
        The ensemble; `description` says what it was fitted to and how well: `held_out` (per seed `nll` and `accuracy` of the members' mean
        probability), `best_step` `[S][M]`, `steps`.

    Raises:
        ConfigError: an unknown option, a value of another type or out of range, or labels that do not fit each other.
        DatasetError: labels of another dataset.
    """
    if "device" in options:
        options["device"] = str(options["device"])  # torch.device too
    how = FitOptions(**read_fields(FitOptions, options))
    model = RewardEnsemble.for_spec(
        dataset.spec,
        seeds=seeds,
        members=how.members,
        hidden_sizes=how.hidden_sizes,
        head=how.head,
        reduce=how.reduce,
        inputs=how.inputs,
        dtype=dtype,
        device=how.device,
    )
    each = [preferences] * len(model.seeds) if isinstance(preferences, PreferenceDataset) else list(preferences)
    _check(each, model, how.held_out)
    train, test = _prepare(model, dataset, each, how.held_out)
    if how.beta is not None:
        model.log_beta.requires_grad_(False).fill_(math.log(how.beta))
    elif how.reduce == "mean":
        with torch.no_grad():  # between 1 and the H that would make a mean a sum
            model.log_beta.fill_(math.log(each[0].length) / 2)
    generators = [torch.Generator().manual_seed(seed) for seed in model.seeds]
    drawn = _bootstraps(train, generators, how.members, how.bootstrap).to(how.device)
    optimizer = Adam(_Trained(model), how.learning_rate, weight_decay=how.weight_decay)
    best = _Best(model, test, how.patience)
    loss = torch.zeros(len(model.seeds))
    step = 0
    shape = (how.members, how.batch_size)
    rows = 2 * each[0].length * how.batch_size  # of a minibatch, two segments a pair
    with fast_matmul(torch.device(how.device), rows * _largest_layer(model)):
        for step in range(1, how.steps + 1):
            places = torch.stack([torch.randint(drawn.shape[-1], shape, generator=g) for g in generators])
            batch = train.gather(drawn.gather(-1, places.to(how.device)))
            loss = _loss(model, batch, how.assumed_noise, how.centering)
            optimizer.minimize(loss)
            if step % how.check_every == 0 or step == how.steps:
                if best.check(step):
                    break
                if progress is not None:
                    mean = best.mean_loss if test is not None else float(loss.detach().mean()) / how.members
                    progress(step, how.steps, mean)
    best.restore()
    model.requires_grad_(False)
    model.description = _describe(each, dataset, best, step, test)
    return model


def _largest_layer(model: RewardEnsemble) -> int:
    """Weights of the largest layer, all seeds and members together."""
    return max(tensor.numel() for tensor in named_tensors(model.network).values())


class _Trained(torch.nn.Module):
    """The parameters of an ensemble that take part in training, for the optimiser."""

    def __init__(self, model: RewardEnsemble) -> None:
        super().__init__()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(name.replace(".", "_"), parameter)


def _check(each: list[PreferenceDataset], model: RewardEnsemble, held_out: float) -> None:
    if len(each) != len(model.seeds):
        raise ConfigError(f"{len(each)} sets of labels for {len(model.seeds)} seeds; give one set, or one per seed")
    if len({(len(labels), labels.length) for labels in each}) != 1:
        raise ConfigError(
            "the seeds' sets of labels differ in their number of pairs or in segment length; make them equal"
        )
    if len(each[0]) < (2 if held_out else 1):
        raise ConfigError(f"{len(each[0])} labelled pairs are too few to fit a reward; label more")


def _prepare(
    model: RewardEnsemble, dataset: TransitionDataset, each: list[PreferenceDataset], held_out: float
) -> tuple[_Pairs, _Pairs | None]:
    """Standardise by the statistics of the dataset, and cut every seed's pairs into training and held-out ones."""
    parts: tuple[list[_Pairs], list[_Pairs]] = ([], [])
    model.check_spec(dataset.spec)
    everything = model.row_features(dataset, slice(None))
    model.input_mean.copy_(everything.mean(0))
    spread = everything.std(0, correction=0)
    model.input_std.copy_(torch.where(spread > 1e-6, spread, 1.0))
    for seed, labels in zip(model.seeds, each, strict=True):
        sets = labels.split(held_out, seed=seed) if held_out else (labels,)
        for part, chosen in zip(parts, sets, strict=False):
            sides = [model.row_features(dataset, rows) for rows in chosen.rows(dataset)]
            part.append(_Pairs(sides[0], sides[1], chosen.label_mass.to(sides[0])))
    joined = [
        _Pairs(*(torch.stack([getattr(pairs, name) for pairs in part]) for name in ("first", "second", "label")))
        for part in parts
        if part
    ]
    return joined[0], joined[1] if len(joined) > 1 else None


def _bootstraps(train: _Pairs, generators: list[torch.Generator], members: int, bootstrap: bool) -> Tensor:
    """The training pairs that every member draws its minibatches from, `[S, M, P]`."""
    count = train.label.shape[1]
    if not bootstrap:
        return torch.arange(count).expand(len(generators), members, count)
    return torch.stack([torch.randint(count, (members, count), generator=g) for g in generators])


def _loss(model: RewardEnsemble, batch: _Pairs, assumed_noise: float, centering: float) -> Tensor:
    """Sum over members of the mean loss of their pairs, `[S]`."""
    returns = [model.segment_returns(side) for side in (batch.first, batch.second)]
    beta = model.log_beta.exp().unsqueeze(-1)
    if not assumed_noise:
        loss: Tensor = bradley_terry_loss(*returns, label_mass=batch.label, beta=beta, centering=centering)
        return loss.mean(-1).sum(-1)
    z = beta * (returns[1] - returns[0])
    likelihoods = [  # log((1 - noise) s(+-z) + noise / 2)
        torch.logaddexp(
            torch.nn.functional.logsigmoid(sign * z) + math.log1p(-assumed_noise),
            z.new_tensor(math.log(assumed_noise / 2)),
        )
        for sign in (1, -1)
    ]
    loss = -(batch.label * likelihoods[0] + (1 - batch.label) * likelihoods[1])
    return (loss + centering * (returns[0] + returns[1]).square()).mean(-1).sum(-1)


class _Best:
    """The best weights of every member by the likelihood of the held-out pairs."""

    def __init__(self, model: RewardEnsemble, test: _Pairs | None, patience: int | None) -> None:
        self.model, self.test, self.patience = model, test, patience
        shape = model.log_beta.shape
        self.loss = torch.full(shape, math.inf, device=model.log_beta.device)
        self.step = torch.zeros(shape, dtype=torch.int64)
        self.flat = self._weights().clone()
        self.log_beta = model.log_beta.detach().clone()
        self.mean_loss = math.nan
        self._since = 0

    def _weights(self) -> Tensor:
        return self.model.network.flat.detach().view(*self.model.log_beta.shape, -1)

    @torch.no_grad()
    def check(self, step: int) -> bool:
        """Take up better members; whether all have stopped improving."""
        if self.test is None:
            self.step.fill_(step)
            return False
        z = self.model.logits(self.test.first, self.test.second)
        loss = bradley_terry_loss(torch.zeros_like(z), z, label_mass=self.test.label.unsqueeze(1)).mean(-1)
        better = loss < self.loss - 1e-4
        self.loss = torch.where(better, loss, self.loss)
        self.flat[better] = self._weights()[better]
        self.log_beta[better] = self.model.log_beta[better]
        self.step[better.cpu()] = step
        self.mean_loss = float(loss.mean())
        self._since = 0 if bool(better.any()) else self._since + 1
        return self.patience is not None and self._since >= self.patience

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best weights back."""
        if self.test is not None:
            self._weights().copy_(self.flat)
            self.model.log_beta.copy_(self.log_beta)


@torch.no_grad()
def _describe(
    each: list[PreferenceDataset], dataset: TransitionDataset, best: _Best, steps: int, test: _Pairs | None
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "dataset": dataset.spec.id,
        "dataset_hash": each[0].dataset_hash,
        "labels": len(each[0]),
        "segment_length": each[0].length,
        "source": each[0].source
        if all(labels.source == each[0].source for labels in each)
        else [e.source for e in each],
        "steps": steps,
        "best_step": best.step.tolist(),
        "beta": best.model.log_beta.exp().tolist(),
        "held_out": None,
    }
    if test is not None:
        second = torch.sigmoid(best.model.logits(test.first, test.second)).mean(1)  # [S, P]
        clipped = second.clamp(1e-7, 1 - 1e-7)
        nll = -(test.label * clipped.log() + (1 - test.label) * (1 - clipped).log()).mean(1)
        decided = test.label != 0.5
        right = ((second > 0.5) == (test.label > 0.5)) & decided
        found["held_out"] = {
            "pairs": test.label.shape[1],
            "nll": nll.tolist(),
            "accuracy": (right.sum(1) / decided.sum(1).clamp(min=1)).tolist(),
        }
    return found
