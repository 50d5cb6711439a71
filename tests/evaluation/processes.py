"""Finite processes with a known truth, their data with terminations and truncations, and policies that are tables."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from rlkit2.data.dataset import TransitionDataset, dataset_from_arrays
from rlkit2.data.spec import DatasetSpec
from rlkit2.nn import Normalizer, Policy
from rlkit2.nn.actors import make_actor
from rlkit2.rewards import TabularMDP
from rlkit2.rewards.planning import policy_return

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Process:
    """Dynamics over S states of which the last is the end (absorbing, reward 0), and a reward `[S, A, S]`."""

    mdp: TabularMDP
    reward: Array

    @property
    def sizes(self) -> tuple[int, int]:
        return self.mdp.num_states, self.mdp.num_actions

    def value(self, policy: Array) -> float:
        return float(policy_return(policy, self.reward, self.mdp))

    def value_from(self, state: int, policy: Array) -> float:
        start = np.eye(self.sizes[0])[state]
        return float(policy_return(policy, self.reward, TabularMDP(self.mdp.transitions, self.mdp.discount, start)))


def random_process(
    seed: int, *, states: int = 5, actions: int = 3, discount: float = 0.9, ending: float = 0.1, offset: float = 0.5
) -> Process:
    """Random dynamics and rewards; every step ends with probability about `ending` (0: never), so that the end and the offset of rewards matter."""
    rng = np.random.default_rng(seed)
    tau = rng.dirichlet(np.full(states, 0.5), (states, actions))
    ends = 2 * ending * rng.random((states, actions, 1))
    full = np.zeros((states + 1, actions, states + 1))
    full[:-1, :, :-1], full[:-1, :, -1:], full[-1, :, -1] = tau * (1 - ends), ends, 1.0
    reward = np.zeros_like(full)
    reward[:-1] = rng.normal(offset, 1.0, (states, actions, 1)) + 0.3 * rng.normal(size=(states, actions, states + 1))
    start = np.append(rng.dirichlet(np.full(states, 0.7)), 0.0)
    return Process(TabularMDP(full, discount, start), reward)


def random_policy(process: Process, seed: int, sharpness: float = 1.0) -> Array:
    rng = np.random.default_rng(1000 + seed)
    logits = sharpness * rng.normal(size=process.sizes)
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def _cumulated(probabilities: Array) -> Array:
    sums = np.cumsum(np.asarray(probabilities), -1)
    return sums / sums[..., -1:]


def _drawn(cumulated: Array, rng: np.random.Generator) -> int:
    """As `rng.choice` draws from probabilities."""
    return int(cumulated.searchsorted(rng.random(), side="right"))


def sample(
    process: Process, behavior: Array, episodes: int, length: int, seed: int = 0
) -> tuple[TransitionDataset, Array]:
    """`episodes` episodes, truncated after 1 to `length` steps, and the log-probabilities of their actions `[N]`."""
    rng = np.random.default_rng(seed)
    states, actions = process.sizes
    begin, act, follow = map(_cumulated, (process.mdp.initial_distribution, behavior, process.mdp.transitions))
    rows: dict[str, list[float]] = {name: [] for name in ("s", "a", "r", "n", "term", "trunc")}
    for _ in range(episodes):
        state, limit = _drawn(begin, rng), int(rng.integers(1, length + 1))
        for step in range(limit):
            action = _drawn(act[state], rng)
            following = _drawn(follow[state, action], rng)
            over = following == states - 1
            values = (
                state,
                action,
                process.reward[state, action, following],
                following,
                over,
                step == limit - 1 and not over,
            )
            for name, value in zip(rows, values, strict=True):
                rows[name].append(value)
            if over:
                break
            state = following
    s, a, n = (np.array(rows[name], int) for name in "san")
    eye = np.eye(states, dtype=np.float32)
    spec = DatasetSpec(
        observation_space=spaces.Box(0.0, 1.0, (states,), np.float32),
        action_space=spaces.Discrete(actions),
        id="process",
    )
    dataset = dataset_from_arrays(
        eye[s], a, np.array(rows["r"]), eye[n], np.array(rows["term"], bool), np.array(rows["trunc"], bool), spec
    )
    return dataset, np.log(behavior[s, a])


def table_policy(*tables: Array) -> Policy:
    """One policy with a seed for each table of probabilities `[S, A]`."""
    states, actions = tables[0].shape
    actor = make_actor("categorical", states, actions, (), seeds=list(range(len(tables))))
    views = actor.named_views()
    views["layers.0.weight"].copy_(torch.from_numpy(np.log(np.stack(tables) + 1e-30)))
    views["layers.0.bias"].zero_()
    return Policy(actor, Normalizer(seeds=len(tables)), tuple(range(len(tables))))
