"""Mean absolute differences of fitted advantages: the L1 distance from samples, which has no product form."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlkit2.rewards.sampled.features import FeatureMap
from rlkit2.rewards.sampled.moments import Gathered
from rlkit2.rewards.sampled.rows import Rows, episode_rows

_ROWS = 1024


def absolute_distances(
    rows: Rows,
    features: FeatureMap,
    gathered: Gathered,
    blocks: list[Tensor],
    weights: Tensor,
    coefficients: Tensor,
) -> Tensor:
    """`mean |f_i / mean |f_i| - f_j / mean |f_j||`, `[b, K, K]`, for advantages with `coefficients [b, g, K]` and blocks counted
    `weights [b, blocks]` times; two passes over the data."""
    replicates, _, count = coefficients.shape
    assert gathered.bases is not None
    basis = torch.einsum("pg,bgk->pbk", gathered.bases[1], coefficients).flatten(1)

    def advantages() -> Iterator[tuple[Tensor, Tensor]]:
        """The counts of a block in the replicates, and advantages `[n, b, K]` of some of its rows."""
        for index, block in enumerate(blocks):
            for chosen in torch.split(episode_rows(rows, block), _ROWS):
                batch = rows.gather(chosen)
                psi = features.pair(batch.observations, batch.actions)
                yield weights[:, index], (psi @ basis).reshape(len(chosen), replicates, count)

    total = weights @ gathered.blocks.count
    sizes = torch.zeros(replicates, count, dtype=torch.float64)
    for times, f in advantages():
        sizes += times[:, None] * f.abs().sum(0)
    sizes = torch.where(sizes > 0, sizes / total[:, None], torch.nan)
    distances = torch.zeros(replicates, count, count, dtype=torch.float64)
    for times, f in advantages():
        scaled = f / sizes
        for i in range(count):
            distances[:, i] += times[:, None] * (scaled[:, :, i, None] - scaled).abs().sum(0)
    return distances / total[:, None, None]
