"""Small datasets whose rewards are a known linear function, for tests of reward learning."""

from __future__ import annotations

import numpy as np
import torch

from rlkit2.data import TransitionDataset, dataset_from_arrays

WEIGHTS = np.array([1.0, -0.5, 0.8, -1.2, 0.3, 0.7])  # on 4 observation and 2 action features


def linear_dataset(
    episodes: int = 60, steps: int = 40, seed: int = 0, *, terminate: bool = False, noise: float = 0.0
) -> TransitionDataset:
    """Random walks in 4 dimensions with 2-dimensional actions and `reward = WEIGHTS . (s, a)`, lengths varying by a few steps."""
    generator = np.random.default_rng(seed)
    fields: dict[str, list[np.ndarray]] = {
        name: [] for name in ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    }
    for episode in range(episodes):
        length = steps + episode % 3
        actions = generator.uniform(-1, 1, (length, 2)).astype(np.float32)
        chain = np.cumsum(generator.normal(0, 0.3, (length + 1, 4)), 0).astype(np.float32)
        chain[1:, :2] += 0.1 * np.cumsum(actions, 0)
        fields["observations"].append(chain[:-1])
        fields["next_observations"].append(chain[1:])
        fields["actions"].append(actions)
        rewards = np.concatenate([chain[:-1], actions], 1) @ WEIGHTS + noise * generator.normal(size=length)
        fields["rewards"].append(rewards.astype(np.float32))
        ends = np.zeros(length, bool)
        ends[-1] = True
        fields["terminations"].append(ends if terminate else np.zeros(length, bool))
        fields["truncations"].append(np.zeros(length, bool) if terminate else ends)
    return dataset_from_arrays(**{name: np.concatenate(parts) for name, parts in fields.items()})


def changed(dataset: TransitionDataset) -> TransitionDataset:
    """The same dataset with one observation moved a little."""
    observations = dataset.observations.clone()
    observations[7, 0] += 0.5
    return dataset_from_arrays(
        observations,
        dataset.actions,
        dataset.rewards,
        dataset.next_observations,
        dataset.terminations,
        dataset.truncations,
        spec=dataset.spec,
    )


def generators(count: int) -> list[torch.Generator]:
    """One generator a seed."""
    return [torch.Generator().manual_seed(seed) for seed in range(count)]
