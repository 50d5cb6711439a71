"""PPO: advantages, the clip, rollouts that are learnt from and forgotten, and runs that resume."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import rlkit2
from rlkit2.agents.ppo import PPO, PPOConfig, RolloutBatch
from rlkit2.data import Batch
from rlkit2.errors import ConfigError
from rlkit2.online.collector import Collector
from rlkit2.testing import random_batch, random_rollouts
from tests.online.test_online import interrupt
from tests.online.walks import DATASET, QUICK, LongWalk
from tests.training.tiny_problem import contents

SMALL = PPOConfig(hidden_sizes=(8,), rollout_steps=18, epochs=2)
SEEDS, ENVS, TIMES = (3, 8), 2, 12


def build(**options):
    return PPO(dataclasses.replace(SMALL, **options), 3, 2, seeds=SEEDS, dtype=torch.float64)


def steps():
    """Rows of two environments in turn, with ends of both kinds."""
    batch = random_batch(len(SEEDS), TIMES * ENVS, 3, 2, generator=1, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    terminated, truncated = (torch.rand(batch.rewards.shape, generator=draw) < 0.2 for _ in range(2))
    return dataclasses.replace(batch, terminations=terminated, truncations=truncated)


def test_advantages_are_those_of_the_definition():
    agent, batch = build(num_critics=3), steps()
    found = agent.rollout(batch, ENVS)
    gamma, trace = agent.config.discount, agent.config.trace
    values, following = (agent.values(rows).detach() for rows in (batch.observations, batch.next_observations))
    both = 0
    for s in range(len(SEEDS)):
        for row in range(TIMES * ENVS):
            of_members = []
            for member in range(3):
                total, weight, r = 0.0, 1.0, row
                while r < TIMES * ENVS:
                    left = 0.0 if batch.terminations[s, r] else gamma * following[s, member, r]
                    total += weight * (batch.rewards[s, r] + left - values[s, member, r])
                    if batch.terminations[s, r] or batch.truncations[s, r]:
                        both += 1
                        break
                    weight, r = weight * gamma * trace, r + ENVS
                assert found.returns[s, member, row].item() == pytest.approx(
                    float(total + values[s, member, row]), abs=1e-9
                )
                of_members.append(float(total))
            assert found.advantages[s, row].item() == pytest.approx(np.mean(of_members), abs=1e-9)
    assert both > 0
    assert (found.log_probs == agent.actor.log_prob(batch.observations, batch.actions)).all()


def test_the_first_update_has_nothing_to_clip_and_a_far_policy_gains_nothing():
    agent = build()
    rollout = agent.rollout(steps(), ENVS)
    metrics = agent.update(rollout)
    assert (metrics["policy/clip_share"] == 0.0).all()
    assert metrics["policy/divergence"].abs().max() < 1e-12
    assert metrics["policy/loss"].abs().max() < 1e-12  # standardised advantages at a ratio of one
    far = agent.rollout(steps(), ENVS)
    sign = torch.sign(far.advantages - far.advantages.mean(1, keepdim=True))
    beyond = dataclasses.replace(
        far, log_probs=far.log_probs - sign
    )  # good actions more than clip likelier, bad ones less
    assert (agent.update(beyond)["policy/grad_norm"] < 1e-12).all()
    short = dataclasses.replace(far, log_probs=far.log_probs + sign)  # the other way: nothing holds it back
    assert (agent.update(short)["policy/grad_norm"] > 1e-3).all()


@pytest.mark.parametrize(
    "options",
    [
        {"critic": "gaussian", "num_critics": 3, "sample_weighting": "biv"},
        {
            "critic": "ggd",
            "num_critics": 4,
            "sample_weighting": "biev",
            "coupling": "ggd",
            "critic_form": "official",
            "critic_scale": "fixed",
        },
        {"critic": "ggd"},
    ],
)
def test_values_with_every_noise_model(options):
    agent = build(**options)
    for step in range(3):
        rollout = random_rollouts(len(SEEDS), 24, 3, 2, generator=step, dtype=torch.float64)
        members = agent.config.num_critics
        metrics = agent.update(dataclasses.replace(rollout, returns=rollout.returns.expand(-1, members, -1)))
    assert all(bool(value.isfinite().all()) for value in metrics.values())
    assert metrics["noise/aleatoric_sd"].shape == (len(SEEDS),)
    assert agent.value(torch.zeros(len(SEEDS), 5, 3)).shape == (len(SEEDS), 5)


def test_what_has_no_meaning_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="set coupling = 'ggd'"):
        build(critic="ggd", num_critics=3, sample_weighting="biev")
    with pytest.raises(ConfigError, match="bootstrap = 'rows' counts the rows of recorded data"):
        build(bootstrap="rows", num_critics=2)
    with pytest.raises(ConfigError, match="ppo learns from what it has just done itself: rlkit2 train ppo --env"):
        rlkit2.train("ppo", DATASET, steps=5, out=tmp_path, progress=False)
    for options, message in (
        ({"dataset": DATASET}, "data are of other policies"),
        ({"offline_share": 0.5}, "offline_share is about older transitions"),
        ({"num_envs": 4}, "rollout_steps = 18 cannot be shared out over 4 environments"),
    ):
        with pytest.raises(ConfigError, match=message):
            act(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def act(folder, agent=SMALL, **options):
    return rlkit2.train_online(
        agent, **{"steps": 70, "env": LongWalk, "out": folder, "batch_size": 8, "num_envs": 3, **QUICK, **options}
    )


def test_every_rollout_serves_every_epoch_and_is_forgotten(tmp_path, monkeypatch):
    seen, rollouts = [], []
    update, rollout = PPO.update, PPO.rollout
    monkeypatch.setattr(PPO, "update", lambda self, batch: (seen.append(batch), update(self, batch))[1])
    monkeypatch.setattr(
        PPO, "rollout", lambda self, batch, envs: (rollouts.append(batch), rollout(self, batch, envs))[1]
    )
    run = act(tmp_path, eval_every=0)
    assert [len(part.rewards[0]) for part in seen] == 3 * 2 * [8, 8, 2]  # three whole rollouts of 18, two epochs each
    for number, whole in enumerate(rollouts):
        for epoch in range(2):
            parts = seen[6 * number + 3 * epoch :][:3]
            rewards = torch.cat([part.rewards[0] for part in parts])
            assert torch.equal(rewards.sort().values, whole.rewards[0].sort().values)
    assert not torch.equal(seen[0].rewards, seen[3].rewards)  # in another order
    assert int(run.agent.step[0]) == 18
    assert isinstance(seen[0], RolloutBatch | Batch)


@pytest.mark.parametrize("kind", ["walk", "cart"])
def test_it_resumes_bit_for_bit(tmp_path, monkeypatch, kind):
    options = {"env": "CartPole-v1"} if kind == "cart" else {}
    whole = contents(act(tmp_path / "a", seeds=[0, 5], **options))
    collect = Collector.collect
    for step in (4, 40):  # within the first rollout, within the third
        interrupt(monkeypatch, step)
        with pytest.raises(KeyboardInterrupt):
            act(tmp_path / str(step), seeds=[0, 5], **options)
        monkeypatch.setattr(Collector, "collect", collect)
        (config,) = (tmp_path / str(step)).glob("*/config.json")
        named = {} if kind == "cart" else {"env": LongWalk}
        assert contents(rlkit2.train(resume=config.parent, progress=False, **named)) == whole


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a busy machine
def test_it_learns_the_cart(tmp_path):
    config = PPOConfig(rollout_steps=1024, num_critics=3, critic="ggd")
    run = act(
        tmp_path, config, env="CartPole-v1", steps=20_480, num_envs=4, batch_size=64, eval_every=None, eval_episodes=5
    )
    assert np.mean(run.evaluations()[-1]["returns"]) > 300.0
