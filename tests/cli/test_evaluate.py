"""`rlkit2 evaluate` and `rlkit2 compare --episodes` on a trained run."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

import rlkit2
from rlkit2.agents.bc import BCConfig
from rlkit2.cli.main import main
from tests.training.tiny_problem import Walk, tiny_dataset

ENV = "tests.training.tiny_problem:TinyWalk-v0"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two seeds, evaluated three times; the policy still improves."""
    return rlkit2.train(
        BCConfig(hidden_sizes=(8,), learning_rate=0.01), tiny_dataset(), steps=30, seeds=[3, 8], eval_every=10, eval_episodes=4,
        out=tmp_path_factory.mktemp("runs"), env=Walk, progress=False, checkpoint_every=10,
    )  # fmt: skip


def printed(capsys, *arguments):
    assert main([*map(str, arguments), "--env", ENV]) == 0
    return capsys.readouterr().out


def results(capsys, *arguments):
    content = json.loads(printed(capsys, "evaluate", *arguments, "--json"))
    return np.array([line["returns"] for line in content["results"]]), content


def test_it_prints_one_line_per_seed_with_intervals(run, capsys):
    text = printed(capsys, "evaluate", run.path, "--episodes", "5")
    assert "tests.training.tiny_problem:TinyWalk-v0, deterministic actions" in text
    assert re.search(r"^ +3 +[-\d.]+ +n/a +\d+ *$", text, re.M)
    assert re.search(r"^ +8 ", text, re.M)
    assert "n/a" in text
    assert "return: mean " in text
    assert "95 % interval" in text
    assert "between seeds" in text
    assert "5 episodes per seed; dataset tiny/walk-v0 has no reference returns" in text


def test_json_holds_every_episode_and_the_run(run, capsys):
    returns, content = results(capsys, run.path, "--episodes", "5")
    assert returns.shape == (2, 5)
    assert content["run"] == str(run.path)
    assert content["summary"]["mean"] == pytest.approx(returns.mean())
    expected = rlkit2.evaluate(run, episodes=5, env=Walk).returns
    np.testing.assert_array_equal(returns, expected)


def test_several_runs_are_several_tables_and_none_hides_the_others(run, tmp_path, capsys):
    text = printed(capsys, "evaluate", run.path, tmp_path, run.path, "--episodes", "2")
    assert text.count(f"{run.path}: {ENV}") == 2
    assert text.count("return: mean ") == 2
    assert main(["evaluate", str(run.path), str(tmp_path), "--episodes", "2", "--env", ENV, "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith(f"left out: {tmp_path} holds no config.json")
    (found,) = json.loads(shown.out)["evaluations"]
    assert found["run"] == str(run.path)
    assert main(["evaluate", str(tmp_path), str(tmp_path)]) == 2
    assert "nothing was evaluated" in capsys.readouterr().err


def test_options_change_what_they_say_and_nothing_else(run, capsys):
    plain, _ = results(capsys, run.path, "--episodes", "6")
    few, _ = results(capsys, run.path, "--episodes", "6", "--num-envs", "2")
    np.testing.assert_array_equal(few, plain)
    sampled, content = results(capsys, run.path, "--episodes", "6", "--stochastic")
    assert (sampled != plain).all()
    assert content["deterministic"] is False
    other, _ = results(capsys, run.path, "--episodes", "6", "--seed", "1")
    assert (other != plain).all()
    _, cut = results(capsys, run.path, "--episodes", "6", "--max-steps", "2")
    assert cut["results"][0]["lengths"] == [2] * 6
    folder, _ = results(capsys, run.path / "policy", "--episodes", "6")
    np.testing.assert_array_equal(folder, plain)


def test_checkpoints_by_name_and_step(run, capsys):
    last, _ = results(capsys, run.path, "--episodes", "4", "--checkpoint", "last")
    final, _ = results(capsys, run.path, "--episodes", "4")
    np.testing.assert_array_equal(last, final)
    earlier, _ = results(capsys, run.path, "--episodes", "4", "--checkpoint", "20")
    recorded = [line["returns"] for line in run.evaluations() if line["step"] == 20]
    np.testing.assert_array_equal(earlier, recorded)
    best, _ = results(capsys, run.path, "--episodes", "4", "--checkpoint", "best")
    recorded = [line["returns"] for line in run.evaluations() if line["step"] == run.manifest["best"]["step"]]
    np.testing.assert_array_equal(best, recorded)
    assert "oracle" in printed(capsys, "evaluate", run.path, "--episodes", "2", "--checkpoint", "best")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "77"], "has no checkpoint of step 77; steps there are"),
        (["--checkpoint", "first"], "--checkpoint must be best, last or a step, not 'first'; steps: "),
        (["--episodes", "0"], "episodes in [1, 65536], not 0 and 0"),
        (["--num-envs", "0"], "num_envs must be at least 1"),
        (["--env", "CartPole-v1"], "CartPole-v1 gives observations of 4 columns"),
        ([], "dataset tiny/walk-v0 names no environment; name one with --env ID"),
    ],
)
def test_bad_input_is_one_line(run, capsys, options, message):
    env = [] if not options or options[0] == "--env" else ["--env", ENV]
    assert main(["evaluate", str(run.path), *options, *env]) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]


def test_a_folder_that_is_nothing_says_so(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "holds no config.json, so it is not the folder of a run" in capsys.readouterr().err


def test_compare_plays_the_final_policies_anew(run, capsys):
    run.rewrite({**run.config, "env": ENV})
    assert main(["compare", str(run.path), "--episodes", "7", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert row["episodes"] == 7
    assert row["per_seed"][0] == pytest.approx(rlkit2.evaluate(run, episodes=7, env=Walk).returns.mean(axis=1).tolist())
