"""The running mean of the policy's weights: what it is for every agent, that it is what is played and saved, and that a resume continues it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import rlkit2
from rlkit2.agents import agent_class, agent_kinds, list_agents
from rlkit2.agents.bc import BCConfig
from rlkit2.errors import ConfigError
from rlkit2.testing import Problem, map_batch
from rlkit2.training.building import agent_factory
from rlkit2.training.options import TrainingOptions
from tests.training.tiny_problem import contents, fit, interrupting, tiny_dataset, tiny_run

DATASET = tiny_dataset()
CASES = [(name, kind) for name in list_agents() for kind in agent_kinds(name)]
DECAY = 0.4  # polynomial decay in the first three updates, then the mean is exponential
OPTIONS = {"steps": 24, "policy_ema": 0.9, "checkpoint_every": 6, "batch_size": 8}


def weights(agent: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in agent.policy.actor.parameters()]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_agent_plays_the_mean_of_its_weights(name: str, kind: str) -> None:
    problem = Problem(agent_class(name, kind), kind)
    plain, averaged = problem.build(seeds=2), problem.build(seeds=2)
    averaged.average_policy(DECAY)
    means: list[torch.Tensor] = []
    for step, batch in enumerate(problem.batches(6, seeds=2)):
        plain.learn(batch)
        averaged.learn(map_batch(torch.clone, batch) if hasattr(batch, "observations") else batch)
        rate = max(4 / (step + 4), 1 - DECAY)
        now = weights(plain)
        means = [rate * new + (1 - rate) * old for old, new in zip(means or now, now, strict=True)]
    for found, wanted in zip(weights(averaged), means, strict=True):
        torch.testing.assert_close(found, wanted)
    state = averaged.state_dict()
    for key, value in plain.state_dict().items():  # what is trained does not know of it
        assert torch.equal(state[key], value), key
    assert any(not torch.equal(found, last) for found, last in zip(means, weights(plain), strict=True))


def test_an_interruption_leaves_no_trace(tmp_path: Path) -> None:
    config = BCConfig(hidden_sizes=(8,))
    whole = fit(tiny_run(tmp_path / "whole", config, DATASET, [0, 1], **OPTIONS), DATASET)
    run = tiny_run(tmp_path / "cut", config, DATASET, [0, 1], **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        fit(run, DATASET, wrap=interrupting(13))
    assert contents(fit(run, DATASET)) == contents(whole)
    last = tiny_run(tmp_path / "last", config, DATASET, [0, 1], **{**OPTIONS, "policy_ema": 0.0})
    saved = {"averaged": whole.policy.actor, "last": fit(last, DATASET).policy.actor, "agent": whole.agent.policy.actor}
    flat = {name: torch.cat([part.flatten() for part in actor.parameters()]) for name, actor in saved.items()}
    assert torch.equal(flat["averaged"], flat["agent"])  # the policy on disk is the mean
    assert not torch.allclose(flat["averaged"], flat["last"])


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_what_is_no_decay(decay: float) -> None:
    with pytest.raises(ConfigError, match="policy_ema must be"):
        TrainingOptions(policy_ema=decay)


@pytest.mark.parametrize(
    ("agent", "asked", "found"),
    [("bc", None, 0.0), ("bc", 0.5, 0.5), ("odice", None, 0.9999), ("odice", 0.0, 0.0), ("odice_released", None, 0.0)],
)
def test_an_agent_may_have_a_decay_of_its_own(tmp_path: Path, agent: str, asked: float | None, found: float) -> None:
    options = {} if asked is None else {"policy_ema": asked}
    sizes = {"hidden_sizes": (8,), **({"policy_hidden_sizes": (8,)} if agent == "odice_released" else {})}
    run = rlkit2.train(
        agent,
        DATASET,
        overrides=sizes,
        steps=3,
        batch_size=8,
        eval_every=0,
        out=tmp_path,
        progress=False,
        seeds=2,
        **options,
    )
    assert (
        run.config["training"]["policy_ema"] == found
    )  # what the run was is in its config, whatever the default becomes
    averaged = [name for name in run.checkpoint().tensors if "policy_average" in name]
    assert bool(averaged) == (found > 0.0)


def test_a_run_from_before_the_option_is_not_averaged() -> None:
    problem = Problem(agent_class("odice", "continuous"), "continuous")
    config = {"training": {"steps": 4}, "data": {"normalize_observations": False}, "agent": "odice"}
    stored = {**config, "config": dataclasses.asdict(problem.config), "spec": DATASET.spec.to_json()}
    assert agent_factory(stored)([0], "cpu").policy_ema == 0.0
