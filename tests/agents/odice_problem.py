"""A small random problem for O-DICE's tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlkit2.agents import make_config
from rlkit2.agents.odice import ODICE
from rlkit2.data import Batch

OBSERVATIONS, ACTIONS, ROWS = 4, 2, 24


def config(**overrides: Any) -> Any:
    """Narrow networks; the rest as in the released code."""
    return make_config("odice_released", **{"value_hidden_sizes": (16, 16), "policy_hidden_sizes": (16,), **overrides})


def make(seeds: Any = 1, *, dtype: torch.dtype = torch.float64, discrete: bool = False, **overrides: Any) -> ODICE:
    """An agent in float64."""
    return ODICE(config(**overrides), OBSERVATIONS, ACTIONS, seeds=seeds, dtype=dtype, discrete=discrete)


def make_batch(
    seeds: int = 1, *, rows: int = ROWS, seed: int = 0, dtype: torch.dtype = torch.float64, discrete: bool = False
) -> Batch:
    """Random transitions; every fifth terminates, every seventh is truncated."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    index = torch.arange(rows).expand(seeds, rows)
    actions = torch.randint(ACTIONS, (seeds, rows), generator=generator)
    return Batch(
        observations=normal(seeds, rows, OBSERVATIONS),
        actions=actions if discrete else normal(seeds, rows, ACTIONS).tanh(),
        rewards=normal(seeds, rows),
        next_observations=normal(seeds, rows, OBSERVATIONS),
        terminations=index % 5 == 0,
        truncations=index % 7 == 0,
    )


def pick(batch: Batch, index: Any) -> Batch:
    """The batch of some seeds."""
    return Batch(**{key: getattr(batch, key)[index] for key in vars(batch)})


def perturb(agent: ODICE, scale: float = 0.3, seed: int = 1) -> ODICE:
    """Move V, its target and the policy apart from each other, as in the middle of training."""
    state = agent.state_dict()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in state.items():
        if name.startswith(("value", "policy")):
            tensor += scale * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
    agent.load_state_dict(state)
    return agent
