"""Canonical forms of a reward: what is left of it when everything that no policy ordering depends on is taken out.

Rewards that differ by potential shaping `gamma Phi(s') - Phi(s)`, by redistribution over next states (a change with mean zero under the
dynamics) and by a positive factor order all policies alike (Skalse et al., "STARC", arXiv 2309.15257). A canonical form is linear in
the reward and equal for rewards that differ by the first two; dividing by a norm takes out the factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from rlkit2.errors import RewardError
from rlkit2.fields import Checked, Fraction
from rlkit2.guard import guarded
from rlkit2.rewards.arrays import Array, any_floating, give_back, result_dtype
from rlkit2.rewards.mdp import TabularMDP
from rlkit2.rewards.minimal import P, minimal, minimal_potential

Canonicalization: TypeAlias = Literal[
    "val", "val_potential", "minimal", "minimal_potential", "epic", "dard", "srrd", "none"
]
CANONICALIZATIONS: tuple[Canonicalization, ...] = get_args(Canonicalization)


@dataclass(frozen=True)
class Canonicalizer(Checked):
    """One canonicalisation with everything that must be the same for all rewards it is applied to.

    `kind`, `policy` (reference policy of the val forms, uniform if None), `p` (norm minimised by the minimal forms), `state_dist [S]`,
    `action_dist [A]` (coverage of EPIC, DARD and SRRD, uniform if None), `discount` (of these three, that of the process if None).
    """

    mdp: TabularMDP
    kind: Canonicalization = "val"
    policy: Any = None
    p: P = 2
    state_dist: Any = None
    action_dist: Any = None
    discount: Fraction | None = None

    @property
    def gamma(self) -> float:
        """The discount of the shaping that is taken out; another than that of the process only where no value equation is solved."""
        return self.mdp.discount if self.discount is None else self.discount

    @property
    def reduced(self) -> bool:
        """Whether the form depends on the reward through its mean over next states alone."""
        return self.kind in ("val", "minimal")

    @property
    def axes(self) -> int:
        """How many axes one form has: 2, `[S, A]`, where it does not depend on s', else 3, `[S, A, S']`."""
        return 2 if self.kind == "val" or (self.kind == "minimal" and self.p not in (1, 2)) else 3

    def __call__(self, reward: Any, name: str = "reward") -> Tensor:
        """The canonical form of `reward`: `[..., S, A]` where it does not depend on s', else `[..., S, A, S']`."""
        if self.reduced:
            return self.of_expected(self.mdp.expected_reward(reward, name))
        full = self.mdp.full_reward(reward, name)
        if self.kind == "val_potential":
            return self._shape(
                full, self.mdp.values(self.mdp.expected_reward(reward, name), self.mdp.policy(self.policy))
            )
        if self.kind == "minimal_potential":
            return minimal_potential(self.mdp, full, self.p)
        return self.of_full(full)

    def of_full(self, full: Tensor) -> Tensor:
        """The forms `epic`, `dard`, `srrd` and `none` of checked rewards `[..., S, A, S']`."""
        if self.kind == "epic":
            return self._epic(full)
        if self.kind == "srrd":
            return self._srrd(full)
        return self._dard(full) if self.kind == "dard" else full

    def of_expected(self, expected: Tensor) -> Tensor:
        """The form of a reward with means `r[..., s, a]` over next states, which is all that `val` and `minimal` depend on."""
        if self.kind == "minimal":
            return minimal(self.mdp, expected, self.p)
        # The advantage Q^pi - V^pi (STARC, value-adjusted levelling).
        values = self.mdp.values(expected, self.mdp.policy(self.policy))
        return expected + self.mdp.discount * self.mdp.dynamics.next_mean(values) - values[..., None]

    def _shape(self, reward: Tensor, potential: Tensor) -> Tensor:
        """`R + gamma Phi(s') - Phi(s)`."""
        return reward + self.gamma * potential[..., None, None, :] - potential[..., :, None, None]

    @cached_property
    def _coverage(self) -> tuple[Tensor, Tensor]:
        states, actions = self.mdp.num_states, self.mdp.num_actions
        uniform = self.mdp.uniform_policy.new_full
        state_dist = uniform((states,), 1 / states) if self.state_dist is None else self.state_dist
        action_dist = uniform((actions,), 1 / actions) if self.action_dist is None else self.action_dist
        return (
            self.mdp.distribution(state_dist, "state_dist", (states,)),
            self.mdp.distribution(action_dist, "action_dist", (actions,)),
        )

    @cached_property
    def _pairs(self) -> Tensor:
        states, actions = self._coverage
        return torch.outer(actions, states).flatten()

    def _epic(self, reward: Tensor) -> Tensor:
        """Gleave et al. 2021, arXiv 2006.13900, definition 4.1: S, S' ~ state_dist and A ~ action_dist, whatever the dynamics."""
        mean = reward.flatten(-2) @ self._pairs
        return reward + ((mean @ self._centred)[..., None, :] - mean[..., None])[..., None, :]

    @cached_property
    def _centred(self) -> Tensor:
        """`[S, S]`: potentials `m` to `gamma (m - E m)`."""
        states = self._coverage[0]
        return self.gamma * (torch.eye(len(states), dtype=states.dtype, device=states.device) - states[:, None])

    def _dard(self, reward: Tensor) -> Tensor:
        """Wulfe et al. 2022, arXiv 2201.10081, definition 3: next states from the dynamics, the same action A in all three terms."""
        _, actions = self._coverage
        tau = self.mdp.dense.transpose(0, 1)
        mean = self.mdp.dynamics.expected(reward) @ actions
        paired = tau @ reward.transpose(-3, -2) @ tau.mT
        offset = self.gamma * torch.einsum("a,...asz->...sz", actions, paired)
        return self._shape(reward, mean) - offset[..., :, None, :]

    def _srrd(self, reward: Tensor) -> Tensor:
        """Nyanhongo et al. 2025, arXiv 2504.11508, with full coverage: every expectation follows the dynamics under random
        actions, S_3 ~ state_dist; S_1, S_2, S_4 are next states of s', s, S_3 and S_5, S_6 of S_1, S_2."""
        states, actions = self._coverage
        step = torch.einsum("a,saz->sz", actions, self.mdp.dense)
        mean = torch.einsum("a,...saz->...sz", actions, reward)
        here = (step * mean).sum(-1)
        potential = here + self.gamma * (here @ step.mT)
        twice = step @ step
        # R(S_3, A, .) and R(S_4, A, .) as functions of the last state, averaged over two steps from s and from s'.
        start = torch.einsum("x,...xy->...y", states, mean) @ twice.mT
        after = torch.einsum("x,...xy->...y", states @ step, mean) @ twice.mT
        discount = self.gamma
        offset = discount * (here @ states)
        shaped = self._shape(reward, potential) + discount * start[..., :, None, None]
        return shaped - discount**2 * after[..., None, None, :] - offset[..., None, None, None]


def common_process(mdp: TabularMDP, *rewards: Any) -> TabularMDP:
    """`mdp` in the wider of its own and the rewards' dtype, in which all is computed."""
    if not isinstance(mdp, TabularMDP):
        raise RewardError(f"mdp is a {type(mdp).__name__}; build TabularMDP(transitions, discount) first")
    wider = any_floating(*rewards) and result_dtype(*rewards) == torch.float64
    return mdp.to(torch.float64) if wider else mdp


@guarded(RewardError)
def canonicalize(
    reward: Array,
    mdp: TabularMDP,
    kind: Canonicalization = "val",
    *,
    policy: Array | None = None,
    p: P = 2,
    state_dist: Array | None = None,
    action_dist: Array | None = None,
) -> Any:
    """The canonical form of a reward, as the kind of array given.

    Args:
        reward: `[S, A, S']`, `[S, A]`, `[S]`, or a batch `[K, S, A, S']`.
        mdp: dynamics and discount.
        kind: `val` (advantage of the reference policy) and `minimal` are invariant to shaping and redistribution; `val_potential`,
            `minimal_potential`, `epic`, `dard`, `srrd` to shaping alone; `none` is the reward itself. `dard` and `srrd` do not keep the
            policy ordering.
        policy: reference policy `[S, A]` of the val forms; uniform when left out. It must not depend on the reward.
        p: the norm that the minimal forms minimise, 1, 2, "inf", "weighted_1" or "weighted_2" (weighted by the transition
            probabilities). Only 2 and "weighted_2" have unique minimisers that are linear in the reward.
        state_dist, action_dist: coverage `[S]`, `[A]` of `epic`, `dard` and `srrd`; uniform when left out.

    Returns:
        `[..., S, A]` for `val` and for `minimal` with p "inf", "weighted_1", "weighted_2" (constant in s'), else `[..., S, A, S']`.

    Raises:
        ConfigError: unknown kind or p. RewardError: arrays that do not fit the process.
    """
    mdp = common_process(mdp, reward)
    form = Canonicalizer(mdp, kind, policy, p, state_dist, action_dist)(reward)
    return give_back(form, _floating(reward, mdp))


def _floating(reward: Any, mdp: TabularMDP) -> Any:
    """What decides the kind of the results: the reward, with the dtype of the process where the reward is of integers."""
    return reward if any_floating(reward) else mdp.uniform_policy.cpu().numpy()
