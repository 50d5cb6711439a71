"""The built wheel works by itself: recipes, pages and commands are in it. No network: the dependencies are those of this environment."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a busy machine
def test_the_wheel_works_in_an_environment_of_its_own(tmp_path: Path) -> None:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the wheel, is not installed; make test-wheel installs it")
    (wheel,) = _built(tmp_path)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    run = [str(python), "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", str(wheel)]
    subprocess.run(run, check=True)
    site = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    places = [sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("site-packages"))]
    (site / "dependencies.pth").write_text("\n".join(dict.fromkeys(places)) + "\n")  # whose own .pth files are not read
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"RLKIT2_CACHE": str(tmp_path / "cache"), "RLKIT2_DATA": str(tmp_path / "data")}

    def rlkit2(*words: str) -> str:
        command = [str(python.with_name("rlkit2")), *words]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    assert rlkit2("--version").startswith("rlkit2 ")
    recipes = "from rlkit2.training.recipe import agent_recipes as found; print(len(found('odice')))"
    where = subprocess.run(
        [str(python), "-c", f"import rlkit2; print(rlkit2.__file__); {recipes}"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    place, count = where.stdout.split()
    assert place.startswith(str(site))
    assert int(count) == len(list((ROOT / "agents/odice").glob("*.toml"))) > 0
    rlkit2("train", "bc", "--dataset", "builtin/pendulum", "--steps", "20", "--eval-episodes", "1")
    assert "builtin/rooms" in rlkit2("data", "list")
    rlkit2("compare", *map(str, (tmp_path / "runs").glob("*")))
    rlkit2("report", *map(str, (tmp_path / "runs").glob("*")), "--out", "page.html")
    assert "<script>" in (tmp_path / "page.html").read_text()
    rlkit2("demo", "--steps", "60", "--seeds", "1")
    assert (tmp_path / "runs/demo/demo.html").is_file()


def _built(folder: Path) -> list[Path]:
    build = [
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder / "dist"),
        str(ROOT),
    ]
    subprocess.run([sys.executable, *build], check=True)
    return list((folder / "dist").glob("rlkit2-*.whl"))
