"""A run that was killed, interrupted or prolonged ends bit for bit as one that never was."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import rlkit2
from rlkit2.agents.bc import BCConfig
from rlkit2.errors import ConfigError, RunError
from rlkit2.training import Run, run_files
from rlkit2.training.groups import BatchIndices, MetricRows
from tests import warm
from tests.training.tiny_problem import (
    Walk,
    contents,
    fit,
    interrupting,
    tiny_dataset,
    tiny_run,
)

DATASET = tiny_dataset()
CONFIG = BCConfig(hidden_sizes=(8,))
SCHEDULE = {"steps": 60, "log_every": 7, "eval_every": 20, "checkpoint_every": 15, "batch_size": 8}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The contents of the run that nothing happened to."""
    return contents(fit(tiny_run(tmp_path_factory.mktemp("whole"), CONFIG, DATASET, [0, 1, 2], **SCHEDULE), DATASET))


def interrupted(folder: Path, step: int) -> Run:
    run = tiny_run(folder, CONFIG, DATASET, [0, 1, 2], **SCHEDULE)
    with pytest.raises(KeyboardInterrupt):
        fit(run, DATASET, wrap=interrupting(step))
    return run


@pytest.mark.parametrize(("at_files", "at_times"), [(8, 2), pytest.param(20, 4, marks=pytest.mark.slow)])
def test_sigkill_at_random_moments_leaves_no_trace(tmp_path, at_files, at_times):
    """Kills in the middle of a file operation (torn writes, half-deleted folders), and between updates."""
    worker = Path(__file__).with_name("kill_worker.py")
    environment = {**os.environ, "PYTHONPATH": str(worker.parents[2])}
    done = warm.run([sys.executable, worker, tmp_path, str(at_files), str(at_times)], env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["killed"] >= at_files
    (expected,) = (tmp_path / "whole").glob("*/config.json")
    for index in range(at_files + at_times):
        (found,) = (tmp_path / f"killed-{index}").glob("*/config.json")
        assert contents(Run(found.parent)) == contents(Run(expected.parent)), f"kill {index}"
        assert Run(found.parent).manifest["status"] == "finished"


@pytest.mark.parametrize("step", [1, 14, 23, 45])
def test_an_interruption_at_any_step_leaves_no_trace(tmp_path, whole, step):
    run = interrupted(tmp_path, step)
    assert run.manifest["status"] == "interrupted"
    assert step <= run.checkpoint().step < 60
    assert run.policy.metadata["step"] == run.checkpoint().step
    assert contents(fit(run, DATASET)) == whole


def test_three_interruptions_leave_no_trace(tmp_path, whole):
    run = interrupted(tmp_path, 5)
    for step in (24, 40):
        with pytest.raises(KeyboardInterrupt):
            fit(run, DATASET, wrap=interrupting(step))
    assert contents(fit(run, DATASET)) == whole
    assert len(run.manifest["starts"]) == 4


def forget_generators(monkeypatch):
    monkeypatch.setattr(BatchIndices, "load_state", lambda self, state: None)


def forget_metrics(monkeypatch):
    monkeypatch.setattr(MetricRows, "restore", lambda self, *arguments: None)


def forget_to_cut_files(monkeypatch):
    monkeypatch.setattr(run_files.os, "ftruncate", lambda descriptor, size: None)


def forget_optimizer(monkeypatch):
    from rlkit2.agents import Agent

    load = Agent.load_state_dict

    def partly(self, state):
        own = self.state_dict()
        load(self, {name: own[name] if name.startswith("optimizer") else tensor for name, tensor in state.items()})

    monkeypatch.setattr(Agent, "load_state_dict", partly)


def draw_one_block_later(monkeypatch):
    state = BatchIndices.state

    def later(self):
        self.next()
        return state(self)

    monkeypatch.setattr(BatchIndices, "state", later)


@pytest.mark.parametrize("mistake", [forget_generators, forget_metrics, forget_optimizer, draw_one_block_later])
def test_the_check_sees_what_a_resume_forgets(tmp_path, whole, monkeypatch, mistake):
    """Each of these mistakes in the trainer must show, or the tests above would prove nothing."""
    for attempt in range(9):  # where a thread ran ahead to a log step there are no unfinished metrics to forget
        run = interrupted(tmp_path / str(attempt), 23)
        if run.checkpoint().step % SCHEDULE["log_every"]:
            break
    mistake(monkeypatch)
    assert contents(fit(run, DATASET)) != whole


def test_the_check_sees_lines_that_were_not_cut_back(tmp_path, whole, monkeypatch):
    """Lines written after the newest checkpoint, as by a run that was killed."""
    run = interrupted(tmp_path, 23)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 28, "seed": 0}\n')
    forget_to_cut_files(monkeypatch)
    assert contents(fit(run, DATASET)) != whole


def test_a_prolonged_run_is_the_longer_run(tmp_path, whole):
    """60 updates, of which 40 were asked for first: evaluations, checkpoints and metrics are those of a run of 60."""
    short = {**SCHEDULE, "log_every": 10, "checkpoint_every": 20}
    run = fit(tiny_run(tmp_path / "a", CONFIG, DATASET, [0, 1, 2], **{**short, "steps": 40}), DATASET)
    run.rewrite({**run.config, "training": {**run.config["training"], "steps": 60}})
    fit(run, DATASET)
    longer = fit(tiny_run(tmp_path / "b", CONFIG, DATASET, [0, 1, 2], **short), DATASET)
    assert contents(run) == contents(longer)
    assert run.manifest["status"] == "finished"
    assert run.manifest["step"] == 60


# through the public function


def options(**changes):
    return {"env": Walk, "eval_episodes": 2, "progress": False, **changes}


def test_train_prolongs_and_refuses_what_would_change_a_run(tmp_path):
    run = rlkit2.train(CONFIG, DATASET, steps=20, seeds=[4, 7], out=tmp_path, batch_size=8, **options())
    before = contents(run)
    same = rlkit2.train(resume=run.path, dataset=DATASET, **options())
    assert contents(same) == before  # a finished run has nothing left to do
    longer = rlkit2.train(resume=run.path, dataset=DATASET, steps=30, **options())
    assert longer.checkpoint().step == 30
    assert longer.config["training"]["steps"] == 30
    for wrong, message in (
        ({"steps": 10}, "a run of 30 steps; it cannot be resumed with 10"),
        ({"batch_size": 16}, "has batch_size = 8; only steps may change"),
        ({"overrides": {"learning_rate": 1.0}}, r"has learning_rate = 0\.0003; only steps may change"),
        ({"seeds": 3}, r"trains seeds \[4, 7\]; resume it without"),
        ({"agent": "odice"}, "trains bc, not odice; resume it without naming an agent"),
    ):
        with pytest.raises(ConfigError, match=message):
            rlkit2.train(resume=run.path, dataset=DATASET, **{**options(), **wrong})


def test_another_dataset_is_refused(tmp_path):
    run = rlkit2.train(CONFIG, DATASET, steps=4, out=tmp_path, **options())
    with pytest.raises(RunError, match=r"dataset tiny/walk-v0 is not what .* was trained on"):
        rlkit2.train(resume=run, dataset=tiny_dataset(seed=1), steps=8, **options())
    with pytest.raises(RunError, match=r"dataset of .* cannot be opened .*say where it is now: --dataset ID or path"):
        rlkit2.train(resume=run, steps=8, **options())
    assert run.config["training"]["steps"] == 4


def test_ctrl_c_prints_the_resume_command_and_keeps_the_policy(tmp_path, capsys, monkeypatch):
    from rlkit2.agents.bc import BC
    from rlkit2.cli.main import main

    DATASET.to_minari("tiny/walk-v0")
    update = BC.update

    def interrupted_at_9(self, batch):
        if int(self.step[0]) == 9 and self.seeds[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
        return update(self, batch)

    monkeypatch.setattr(BC, "update", interrupted_at_9)
    command = ["train", "bc", "--dataset", "tiny/walk-v0", "--steps", "40", "--seeds", "2", "--out", str(tmp_path)]
    assert main([*command, "--hidden-sizes", "8"]) == 130
    text = capsys.readouterr().err
    (path,) = tmp_path.glob("bc-*")
    assert f"resume it with: rlkit2 train --resume {path}\n" in text
    step = Run(path).checkpoint().step
    assert step >= 10
    assert rlkit2.load_policy(path).metadata["step"] == step
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    monkeypatch.setattr(BC, "update", update)
    assert main(["train", "--resume", str(path)]) == 0
    assert f"{path}: finished at step 40" in capsys.readouterr().out
    other = tmp_path / "other"
    assert main([*command[:-1], str(other), "--hidden-sizes", "8"]) == 0
    (uninterrupted,) = other.glob("bc-*")
    assert contents(Run(path)) == contents(Run(uninterrupted))


def test_an_interruption_leaves_no_trace_where_onednn_multiplies(tmp_path, monkeypatch):
    """A fixed library for the updates, the default one for evaluations and afterwards."""
    monkeypatch.setattr("rlkit2.nn.matmul.SMALLEST_WORK", 0)
    monkeypatch.setattr("rlkit2.nn.matmul.onednn_is_better", lambda: True)
    seen = set()

    def watch(agent):
        update = agent.update
        agent.update = lambda batch: (seen.add(("update", torch.get_float32_matmul_precision())), update(batch))[1]
        agent.policy.register_forward_hook(lambda *_: seen.add(("act", torch.get_float32_matmul_precision())))

    options = {**SCHEDULE, "batch_size": 64}
    config = BCConfig(hidden_sizes=(64, 64))
    whole = contents(fit(tiny_run(tmp_path / "a", config, DATASET, [0], **options), DATASET, wrap=watch))
    assert seen == {("update", "medium"), ("act", "highest")}
    run = tiny_run(tmp_path / "b", config, DATASET, [0], **options)
    with pytest.raises(KeyboardInterrupt):
        fit(run, DATASET, wrap=interrupting(23))
    assert torch.get_float32_matmul_precision() == "highest"
    assert contents(fit(run, DATASET)) == whole
    assert [start["matmul"] for start in run.manifest["starts"]] == ["oneDNN", "oneDNN"]
