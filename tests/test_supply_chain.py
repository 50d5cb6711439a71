"""What comes along with rlkit2, and that nothing of it talks to the network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.audit import ALLOWED, ROOT, Package, closure, constraint_faults, licence_faults


def test_every_package_that_rlkit2_needs_is_there_under_a_known_licence() -> None:
    packages, wrong = closure("rlkit2")
    assert wrong == []
    assert licence_faults(packages) == []
    assert constraint_faults(ROOT / "constraints.txt") == []
    names = {package.name for package in packages}
    assert {"torch", "numpy", "h5py", "pyarrow", "minari"} <= names  # those of extras of requirements, too
    assert len(packages) < 90  # few, and it is noticed when they become more


@pytest.mark.parametrize(
    "licence", ["unknown", "AGPL-3.0-or-later", "GPLv3", "Proprietary", "Apache-2.0 WITH Commons Clause"]
)
def test_other_licences_are_named(licence: str) -> None:
    assert licence_faults([Package("some", "1.0", licence, "rlkit2")]) == [f"some 1.0: licence {licence}"]
    assert ALLOWED.search("LGPL-3.0 AND MIT")


def test_another_version_than_the_tested_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text("# the tested one\nnumpy==0.1\n")
    (fault,) = constraint_faults(tmp_path / "constraints.txt")
    assert fault.endswith("is not ==0.1 of constraints.txt")


ORDINARY = """
import json, pkgutil, sys
seen = []
def hook(event, arguments):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        seen.append(f"{event} {arguments[1:]}")
sys.addaudithook(hook)
import rlkit2
for module in pkgutil.walk_packages(rlkit2.__path__, "rlkit2."):
    try:
        __import__(module.name)
    except ImportError:
        pass  # an extra that is not installed
imported = len(seen)
from rlkit2.cli.main import main
from tests.training.tiny_problem import tiny_dataset
out = sys.argv[1]
run = f"{out}/bc-tiny-walk-v0-001"
small = ["--steps", "4", "--hidden-sizes", "8"]
tiny_dataset().to_minari("tiny/walk-v0")
status = [main(words) for words in (
    ["train", "bc", "--dataset", "tiny/walk-v0", "--out", out, *small],
    ["train", "--resume", run, "--steps", "6"],
    ["data", "info", "tiny/walk-v0"],
    ["data", "check", "tiny/walk-v0"],
    ["data", "list"],
    ["report", run, "--out", f"{out}/page.html"],
    ["prefs", "label", "tiny/walk-v0", "--teacher", "oracle", "--count", "12", "--length", "3", "--out", f"{out}/labels"],
    ["doctor"],
)]
print(json.dumps({"seen": seen, "imported": imported, "status": status}))
"""


@pytest.mark.slow
def test_neither_an_import_nor_an_ordinary_run_opens_a_connection(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MINARI_DATASETS_PATH": str(tmp_path / "minari")}
    for name in ("HF_HUB_OFFLINE", "WANDB_MODE", "DO_NOT_TRACK"):  # nothing of that kind is needed
        environment.pop(name, None)
    command = [sys.executable, "-W", "ignore", "-c", ORDINARY, str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seen"] == []
    assert set(found["status"]) <= {0, 1}, done.stderr[-2000:]
