"""O-DICE whose weights come from what followed: its contract, its units, and what they are by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rlkit2
from rlkit2.agents import make_agent, make_config, make_normalizer
from rlkit2.agents.odice import ODICE, ODICEConfig
from rlkit2.agents.odice_episodes import episode_weights
from rlkit2.data import DatasetSpec, TransitionDataset, dataset_from_arrays
from rlkit2.data.batch import Batch, LookaheadBatch
from rlkit2.data.returns import return_statistics
from rlkit2.errors import ConfigError
from rlkit2.testing import agent_checks, random_batch
from rlkit2.training.run import RunWarning

KINDS = ("return", "mixed")
SMALL: dict[str, Any] = {"hidden_sizes": (16, 16)}


def with_episodes(batch: Batch, discount: float) -> LookaheadBatch:
    """Made-up episodes around every row: another row's first and last observation, ends and all."""
    known = {part.name: getattr(batch, part.name) for part in fields(batch)}
    steps = known.get("steps")
    count = 4 * (torch.ones_like(batch.rewards) if steps is None else steps)
    made = {
        "rows": torch.zeros_like(batch.rewards, dtype=torch.int64),
        "discount": discount,
        "returns_to_go": batch.rewards * 3.0,
        "steps_to_go": count,
        "first_returns": batch.rewards * 2.0 - 1.0,
        "first_steps": 2 * count,
        "first_observations": batch.observations.roll(1, 1),
        "final_observations": batch.next_observations.roll(2, 1),
        "final_terminations": batch.terminations.roll(2, 1),
    }
    return LookaheadBatch(**known | made)


class Followed(ODICE):
    """O-DICE whose batches say what their episodes earned."""

    def update(self, batch: Batch) -> Any:
        return super().update(with_episodes(batch, self.config.discount))


CONTRACT = [
    pytest.param(check, id=f"{kind}-{what}")
    for kind in KINDS
    for what, check in agent_checks(Followed, make_config("odice", **SMALL, weight_residual=kind))
    if "three_hundred" not in what or "(continuous)" in what
]


@pytest.mark.parametrize("check", CONTRACT)
def test_contract(check: Callable[[], None]) -> None:
    check()


def data(lengths: list[int], seed: int = 0, rewards: Tensor | None = None) -> TransitionDataset:
    """Episodes of these lengths without structure, every second one terminated."""
    draw = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ends = torch.zeros(total, dtype=torch.bool)
    ends[torch.tensor(lengths).cumsum(0) - 1] = True
    even = torch.repeat_interleave(torch.arange(len(lengths)) % 2 == 0, torch.tensor(lengths))
    return dataset_from_arrays(
        torch.randn(total, 3, generator=draw),
        torch.rand(total, 2, generator=draw) * 2 - 1,
        torch.randn(total, generator=draw) if rewards is None else rewards,
        torch.randn(total, 3, generator=draw),
        ends & even,
        ends & ~even,
        spec=DatasetSpec(observation_space=spaces.Box(-9, 9, (3,)), action_space=spaces.Box(-1, 1, (2,))),
    )


def agent_for(dataset: TransitionDataset, seeds: int = 1, **overrides: Any) -> ODICE:
    config = make_config("odice", **{**SMALL, "weight_residual": "return", **overrides})
    mean, std = return_statistics(dataset, config.discount)
    normalizer = make_normalizer(dataset.spec, seeds=seeds, return_mean=mean, return_std=std)
    made = make_agent(config, dataset.spec, seeds=seeds, dtype=torch.float64, normalizer=normalizer)
    assert isinstance(made, ODICE)
    return made


def whole(dataset: TransitionDataset, discount: float) -> Batch:
    return dataset.looking_ahead(1, discount, episodes=True).gather(torch.arange(len(dataset)).view(1, -1))


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), discount=st.floats(0.0, 1.0), seed=st.integers(0, 9)
)
def test_advantages_are_those_of_a_loop(lengths: list[int], discount: float, seed: int) -> None:
    """Return to go, V where the episode was cut off, less V; in units of reward, whatever V counts in."""
    dataset = data(lengths, seed)
    agent = agent_for(dataset, discount=discount)
    batch = whole(dataset, discount)
    found = [part[0, 0] * agent.normalizer.return_std[0] for part in agent.advantages(agent.normalize(batch))]  # type: ignore[index]
    here, there = (
        agent.value(getattr(batch, name))[0] for name in ("observations", "next_observations")
    )  # V is its target
    for start, end in zip(dataset.episode_starts[:-1].tolist(), dataset.episode_starts[1:].tolist(), strict=True):
        earned = 0.0 if dataset.terminations[end - 1] else float(there[end - 1])
        for row in reversed(range(start, end)):
            earned = float(dataset.rewards[row]) + discount * earned
            assert float(found[0][row]) == pytest.approx(earned - float(here[row]), rel=1e-5, abs=1e-5)
        first = torch.full((end - start,), earned - float(here[start]), dtype=torch.float64)
        torch.testing.assert_close(found[1][start:end], first, rtol=1e-5, atol=1e-5)


@settings(max_examples=12, deadline=None)
@given(
    scale=st.floats(-6.0, 6.0).map(lambda power: 10.0**power),
    kind=st.sampled_from(KINDS),
    k=st.sampled_from([0.0, 1.0]),
)
def test_the_size_of_rewards_changes_nothing(scale: float, kind: str, k: float) -> None:
    plain = data([5, 3, 6])
    scaled = plain.with_rewards(plain.rewards * scale)
    agents = [agent_for(d, weight_residual=kind, trajectory_weight=k) for d in (plain, scaled)]
    for _ in range(3):
        for agent, dataset in zip(agents, (plain, scaled), strict=True):
            agent.update(whole(dataset, agent.config.discount))
    ours, theirs = (agent.state_dict() for agent in agents)
    for name in theirs:
        if name.startswith("policy"):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_the_product_of_both(kind: str) -> None:
    """Of mean one, rising with what followed, and with what the episode earned above V at its start."""
    dataset = data([5, 3, 6, 8, 8])
    batch = whole(dataset, 0.99)
    both, plain = (agent_for(dataset, weight_residual=kind, trajectory_weight=k) for k in (1.5, 0.0))
    weight, single = (agent.terms(batch).weight[0, 0] for agent in (both, plain))
    torch.testing.assert_close(weight.mean(), torch.ones((), dtype=torch.float64))
    earned = both.advantages(both.normalize(batch))[1]
    factor = (1.5 * earned / earned.std(correction=0)).exp()[0, 0]
    product = single * (0.8 * factor / factor.mean() + 0.2)
    torch.testing.assert_close(weight, product / product.mean())
    starts = dataset.episode_starts[:-1]
    assert torch.equal(factor[starts].argsort(), earned[0, 0, starts].argsort())


def test_equal_episodes_weigh_the_same() -> None:
    weight = episode_weights(torch.full((1, 1, 8), 0.1, dtype=torch.float64), 1.0, 0.2)
    assert weight is not None
    torch.testing.assert_close(weight, torch.ones_like(weight))


def test_the_better_of_two_kinds_of_episodes_is_cloned() -> None:
    """Half of the episodes act -.5 and earn nothing, half act .5 and earn 1 a step; they see the same, so that cloning acts 0."""
    generator = torch.Generator().manual_seed(0)
    good = torch.arange(20) % 2 == 0
    steps = torch.repeat_interleave(good, 10)
    actions = torch.where(steps, 0.5, -0.5).unsqueeze(1) + 0.1 * torch.randn(200, 1, generator=generator)
    ends = torch.arange(200) % 10 == 9
    nothing = torch.zeros(200, 1)
    dataset = dataset_from_arrays(
        nothing, actions.clamp(-1, 1), steps.float(), nothing, ends, torch.zeros(200, dtype=torch.bool),
        spec=DatasetSpec(observation_space=spaces.Box(-1, 1, (1,)), action_space=spaces.Box(-1, 1, (1,))),
    )  # fmt: skip
    rates = {"value_learning_rate": 0.01, "policy_learning_rate": 0.01}
    acted = {}
    for floor in (0.2, 1.0):
        agent = agent_for(dataset, **rates, weight_floor=floor)
        for _ in range(150):
            agent.update(whole(dataset, agent.config.discount))
        acted[floor] = float(agent.policy(torch.zeros(1, 1, 1)).detach())
    assert acted[0.2] > 0.3
    assert abs(acted[1.0]) < 0.1


@settings(max_examples=60, deadline=None)
@given(
    same=st.integers(0, 40),
    value=st.sampled_from([-1.0, 0.0, 0.1, 1.0]),
    lengths=st.lists(st.integers(3, 13), min_size=4, max_size=4),
)
def test_the_data_decide_by_equal_rewards_and_episodes(same: int, value: float, lengths: list[int]) -> None:
    """Nine in ten rewards equal, and of the episodes half: a goal that is reached or not, but not how many steps it takes."""
    rewards = torch.arange(float(sum(lengths))) + 5.0
    rewards[:same] = value
    dataset = data(lengths, rewards=rewards)
    earned = [round(float(part.double().sum()), 4) for part in rewards.split(lengths)]
    equal = max(earned.count(found) for found in earned)
    common = max(same, 1) >= 0.9 * len(rewards)
    config, said = ODICE.settled(ODICEConfig(), dataset)
    assert config.weight_residual == ("mixed" if common and equal >= 2 else "return")
    assert said is not None
    assert "--weight-residual" in said


@pytest.mark.parametrize(
    ("step", "last", "lengths", "kind"),
    [
        (0.0, 1.0, [9, 20, 31, 40], "mixed"),  # a goal, reached always
        (-1.0, -1.0, [50, 50, 50, 20], "mixed"),  # a cost a step, most never arrive
        (-1.0, 0.0, [20, 31, 42, 50], "return"),  # a cost a step until it arrives
        (1.0, 1.0, [20, 31, 42, 50], "return"),  # alive as long as it can
    ],
)
def test_what_is_sparse(step: float, last: float, lengths: list[int], kind: str) -> None:
    rewards = torch.full((sum(lengths),), step)
    rewards[torch.tensor(lengths).cumsum(0) - 1] = last
    assert ODICE.settled(ODICEConfig(), data(lengths, rewards=rewards))[0].weight_residual == kind


@pytest.mark.parametrize("kind", ["return", "mixed", "expected", "sampled"])
def test_what_is_said_is_kept(kind: str) -> None:
    config = ODICEConfig(weight_residual=kind)  # type: ignore[arg-type]
    assert ODICE.settled(config, data([4])) == (config, None)
    online, said = ODICE.settled(config)
    assert online.weight_residual == (kind if kind in ("expected", "sampled") else "sampled")
    assert (said is None) == (online == config)


@pytest.mark.parametrize("weight", ["positive_residual", "conjugate_grad"])
def test_weights_that_need_a_residual_take_one(weight: Any) -> None:
    config = ODICEConfig(weight=weight)
    assert ODICE.settled(config, data([4])) == (config, None)
    for kind in KINDS:
        with pytest.raises(ConfigError, match="has no residual"):
            replace(config, weight_residual=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_without_episodes_are_refused(kind: str) -> None:
    dataset = data([4, 4])
    agent = agent_for(dataset, weight_residual=kind)
    with pytest.raises(ConfigError, match="episodes=True"):
        agent.update(dataset.gather(torch.arange(8).view(1, -1)))
    with pytest.raises(ConfigError, match="discounted by"):
        agent.update(whole(dataset, 0.5))


def test_a_plain_agent_needs_no_episodes() -> None:
    """Built by hand, "auto" is "expected"."""
    agents = [
        ODICE(make_config("odice", **SMALL, weight_residual=kind), 3, 2, dtype=torch.float64)
        for kind in ("auto", "expected")
    ]
    for agent in agents:
        agent.update(random_batch(1, 8, 3, 2, dtype=torch.float64))
    states = [agent.state_dict() for agent in agents]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_run_says_what_it_took_and_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = data([8] * 6)
    run = rlkit2.train("odice", dataset, steps=4, eval_every=0, batch_size=8, out=tmp_path, overrides=SMALL)
    assert run.config["config"]["weight_residual"] == "return"
    resumed = rlkit2.train(dataset=dataset, resume=run.path, steps=6)
    assert resumed.config["config"]["weight_residual"] == "return"
    assert "--weight-residual" in capsys.readouterr().err
    assert replace(resumed.agent.config, hidden_sizes=None) == ODICEConfig(weight_residual="return")


def test_online_it_learns_from_single_steps_and_says_so(tmp_path: Path) -> None:
    """What is collected has no end yet; the state of the offline run fits."""
    run = rlkit2.train("odice", "builtin/pendulum", steps=4, eval_every=0, batch_size=8, out=tmp_path, overrides=SMALL)
    with pytest.warns(RunWarning, match="'sampled' instead of 'return'"):
        online = rlkit2.train_online(run, steps=6, eval_every=0, batch_size=4, out=tmp_path)
    assert online.config["config"]["weight_residual"] == "sampled"
