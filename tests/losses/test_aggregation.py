"""From members to targets, actions and bounds, against the released aggregation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rlkit2.errors import ConfigError
from rlkit2.losses.aggregation import (
    grouped_mean_minimum,
    grouped_minimum,
    lower_bound,
    member_advantages,
    shape_weighted_vote,
)
from rlkit2.losses.ggd import batch_inverse_variance, gaussian_nll, ggd_nll, mbbe_variance, shape_weights, solve_xi
from rlkit2.losses.td import td_target
from rlkit2.nn.critics import taken
from tests.reference import ROOT


@pytest.fixture(scope="module")
def known() -> dict[str, Tensor]:
    with np.load(ROOT / "ggd_agg.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_dqn(known: dict[str, Tensor]) -> None:
    values = known["dqn_values"].permute(1, 0, 2, 3).unsqueeze(0)  # [1, M, B, n, 2]
    next_values = known["dqn_next_values"].permute(1, 0, 2, 3).unsqueeze(0)[..., 0]
    rewards, dones = known["dqn_rewards"].view(1, 1, -1), known["dqn_dones"].view(1, 1, -1)
    targets = td_target(rewards, dones, next_values.amax(-1), float(known["dqn_gamma"]))
    close(targets[0].T, known["dqn_target"])
    close(taken(values, known["dqn_actions"].view(1, -1))[0].transpose(0, 1), known["dqn_chosen"])
    votes = shape_weighted_vote(values[..., 0], F.softplus(values[..., 1]))
    assert torch.equal(votes.argmax(-1)[0], known["dqn_greedy_ggd"])
    assert torch.equal(shape_weighted_vote(values[..., 0]).argmax(-1)[0], known["dqn_greedy_other"])


def members(values: Tensor) -> Tensor:
    """`[2, B, N, 2]` as `[1, 2 N, B, 2]`."""
    return values.transpose(1, 2).flatten(0, 1).unsqueeze(0)


def test_sac(known: dict[str, Tensor]) -> None:
    next_values = members(known["sac_next_values"])[..., 0]
    entropy, discount = float(known["sac_ent_coef"]), float(known["sac_gamma"])
    value = grouped_minimum(next_values) - entropy * known["sac_next_log_prob"]
    targets = td_target(known["sac_rewards"].view(1, 1, -1), known["sac_dones"].view(1, 1, -1), value, discount)
    close(targets[0].T, known["sac_target"])
    actor_value = grouped_mean_minimum(members(known["sac_policy_values"])[..., 0])
    close((entropy * known["sac_log_prob"] - actor_value).mean(), known["sac_actor_loss"].squeeze())

    y = known["sac_target"].T
    losses: dict[str, list[Tensor]] = {"mse": [], "gauss": [], "ggd": []}
    for group in known["sac_current_values"]:
        q, rho = group.permute(2, 1, 0)
        beta = F.softplus(rho)
        losses["mse"].append((q - y).square().mean(1).sum())
        losses["gauss"].append(gaussian_nll(q, y, beta, reduction="none").mean(1).sum())
        member = ggd_nll(q, y, shape=beta, form="official", reduction="none")
        losses["ggd"].append((shape_weights(beta, 0) * member).sum(0).mean())
        variance = mbbe_variance(q - y, 0, ddof=0, floor=1e-6)
        if float(solve_xi(variance, 16.0)) == 0.0:  # where the released search has nothing to find either
            weights = batch_inverse_variance(variance) / q.shape[1]
            losses.setdefault("iev_ggd", []).append(losses["ggd"][-1] + 0.1 * (weights * (q - y).abs().sum(0)).mean())
    for name, groups in losses.items():
        if len(groups) == 2:
            close(0.5 * sum(groups), known[f"sac_critic_loss_{name}"].squeeze())


def test_ppo(known: dict[str, Tensor]) -> None:
    values = known["ppo_values"][..., 0].transpose(1, 2)  # [T, N, E]
    last = known["ppo_last_values"][..., 0].T.unsqueeze(0)
    continues = 1.0 - torch.cat([known["ppo_episode_starts"][1:], known["ppo_dones"].unsqueeze(0)]).double()
    next_values = torch.cat([values[1:], last])
    advantages, returns = member_advantages(
        known["ppo_rewards"], values, next_values, continues, float(known["ppo_gamma"]), float(known["ppo_gae_lambda"])
    )
    close(advantages.transpose(1, 2), known["ppo_advantages"])
    close(returns.transpose(1, 2), known["ppo_returns"])


def test_lower_bound() -> None:
    torch.manual_seed(0)
    values = torch.randn(2, 10, 4000).double()
    torch.testing.assert_close(lower_bound(values, 2.0), values.mean(1) - 2.0 * values.std(1))
    assert float((lower_bound(values) - values.amin(1)).mean().abs()) < 0.07  # the matched k, up to the bias of std
    assert torch.equal(lower_bound(values[:, :1]), values[:, 0])
    equal = torch.ones(1, 5, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(lower_bound(equal).sum(), equal)
    assert bool(gradient.isfinite().all())
    with pytest.raises(ConfigError, match="equal groups"):
        grouped_minimum(values[:, :3])
