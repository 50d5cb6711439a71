"""Ground truth for reward distances: what can be lost under one reward by optimising another, and certificates that bound it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
import scipy.sparse as sp
import torch
from scipy.optimize import linprog
from torch import Tensor

from rlkit2.errors import ConfigError, RewardError
from rlkit2.guard import guarded
from rlkit2.rewards.arrays import Array, Scalar, any_floating, give_back, power_of_two, result_dtype
from rlkit2.rewards.canonical import Canonicalizer
from rlkit2.rewards.mdp import TabularMDP
from rlkit2.rewards.norms import Norm, NormName, rounding, standardized, warn_trivial
from rlkit2.rewards.planning import expected_one, optimal_actions


@dataclass(frozen=True)
class _Pair:
    """Two rewards, scaled to about 1, as advantages of the uniform policy (same returns up to a constant), with ranges of returns; float64.

    `exact`: whether a trivial one is exactly so, and not by the threshold; `slack`: how far rounding alone may move each of the forms divided
    by their ranges, in the range norm.
    """

    mdp: TabularMDP
    forms: Tensor
    ranges: Tensor
    trivial: tuple[bool, bool]
    exact: tuple[bool, bool]
    slack: tuple[float, float]

    @classmethod
    def of(cls, true: Array, proxy: Array, mdp: TabularMDP) -> _Pair:
        given = mdp.dtype
        mdp = mdp.to(torch.float64)
        canonical = Canonicalizer(mdp)
        forms, sizes, errors = [], [], []
        for reward, name in ((true, "true"), (proxy, "proxy")):
            expected, size = expected_one(mdp, reward, name), mdp.expected_size(reward, name)
            power = power_of_two(size)
            forms.append(canonical(expected / power).detach())
            sizes.append(size / power)
            errors.append(rounding(result_dtype(reward) if any_floating(reward) else given, mdp.discount))
        both, size, error = torch.stack(forms), torch.stack(sizes), torch.tensor(errors, dtype=torch.float64)
        _, ranges, trivial = standardized(both, 2, Norm("range", mdp), size, error)
        warn_trivial(both, 2, ranges, size, trivial, ("true", "proxy"))
        exact = both.abs().amax((1, 2)) == 0
        # An error e of a form moves a range of returns by at most 2 e / (1 - discount).
        slack = 4 * rounding(torch.float64, mdp.discount) * size / ((1 - mdp.discount) * ranges)
        return cls(mdp, both, ranges, _pair(trivial), _pair(exact), (float(slack[0]), float(slack[1])))

    @property
    def standard(self) -> Tensor:
        """Both forms divided by their ranges, `[2, S, A]`."""
        return self.forms / self.ranges[:, None, None]

    def extremes(self, reward: Tensor) -> Tensor:
        """`eta_best - eta_worst` for `r [S, A]`: the occupancies of its best and its worst policy."""
        best, worst = optimal_actions(self.mdp, torch.stack([reward, -reward]))
        return self.mdp.occupancy(self.mdp.policy(best)) - self.mdp.occupancy(self.mdp.policy(worst))


def _pair(flags: Tensor) -> tuple[bool, bool]:
    first, second = flags.tolist()
    return first, second


@guarded(RewardError)
def regret(true: Array, proxy: Array, mdp: TabularMDP) -> Scalar:
    """What the policy that is optimal for `proxy` loses under `true`, as a share of the range of returns, in [0, 1].

    `(J(pi_true) - J(pi_proxy)) / (J_max - J_min)` with the lowest-index optimal policy of the proxy; where several are optimal the
    value depends on that choice, `worst_case_regret` does not. NaN when either reward is trivial.
    """
    pair = _Pair.of(true, proxy, mdp)
    if any(pair.trivial):
        return give_back(torch.tensor(math.nan, dtype=torch.float64), true, proxy)  # type: ignore[no-any-return]
    best, chosen = optimal_actions(pair.mdp, pair.forms)
    gap = pair.mdp.occupancy(pair.mdp.policy(best)) - pair.mdp.occupancy(pair.mdp.policy(chosen))
    lost = (gap * pair.forms[0]).sum() / pair.ranges[0]
    return give_back(lost.clamp(0, 1), true, proxy)  # type: ignore[no-any-return]


@overload
def worst_case_regret(true: Array, proxy: Array, mdp: TabularMDP, method: Literal["dual"] = "dual") -> Scalar: ...
@overload
def worst_case_regret(true: Array, proxy: Array, mdp: TabularMDP, method: Literal["lp"]) -> tuple[Scalar, Any, Any]: ...
@guarded(RewardError)
def worst_case_regret(true: Array, proxy: Array, mdp: TabularMDP, method: str = "dual") -> Any:
    """The most that can be lost under `true` by a change of policy that `proxy` does not disapprove of, as a share of the range, in [0, 1].

    `max J_true(pi_1) - J_true(pi_2)` over all pairs of policies with `J_proxy(pi_2) >= J_proxy(pi_1)`. With both rewards divided by their
    ranges of returns, linear programming duality makes it `min over lambda >= 0 of range(s_true - lambda s_proxy)`, a convex piecewise
    linear function of one number that is minimised exactly by intersecting its lines, two planner calls each.

    `method="lp"` solves the linear programme over occupancies instead (dense dynamics, small S) and returns
    `(value, eta_1, eta_2)`, the occupancies `[S, A]` that attain it. NaN when `true` is trivial, 1 when only `proxy` is.

    Raises `ConfigError` for another method, `RewardError` for arrays that do not fit.
    """
    if method not in ("dual", "lp"):
        raise ConfigError(f"method {method!r} is unknown; choose 'dual' or 'lp'")
    pair = _Pair.of(true, proxy, mdp)
    if method == "lp":
        return tuple(give_back(torch.as_tensor(part, dtype=torch.float64), true, proxy) for part in _programme(pair))
    value = math.nan if pair.trivial[0] else 1.0 if pair.trivial[1] else _dual(pair)
    return give_back(torch.tensor(value, dtype=torch.float64), true, proxy)


def _dual(pair: _Pair) -> float:
    """`min over lambda in [0, 2] of range(s_1 - lambda s_2)` by Kelley's cutting planes, finite in one dimension."""
    first, second = pair.standard

    def line(multiplier: float) -> tuple[float, float]:
        """Value at `multiplier` and slope there."""
        gap = pair.extremes(first - multiplier * second)
        slope = -float((gap * second).sum())
        return float((gap * first).sum()) + multiplier * slope, slope

    left, right = 0.0, 2.0
    (left_value, left_slope), (right_value, right_slope) = line(left), line(right)
    if left_slope >= 0:
        return min(left_value, 1.0)
    best = min(left_value, right_value)
    while right_slope > 0 and right_slope - left_slope > 1e-15:
        middle = (left_value - right_value + right_slope * right - left_slope * left) / (right_slope - left_slope)
        floor = left_value + left_slope * (middle - left)
        if not left < middle < right or best - floor <= 1e-13:
            break
        value, slope = line(middle)
        best = min(best, value)
        if value - floor <= 1e-13:
            break
        if slope < 0:
            left, left_value, left_slope = middle, value, slope
        else:
            right, right_value, right_slope = middle, value, slope
    return min(max(best, 0.0), 1.0)


def _programme(pair: _Pair) -> tuple[float, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The linear programme over two occupancies, scaled to sum to one; returns them on their own scale."""
    mdp = pair.mdp
    states, actions, discount = mdp.num_states, mdp.num_actions, mdp.discount
    shape, scale = (states, actions), 1 - discount
    if pair.trivial[0]:
        return math.nan, np.full(shape, math.nan), np.full(shape, math.nan)
    first = pair.standard[0].cpu().numpy().ravel() / scale
    second = np.zeros_like(first) if pair.trivial[1] else pair.standard[1].cpu().numpy().ravel() / scale
    flow = (
        sp.kron(sp.eye_array(states), np.ones((1, actions)))
        - discount * sp.csr_array(mdp.dense.cpu().numpy().reshape(-1, states)).T
    )
    start = scale * mdp.initial_distribution.cpu().numpy()
    result = linprog(
        np.r_[-first, first],
        A_ub=np.r_[second, -second][None],
        b_ub=[0.0],
        A_eq=sp.block_diag([flow, flow], format="csr"),
        b_eq=np.r_[start, start],
        method="highs",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    if result.x is None or result.fun is None:
        raise RewardError(f"the linear programme of the worst-case regret failed ({result.message}); use method='dual'")
    eta = (result.x / scale).reshape(2, *shape)
    return min(max(-float(result.fun), 0.0), 1.0), eta[0], eta[1]


@dataclass(frozen=True)
class RegretBound:
    """A certificate: no change of policy that the proxy approves of loses more than `upper` of the true range of returns.

    `lower` is attained by some such change (0 where none is known), `distance` the distance the bound rests on, `constant` the factor
    in `upper = constant * distance`, `kind` the norm. Print it.
    """

    kind: str
    distance: float
    constant: float
    upper: float
    lower: float

    def __str__(self) -> str:
        known = f", and some change loses at least {self.lower:.4g}" if self.lower > 0 else ""
        void = " (no information: a share never exceeds 1)" if self.upper >= 1 else ""
        return (
            f"{self.kind} distance {self.distance:.4g}: whatever change of policy the proxy approves of, at most "
            f"{self.constant:.4g} x {self.distance:.4g} = {self.upper:.4g} of the true range of returns is lost{void}{known}"
        )


@guarded(RewardError)
def regret_bound(
    true: Array,
    proxy: Array,
    mdp: TabularMDP,
    *,
    norm: NormName = "range",
    policy: Array | None = None,
    policies: tuple[Array, Array] | None = None,
) -> RegretBound:
    """Bound the worst-case regret by a distance, with the constant spelled out.

    `norm="range"` (range-normalised, range distance d): `d / 2 <= worst-case regret <= d` in every process. `norm` "l1", "l2", "linf":
    `n(c_1) / range_1 * ||eta_1 - eta_2||_dual * d` on the val forms over (s, a) under the reference `policy`, where the difference of
    occupancies is bounded by 1 / (1 - gamma), sqrt(2) / (1 - gamma) and 2 / (1 - gamma) in the dual norm, or computed where
    the two `policies` to compare are given (the proxy must approve of moving from the first to the second).

    Bounds allow for the rounding of both rewards; of a proxy that only the threshold makes trivial nothing is promised.

    Raises `RewardError` when the true reward is trivial (there is no range to lose a share of) or when the proxy disapproves of the
    given policies, `ConfigError` for another norm.
    """
    if norm not in ("range", "l1", "l2", "linf"):
        raise ConfigError(f"norm {norm!r} has no certificate; choose 'range', 'l1', 'l2' or 'linf'")
    pair = _Pair.of(true, proxy, mdp)
    if pair.trivial[0]:
        raise RewardError("true is a trivial reward: all policies have the same return, there is nothing to lose")
    process = pair.mdp
    if norm == "range":
        first = pair.standard[0]
        second = torch.zeros_like(first) if pair.trivial[1] else pair.standard[1]
        distance = float(Norm("range", process)(first - second, 2))
        unknown = pair.trivial[1] and not pair.exact[1]
        slack = pair.slack[0] + (0.0 if pair.trivial[1] else pair.slack[1])
        lower = 0.0 if unknown else max(0.0, distance - slack) / 2
        return RegretBound("range/range", distance, 1.0, distance + slack, lower)
    order = {"l1": 1.0, "l2": 2.0, "linf": math.inf}[norm]
    forms = Canonicalizer(process, policy=policy)(pair.forms[0]), Canonicalizer(process, policy=policy)(pair.forms[1])
    sizes = [float(torch.linalg.vector_norm(form.flatten(), order)) for form in forms]
    second = torch.zeros_like(forms[1]) if pair.trivial[1] else forms[1] / sizes[1]
    distance = float(torch.linalg.vector_norm((forms[0] / sizes[0] - second).flatten(), order))
    if policies is None:
        spread = {"l1": 1.0, "l2": math.sqrt(2), "linf": 2.0}[norm] / (1 - process.discount)
    else:
        gap = process.occupancy(process.policy(policies[0])) - process.occupancy(process.policy(policies[1]))
        if float((gap * pair.forms[1]).sum()) > 1e-12 * float(pair.ranges[1]):
            raise RewardError("the proxy prefers the first of the two policies; give them in the order it approves of")
        dual = {"l1": math.inf, "l2": 2.0, "linf": 1.0}[norm]
        spread = float(torch.linalg.vector_norm(gap.flatten(), dual))
    constant = sizes[0] / float(pair.ranges[0]) * spread
    slack = pair.slack[0] + (0.0 if pair.trivial[1] else pair.slack[1])
    return RegretBound(f"val {norm}/{norm}", distance, constant, constant * distance + slack, 0.0)
