"""Generalized advantages as O-DICE's weights: against a loop over episodes, at both ends of lambda, and over an interruption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rlkit2
from rlkit2.agents.odice import ODICE, ODICEConfig
from rlkit2.agents.odice_episodes import discounted_sums
from rlkit2.data import TransitionDataset, dataset_from_arrays
from rlkit2.errors import ConfigError
from rlkit2.nn import lerp_
from tests.agents.test_odice_episodes import agent_for, data, whole
from tests.training.tiny_problem import contents

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, discount=st.sampled_from([0.0, 0.3, 0.9, 1.0]), seed=st.integers(0, 9))
def test_sums_by_doubling_are_those_of_a_loop(lengths: list[int], discount: float, seed: int) -> None:
    values = torch.randn(2, sum(lengths), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = discounted_sums(values, torch.cat([torch.arange(n, 0, -1) for n in lengths]), discount)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    for row in range(sum(lengths)):
        end = next(end for end in ends if end > row)
        wanted = sum(values[:, k] * discount ** (k - row) for k in range(row, end))
        torch.testing.assert_close(found[:, row], wanted, rtol=1e-12, atol=1e-12)


def loop(agent: ODICE, dataset: TransitionDataset, decay: float) -> Tensor:
    """Residuals by V_target (observations are taken as they are), one row at a time, from the end of every episode, in the data's reward."""
    mean, std = (float(part) for part in agent.value_units())

    def value(observation: Tensor) -> float:
        return float(agent.target_value(observation.view(1, 1, -1).double())) * std + mean

    found, after = [0.0] * len(dataset), 0.0
    for row in reversed(range(len(dataset))):
        ended = bool(dataset.terminations[row] or dataset.truncations[row])
        follows = 0.0 if dataset.terminations[row] else agent.config.discount * value(dataset.next_observations[row])
        residual = float(dataset.rewards[row]) + follows - value(dataset.observations[row])
        found[row] = after = residual + (0.0 if ended else decay * after)
    return torch.tensor(found, dtype=torch.float64) / std


@settings(max_examples=20, deadline=None)
@given(
    lengths=LENGTHS,
    gae_lambda=st.sampled_from([0.0, 0.5, 0.95]),
    unit=st.sampled_from(["return", "reward"]),
    seed=st.integers(0, 9),
)
def test_labels_are_generalized_advantages(lengths: list[int], gae_lambda: float, unit: str, seed: int) -> None:
    dataset = data(lengths, seed)
    agent = agent_for(dataset, gae_lambda=gae_lambda, value_unit=unit, discount=0.9)
    lerp_(agent.value_target, agent.value_network, 0.5)
    agent.label(dataset)
    found, _ = agent.advantages(agent.normalize(whole(dataset, 0.9)))
    torch.testing.assert_close(found[0, 0], loop(agent, dataset, gae_lambda * 0.9), rtol=1e-6, atol=1e-6)


def test_at_one_it_is_the_return_and_at_zero_the_residual() -> None:
    """Where an observation is the one that the step before led to, the values between cancel; V and its target are the same at the start."""
    apart = data([3, 1, 8, 5])
    following = apart.next_observations.clone()
    inner = ~(apart.terminations | apart.truncations)
    following[inner] = apart.observations[inner.nonzero().squeeze(1) + 1]
    dataset = dataset_from_arrays(
        apart.observations,
        apart.actions,
        apart.rewards,
        following,
        apart.terminations,
        apart.truncations,
        spec=apart.spec,
    )
    plain = agent_for(dataset, discount=0.9)
    batch = plain.normalize(whole(dataset, 0.9))
    agent = agent_for(dataset, discount=0.9, gae_lambda=0.0)
    agent.label(dataset)
    residual = agent.residuals(batch).forward.amax(1, keepdim=True) * agent.residual_spread.view(-1, 1, 1)
    torch.testing.assert_close(agent.advantages(batch)[0], residual, rtol=1e-6, atol=1e-6)
    agent.config = replace(agent.config, gae_lambda=1.0)
    followed = plain.advantages(batch)[0]
    torch.testing.assert_close(agent.lambda_advantages(dataset).unsqueeze(1), followed, rtol=1e-6, atol=1e-6)


def test_labels_stay_until_the_next_epoch_and_are_kept(tmp_path: Path) -> None:
    """A resume in the middle of an epoch ends bit for bit as if nothing had happened; other labels would show."""
    dataset = data([7, 12, 9, 4] * 3)
    options: dict[str, Any] = {
        "seeds": 2,
        "steps": 30,
        "batch_size": 16,
        "eval_every": 0,
        "checkpoint_every": 10,
        "progress": False,
    }
    config = ODICEConfig(hidden_sizes=(8,), gae_lambda=0.7, weight_residual="return")
    one = rlkit2.train(config, dataset, out=tmp_path / "one", **options)
    other = rlkit2.train(config, dataset, out=tmp_path / "other", until=13, **options)
    assert 13 % -(-len(dataset) // 16) != 0
    assert contents(rlkit2.train(resume=other, dataset=dataset, progress=False)) == contents(one)
    last = rlkit2.train(replace(config, gae_lambda=1.0), dataset, out=tmp_path / "last", **options)
    assert contents(last) != contents(one)


def test_who_asks_for_it_in_vain_is_told() -> None:
    dataset = data([4, 4])
    with pytest.raises(ConfigError, match=r"needs agent\.label\(dataset\)"):
        agent_for(dataset, gae_lambda=0.5).update(whole(dataset, 0.99))
    for kind in ("expected", "sampled"):
        with pytest.raises(ConfigError, match="gae_lambda is about what followed"):
            ODICEConfig(weight_residual=kind, gae_lambda=0.5)  # type: ignore[arg-type]
    for weight in ("positive_residual", "conjugate_grad"):
        with pytest.raises(ConfigError, match="gae_lambda is about what followed"):
            ODICEConfig(weight=weight, gae_lambda=0.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs weight_residual = 'return' or 'mixed'"):
        agent_for(dataset, gae_lambda=0.5, weight_residual="auto")  # it would be ignored
    alone, said = ODICE.settled(ODICEConfig(gae_lambda=0.5))
    assert (alone.weight_residual, alone.gae_lambda) == ("auto", 1.0)
    assert said is not None
    online, _ = ODICE.settled(ODICEConfig(gae_lambda=0.5, weight_residual="return"))
    assert (online.weight_residual, online.gae_lambda) == ("sampled", 1.0)
