"""numpy and torch, float32 and float64, dense and sparse, one process and many, and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from rlkit2.errors import RewardError
from rlkit2.rewards import (
    TabularMDP,
    batched_starc_distance,
    canonicalize,
    optimal_policy,
    policy_return,
    starc_distance,
    starc_matrix,
    worst_case_regret,
)
from tests.rewards.test_properties import make, redistribution, shape, shaping

Array = np.ndarray[Any, Any]


def test_numpy_and_torch_agree() -> None:
    mdp, rng = make(2), np.random.default_rng(0)
    a, b = rng.normal(size=(2, *shape(mdp)))
    for norm in ("l1", "l2", "linf", "weighted_l2", "range"):
        same: dict[str, Any] = {"norm": norm, "distance": norm}
        from_numpy = starc_distance(a, b, mdp, **same)
        from_torch = starc_distance(torch.from_numpy(a), torch.from_numpy(b), mdp, **same)
        assert isinstance(from_numpy, float)
        assert isinstance(from_torch, torch.Tensor)
        assert from_torch.dtype == torch.float64
        assert float(from_torch) == pytest.approx(from_numpy, abs=1e-12)
    for kind in ("val", "val_potential", "minimal", "epic", "dard", "srrd", "none"):
        form = canonicalize(a, mdp, kind)  # type: ignore[arg-type]
        assert isinstance(form, np.ndarray)
        np.testing.assert_allclose(canonicalize(torch.from_numpy(a), mdp, kind).numpy(), form, atol=1e-12)  # type: ignore[arg-type]
    assert isinstance(optimal_policy(torch.from_numpy(a), mdp), torch.Tensor)
    assert isinstance(worst_case_regret(a, b, mdp), float)


@pytest.mark.parametrize("discount", [0.5, 0.9, 0.99])
def test_float32(discount: float) -> None:
    for seed in range(20):
        mdp, rng = make(seed, discount=discount), np.random.default_rng(seed)
        mdp = TabularMDP(mdp.dense.float(), discount)
        reward = rng.normal(size=shape(mdp)).astype(np.float32)
        other = (
            3 * reward
            + shaping(mdp, rng.normal(size=mdp.num_states))
            + redistribution(mdp, rng.normal(size=shape(mdp)))
        )
        other = other.astype(np.float32)
        assert canonicalize(reward, mdp).dtype == np.float32
        assert starc_distance(reward, other, mdp) < 1e-4
        trivial = shaping(mdp, rng.normal(size=mdp.num_states)).astype(np.float32)
        assert starc_matrix([reward, trivial], mdp).trivial.tolist() == [False, True]


def test_gradients() -> None:
    mdp, rng = make(4, states=3, actions=2), np.random.default_rng(1)
    a, b = (torch.from_numpy(x).requires_grad_() for x in rng.normal(size=(2, *shape(mdp))))
    for choices in (
        {},
        {"norm": "l1", "distance": "l1"},
        {"norm": "weighted_l2", "distance": "weighted_l2"},
        {"norm": "range", "distance": "range"},
        {"canonicalization": "val_potential"},
        {"canonicalization": "minimal"},
        {"canonicalization": "epic"},
        {"scale": "angle"},
    ):
        assert torch.autograd.gradcheck(lambda x, y, c=choices: starc_distance(x, y, mdp, **c), (a, b))  # type: ignore[misc,arg-type]
    tau = mdp.dense.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y, t: batched_starc_distance(x, y, t, 0.9), (a, b, tau))
    for scale, second in ((0.0, b.detach()), (1.0, a.detach().clone())):
        for found in (
            starc_distance(scale * a, second, mdp),
            batched_starc_distance(scale * a, second, mdp.dense, 0.9),
        ):
            (gradient,) = torch.autograd.grad(found, a)  # type: ignore[arg-type]
            assert bool(torch.isfinite(gradient).all())


def test_the_distance_as_a_loss() -> None:
    """Descending the distance to a reward ends at an equivalent reward, not at the reward."""
    mdp, rng = make(8, states=4, actions=2), torch.Generator().manual_seed(0)
    goal = torch.randn(shape(mdp), generator=rng, dtype=torch.float64)
    learned = torch.randn(shape(mdp), generator=rng, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([learned], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        loss = starc_distance(learned, goal, mdp) ** 2
        loss.backward()  # type: ignore[union-attr,no-untyped-call]
        optimizer.step()
    assert float(starc_distance(learned.detach(), goal, mdp)) < 0.02
    assert float(starc_distance(learned.detach(), goal, mdp, canonicalization="none")) > 0.5
    assert float(worst_case_regret(learned.detach(), goal, mdp)) < 0.02


def test_batches_of_rewards_and_processes() -> None:
    processes = [make(seed, states=4, actions=2) for seed in range(3)]
    rng = np.random.default_rng(0)
    rewards = torch.from_numpy(rng.normal(size=(2, 3, 5, 4, 2, 4)))
    rewards[0, 1, 2] = 0
    tau = torch.stack([mdp.dense for mdp in processes])[:, None]
    discounts = torch.tensor([mdp.discount for mdp in processes], dtype=torch.float64)[:, None]
    for norm in ("l1", "l2", "linf"):
        found = batched_starc_distance(rewards[0], rewards[1], tau, discounts, norm=norm, distance=norm)  # type: ignore[arg-type]
        assert found.shape == (3, 5)
        one_by_one = torch.stack(
            [
                starc_distance(rewards[0, k], rewards[1, k], mdp, norm=norm, distance=norm)
                for k, mdp in enumerate(processes)
            ]  # type: ignore[arg-type,misc]
        )
        torch.testing.assert_close(found, one_by_one, rtol=0, atol=1e-12)
    means = (tau * rewards).sum(-1)
    same = batched_starc_distance(means[0], means[1], tau, discounts)
    torch.testing.assert_close(same, batched_starc_distance(rewards[0], rewards[1], tau, discounts), rtol=0, atol=1e-12)
    with pytest.raises(RewardError, match="reward_b has shape"):
        batched_starc_distance(rewards[0], rewards[1, ..., :3, :, :], tau, discounts)


def grid(side: int, rng: np.random.Generator) -> sp.csr_array:
    """A grid world with four slippery moves, `[S * 4, S]`."""
    states = side * side
    x, y = np.divmod(np.arange(states), side)
    moves = [
        np.clip(x + dx, 0, side - 1) * side + np.clip(y + dy, 0, side - 1)
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1))
    ]
    rows, columns, chances = [], [], []
    for action in range(4):
        for outcome in range(4):
            rows.append(np.arange(states) * 4 + action)
            columns.append(moves[outcome])
            chances.append(np.full(states, 0.7 if outcome == action else 0.1))
    parts = [np.concatenate(part) for part in (chances, rows, columns)]
    return sp.csr_array(sp.coo_array((parts[0], (parts[1], parts[2])), shape=(4 * states, states)))


def test_sparse_dynamics_agree_with_dense_ones() -> None:
    rng = np.random.default_rng(0)
    matrix = grid(24, rng)  # 576 states: solved as sparse
    sparse = TabularMDP(matrix, 0.95)
    dense = TabularMDP(matrix.toarray().reshape(576, 4, 576), 0.95)
    assert sparse.sparse
    assert not TabularMDP(grid(5, rng), 0.95).sparse
    pattern = matrix.copy()
    pattern.data = rng.normal(size=pattern.nnz)
    rewards = [rng.normal(size=(576, 4)), rng.normal(size=576), pattern]
    for reward in rewards:
        full = reward if not sp.issparse(reward) else reward.toarray().reshape(576, 4, 576)
        expected = sparse.expected_reward(reward)
        values = sparse.values(expected, sparse.uniform_policy)
        residual = expected.mean(1) + 0.95 * sparse.dynamics.next_mean(values).mean(1) - values
        assert float(residual.abs().max()) < 1e-10
        torch.testing.assert_close(expected, dense.expected_reward(full), rtol=0, atol=1e-12)
    ours = starc_matrix(rewards, sparse)
    full = [r.toarray().reshape(576, 4, 576) if sp.issparse(r) else r for r in rewards]
    np.testing.assert_allclose(ours.values, starc_matrix(full, dense).values, atol=1e-9)
    a, b = rewards[:2]
    assert starc_distance(a, b, sparse, norm="range", distance="range") == pytest.approx(
        starc_distance(a, b, dense, norm="range", distance="range"), abs=1e-8
    )
    assert policy_return(optimal_policy(a, sparse), a, sparse) == pytest.approx(
        policy_return(optimal_policy(a, dense), a, dense), abs=1e-9
    )
    with pytest.raises(RewardError, match="use canonicalization 'val'"):
        starc_distance(a, b, sparse, canonicalization="epic")
    wrong = matrix.copy()
    wrong.data[5] = 0.5
    with pytest.raises(RewardError, match=r"transitions\[0, 1\] sums to"):
        TabularMDP(wrong, 0.95)
    outside = sp.csr_array(np.ones((4 * 576, 576)))
    with pytest.raises(RewardError, match="transitions of probability zero"):
        starc_distance(outside, a, sparse)


def test_a_stream_of_rewards_is_read_once() -> None:
    mdp, rng = make(3), np.random.default_rng(3)
    rewards = rng.normal(size=(6, *shape(mdp)))
    streamed = starc_matrix((reward for reward in rewards), mdp)
    assert streamed.names == tuple(f"reward_{k}" for k in range(6))
    np.testing.assert_array_equal(streamed.values, starc_matrix(rewards, mdp).values)
    means = (mdp.dense.numpy() * rewards).sum(-1)
    np.testing.assert_allclose(starc_matrix(means, mdp).values, streamed.values, atol=1e-12)
