"""Predicted against true reward noise over the floor of the noisy rooms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rlkit2.agents.uncertain_agent import UncertainAgent
from rlkit2.envs.noisy_rooms import noise_shape, noise_std

if TYPE_CHECKING:
    from rlkit2.data.dataset import TransitionDataset
    from rlkit2.data.spec import DatasetSpec

Array = NDArray[np.float64]

NOISY_ROOMS = "rlkit2/NoisyRooms-v0"
CHUNK = 4096


@dataclass(frozen=True)
class NoiseMap:
    """Root mean squares over the transitions of a cell of the floor, row 0 in the south; NaN where fewer than `least_visits` began.

    The learnt deviation is that of the whole TD target; transitions of the rooms are deterministic, so most of it is the reward's.
    """

    visits: Array  # `[K, K]`
    true_sd: Array  # `[K, K]`
    aleatoric_sd: Array  # `[S, K, K]`
    epistemic_sd: Array  # `[S, K, K]`
    true_shape: Array  # `[K, K]`, mean
    shape: Array  # `[S, K, K]`, mean
    correlation: Array  # `[S]`: Pearson, of aleatoric with true deviation over visited cells
    rank_correlation: Array  # `[S]`: Spearman
    ratio: Array  # `[S]`: median over cells of aleatoric to true deviation
    shape_rank_correlation: Array  # `[S]`: Spearman, of learnt with true shape

    def to_dict(self) -> dict[str, Any]:
        """The correlations as plain lists."""
        names = ("correlation", "rank_correlation", "ratio", "shape_rank_correlation")
        return {name: getattr(self, name).tolist() for name in names}


def has_known_noise(spec: DatasetSpec) -> bool:
    """Whether the dataset comes from the noisy rooms, whose noise is known."""
    return spec.env_spec is not None and spec.env_spec.id == NOISY_ROOMS


def noise_map(
    agent: UncertainAgent, episodes: TransitionDataset, *, cells: int = 16, least_visits: int = 10
) -> NoiseMap:
    """Learnt and true noise at the transitions of `episodes`, cell by cell of a `cells` x `cells` grid over [-1, 1]^2.

    Raises:
        ConfigError: the agent has no noise model.
    """
    seeds, actions = len(agent.seeds), episodes.actions
    positions = episodes.observations[:, :2].double().cpu().numpy()
    column, row = (np.clip(((positions[:, i] + 1.0) / 2.0 * cells).astype(int), 0, cells - 1) for i in (0, 1))
    cell = row * cells + column
    learnt = np.empty((3, seeds, len(episodes)))
    for start in range(0, len(episodes), CHUNK):
        part = slice(start, start + CHUNK)
        observations = episodes.observations[part].expand(seeds, -1, -1)
        found = agent.uncertainty(observations, actions[part].expand(seeds, *actions[part].shape))
        for i, values in enumerate((found.aleatoric_sd, found.epistemic_sd, found.shape)):
            learnt[i][:, part] = values.reshape(seeds, -1)
    visits = np.bincount(cell, minlength=cells * cells).astype(np.float64)
    visited = visits >= least_visits

    def mean(values: Array) -> Array:
        sums = np.stack([np.bincount(cell, v, minlength=cells * cells) for v in np.atleast_2d(values)])
        return np.where(visited, sums / np.maximum(visits, 1.0), np.nan)

    true_sd = np.sqrt(mean(noise_std(positions) ** 2))[0]
    aleatoric, epistemic = (np.sqrt(mean(values**2)) for values in learnt[:2])
    true_shape, shape = mean(noise_shape(positions))[0], mean(learnt[2])
    seen = [(a[visited], true_sd[visited]) for a in aleatoric]
    grid = (cells, cells)
    return NoiseMap(
        visits=visits.reshape(grid),
        true_sd=true_sd.reshape(grid),
        aleatoric_sd=aleatoric.reshape(seeds, *grid),
        epistemic_sd=epistemic.reshape(seeds, *grid),
        true_shape=true_shape.reshape(grid),
        shape=shape.reshape(seeds, *grid),
        correlation=np.array([stats.pearsonr(a, b).statistic for a, b in seen]),
        rank_correlation=np.array([stats.spearmanr(a, b).statistic for a, b in seen]),
        ratio=np.array([np.median(a / b) for a, b in seen]),
        shape_rank_correlation=np.array(
            [
                stats.spearmanr(s[visited], true_shape[visited]).statistic if np.ptp(s[visited]) > 0 else 0.0
                for s in shape
            ]
        ),
    )


__all__ = ["NoiseMap", "has_known_noise", "noise_map"]
