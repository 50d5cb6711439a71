"""Linear algebra of a finite decision process: expectations over next states and solves with I - gamma P, dense and sparse."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg as spla
import torch
from torch import Tensor

from rlkit2.errors import RewardError

# solve(right [..., S], adjoint) -> [..., S]
Solver = Callable[[Tensor, bool], Tensor]


class Dynamics(Protocol):
    """What the rest of the package needs from transition probabilities `tau[s, a, s']`."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def expected(self, reward: Any) -> Tensor:
        """`sum_s' tau[s, a, s'] R[..., s, a, s']`, `[..., S, A]`."""

    def next_mean(self, values: Tensor) -> Tensor:
        """`sum_s' tau[s, a, s'] V[..., s']`, `[..., S, A]`."""

    def solver(self, policy: Tensor, discount: float) -> Solver:
        """Solves with `I - discount P_pi` (or its transpose) for many right-hand sides."""


class DenseDynamics:
    """`tau` as a tensor `[S, A, S]` on any device."""

    def __init__(self, transitions: Tensor) -> None:
        self.transitions = transitions
        self.shape = (transitions.shape[0], transitions.shape[1])
        self.dtype = transitions.dtype
        self.device = transitions.device

    def expected(self, reward: Tensor) -> Tensor:
        mean: Tensor = torch.einsum("saz,...saz->...sa", self.transitions, reward)
        return mean

    def next_mean(self, values: Tensor) -> Tensor:
        return (values @ self.transitions.flatten(0, 1).mT).reshape(*values.shape[:-1], *self.shape)

    def solver(self, policy: Tensor, discount: float) -> Solver:
        system = -discount * torch.einsum("sa,saz->sz", policy, self.transitions)
        system.diagonal().add_(1.0)
        factor, pivots = torch.linalg.lu_factor(system)

        def solve(right: Tensor, adjoint: bool = False) -> Tensor:
            rows = right.reshape(-1, right.shape[-1])
            solved: Tensor = torch.linalg.lu_solve(factor, pivots, rows.mT, adjoint=adjoint)
            return solved.mT.reshape(right.shape)

        return solve

    def backups(self, actions: Tensor) -> Tensor:
        """`P[k, s, s']` of deterministic policies `actions [K, S]`."""
        return self.transitions[torch.arange(self.shape[0], device=self.device), actions]


class SparseDynamics:
    """`tau` as a CSR matrix `[S * A, S]`, float64 on the CPU; results carry no gradient."""

    dtype = torch.float64
    device = torch.device("cpu")

    def __init__(self, transitions: sp.csr_array) -> None:
        self.transitions = transitions
        states = transitions.shape[1]
        self.shape = (states, transitions.shape[0] // states)

    @cached_property
    def _pattern(self) -> sp.csr_array:
        pattern = self.transitions.copy()
        pattern.data = np.ones_like(pattern.data)
        return pattern

    def expected(self, reward: Any) -> Tensor:
        matrix = sp.csr_array(reward)
        outside = matrix - matrix.multiply(self._pattern)
        if outside.nnz and np.any(outside.data != 0):
            raise RewardError(
                "the sparse reward has entries on transitions of probability zero; keep its pattern inside that of the transitions"
            )
        return torch.from_numpy(np.asarray(matrix.multiply(self.transitions).sum(axis=1)).reshape(self.shape))

    def next_mean(self, values: Tensor) -> Tensor:
        rows = values.detach().double().numpy().reshape(-1, self.shape[0])
        return torch.from_numpy(np.ascontiguousarray((self.transitions @ rows.T).T)).reshape(
            *values.shape[:-1], *self.shape
        )

    def under(self, policy: Tensor) -> sp.csr_array:
        """`P_pi`, `[S, S]`."""
        states, actions = self.shape
        rows = np.repeat(np.arange(states), actions)
        columns = np.arange(states * actions)
        average = sp.csr_array(
            (policy.detach().double().numpy().ravel(), (rows, columns)), shape=(states, states * actions)
        )
        return sp.csr_array(average @ self.transitions)

    def solver(self, policy: Tensor, discount: float) -> Solver:
        system = sp.csr_array(sp.eye_array(self.shape[0]) - discount * self.under(policy))
        transposed = sp.csr_array(system.T)

        def solve(right: Tensor, adjoint: bool = False) -> Tensor:
            rows = right.detach().double().numpy().reshape(-1, self.shape[0])
            solved = np.stack([solve_sparse(transposed if adjoint else system, row) for row in rows])
            return torch.from_numpy(solved).reshape(right.shape)

        return solve


def solve_sparse(system: sp.csr_array, right: np.ndarray[Any, Any], tol: float = 1e-12) -> np.ndarray[Any, Any]:
    """Solve by BiCGSTAB with iterative refinement until `max |b - A x| <= tol max |b|`, or by sparse LU where that stalls.

    The condition number of `I - gamma P` is at most `(1 + gamma) / (1 - gamma)`, so few iterations do and no fill-in is needed.
    Raises `RewardError` if neither reaches 1000 times the tolerance.
    """
    target = tol * np.abs(right).max(initial=0.0)
    solution = np.zeros_like(right)
    residual = right
    for _ in range(8):
        if np.abs(residual).max(initial=0.0) <= target:
            return solution
        step, _ = spla.bicgstab(system, residual, rtol=1e-8, atol=0.0, maxiter=2000)
        if not np.isfinite(step).all() or np.abs(residual - system @ step).max() > 0.5 * np.abs(residual).max():
            break
        solution = solution + step
        residual = right - system @ solution
    factor = spla.splu(sp.csc_array(system))
    solution = factor.solve(right)
    solution += factor.solve(right - system @ solution)
    error = np.abs(right - system @ solution).max()
    if not error <= 1e3 * target:
        raise RewardError(
            f"the sparse value equations were solved only to a residual of {error:.1e}; lower the discount"
        )
    return solution
