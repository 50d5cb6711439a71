"""What a reward distance must satisfy on any process: invariance, pseudometric axioms, linear algebra, bounds, edge cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit2.errors import ConfigError, RewardError
from rlkit2.rewards import (
    RewardWarning,
    TabularMDP,
    canonicalize,
    dard_distance,
    epic_distance,
    minimal_norm,
    optimal_policy,
    policy_return,
    regret,
    regret_bound,
    srrd_distance,
    standardize,
    starc_distance,
    starc_matrix,
    worst_case_regret,
)

Array = np.ndarray[Any, Any]
FULL = (
    {"canonicalization": "val"},
    {"canonicalization": "minimal", "p": 2},
    {"canonicalization": "minimal", "p": "weighted_2"},
)
SHAPING = (
    {"canonicalization": "val_potential"},
    {"canonicalization": "epic"},
    {"canonicalization": "dard"},
    {"canonicalization": "srrd"},
    {"canonicalization": "minimal_potential", "p": 2},
)


def make(seed: int, states: int | None = None, actions: int | None = None, discount: float | None = None) -> TabularMDP:
    """A random process with every state reachable: 3-6 states, 2-3 actions, discount .5-.95."""
    rng = np.random.default_rng(seed)
    states, actions = states or int(rng.integers(3, 7)), actions or int(rng.integers(2, 4))
    discount = float(rng.uniform(0.5, 0.95)) if discount is None else discount
    return TabularMDP(rng.dirichlet(np.ones(states), (states, actions)), discount, rng.dirichlet(np.ones(states)))


def shape(mdp: TabularMDP) -> tuple[int, int, int]:
    return mdp.num_states, mdp.num_actions, mdp.num_states


def shaping(mdp: TabularMDP, potential: Array) -> Array:
    return mdp.discount * potential[None, None, :] - potential[:, None, None] + np.zeros(shape(mdp))


def redistribution(mdp: TabularMDP, noise: Array) -> Array:
    return noise - (mdp.dense.numpy() * noise).sum(-1, keepdims=True)


@given(st.integers(0, 10**6), st.floats(-3, 3), st.floats(0, 10), st.floats(0, 10))
@settings(max_examples=40)
def test_equivalent_rewards_have_distance_zero(seed: int, log_scale: float, phi: float, z: float) -> None:
    mdp, rng = make(seed), np.random.default_rng(seed + 1)
    reward, scale = rng.normal(size=shape(mdp)), 10.0**log_scale
    potential = phi * rng.uniform(-1, 1, mdp.num_states)
    shaped = scale * reward + shaping(mdp, potential)
    other = shaped + redistribution(mdp, z * rng.uniform(-1, 1, shape(mdp)))
    for choices in FULL:
        size = np.abs(canonicalize(scale * reward, mdp, "val")).max()
        slack = max(1e-12, 1e-13 * max(phi, z) / ((1 - mdp.discount) * size))
        assert starc_distance(reward, other, mdp, **choices) <= slack  # type: ignore[arg-type]
    for choices in SHAPING:
        slack = max(1e-12, 1e-13 * phi / (scale * (1 - mdp.discount)))
        assert starc_distance(reward, shaped, mdp, **choices) <= slack  # type: ignore[arg-type]


def test_what_each_form_is_blind_to() -> None:
    mdp, rng = make(3), np.random.default_rng(4)
    reward, potential = rng.normal(size=shape(mdp)), rng.normal(size=mdp.num_states)
    shaped = reward + shaping(mdp, potential)
    moved = reward + redistribution(mdp, rng.normal(size=shape(mdp)))
    for choices in SHAPING:
        assert starc_distance(reward, moved, mdp, **choices) > 0.1  # type: ignore[arg-type]
    assert starc_distance(reward, shaped, mdp, canonicalization="none") > 0.1
    for distance in (epic_distance, dard_distance, srrd_distance):
        assert distance(reward, shaped, mdp) < 1e-7
        assert distance(reward, moved, mdp) > 0.05


def test_pseudometric() -> None:
    mdp, rng = make(11), np.random.default_rng(5)
    rewards = rng.normal(size=(12, *shape(mdp)))
    trivial = shaping(mdp, rng.normal(size=mdp.num_states))
    for norm in ("l1", "l2", "linf", "weighted_l1", "weighted_l2", "range"):
        values = starc_matrix(rewards, mdp, norm=norm, distance=norm).values  # type: ignore[arg-type]
        assert (values == values.T).all()
        assert (np.diag(values) == 0).all()
        assert values.min() >= 0
        assert values.max() <= 2 + 1e-12
        assert (values[:, :, None] <= values[:, None, :] + values.T[None, :, :].transpose(1, 2, 0) + 1e-12).all()
        same: dict[str, Any] = {"norm": norm, "distance": norm}
        assert starc_distance(rewards[0], -rewards[0], mdp, **same) == pytest.approx(2, abs=1e-12)
        zero, ones = np.zeros(shape(mdp)), np.ones(shape(mdp))
        for nothing in (zero, trivial, ones):
            assert starc_distance(rewards[0], nothing, mdp, **same) == pytest.approx(1, abs=1e-12)
            assert starc_distance(zero, nothing, mdp, **same) == 0
    assert starc_matrix({"a": rewards[0], "zero": zero, "one": ones}, mdp).trivial.tolist() == [False, True, True]
    assert np.isnan(starc_distance(rewards[0], zero, mdp, trivial="nan"))
    with pytest.raises(RewardError, match="reward_b is trivial"):
        starc_distance(rewards[0], zero, mdp, trivial="raise")


def _matrix_of(kind: str, mdp: TabularMDP, **choices: Any) -> Array:
    basis = np.eye(np.prod(shape(mdp))).reshape(-1, *shape(mdp))
    forms = canonicalize(basis, mdp, kind, **choices)  # type: ignore[arg-type]
    full = forms if forms.ndim == 4 else np.broadcast_to(forms[..., None], basis.shape)
    return np.asarray(full.reshape(len(basis), -1)).T


@pytest.mark.parametrize("seed", range(4))
def test_linear_algebra(seed: int) -> None:
    mdp = make(seed, states=4)
    states, actions, _ = shape(mdp)
    for kind, choices in (("val", {}), ("minimal", {"p": 2}), ("minimal", {"p": "weighted_2"})):
        form = _matrix_of(kind, mdp, **choices)
        np.testing.assert_allclose(form @ form, form, atol=1e-10)
        assert np.linalg.matrix_rank(form, tol=1e-9) == states * (actions - 1)
        assert len(form) - np.linalg.matrix_rank(form, tol=1e-9) == states + states * actions * (states - 1)
    for kind in ("val_potential", "epic", "dard", "srrd", "minimal_potential"):
        form = _matrix_of(kind, mdp)
        assert len(form) - np.linalg.matrix_rank(form, tol=1e-9) == states
    reward = np.random.default_rng(seed).normal(size=shape(mdp))
    advantage = canonicalize(reward, mdp)
    for kind in ("val", "val_potential", "minimal", "minimal_potential", "epic", "none"):
        again = canonicalize(canonicalize(reward, mdp, kind), mdp)  # type: ignore[arg-type]
        np.testing.assert_allclose(again, advantage, atol=1e-10)
    assert np.abs(canonicalize(canonicalize(reward, mdp, "dard"), mdp) - advantage).max() > 1e-3


def test_val_is_the_advantage() -> None:
    mdp, rng = make(7), np.random.default_rng(8)
    policy = rng.dirichlet(np.ones(mdp.num_actions), mdp.num_states)
    reward = rng.normal(size=shape(mdp))
    form, tau = canonicalize(reward, mdp, policy=policy), mdp.dense.numpy()
    np.testing.assert_allclose((policy * form).sum(1), 0, atol=1e-12)
    mean, values = (tau * reward).sum(-1), np.zeros(mdp.num_states)
    for _ in range(2000):  # independent policy evaluation
        values = (policy * (mean + mdp.discount * tau @ values)).sum(1)
    np.testing.assert_allclose(form, mean + mdp.discount * tau @ values - values[:, None], atol=1e-10)


HAND = np.stack([np.eye(2)] * 2)  # action a moves to state a
HAND_A = np.array([[1.0, 0.0], [1.0, 0.0]])
HAND_B = np.array([[1.0, 0.0], [0.0, 0.0]])


def test_hand_example() -> None:
    mdp = TabularMDP(HAND, 0.9)
    np.testing.assert_allclose(canonicalize(HAND_A, mdp), [[0.5, -0.5], [0.5, -0.5]], atol=1e-12)
    np.testing.assert_allclose(canonicalize(HAND_B, mdp), [[0.725, -0.725], [0.225, -0.225]], atol=1e-12)
    for choices, value in (
        ({}, 0.479754),
        ({"norm": "l1", "distance": "l1"}, 0.526316),
        ({"norm": "linf", "distance": "linf"}, 0.689655),
        ({"canonicalization": "epic"}, 0.898276),
        ({"canonicalization": "dard"}, 0.974076),
        ({"canonicalization": "minimal"}, 0.606432),
        ({"norm": "range", "distance": "range"}, 0.526316),
        ({"scale": "half"}, 0.479754 / 2),
    ):
        assert starc_distance(HAND_A, HAND_B, mdp, **choices) == pytest.approx(value, abs=6e-7)  # type: ignore[arg-type]
    assert epic_distance(HAND_A, HAND_B, mdp) == pytest.approx(0.449138, abs=6e-7)
    assert standardize(canonicalize(HAND_A, mdp), "range", mdp=mdp)[1] == pytest.approx(10)
    assert standardize(canonicalize(HAND_B, mdp), "range", mdp=mdp)[1] == pytest.approx(9.5)
    assert worst_case_regret(HAND_A, HAND_B, mdp) == pytest.approx(0.5)
    assert worst_case_regret(HAND_B, HAND_A, mdp) == pytest.approx(0.526316, abs=6e-7)


def test_conventions() -> None:
    mdp, rng = make(21), np.random.default_rng(2)
    for _ in range(5):
        a, b = rng.normal(size=(2, *shape(mdp)))
        starc = starc_distance(a, b, mdp, canonicalization="epic")
        assert starc == pytest.approx(2 * epic_distance(a, b, mdp), abs=1e-12)
        assert starc == pytest.approx(epic_distance(a, b, mdp, convention="starc"), abs=1e-12)
        angle, d = starc_distance(a, b, mdp, scale="angle"), starc_distance(a, b, mdp)
        assert d == pytest.approx(2 * np.sin(angle / 2), abs=1e-12)
        assert starc_distance(a, b, mdp, scale="half") == pytest.approx(d / 2, abs=1e-15)


def test_bounds_hold_on_random_processes() -> None:
    rng = np.random.default_rng(0)
    for seed in range(40):
        mdp = make(seed)
        a, b = rng.normal(size=(2, *shape(mdp)))
        if seed % 3 == 0:
            b = a + 0.3 * b
        value, first, second = worst_case_regret(a, b, mdp, method="lp")
        assert worst_case_regret(a, b, mdp) == pytest.approx(value, abs=1e-6)
        tau = mdp.dense.numpy()
        for eta in (first, second):
            flow = eta.sum(1) - mdp.discount * np.einsum("saz,sa->z", tau, eta)
            np.testing.assert_allclose(flow, mdp.initial_distribution, atol=1e-7)
        for norm in ("range", "l1", "l2", "linf"):
            bound = regret_bound(a, b, mdp, norm=norm)  # type: ignore[arg-type]
            assert bound.lower - 1e-7 <= value <= bound.upper + 1e-7
            assert f"{bound.upper:.4g}" in str(bound)
        d = starc_distance(a, b, mdp, norm="range", distance="range")
        assert d / 2 - 1e-7 <= value <= d + 1e-7
        assert regret(a, b, mdp) <= value + 1e-9
        # With the occupancies of the two policies themselves the certificate is sharper and still holds.
        pi = [optimal_policy(b, mdp, minimize=True), optimal_policy(b, mdp)]
        tight = regret_bound(a, b, mdp, norm="l2", policies=(pi[0], pi[1]))
        lost = policy_return(pi[0], a, mdp) - policy_return(pi[1], a, mdp)
        span = policy_return(optimal_policy(a, mdp), a, mdp) - policy_return(
            optimal_policy(a, mdp, minimize=True), a, mdp
        )
        assert lost / span <= tight.upper + 1e-7
        assert tight.upper <= regret_bound(a, b, mdp, norm="l2").upper + 1e-9
    same = 2 * a + shaping(mdp, rng.normal(size=mdp.num_states))
    assert worst_case_regret(a, same, mdp) == pytest.approx(0, abs=1e-9)
    assert worst_case_regret(a, -a, mdp) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("p", [1, 2, "inf", "weighted_1", "weighted_2"])
def test_minimal_forms_beat_equivalent_rewards(p: Any) -> None:
    mdp, rng = make(31, states=4), np.random.default_rng(1)
    reward, tau = rng.normal(size=shape(mdp)), mdp.dense.numpy()

    def size(rewards: Array) -> Array:
        weights = tau if str(p).startswith("weighted") else np.ones_like(tau)
        if p == "inf":
            return np.abs(rewards).max((1, 2, 3))
        if p in (1, "weighted_1"):
            return (weights * np.abs(rewards)).sum((1, 2, 3))
        return np.sqrt((weights * rewards**2).sum((1, 2, 3)))

    def equivalents(width: float, *, redistribute: bool) -> Array:
        others = []
        form = canonicalize(reward, mdp, "minimal" if redistribute else "minimal_potential", p=p)
        form = form if form.ndim == 3 else np.broadcast_to(form[..., None], shape(mdp))
        for _ in range(1000):
            z = redistribution(mdp, width * rng.normal(size=shape(mdp))) if redistribute else 0
            others.append(form + shaping(mdp, width * rng.normal(size=mdp.num_states)) + z)
        return np.stack([np.array(canonicalize(reward, mdp, "val_potential")), *others])

    for kind, redistribute in (("minimal", True), ("minimal_potential", False)):
        least = minimal_norm(reward, mdp, p=p, kind=kind)  # type: ignore[arg-type]
        for width in (1.0, 1e-2):
            assert least <= size(equivalents(width, redistribute=redistribute)).min() + 1e-9


def test_one_action_makes_every_reward_trivial() -> None:
    mdp, rng = make(5, actions=1), np.random.default_rng(5)
    a, b = rng.normal(size=(2, *shape(mdp)))
    matrix = starc_matrix([a, b], mdp)
    assert matrix.trivial.all()
    assert matrix.values[0, 1] == 0
    assert np.isnan(regret(a, b, mdp))
    assert np.isnan(worst_case_regret(a, b, mdp))
    with pytest.raises(RewardError, match="nothing to lose"):
        regret_bound(a, b, mdp)


def test_discount_zero_and_near_one() -> None:
    mdp, rng = make(6, discount=0.0), np.random.default_rng(5)
    reward = rng.normal(size=shape(mdp))
    mean = (mdp.dense.numpy() * reward).sum(-1)
    np.testing.assert_allclose(canonicalize(reward, mdp), mean - mean.mean(1, keepdims=True), atol=1e-14)
    mdp = make(6, discount=0.999)
    tau, values, mean = mdp.dense.numpy().mean(1), np.zeros(mdp.num_states), (mdp.dense.numpy() * reward).sum(-1)
    for _ in range(40_000):
        values = mean.mean(1) + 0.999 * tau @ values
    iterative = mean + 0.999 * mdp.dense.numpy() @ values - values[:, None]
    np.testing.assert_allclose(canonicalize(reward, mdp), iterative, atol=1e-7)


def test_absorbing_rows_carry_no_advantage() -> None:
    mdp = make(9, states=5)
    tau = mdp.dense.numpy().copy()
    tau[4] = np.eye(5)[4]
    mdp = TabularMDP(tau, 0.9)
    reward = np.random.default_rng(3).normal(size=(5, mdp.num_actions, 5))
    reward[4] = 0
    np.testing.assert_allclose(canonicalize(reward, mdp)[4], 0, atol=1e-14)
    # A constant is trivial in a continuing process, but not where episodes end with reward 0 ever after.
    constant = np.ones_like(reward)
    assert starc_matrix([constant], mdp).trivial.all()
    constant[4] = 0
    assert not starc_matrix([constant], mdp).trivial.any()


def test_unreachable_states_are_reported_and_left_out() -> None:
    tau = np.zeros((3, 2, 3))
    tau[0, 0, 0] = tau[0, 1, 1] = tau[1, :, 0] = tau[2, :, 2] = 1
    mdp = TabularMDP(tau, 0.9, [1.0, 0.0, 0.0])
    a = np.array([[1.0, 0.0], [0.5, 0.0], [0.0, 0.0]])
    b = a.copy()
    b[2, 0] = 5.0
    with pytest.warns(RewardWarning, match="1 of 3 states cannot be reached"):
        assert starc_distance(a, b, mdp) > 0.1
    assert "cannot be reached" in starc_matrix([a, b], mdp).notes[0]
    policy, weights = np.full((3, 2), 0.5), np.ones((3, 2))
    assert starc_distance(a, b, mdp, restrict_to_reachable=True, policy=policy, weights=weights) == 0
    assert starc_matrix([a, b], mdp, restrict_to_reachable=True).values[0, 1] == 0
    assert worst_case_regret(a, b, mdp) == pytest.approx(0, abs=1e-12)


GOOD = make(1, states=3, actions=2).dense.numpy()


def _bad(change: str) -> Array:
    tau = GOOD.copy()
    if change == "sum":
        tau[1, 0] *= 0.9
    elif change == "negative":
        tau[2, 1, 0], tau[2, 1, 1] = -0.1, tau[2, 1, 1] + tau[2, 1, 0] + 0.1
    elif change == "nan":
        tau[0, 1, 2] = np.nan
    else:
        tau = tau[:, :, :2]
    return tau


@pytest.mark.parametrize(
    ("make_bad", "error", "message"),
    [
        (lambda: TabularMDP(_bad("sum"), 0.9), RewardError, r"transitions\[1, 0\] sums to 0.9"),
        (lambda: TabularMDP(_bad("negative"), 0.9), RewardError, r"transitions\[2, 1, 0\] is -0.1"),
        (lambda: TabularMDP(_bad("nan"), 0.9), RewardError, r"transitions\[0, 1, 2\] is nan"),
        (lambda: TabularMDP(_bad("shape"), 0.9), RewardError, r"shape \[3, 2, 2\]; give \[S, A, S\]"),
        (lambda: TabularMDP(GOOD, 1.0), ConfigError, "discount is 1.0"),
        (lambda: TabularMDP(GOOD, -0.1), ConfigError, "discount is -0.1"),
        (lambda: TabularMDP(GOOD, 0.9, [0.5, 0.5, 0.5]), RewardError, "initial_distribution sums to 1.5"),
        (lambda: TabularMDP(GOOD, 0.9, [0.5, 0.5]), RewardError, r"initial_distribution has shape \[2\]"),
        (lambda: TabularMDP([["x"]], 0.9), RewardError, "not an array of real numbers"),
    ],
)
def test_bad_processes(make_bad: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_bad()


def test_bad_rewards_and_policies() -> None:
    mdp, good = TabularMDP(GOOD, 0.9), np.ones((3, 2))
    broken = np.ones((3, 2, 3))
    broken[2, 0, 1] = np.inf
    for call, error, message in (
        (lambda: starc_distance(broken, good, mdp), RewardError, r"reward_a\[2, 0, 1\] is inf"),
        (
            lambda: starc_distance(good, np.ones((4, 2)), mdp),
            RewardError,
            r"reward_b has shape \[4, 2\]; give \[3, 2, 3\]",
        ),
        (lambda: starc_matrix({"mine": np.ones(7)}, mdp), RewardError, r"mine has shape \[7\]"),
        (lambda: starc_matrix([], mdp), RewardError, "no rewards"),
        (lambda: canonicalize(good, mdp, policy=np.full((3, 2), 0.6)), RewardError, r"policy\[0\] sums to 1.2"),
        (lambda: canonicalize(good, mdp, policy=[0, 1, 2]), RewardError, r"policy\[2\] is 2; actions run"),
        (lambda: canonicalize(good, mdp, policy=[[1.5, -0.5]] * 3), RewardError, r"policy\[0, 1\] is -0.5"),
        (lambda: canonicalize(good, mdp, "vall"), ConfigError, "kind must be one of val"),  # type: ignore[arg-type]
        (lambda: starc_distance(good, good, mdp, norm="weighted_linf"), ConfigError, "legacy=True"),
        (lambda: starc_distance(good, good, mdp, distance="none"), ConfigError, "only a norm can be 'none'"),
        (lambda: starc_distance(good, good, mdp, canonicalization="minimal", p=1), ConfigError, "need not be unique"),
        (lambda: starc_distance(good, good, mdp, weights=-good), RewardError, r"weights\[0, 0\] is negative"),
        (lambda: starc_distance(good, good, "mdp"), RewardError, "build TabularMDP"),  # type: ignore[arg-type]
        (lambda: epic_distance(good, good, mdp, coverage="all"), ConfigError, "coverage 'all' is unknown"),
        (lambda: worst_case_regret(good, good, mdp, method="x"), ConfigError, "choose 'dual' or 'lp'"),  # type: ignore[call-overload]
    ):
        with pytest.raises(error, match=message):
            call()


def test_weights_of_the_visited_pairs() -> None:
    mdp, rng = make(13), np.random.default_rng(1)
    a, b = rng.normal(size=(2, *shape(mdp)))
    weights = mdp.occupancy(mdp.uniform_policy).numpy()
    forms = [canonicalize(r, mdp) for r in (a, b)]
    scaled = [f / np.sqrt((weights * f**2).sum()) for f in forms]
    by_hand = np.sqrt((weights * (scaled[0] - scaled[1]) ** 2).sum())
    assert starc_distance(a, b, mdp, weights=weights) == pytest.approx(by_hand, abs=1e-12)
