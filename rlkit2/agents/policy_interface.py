"""From the spaces of a dataset to what a policy knows of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from rlkit2.data.spaces import Leaf, action_layout
from rlkit2.data.spec import DatasetSpec
from rlkit2.nn import Policy
from rlkit2.nn.interface import Bounds, Entry, Interface


def make_interface(spec: DatasetSpec) -> Interface:
    """What a policy for the spaces of `spec` takes and gives; where these hold stacks, it takes frames and stacks them."""
    frames = spec.frame_stack
    observation = tuple(_entry(leaf, frames, choices=True) for leaf in spec.flattener.leaves)
    return Interface(observation, tuple(map(_entry, action_layout(spec.action_space).leaves)), frames)


def with_interface(policy: Policy) -> Policy:
    """The policy, which knows its spaces if its metadata tell them (older files keep them there alone)."""
    if policy.interface is None and isinstance(policy.metadata.get("spec"), str):
        policy.interface = make_interface(DatasetSpec.from_json(policy.metadata["spec"]))
    return policy


def _entry(leaf: Leaf, frames: int = 1, choices: bool = False) -> Entry:
    """One entry of an observation, `choices` in one-hot columns, or of an action; of a stack, that of one frame."""
    space: Any = leaf.space
    if isinstance(space, spaces.Box):
        low, high = space.low, space.high
    elif isinstance(space, spaces.MultiBinary):
        low, high = np.zeros(space.shape, np.int64), np.ones(space.shape, np.int64)
    else:
        sizes = np.asarray(space.n if isinstance(space, spaces.Discrete) else space.nvec)
        low, high = np.asarray(space.start), np.asarray(space.start) + sizes - 1
    one_hot = choices and isinstance(space, spaces.Discrete | spaces.MultiDiscrete)
    if frames > 1:
        low, high = low[0], high[0]
    return Entry(
        leaf.path, tuple(low.shape), np.dtype(space.dtype or np.int64).name, _bounds(low), _bounds(high), one_hot
    )


def _bounds(ends: Any) -> Bounds:
    """In C order; one for all where they are alike."""
    found = [value if np.isfinite(value) else None for value in np.ravel(ends).tolist()]
    return tuple(found[:1] if len(set(found)) == 1 else found)
