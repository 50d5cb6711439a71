"""Shortest ways through the four rooms, by value iteration on a fine grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from rlkit2.envs.rooms import SPEED, WALL, is_free, move

Array = NDArray[Any]

NODES = 101
SPACING = 2 / (NODES - 1)


def _octile(offsets: Array) -> Array:
    """Length [...] of the shortest 8-connected way along offsets [..., 2] in open space."""
    size = np.abs(offsets)
    length: Array = size.max(axis=-1) + (np.sqrt(2) - 1) * size.min(axis=-1)
    return length


@lru_cache(maxsize=64)
def geodesic_distances(target: tuple[float, float]) -> Array:
    """Length of the shortest 8-connected way from every node to the target, [101, 101] float64 (x first), infinite in walls."""
    axis = np.linspace(-1, 1, NODES)
    nodes = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
    # Nodes that touch a door post are left out: seen from them the way is shorter than it is for a point beside the post.
    around = np.array([(0, SPACING), (0, -SPACING), (SPACING, 0), (-SPACING, 0)])
    in_doorway = (np.abs(nodes) < WALL).any(axis=-1)
    free = is_free(nodes) & (~in_doorway | is_free(nodes[:, :, None] + around).all(axis=-1))
    offsets = _octile(nodes - np.asarray(target))
    distances = np.where((offsets <= 2 * SPACING) & free, offsets, np.inf)
    shifts = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    while True:
        padded = np.pad(distances, 1, constant_values=np.inf)
        through = [padded[1 + i : 1 + i + NODES, 1 + j : 1 + j + NODES] + SPACING * np.hypot(i, j) for i, j in shifts]
        shorter = np.where(free, np.minimum(distances, np.minimum.reduce(through)), np.inf)
        if np.array_equal(shorter, distances):
            return distances
        distances = shorter


def distances_to(targets: Array, chosen: Array, positions: Array) -> Array:
    """Geodesic distance [n, k] from positions [n, k, 2] to `targets[chosen]`; targets [T, 2], chosen [n]."""
    fields = np.stack([geodesic_distances((float(x), float(y))) for x, y in targets])
    corner = np.clip(((positions + 1) / SPACING).astype(np.int64), 0, NODES - 2)
    ways = []
    for offset in ((0, 0), (0, 1), (1, 0), (1, 1)):
        node = corner + np.asarray(offset)
        ways.append(fields[chosen[:, None], node[..., 0], node[..., 1]] + _octile(positions - (node * SPACING - 1)))
    shortest: Array = np.minimum.reduce(ways)
    return shortest


def geodesic_behavior(targets: Sequence[Sequence[float]]) -> Callable[[Array, Generator], Array]:
    """Walk to a target by the shortest way; with several targets, walk from one to another, drawn at random for each episode.

    Args:
        targets: T free points (x, y).

    Returns:
        function of positions [n, 2] and a generator, giving actions [n, 2]: of 32 directions at full speed and standing still, the one
        whose next position is closest to the target.
    """
    points = np.asarray(targets, np.float64)
    angles = np.arange(32) / 32 * 2 * np.pi
    directions = np.stack((np.cos(angles), np.sin(angles)), axis=1)
    candidates = np.concatenate((directions / np.abs(directions).max(axis=1, keepdims=True), np.zeros((1, 2)))).astype(
        np.float32
    )
    chosen = np.zeros(0, np.int64)

    def act(positions: Array, generator: Generator) -> Array:
        nonlocal chosen
        count = len(positions)
        if len(chosen) != count:
            chosen = generator.integers(len(points), size=count)
        arrived = np.abs(positions - points[chosen]).max(axis=1) <= SPEED
        chosen = np.where(arrived, generator.integers(len(points), size=count), chosen)
        following = move(positions.repeat(len(candidates), axis=0), np.tile(candidates, (count, 1)))
        lengths = distances_to(points, chosen, following.reshape(count, len(candidates), 2))
        actions: Array = candidates[lengths.argmin(axis=1)]
        return actions

    return act
