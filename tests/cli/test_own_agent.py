"""An agent from a file of the user's: trained, resumed, evaluated and swept by the command line, and never imported because a file names it."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from rlkit2 import load_run, train
from rlkit2.agents import ENTRY_POINTS, agent_class, class_name, import_agent, list_agents
from rlkit2.cli.main import main
from rlkit2.errors import ConfigError
from rlkit2.sweeps.engines import ENGINES
from rlkit2.sweeps.worker import carry_out
from rlkit2.training.recipe import find_recipe
from rlkit2.training.run import RunWarning
from tests.agents import own
from tests.warm import warm_engine

ROOT = Path(own.__file__).parents[2]


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`rlkit2 ...` typed in a folder, with nothing of the user's loaded before and nothing left behind."""
    place, before, paths = folder.resolve(), set(sys.modules), list(sys.path)
    out, error = StringIO(), StringIO()
    with contextlib.chdir(place), redirect_stdout(out), redirect_stderr(error):
        try:
            code = main(words)
        except SystemExit as end:
            code = int(end.code or 0)
    sys.path[:] = paths
    for name in set(sys.modules) - before:
        if str(place.parent) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]
    return subprocess.CompletedProcess(words, code, out.getvalue(), error.getvalue())


def process(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`rlkit2 ...` in a process of its own."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from rlkit2.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    call = [sys.executable, "-P", "-c", code, *words]
    return subprocess.run(call, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with spaces in its name, an agent in it, and a run of 6 steps."""
    place = tmp_path_factory.mktemp("own") / "my agents"
    place.mkdir()
    shutil.copy(own.__file__, place / "my_own.py")
    random = np.random.default_rng(0)
    with h5py.File(place / "swings.hdf5", "w") as file:
        file["observations"] = random.normal(size=(60, 3)).astype(np.float32)
        file["actions"] = random.uniform(-1, 1, (60, 1)).astype(np.float32)
        file["rewards"] = random.normal(size=60).astype(np.float32)
        file["terminals"] = np.zeros(60, bool)
        file["timeouts"] = np.arange(60) % 20 == 19
    return place


SHORT = ("--eval-every", "0", "--hidden-sizes", "8")


def test_train_resume_evaluate_and_sweep(folder: Path) -> None:
    done = command(folder, "train", "my_own.py:Own", "--dataset", "swings.hdf5", "--steps", "6", *SHORT)
    assert done.returncode == 0, done.stderr
    run = load_run(next((folder / "runs").iterdir()))
    assert run.config["agent"] == "my_own:Own"
    nameless = command(folder, "train", "--resume", str(run.path), "--steps", "9")
    assert nameless.returncode == 2
    assert "which is not loaded, and what a file names is not imported" in nameless.stderr
    assert nameless.stderr.count("\n") == 1
    words = shlex.split(run.resume_command)
    assert words[:2] == ["rlkit2", "train"]
    resumed = process(folder, *words[1:], "--steps", "9")
    assert resumed.returncode == 0, resumed.stderr
    assert max(run.checkpoints) == 9
    scored = command(
        folder, "evaluate", str(run.path), "--env", "Pendulum-v1", "--episodes", "1", "--max-steps", "3", "--json"
    )
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["run"] == str(run.path)
    unnamed = command(folder, "evaluate", str(run.path), "--checkpoint", "last")
    assert unnamed.returncode == 2
    assert f"--agent {shlex.quote(run.config['agent_source'])}" in unnamed.stderr
    last = ("--checkpoint", "last", "--env", "Pendulum-v1", "--episodes", "1", "--max-steps", "3")
    named = command(folder, "evaluate", str(run.path), "--agent", run.config["agent_source"], *last)
    assert named.returncode == 0, named.stderr
    (folder / "my_own.py").write_text((folder / "my_own.py").read_text() + "# changed\n")
    with pytest.warns(RunWarning, match="is not what the run was trained with so far"):
        assert command(folder, *words[1:], "--steps", "12").returncode == 0
    assert "new code" in run.manifest["warnings"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RunWarning)  # it is the run's code now
        assert command(folder, *words[1:], "--steps", "13").returncode == 0
    shown = command(folder, "train", "my_own.py:Own", "--help")
    assert "--temperature" in shown.stdout
    assert "An agent as a user writes one" in shown.stdout


def test_a_sweep_runs_it_only_when_it_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warm_engine(monkeypatch)
    (folder / "sweep.toml").write_text(
        '[base]\nagent = "my_own.py:Own"\ndataset = "swings.hdf5"\n'
        '[base.training]\nsteps = 3\neval_every = 0\n[grid]\n"config.temperature" = [0.5]\n'
    )
    refused = command(folder, "sweep", "sweep.toml", "--out", "swept")
    assert refused.returncode == 2
    assert "what a file names is not imported" in refused.stderr
    done = command(folder, "sweep", "sweep.toml", "--out", "swept", "--agent", "my_own.py:Own")
    assert done.returncode == 0, done.stderr
    assert list((folder / "swept").rglob("checkpoints/*"))
    sweep = (folder / "sweep.toml").read_text().replace('"swings.hdf5"', f'"{folder / "swings.hdf5"}"')
    (folder / "elsewhere.toml").write_text(sweep)
    monkeypatch.setitem(
        ENGINES, "local", lambda work, folders, *_: [_[-1](f, carry_out(work, str(f))) for f in folders]
    )
    far = command(folder.parent, "sweep", f"{folder}/elsewhere.toml", "--agent", f"{folder.name}/my_own.py:Own")
    assert far.returncode == 0, far.stdout + far.stderr


def test_its_recipes_stand_beside_it(folder: Path) -> None:
    (folder / "recipes").mkdir()
    (folder / "recipes" / "random.toml").write_text(
        'agent = "my_own.py:Own"\ndataset = "swings.hdf5"\n[config]\ntemperature = 0.25\n[training]\nsteps = 2\n'
    )
    done = command(folder, "train", "my_own.py:Own", "--dataset", "swings.hdf5", "--out", "with recipe", *SHORT)
    assert done.returncode == 0, done.stderr
    run = load_run(next((folder / "with recipe").iterdir()))
    assert (run.config["config"]["temperature"], run.config["training"]["steps"]) == (0.25, 2)
    (folder / "recipes" / "another.toml").write_text('agent = "absent.py:B"\ndataset = "swings.hdf5"\n')
    named = ("./my_own.py:Own", "--recipe", "recipes/random.toml", "--out", "named")
    done = command(folder, "train", *named, *SHORT)
    assert done.returncode == 0, done.stderr
    run = load_run(next((folder / "named").iterdir()))
    assert run.config["agent"] == "my_own:Own"
    assert run.config["agent_source"] == f"{folder / 'my_own.py'}:Own"
    refused = command(folder, "train", "iql", "--recipe", "recipes/random.toml")
    assert refused.returncode == 2


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (None, "absent.py:A", "does not exist"),
        ("x = 1\n", "one.py:A", "has no agent 'A'; it has none"),
        ("import no_such_module\n", "two.py:A", "cannot be imported: ModuleNotFoundError"),
        ("def broken(:\n", "three.py:A", "cannot be imported: SyntaxError"),
        ("x = 1\n", "json.py:A", "the name json is taken"),
        (None, "no.such.package:A", "cannot be imported: ModuleNotFoundError"),
        (None, ":A", "does not name an agent"),
    ],
)
def test_what_cannot_be_imported_is_one_line(
    text: str | None, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(name.partition(":")[0]).write_text(text)
    with pytest.raises(ConfigError, match=message) as refused:
        import_agent(name)
    assert "\n" not in str(refused.value)


def test_a_name_alone_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("trap.py").write_text("raise SystemExit('ran')\n")
    for name in ("trap.py:A", "trap:A", "antigravity:A"):
        with pytest.raises(ConfigError, match="is not loaded"):
            agent_class(name)
    assert "trap" not in sys.modules


SUBCLASS = """
from neighbour import SIGN
from rlkit2.agents.bc import BC

class Reversed(BC):
    def update(self, batch):
        metrics = super().update(batch)
        return {**metrics, "reversed/sign": SIGN + 0 * metrics["policy/loss"]}
"""


def test_a_subclass_with_its_parents_config_is_trained_as_itself(folder: Path, tmp_path: Path) -> None:
    """The config is the parent's, which must not decide the class; modules beside the file are found."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "neighbour.py").write_text("SIGN = -1.0\n")
    (tmp_path / "theirs" / "reversing.py").write_text(SUBCLASS)
    name = "theirs/reversing.py:Reversed"
    done = command(tmp_path, "train", name, "--dataset", str(folder / "swings.hdf5"), "--steps", "3", *SHORT)
    assert done.returncode == 0, done.stderr
    run = load_run(next((tmp_path / "runs").iterdir()))
    assert run.config["agent"] == "reversing:Reversed"
    assert {line["reversed/sign"] for line in run.metrics()} == {-1.0}


class Child(own.Own):
    """Shares its parent's config."""


def test_a_class_can_be_given_in_python(folder: Path, tmp_path: Path) -> None:
    data = folder / "swings.hdf5"
    options: dict[str, Any] = {"eval_every": 0, "overrides": {"hidden_sizes": [8]}, "progress": False}
    run = train(Child, data, steps=2, out=tmp_path, **options)
    assert type(run.agent) is Child
    resumed = train(resume=run, steps=4, progress=False)
    assert max(resumed.checkpoints) == 4
    with pytest.raises(ConfigError, match="name that: rlkit2 train"):
        train(own.Own, resume=run, steps=5, progress=False)


@pytest.mark.parametrize("batch_size", [1e11, 1e300])
def test_a_batch_that_cannot_fit_is_one_line_and_no_folder(folder: Path, tmp_path: Path, batch_size: float) -> None:
    with pytest.raises(ConfigError, match=r"takes at least .* GiB, and cpu has .*; choose at most"):
        train("bc", folder / "swings.hdf5", steps=2, batch_size=batch_size, out=tmp_path / "runs", progress=False)
    assert not (tmp_path / "runs").exists()


def test_the_memory_of_an_update_is_at_least_what_it_is_said_to_be(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice is taken: the batch it names fits, twice of what is refused does not."""
    options: dict[str, Any] = {"steps": 1, "eval_every": 0, "progress": False, "out": tmp_path}
    monkeypatch.setattr("rlkit2.training.building.total_memory", lambda device: 4 << 20)
    with pytest.raises(ConfigError, match="choose at most") as refused:
        train("bc", folder / "swings.hdf5", batch_size=5000, **options)
    advised = int(str(refused.value).rpartition(" ")[2])
    assert 1 < advised < 5000
    train("bc", folder / "swings.hdf5", batch_size=advised, **options)
    with pytest.raises(ConfigError, match="choose at most"):
        train("bc", folder / "swings.hdf5", batch_size=4 * advised, **options)


def test_networks_that_cannot_fit_are_one_line(folder: Path, tmp_path: Path) -> None:
    for sizes in ([10**7, 10**7], [10**30]):
        with pytest.raises(ConfigError, match=r"too little memory for the networks|takes at least"):
            train(
                "bc", folder / "swings.hdf5", out=tmp_path / "runs", overrides={"hidden_sizes": sizes}, progress=False
            )
    assert not (tmp_path / "runs").exists()


def offer(folder: Path, lines: str) -> None:
    """An installed package with these entry points."""
    info = folder / "offering-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offering\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\n{lines}")


def test_a_broken_package_breaks_only_its_own_agents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(tmp_path, "broken = no_such_module:A\nno-agent = json:JSONDecoder\nwith-dash = tests.agents.own:Own\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="agent broken of the installed package offering cannot be imported: Module"):
        agent_class("broken")
    with pytest.raises(ConfigError, match="agent no-agent of the installed package offering is not"):
        agent_class("no-agent")
    assert agent_class("with-dash") is own.Own
    assert class_name(own.Own) == "with-dash"
    assert class_name(agent_class("sdice")) == "odice"
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert not ended.value.code
    assert "package offering cannot be imported" in " ".join(capsys.readouterr().out.split())


def test_a_foreign_class_of_a_shipped_name_gets_no_shipped_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "foreign_iql.py").write_text("from rlkit2.agents.iql import IQL as Theirs\n\nclass IQL(Theirs): pass\n")
    offer(tmp_path, "better-iql = foreign_iql:IQL\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_recipe("iql", "zoo/hopper/medium-v0") is not None
    assert find_recipe("better-iql", "zoo/hopper/medium-v0") is None


def test_installed_packages_offer_agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(tmp_path, "offered = tests.agents.own:Own\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "offered" in list_agents()
    assert agent_class("offered") is own.Own
