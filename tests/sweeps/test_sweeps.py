"""Sweep files, and engines whose runs are those of `rlkit2.train`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import rlkit2
from rlkit2.agents import import_agent
from rlkit2.cli.main import main
from rlkit2.errors import ConfigError, DatasetError, EnvironmentUnavailableError, MissingExtraError
from rlkit2.sweeps import ENGINES, load_sweep, run_folders, run_sweep, sweep_runs, train_experiment
from rlkit2.sweeps.engines import _ended
from rlkit2.sweeps.experiment import find_run
from rlkit2.sweeps.worker import carry_out, find_work, work_name
from tests.training.tiny_problem import contents, store_tiny
from tests.warm import warm_engine

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
checkpoint_every = 10
[grid]
"config.learning_rate" = [1e-3, 1e-2]
"""


def written(tmp_path, text=FILE):
    path = tmp_path / "tiny.toml"
    path.write_text(text)
    return path


def test_a_grid_is_every_combination_and_listed_runs_come_beside_it(tmp_path):
    text = (
        FILE
        + 'seeds = [[0], [3, 7]]\n[[runs]]\nagent = "odice"\nseeds = 3\nconfig = { lambda_ = 0.7 }\ntraining.steps = 5\n'
    )
    with pytest.raises(ConfigError, match=r"run 'odice .*: ODICEConfig has no field 'weight_decay'"):
        load_sweep(written(tmp_path, text.replace("hidden_sizes = [8]", "weight_decay = 0.1")))
    experiments = load_sweep(written(tmp_path, text)).experiments
    assert [(e.agent, e.seeds, e.config.get("learning_rate")) for e in experiments[:-1]] == [
        ("bc", (0,), 1e-3), ("bc", (3, 7), 1e-3), ("bc", (0,), 1e-2), ("bc", (3, 7), 1e-2),
    ]  # fmt: skip
    listed = experiments[-1]
    assert (listed.agent, listed.seeds, listed.config, listed.training["steps"]) == (
        "odice",
        (0, 1, 2),
        {"hidden_sizes": (8,), "lambda_": 0.7},
        5,
    )
    assert listed.training["batch_size"] == 8
    assert listed.label == "odice seeds=3 lambda_=0.7 steps=5"
    assert experiments[1].label == "learning_rate=0.001 seeds=3x7"
    assert len({e.folder for e in experiments}) == 5


def test_a_run_keeps_its_folder_wherever_it_stands_in_the_file(tmp_path):
    before = {e.folder for e in load_sweep(written(tmp_path)).experiments}
    more = load_sweep(written(tmp_path, FILE.replace("[1e-3, 1e-2]", "[1e-1, 1e-2, 1e-3]"))).experiments
    assert before < {e.folder for e in more}
    assert before.isdisjoint(
        e.folder for e in load_sweep(written(tmp_path, FILE.replace("steps = 30", "steps = 31"))).experiments
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[grid]", "[gridd]"), r"the file has an unknown entry 'gridd'; did you mean grid\?"),
        (("seeds = 2", "seed = 2"), r"has an unknown entry 'seed'; did you mean seeds\?"),
        (('agent = "bc"', 'agent = "bcc"'), "unknown agent 'bcc'"),
        (('agent = "bc"', ""), "names no agent; add agent ="),
        (('dataset = "tiny/walk-v0"', ""), "names no dataset"),
        (('"config.learning_rate"', '"config.learning_rat"'), r"no field 'learning_rat'; did you mean learning_rate\?"),
        (("[1e-3, 1e-2]", '["a"]'), r"run 'learning_rate=a': learning_rate must be a number of at least 0, not 'a'"),
        (("[1e-3, 1e-2]", "0.1"), r"grid: config\.learning_rate must be a list of values, not 0\.1"),
        (("[1e-3, 1e-2]", "[]"), "must be a list of values"),
        (("[1e-3, 1e-2]", "[0.1, 0.1]"), r"holds the same run twice: learning_rate=0\.1-"),
        (("steps = 30", "steps = 0"), "steps must be a whole number of at least 1"),
        (("seeds = 2", "seeds = [1, 1]"), "seeds must be a positive number or distinct integers"),
        (('name = "tiny"', "name ="), "is not readable TOML"),
        (('name = "tiny"', 'name = "../../elsewhere"'), r"name must be a plain name of a folder, not '\.\./\.\./elsewhere'"),
        (("seeds = 2", "seeds = 1e40"), "seeds must be a positive number or distinct integers, not 1e\\+40"),
        (("seeds = 2", "seeds = 1000000000000"), "seeds must be a positive number or distinct integers"),
        (("seeds = 2", "recipes = 0"), "recipes must be true or false, not 0"),
        (("seeds = 2", "env = 5"), "env must be the id of an environment, not 5"),
        (("seeds = 2", 'loggers = ["wandbb"]'), "unknown logger 'wandbb'"),
        (("seeds = 2", 'loggers = "wandb"'), "loggers must be a list of names, not 'wandb'"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_line_before_anything_is_trained(tmp_path, capsys, change, message):
    path = written(tmp_path, FILE.replace(*change))
    with pytest.raises(ConfigError, match=message) as caught:
        load_sweep(path)
    assert str(path) in str(caught.value)
    assert main(["sweep", str(path), "--out", str(tmp_path / "runs")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_runs_without_recipes_have_folders_of_their_own(tmp_path):
    plain = load_sweep(written(tmp_path)).experiments
    bare = load_sweep(written(tmp_path, FILE.replace("seeds = 2", "seeds = 2\nrecipes = false"))).experiments
    assert {e.recipes for e in plain} == {True}
    assert {e.recipes for e in bare} == {False}
    assert {e.folder for e in plain}.isdisjoint(e.folder for e in bare)


def test_what_cannot_run_is_said_before_anything_is_trained(tmp_path, monkeypatch):
    sweep = load_sweep(written(tmp_path))
    with pytest.raises(ConfigError, match="unknown engine 'locale'; there are local, ray, slurm"):
        run_sweep(sweep, out=tmp_path, engine="locale")
    with pytest.raises(DatasetError, match="tiny/walk-v0"):
        run_sweep(sweep, out=tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_sweep(tmp_path / "nothing.toml")
    store_tiny()
    for engine, module, extra in (("ray", "ray", "ray"), ("slurm", "submitit", "slurm")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtraError, match=rf"pip install 'rlkit2\[{extra}\]'"):
            run_sweep(sweep, out=tmp_path, engine=engine)


def test_loggers_named_in_the_file_change_no_folder(tmp_path, monkeypatch):
    store_tiny()
    plain = load_sweep(written(tmp_path))
    with_loggers = load_sweep(written(tmp_path, FILE.replace("[base]", '[base]\nloggers = ["wandb"]')))
    assert [e.folder for e in plain.experiments] == [e.folder for e in with_loggers.experiments]
    assert {e.loggers for e in with_loggers.experiments} == {("wandb",)}
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match="wandb is not installed"):
        run_sweep(with_loggers, out=tmp_path)


def single(tmp_path, learning_rate, **options):
    """The same run without a sweep."""
    return rlkit2.train(
        "bc", "tiny/walk-v0", seeds=2, out=tmp_path / f"single-{learning_rate}", progress=False,
        overrides={"hidden_sizes": (8,), "learning_rate": learning_rate},
        **{"steps": 30, "batch_size": 8, "checkpoint_every": 10, **options},
    )  # fmt: skip


def test_local_runs_are_those_of_train_and_a_second_call_trains_nothing(tmp_path, capsys):
    store_tiny()
    path, out = written(tmp_path), tmp_path / "runs"
    assert main(["sweep", str(path), "--out", str(out), "--jobs", "2", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("not begun") == 2
    assert not out.exists()
    assert main(["sweep", str(path), "--out", str(out), "--jobs", "2"]) == 0
    printed = capsys.readouterr()
    assert "tiny: 2 runs, 0 of them finished before" in printed.err
    assert "2/2 learning_rate=" in printed.err
    assert printed.out.count("30/30") == 2
    runs = sweep_runs(out, load_sweep(path))
    for experiment, run in runs.items():
        assert contents(run) == contents(single(tmp_path, experiment.config["learning_rate"]))
    assert main(["sweep", str(path), "--out", str(out)]) == 0
    assert "tiny: 2 runs, 2 of them finished before" in capsys.readouterr().err
    assert all(len(run.manifest["starts"]) == 1 for run in runs.values())


def test_ctrl_c_saves_every_run_and_the_same_call_goes_on(tmp_path, monkeypatch):
    warm_engine(monkeypatch)
    store_tiny()
    text = (
        FILE.replace("steps = 30", "steps = 1000")
        .replace("checkpoint_every = 10", "checkpoint_every = 50")
        .replace("[1e-3, 1e-2]", "[1e-3]")
    )
    sweep, out = load_sweep(written(tmp_path, text)), tmp_path / "runs"
    (experiment,) = sweep.experiments
    folder = out / "tiny" / experiment.folder

    def interrupt():
        while not any(int(path.name) for path in folder.glob("*/checkpoints/0*")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    seen = {}
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, out=out, report=lambda experiment, status: seen.update({experiment: status}))
    thread.join()
    assert seen == {experiment: "interrupted"}
    run = find_run(folder)
    assert run.manifest["status"] == "interrupted"
    assert 0 < run.checkpoint().step < 1000
    assert run_sweep(sweep, out=out) == {experiment: "finished"}
    assert contents(run) == contents(single(tmp_path, 1e-3, steps=1000, checkpoint_every=50))


def test_a_process_that_died_says_where_its_log_is(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import os; os._exit(3)"], stdout=subprocess.PIPE, text=True)
    process.wait()
    assert _ended(process, tmp_path) == f"error: ended with status 3; see {tmp_path / 'log.txt'}"


def test_slurm_jobs_by_submitit(tmp_path):
    """With submitit's own local cluster, which runs the same jobs without Slurm."""
    pytest.importorskip("submitit")
    store_tiny()
    sweep = load_sweep(written(tmp_path, FILE.replace("[1e-3, 1e-2]", "[1e-3]")))
    statuses = run_sweep(sweep, out=tmp_path / "runs", engine="slurm", options={"cluster": "local", "timeout_min": 5})
    assert list(statuses.values()) == ["finished"]
    (run,) = sweep_runs(tmp_path / "runs", sweep).values()
    assert contents(run) == contents(single(tmp_path, 1e-3))


def test_ray_tasks(tmp_path):
    ray = pytest.importorskip("ray")
    store_tiny()
    sweep = load_sweep(written(tmp_path, FILE.replace("[1e-3, 1e-2]", "[1e-3]")))
    try:
        statuses = run_sweep(
            sweep, out=tmp_path / "runs", engine="ray", options={"num_cpus": 1, "include_dashboard": False}
        )
    finally:
        ray.shutdown()
    assert list(statuses.values()) == ["finished"]
    (run,) = sweep_runs(tmp_path / "runs", sweep).values()
    assert contents(run) == contents(single(tmp_path, 1e-3))


def test_every_engine_is_named_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    text = capsys.readouterr().out
    assert all(engine in text for engine in ENGINES)
    assert Path("sweep.toml").name in text


def test_work_is_a_function_that_other_processes_find():
    assert find_work(work_name(train_experiment)) is train_experiment
    for work in (lambda folder: "finished", written):
        with pytest.raises(ConfigError, match="is not a function of rlkit2"):
            run_folders(work, [])
    with pytest.raises(ConfigError, match="os:system is not a function of rlkit2"):
        find_work("os:system")
    with pytest.raises(ConfigError, match=r"rlkit2\.sweeps\.worker:SETTINGS is not a function of rlkit2"):
        find_work("rlkit2.sweeps.worker:SETTINGS")


def test_work_ends_with_the_process_that_began_it(tmp_path):
    """A killed sweep leaves nothing behind that would go on beside the sweep that is started in its place."""
    store_tiny()
    text = FILE.replace("steps = 30", "steps = 1000000").replace("[1e-3, 1e-2]", "[1e-3]")
    sweep, out = load_sweep(written(tmp_path, text)), tmp_path / "runs"
    (experiment,) = sweep.experiments
    folder = out / "tiny" / experiment.folder
    command = [Path(sys.executable).with_name("rlkit2"), "sweep", str(sweep.path), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any(int(path.name) for path in folder.glob("*/checkpoints/0*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while find_run(folder).manifest["status"] != "interrupted":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_environment_of_a_module_is_imported_only_for_who_trusts_the_file(tmp_path):
    path = written(tmp_path, FILE.replace("[base]", '[base]\nenv = "no_such_module:Env-v0"'))
    with pytest.raises(EnvironmentUnavailableError, match="would import no_such_module"):
        load_sweep(path)
    assert load_sweep(path, trust_env=True).trust_env


# every engine, every end

ENDINGS = ["none", "killed", "memory", "odd"]
OPTIONS = {
    "local": {},
    "slurm": {"cluster": "local", "timeout_min": 5},
    "ray": {"num_cpus": 2, "include_dashboard": False},
}


@pytest.fixture(params=ENGINES)
def engine(request):
    """An engine that is installed here: Slurm by submitit's own local cluster, which runs the same jobs without Slurm."""
    module = {"local": None, "slurm": "submitit", "ray": "ray"}[request.param]
    if module is not None:
        pytest.importorskip(module)
    yield request.param
    if request.param == "ray":
        sys.modules["ray"].shutdown()


def test_no_end_of_one_run_ends_another(engine, tmp_path, capsys, monkeypatch):
    """Workers that are killed, leave, or raise anything: the rest is trained, reasons are kept, and the same call resumes what ended."""
    warm_engine(monkeypatch)
    store_tiny()
    (tmp_path / "cache").mkdir(exist_ok=True)
    agent = f"{Path(__file__).with_name('broken_agents.py')}:Ending"
    import_agent(agent)
    text = FILE.replace('"bc"', json.dumps(agent)).replace(
        '"config.learning_rate" = [1e-3, 1e-2]', f'"config.ending" = {json.dumps(ENDINGS)}'
    )
    path, out = written(tmp_path, text), tmp_path / "runs"
    sweep = load_sweep(path)
    found = run_sweep(sweep, out=out, engine=engine, jobs=2, options=OPTIONS[engine])
    status = {experiment.config["ending"]: text for experiment, text in found.items()}
    assert list(status) == ENDINGS
    assert status["none"] == "finished"
    for ending, words in (("memory", "OutOfMemoryError: the GPU is full"), ("odd", "Odd: neither")):
        assert words in status[ending]
        assert "log.txt" in status[ending]
    assert "neither an Exception nor ours" in next(out.glob("tiny/ending=odd*/log.txt")).read_text()
    if engine == "ray":  # begins it again, and it resumes
        assert status["killed"] == "finished"
    else:
        assert status["killed"].startswith("error: ")
    if engine == "local":
        assert "killed by SIGKILL" in status["killed"]
    assert all("\n" not in text for text in status.values())

    assert main(["sweep", str(path), "--out", str(out), "--agent", agent, "--dry-run"]) == 0
    table = " ".join(capsys.readouterr().out.split())
    assert "running" not in table
    assert table.count("finished") == list(status.values()).count("finished")
    assert "OutOfMemoryError" in table
    runs = {experiment.config["ending"]: run for experiment, run in sweep_runs(out, sweep).items()}
    assert {runs[ending].status for ending, text in status.items() if text != "finished"} == {"died"}
    assert runs["memory"].manifest["error"] == "OutOfMemoryError: the GPU is full"

    again = run_sweep(sweep, out=out, engine=engine, jobs=2, options=OPTIONS[engine])
    assert set(again.values()) == {"finished"}
    assert runs["memory"].manifest["error"] is None
    whole = contents(runs["none"])
    for run in runs.values():
        assert contents(run) == whole


def run_here(work, folders, jobs, options, report):
    """The local engine without its processes."""
    for folder in folders:
        report(folder, carry_out(work, str(folder)))


def test_a_damaged_run_is_an_error_of_its_own(tmp_path, capsys, monkeypatch):
    store_tiny()
    path, out = written(tmp_path), tmp_path / "runs"
    sweep = load_sweep(path)
    with monkeypatch.context() as patch:
        patch.setitem(ENGINES, "local", run_here)
        assert set(run_sweep(sweep, out=out).values()) == {"finished"}
    warm_engine(monkeypatch)
    first, second = sweep_runs(out, sweep).values()
    (first.path / "manifest.json").write_text("[]")
    (second.path / "config.json").write_text("{")
    assert main(["sweep", str(path), "--out", str(out), "--jobs", "2"]) == 1
    printed = capsys.readouterr()
    assert "manifest.json" in printed.err
    assert "config.json" in printed.err
    assert "Traceback" not in printed.err
    assert "".join(printed.out.split()).count("damaged") >= 2


@pytest.mark.slow
def test_a_lost_node_of_a_ray_cluster_costs_what_it_did_since_its_checkpoint(tmp_path):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    store_tiny()
    text = FILE.replace("steps = 30", "steps = 20000").replace("checkpoint_every = 10", "checkpoint_every = 500")
    sweep, out = load_sweep(written(tmp_path, text)), tmp_path / "runs"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    node = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address)

    def lose():
        while not all(run is not None and max(run.checkpoints, default=0) for run in sweep_runs(out, sweep).values()):
            time.sleep(0.1)
        cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=lose)
    thread.start()
    try:
        assert set(run_sweep(sweep, out=out, engine="ray").values()) == {"finished"}
    finally:
        thread.join()
        ray.shutdown()
        cluster.shutdown()
    starts = sorted(len(run.manifest["starts"]) for run in sweep_runs(out, sweep).values())
    assert starts == [1, 2]
