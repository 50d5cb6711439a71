"""Counter-based random numbers: the value at a position is a pure function of (seed, step, stream, position).

Nothing is stored and nothing is shared between seeds, so seed k draws the same numbers alone or beside others, on every device, and a
resumed run draws what the uninterrupted one would have drawn. The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014), applied once per coordinate.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as signed 64-bit integers: torch has no unsigned multiplication
_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _hash(state: Tensor, coordinate: Tensor | int) -> Tensor:
    z = state ^ ((coordinate + 1) * _GOLDEN) if isinstance(coordinate, Tensor) else state + coordinate
    z = (z ^ _shift(z, 30)) * _MIX[0]
    z = (z ^ _shift(z, 27)) * _MIX[1]
    return z ^ _shift(z, 31)


def stream_id(name: str) -> int:
    """A stable integer for a named stream of numbers, such as one network's initialisation."""
    return zlib.crc32(name.encode())


def uniform(
    shape: Sequence[int], seeds: Tensor, step: Tensor | int = 0, *, stream: str = "", dtype: torch.dtype = torch.float64
) -> Tensor:
    """Uniform numbers in the open interval (0, 1).

    Args:
        shape: `[S, ...]`, with S the length of `seeds`.
        seeds: int64 `[S]`; fixes the device of the result.
        step: int64 tensor `[S]` or a number; another step gives unrelated numbers.
        stream: name that separates uses within the same step.
        dtype: floating type of the result; every type gets the same numbers, rounded (the interval may close by that).

    Returns:
        Tensor of `shape`.
    """
    position = torch.arange(math.prod(shape[1:]), device=seeds.device).view(1, *shape[1:])
    return uniform_at(position, seeds, step, stream=stream, dtype=dtype)


def uniform_at(
    position: Tensor, seeds: Tensor, step: Tensor | int = 0, *, stream: str = "", dtype: torch.dtype = torch.float64
) -> Tensor:
    """The numbers of `uniform` at given positions, int64 `[S, ...]` (or `[1, ...]` for all seeds): `[S, ...]`; other arguments as there."""
    if not isinstance(step, Tensor):
        step = torch.full_like(seeds, step)
    key = _hash(_hash(_hash(seeds, stream_id(stream)), seeds), step).view(-1, *(1 for _ in position.shape[1:]))
    bits = _shift(_hash(key, position), 11)
    return ((bits.to(torch.float64) + 0.5) * 2.0**-53).to(dtype)


def normal(
    shape: Sequence[int], seeds: Tensor, step: Tensor | int = 0, *, stream: str = "", dtype: torch.dtype = torch.float64
) -> Tensor:
    """Standard normal numbers by inversion of `uniform` (same arguments)."""
    normals: Tensor = torch.special.ndtri(uniform(shape, seeds, step, stream=stream))
    return normals.to(dtype)
