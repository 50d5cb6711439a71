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

from rlkit2.rewards.features import FeatureMap
from rlkit2.rewards.rows import CHUNK, RewardFunctions, Rows, episode_rows

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

    def in_basis(self, phi: Tensor, psi: Tensor) -> Moments:
        """The sums for the features `phi_basis^T phi`, `psi_basis^T psi`, with bases `[v, v']`, `[g, g']`."""
        return Moments(
            count=self.count,
            phi_phi=phi.mT @ self.phi_phi @ phi,
            phi_d=phi.mT @ self.phi_d @ phi,
            phi_r=phi.mT @ self.phi_r,
            psi_psi=psi.mT @ self.psi_psi @ psi,
            psi_d=psi.mT @ self.psi_d @ phi,
            psi_r=psi.mT @ self.psi_r,
            d_d=phi.mT @ self.d_d @ phi,
            d_r=phi.mT @ self.d_r,
            r_r=self.r_r,
        )

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
    total = [torch.zeros(()) for _ in fields(Moments)]
    parts: list[list[Tensor]] = []
    ends, done = torch.zeros(2, dtype=torch.int64), 0
    whole = sum(int(rows.episode_starts.diff()[b.to(rows.episode_starts.device)].sum()) for b in blocks)
    for block in blocks:
        sums = [torch.zeros(()) for _ in fields(Moments)]
        size = CHUNK
        start, indices = 0, episode_rows(rows, block)
        while start < len(indices):
            chosen = indices[start : start + size]
            batch = rows.gather(chosen)
            terminated = batch.terminations.bool().cpu()
            phi, psi = features.state(batch.observations), features.pair(batch.observations, batch.actions)
            alive = (~terminated).double()[:, None]
            d = phi - discount * alive * features.state(batch.next_observations)
            r = rewards(batch, chosen)
            new = [torch.tensor(float(len(chosen)), dtype=torch.float64)]
            new += [
                phi.mT @ phi,
                phi.mT @ d,
                phi.mT @ r,
                psi.mT @ psi,
                psi.mT @ d,
                psi.mT @ r,
                d.mT @ d,
                d.mT @ r,
                r.mT @ r,
            ]
            sums = [a + b for a, b in zip(sums, new, strict=True)]
            ends += torch.stack([terminated.sum(), batch.truncations.bool().cpu().sum()])
            start, done = start + len(chosen), done + len(chosen)
            size = max(256, min(CHUNK, (1 << 21) // (phi.shape[1] + psi.shape[1])))
            if progress is not None:
                progress(done, whole)
        parts.append(sums)
        total = [a + b for a, b in zip(total, sums, strict=True)]
    everything = Moments(*total)
    phi_basis = _whitening(everything.phi_phi / everything.count)
    psi_basis = _whitening(everything.psi_psi / everything.count)
    parts.reverse()
    stacked = [Moments(*parts.pop()).in_basis(phi_basis, psi_basis) for _ in blocks]
    joined = Moments(**{f.name: torch.stack([getattr(m, f.name) for m in stacked]) for f in fields(Moments)})
    return Gathered(joined, phi_basis, psi_basis, ends)


def _whitening(second: Tensor) -> Tensor:
    """`T` with `T^T second T = I` on the directions that are more than rounding."""
    sizes, directions = torch.linalg.eigh(second)
    kept = sizes > _ROUNDING * sizes[-1]
    basis: Tensor = directions[:, kept] / sizes[kept].sqrt()
    return basis
