"""`num_steps`: what is trained on, that it resumes, and who refuses it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import rlkit2
from rlkit2.agents import list_agents, make_agent, make_config
from rlkit2.cli.main import main
from rlkit2.errors import ConfigError
from rlkit2.training import DataOptions
from rlkit2.training.building import prepare_dataset
from rlkit2.training.groups import BatchIndices
from tests.training.tiny_problem import tiny_dataset

DATASET = tiny_dataset(length=7)
OPTIONS = {"eval_every": 0, "batch_size": 16, "progress": False, "compile": "off", "normalize_observations": False}
SMALL = {"hidden_sizes": [8], "discount": 0.9}


def trained(folder, steps=12, **options):
    return rlkit2.train("iql", DATASET, steps=steps, out=folder, overrides=SMALL, **{**OPTIONS, **options})


def test_it_trains_on_returns_discounted_as_the_agent_discounts(tmp_path):
    run = trained(tmp_path, num_steps=3)
    assert run.config["data"]["num_steps"] == 3
    agent = make_agent(make_config("iql", **SMALL), DATASET.spec)
    ahead, rows = DATASET.looking_ahead(3, 0.9), BatchIndices(DATASET, [0], 16)
    for _ in range(12):
        agent.update(ahead.gather(rows.next()))
    stored = run.agent.state_dict()
    learnt = {name: tensor for name, tensor in agent.state_dict().items() if name.startswith(("critic", "value"))}
    assert len(learnt) > 10  # the policy's step size follows the run
    for name, tensor in learnt.items():
        torch.testing.assert_close(stored[name], tensor, rtol=1e-5, atol=1e-7, msg=name)
    single = trained(tmp_path).agent.state_dict()
    assert (single["critic.layers.0.weight"] - stored["critic.layers.0.weight"]).abs().max() > 1e-4


def test_it_resumes_bit_for_bit(tmp_path):
    whole = trained(tmp_path / "whole", num_steps=3)
    half = trained(tmp_path / "half", num_steps=3, until=5)
    resumed = rlkit2.train(dataset=DATASET, resume=half, progress=False, compile="off")
    for name, tensor in whole.agent.state_dict().items():
        assert torch.equal(resumed.agent.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", ["bc", "odice_il", "cpl", "ipl"])
def test_others_refuse_in_one_line_before_a_folder_is_made(tmp_path, name, capsys):
    with pytest.raises(ConfigError, match=f"^{name} learns from single steps; leave num_steps at 1"):
        rlkit2.train(name, DATASET, steps=2, out=tmp_path / "runs", num_steps=2, **OPTIONS)
    assert not (tmp_path / "runs").exists()
    assert name in list_agents()


def test_a_dataset_that_looks_ahead_is_not_trained_on(tmp_path):
    with pytest.raises(ConfigError, match="give the dataset as it was loaded, and num_steps as an option"):
        rlkit2.train("iql", DATASET.looking_ahead(2, 0.9), steps=2, out=tmp_path, **OPTIONS)


def test_the_datas_next_actions_are_trained_on_where_an_agent_asks_for_them(tmp_path):
    overrides = {**SMALL, "critic_penalty": 5.0}
    run = rlkit2.train("rebrac", DATASET, steps=8, out=tmp_path, overrides=overrides, num_steps=2, **OPTIONS)
    agent = make_agent(make_config("rebrac", **overrides), DATASET.spec)
    ahead, rows = DATASET.looking_ahead(2, 0.9, next_actions=True), BatchIndices(DATASET, [0], 16)
    for _ in range(8):
        agent.update(ahead.gather(rows.next()))
    for name, tensor in agent.state_dict().items():
        torch.testing.assert_close(run.agent.state_dict()[name], tensor, rtol=1e-5, atol=1e-7, msg=name)


def test_without_next_actions_it_says_where_they_come_from():
    agent = make_agent(make_config("rebrac", **SMALL), DATASET.spec)
    with pytest.raises(
        ConfigError, match=r"ReBRAC needs the data's next actions; take batches from dataset.looking_ahead"
    ):
        agent.update(DATASET.gather(torch.zeros(1, 4, dtype=torch.int64)))


def test_what_did_not_follow_does_not_count():
    """At the end of an episode another stand-in for the next action changes nothing; elsewhere it does."""
    targets = []
    for shift in (0.0, 0.5):
        agent = make_agent(make_config("rebrac", **SMALL, critic_penalty=1.0), DATASET.spec)
        batch = DATASET.looking_ahead(next_actions=True).gather(torch.arange(14).view(1, -1))
        moved = dataclasses.replace(batch, next_actions=batch.next_actions + shift)
        targets.append(agent.critic_targets(agent.normalize(moved))[0])
    same = (targets[0] == targets[1]).tolist()
    assert same == [row in (6, 13) for row in range(14)]


def test_another_discount_is_noticed():
    agent = make_agent(make_config("iql", **SMALL), DATASET.spec)
    with pytest.raises(ConfigError, match=r"the batch's returns are discounted by 0.99, the agent discounts by 0.9"):
        agent.update(DATASET.looking_ahead(2, 0.99).gather(torch.zeros(1, 4, dtype=torch.int64)))


def test_diagnostics_see_the_targets_of_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rlkit2.cli.uncertainty.load_dataset", lambda source, **_: DATASET)
    overrides = {**SMALL, "critic": "ggd"}
    run = rlkit2.train(
        "iql", DATASET, steps=20, out=tmp_path, overrides=overrides, num_steps=4, held_out=0.3, **OPTIONS
    )
    assert main(["uncertainty", str(run.path), "--json"]) == 0
    options = DataOptions(**{**run.config["data"], "held_out": 0.0})
    seen = prepare_dataset(DATASET, type(run.agent), run.agent.config, options)
    found = run.agent.predicted_targets(seen.gather(torch.arange(50).view(1, -1)))
    plain = prepare_dataset(DATASET, type(run.agent), run.agent.config, dataclasses.replace(options, num_steps=1))
    other = run.agent.predicted_targets(plain.gather(torch.arange(50).view(1, -1)))
    assert not torch.allclose(found.targets, other.targets)
