"""Second moments of features, TD differences and rewards by block of episodes: all that sampled distances and their bootstrap need.

With value features `phi(s)`, pair features `psi(s, a)` and `d = phi(s) - discount phi(s')` (`phi(s') = 0` after a terminated step), the
TD error of the value `phi w` is `r - d w`. Least-squares TD, the regression of TD errors on pairs and every inner product of the two are
functions of sums over transitions of products of `phi, d, psi, r`; one pass over the data gathers them, resampling episodes reweights them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from rlkit2.data import Batch
from rlkit2.errors import RewardError
from rlkit2.rewards.sampled.features import FeatureMap
from rlkit2.rewards.sampled.rows import CHUNK, RewardFunctions, Rows, episode_rows

_ROUNDING = 1e-10  # feature directions with less than this share of the largest second moment are rounding
_WITHIN = 1e-8  # probes with less than this share of their square outside the span of the features are inside it
_JITTER = 1e-12  # of whitened features: only decides directions without data, where the fit is 0
_BLOCK_BYTES = 1 << 26


@dataclass(frozen=True)
class Fit:
    """Values `phi w` (`w [..., v, k]`) and advantages `psi beta` (`beta [..., g, k]`) of all rewards, by least squares."""

    w: Tensor
    beta: Tensor

    def beside(self, other: Fit) -> Fit:
        """The fits of both as those of `2 k` rewards; features that `other` has more come last and have coefficient 0 in this one."""
        return Fit(_padded(self.w, other.w), _padded(self.beta, other.beta))


def _padded(short: Tensor, long: Tensor) -> Tensor:
    more = long.shape[-2] - short.shape[-2]
    return torch.cat([torch.nn.functional.pad(short, (0, 0, 0, more)), long], -1)


@dataclass(frozen=True)
class Sums(ABC):
    """Sums over transitions in front of any leading axes (blocks, replicates, folds, halves); `count [...]` transitions, `r_r [..., k, k]`."""

    count: Tensor
    r_r: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """`function` of every sum."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layout"}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})

    @property
    @abstractmethod
    def columns(self) -> tuple[int, int]:
        """Numbers of value and of pair features, v and g."""

    @abstractmethod
    def fit(self, ridge: float) -> Fit:
        """Least-squares TD (Bradtke and Barto 1996) and the regression of its TD errors on the pair features."""

    @abstractmethod
    def state_errors(self, w: Tensor) -> Tensor:
        """`sum phi delta^T`, `[..., v, k]`, of the TD errors of the values `w`."""

    @abstractmethod
    def pair_errors(self, w: Tensor) -> Tensor:
        """`sum psi delta^T`, `[..., g, k]`."""

    @abstractmethod
    def squared_errors(self, w: Tensor) -> Tensor:
        """`sum delta delta^T`, `[..., k, k]`."""

    @abstractmethod
    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """`sum f_i g_j`, `[..., k, k]`, of advantages with coefficients `left` and `right`."""

    @abstractmethod
    def held(self) -> Tensor:
        """How much of every direction of the pair features there is, as a share of what the data hold of it, `[..., g]`."""

    @abstractmethod
    def shaped(self, shifts: Tensor) -> Self:
        """The sums with K more rewards, `r_k - d shifts[:, k]`, `shifts [v, K]`: each reward and a shaped version of it."""

    @abstractmethod
    def shaping_size(self, shifts: Tensor) -> Tensor:
        """`sum (d shift)^2` of every column of `shifts [v, K]`, `[..., K]`."""


@dataclass(frozen=True)
class Moments(Sums):
    """Sums of products of whitened features; named by what is multiplied: `phi_d` is `sum phi d^T`. `v` value features, `g` pair features."""

    phi_d: Tensor  # [v, v]
    phi_r: Tensor  # [v, k]
    psi_psi: Tensor  # [g, g]
    psi_d: Tensor  # [g, v]
    psi_r: Tensor  # [g, k]
    d_d: Tensor  # [v, v]
    d_r: Tensor  # [v, k]

    @property
    def columns(self) -> tuple[int, int]:
        return self.phi_r.shape[-2], self.psi_r.shape[-2]

    def fit(self, ridge: float) -> Fit:
        count = self.count[..., None, None].clamp(min=1.0)
        w = torch.linalg.solve(self.phi_d / count + _diagonal(self.phi_d, ridge), self.phi_r / count)
        return Fit(
            w, torch.linalg.solve(self.psi_psi / count + _diagonal(self.psi_psi, ridge), self.pair_errors(w) / count)
        )

    def state_errors(self, w: Tensor) -> Tensor:
        return self.phi_r - self.phi_d @ w

    def pair_errors(self, w: Tensor) -> Tensor:
        return self.psi_r - self.psi_d @ w

    def squared_errors(self, w: Tensor) -> Tensor:
        cross = self.d_r.mT @ w
        return self.r_r - cross - cross.mT + w.mT @ self.d_d @ w

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        return left.mT @ self.psi_psi @ right

    def held(self) -> Tensor:
        sizes: Tensor = torch.linalg.eigvalsh(self.psi_psi / self.count[..., None, None])
        return sizes

    def shaped(self, shifts: Tensor) -> Moments:
        shifted_d_r = self.d_r - self.d_d @ shifts
        cross = self.r_r - self.d_r.mT @ shifts
        both = cross.mT - shifts.mT @ shifted_d_r
        return replace(
            self,
            phi_r=torch.cat([self.phi_r, self.phi_r - self.phi_d @ shifts], -1),
            psi_r=torch.cat([self.psi_r, self.psi_r - self.psi_d @ shifts], -1),
            d_r=torch.cat([self.d_r, shifted_d_r], -1),
            r_r=torch.cat([torch.cat([self.r_r, cross], -1), torch.cat([cross.mT, both], -1)], -2),
        )

    def shaping_size(self, shifts: Tensor) -> Tensor:
        return (shifts.mT @ self.d_d @ shifts).diagonal(dim1=-2, dim2=-1)

    def first(self, v: int, g: int) -> Moments:
        """The sums of the first `v` value and `g` pair features alone."""
        return Moments(
            **{
                f.name: getattr(self, f.name)
                if f.name not in _AXES
                else _leading(getattr(self, f.name), [{"v": v, "g": g}.get(axis) for axis in _AXES[f.name]])
                for f in fields(self)
            }
        )

    def twice(self) -> Moments:
        """The sums with every reward a second time."""
        return replace(
            self,
            phi_r=self.phi_r.tile(2),
            psi_r=self.psi_r.tile(2),
            d_r=self.d_r.tile(2),
            r_r=self.r_r.tile(2, 2),
        )


_AXES = {
    "phi_d": ("v", "v"),
    "phi_r": ("v", "k"),
    "psi_psi": ("g", "g"),
    "psi_d": ("g", "v"),
    "psi_r": ("g", "k"),
    "d_d": ("v", "v"),
    "d_r": ("v", "k"),
}
PRODUCTS = ("phi_phi", *_AXES, "r_r")


def _leading(sums: Tensor, sizes: list[int | None]) -> Tensor:
    rows, columns = sizes
    return sums[..., :rows, :columns]


def _diagonal(like: Tensor, ridge: float) -> Tensor:
    return (ridge + _JITTER) * torch.eye(like.shape[-1], dtype=like.dtype)


@dataclass(frozen=True)
class Gathered:
    """Sums per block, of which the first `columns = (v, g)` features are the given ones and the rest probes outside their span.

    `bases`: matrices `[v', v]`, `[g', g]` that whiten the given features (None for cells); `ends [2]` terminated and truncated steps;
    `scale [k]` what the sums' rewards must be multiplied by.
    """

    blocks: Sums
    columns: tuple[int, int]
    ends: Tensor
    scale: Tensor
    bases: tuple[Tensor, Tensor] | None = None

    @property
    def own(self) -> Sums:
        """The blocks in the given features alone."""
        return self.blocks.first(*self.columns) if isinstance(self.blocks, Moments) else self.blocks


def count_blocks(episodes: int, bytes_each: int, folds: int) -> int:
    """How many blocks of episodes to resample: the episodes themselves, or at least 64 blocks of them within a budget of memory."""
    most = max(64, min(256, _BLOCK_BYTES // bytes_each))
    return min(episodes, max(2 * folds, most // (2 * folds) * 2 * folds))


class Scale:
    """Powers of two that bring rewards to at most 1 as they come, so that their squares neither overflow nor vanish."""

    def __init__(self, count: int) -> None:
        self.exponent = torch.full((count,), -1100.0, dtype=torch.float64)

    def __call__(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """`r [n, k]` scaled, and the factor `[k]` of everything scaled before."""
        exponent = torch.maximum(self.exponent, torch.frexp(r.abs().amax(0))[1].double())
        exponent = torch.where(r.abs().amax(0) > 0, exponent, self.exponent)
        factor, self.exponent = torch.exp2(self.exponent - exponent), exponent
        return torch.ldexp(r, -exponent.int()), factor

    @property
    def value(self) -> Tensor:
        """What scaled rewards must be multiplied by, `[k]`."""
        return torch.exp2(self.exponent.clamp(min=-1074))


def chunks(
    rows: Rows, blocks: list[Tensor], progress: Callable[[int, int], None] | None
) -> Iterator[tuple[int, Tensor, Batch]]:
    """`(block, row indices, transitions)` of all blocks (each a tensor of episode indices), a chunk at a time."""
    whole = sum(int(rows.episode_starts.diff()[b.to(rows.episode_starts.device)].sum()) for b in blocks)
    done = 0
    for number, block in enumerate(blocks):
        for chosen in torch.split(episode_rows(rows, block), CHUNK):
            yield number, chosen, rows.gather(chosen)
            done += len(chosen)
            if progress is not None:
                progress(done, whole)


def runs(
    rows: Rows, blocks: list[Tensor], progress: Callable[[int, int], None] | None
) -> Iterator[tuple[list[tuple[int, slice]], Tensor, Batch]]:
    """`((block, its rows of the chunk), row indices, transitions)` of all blocks, many small ones in a chunk."""
    chosen = [episode_rows(rows, block) for block in blocks]
    everything = torch.cat(chosen)
    owner = torch.repeat_interleave(torch.arange(len(blocks)), torch.tensor([len(part) for part in chosen]))
    for start in range(0, len(everything), CHUNK):
        part = everything[start : start + CHUNK]
        numbers, lengths = torch.unique_consecutive(owner[start : start + CHUNK], return_counts=True)
        ends = lengths.cumsum(0)
        yield (
            [
                (n, slice(end - length, end))
                for n, length, end in zip(numbers.tolist(), lengths.tolist(), ends.tolist(), strict=True)
            ],
            part,
            rows.gather(part),
        )
        if progress is not None:
            progress(start + len(part), len(everything))


def gather(
    rows: Rows,
    rewards: RewardFunctions,
    features: FeatureMap,
    probes: FeatureMap | None,
    discount: float,
    blocks: list[Tensor],
    progress: Callable[[int, int], None] | None = None,
) -> Gathered:
    """One pass over the episodes of all blocks, for the features and the probes beside them."""
    maps = [features] if probes is None else [features, probes]
    sums: dict[str, Tensor] = {}
    count = torch.zeros(len(blocks), dtype=torch.float64)
    ends, scale, own = torch.zeros(2, dtype=torch.int64), Scale(len(rewards.names)), (0, 0)
    for parts, chosen, batch in runs(rows, blocks, progress):
        terminated = batch.terminations.bool().cpu()
        phis = [part.state(batch.observations) for part in maps]
        psis = [part.pair(batch.observations, batch.actions) for part in maps]
        own = phis[0].shape[1], psis[0].shape[1]
        phi, psi = torch.cat(phis, 1), torch.cat(psis, 1)
        after = torch.cat([part.state(batch.next_observations) for part in maps], 1)
        d = phi - discount * after.masked_fill(terminated[:, None], 0.0)
        r, factor = scale(rewards(batch, chosen))
        columns = {"phi": phi, "psi": psi, "d": d, "r": r}
        for name in PRODUCTS:
            these, those = (columns[side] for side in name.split("_"))
            if name not in sums:
                sums[name] = torch.zeros(len(blocks), these.shape[1], those.shape[1], dtype=torch.float64)
            if name.endswith("_r"):
                sums[name] *= factor if name != "r_r" else factor * factor[:, None]
            for number, own_rows in parts:
                sums[name][number].addmm_(these[own_rows].mT, those[own_rows])
        for number, own_rows in parts:
            count[number] += own_rows.stop - own_rows.start
        ends += torch.stack([terminated.sum(), batch.truncations.bool().cpu().sum()])
    check_finite(sums["psi_psi"], sums["d_d"])
    total = count.sum()
    phi_basis, v = _whitening(sums.pop("phi_phi").sum(0) / total, own[0])
    psi_basis, g = _whitening(sums["psi_psi"].sum(0) / total, own[1])
    bases = {"v": phi_basis, "g": psi_basis}
    for name, (left, right) in _AXES.items():
        moment = bases[left].mT @ sums.pop(name)  # one after the other, to save memory
        sums[name] = moment @ bases[right] if right in bases else moment
    return Gathered(
        Moments(count=count, **sums), (v, g), ends, scale.value, (phi_basis[: own[0], :v], psi_basis[: own[1], :g])
    )


def check_finite(*sums: Tensor) -> None:
    """Raise `RewardError` where inputs were not finite."""
    if not all(bool(torch.isfinite(part).all()) for part in sums):
        raise RewardError("observations or actions are not finite; find them with: rlkit2 data check DATASET")


def _whitening(second: Tensor, own: int) -> tuple[Tensor, int]:
    """`T` with `T^T second T = I` on the directions that are more than rounding, and how many of them are of the `own` first columns; the
    others are what the rest of the columns hold beyond those."""
    sizes, directions = torch.linalg.eigh(second[:own, :own])
    kept = sizes > _ROUNDING * sizes[-1]
    base: Tensor = directions[:, kept] / sizes[kept].sqrt()
    if own == len(second):
        return base, base.shape[1]
    inside = base.mT @ second[:own, own:]
    sizes, directions = torch.linalg.eigh(second[own:, own:] - inside.mT @ inside)
    kept = sizes > _WITHIN * float(second[own:, own:].diagonal().max())
    more = directions[:, kept] / sizes[kept].sqrt()
    upper = torch.cat([base, -base @ (inside @ more)], 1)
    lower = torch.cat([torch.zeros(len(more), base.shape[1], dtype=second.dtype), more], 1)
    return torch.cat([upper, lower]), base.shape[1]
