"""Small learning problems and agents that the tests of all agents share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlkit2.data import Batch


def random_batch(
    seeds: int,
    rows: int,
    observation_size: int,
    action_size: int,
    *,
    discrete: bool = False,
    dtype: torch.dtype = torch.float32,
    generator: int = 0,
    termination_rate: float = 0.2,
) -> Batch:
    """Transitions without structure; actions reach the bounds exactly now and then, as recorded ones do."""
    draw = torch.Generator().manual_seed(generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(seeds, rows, *shape, generator=draw, dtype=torch.float64).to(dtype)

    actions = (1.5 * torch.rand(seeds, rows, action_size, generator=draw, dtype=torch.float64) - 0.75) * 2.0
    choices = torch.randint(0, action_size, (seeds, rows), generator=draw)
    ends = torch.rand(seeds, rows, generator=draw)
    return Batch(
        observations=normal(observation_size),
        actions=choices if discrete else actions.clamp(-1.0, 1.0).to(dtype),
        rewards=normal(),
        next_observations=normal(observation_size),
        terminations=ends < termination_rate,
        truncations=ends > 0.9,
    )


def seed_of(batch: Batch, index: int) -> Batch:
    """The batch of one seed, `[1, B, ...]`."""
    return Batch(**{f.name: getattr(batch, f.name)[index : index + 1] for f in dataclasses.fields(batch)})


def small_config(make: Callable[..., Any], config_class: type[Any], **overrides: Any) -> Any:
    """What `make` makes, with two layers of 16 in every network; lists of widths are found by their name."""
    widths = {
        f.name: (16, 16)
        for f in dataclasses.fields(config_class)
        if f.name == "hidden_sizes" or f.name.endswith("_hidden_sizes")
    }
    return make(**{**widths, **overrides})
