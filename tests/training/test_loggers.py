"""Loggers beside the files of a run, and what the user sees while it trains."""

from __future__ import annotations

import io
import json
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console

import rlkit2
from rlkit2.agents import agent_class, list_agents
from rlkit2.agents.bc import BCConfig
from rlkit2.errors import ConfigError, MissingExtraError
from rlkit2.testing import Problem
from rlkit2.training import Run
from rlkit2.training.loggers import LOGGERS, check_loggers, make_loggers
from rlkit2.training.progress import Progress
from tests.training.tiny_problem import Walk, fit, interrupting, tiny_dataset, tiny_run

DATASET = tiny_dataset()
CONFIG = BCConfig(hidden_sizes=(8,))
SCHEDULE = {"steps": 40, "log_every": 4, "eval_every": 20, "checkpoint_every": 8}


def train_with(logger, run, **options):
    return fit(run, DATASET, loggers=make_loggers([logger], run), **options)


def test_an_unknown_logger_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ConfigError, match="unknown logger 'tensorbord'; there are tensorboard, wandb, trackio"):
        rlkit2.train(CONFIG, DATASET, steps=2, out=tmp_path, loggers=["tensorbord"], env=Walk, progress=False)
    assert not list(tmp_path.glob("bc-*"))


@pytest.mark.parametrize("name", list(LOGGERS))
def test_a_logger_that_is_not_installed_names_its_extra(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=rf"{name} is not installed; install it with: pip install "):
        rlkit2.train(CONFIG, DATASET, steps=2, out=tmp_path, loggers=[name], env=Walk, progress=False)
    assert not list(tmp_path.glob("bc-*"))


def test_tensorboard_holds_every_number_once_even_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tiny_run(tmp_path, CONFIG, DATASET, [0, 1], **SCHEDULE)
    with pytest.raises(KeyboardInterrupt):
        train_with("tensorboard", run, wrap=interrupting(22))
    train_with("tensorboard", run)
    for seed in (0, 1):
        events = EventAccumulator(str(run.path / "tensorboard" / f"seed-{seed}"), size_guidance={"scalars": 0}).Reload()
        scalars = events.Scalars("policy/loss")
        lines = [line for line in run.metrics() if line["seed"] == seed]
        assert [event.step for event in scalars] == [line["step"] for line in lines]
        assert [event.value for event in scalars] == pytest.approx([line["policy/loss"] for line in lines], rel=1e-6)
        assert [event.step for event in events.Scalars("evaluation/return")] == [20, 40]


def test_wandb_works_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tiny_run(tmp_path, CONFIG, DATASET, [0, 1], **SCHEDULE)
    train_with("wandb", run)
    assert list((run.path / "wandb").glob("offline-run-*/*.wandb"))


def test_trackio_records_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    pytest.importorskip("trackio")
    train_with("trackio", tiny_run(tmp_path, CONFIG, DATASET, [0, 1], **SCHEDULE))
    assert list((tmp_path / "trackio").glob("rlkit2*"))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_all_seeds_of_a_step_in_one_call_and_are_finished(tmp_path, monkeypatch, name):
    """Against a stand-in that records the calls: their names, prefixes, steps, and the end after an interruption."""
    calls, module = [], ModuleType(name)
    tracker = SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finished")
    )
    settings = {}
    module.init = lambda **options: settings.update(options) or tracker
    monkeypatch.setitem(sys.modules, name, module)
    check_loggers([name])
    run = tiny_run(tmp_path, CONFIG, DATASET, [0, 1], **SCHEDULE)
    with pytest.raises(KeyboardInterrupt):
        train_with(name, run, wrap=interrupting(30))
    same_name = tiny_run(tmp_path / "another machine", CONFIG, DATASET, [0, 1], **SCHEDULE)
    assert same_name.path.name == run.path.name
    assert same_name.id != run.id
    if name == "wandb":
        assert (settings["name"], settings["id"]) == (run.path.name, run.id)
    else:
        assert settings["name"] == f"{run.path.name}-{run.id[:8]}"
    assert settings["config"]["seeds"] == [0, 1]
    assert calls[-1] == "finished"
    steps = [call[0] for call in calls[:-1]]
    assert steps == sorted(steps)
    first = run.metrics()[0]
    assert calls[0][0] == 4
    assert calls[0][1]["seed0/policy/loss"] == first["policy/loss"]
    assert {key.split("/")[0] for key in calls[0][1]} == {"seed0", "seed1"}
    scores = next(values for step, values in calls[:-1] if "seed0/evaluation/return" in values)
    assert scores["seed1/evaluation/return"] == pytest.approx(sum(run.evaluations()[1]["returns"]) / 2)


def test_a_run_keeps_its_id_and_an_old_one_gets_one(tmp_path):
    run = tiny_run(tmp_path, CONFIG, DATASET, [0], **SCHEDULE)
    assert run.id == Run(run.path).id == fit(run, DATASET).manifest["id"]
    manifest = {name: value for name, value in run.manifest.items() if name != "id"}
    (run.path / "manifest.json").write_text(json.dumps(manifest))
    assert run.id == Run(run.path).id


# progress


def shown(tmp_path, **console):
    text = io.StringIO()
    progress = Progress(Console(file=text, width=120, **console))
    fit(tiny_run(tmp_path, CONFIG, DATASET, [0, 7], **SCHEDULE), DATASET, progress=progress)
    return text.getvalue()


def test_without_a_terminal_progress_is_plain_lines(tmp_path, monkeypatch):
    monkeypatch.setattr("rlkit2.training.progress.PLAIN_EVERY", 0.0)
    text = shown(tmp_path)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert 3 <= len(lines) <= 10 + 2  # at most one a log and one an evaluation
    pattern = r"step 40/40, \d+ updates/s, \d\.\d GiB \| seed 0: policy loss -?[\d.]+, return -[\d.]+; seed 7: policy loss -?[\d.]+, return -[\d.]+"
    assert re.fullmatch(pattern, lines[-1])
    assert re.match(r"step 4/40, \d+ updates/s, 0m\d\ds left, ", lines[0])


def test_plain_lines_do_not_flood_a_log(tmp_path):
    assert len(shown(tmp_path).splitlines()) <= 4  # the first, and one per evaluation


def test_on_a_terminal_a_table_has_one_line_per_seed(tmp_path):
    text = shown(tmp_path, force_terminal=True)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    last = plain[plain.rindex("seed") :]
    assert re.search(r"│ +0 │ +-?[\d.]+ │ +-[\d.]+ │", last)
    assert re.search(r"│ +7 │", last)
    assert "step 40/40" in last


def test_quiet_leaves_messages_alone():
    text = io.StringIO()
    progress = Progress(Console(file=text, width=120, force_terminal=True), quiet=True)
    progress.start([0], 10, lambda: 5)
    progress.log([{"step": 5, "seed": 0, "policy/loss": 1.0, "evaluation/return": 3.0}])
    progress.message("seed 0 stopped")
    progress.stop()
    assert text.getvalue() == "seed 0 stopped\n"


@pytest.mark.parametrize("name", list_agents())
def test_every_agent_shows_what_matters(name):
    """A loss, what its values are where it has any, the accuracy where it learns from preferences, and the score."""
    problem = next(filter(None, (fitting_problem(name, kind) for kind in ("continuous", "discrete"))))
    agent = problem.build(1)
    metrics = {}
    for batch in problem.batches(2):
        metrics |= {key: float(value[0]) for key, value in agent.update(batch).items()}
    text = io.StringIO()
    progress = Progress(Console(file=text, width=120))
    progress.start([0], 10, lambda: 5)
    progress.log([{"step": 5, "seed": 0, **metrics}, {"step": 5, "seed": 0, "evaluation/score": 4.0}])
    shown = text.getvalue()
    assert "policy loss " in shown or "critic loss " in shown
    assert ("critic loss " in shown or "value " in shown) == any(
        key.startswith(("value/", "critic/")) for key in metrics
    )
    assert ("accuracy " in shown) == (getattr(problem.agent, "learns_from", "") == "preferences")
    assert "score 4" in shown


def fitting_problem(name, kind):
    problem = Problem(agent_class(name), kind)
    try:
        problem.build(1)
    except ConfigError:
        return None
    return problem


def test_no_console_no_output(tmp_path, capfd):
    run = rlkit2.train(CONFIG, DATASET, steps=4, out=tmp_path, env=Walk, eval_episodes=1, progress=False)
    assert capfd.readouterr() == ("", "")
    assert json.loads((run.path / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
