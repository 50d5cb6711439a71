"""Does the policy do what the data know about? Its actions against those taken at the nearest states of other episodes."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from rlkit2.evaluation.offline.problem import Problem

STATES = 1000  # states looked at
REFERENCE = 20_000  # states the neighbours come from
RARE = 0.95  # quantile of the data's own distances beyond which an action is outside

Array = NDArray[np.float64]


def outside_share(problem: Problem, neighbors: int, seed: int) -> Array:
    """Share `[P]` of the data's states at which the policy acts unlike anything seen nearby.

    Discrete actions: the probability of actions that none of the `neighbors` nearest states of other episodes took. Continuous ones: the distance
    to the nearest action taken there exceeds that of 95 % of the data's own actions, so that a policy that acts as the data do has about .05. NaN
    where the dataset has one episode.
    """
    from scipy.spatial import cKDTree

    if problem.num_episodes < 2:
        return np.full(problem.num_policies, np.nan)
    generator = np.random.default_rng(seed)
    rows = np.arange(len(problem.rewards))
    queries = np.sort(generator.choice(rows, min(STATES, len(rows)), replace=False))
    known = np.sort(generator.choice(rows, min(REFERENCE, len(rows)), replace=False))
    observations, episode = problem.observations.numpy(), problem.episode.numpy()
    asked = min(neighbors + 50, len(known))
    _, near = cKDTree(observations[known]).query(observations[queries], k=asked)
    near = known[near.reshape(len(queries), asked)]
    other = episode[near] != episode[queries][:, None]
    order = np.argsort(~other, axis=1, kind="stable")[:, :neighbors]  # of other episodes first, each kind by distance
    near, other = np.take_along_axis(near, order, 1), np.take_along_axis(other, order, 1)
    chosen = problem.here[:, torch.from_numpy(queries)].numpy()
    taken = problem.actions.numpy()[near]
    if problem.discrete:
        seen = np.zeros((len(queries), chosen.shape[-1]), bool)
        for column in range(taken.shape[1]):
            seen[np.arange(len(queries)), taken[:, column]] |= other[:, column]
        return np.asarray((chosen * ~seen).sum(-1).mean(1), dtype=np.float64)

    def distance(actions: NDArray[np.float32]) -> NDArray[np.float32]:
        """To the nearest of the neighbours' actions, `[...]` for `[..., Q, act]`."""
        apart = np.linalg.norm(actions[..., :, None, :] - taken, axis=-1)
        return np.where(other, apart, np.inf).min(-1)  # type: ignore[no-any-return]

    limit = np.quantile(distance(problem.actions.numpy()[queries]), RARE)
    shares = [np.mean([(distance(draw) > limit).mean() for draw in np.moveaxis(own, 1, 0)]) for own in chosen]
    return np.asarray(shares, dtype=np.float64)
