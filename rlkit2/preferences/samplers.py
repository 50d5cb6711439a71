"""Which pairs of segments to ask about.

Uniform sampling needs nothing; the others draw a pool of uniform pairs and keep those from which an ensemble of reward models would learn most,
or those that lie far from each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.preferences import SegmentIndex
from rlkit2.errors import ConfigError


class PairModel(Protocol):
    """What an informed sampler asks, such as `RewardEnsemble`."""

    def probabilities(self, dataset: TransitionDataset, rows_1: Tensor, rows_2: Tensor) -> Tensor:
        """Every member's probability that the second segment is preferred, `[S, M, P]` (or `[M, P]`), for rows `[P, H]`."""
        ...


def disagreement(probabilities: Tensor) -> Tensor:
    """Standard deviation over members (without Bessel's correction) of the probability: `[M, P]` to `[P]` (Christiano et al. 2017, section 2.2.4)."""
    return probabilities.std(0, correction=0)


def entropy(probabilities: Tensor) -> Tensor:
    """Mean over members of the answer's entropy in nats, `[M, P]` to `[P]` (B-Pref's uncertainty sampling)."""
    p = probabilities
    nats: Tensor = -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)).mean(0)
    return nats


def mean_variance(probabilities: Tensor) -> Tensor:
    """`p (1 - p)` of the mean probability p over members, `[M, P]` to `[P]` (Shin et al., "Benchmarks and Algorithms for Offline Preference-Based
    Reward Learning", TMLR 2023).
    """
    mean = probabilities.mean(0)
    return mean * (1 - mean)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "disagreement": disagreement,
    "entropy": entropy,
    "mean_variance": mean_variance,
}
SAMPLERS = ("uniform", "episodes", "k_center", *SCORES)


def sample_pairs(
    index: SegmentIndex,
    count: int,
    sampler: str = "uniform",
    *,
    model: PairModel | None = None,
    pool_factor: int = 10,
    labelled: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Pairs `[count, 2]` of two different segments, as indices into `index`.

    Args:
        index: the segments.
        count: pairs wanted.
        sampler: "uniform" over starts; "episodes": an episode first, then a start in it; "disagreement", "entropy", "mean_variance":
            those of `pool_factor * count` uniform pairs with the highest score under `model`; "k_center": those of such a pool that
            cover it best (greedy), also seen from the pairs `labelled`.
        model: an ensemble of one seed, for the samplers with a score.
        pool_factor: size of the pool over `count`.
        labelled: `[K, 2]` pairs that have labels already (k_center).
        seed: of the draw.

    Raises:
        ConfigError: unknown sampler, a missing model, or fewer than two segments.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(f"unknown sampler {sampler!r}; choose one of: {', '.join(SAMPLERS)}")
    if len(index) < 2 or count < 1:
        raise ConfigError(f"cannot draw {count} pairs from {len(index)} segments of {index.dataset.spec.id}")
    generator = torch.Generator().manual_seed(seed)
    if sampler in ("uniform", "episodes"):
        return _uniform(index, count, generator, by_episode=sampler == "episodes")
    pool = _uniform(index, count * pool_factor, generator)
    if sampler == "k_center":
        known = None if labelled is None else _features(index, labelled)
        return pool[k_center(_features(index, pool), count, known)]
    if model is None:
        raise ConfigError(f"sampler {sampler} needs a reward ensemble to ask; give model, or use uniform")
    members = model.probabilities(index.dataset, index.rows(pool[:, 0]), index.rows(pool[:, 1]))
    if members.ndim == 3:
        if len(members) != 1:
            raise ConfigError(
                f"sampler {sampler} needs an ensemble of one seed, not {len(members)}: use its select_seed"
            )
        members = members[0]
    return pool[SCORES[sampler](members).argsort(descending=True, stable=True)[:count]]


def _uniform(index: SegmentIndex, count: int, generator: torch.Generator, *, by_episode: bool = False) -> Tensor:
    if not by_episode:
        first = torch.randint(len(index), (count,), generator=generator)
        step = torch.randint(1, len(index), (count,), generator=generator)
        return torch.stack([first, (first + step) % len(index)], 1)
    episodes, counts = torch.unique(index.segments[:, 0], return_counts=True)
    firsts = counts.cumsum(0) - counts
    drawn = torch.randint(len(episodes), (count, 2), generator=generator)
    offset = (torch.rand((count, 2), generator=generator, dtype=torch.float64) * counts[drawn]).long()
    pairs: Tensor = firsts[drawn] + offset
    same = pairs[:, 0] == pairs[:, 1]  # the next segment instead, so that a pair never asks about one segment
    pairs[same, 1] = (pairs[same, 1] + 1) % len(index)
    return pairs


def _features(index: SegmentIndex, pairs: Tensor) -> Tensor:
    """Standardised observations and actions of both segments, `[P, 2 H (obs + act)]`."""
    parts = []
    for field in (index.dataset.observations, index.dataset.actions):
        values = field.float().reshape(len(field), -1)
        scaled = (values - values.mean(0)) / (values.std(0) + 1e-6)
        parts.append(scaled[index.rows(pairs)].flatten(1))
    return torch.cat(parts, 1)


def k_center(features: Tensor, count: int, known: Tensor | None = None) -> Tensor:
    """Indices `[count]` of points that greedily minimise the largest distance to a chosen point (farthest-first traversal; Gonzalez 1985).

    Args:
        features: `[N, d]`.
        known: `[K, d]` points that are chosen already; None starts with the first point.
    """
    if not 0 < count <= len(features):
        raise ConfigError(f"cannot choose {count} of {len(features)} points")
    chosen: list[int] = []
    if known is None or not len(known):
        chosen.append(0)
        nearest = torch.linalg.vector_norm(features - features[0], dim=1)
    else:
        nearest = torch.cdist(features, known).amin(1)
    while len(chosen) < count:
        nearest[chosen] = -1.0
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, torch.linalg.vector_norm(features - features[chosen[-1]], dim=1))
    return torch.tensor(chosen)
