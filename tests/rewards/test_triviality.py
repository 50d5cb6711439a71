"""Rewards of any size, with anything where nothing happens and any potential: distances stay right, or a warning says what was decided."""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit2.errors import ConfigError
from rlkit2.rewards import (
    RewardWarning,
    TabularMDP,
    batched_starc_distance,
    epic_distance,
    minimal_norm,
    regret,
    regret_bound,
    starc_distance,
    starc_matrix,
    worst_case_regret,
)
from rlkit2.rewards.distances import MetricArguments, MetricOptions

Array = np.ndarray[Any, Any]
REDUCED = (
    {},
    {"canonicalization": "minimal"},
    {"norm": "l1", "distance": "l1"},
    {"norm": "range", "distance": "range"},
)


def deterministic(seed: int, dtype: Any = np.float64) -> tuple[TabularMDP, np.random.Generator]:
    """A process in which most transitions are impossible."""
    rng = np.random.default_rng(seed)
    states, actions = int(rng.integers(3, 9)), int(rng.integers(2, 4))
    tau = np.zeros((states, actions, states))
    for s in range(states):
        for a in range(actions):
            chosen = rng.choice(states, size=int(rng.integers(1, 3)), replace=False)
            tau[s, a, chosen] = rng.dirichlet(np.ones(len(chosen)))
    return TabularMDP(tau.astype(dtype), float(rng.choice([0.5, 0.9, 0.99])), np.full(states, 1 / states)), rng


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(st.integers(0, 10**6), st.floats(0, 30))
@settings(max_examples=25)
def test_what_cannot_happen_counts_for_nothing(dtype: Any, seed: int, log_size: float) -> None:
    mdp, rng = deterministic(seed, dtype)
    shape = (mdp.num_states, mdp.num_actions, mdp.num_states)
    means = rng.normal(size=shape[:2])
    impossible = np.where(mdp.dense.numpy() > 0, 0.0, rng.normal(size=shape) * 10.0**log_size)
    a, b = (means[..., None] + impossible).astype(dtype), (-means[..., None] + impossible).astype(dtype)
    for choices in REDUCED:
        assert starc_distance(a, b, mdp, **choices) == pytest.approx(2, abs=2e-2 if dtype == np.float32 else 1e-9)  # type: ignore[arg-type]
    together = batched_starc_distance(torch.from_numpy(a), torch.from_numpy(b), mdp.dense, mdp.discount)
    assert float(together) == pytest.approx(2, abs=2e-2 if dtype == np.float32 else 1e-9)
    plain = means.astype(dtype)
    bound = regret_bound(plain, a, mdp)
    assert bound.lower - 1e-9 <= worst_case_regret(plain, a, mdp) <= bound.upper + 1e-9
    assert worst_case_regret(plain, b, mdp) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(st.integers(0, 10**6), st.floats(-1, 14))
@settings(max_examples=40)
def test_a_potential_changes_nothing_or_a_warning_says_so(dtype: Any, seed: int, log_size: float) -> None:
    """Whatever the potential: the distance is right, or the reward is drowned in rounding, which is said; no certificate is false."""
    mdp, rng = deterministic(seed, dtype)
    reward = rng.normal(size=(mdp.num_states, mdp.num_actions))
    phi = rng.normal(size=mdp.num_states) * 10.0**log_size
    shaped = (2 * reward[..., None] + mdp.discount * phi[None, None] - phi[:, None, None]).astype(dtype)
    plain = reward.astype(dtype)
    form = np.abs(starc_rounding(shaped, mdp, dtype))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = starc_distance(plain, shaped, mdp)
    if any("reward_b is taken to be trivial" in str(warning.message) for warning in said):
        assert found == pytest.approx(1, abs=1e-5)
    else:
        assert found <= 4 * form + 1e-6 if dtype == np.float64 else found <= 4 * form + 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RewardWarning)
        bound = regret_bound(plain, plain * 2, mdp)
        assert bound.lower <= 1e-12
        if dtype == np.float64:
            drowned = regret_bound(plain, shaped, mdp)
            assert drowned.lower <= 2 * form


def starc_rounding(shaped: Array, mdp: TabularMDP, dtype: Any) -> float:
    """How large rounding may be beside a form of size about 1."""
    size = float(np.abs(shaped).max())
    return 64 * float(np.finfo(dtype).eps) * size / (1 - mdp.discount) ** 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=30)
def test_trivial_rewards_are_found_and_said(dtype: Any, seed: int, constant: bool) -> None:
    mdp, rng = deterministic(seed, dtype)
    shape = (mdp.num_states, mdp.num_actions, mdp.num_states)
    phi = rng.normal(size=mdp.num_states) * 10.0 ** rng.uniform(-20, 20)
    nothing = (mdp.discount * phi[None, None] - phi[:, None, None] + np.zeros(shape)).astype(dtype)
    if constant:
        nothing = np.full(shape, phi[0], dtype=dtype)
    other = rng.normal(size=shape).astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RewardWarning)
        assert starc_matrix([nothing, other], mdp).trivial.tolist() == [True, False]
        assert starc_distance(nothing, other, mdp) == pytest.approx(1, abs=1e-5)
    zero = np.zeros(shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an exact 0 is not decided by a threshold
        assert starc_distance(zero, other, mdp) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("dtype", "exponents"), [(np.float64, (-300, -160, 160, 300)), (np.float32, (-35, -25, 25, 35))]
)
def test_rewards_of_any_size(dtype: Any, exponents: tuple[int, ...]) -> None:
    mdp, rng = deterministic(3, dtype)
    shape = (mdp.num_states, mdp.num_actions, mdp.num_states)
    a, b = rng.normal(size=(2, *shape))
    tol = 1e-9 if dtype == np.float64 else 1e-4
    for exponent in exponents:
        big, small = (a * 10.0**exponent).astype(dtype), b.astype(dtype)
        for choices in (*REDUCED, {"canonicalization": "epic"}, {"canonicalization": "val_potential"}):
            expected = starc_distance(a, b, mdp.to(torch.float64), **choices)  # type: ignore[arg-type]
            assert starc_distance(big, small, mdp, **choices) == pytest.approx(expected, abs=tol)  # type: ignore[arg-type]
            assert starc_matrix([big, small], mdp, **choices).values[0, 1] == pytest.approx(expected, abs=tol)  # type: ignore[arg-type]
        assert epic_distance(big, small, mdp) == pytest.approx(epic_distance(a, b, mdp), abs=tol)
        together = batched_starc_distance(torch.from_numpy(big), torch.from_numpy(small), mdp.dense, mdp.discount)
        assert float(together) == pytest.approx(float(starc_distance(a, b, mdp)), abs=tol)
        assert regret(big, small, mdp) == pytest.approx(regret(a, b, mdp), abs=tol)
        if dtype == np.float64:
            assert minimal_norm(big, mdp) == pytest.approx(10.0**exponent * float(minimal_norm(a, mdp)), rel=1e-9)
    raw = starc_distance(100 * a, 100 * b, mdp, norm="none")
    assert raw == pytest.approx(100 * float(starc_distance(a, b, mdp, norm="none")), rel=1e-6)


def test_precision_is_that_of_each_reward() -> None:
    """A shaped constant in float32 is trivial beside a reward in float64 too."""
    mdp, rng = deterministic(5)
    phi = rng.normal(size=mdp.num_states)
    shaped = mdp.discount * phi[None, None] - phi[:, None, None] + np.zeros((mdp.num_states, mdp.num_actions, 1))
    other = rng.normal(size=(mdp.num_states, mdp.num_actions))
    with pytest.warns(RewardWarning, match="low is taken to be trivial"):
        found = starc_matrix({"low": shaped.astype(np.float32), "other": other}, mdp)
    assert found.trivial.tolist() == [True, False]


def test_reachable_part_of_sparse_dynamics() -> None:
    """700 states of which the second half is out of reach: as the dense process says."""
    states, rng = 700, np.random.default_rng(0)
    following = np.r_[(np.arange(350) * 3 + 1) % 350, 350 + np.arange(350)]
    other = np.r_[(np.arange(350) + 1) % 350, np.arange(350)]
    columns = np.stack([following, other], 1).ravel()
    matrix = sp.csr_array((np.ones(2 * states), (np.arange(2 * states), columns)), shape=(2 * states, states))
    start = np.r_[np.full(350, 1 / 350), np.zeros(350)]
    sparse = TabularMDP(matrix, 0.9, start)
    dense = TabularMDP(matrix.toarray().reshape(states, 2, states), 0.9, start)
    assert sparse.sparse
    pattern = matrix.copy()
    pattern.data = rng.normal(size=pattern.nnz)
    rewards = {"pairs": rng.normal(size=(states, 2)), "states": rng.normal(size=states), "sparse": pattern}
    full = {name: r.toarray().reshape(states, 2, states) if sp.issparse(r) else r for name, r in rewards.items()}
    found = starc_matrix(rewards, sparse, restrict_to_reachable=True)
    np.testing.assert_allclose(found.values, starc_matrix(full, dense, restrict_to_reachable=True).values, atol=1e-9)
    elsewhere = rewards["pairs"].copy()
    elsewhere[350:] += 5.0
    assert starc_distance(rewards["pairs"], elsewhere, sparse, restrict_to_reachable=True) < 1e-12


def test_epic_without_discounting() -> None:
    """At discount 1 EPIC is invariant to undiscounted shaping, as its authors use it (Gleave et al. 2021)."""
    mdp, rng = deterministic(1)
    shape = (mdp.num_states, mdp.num_actions, mdp.num_states)
    reward, phi = rng.normal(size=shape), rng.normal(size=mdp.num_states)
    shaped = reward + phi[None, None] - phi[:, None, None]
    assert epic_distance(reward, shaped, mdp, discount=1) < 1e-7
    assert epic_distance(reward, shaped, mdp) > 1e-3
    with pytest.raises(ConfigError, match=r"in \[0, 1\]"):
        epic_distance(reward, shaped, mdp, discount=1.5)


def test_options_are_written_once() -> None:
    assert list(MetricArguments.__annotations__) == [field.name for field in fields(MetricOptions)]
    mdp, _ = deterministic(0)
    reward = np.ones((mdp.num_states, mdp.num_actions))
    with pytest.raises(ConfigError, match="scale must be one of starc, half, angle, not 'double'"):
        starc_distance(reward, reward, mdp, scale="double")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="nrom"):
        starc_matrix([reward], mdp, nrom="l1")  # type: ignore[call-arg]
