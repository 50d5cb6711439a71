"""Two machines on one folder, and machines that are asked for: saved, given back, gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlkit2.agents.bc import BCConfig
from rlkit2.cli.main import main
from rlkit2.errors import Preempted, RunError
from rlkit2.training import ownership
from rlkit2.training.ownership import is_owned, owned, read_owner
from tests.training.tiny_problem import contents, fit, tiny_dataset, tiny_run

DATASET = tiny_dataset()
CONFIG = BCConfig(hidden_sizes=(8,))
SCHEDULE = {"steps": 60, "log_every": 7, "eval_every": 20, "checkpoint_every": 15, "batch_size": 8}


def elsewhere(folder: Path, *, silent: float) -> None:
    """What a process on another machine leaves, whose last sign of life is some seconds old."""
    facts = {"host": "node7", "machine": "node7 another boot", "process": 42, "token": "t"}
    (folder / ".owner").write_text(json.dumps(facts))
    now = time.time()
    os.utime(folder / ".owner", (now - silent, now - silent))


def test_one_process_at_a_time(tmp_path):
    with owned(tmp_path):
        assert is_owned(tmp_path)
        with pytest.raises(RunError, match="is being trained by another process"), owned(tmp_path):
            pass
    assert not is_owned(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]


def test_a_living_process_on_another_machine_is_respected_and_a_dead_one_replaced(tmp_path):
    said: list[str] = []
    elsewhere(tmp_path, silent=20)
    assert is_owned(tmp_path)
    message = r"is being trained by process 42 on node7 \(last sign of life 2\d s ago\); stop it first, or wait until it was silent for 60 s"
    with pytest.raises(RunError, match=message), owned(tmp_path, said.append):
        pass
    assert read_owner(tmp_path / ".owner")["host"] == "node7"
    elsewhere(tmp_path, silent=61)
    assert not is_owned(tmp_path)
    with owned(tmp_path, said.append) as owner:
        owner.check()
    assert len(said) == 1
    assert said[0].startswith("process 42 on node7 was silent for 6")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "a"}'])
def test_half_a_file_is_no_owner(tmp_path, content):
    (tmp_path / ".owner").write_text(content)
    with owned(tmp_path) as owner:
        owner.check()


def test_a_file_system_without_locks_and_links_is_held_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(ownership.fcntl, "flock", refuse)
    monkeypatch.setattr(os, "link", refuse)
    with owned(tmp_path) as owner:
        owner.check()
        other = json.loads((tmp_path / ".owner").read_text()) | {"process": os.getppid()}
        (tmp_path / ".owner").write_text(json.dumps(other))
        with pytest.raises(RunError, match=f"is being trained by process {os.getppid()}"), owned(tmp_path):
            pass


def test_a_process_that_slept_too_long_stops_before_it_writes(tmp_path):
    """Its folder belongs to another one by then."""
    run = tiny_run(tmp_path, CONFIG, DATASET, [0], **SCHEDULE)
    lines: list[bytes] = []

    def taken(agent):
        update = agent.update

        def updated(batch):
            if int(agent.step[0]) == 22:
                elsewhere(run.path, silent=0)
                lines.append((run.path / "metrics.jsonl").read_bytes())
            return update(batch)

        agent.update = updated

    with pytest.raises(RunError, match="was taken over by process 42 on node7 while this process was silent"):
        fit(run, DATASET, wrap=taken)
    assert (run.path / "metrics.jsonl").read_bytes() == lines[0]
    assert read_owner(run.path / ".owner")["token"] == "t"
    assert run.manifest["status"] == "running"  # the other one's


def test_signs_of_life_are_given(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "BEAT", 0.02)
    with owned(tmp_path):
        os.utime(tmp_path / ".owner", (0, 0))
        until = time.monotonic() + 10
        while (tmp_path / ".owner").stat().st_mtime == 0 and time.monotonic() < until:
            time.sleep(0.01)
        assert time.time() - (tmp_path / ".owner").stat().st_mtime < 5


def asked(number, step):
    """For `fit`: the machine is asked for at a step."""

    def wrap(agent):
        update = agent.update

        def updated(batch):
            metrics = update(batch)
            if agent.seeds[0] == 0 and int(agent.step[0]) == step:
                os.kill(os.getpid(), number)
                time.sleep(0.2)
            return metrics

        agent.update = updated

    return wrap


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_preempted_run_goes_on_as_if_nothing_had_been(tmp_path, number):
    before = signal.getsignal(number)
    whole = fit(tiny_run(tmp_path / "a", CONFIG, DATASET, [0, 1], **SCHEDULE), DATASET)
    run = tiny_run(tmp_path / "b", CONFIG, DATASET, [0, 1], **SCHEDULE)
    with pytest.raises(Preempted) as caught:
        fit(run, DATASET, wrap=asked(number, 23))
    assert caught.value.number == number
    assert signal.getsignal(number) == before
    assert run.manifest["status"] == "interrupted"
    assert contents(fit(run, DATASET)) == contents(whole)


def test_the_command_ends_with_a_status_of_its_own(tmp_path, monkeypatch, capsys):
    from rlkit2.agents.bc import BC

    DATASET.to_minari("tiny/walk-v0")
    update = BC.update

    def updated(self, batch):
        if int(self.step[0]) == 9:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.2)
        return update(self, batch)

    monkeypatch.setattr(BC, "update", updated)
    words = [
        "train",
        "bc",
        "--dataset",
        "tiny/walk-v0",
        "--steps",
        "40",
        "--hidden-sizes",
        "8",
        "--eval-every",
        "0",
        "--out",
    ]
    assert main([*words, str(tmp_path)]) == 75
    error = capsys.readouterr().err
    assert "resume it with: rlkit2 train --resume" in error
    assert error.endswith("rlkit2: SIGUSR1: saved; the same work continues where it was\n")


SWEEP = """
name = "tiny"
[base]
agent = "bc"
dataset = "tiny/walk-v0"
[base.config]
hidden_sizes = [8]
[base.training]
steps = 3000
batch_size = 8
checkpoint_every = 3000
eval_every = 0
"""


@pytest.mark.slow
def test_a_preempted_job_of_slurm_goes_back_into_the_queue(tmp_path):
    """By submitit's local executor, which puts a preempted job back as Slurm does."""
    pytest.importorskip("submitit")
    DATASET.to_minari("tiny/walk-v0")
    (tmp_path / "tiny.toml").write_text(SWEEP)
    script = Path(__file__).with_name("preempt.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parents[2]), *sys.path])}
    command = [sys.executable, str(script), str(tmp_path / "tiny.toml"), str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["status"] == "finished"
    assert len(report["starts"]) == 2
    assert report["starts"][1] % 10000 > 0  # not a regular checkpoint: it saved when it was asked
