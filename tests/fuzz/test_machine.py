"""Machines that lack something: a home directory, memory."""

from __future__ import annotations

import pwd
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from rlkit2.cli.main import main


@pytest.mark.parametrize(
    ("words", "variable"),
    [
        (["data", "list"], "RLKIT2_DATA"),
        (["data", "check", "zoo/hopper/medium-v0"], "MINARI_DATASETS_PATH"),
        (["train", "bc", "--dataset", "FILE", "--steps", "1"], "RLKIT2_CACHE"),
        (["train", "bc", "--dataset", "builtin/rooms"], "RLKIT2_DATA"),
    ],
)
def test_a_user_without_a_home_directory_is_told_what_to_set(words, variable, monkeypatch, capsys, tmp_path):
    def nobody(*_):
        raise KeyError("no such user")

    for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "RLKIT2_CACHE", "RLKIT2_DATA", "MINARI_DATASETS_PATH"):
        monkeypatch.delenv(name, raising=False)
    if variable == "RLKIT2_CACHE":
        from tests.training.tiny_problem import tiny_dataset

        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
        tiny_dataset().to_minari("tiny/walk-v0")
        words = [word.replace("FILE", "tiny/walk-v0") for word in words]
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert main([*words, *(["--out", str(tmp_path)] if words[0] == "train" else [])]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1] == f"rlkit2: this user has no home directory; set {variable} to a folder that can be written"
    assert len(error) <= 2  # before it, the recipe that was found


def test_too_little_memory_is_one_line():
    def little():
        resource.setrlimit(resource.RLIMIT_AS, (200 * 2**20, 200 * 2**20))

    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); from rlkit2.cli.main import main; sys.exit(main(['train', 'bc']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=little, check=False)
    assert done.returncode == 2, done.stderr[-500:]
    assert done.stderr.startswith("rlkit2: not enough memory (ulimit -v allows 0.2 GiB; rlkit2 needs at least 1): ")
    assert done.stderr.count("\n") == 1
