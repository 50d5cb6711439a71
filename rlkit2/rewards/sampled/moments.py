"""Second moments of features, TD differences and rewards by block of episodes: all that sampled distances and their bootstrap need.

With value features `phi(s)`, pair features `psi(s, a)` and `d = phi(s) - discount phi(s')` (`phi(s') = 0` after a terminated step), the
TD error of the value `phi w` is `r - d w`. Least-squares TD, the regression of TD errors on pairs and every inner product of the two are
functions of sums over transitions of products of `phi, d, psi, r`; one pass over the data gathers them, resampling episodes reweights them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rlkit2.errors import RewardError
from rlkit2.rewards.sampled.features import FeatureMap
from rlkit2.rewards.sampled.rows import CHUNK, RewardFunctions, Rows, episode_rows

_ROUNDING = 1e-10  # feature directions with less than this share of the largest second moment are rounding
_BLOCK_BYTES = 1 << 26


@dataclass(frozen=True)
class Moments:
    """Sums over transitions, each `[..., p, q]` in front of any leading axes (blocks, folds, replicates); `count [...]` transitions.

    Named by what is multiplied: `phi_d` is `sum phi d^T`. `v` value features, `g` pair features, `k` rewards.
    """

    count: Tensor
    phi_phi: Tensor  # [v, v]
    phi_d: Tensor  # [v, v]
    phi_r: Tensor  # [v, k]
    psi_psi: Tensor  # [g, g]
    psi_d: Tensor  # [g, v]
    psi_r: Tensor  # [g, k]
    d_d: Tensor  # [v, v]
    d_r: Tensor  # [v, k]
    r_r: Tensor  # [k, k]

    def map(self, function: Callable[[Tensor], Tensor]) -> Moments:
        """`function` of every sum."""
        return Moments(**{f.name: function(getattr(self, f.name)) for f in fields(Moments)})

    def with_rewards(self, shifts: Tensor) -> Moments:
        """The sums with K more rewards `r_k - d shifts[:, k]`, `shifts [v, K]`: each reward and a shaped version of it."""
        shifted_d_r = self.d_r - self.d_d @ shifts
        cross = self.r_r - self.d_r.mT @ shifts
        both = cross.mT - shifts.mT @ shifted_d_r
        return Moments(
            count=self.count,
            phi_phi=self.phi_phi,
            phi_d=self.phi_d,
            phi_r=torch.cat([self.phi_r, self.phi_r - self.phi_d @ shifts], -1),
            psi_psi=self.psi_psi,
            psi_d=self.psi_d,
            psi_r=torch.cat([self.psi_r, self.psi_r - self.psi_d @ shifts], -1),
            d_d=self.d_d,
            d_r=torch.cat([self.d_r, shifted_d_r], -1),
            r_r=torch.cat([torch.cat([self.r_r, cross], -1), torch.cat([cross.mT, both], -1)], -2),
        )


# The basis that the rows and the columns of each sum are in.
_BASES = {
    "phi_phi": ("phi", "phi"),
    "phi_d": ("phi", "phi"),
    "phi_r": ("phi", None),
    "psi_psi": ("psi", "psi"),
    "psi_d": ("psi", "phi"),
    "psi_r": ("psi", None),
    "d_d": ("phi", "phi"),
    "d_r": ("phi", None),
}


def in_bases(sums: dict[str, Tensor], bases: dict[str, Tensor]) -> Moments:
    """The sums `[..., p, q]` for the features `bases["phi"]^T phi` and `bases["psi"]^T psi`; empties `sums` as it goes, to save memory."""
    found = {}
    for name in list(sums):
        rows, columns = _BASES.get(name, (None, None))
        moment = sums.pop(name)
        moment = moment if rows is None else bases[rows].mT @ moment
        found[name] = moment if columns is None else moment @ bases[columns]
    return Moments(**found)


@dataclass(frozen=True)
class Gathered:
    """Sums per block in whitened features, and the bases `[v, v']`, `[g, g']` that whiten raw ones; `ends [2]` terminated and truncated steps."""

    blocks: Moments
    phi_basis: Tensor
    psi_basis: Tensor
    ends: Tensor


def count_blocks(episodes: int, columns: tuple[int, int], folds: int) -> int:
    """How many blocks of episodes to resample: the episodes themselves, or at least 64 blocks of them within a budget of memory."""
    v, g = columns
    each = 8 * (3 * v * v + g * g + g * v)
    most = max(64, min(256, _BLOCK_BYTES // each))
    return min(episodes, max(folds, most // folds * folds))


def gather(
    rows: Rows,
    rewards: RewardFunctions,
    features: FeatureMap,
    discount: float,
    blocks: list[Tensor],
    progress: Callable[[int, int], None] | None = None,
) -> Gathered:
    """One pass over the episodes of all blocks (each a tensor of episode indices)."""
    names = [f.name for f in fields(Moments)]
    sums: dict[str, Tensor] = {}
    ends, done = torch.zeros(2, dtype=torch.int64), 0
    whole = sum(int(rows.episode_starts.diff()[b.to(rows.episode_starts.device)].sum()) for b in blocks)
    for number, block in enumerate(blocks):
        size, start, indices = CHUNK, 0, episode_rows(rows, block)
        while start < len(indices):
            chosen = indices[start : start + size]
            batch = rows.gather(chosen)
            terminated = batch.terminations.bool().cpu()
            phi, psi = features.state(batch.observations), features.pair(batch.observations, batch.actions)
            after = features.state(batch.next_observations)
            d = phi - discount * after.masked_fill(terminated[:, None], 0.0)
            r = rewards(batch, chosen)
            count = torch.tensor(float(len(chosen)), dtype=torch.float64)
            new = (
                count,
                *(phi.mT @ phi, phi.mT @ d, phi.mT @ r),
                *(psi.mT @ psi, psi.mT @ d, psi.mT @ r),
                *(d.mT @ d, d.mT @ r, r.mT @ r),
            )
            for name, part in zip(names, new, strict=True):
                if name not in sums:
                    sums[name] = torch.zeros(len(blocks), *part.shape, dtype=torch.float64)
                sums[name][number] += part
            ends += torch.stack([terminated.sum(), batch.truncations.bool().cpu().sum()])
            start, done = start + len(chosen), done + len(chosen)
            size = max(256, min(CHUNK, (1 << 21) // (phi.shape[1] + psi.shape[1])))
            if progress is not None:
                progress(done, whole)
    if not all(bool(torch.isfinite(sums[name]).all()) for name in ("psi_psi", "d_d")):
        raise RewardError("observations or actions are not finite; find them with: rlkit2 data check DATASET")
    total = sums["count"].sum()
    bases = {
        "phi": _whitening(sums["phi_phi"].sum(0) / total),
        "psi": _whitening(sums["psi_psi"].sum(0) / total),
    }
    return Gathered(in_bases(sums, bases), bases["phi"], bases["psi"], ends)


def _whitening(second: Tensor) -> Tensor:
    """`T` with `T^T second T = I` on the directions that are more than rounding."""
    sizes, directions = torch.linalg.eigh(second)
    kept = sizes > _ROUNDING * sizes[-1]
    basis: Tensor = directions[:, kept] / sizes[kept].sqrt()
    return basis
