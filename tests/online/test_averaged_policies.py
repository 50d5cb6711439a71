"""A running mean of the policy, in an environment: it is taken over from an offline run, begun or left there, and never what acts."""

from __future__ import annotations

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


@pytest.mark.parametrize("agent", ["sacn", "td3bc", "iql"])
@pytest.mark.parametrize(
    ("before", "asked", "after"), [(0.9, None, 0.9), (0.9, 0.0, 0.0), (0.0, 0.9, 0.9), (0.9, 0.5, 0.5)]
)
def test_every_way_from_offline_to_online(tmp_path, agent, before, asked, after):
    begun = offline_run(tmp_path, agent, policy_ema=before)
    given = {} if asked is None else {"policy_ema": asked}
    run = online(begun, tmp_path, **given)
    assert run.config["training"]["policy_ema"] == after
    assert bool(parts(run, "policy_average")) == (after > 0.0)
    if after:
        assert differ(parts(run, "policy_average"), parts(run, "policy"))
    plain = online(offline_run(tmp_path, agent), tmp_path)
    assert not differ(parts(run, "policy"), parts(plain, "policy"))  # it neither acts nor is trained


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
