"""Imitation: rewards from expert data, and O-DICE on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlkit2.agents import make_agent, make_config
from rlkit2.agents.odice import ODICE
from rlkit2.agents.odice_il import (
    ODICEIL,
    DiscriminatorConfig,
    ODICEILConfig,
    best_episodes,
    imitation_dataset,
    log_density_ratio,
)
from rlkit2.data import Batch, TransitionDataset, dataset_from_arrays
from rlkit2.errors import ConfigError, DatasetError

QUICK = DiscriminatorConfig(hidden_sizes=(32,), steps=300, batch_size=128, learning_rate=3e-3)
EPISODE = 20


def target_action(states: torch.Tensor) -> torch.Tensor:
    """What the expert does."""
    return torch.tanh(states[:, :1] - states[:, 1:2])


def dataset(episodes: int, expert: float, *, seed: int, discrete: bool = False) -> TransitionDataset:
    """Independent states; a share `expert` of the episodes follows the expert, the others act at random; returns tell them apart."""
    generator = torch.Generator().manual_seed(seed)
    rows = episodes * EPISODE
    states = torch.randn((rows, 3), generator=generator)
    skilled = (torch.arange(rows) // EPISODE) < round(expert * episodes)
    best, noise = target_action(states)[:, 0], 2.0 * torch.rand(rows, generator=generator) - 1.0
    actions: Any = torch.where(skilled, best, noise)[:, None]
    if discrete:
        actions = (actions[:, 0] > 0).long()
    ends = torch.arange(rows) % EPISODE == EPISODE - 1
    return dataset_from_arrays(states, actions, skilled.float(), states.roll(-1, 0), torch.zeros_like(ends), ends)


MIXED = dataset(40, 0.5, seed=0)
EXPERT = dataset(20, 1.0, seed=1)


# The reward


@pytest.mark.parametrize(
    ("inputs", "discrete"), [("state_action", False), ("state_action", True), ("state", False), ("transition", False)]
)
def test_equal_data_give_a_ratio_of_one(inputs: str, discrete: bool) -> None:
    same = dataset(40, 0.0, seed=0, discrete=discrete)
    ratio = log_density_ratio(same, same, same, replace(QUICK, inputs=inputs))
    assert ratio.shape == (len(same),)
    assert ratio.abs().mean() < 0.1


def test_ratio_is_that_of_the_densities() -> None:
    """Gaussians of means +-1/2 in one coordinate: log d^E/d^O = s, with the gradient penalty off."""
    generator = torch.Generator().manual_seed(0)

    def gaussian(mean: float) -> TransitionDataset:
        s = torch.randn((4000, 2), generator=generator)
        s[:, 0] += mean
        ends = torch.arange(4000) % 50 == 49
        return dataset_from_arrays(s, torch.zeros(4000, 1), ends.float(), s, torch.zeros_like(ends), ends)

    others, experts = gaussian(-0.5), gaussian(0.5)
    ratio = log_density_ratio(others, others, experts, replace(QUICK, inputs="state", gradient_penalty=0.0, steps=800))
    near = others.observations.norm(dim=1) < 1.5
    error = (ratio - others.observations[:, 0])[near]
    assert error.abs().mean() < 0.2


def test_labels_do_not_depend_on_the_global_generator() -> None:
    torch.manual_seed(0)
    one = log_density_ratio(MIXED, MIXED, EXPERT, replace(QUICK, steps=20))
    torch.manual_seed(1)
    two = log_density_ratio(MIXED, MIXED, EXPERT, replace(QUICK, steps=20))
    torch.testing.assert_close(one, two, rtol=0.0, atol=0.0)
    other = log_density_ratio(MIXED, MIXED, EXPERT, replace(QUICK, steps=20, seed=1))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("options", [{"label_smoothing": 0.2, "gradient_penalty": 0.0}, {"gradient_penalty": 1.0}])
def test_smoothing_and_penalty_bound_the_ratio(options: dict[str, float]) -> None:
    free = log_density_ratio(MIXED, MIXED, EXPERT, replace(QUICK, gradient_penalty=0.0))
    bounded = log_density_ratio(MIXED, MIXED, EXPERT, replace(QUICK, **options))
    assert bounded.abs().mean() < 0.75 * free.abs().mean()


def test_the_experts_actions_are_not_read_without_need() -> None:
    scrambled = replace_actions(EXPERT, torch.zeros_like(EXPERT.actions))
    for inputs in ("state", "transition"):
        quick = replace(QUICK, inputs=inputs, steps=20)
        one, two = (imitation_dataset(MIXED, e, discriminator=quick) for e in (EXPERT, scrambled))
        torch.testing.assert_close(one.rewards, two.rewards, rtol=0.0, atol=0.0)
        assert len(one) == len(MIXED)


def replace_actions(data: TransitionDataset, actions: torch.Tensor) -> TransitionDataset:
    return dataset_from_arrays(
        data.observations, actions, data.rewards, data.next_observations, data.terminations, data.truncations
    )


def test_what_is_trained_on() -> None:
    """A foreign expert with known actions joins the data; one that is a part of them does not; "zero" keeps the expert alone."""
    quick = replace(QUICK, steps=20)
    joined = imitation_dataset(MIXED, EXPERT, discriminator=quick)
    assert len(joined) == len(MIXED) + len(EXPERT)
    assert joined.num_episodes == 60
    torch.testing.assert_close(joined.observations[: len(MIXED)], MIXED.observations)
    torch.testing.assert_close(joined.actions[len(MIXED) :], EXPERT.actions)
    assert joined.spec.content_hash != MIXED.spec.content_hash
    own = imitation_dataset(MIXED, best_episodes(MIXED, 5), discriminator=quick)
    assert len(own) == len(MIXED)
    zero = imitation_dataset(MIXED, EXPERT, reward="zero")
    assert len(zero) == len(EXPERT)
    assert zero.rewards.abs().max() == 0.0


def test_best_episodes() -> None:
    chosen = best_episodes(MIXED, 7)
    assert chosen.num_episodes == 7
    assert (chosen.episode_returns == EPISODE).all()
    with pytest.raises(DatasetError, match="fewer than the 41"):
        best_episodes(MIXED, 41)


def test_impossible_requests() -> None:
    for fields in (
        {"reward": "gail"},
        {"discriminator_inputs": "action"},
        {"expert_episodes": 0},
        {"label_smoothing": 0.5},
        {"gradient_penalty": -1.0},
        {"discriminator_steps": 0},
    ):
        with pytest.raises(ConfigError):
            ODICEILConfig(**fields)
    with pytest.raises(ConfigError, match="discriminator, zero"):
        imitation_dataset(MIXED, EXPERT, reward="gail")
    with pytest.raises(DatasetError, match="action_size is 1 in arrays but 2"):
        imitation_dataset(MIXED, dataset(2, 1.0, seed=0, discrete=True))


# The agent


def test_prepare_dataset_reads_the_expert(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the dataset's own best episodes, or from another dataset by its id."""
    config = ODICEILConfig(discriminator_steps=20)
    own = ODICEIL.prepare_dataset(config, MIXED)
    assert len(own) == len(MIXED)
    assert not torch.equal(own.rewards, MIXED.rewards)
    EXPERT.to_minari("test/expert-v0")
    foreign = ODICEIL.prepare_dataset(replace(config, expert_dataset="test/expert-v0"), MIXED)
    assert len(foreign) == len(MIXED) + len(EXPERT)
    few = ODICEIL.prepare_dataset(replace(config, expert_dataset="test/expert-v0", expert_episodes=3), MIXED)
    assert len(few) == len(MIXED) + 3 * EPISODE
    torch.testing.assert_close(few.observations[len(MIXED) :], EXPERT.observations[: 3 * EPISODE])  # the first ones
    elsewhere = ODICEIL.prepare_dataset(replace(config, expert_dataset="elsewhere"), MIXED, lambda source: EXPERT)
    assert torch.equal(elsewhere.rewards, foreign.rewards)
    zero = ODICEIL.prepare_dataset(make_config("odice_il_zero", expert_episodes=2), MIXED)
    assert len(zero) == 2 * EPISODE


@pytest.mark.parametrize("inputs", ["state_action", "transition"])
def test_expert_rows_weigh_more_than_random_ones(inputs: str) -> None:
    """Half of the data acts at random: the mean weight of the expert's rows is more than five times that of the others."""
    data = MIXED
    if inputs == "transition":  # the next state shows the action here
        shown = torch.cat([MIXED.next_observations[:, :2], MIXED.actions], 1)
        data = dataset_from_arrays(
            MIXED.observations, MIXED.actions, MIXED.rewards, shown, MIXED.terminations, MIXED.truncations
        )
    expert = best_episodes(data, 20)
    labelled = imitation_dataset(
        data,
        expert,
        discriminator=replace(QUICK, inputs=inputs, gradient_penalty=0.0, steps=600, hidden_sizes=(64, 64)),
    )
    config = ODICEILConfig(
        value_hidden_sizes=(32,),
        policy_hidden_sizes=(32,),
        discount=0.5,
        value_learning_rate=3e-3,
        target_update_rate=0.05,
    )
    agent = make_agent(config, labelled.spec)
    generators = [torch.Generator().manual_seed(0)]
    for _ in range(500):
        agent.update(labelled.gather(labelled.sample_indices(128, generators)))
    assert isinstance(agent, ODICE)
    weight = agent.terms(labelled.gather(torch.arange(len(labelled))[None])).weight.mean(1)[0]
    skilled = torch.arange(len(labelled)) < 20 * EPISODE
    assert weight[skilled].mean() > 5.0 * weight[~skilled].mean()


def chain(length: int) -> Batch:
    """One trajectory through `length` states, one-hot, rewards zero, truncated at its end."""
    states = torch.eye(length + 1, dtype=torch.float64)
    zeros = torch.zeros((1, length), dtype=torch.float64)
    return Batch(
        observations=states[None, :-1],
        actions=torch.zeros((1, length, 1), dtype=torch.float64),
        rewards=zeros,
        next_observations=states[None, 1:],
        terminations=zeros.bool(),
        truncations=zeros.bool(),
    )


@pytest.mark.parametrize(("lambda_", "expected"), [(0.4, 1.0), (0.55, 0.0)])
def test_zero_rewards_on_one_trajectory_are_uniform_cloning(lambda_: float, expected: float) -> None:
    """V has one number a state, so semi solves R = 2((1 - lambda)/lambda - 1) everywhere: weight 1 at .4, none at all from .5 on, which warns."""
    config = make_config(
        "odice_released",
        gradient_rule="semi",
        lambda_=lambda_,
        num_values=1,
        value_hidden_sizes=(),
        policy_hidden_sizes=(4,),
        value_learning_rate=0.02,
        target_update_rate=0.5,
        discount=0.9,
    )
    agent, batch = ODICE(config, 11, 1, dtype=torch.float64), chain(10)
    for _ in range(800):
        metrics = agent.update(batch)
    weight = agent.terms(batch).weight
    torch.testing.assert_close(weight, torch.full_like(weight, expected), rtol=0.0, atol=0.05)
    warned = ODICE.warnings(config, {name: float(value[0]) for name, value in metrics.items()})
    assert ("zero_weights" in warned) == (expected == 0.0)


def test_image_observations_are_refused() -> None:
    space = spaces.Box(0, 255, (4, 4, 1), np.uint8)
    images = np.zeros((4, 4, 4, 1), np.uint8)
    flags = np.zeros(4, bool)
    data = dataset_from_arrays(images, np.zeros((4, 1), np.float32), np.zeros(4), images, flags, flags)
    assert data.spec.observation_space.dtype == space.dtype
    with pytest.raises(DatasetError, match="image observations"):
        log_density_ratio(data, data, data, replace(QUICK, steps=1))
