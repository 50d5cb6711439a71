"""Searches choose the same trials, end the same ones early and find the same best one, whoever carries them out."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rlkit2
from rlkit2.cli.main import main
from rlkit2.errors import ConfigError, MissingExtraError, RunError
from rlkit2.sweeps import ENGINES, load_sweep, run_search
from rlkit2.sweeps.search import _toml, best_trial, metric_at
from rlkit2.sweeps.space import SAMPLERS, Choice, RandomSampler, Range, read_space
from rlkit2.sweeps.worker import carry_out
from rlkit2.training import Run, load_recipe
from rlkit2.training.selection import Goal
from tests.training.tiny_problem import contents, store_tiny

FILE = """
name = "tiny"
[base]
agent = "bc"
dataset = "tiny/walk-v0"
seeds = 2
[base.config]
hidden_sizes = [8]
[base.training]
steps = 30
batch_size = 8
log_every = 3
checkpoint_every = 10
eval_every = 0
[search]
metric = "policy/loss"
trials = 6
batch = 3
seed = 5
prune = [7, 20]
[search.space]
"config.learning_rate" = { low = 1e-5, high = 1e-1, log = true }
"""


@pytest.fixture(autouse=True)
def dataset(roots):
    store_tiny()


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """An engine in this process, that takes its work in the opposite order."""

    def run(work, folders, jobs, options, report):
        for folder in reversed(folders):
            report(folder, carry_out(work, str(folder)))

    monkeypatch.setitem(ENGINES, "here", run)


def written(tmp_path, text=FILE):
    path = tmp_path / "tiny.toml"
    path.write_text(text)
    return path


def told(trials):
    return [(t.number, t.values, t.state, t.step, t.value) for t in trials]


def test_trials_behind_the_median_end_early_and_the_best_becomes_a_recipe(tmp_path, capsys):
    sweep = load_sweep(written(tmp_path))
    trials = run_search(sweep, out=tmp_path / "runs", engine="here")
    states = Counter(trial.state for trial in trials)
    assert states["finished"] >= 1
    assert states["pruned"] >= 1
    assert states.total() == 6
    assert {trial.step for trial in trials if trial.state == "pruned"} <= {7, 20}
    assert not [trial for trial in trials[:3] if trial.state == "pruned" and trial.step == 7]  # too few to compare with
    best = best_trial(trials, Goal("policy/loss", rising=False))
    assert best.value == min(trial.value for trial in trials if trial.state == "finished")
    recipe = load_recipe(tmp_path / "runs" / "tiny" / "best.toml")
    assert recipe.config["learning_rate"] == best.values["config.learning_rate"]
    assert recipe.training["steps"] == 30
    table = json.loads((tmp_path / "runs" / "tiny" / "search.json").read_text())
    assert [row["state"] for row in table["trials"]] == [trial.state for trial in trials]
    # the paused and resumed run is the run that is trained in one go, and so is the recipe
    (config,) = (tmp_path / "runs" / "tiny" / best.experiment.folder).glob("*/config.json")
    whole = rlkit2.train(tmp_path / "runs" / "tiny" / "best.toml", seeds=2, out=tmp_path / "again", progress=False)
    assert contents(Run(config.parent)) == contents(whole)
    # the same command finds the same, and trains nothing
    assert told(run_search(sweep, out=tmp_path / "runs", engine="here")) == told(trials)
    assert main(["sweep", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "runs"), "--engine", "here"]) == 0
    output = capsys.readouterr()
    assert f"best setting: {tmp_path}/runs/tiny/best.toml" in output.out
    assert output.err.count("trial ") == 6


def test_an_interrupted_search_ends_the_same(tmp_path, monkeypatch):
    sweep = load_sweep(written(tmp_path))
    whole = told(run_search(sweep, out=tmp_path / "a", engine="here"))
    engine, count = ENGINES["here"], 0

    def interrupted(work, folders, jobs, options, report):
        nonlocal count
        count += 1
        if count == 4:
            engine(work, folders[1:], jobs, options, report)
            raise KeyboardInterrupt
        engine(work, folders, jobs, options, report)

    monkeypatch.setitem(ENGINES, "here", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_search(sweep, out=tmp_path / "b", engine="here")
    assert told(run_search(sweep, out=tmp_path / "b", engine="here")) == whole


SLURM = {
    "local": {"cluster": "local", "timeout_min": 5},
    "debug": {"cluster": "debug"},
}  # both are submitit's own, without Slurm


def searched(tmp_path, method, change=lambda text: text):
    """A search by this method, with what comes of it when it is carried out here: its trials and its best setting."""
    if method == "optuna":
        pytest.importorskip("optuna")
    path = written(tmp_path, change(FILE.replace("[search.space]", f'method = "{method}"\n[search.space]')))
    trials = run_search(load_sweep(path), out=tmp_path / "here", engine="here")
    return path, told(trials), (tmp_path / "here" / "tiny" / "best.toml").read_text()


@pytest.mark.parametrize("method", SAMPLERS)
def test_slurm_jobs_find_the_same(tmp_path, method):
    pytest.importorskip("submitit")
    path, trials, best = searched(tmp_path, method)
    found = run_search(load_sweep(path), out=tmp_path / "runs", engine="slurm", options=SLURM["debug"])
    assert told(found) == trials
    assert (tmp_path / "runs" / "tiny" / "best.toml").read_text() == best


@pytest.mark.slow
@pytest.mark.parametrize("method", SAMPLERS)
@pytest.mark.parametrize("engine", ["local", "slurm"])
def test_every_engine_finds_the_same_and_so_does_one_whose_driver_was_killed(tmp_path, engine, method):
    """Killed in the middle of a run; jobs on a cluster go on without their driver and are waited for."""
    if engine == "slurm":
        pytest.importorskip("submitit")

    def longer(text):
        text = (
            text.replace("steps = 30", "steps = 3000")
            .replace("[7, 20]", "[1000, 2000]")
            .replace("trials = 6", "trials = 5")
        )
        return text.replace("log_every = 3", "log_every = 50").replace(
            "checkpoint_every = 10", "checkpoint_every = 100"
        )

    path, trials, best = searched(tmp_path, method, longer)
    options = SLURM["local"] if engine == "slurm" else {}
    out = tmp_path / "runs"
    words = ["sweep", path, "--out", out, "--engine", engine, "--jobs", "2"]
    words += ["--option", *(f"{name}={value}" for name, value in options.items())] if options else []
    driver = subprocess.Popen(
        [Path(sys.executable).with_name("rlkit2"), *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while not any(int(folder.name) for folder in out.glob("tiny/*/*/checkpoints/0*")):
        assert driver.poll() is None, driver.stderr.read()
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    assert not (out / "tiny" / "search.json").exists()
    found = run_search(load_sweep(path), out=out, engine=engine, jobs=2, options=options)
    assert told(found) == trials
    assert (out / "tiny" / "best.toml").read_text() == best


@pytest.mark.parametrize("method", SAMPLERS)
def test_samplers_choose_the_same_again_and_stay_inside(method):
    if method == "optuna":
        pytest.importorskip("optuna")
    space = {"a": Range(1e-4, 1e-2, log=True), "b": Range(2, 5), "c": Choice(([8], [8, 8])), "d": Range(-1.0, 1)}

    def asked():
        sampler = SAMPLERS[method](space, 3, False)
        found = []
        for _ in range(6):
            batch = sampler.ask(3)
            found += batch
            sampler.tell([(abs(math.log(batch[0]["a"] / 1e-3)), None), (None, None), (batch[2]["d"], 10)])
        return found

    first = asked()
    assert first == asked()
    for values in first:
        assert 1e-4 <= values["a"] <= 1e-2
        assert values["b"] in (2, 3, 4, 5)
        assert values["c"] in ([8], [8, 8])
        assert -1 <= values["d"] <= 1
    assert {values["b"] for values in first} == {2, 3, 4, 5}


@settings(max_examples=50)
@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.integers(0, 99))
def test_random_numbers_lie_in_their_range(low, width, seed):
    space = {"x": Range(low, low + width + 1e-3), "n": Range(int(low), int(low) + int(width) + 1)}
    (values,) = RandomSampler(space, seed, rising=False).ask(1)
    assert space["x"].low <= values["x"] <= space["x"].high
    assert space["n"].low <= values["n"] <= space["n"].high
    assert type(values["n"]) is int


def test_a_batch_does_not_change_what_random_search_chooses():
    space = {"a": Range(0.0, 1.0)}
    one, many = RandomSampler(space, 0, rising=False), RandomSampler(space, 0, rising=False)
    assert [one.ask(1)[0] for _ in range(5)] == many.ask(5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('metric = "policy/loss"', ""), "search names no metric"),
        (('"policy/loss"', '"critic/q"'), "write min:critic/q or max:critic/q"),
        (("trials = 6", "trials = 0"), "trials must be a whole number of at least 1 and at most 100000, not 0"),
        (("batch = 3", "batch = 1000000000000"), "batch must be a whole number of at least 1 and at most 100000"),
        (("trials = 6", "method = {}"), "method must be one of random, optuna, not {}"),
        (("trials = 6", 'method = "grid"'), "method must be one of random, optuna"),
        (("prune = [7, 20]", "prune = [20, 7]"), "prune must be rising steps below 30"),
        (("prune = [7, 20]", "prune = [30]"), "prune must be rising steps below 30"),
        (("low = 1e-5", "low = 1"), "needs numbers low < high"),
        (("low = 1e-5", "low = 0"), r"above 0 with log = true"),
        (("low = 1e-5", "lo = 1e-5"), r"must be a list of values or \{ low"),
        (("config.learning_rate", "training.steps"), "trials of unequal steps cannot be compared"),
        (("[search.space]", '[grid]\nagent = ["bc"]\n[search.space]'), "search stands in place of"),
        (("seed = 5", "sed = 5"), r"unknown entry 'sed'; did you mean seed\?"),
    ],
)
def test_a_wrong_search_is_one_line(tmp_path, capsys, change, message):
    with pytest.raises(ConfigError, match=message):
        load_sweep(written(tmp_path, FILE.replace(*change)))
    assert main(["sweep", str(tmp_path / "tiny.toml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_cannot_be_searched_is_said(tmp_path, monkeypatch):
    wrong = FILE.replace("config.learning_rate", "config.learning_rat")
    with pytest.raises(ConfigError, match=r"run 'trial=0 .*no field 'learning_rat'"):
        run_search(load_sweep(written(tmp_path, wrong)), out=tmp_path / "a", engine="here")
    other = load_sweep(written(tmp_path, FILE.replace('"policy/loss"', '"min:critic/loss"')))
    with pytest.raises(RunError, match=r"no trial of .* came to an end with a finite critic/loss"):
        run_search(other, out=tmp_path / "b", engine="here")
    import rlkit2.errors

    monkeypatch.setattr(rlkit2.errors.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(MissingExtraError, match=r"pip install 'rlkit2\[optuna\]'"):
        SAMPLERS["optuna"]({}, 0, False)


def test_small_parts(tmp_path):
    assert metric_at(None, Goal("a/b", rising=True), 3) is None
    assert _toml(("a", 1, 2.5, True, [1e-9])) == '["a", 1, 2.5, true, [1e-09]]'
    with pytest.raises(ConfigError, match="space must name fields"):
        read_space({})
    assert Path(tmp_path).is_dir()
