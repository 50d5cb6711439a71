"""Agents that begin in an environment without a policy, with data or without."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import rlkit2
from rlkit2.agents.dqn import DQNConfig
from rlkit2.agents.sac import SACConfig
from rlkit2.errors import ConfigError, DatasetError, EnvironmentUnavailableError
from rlkit2.online import collected
from rlkit2.online.replay import online_dtype, replay_path
from rlkit2.training import Run
from rlkit2.training.building import stored_spec
from tests.online.walks import DATASET, QUICK, LongWalk, offline_run
from tests.training.tiny_problem import contents

SMALL = SACConfig(hidden_sizes=(8,))


def scratch(folder, agent=SMALL, dataset=None, **options):
    return rlkit2.train_online(
        agent,
        dataset,
        **{"steps": 60, "warmup": 20, "env": LongWalk, "out": folder, "batch_size": 8, **QUICK, **options},
    )


def records(run):
    return np.fromfile(replay_path(run.path, run.config["seeds"][0]), online_dtype(stored_spec(run.config)))


def test_the_first_actions_are_uniform_then_the_policy_acts(tmp_path):
    run = scratch(tmp_path, steps=400, warmup=300, eval_every=0)
    actions = records(run)["actions"]
    early = np.histogram(actions[:300], 4, (-2.0, 2.0))[0] / 600
    assert (np.abs(early - 0.25) < 0.07).all()
    assert run.config["online"]["offline_share"] == 0.0
    assert run.config["dataset"] == {
        "id": "LongWalk",
        "source": "",
        "content_hash": "",
        "transitions": 0,
        "observation_keys": None,
    }
    assert int(run.agent.step[0]) == 100


def test_data_are_mixed_in_from_the_first_update_on(tmp_path, monkeypatch):
    seen = []
    update = rlkit2.agents.agent_class("sac").update
    monkeypatch.setattr(
        rlkit2.agents.agent_class("sac"), "update", lambda self, batch: (seen.append(batch), update(self, batch))[1]
    )
    run = scratch(tmp_path, dataset=DATASET, eval_every=0, normalize_observations=True)
    assert run.config["online"]["offline_share"] == 0.5
    assert run.config["dataset"]["content_hash"] == DATASET.spec.content_hash
    assert all((batch.rows[0, :4] < len(DATASET)).all() and (batch.rows[0, 4:] >= len(DATASET)).all() for batch in seen)
    np.testing.assert_allclose(
        run.agent.normalizer.observation_mean[0, 0].numpy(), DATASET.observations.mean(0), atol=1e-5
    )


@pytest.mark.parametrize("kind", ["sac", "sac with data", "dqn"])
def test_it_resumes_bit_for_bit(tmp_path, kind):
    agent, options = (
        (DQNConfig(hidden_sizes=(8,), num_critics=2), {"env": "CartPole-v1"}) if kind == "dqn" else (SMALL, {})
    )
    dataset = DATASET if kind == "sac with data" else None
    whole = scratch(tmp_path / "a", agent, dataset, seeds=[3, 5], num_envs=2, **options)
    part = scratch(tmp_path / "b", agent, dataset, seeds=[3, 5], num_envs=2, until=31, **options)
    assert part.checkpoint().step == 31
    named = {} if kind == "dqn" else {"env": LongWalk}
    assert contents(rlkit2.train(resume=part, dataset=dataset, progress=False, **named)) == contents(whole)


@pytest.mark.parametrize(
    ("agent", "env", "package"), [("sac", "Hopper-v5", "mujoco"), ("dqn", "LunarLander-v3", "Box2D")]
)
def test_simulators_come_back_to_where_they_were(tmp_path, agent, env, package):
    """In the middle of an episode, by its seed and its actions alone."""
    pytest.importorskip(package)
    options = {
        "env": env,
        "steps": 100,
        "warmup": 95,
        "num_envs": 2,
        "eval_every": 0,
        "overrides": {"hidden_sizes": (8,)},
    }
    whole = scratch(tmp_path / "a", agent, **options)
    part = scratch(tmp_path / "b", agent, until=61, **options)
    assert contents(rlkit2.train(resume=part, progress=False)) == contents(whole)


def test_what_needs_data_or_an_environment_says_so(tmp_path):
    for options, message in (
        ({"normalize_observations": True}, "normalize_observations needs data to begin with"),
        ({"reward_transform": "return_range"}, "reward_transform needs data to begin with"),
        ({"env": None}, "no environment is named"),
        ({"env": LongWalk()}, "not an environment that is there"),
        ({"agent": "bc"}, "BC chooses or makes"),
        ({"agent": "dqn"}, "DQN is for discrete actions"),
        ({"agent": "sak"}, "did you mean sac"),
        ({"overrides": {"num_critic": 3}}, "did you mean num_critics"),
    ):
        with pytest.raises(ConfigError, match=message):
            scratch(tmp_path, **options)
    with pytest.raises(EnvironmentUnavailableError, match="cannot be built"):
        scratch(tmp_path, env="Pendulum-v9")
    assert not list(tmp_path.iterdir())


def test_sac_is_sacn_with_two_critics(tmp_path):
    """The same numbers, so that one file serves both."""
    common = {"num_critics": 2, "hidden_sizes": (8,), "log_std_bounds": (-20.0, 2.0)}
    runs = [
        rlkit2.train(
            name, DATASET, steps=20, out=tmp_path, eval_every=0, batch_size=8, overrides=common, progress=False
        )
        for name in ("sac", "sacn")
    ]
    states = [run.agent.state_dict() for run in runs]
    assert all((states[0][name] == states[1][name]).all() for name in states[1])


def test_a_run_without_its_environment_or_data_is_asked_for_them(tmp_path):
    run = scratch(tmp_path, until=30)
    with pytest.raises(ConfigError, match="the run began in LongWalk without data; name some with --dataset"):
        rlkit2.offline_evaluate(run, methods=["own"])
    with pytest.raises(EnvironmentUnavailableError, match="names no environment; name one with --env"):
        rlkit2.train(resume=run, progress=False)
    assert isinstance(run, Run)
    again = offline_run(tmp_path, "sac", seeds=1)
    assert (
        rlkit2.train_online(again, DATASET, env=LongWalk, steps=20, out=tmp_path, **QUICK).manifest["status"]
        == "finished"
    )


def test_what_was_collected_is_kept_as_a_dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    run = scratch(tmp_path / "runs", seeds=[3, 5], num_envs=2, record="own/walks-v0", eval_every=0)
    dataset = rlkit2.load_dataset("own/walks-v0")
    assert len(dataset) == 120
    assert torch.equal(dataset.observations, collected(run).observations)
    ends = dataset.episode_starts[1:] - 1
    flags = dataset.terminations | dataset.truncations
    assert flags[ends].all()
    assert flags.sum() == len(ends) == dataset.num_episodes
    rows = records(run)
    own = torch.from_numpy(rows["rewards"][1::2].copy())  # seed 3, environment 1: behind its environment 0
    assert torch.equal(dataset.rewards[30:60], own)
    follows = (dataset.next_observations[:-1] == dataset.observations[1:]).all(1)
    assert torch.equal(follows, ~flags[:-1])
    again = rlkit2.train(resume=run, env=LongWalk, progress=False)  # finished and kept: nothing to do
    assert again.status == "finished"
    with pytest.raises(DatasetError, match="own/walks-v0 exists"):
        scratch(tmp_path / "runs", record="own/walks-v0")
    with pytest.raises(DatasetError, match="is not a dataset id"):
        scratch(tmp_path / "runs", record="walks")
    with pytest.raises(ConfigError, match="record keeps single observations"):
        scratch(tmp_path / "runs", record="own/stacks-v0", frame_stack=2)
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert len(rlkit2.train("bc", "own/walks-v0", steps=5, out=tmp_path, eval_every=0, progress=False).metrics()) > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a busy machine
def test_sac_learns_the_pendulum_and_dqn_the_cart(tmp_path):
    wide = {"hidden_sizes": (64, 64), "critic_learning_rate": 1e-3}
    sac = rlkit2.train_online(
        SACConfig(**wide, policy_learning_rate=1e-3), env="Pendulum-v1", steps=6000, out=tmp_path, progress=False
    )
    assert np.mean(sac.evaluations()[-1]["returns"]) > -350.0
    dqn = rlkit2.train_online(DQNConfig(**wide), env="CartPole-v1", steps=8000, out=tmp_path, progress=False)
    assert np.mean(dqn.evaluations()[-1]["returns"]) > 150.0
