"""Learning rates that fall to zero over a run: the curve, the clock, and what a resume and more steps make of them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rlkit2
from rlkit2.agents.bc import BCConfig
from rlkit2.agents.iql import IQLConfig
from rlkit2.agents.td3bc import TD3BCConfig
from rlkit2.errors import ConfigError, RunError
from rlkit2.studies.benchmark import run_benchmark
from rlkit2.training.building import agent_factory
from rlkit2.training.options import TrainingOptions
from rlkit2.training.refinement import POINTS, refined_curve
from rlkit2.training.run import Run, RunWarning
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


def reference(norms: np.ndarray) -> np.ndarray:
    """The released code's schedule of norms without smoothing, as shares: w_t times the sum of all later w, w = 1 / |g|."""
    weights = 1.0 / norms
    tails = np.array([weights[t + 1 :].sum() for t in range(len(weights))])
    return weights * tails / (weights * tails).max()


@pytest.mark.parametrize(
    "shape",
    [lambda t: 1 + 0 * t, lambda t: np.exp(-3 * t) + 0.2, lambda t: 1 + 2 * t, lambda t: 1 + 0.5 * np.sin(5 * t)],
)
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e6])
def test_a_refined_curve_is_that_of_the_paper(shape: Any, size: float) -> None:
    at = (np.arange(4000) + 0.5) / 4000
    exact = reference(shape(at))
    ends = np.arange(50, 5001, 50)
    means = [shape((np.arange(end - 50, end) + 0.5) / 5000).mean() * size for end in ends]
    found = refined_curve(ends, means)
    inner = np.linspace(0, 1, POINTS)[6:-6]  # a median over a tenth of the run flattens the ends
    np.testing.assert_allclose(
        found[6:-6] / found[6:-6].max(), np.interp(inner, at, exact) / np.interp(inner, at, exact).max(), atol=0.04
    )
    assert found[-1] == 0.0
    assert found.max() == 1.0


def test_gradients_of_one_size_make_a_line_and_outliers_none() -> None:
    norms = np.ones(200)
    np.testing.assert_allclose(refined_curve(np.arange(1, 201), norms), np.linspace(1, 0, POINTS), atol=2e-3)
    norms[[20, 21, 100, 150]] = 1e5
    np.testing.assert_allclose(refined_curve(np.arange(1, 201), norms), np.linspace(1, 0, POINTS), atol=2e-3)


def first_run(folder: Path, agent: str, **options: Any) -> Any:
    quick: dict[str, Any] = {
        "seeds": 2,
        "steps": 40,
        "log_every": 1,
        "batch_size": 8,
        "eval_every": 0,
        "progress": False,
        "out": folder,
    }
    more = {"weight_residual": "expected"} if agent == "odice" else {}
    return rlkit2.train(agent, DATASET, overrides={"hidden_sizes": (8,), **more}, **{**quick, **options})


def test_a_refined_run_follows_the_curves_of_the_first_and_needs_it_no_more(tmp_path: Path) -> None:
    first = first_run(tmp_path, "odice")
    run = first_run(tmp_path, "odice", schedule="refined", refine_from=first.path)
    curves = run.config["schedule_curves"]
    assert set(curves) == {"policy", "value"}  # of e(s, a) no norm is logged
    lines = [line["value/grad_norm"] for line in first.metrics()]
    means = np.array(lines).reshape(-1, 2).mean(1)
    np.testing.assert_allclose(curves["value"], refined_curve(np.arange(1, 41), means), atol=1e-6)
    shutil.rmtree(first.path)
    agent = agent_factory(run.config, DATASET)([0], "cpu")
    for step in range(42):
        agent.update(DATASET.gather(torch.arange(16).expand(1, -1)))
        share = min(step / 40, 1.0)
        for part, rate in (("policy", 3e-4), ("value", 3e-4), ("residual", 3e-4)):
            wanted = np.interp(share, np.linspace(0, 1, POINTS), curves[part]) if part in curves else 1.0 - share
            assert float(agent._optimizers[part]._rate) == pytest.approx(rate * wanted, abs=1e-9)


def test_a_refined_run_is_resumed_bit_for_bit_and_stretched(tmp_path: Path) -> None:
    first = first_run(tmp_path, "bc")
    options = {
        "steps": STEPS,
        "schedule": "refined",
        "refine_from": str(first.path),
        "checkpoint_every": 6,
        "batch_size": 8,
    }
    whole = contents(fit(tiny_run(tmp_path / "whole", CONFIG, DATASET, [0, 1], **options), DATASET))
    run = tiny_run(tmp_path / "cut", CONFIG, DATASET, [0, 1], **options)
    with pytest.raises(KeyboardInterrupt):
        fit(run, DATASET, wrap=interrupting(13))
    assert contents(fit(run, DATASET)) == whole
    linear = {**options, "schedule": "linear", "refine_from": None}
    assert contents(fit(tiny_run(tmp_path / "line", CONFIG, DATASET, [0, 1], **linear), DATASET)) != whole
    longer = {**run.config, "training": {**run.config["training"], "steps": 2 * STEPS}}
    agents = [agent_factory(config, DATASET)([0], "cpu") for config in (run.config, longer)]
    rows = torch.arange(16).expand(1, -1)
    for step in range(STEPS):
        agents[0].update(DATASET.gather(rows))
        agents[1].update(DATASET.gather(rows))
        rates = [float(agent._optimizers["policy"]._rate) for agent in agents]
        agents[1].update(DATASET.gather(rows))
        assert rates[0] == pytest.approx(rates[1]), step


def test_what_cannot_be_refined_is_said_in_one_line(tmp_path: Path) -> None:
    first = first_run(tmp_path, "bc", steps=5)
    for options in ({"schedule": "refined"}, {"refine_from": "somewhere"}):
        with pytest.raises(ConfigError, match="go together; leave both out, or name both"):
            TrainingOptions(**options)  # type: ignore[arg-type]
    asked = {"schedule": "refined", "refine_from": str(first.path)}
    with pytest.raises(ConfigError, match="fewer than 20 log lines with norms of gradients"):
        first_run(tmp_path, "bc", **asked)
    with pytest.raises(ConfigError, match="trains bc, and its gradients say nothing of iql's"):
        first_run(tmp_path, "iql", **asked)
    with pytest.raises(RunError, match="does not exist"):
        first_run(tmp_path, "bc", schedule="refined", refine_from=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="a benchmark has one schedule for all"):
        run_benchmark(tmp_path / "benchmark", datasets=["builtin/pendulum"], agents=["bc"], schedule="refined")
    assert len(list(tmp_path.iterdir())) == 1  # nothing was begun


@pytest.mark.parametrize("curve", [[1.0], [1.0, "0"], [2.0, 0.0], [float("nan"), 0.0], 3, [True, 0.0]])
def test_damaged_curves_are_seen(tmp_path: Path, curve: Any) -> None:
    run = tiny_run(tmp_path, CONFIG, DATASET, [0], steps=STEPS)
    (run.path / "config.json").write_text(json.dumps({**run.config, "schedule_curves": {"policy": curve}}))
    with pytest.raises(RunError, match=r"schedule_curves.policy must be two or more numbers from 0 to 1"):
        Run(run.path)
