"""`rlkit2 evaluate --offline` and `rlkit2 select` on trained runs, and `rlkit2.offline_evaluate` behind them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import rlkit2
from rlkit2.cli.main import main
from rlkit2.errors import ConfigError
from rlkit2.evaluation.offline import OfflineOptions
from tests.built import give_built

COMMON = {"steps": 150, "eval_every": 0, "batch_size": 32, "progress": False}
SMALL = {"hidden_sizes": (16,)}
QUICK = OfflineOptions(hidden_sizes=(16,), steps=200, members=3, batch_size=32, features=32, target_update_rate=0.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A built-in dataset, built once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLKIT2_CACHE", str(tmp_path_factory.mktemp("cache")))
        return str(
            give_built("builtin/cartpole/random-v0", root=tmp_path_factory.mktemp("data"))
            / "builtin/cartpole/random-v0"
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    """Cloning with two seeds and IQL on half the rewards, both of a built-in dataset with discrete actions."""
    out = tmp_path_factory.mktemp("runs")
    bc = rlkit2.train("bc", data, seeds=2, out=out, overrides=SMALL, **COMMON)
    iql = rlkit2.train(
        "iql",
        data,
        out=out,
        overrides={**SMALL, "discount": 0.9, "critic_learning_rate": 0.01, "value_learning_rate": 0.01},
        reward_scale=0.5,
        checkpoint_every=75,
        **COMMON,
    )
    return bc, iql


def printed(capsys, *arguments):
    assert main([str(part) for part in arguments]) == 0
    return capsys.readouterr().out


def test_evaluate_offline(capsys, runs):
    quick = ["--offline", "--steps", "100", "--members", "3"]
    noise = ["--critic", "ggd", "--sample-weighting", "iv"]
    text = printed(capsys, "evaluate", runs[0].path, *quick, "--methods", "fqe", "own", *noise)
    assert "noise of fitted Q's targets (ggd)" in " ".join(text.split())
    assert "discount 0.99: the default, as the training had none" in text
    assert "own: BC has no Q of its policy" in text
    assert "refused" in text
    assert f"{runs[0].path.name}, seed 1" in text
    content = json.loads(printed(capsys, "evaluate", runs[1].path, *quick, "--methods", "dice", "--json"))
    assert content["discount"] == 0.9
    assert content["estimates"]["dice"][0]["low"] < content["estimates"]["dice"][0]["value"]


def test_select_ranks_and_holds_the_ranking_against_the_truth(capsys, runs):
    arguments = [run.path for run in runs] + ["--steps", "100", "--members", "3", "--discount", "0.9"]
    content = json.loads(printed(capsys, "select", *arguments, "--play", "2", "--json"))
    labels = content["policies"]
    assert sorted(content["ranking"]) == sorted(labels)
    assert len(labels) == 3
    values = dict(zip(labels, content["estimates"]["fqe"], strict=True))
    keys = [(not values[label]["trusted"], -values[label]["value"]) for label in content["ranking"]]
    assert keys == sorted(keys)
    played = [rlkit2.evaluate(run, episodes=2).returns.mean(1) for run in runs]
    assert content["played"] == pytest.approx(np.concatenate(played).tolist())
    assert set(content["agreement"]) == {"fqe", "dice"}
    text = printed(capsys, "select", *arguments, "--play", "2", "--by", "own")
    assert "first by own: iql" in text
    assert "no estimate that can be trusted speaks for it" in text
    assert "own against the played returns: policies 1, rank correlation unknown, regret@1" in text


def test_checkpoints_are_judged_and_ranked(capsys, runs):
    run, name = runs[1], runs[1].path.name
    own = ["--methods", "own", "--json"]
    earlier, last, final = (
        json.loads(printed(capsys, "evaluate", run.path, "--offline", *own, *given))
        for given in (["--checkpoint", "75"], ["--checkpoint", "last"], [])
    )
    assert (earlier["policies"], last["policies"], final["policies"]) == ([f"{name} at 75"], [f"{name} at 150"], [name])
    assert last["estimates"] == final["estimates"]
    first = rlkit2.load_dataset(run.config["dataset"]["source"])
    observations = first.observations[first.episode_starts[:-1]].unsqueeze(0)
    agent = run.load_agent(75)
    expected = float(agent.q(observations, agent.policy(observations)).mean()) / 0.5
    assert earlier["estimates"]["own"][0]["value"] == pytest.approx(expected, rel=1e-5)
    assert earlier["estimates"]["own"] != last["estimates"]["own"]
    ranked = json.loads(
        printed(capsys, "select", run.path, "--checkpoints", "--by", "own", "--play", "1", "--json", *own[:2])
    )
    steps = list(run.checkpoints)  # a slow machine keeps more of them
    assert {75, 150} <= set(steps)
    assert ranked["policies"] == [f"{name} at {step}" for step in steps]
    assert sorted(ranked["ranking"]) == sorted(ranked["policies"])
    assert ranked["played"] == [float(rlkit2.evaluate(run.at(step), episodes=1).returns[0, 0]) for step in steps]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--offline", "--checkpoint", "7"], "has no checkpoint of step 7; steps there are: ["),
        (["--offline", "--checkpoint", "best"], "never evaluated during training"),
        (["--offline", "--max-steps", "3"], "leave --max-steps out"),
        (["--critic", "ggd"], "only --offline takes this; leave --critic out"),
        (["--offline", "--sample-weighting", "iv"], "weights between samples need critic"),
        (["--discount", "0.9"], "only --offline takes this; leave --discount out"),
        (["--offline", "--methods", "magic"], "unknown method 'magic'; choose from: fqe, dice, is, dr, own"),
    ],
)
def test_options_that_do_not_fit(capsys, runs, arguments, message):
    assert main(["evaluate", str(runs[0].path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_own_values_are_in_the_datasets_rewards(runs, data):
    _, iql = runs
    found = rlkit2.offline_evaluate(iql, methods=("own",), options=QUICK)
    dataset = rlkit2.load_dataset(data)
    first = dataset.observations[dataset.episode_starts[:-1]].unsqueeze(0)
    agent = iql.agent
    expected = agent.q(first, agent.policy(first)).mean() / 0.5
    assert found["own"].value == pytest.approx(float(expected), rel=1e-5)
    assert not found["own"].trusted
    assert (
        "0.9, not 0.5" in rlkit2.offline_evaluate(iql, methods=("own",), discount=0.5, options=QUICK)["own"].reasons[0]
    )


def test_policies_alone_and_several_discounts(runs, data, tmp_path):
    policy = runs[0].policy
    with pytest.raises(ConfigError, match="a policy alone names no dataset; name the one"):
        rlkit2.offline_evaluate(policy)
    policy.save(tmp_path / "saved")
    found = rlkit2.offline_evaluate([tmp_path / "saved", policy], data, methods=("fqe",), options=QUICK)
    assert found.labels == ("policy 0, seed 0", "policy 0, seed 1", "policy 1, seed 0", "policy 1, seed 1")
    values = [one.value for one in found.estimates["fqe"]]
    assert values[:2] == pytest.approx(values[2:], rel=1e-4)
    other = rlkit2.train("iql", data, out=tmp_path, overrides=SMALL, **{**COMMON, "steps": 1})
    with pytest.raises(ConfigError, match=r"several discounts \(0.9, 0.99\)"):
        rlkit2.offline_evaluate([runs[1], other])


def test_a_policy_that_broke_is_refused(runs, data):
    """The largest of NaNs is an action like any other, so the weights are looked at."""
    policy = runs[0].policy
    for parameter in policy.actor.parameters():
        parameter.data[1] = torch.nan
    with pytest.raises(ConfigError, match="policy 0: weights of seed 1 are not finite"):
        rlkit2.offline_evaluate(policy, data, methods=("fqe",), options=QUICK)
