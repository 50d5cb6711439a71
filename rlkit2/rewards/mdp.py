"""`TabularMDP`: finite dynamics, a discount and a start, checked once, with the value equations factored once per policy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import breadth_first_order
from torch import Tensor

from rlkit2.errors import ConfigError, RewardError
from rlkit2.guard import guarded
from rlkit2.rewards.arrays import Array, give_back, sparse_matrix, to_float, to_tensor
from rlkit2.rewards.dynamics import DenseDynamics, SparseDynamics

_FACTORS_KEPT = 8
_DENSE_BELOW = 512  # sparse dynamics with fewer states are solved densely


class RewardWarning(UserWarning):
    """Something about rewards or their process that moves the numbers and that their owner should know."""


class TabularMDP:
    """A finite decision process without its reward.

    Args:
        transitions: probabilities `tau[s, a, s']`, an array `[S, A, S]` or a scipy sparse matrix `[S * A, S]` (row `s * A + a`).
        discount: `0 <= discount < 1`.
        initial_distribution: `mu0 [S]`; uniform when left out.

    Rewards given to the functions of this package are arrays `[S, A, S']`, `[S, A]` or `[S]` (broadcast), with one leading axis
    in front of `[S, A, S']` where several are meant, or sparse `[S * A, S]` on the pattern of sparse transitions. Rows are divided
    by their sums, so that the rounding of stored probabilities does not leak into the results.

    Raises `RewardError` with the first offending index for rows that do not sum to one, negative or non-finite probabilities and
    wrong shapes, `ConfigError` for a discount outside [0, 1).
    """

    @guarded(RewardError)
    def __init__(self, transitions: Any, discount: float, initial_distribution: Array | None = None) -> None:
        self.discount = float(discount)
        if not (math.isfinite(self.discount) and 0.0 <= self.discount < 1.0):
            raise ConfigError(
                f"discount is {discount}; it must be at least 0 and below 1 (EPIC alone also takes 1: epic_distance(..., discount=1))"
            )
        self.sparse = sp.issparse(transitions)
        if self.sparse:
            matrix = _checked_sparse(transitions)
            self.num_states, self.num_actions = matrix.shape[1], matrix.shape[0] // matrix.shape[1]
            dense = torch.from_numpy(matrix.toarray()) if self.num_states < _DENSE_BELOW else None
        else:
            dense = _checked_dense(transitions)
            self.num_states, self.num_actions = dense.shape[0], dense.shape[1]
        if dense is None:
            self.dynamics: DenseDynamics | SparseDynamics = SparseDynamics(matrix)
        else:
            self.dynamics = DenseDynamics(dense.reshape(self.num_states, self.num_actions, self.num_states))
            self.sparse = False
        self.dtype, self.device = self.dynamics.dtype, self.dynamics.device
        if initial_distribution is None:
            initial_distribution = torch.full((self.num_states,), 1 / self.num_states, dtype=self.dtype)
        self.initial_distribution = self.distribution(initial_distribution, "initial_distribution", (self.num_states,))
        self._solvers: dict[bytes, Callable[[Tensor, bool], Tensor]] = {}
        self._casts: dict[torch.dtype, TabularMDP] = {self.dtype: self}
        self._warned = False
        self.baselines: dict[Hashable, Any] = {}  # metrics on it that are asked for again and again

    def __repr__(self) -> str:
        kind = "sparse" if self.sparse else "dense"
        return f"TabularMDP({self.num_states} states, {self.num_actions} actions, discount {self.discount:g}, {kind})"

    @classmethod
    def from_gym(cls, env: Any, discount: float) -> tuple[TabularMDP, np.ndarray[Any, Any]]:
        """The dynamics and the reward `[S, A, S']` of a Gymnasium environment or id; see `rlkit2.rewards.gym.from_gym`."""
        from rlkit2.rewards.gym import from_gym

        return from_gym(env, discount)

    @property
    def transitions(self) -> Any:
        """`tau`, a tensor `[S, A, S]`, or a CSR matrix `[S * A, S]` when sparse."""
        return self.dynamics.transitions

    @property
    def dense(self) -> Tensor:
        """`tau [S, A, S]`; raises `RewardError` for sparse dynamics, where only forms over (s, a) can be computed."""
        if isinstance(self.dynamics, SparseDynamics):
            raise RewardError(f"{self!r} has no dense transitions; use canonicalization 'val', which needs none")
        return self.dynamics.transitions

    @cached_property
    def uniform_policy(self) -> Tensor:
        """`[S, A]`."""
        return torch.full(
            (self.num_states, self.num_actions), 1 / self.num_actions, dtype=self.dtype, device=self.device
        )

    @cached_property
    def reachable(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which states some policy can reach from the start, bool `[S]`; rewards elsewhere move distances but never a return."""
        states, actions = self.num_states, self.num_actions
        if isinstance(self.dynamics, SparseDynamics):
            moves = sp.coo_array(self.dynamics.transitions)
            pairs = np.stack([moves.row[moves.data > 0] // actions, moves.col[moves.data > 0]])
        else:
            pairs = (self.dynamics.transitions > 0).any(1).nonzero().cpu().numpy().T
        starts = np.flatnonzero(self.initial_distribution.cpu().numpy() > 0)
        rows = np.concatenate([pairs[0], np.full(len(starts), states)])
        columns = np.concatenate([pairs[1], starts])
        graph = sp.csr_array((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(states + 1, states + 1))
        mask = np.zeros(states + 1, dtype=bool)
        mask[breadth_first_order(graph, states, return_predecessors=False)] = True
        return mask[:states]

    @cached_property
    def reachable_part(self) -> TabularMDP:
        """The process on the states that can be reached from the start."""
        kept = self._reachable_states
        if len(kept) == self.num_states:
            return self
        start = self.initial_distribution[kept]
        if isinstance(self.dynamics, SparseDynamics):
            return TabularMDP(self._cut_sparse(self.dynamics.transitions), self.discount, start)
        return TabularMDP(self.dense.index_select(0, kept).index_select(2, kept), self.discount, start)

    def _cut_sparse(self, matrix: sp.csr_array) -> sp.csr_array:
        """The rows `s * A + a` and columns of the states that can be reached, of a matrix `[S * A, S]`."""
        kept = self._reachable_states.numpy()
        pairs = (kept[:, None] * self.num_actions + np.arange(self.num_actions)).ravel()
        return sp.csr_array(matrix[pairs][:, kept])

    @cached_property
    def _reachable_states(self) -> Tensor:
        return torch.from_numpy(np.flatnonzero(self.reachable)).to(self.device)

    def cut(self, values: Any) -> Any:
        """A reward, weights (`[..., S, A, S']`, `[S, A]` or `[S]`) or a policy on the states of `reachable_part`."""
        matrix = sparse_matrix(values)
        if matrix is not None:
            return self._cut_sparse(matrix)
        tensor = to_tensor(values, "values")
        kept = self._reachable_states.to(tensor.device)
        axis = max(tensor.ndim - 3, 0)
        if self.num_states not in (tensor.shape[axis : axis + 1] or (0,)):
            raise RewardError(f"an array of shape {list(tensor.shape)} does not fit {self!r}")
        tensor = tensor.index_select(axis, kept)
        return give_back(tensor.index_select(-1, kept) if tensor.ndim >= 3 else tensor, values)

    def cut_reward(self, reward: Any) -> Any:
        """A reward, checked, on the states of `reachable_part`."""
        return self.cut(reward if sparse_matrix(reward) is not None else self.reward(reward))

    def restrict_to_reachable(self, *rewards: Any) -> tuple[TabularMDP, tuple[Any, ...]]:
        """The process and the rewards (`[..., S, A, S']`, `[S, A]` or `[S]`) on the states that can be reached from the start."""
        return self.reachable_part, tuple(self.cut_reward(reward) for reward in rewards)

    def unreachable_note(self) -> str | None:
        """One line about states that no policy reaches from the start, None where there are none."""
        states = np.flatnonzero(~self.reachable).tolist()
        if not states:
            return None
        named = ", ".join(map(str, states[:8])) + (", ..." if len(states) > 8 else "")
        return (
            f"{len(states)} of {self.num_states} states cannot be reached from the start ({named}): what rewards say there moves "
            "distances, never a return; restrict_to_reachable=True leaves them out"
        )

    def warn_unreachable(self) -> None:
        """Warn with `unreachable_note`, once per process."""
        if not self._warned:
            self._warned = True
            note = self.unreachable_note()
            if note:
                warnings.warn(note, RewardWarning, stacklevel=4)

    def to(self, target: torch.dtype | torch.device | str) -> TabularMDP:
        """The same process in another floating dtype (kept for the next call) or on another device."""
        if isinstance(target, torch.dtype):
            if target not in self._casts and not self.sparse:
                self._casts[target] = TabularMDP(
                    self.dense.to(target), self.discount, self.initial_distribution.to(target)
                )
            return self._casts.get(target, self)
        return (
            TabularMDP(self.dense.to(target), self.discount, self.initial_distribution.to(target))
            if not self.sparse
            else self
        )

    def distribution(self, values: Any, name: str, shape: tuple[int, ...]) -> Tensor:
        """`values` checked to be distributions over the last axis of `shape`, in the dtype and on the device of the process."""
        tensor = to_float(values, name, self.dtype)
        if tensor.shape != shape:
            raise RewardError(f"{name} has shape {list(tensor.shape)}; the process needs {list(shape)}")
        _check_rows(tensor, name)
        tensor = tensor.to(device=self.device, dtype=self.dtype)
        return tensor / tensor.sum(-1, keepdim=True)

    def policy(self, policy: Array | None) -> Tensor:
        """A policy as probabilities `[S, A]`: None is uniform, integers `[S]` are one action per state.

        Raises `RewardError` for rows that are not distributions, wrong shapes and actions that do not exist.
        """
        if policy is None:
            return self.uniform_policy
        tensor = to_tensor(policy, "policy")
        if tensor.ndim == 1 and not tensor.is_floating_point():
            if len(tensor) != self.num_states:
                raise RewardError(f"policy has {len(tensor)} entries; the process has {self.num_states} states")
            if bool(((tensor < 0) | (tensor >= self.num_actions)).any()):
                index = int(((tensor < 0) | (tensor >= self.num_actions)).nonzero()[0])
                raise RewardError(
                    f"policy[{index}] is {int(tensor[index])}; actions run from 0 to {self.num_actions - 1}"
                )
            return torch.nn.functional.one_hot(tensor.long(), self.num_actions).to(device=self.device, dtype=self.dtype)
        return self.distribution(policy, "policy", (self.num_states, self.num_actions))

    def reward(self, reward: Any, name: str = "reward", *, finite: bool = True) -> Tensor:
        """`reward` as a tensor `[..., S, A, S']`, `[S, A]` or `[S]` of the dtype of the process, found to be finite unless told not to look.

        Raises `RewardError` otherwise.
        """
        states, actions = self.num_states, self.num_actions
        matrix = sparse_matrix(reward)
        if matrix is not None:
            reward = matrix.toarray().reshape(states, actions, states)
        tensor = to_float(reward, name, self.dtype, finite=finite).to(device=self.device, dtype=self.dtype)
        full = (states, actions, states)
        if tensor.shape in ((states,), (states, actions)) or tensor.shape[-3:] == full:
            return tensor
        raise RewardError(
            f"{name} has shape {list(tensor.shape)}; give {list(full)}, {list(full[:2])} or {list(full[:1])}"
        )

    def full_reward(self, reward: Any, name: str = "reward", *, finite: bool = True) -> Tensor:
        """`reward` broadcast to `[..., S, A, S']` (a view); raises `RewardError` for sparse dynamics, where that would not fit."""
        if self.sparse:
            raise RewardError(f"{self!r} is too large for rewards over all (s, a, s'); use canonicalization 'val'")
        tensor = self.reward(reward, name, finite=finite)
        if tensor.ndim < 3:
            tensor = tensor.reshape(*tensor.shape, *[1] * (3 - tensor.ndim))
            tensor = tensor.expand(self.num_states, self.num_actions, self.num_states)
        return tensor

    def expected_reward(self, reward: Any, name: str = "reward") -> Tensor:
        """`r[..., s, a] = sum_s' tau R`, `[..., S, A]`."""
        matrix = sparse_matrix(reward)
        if matrix is not None and isinstance(self.dynamics, SparseDynamics):
            if matrix.shape != self.dynamics.transitions.shape or not np.isfinite(matrix.data).all():
                raise RewardError(f"{name} needs shape {list(self.dynamics.transitions.shape)} and finite values")
            return self.dynamics.expected(matrix)
        tensor = self.reward(reward, name)
        if tensor.ndim >= 3:
            if isinstance(self.dynamics, DenseDynamics):
                return self.dynamics.expected(tensor)
            return self.dynamics.expected(sp.csr_array(tensor.reshape(-1, self.num_states).numpy()))
        return tensor if tensor.ndim == 2 else tensor[:, None].expand(self.num_states, self.num_actions)

    def expected_size(self, reward: Any, name: str = "reward") -> Tensor:
        """`max_sa sum_s' tau |R|`, `[...]`: how large a reward is where it can be had."""
        matrix = sparse_matrix(reward)
        size = abs(matrix) if matrix is not None else self.reward(reward, name).detach().abs()
        return self.expected_reward(size, name).amax((-2, -1))

    def values(self, expected_reward: Tensor, policy: Tensor) -> Tensor:
        """`V^pi = (I - gamma P_pi)^-1 (pi . r)` for `r [..., S, A]`: `[..., S]`."""
        return self._solver(policy)((policy * expected_reward).sum(-1), False)

    def occupancy(self, policy: Tensor) -> Tensor:
        """`eta[s, a] = sum_t gamma^t Pr(s, a)` from the start under `policy`, `[S, A]`, summing to 1 / (1 - gamma)."""
        return self._solver(policy)(self.initial_distribution, True)[:, None] * policy

    def _solver(self, policy: Tensor) -> Callable[[Tensor, bool], Tensor]:
        key = policy.detach().cpu().numpy().tobytes()
        if key not in self._solvers:
            while len(self._solvers) >= _FACTORS_KEPT:
                self._solvers.pop(next(iter(self._solvers)))
            self._solvers[key] = self.dynamics.solver(policy.detach(), self.discount)
        return self._solvers[key]


def _check_rows(tensor: Tensor, name: str) -> None:
    """Raise `RewardError` unless the last axis holds distributions."""
    if bool((tensor < 0).any()):
        index = (tensor < 0).nonzero()[0].tolist()
        raise RewardError(f"{name}{index} is {float(tensor[tuple(index)]):g}; probabilities cannot be negative")
    wrong = (tensor.sum(-1) - 1).abs() > (1e-4 if tensor.dtype == torch.float32 else 1e-6)
    if bool(wrong.any()):
        index = wrong.nonzero()[0].tolist() if tensor.ndim > 1 else []
        total = float(tensor[tuple(index)].sum())
        raise RewardError(
            f"{name}{index or ''} sums to {total:.9g}; probabilities must sum to 1, divide the row by its sum"
        )


def _checked_dense(transitions: Any) -> Tensor:
    tensor = to_float(transitions, "transitions").detach()
    if tensor.ndim != 3 or tensor.shape[0] != tensor.shape[2] or 0 in tensor.shape:
        raise RewardError(
            f"transitions has shape {list(tensor.shape)}; give [S, A, S] with at least one state and action"
        )
    _check_rows(tensor, "transitions")
    return tensor / tensor.sum(-1, keepdim=True)


def _checked_sparse(transitions: Any) -> sp.csr_array:
    matrix = sp.csr_array(transitions, dtype=np.float64, copy=True)
    if matrix.shape[1] == 0 or matrix.shape[0] == 0 or matrix.shape[0] % matrix.shape[1]:
        raise RewardError(f"sparse transitions have shape {list(matrix.shape)}; give [S * A, S] with row s * A + a")
    actions = matrix.shape[0] // matrix.shape[1]
    bad = np.flatnonzero(~(np.isfinite(matrix.data) & (matrix.data >= 0)))
    if len(bad):
        row = int(np.searchsorted(matrix.indptr, bad[0], side="right") - 1)
        index = [row // actions, row % actions, int(matrix.indices[bad[0]])]
        raise RewardError(
            f"transitions{index} is {matrix.data[bad[0]]:g}; probabilities must be finite and not negative"
        )
    sums = np.asarray(matrix.sum(axis=1)).ravel()
    wrong = np.flatnonzero(np.abs(sums - 1) > 1e-6)
    if len(wrong):
        index = [int(wrong[0]) // actions, int(wrong[0]) % actions]
        raise RewardError(
            f"transitions{index} sums to {sums[wrong[0]]:.9g}; probabilities must sum to 1, divide the row by its sum"
        )
    matrix.data /= np.repeat(sums, np.diff(matrix.indptr))
    matrix.eliminate_zeros()
    return matrix
