"""Learning rates that fall to zero over a run: the curve, the clock, and what a resume and more steps make of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import rlkit2
from rlkit2.agents.bc import BCConfig
from rlkit2.agents.iql import IQLConfig
from rlkit2.agents.td3bc import TD3BCConfig
from rlkit2.errors import ConfigError
from rlkit2.training.building import agent_factory
from rlkit2.training.options import TrainingOptions
from rlkit2.training.run import RunWarning
from tests.training.tiny_problem import Walk, contents, fit, interrupting, tiny_dataset, tiny_run

DATASET = tiny_dataset()
CONFIG = BCConfig(hidden_sizes=(8,))
STEPS = 24
CURVES = {
    "constant": lambda share: 1.0,
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
}


@pytest.mark.parametrize("schedule", CURVES)
@pytest.mark.parametrize("config", [CONFIG, TD3BCConfig(hidden_sizes=(8,)), IQLConfig(hidden_sizes=(8,))])
def test_every_optimiser_follows_the_curve_of_the_run(schedule: str, config: object, tmp_path: Path) -> None:
    """By the agent's clock: the policy of TD3+BC, which takes every second step, arrives together with the critics."""
    run = tiny_run(tmp_path, config, DATASET, [0], steps=STEPS, schedule=schedule)  # type: ignore[arg-type]
    agent = agent_factory(run.config, DATASET)([0], "cpu")
    rows = torch.arange(16).expand(1, -1)
    for step in range(STEPS + 2):
        agent.update(DATASET.gather(rows))
        for name, optimizer in agent._optimizers.items():
            delayed = name == "policy" and isinstance(
                config, TD3BCConfig
            )  # takes its step at the end of every second update
            if delayed and step % 2 == 0:
                continue
            own = name == "policy" and isinstance(config, IQLConfig) and schedule == "constant"
            factor = CURVES["cosine" if own else schedule](min((step + delayed) / STEPS, 1.0))
            start = config.learning_rate if isinstance(config, BCConfig) else getattr(config, f"{name}_learning_rate")
            assert float(optimizer._rate) == pytest.approx(start * factor, abs=1e-9)


@pytest.mark.parametrize("step", [1, 13, 20])
def test_an_interruption_leaves_no_trace(step: int, tmp_path: Path) -> None:
    options = {"steps": STEPS, "schedule": "linear", "checkpoint_every": 6, "batch_size": 8}
    whole = contents(fit(tiny_run(tmp_path / "whole", CONFIG, DATASET, [0, 1], **options), DATASET))
    run = tiny_run(tmp_path / "cut", CONFIG, DATASET, [0, 1], **options)
    with pytest.raises(KeyboardInterrupt):
        fit(run, DATASET, wrap=interrupting(step))
    assert contents(fit(run, DATASET)) == whole
    constant = tiny_run(tmp_path / "constant", CONFIG, DATASET, [0, 1], **{**options, "schedule": "constant"})
    assert contents(fit(constant, DATASET)) != whole


@pytest.mark.parametrize(
    ("config", "schedule", "said"),
    [(CONFIG, "linear", True), (CONFIG, "constant", False), (IQLConfig(hidden_sizes=(8,)), "constant", True)],
)
def test_more_steps_say_that_rates_rise_again(config: object, schedule: str, said: bool, tmp_path: Path) -> None:
    how = {"env": Walk, "eval_episodes": 1, "progress": False}
    run = rlkit2.train(config, DATASET, steps=8, out=tmp_path, batch_size=8, schedule=schedule, **how)  # type: ignore[arg-type]
    if said:
        with pytest.warns(RunWarning, match="fell towards 0 at step 8 and now do so at step 12: they rise again"):
            longer = rlkit2.train(resume=run.path, dataset=DATASET, steps=12, **how)  # type: ignore[arg-type]
        assert "rise again" in longer.manifest["warnings"][0]
    else:
        longer = rlkit2.train(resume=run.path, dataset=DATASET, steps=12, **how)  # type: ignore[arg-type]
        assert "warnings" not in longer.manifest
    assert longer.checkpoint().step == 12


def test_what_is_no_schedule() -> None:
    with pytest.raises(ConfigError, match="schedule must be"):
        TrainingOptions(schedule="stairs")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="policy_cosine_steps"):
        IQLConfig(policy_cosine_steps="walk")  # type: ignore[arg-type]
