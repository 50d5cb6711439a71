"""Whatever is written appears whole or not at all, and a disk that fills up is one line that names the file."""

from __future__ import annotations

import ast
import errno
import hashlib
import itertools
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import rlkit2
from rlkit2 import files
from rlkit2.cli.main import main
from rlkit2.training import checkpoints
from tests.training.tiny_problem import store_tiny, tiny_dataset

DATASET = "tiny/walk-v0"
SMALL = ["--hidden-sizes", "8", "--batch-size", "8"]
TRAIN = ["train", "bc", "--dataset", DATASET, "--steps", "4", "--eval-every", "0", *SMALL, "--out"]
RECIPE = """
id = "own/grid-v0"
description = "a few episodes"
seed = 1
environment = { id = "rlkit2/GridRooms-v0" }
behaviors = [{ policy = "random", episodes = 4, max_steps = 5 }]
reference = { episodes = 2, expert = { policy = "grid" } }
"""
STUDY = [
    "starc",
    "study",
    "--mdps",
    "2",
    "--states",
    "4",
    "--actions",
    "2",
    "--pairs",
    "2",
    "--steps",
    "2",
    "--workers",
    "1",
]

# name -> (commands that come before it, the command), in a folder of its own; OUT is a folder or file that it writes
COMMANDS: dict[str, tuple[list[list[str]], list[str]]] = {
    "report": ([[*TRAIN, "RUNS"]], ["report", "RUNS/bc-tiny-walk-v0-001", "--out", "OUT/page.html"]),
    "data check": ([], ["data", "check", DATASET, "--figure", "OUT/picture.png"]),
    "prefs label": ([], ["prefs", "label", DATASET, "--teacher", "oracle", "--count", "12", "--length", "3", "--out", "OUT"]),
    "prefs fit": (
        [["prefs", "label", DATASET, "--teacher", "oracle", "--count", "12", "--length", "3", "--out", "LABELS"]],
        ["prefs", "fit", "LABELS", *["--out", "OUT", "--steps", "4", "--hidden-sizes", "8", "--no-starc", "--figure", "OUT/figure.png"]],
    ),
    "starc study": ([], [*STUDY, "--out", "OUT"]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    store_tiny(DATASET)


def told(words: list[str], folder: Path) -> list[str]:
    """The command with its folders below one of its own."""
    return [str(folder / word) if word.partition("/")[0] in ("OUT", "RUNS", "LABELS") else word for word in words]


def digests(folder: Path) -> dict[str, str]:
    """What was written, apart from times and identities."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.suffix not in (".html", ".png", ".svg")
        and path.name not in ("manifest.json", ".lock")
    }


@contextmanager
def filling(deadly: int) -> Iterator[Callable[[], int]]:
    """From write number `deadly` on half of the data is taken, then the disk is full; gives the number of writes."""
    count, write = itertools.count(1), files.write_synced
    last = 0

    def limited(path: Path, data: bytes, **options: Any) -> None:
        nonlocal last
        last = next(count)
        if last < deadly:
            return write(path, data, **options)
        path.write_bytes(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "write_synced", limited)
        patch.setattr(checkpoints, "write_synced", limited)
        yield lambda: last


@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_fills_up_in_the_middle_of_any_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, command = COMMANDS[name]
    whole = tmp_path / "whole"
    (whole / "OUT").mkdir(parents=True)
    with filling(10**6) as written:
        for words in [*before, command]:
            assert main(told(words, whole)) == 0
    total = written()
    with filling(10**6) as written:
        for words in before:
            assert main(told(words, tmp_path / "prepared")) == 0
    first = written() + 1 if before else 1
    moments = sorted({first, (first + total) // 2, total})
    for moment in moments:
        folder = tmp_path / f"full-{moment}"
        (folder / "OUT").mkdir(parents=True)
        for words in before:
            assert main(told(words, folder)) == 0
        capsys.readouterr()
        with filling(moment - first + 1):
            assert main(told(command, folder)) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlkit2: cannot write")]
        assert len(error) == 1
        assert f"{folder}/OUT" in error[0]
        assert "No space left on device (" in error[0]
        assert "MiB free)" in error[0]
        assert not [path for path in folder.rglob("*") if path.name.startswith(".") and path.name != ".lock"]
        assert main(told(command, folder)) == 0
        assert digests(folder / "OUT").keys() == digests(whole / "OUT").keys()


@pytest.mark.parametrize(
    "command",
    [["data", "build", "--recipe", "RECIPE"], ["data", "relabel", DATASET, "own/new-v0", "--reward", "REWARD"]],
)
def test_a_real_limit_while_a_dataset_is_written(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The HDF5 library writes for itself: here the system refuses its bytes."""
    import numpy as np

    (tmp_path / "recipe.toml").write_text(RECIPE)
    np.save(tmp_path / "reward.npy", np.zeros(len(tiny_dataset())))
    places = {"RECIPE": tmp_path / "recipe.toml", "REWARD": tmp_path / "reward.npy"}
    words = [str(places.get(word, word)) for word in command]
    before = digests(tmp_path / "minari")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    try:
        status = main(words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err.splitlines()[-1]
    assert status == 2, error
    assert error.startswith("rlkit2: cannot write ")
    assert "File too large (" in error
    assert digests(tmp_path / "minari") == before
    assert not list((tmp_path / "minari").glob(".building-*"))
    assert main(words) == 0


ON_A_SMALL_DISK = """
mount -t tmpfs -o size=64k tmpfs {disk} && exec {python} -m rlkit2.cli.main {command}
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    namespace = ["unshare", "-Urm", "sh", "-c"]
    if subprocess.run([*namespace, f"mount -t tmpfs tmpfs {disk}"], capture_output=True, check=False).returncode:
        pytest.skip("no small file system can be mounted here")
    command = " ".join([*TRAIN, str(disk)]).replace("--hidden-sizes 8", "--hidden-sizes 64 64")
    script = ON_A_SMALL_DISK.format(disk=disk, python=sys.executable, command=command)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([*namespace, script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if "cannot write" in line]
    assert error.startswith(
        f"rlkit2: cannot write {disk}/bc-tiny-walk-v0-001/checkpoints/000000000: No space left on device (0."
    )


def test_output_that_cannot_be_printed_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "rlkit2.cli.main", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "rlkit2: cannot write the output: No space left on device\n"


# modules that write otherwise, and why
OWN_WAYS = {
    "files.py": "the boundary itself",
    "data/cache.py": "whole folders, and data stay in memory where it cannot be written",
    "data/folders.py": "who fills a temporary folder",
    "training/ownership.py": "who holds a run, by a link that only one can make",
    "data/export.py": "Minari's storage, in a folder that is renamed",
    "training/checkpoints.py": "folders that are renamed",
    "training/run_files.py": "lines that are appended",
    "entanglement/callback.py": "lines that are appended; nothing it does ends a training",
    "sweeps/engines.py": "a log that another process appends to",
    "sweeps/worker.py": "a log",
    "entanglement/remedy_trainers.py": "a file beside TRL's checkpoint, whose own writing it joins",
}
WRITERS = {
    "write_text",
    "write_bytes",
    "savefig",
    "savez",
    "savez_compressed",
    "save_file",
    "tofile",
    "mkstemp",
    "replace_file",
}


def test_every_file_is_written_through_one_boundary() -> None:
    root = Path(rlkit2.__file__).parent
    found = set()
    for path in sorted(root.rglob("*.py")):
        name = str(path.relative_to(root))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                mode = next((a.value for a in node.args[1:2] if isinstance(a, ast.Constant)), "r")
                into_memory = bool(node.args) and getattr(node.args[0], "id", "") in (
                    "data",
                    "text",
                    "image",
                    "picture",
                    "out",
                )
                if (called in WRITERS and not into_memory) or (called == "open" and set(str(mode)) & set("wax+")):
                    found.add(name)
    assert found <= OWN_WAYS.keys()
