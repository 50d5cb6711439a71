"""Sums over transitions between states that are categories: every distinct `(s, a, s')` is a cell that is counted, no feature is ever laid out.

The features are indicators of states and of pairs, so that all their second moments are counts: least-squares TD is the value equation of the
empirical process, the regression on pairs a mean per pair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg as spla
import torch
from torch import Tensor

from rlkit2.rewards.sampled.features import Categories
from rlkit2.rewards.sampled.moments import Fit, Gathered, Scale, Sums, chunks
from rlkit2.rewards.sampled.rows import RewardFunctions, Rows

_DENSE_STATES = 128  # more are solved as sparse systems, one after the other


@dataclass(frozen=True)
class Layout:
    """Where each of the C cells belongs: `pair [C]`, `state [C]`, `after [C]` (`states` for none: the step terminated, or what it enters
    is never left and has value 0); `share_of_state [S]`, `share_of_pair [P]` of all transitions."""

    pair: Tensor
    state: Tensor
    after: Tensor
    discount: float
    share_of_state: Tensor
    share_of_pair: Tensor

    def differences(self, w: Tensor) -> Tensor:
        """`w(s) - discount w(s')` of every cell, `[..., C, k]`."""
        padded = torch.nn.functional.pad(w, (0, 0, 0, 1))
        return w[..., self.state, :] - self.discount * padded[..., self.after, :]

    def per(self, place: Tensor, size: int, values: Tensor) -> Tensor:
        """Sums over the cells `[..., C, k]` of each place, `[..., size, k]`."""
        return values.new_zeros(*values.shape[:-2], size, values.shape[-1]).index_add_(-2, place, values)


@dataclass(frozen=True)
class CellSums(Sums):
    """`cells [..., C]` transitions and `rewards [..., C, k]` sums of rewards of every cell."""

    cells: Tensor
    rewards: Tensor
    layout: Layout

    @property
    def columns(self) -> tuple[int, int]:
        return len(self.layout.share_of_state), len(self.layout.share_of_pair)

    @property
    def _of_state(self) -> Tensor:
        return self.layout.per(self.layout.state, self.columns[0], self.cells[..., None])

    @property
    def _of_pair(self) -> Tensor:
        return self.layout.per(self.layout.pair, self.columns[1], self.cells[..., None])

    def fit(self, ridge: float) -> Fit:
        total = self.count[..., None, None].clamp(min=1.0)
        diagonal = (self._of_state + ridge * total * self.layout.share_of_state[:, None]).squeeze(-1)
        right = self.layout.per(self.layout.state, self.columns[0], self.rewards)
        w = self._solve(torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)), right)
        weight = self._of_pair + ridge * total * self.layout.share_of_pair[:, None]
        return Fit(w, self.pair_errors(w) / torch.where(weight > 0, weight, torch.ones_like(weight)))

    def _solve(self, diagonal: Tensor, right: Tensor) -> Tensor:
        """The values: `diagonal V(s) - discount sum_s' n(s, s') V(s') = right`; states without transitions have value 0."""
        states, layout = self.columns[0], self.layout
        flows = torch.where(layout.after < states, -layout.discount * self.cells, torch.zeros_like(self.cells))
        after = layout.after.clamp(max=states - 1)
        if states <= _DENSE_STATES:
            system = torch.diag_embed(diagonal).flatten(-2)
            system.index_add_(-1, layout.state * states + after, flows)
            dense: Tensor = torch.linalg.solve(system.reshape(*system.shape[:-1], states, states), right)
            return dense
        rows = np.r_[np.arange(states), layout.state.numpy()]
        columns = np.r_[np.arange(states), after.numpy()]
        entries = torch.cat([diagonal, flows], -1).reshape(-1, len(rows)).numpy()
        solved = [
            spla.splu(sp.csc_array(sp.coo_array((some, (rows, columns)), shape=(states, states)))).solve(b)
            for some, b in zip(entries, right.reshape(-1, *right.shape[-2:]).numpy(), strict=True)
        ]
        return torch.from_numpy(np.stack(solved)).reshape(right.shape)

    def _errors(self, w: Tensor) -> Tensor:
        return self.rewards - self.cells[..., None] * self.layout.differences(w)

    def state_errors(self, w: Tensor) -> Tensor:
        share = self.layout.share_of_state[:, None].clamp(min=1e-300).sqrt()
        return self.layout.per(self.layout.state, self.columns[0], self._errors(w)) / share

    def pair_errors(self, w: Tensor) -> Tensor:
        return self.layout.per(self.layout.pair, self.columns[1], self._errors(w))

    def squared_errors(self, w: Tensor) -> Tensor:
        change = self.layout.differences(w)
        cross = self.rewards.mT @ change
        return self.r_r - cross - cross.mT + change.mT @ (self.cells[..., None] * change)

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        return left.mT @ (self._of_pair * right)

    def held(self) -> Tensor:
        share = self._of_pair.squeeze(-1) / self.count[..., None].clamp(min=1.0)
        return share / self.layout.share_of_pair

    def shaped(self, shifts: Tensor) -> CellSums:
        change = self.layout.differences(shifts)
        moved = self.cells[..., None] * change
        cross = self.r_r - self.rewards.mT @ change
        both = cross.mT - change.mT @ (self.rewards - moved)
        return replace(
            self,
            rewards=torch.cat([self.rewards, self.rewards - moved], -1),
            r_r=torch.cat([torch.cat([self.r_r, cross], -1), torch.cat([cross.mT, both], -1)], -2),
        )

    def shaping_size(self, shifts: Tensor) -> Tensor:
        return (self.cells[..., None] * self.layout.differences(shifts).square()).sum(-2)

    def absolute_distances(self, beta: Tensor) -> Tensor:
        """`mean |f_i / mean |f_i| - f_j / mean |f_j||`, `[..., k, k]`, of advantages `beta [..., P, k]`."""
        weight = self._of_pair / self.count[..., None, None]
        sizes = (weight * beta.abs()).sum(-2, keepdim=True)
        scaled = beta / torch.where(sizes > 0, sizes, torch.nan)
        rows = [(weight * (scaled[..., i, None] - scaled).abs()).sum(-2) for i in range(beta.shape[-1])]
        return torch.stack(rows, -2)


def gather_cells(
    rows: Rows,
    rewards: RewardFunctions,
    categories: Categories,
    discount: float,
    blocks: list[Tensor],
    progress: Callable[[int, int], None] | None = None,
) -> Gathered:
    """Counts and sums of rewards of every distinct transition, a pass over the episodes of all blocks."""
    states, pairs = categories.size, categories.size * categories.choices
    scale, ends = Scale(len(rewards.names)), torch.zeros(2, dtype=torch.int64)
    parts: list[tuple[int, Tensor, Tensor, Tensor]] = []
    r_r = torch.zeros(len(blocks), len(rewards.names), len(rewards.names), dtype=torch.float64)
    factors: list[Tensor] = []
    for number, chosen, batch in chunks(rows, blocks, progress):
        terminated = batch.terminations.bool().cpu()
        s, after = categories.ids(batch.observations), categories.ids(batch.next_observations)
        pair = s * categories.choices + batch.actions.long().cpu().reshape(-1)
        keys, place = torch.unique(pair * (states + 1) + after.masked_fill(terminated, states), return_inverse=True)
        r, factor = scale(rewards(batch, chosen))
        factors.append(factor)
        r_r *= factor * factor[:, None]
        r_r[number] += r.mT @ r
        counts = torch.bincount(place, minlength=len(keys)).double()
        parts.append((number, keys, counts, torch.zeros(len(keys), r.shape[1], dtype=r.dtype).index_add_(0, place, r)))
        ends += torch.stack([terminated.sum(), batch.truncations.bool().cpu().sum()])
    known = torch.unique(torch.cat([part[1] for part in parts]))
    cells = torch.zeros(len(blocks), len(known), dtype=torch.float64)
    sums = torch.zeros(len(blocks), len(known), len(rewards.names), dtype=torch.float64)
    later = torch.ones(len(rewards.names), dtype=torch.float64)
    for (number, keys, counts, total), factor in zip(reversed(parts), reversed(factors), strict=True):
        place = torch.searchsorted(known, keys)
        cells[number, place] += counts
        sums[number, place] += total * later
        later = later * factor
    pair = known // (states + 1)
    count = cells.sum(1)
    of_pair = torch.zeros(pairs, dtype=torch.float64).index_add_(0, pair, cells.sum(0)) / count.sum()
    seen = of_pair.nonzero().squeeze(1)
    layout = Layout(
        pair=torch.searchsorted(seen, pair),
        state=pair // categories.choices,
        after=known % (states + 1),
        discount=discount,
        share_of_state=of_pair.reshape(states, categories.choices).sum(1),
        share_of_pair=of_pair[seen],
    )
    found = CellSums(count=count, r_r=r_r, cells=cells, rewards=sums, layout=layout)
    return Gathered(found, found.columns, ends, scale.value)
