"""Training that ends by a metric: at the right checkpoint, with its weights, and the same however often it was killed."""

from __future__ import annotations

import json
import math

import pytest
import torch

import rlkit2
from rlkit2.agents.bc import BCConfig
from rlkit2.cli.main import main
from rlkit2.errors import ConfigError
from rlkit2.training import Run, TrainingOptions
from rlkit2.training.run_files import JsonLines
from rlkit2.training.selection import Goal, StopRule, read_goal
from tests.training.tiny_problem import (
    FaultyConfig,
    Walk,
    contents,
    fit,
    interrupting,
    tiny_dataset,
    tiny_run,
)

DATASET = tiny_dataset()
CONFIG = BCConfig(hidden_sizes=(8,))
SCHEDULE = {"steps": 60, "log_every": 5, "checkpoint_every": 10, "eval_every": 20, "batch_size": 8, "patience": 2}


def scripted(monkeypatch, values):
    """The losses of the log lines are these instead, per checkpoint."""
    append = JsonLines.append

    def changed(self, lines):
        lines = [
            {**line, "policy/loss": values[(line["step"] - 1) // 10]} if "policy/loss" in line else line
            for line in lines
        ]
        append(self, lines)

    monkeypatch.setattr(JsonLines, "append", changed)


def state(run, step):
    return {name: tensor for name, tensor in run.checkpoint(step).tensors.items() if name.startswith("agent.")}


@pytest.mark.parametrize(
    ("values", "chosen", "end"),
    [
        ((3, 2, 4, 5, 1, 0), 20, 40),
        ((3, 2, 4, 1, 1, 1), 40, 60),
        ((1, 2, 3, 0, 0, 0), 10, 30),
        ((6, 5, 4, 3, 2, 1), 60, 60),
        ((6, 5, 4, 3, 2, 2), 50, 60),
    ],
)
def test_the_weights_of_the_best_checkpoint_are_those_of_the_end(tmp_path, monkeypatch, values, chosen, end):
    plain = fit(tiny_run(tmp_path / "a", CONFIG, DATASET, [0, 1], **{**SCHEDULE, "steps": chosen}), DATASET)
    scripted(monkeypatch, values)
    run = fit(tiny_run(tmp_path / "b", CONFIG, DATASET, [0, 1], **SCHEDULE, stop_when="policy/loss"), DATASET)
    assert (run.manifest["status"], run.manifest["step"]) == ("finished", end)
    assert run.manifest["chosen"]["step"] == chosen
    assert run.manifest["chosen"]["value"] == values[chosen // 10 - 1]
    assert max(run.checkpoints) == end
    for policy in (run.policy, run.agent.policy):
        for name, tensor in policy.state_dict().items():
            assert torch.equal(tensor, plain.policy.state_dict()[name])
    final = [line["returns"] for line in run.evaluations() if line["step"] == end]
    assert final == [line["returns"] for line in plain.evaluations() if line["step"] == chosen]
    assert chosen in run.checkpoints


@pytest.mark.parametrize(("goal", "step"), [("policy/loss", 24), ("max:policy/loss", 17), ("evaluation/score", 38)])
def test_an_interruption_leaves_no_trace(tmp_path, goal, step):
    options = {**SCHEDULE, "eval_every": 10, "patience": 1, "stop_when": goal}
    whole = fit(tiny_run(tmp_path / "a", CONFIG, DATASET, [0, 1], **options), DATASET)
    run = tiny_run(tmp_path / "b", CONFIG, DATASET, [0, 1], **options)
    try:
        fit(run, DATASET, wrap=interrupting(step))
    except KeyboardInterrupt:
        fit(run, DATASET)
    assert contents(run) == contents(whole)
    assert run.manifest["chosen"] == whole.manifest["chosen"]


def test_by_score_the_last_evaluation_is_that_of_the_chosen_checkpoint(tmp_path):
    options = {**SCHEDULE, "eval_every": 10, "stop_when": "evaluation/score", "patience": 6}
    run = fit(tiny_run(tmp_path, CONFIG, DATASET, [0, 1], **options), DATASET)
    lines = run.evaluations()
    means = {step: sum(sum(line["returns"]) for line in lines if line["step"] == step) for step in range(10, 61, 10)}
    assert len(lines) == 12
    assert means[60] == max(means.values())
    assert means[run.manifest["chosen"]["step"]] == means[60]


def test_only_the_seeds_that_still_learn_are_compared(tmp_path):
    """Seed 1 has the lower loss and breaks at step 25: what is compared from there on are checkpoints of seed 0."""
    config = FaultyConfig(hidden_sizes=(8,), broken_step=25)
    options = {**SCHEDULE, "stop_when": "policy/loss", "patience": 9}
    run = fit(tiny_run(tmp_path / "a", config, DATASET, [0, 1], **options), DATASET)
    alone = fit(tiny_run(tmp_path / "b", config, DATASET, [0], **options), DATASET)
    assert list(run.manifest["stopped"]) == ["1"]
    assert run.manifest["chosen"]["step"] == alone.manifest["chosen"]["step"]
    assert run.manifest["chosen"]["value"] == pytest.approx(alone.manifest["chosen"]["value"], rel=1e-5)


def test_a_wrong_goal_is_one_line(tmp_path, capsys):
    for text, message in (
        ("critic/q", r"does not say which values are better: write min:critic/q or max:critic/q"),
        ("min:", "does not say"),
        ("mix:policy/loss2", "does not say"),
    ):
        with pytest.raises(ConfigError, match=message):
            TrainingOptions(stop_when=text)
    with pytest.raises(ConfigError, match=r"no metric 'policy/los' to stop by; did you mean policy/loss\?"):
        fit(tiny_run(tmp_path / "a", CONFIG, DATASET, [0], **SCHEDULE, stop_when="min:policy/los"), DATASET)
    with pytest.raises(ConfigError, match="no metric 'evaluation/score' to stop by"):
        fit(
            tiny_run(tmp_path / "b", CONFIG, DATASET, [0], **SCHEDULE, stop_when="evaluation/score"),
            DATASET,
            evaluator=None,
        )
    DATASET.to_minari("tiny/walk-v0")
    words = [
        "train",
        "bc",
        "--dataset",
        "tiny/walk-v0",
        "--steps",
        "40",
        "--hidden-sizes",
        "8",
        "--stop-when",
        "policy/loss",
        "--patience",
        "1",
    ]
    assert main([*words, "--checkpoint-every", "4", "--out", str(tmp_path / "c")]) == 0
    (path,) = (tmp_path / "c").iterdir()
    assert main(["train", "--resume", str(path), "--steps", "80"]) == 2
    assert "ends with the checkpoint that policy/loss chooses" in capsys.readouterr().err


def test_goals():
    assert read_goal("policy/loss") == read_goal("min:policy/loss") == Goal("policy/loss", rising=False)
    assert read_goal("evaluation/score") == Goal("evaluation/score", rising=True)
    goal = read_goal("max:a/b")
    assert goal.better(1.0, math.nan)
    assert not goal.better(math.nan, math.nan)
    assert not goal.better(math.nan, 1.0)
    rule = StopRule("max:a/b", 1)
    rule.judge(1, lambda *_: math.nan, last=True)
    assert not rule.ended
    assert rule.facts == {"chosen": None, "judged": 0, "waited": 0, "ended": False}


# the best evaluation of a run that has no goal


def scores(monkeypatch, found):
    """Returns by step and seed instead of those of the episodes."""
    append = JsonLines.append

    def changed(self, lines):
        lines = [
            {**line, "returns": [found[line["step"]][line["seed"]]] * 2, "normalized_scores": None}
            if "returns" in line
            else line
            for line in lines
        ]
        append(self, lines)

    monkeypatch.setattr(JsonLines, "append", changed)


def test_a_score_that_is_not_a_number_is_never_the_best(tmp_path, monkeypatch):
    scores(monkeypatch, {20: {0: None, 1: None}, 40: {0: 1.0, 1: 2.0}, 60: {0: None, 1: 5.0}})
    run = fit(tiny_run(tmp_path, CONFIG, DATASET, [0, 1], **SCHEDULE), DATASET)
    assert run.manifest["best"] == {"step": 40, "score": 1.5}
    for path in [run.path / "manifest.json", *run.path.glob("checkpoints/*/checkpoint.json")]:
        assert "NaN" not in path.read_text()
    monkeypatch.undo()
    scores(monkeypatch, {step: {0: None, 1: None} for step in (20, 40, 60)})
    run = fit(tiny_run(tmp_path, CONFIG, DATASET, [0, 1], **SCHEDULE), DATASET)
    assert run.manifest["best"] is None
    json.loads((run.path / "manifest.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_a_seed_that_stops_does_not_change_which_evaluation_is_the_best(tmp_path, monkeypatch):
    """Seed 1 is the better one and breaks at step 25; seed 0 alone is best at step 60."""
    scores(monkeypatch, {20: {0: 1.0, 1: 9.0}, 40: {0: 2.0}, 60: {0: 3.0}})
    config = FaultyConfig(hidden_sizes=(8,), broken_step=25)
    run = fit(tiny_run(tmp_path, config, DATASET, [0, 1], **SCHEDULE), DATASET)
    assert run.manifest["best"] == {"step": 60, "score": 3.0}


def test_through_the_public_function(tmp_path):
    run = rlkit2.train(
        CONFIG,
        DATASET,
        steps=40,
        checkpoint_every=5,
        stop_when="policy/loss",
        patience=2,
        out=tmp_path,
        env=Walk,
        progress=False,
    )
    assert isinstance(run, Run)
    assert run.manifest["chosen"]["step"] in run.checkpoints
