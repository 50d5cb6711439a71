"""Inner products of advantages from sums over parts of the data, and what the parts left out say about the fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from rlkit2.rewards.sampled.intervals import interval
from rlkit2.rewards.sampled.moments import Fit, Gathered, Moments, Sums

Estimator: TypeAlias = Literal["crossfit", "plugin", "naive", "orthogonal"]
CROSSFITTED: tuple[Estimator, ...] = ("crossfit", "orthogonal")
_CHUNK_BYTES = 1 << 24
_SURE = 1e-9  # smaller differences are rounding


@dataclass(frozen=True)
class Split:
    """Fold and half of every block of episodes, `[blocks]` each; the halves are those of the training parts."""

    fold: Tensor
    half: Tensor

    @property
    def folds(self) -> int:
        """How many folds there are."""
        return int(self.fold.max()) + 1

    def parts(self, blocks: Sums, weights: Tensor) -> Sums:
        """Sums per replicate, fold and half, `[b, F, 2, ...]`, of blocks counted `weights [b, blocks]` times."""
        place = 2 * self.fold + self.half

        def add(sums: Tensor) -> Tensor:
            flat = sums.reshape(len(sums), -1)
            found = [weights[:, place == part] @ flat[place == part] for part in range(2 * self.folds)]
            return torch.stack(found, 1).reshape(len(weights), self.folds, 2, *sums.shape[1:])

        return blocks.map(add)

    def each(self, blocks: Sums, weights: Tensor, function: Callable[[Sums], Tensor]) -> Tensor:
        """`function` of the parts of all replicates, some at a time, joined along the replicates."""
        one = sum(part.numel() for part in vars(blocks).values() if isinstance(part, Tensor)) // len(weights[0])
        some = max(1, _CHUNK_BYTES // (8 * 2 * self.folds * one))
        return torch.cat([function(self.parts(blocks, chunk)) for chunk in torch.split(weights, some)])


def gram(parts: Sums, estimator: Estimator, ridge: float) -> Tensor:
    """Mean inner products of advantages, `[b, K, K]`, from sums `[b, F, 2, ...]`; NaN where a training part is empty."""
    if estimator not in CROSSFITTED:
        whole = parts.map(lambda sums: sums.sum((1, 2)))
        fit = whole.fit(ridge)
        sums = whole.products(fit.beta, fit.beta) if estimator == "plugin" else whole.squared_errors(fit.w)
        return sums / whole.count[:, None, None]
    test, train = _test(parts), _train(parts)
    return _cross(test, train.fit(ridge), train.count, estimator)


def _test(parts: Sums) -> Sums:
    """A fold each, `[b, F, 1, ...]`."""
    return parts.map(lambda sums: sums.sum(2, keepdim=True))


def _train(parts: Sums) -> Sums:
    """Both halves of the other folds, `[b, F, 2, ...]`."""
    return parts.map(lambda sums: sums.sum(1, keepdim=True) - sums)


def _cross(test: Sums, fit: Fit, trained: Tensor, estimator: Estimator) -> Tensor:
    """Products of TD errors on a fold with advantages from the others, `[b, K, K]`.

    The value in the TD error comes from one half of the training part, the advantage, with a value of its own, from the other, both ways round:
    the error of a value acts as shaping, and one that both factors shared would be squared and taken for an advantage.
    """
    other = fit.beta.flip(2)
    products = test.pair_errors(fit.w).mT @ other
    total = products.sum((1, 2))
    if estimator == "orthogonal":
        total = total - test.products(fit.beta, other)[:, :, 0].sum(1)
    else:
        total = total / 2
    total = (total + total.mT) / (2 * test.count.sum((1, 2))[:, None, None])
    return torch.where((trained <= 0).flatten(1).any(1)[:, None, None], torch.nan, total)


def gaps_of(grams: Tensor) -> Tensor:
    """`1 - rho` of inner products `[..., K, K]`, which chance takes below 0; NaN where a reward has no positive square."""
    squares = grams.diagonal(dim1=-2, dim2=-1)
    sizes = torch.where(squares > 0, squares, torch.nan).sqrt()
    gaps = 1 - grams / sizes[..., :, None] / sizes[..., None, :]
    same = torch.eye(grams.shape[-1], dtype=torch.bool)
    return torch.where(same & ~gaps.isnan(), torch.zeros_like(gaps), gaps)


def distances_of(gaps: Tensor) -> Tensor:
    """`sqrt(2 - 2 rho)` of `1 - rho`, rho brought into [-1, 1]."""
    return (2 * gaps.clamp(0, 2)).sqrt()


@dataclass(frozen=True)
class Misfit:
    """What functions outside the span of the features change, per replicate: least squares takes the residual along its own features to 0
    whatever they are, and only others see what they cannot express.

    `grams [b, 2 K, 2 K]`: inner products of the K advantages in the given features and the K in those with the probes beside them.
    """

    grams: Tensor

    @classmethod
    def of(cls, gathered: Gathered, split: Split, weights: Tensor, ridge: float) -> Misfit:
        """Of all rewards; nothing where the features span everything there is."""

        def found(parts: Sums) -> Tensor:
            if not isinstance(parts, Moments) or parts.columns == gathered.columns:
                return gram(parts, "crossfit", ridge).tile(2, 2)
            train = _train(parts)
            assert isinstance(train, Moments)
            fit = train.first(*gathered.columns).fit(ridge).beside(train.fit(ridge))
            return _cross(_test(parts.twice()), fit, train.count, "crossfit")

        return cls(split.each(gathered.blocks, weights, found))

    @cached_property
    def gaps(self) -> Tensor:
        """`1 - rho` of all of them."""
        return gaps_of(self.grams)

    def clear(self, units: float) -> Tensor:
        """Whose advantages are clearly more than noise, `[2, K]`, in the given features and with the probes: by twice the interval's arm."""
        squares = self.grams.diagonal(dim1=-2, dim2=-1)
        return (2 * interval(squares, units).low > squares[0]).reshape(2, -1)

    def of_rewards(self, units: float) -> Tensor:
        """How far every reward's form is from that in richer features, `[K]`; 0 where that may be chance. One that only the richer ones
        show at all is as far as an unrelated one."""
        count = self.gaps.shape[-1] // 2
        gaps = self.gaps[:, torch.arange(count), torch.arange(count) + count]
        own, rich = self.clear(units)
        far = torch.where((interval(gaps, units).low > _SURE) & (own | rich), distances_of(gaps[0]), 0.0)
        hidden = rich & ~own & ~(self.grams[0].diagonal()[:count] > 0.1 * self.grams[0].diagonal()[count:])
        return torch.where(hidden, math.sqrt(2), far)

    def of_pairs(self, units: float) -> Tensor:
        """How far the distance of every pair may be off, `[K, K]`: twice what the probes change in it, for they see a part; 0 where that may be
        chance."""
        count = self.gaps.shape[-1] // 2
        poor, rich = self.gaps[:, :count, :count], self.gaps[:, count:, count:]
        change = interval(rich - poor, units)
        sure = (change.low > _SURE) | (change.high < -_SURE)
        return torch.where(sure, 2 * (distances_of(rich[0]) - distances_of(poor[0])).abs(), 0.0)


def fold_diagnostics(gathered: Gathered, split: Split, estimator: Estimator, ridge: float, seed: int) -> dict[str, Any]:
    """What the folds left out say about the fits, and how invariant the distance is to shaping.

    `held_out_r2`: share of the TD errors' squares that the advantage explains (the rest is noise of the next state, or misfit);
    `bellman_residual`: mean TD error in the directions of the value features, relative to the reward's size; `coverage`: share of the
    directions of the pair features that every training part holds; `invariance_gap`: the largest distance of a reward to itself
    plus a random potential of its own size in the span of the value features, `invariance_gap_outside`: the same with the probes' waves.
    """
    one = torch.ones(1, len(split.fold), dtype=torch.float64)
    parts = split.parts(gathered.own, one)
    folds = _test(parts)
    train = folds if split.folds == 1 else folds.map(lambda sums: sums.sum(1, keepdim=True) - sums)
    fit = train.fit(ridge)
    squares = folds.squared_errors(fit.w).diagonal(dim1=-2, dim2=-1).sum((0, 1, 2))
    fitted = folds.products(fit.beta, fit.beta).diagonal(dim1=-2, dim2=-1).sum((0, 1, 2))
    products = (folds.pair_errors(fit.w).mT @ fit.beta).diagonal(dim1=-2, dim2=-1).sum((0, 1, 2))
    slope = folds.state_errors(fit.w) / folds.count[..., None, None]
    whole = parts.map(lambda sums: sums.sum((0, 1, 2)))
    size = (whole.r_r.diagonal() / whole.count).sqrt().clamp(min=1e-300)
    found = {
        "held_out_r2": (1 - (squares - 2 * products + fitted) / squares.clamp(min=1e-300)).tolist(),
        "bellman_residual": (slope.square().sum(-2).mean((0, 1, 2)).sqrt() / size).tolist(),
        "coverage": float((train.held() > 0.1).double().mean(-1).min()),
        "invariance_gap": _invariance_gap(gathered, split, estimator, ridge, seed, inside=True),
    }
    if gathered.blocks.columns != gathered.columns:
        found["invariance_gap_outside"] = _invariance_gap(gathered, split, estimator, ridge, seed, inside=False)
    return found


def _invariance_gap(
    gathered: Gathered, split: Split, estimator: Estimator, ridge: float, seed: int, *, inside: bool
) -> float:
    """The largest distance of a reward to itself plus a random potential of its own size."""
    blocks = gathered.own if inside else gathered.blocks
    whole = blocks.map(lambda sums: sums.sum(0))
    count = whole.r_r.shape[-1]
    shifts = torch.randn(blocks.columns[0], count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if not inside:
        shifts[: gathered.columns[0]] = 0
    moved = whole.shaping_size(shifts).clamp(min=1e-300)
    shaped = blocks.shaped(shifts * (whole.r_r.diagonal() / moved).sqrt())
    if isinstance(shaped, Moments):
        shaped = shaped.first(*gathered.columns)
    parts = split.parts(shaped, torch.ones(1, len(split.fold), dtype=torch.float64))
    gaps = distances_of(gaps_of(gram(parts, estimator, ridge)))[0]
    gap = gaps[torch.arange(count), torch.arange(count) + count]
    return float(gap[~gap.isnan()].max()) if bool((~gap.isnan()).any()) else float("nan")
