"""A running mean of the policy, in an environment: it is taken over from an offline run, begun or left there, and never what acts."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import rlkit2
from rlkit2.agents.ppo import PPOConfig
from tests.online.walks import QUICK, LongWalk, offline_run, online

OPTIONS = {"env": LongWalk, "num_envs": 3, "steps": 60, **QUICK}


def parts(run, name):
    """All weights of a part of the run's last checkpoint, by what they are called in it."""
    tensors = run.checkpoint().tensors
    return {key.partition(f"{name}.")[2]: value for key, value in tensors.items() if key.startswith(f"agent.{name}.")}


def differ(left, right):
    assert left.keys() == right.keys()
    assert left
    return any(not torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Offline runs by agent and decay, each trained once."""
    return cache(lambda agent, decay: offline_run(tmp_path_factory.mktemp("begun"), agent, policy_ema=decay))


@pytest.fixture(scope="module")
def plain(tmp_path_factory, begun):
    """The weights of an agent's policy where nothing is averaged, offline or online."""
    return cache(
        lambda agent: parts(online(begun(agent, 0.0), tmp_path_factory.mktemp("plain"), eval_every=0), "policy")
    )


@pytest.mark.parametrize("agent", ["sacn", "td3bc", "iql"])
@pytest.mark.parametrize(
    ("before", "asked", "after"), [(0.9, None, 0.9), (0.9, 0.0, 0.0), (0.0, 0.9, 0.9), (0.9, 0.5, 0.5)]
)
def test_every_way_from_offline_to_online(tmp_path, begun, plain, agent, before, asked, after):
    given = {} if asked is None else {"policy_ema": asked}
    run = online(begun(agent, before), tmp_path, eval_every=0, **given)
    assert run.config["training"]["policy_ema"] == after
    assert bool(parts(run, "policy_average")) == (after > 0.0)
    if after:
        assert differ(parts(run, "policy_average"), parts(run, "policy"))
    assert not differ(parts(run, "policy"), plain(agent))  # it neither acts nor is trained


def test_a_mean_that_begins_online_begins_at_the_trained_policy(tmp_path):
    begun = offline_run(tmp_path, "sacn")
    run = online(begun, tmp_path, policy_ema=0.9, warmup=59, steps=60, update_ratio=0.01)  # no update
    assert not differ(parts(run, "policy_average"), parts(run, "policy"))
    assert not differ(parts(run, "policy"), parts(begun, "policy"))


def test_ppo_averages_what_it_trains(tmp_path):
    config = PPOConfig(hidden_sizes=(8,), rollout_steps=18, epochs=2)
    runs = {decay: rlkit2.train_online(config, policy_ema=decay, out=tmp_path, **OPTIONS) for decay in (0.0, 0.5)}
    assert not differ(parts(runs[0.0], "policy"), parts(runs[0.5], "policy"))
    fresh = rlkit2.train_online(config, policy_ema=0.5, out=tmp_path, **{**OPTIONS, "steps": 3})
    averaged = parts(runs[0.5], "policy_average")
    assert differ(averaged, parts(runs[0.5], "policy"))
    assert differ(averaged, parts(fresh, "policy"))


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_what_labelled_the_data_stays_behind(tmp_path, decay):
    """Generalized advantages are of whole episodes: the value that labels them has no place in an environment."""
    begun = offline_run(tmp_path, "odice", policy_ema=decay, overrides={"gae_lambda": 0.5, "weight_residual": "return"})
    assert parts(begun, "labelling_value")
    with pytest.warns(UserWarning, match="'sampled' instead of 'return'"):
        run = online(begun, tmp_path, eval_every=0)
    assert not parts(run, "labelling_value")
    assert (run.config["config"]["gae_lambda"], run.config["config"]["weight_residual"]) == (1.0, "sampled")
    assert bool(parts(run, "policy_average")) == (decay > 0.0)
