"""Small learning problems and agents that the tests of all agents share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlkit2.data import Batch
from rlkit2.data.preferences import PreferenceBatch


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


def random_preferences(
    seeds: int, rows: int, observation_size: int, action_size: int, *, generator: int = 0, **options: Any
) -> PreferenceBatch:
    """Pairs of segments of 3 steps with labels of every kind, and two transitions beside each."""
    steps = random_batch(seeds, rows * 6, observation_size, action_size, generator=generator, **options)
    draw = torch.Generator().manual_seed(1000 + generator)
    return PreferenceBatch(
        segments=map_batch(lambda t: t.view(seeds, rows, 2, 3, *t.shape[2:]), steps),
        label_mass=torch.randint(0, 3, (seeds, rows), generator=draw) / 2.0,
        transitions=random_batch(seeds, rows * 2, observation_size, action_size, generator=generator, **options),
    )


def map_batch(change: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """A batch, or a batch of batches, with `change` done to every tensor."""
    parts = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return type(batch)(
        **{n: change(part) if isinstance(part, Tensor) else map_batch(change, part) for n, part in parts.items()}
    )


def small_config(make: Callable[..., Any], config_class: type[Any], **overrides: Any) -> Any:
    """What `make` makes, with two layers of 16 in every network; lists of widths are found by their name."""
    widths = {
        f.name: (16, 16)
        for f in dataclasses.fields(config_class)
        if f.name == "hidden_sizes" or f.name.endswith("_hidden_sizes")
    }
    return make(**{**widths, **overrides})
