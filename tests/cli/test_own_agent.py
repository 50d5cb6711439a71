"""An agent from a file of the user's: trained, resumed, evaluated and swept by the command line, and never imported because a file names it."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from rlkit2 import load_run
from rlkit2.agents import ENTRY_POINTS, agent_class, import_agent, list_agents
from rlkit2.errors import ConfigError
from tests.agents import awac

ROOT = Path(awac.__file__).parents[2]


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`rlkit2 ...` in a process of its own, as a user would type it."""
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
    shutil.copy(awac.__file__, place / "my_awac.py")
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
    done = command(folder, "train", "my_awac.py:AWAC", "--dataset", "swings.hdf5", "--steps", "6", *SHORT)
    assert done.returncode == 0, done.stderr
    run = load_run(next((folder / "runs").iterdir()))
    assert run.config["agent"] == "my_awac:AWAC"
    nameless = command(folder, "train", "--resume", str(run.path), "--steps", "9")
    assert nameless.returncode == 2
    assert "my_awac.py:AWAC" in nameless.stderr
    assert "is not loaded, and what a file names is not imported" in nameless.stderr.splitlines()[-1]
    words = shlex.split(run.resume_command)
    assert words[:2] == ["rlkit2", "train"]
    resumed = command(folder, *words[1:], "--steps", "9")
    assert resumed.returncode == 0, resumed.stderr
    assert max(run.checkpoints) == 9
    scored = command(
        folder, "evaluate", str(run.path), "--env", "Pendulum-v1", "--episodes", "1", "--max-steps", "3", "--json"
    )
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["run"] == str(run.path)
    shown = command(folder, "train", "my_awac.py:AWAC", "--help")
    assert "--temperature" in shown.stdout
    assert "Advantage-weighted actor-critic" in shown.stdout


def test_a_sweep_runs_it_only_when_it_is_named(folder: Path) -> None:
    (folder / "sweep.toml").write_text(
        '[base]\nagent = "my_awac.py:AWAC"\ndataset = "swings.hdf5"\n'
        '[base.training]\nsteps = 3\neval_every = 0\n[grid]\n"config.temperature" = [0.5]\n'
    )
    refused = command(folder, "sweep", "sweep.toml", "--out", "swept")
    assert refused.returncode == 2
    assert "what a file names is not imported" in refused.stderr
    done = command(folder, "sweep", "sweep.toml", "--out", "swept", "--agent", "my_awac.py:AWAC")
    assert done.returncode == 0, done.stderr
    assert list((folder / "swept").rglob("checkpoints/*"))


def test_its_recipes_stand_beside_it(folder: Path) -> None:
    (folder / "recipes").mkdir()
    (folder / "recipes" / "random.toml").write_text(
        'agent = "my_awac.py:AWAC"\ndataset = "swings.hdf5"\n[config]\ntemperature = 0.25\n[training]\nsteps = 2\n'
    )
    done = command(folder, "train", "my_awac.py:AWAC", "--dataset", "swings.hdf5", "--out", "with recipe", *SHORT)
    assert done.returncode == 0, done.stderr
    run = load_run(next((folder / "with recipe").iterdir()))
    assert (run.config["config"]["temperature"], run.config["training"]["steps"]) == (0.25, 2)


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


def test_installed_packages_offer_agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "offering-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offering\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\noffered = tests.agents.awac:AWAC\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "offered" in list_agents()
    assert agent_class("offered") is awac.AWAC
