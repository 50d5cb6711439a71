"""Tabular processes from Gymnasium environments: the table `P` of toy-text environments, or enumeration of small deterministic ones."""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Hashable
from typing import Any

import gymnasium
import numpy as np

from rlkit2.data.environments import make_environment
from rlkit2.errors import RewardError
from rlkit2.rewards.mdp import TabularMDP

# (state, action) -> [(probability, next state, reward, terminated)]
Table = dict[int, dict[int, list[tuple[float, int, float, bool]]]]
_MAX_STATES = 2000
_TRIALS = 4


def from_gym(env: Any, discount: float) -> tuple[TabularMDP, np.ndarray[Any, Any]]:
    """The process and the reward `[S, A, S']` (float64) of an environment or of an id such as "FrozenLake-v1".

    States entered by a terminated transition become absorbing with reward 0; a state that is entered both ways is split, its
    absorbing copy appended. Time limits are not part of the process. Environments without a table `P` are enumerated by stepping
    copies from the initial state of `reset(seed=0)`; they must be deterministic with discrete actions and at most 2000 states.

    Raises `EnvironmentUnavailableError` when the environment cannot be made, `RewardError` when it is stochastic or too large.
    """
    made = not isinstance(env, gymnasium.Env)
    if made:
        env = make_environment(env)
    bare = env.unwrapped
    if not isinstance(bare.action_space, gymnasium.spaces.Discrete):
        raise RewardError(
            f"{bare} has actions {bare.action_space}; a tabular process needs discrete ones, compare from data with SampledStarc"
        )
    try:
        if hasattr(bare, "P"):
            table: Table = bare.P
            start = getattr(bare, "initial_state_distrib", None)
            initial = np.full(len(table), 1 / len(table)) if start is None else np.asarray(start, dtype=np.float64)
        else:
            table = enumerate_deterministic(bare)
            initial = np.eye(len(table))[0]
    finally:
        if made:
            env.close()
    return from_table(table, discount, initial)


def from_table(table: Table, discount: float, initial: np.ndarray[Any, Any]) -> tuple[TabularMDP, np.ndarray[Any, Any]]:
    """The process and the reward of a table `P[s][a] = [(p, s', r, terminated), ...]` and start distribution `initial [S]`."""
    states, actions = len(table), max(len(row) for row in table.values())
    rows = [
        (s, a, float(p), int(z), float(r), bool(end))
        for s, row in table.items()
        for a, outcomes in row.items()
        for p, z, r, end in outcomes
        if p > 0
    ]
    ends = {z for _, _, _, z, _, end in rows if end}
    split = sorted(ends & _entered_alive(rows, ends, initial))
    copy_of = {state: states + k for k, state in enumerate(split)}
    total = states + len(split)
    absorbing = [copy_of.get(state, state) for state in sorted(ends)]
    tau, reward = np.zeros((total, actions, total)), np.zeros((total, actions, total))
    for s, a, p, z, r, end in rows:
        z = copy_of.get(z, z) if end else z
        tau[s, a, z] += p
        reward[s, a, z] += p * r
    np.divide(reward, tau, out=reward, where=tau > 0)
    tau[absorbing], reward[absorbing] = 0.0, 0.0
    tau[absorbing, :, absorbing] = 1.0
    return TabularMDP(tau, discount, np.concatenate([initial, np.zeros(len(split))])), reward


def _entered_alive(
    rows: list[tuple[int, int, float, int, float, bool]], ends: set[int], initial: np.ndarray[Any, Any]
) -> set[int]:
    """The states that a run from the start enters, or starts in, without terminating."""
    moves: dict[int, set[int]] = {}
    for s, _, _, z, _, end in rows:
        if not end:
            moves.setdefault(s, set()).add(z)
    seen = {int(state) for state in np.flatnonzero(initial) if int(state) not in ends}
    queue = deque(seen)
    while queue:
        for z in moves.get(queue.popleft(), set()) - seen:
            seen.add(z)
            queue.append(z)
    return seen


def enumerate_deterministic(env: Any) -> Table:
    """The table of a deterministic environment, states numbered in the order a breadth-first search from `reset(seed=0)` meets them.

    Every step is taken four times with different random streams, and a state that is met again is stepped again, so that chance and hidden
    state are found out instead of averaged away: both raise `RewardError`.
    """
    first = env.action_space.start
    observation, _ = env.reset(seed=0)
    number: dict[Hashable, int] = {_key(observation): 0}
    table: Table = {}
    queue = deque([(0, copy.deepcopy(env), False)])
    checked: set[int] = set()
    streams = itertools.count()
    while queue:
        state, here, ended = queue.popleft()
        again = state in table
        if again and (ended or state in checked):
            continue
        row: dict[int, list[tuple[float, int, float, bool]]] = {}
        for action in range(int(env.action_space.n)):
            if ended:
                row[action] = [(1.0, state, 0.0, True)]
                continue
            outcomes = [_step(here, int(first) + action, next(streams)) for _ in range(_TRIALS)]
            there, key, reward, end = outcomes[0]
            if any(outcome[1:] != (key, reward, end) for outcome in outcomes):
                raise RewardError(
                    f"{env} is stochastic (state {state}, action {action}); compare rewards from data with SampledStarc"
                )
            if key not in number and len(number) >= _MAX_STATES:
                raise RewardError(
                    f"{env} has more than {_MAX_STATES} states; compare rewards from data with SampledStarc"
                )
            target = number.setdefault(key, len(number))
            row[action] = [(1.0, target, reward, end)]
            queue.append((target, there, end))
        if again:
            checked.add(state)
            if row != table[state]:
                raise RewardError(
                    f"{env} is not Markov in its observations (state {state}); add what is hidden to the observation"
                )
        else:
            table[state] = row
    return table


def _step(env: Any, action: int, stream: int) -> tuple[Any, Hashable, float, bool]:
    branch = copy.deepcopy(env)
    branch.np_random = np.random.default_rng(stream)
    observation, reward, terminated, _, _ = branch.step(action)
    return branch, _key(observation), float(reward), bool(terminated)


def _key(observation: Any) -> Hashable:
    """A hashable stand-in for an observation."""
    if isinstance(observation, dict):
        return tuple((name, _key(value)) for name, value in sorted(observation.items()))
    if isinstance(observation, tuple):
        return tuple(_key(value) for value in observation)
    array = np.asarray(observation)
    return (array.shape, array.tobytes())
