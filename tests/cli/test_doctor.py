"""What `rlkit2 doctor` sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlkit2.cli.main import main


def test_a_sound_installation_has_no_problems(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert found["packages"]["torch"]["version"] == torch.__version__
    assert found["devices"][0]["device"] == "cpu"
    assert found["folders"]["cache"] == {
        "path": str(tmp_path / "cache"),
        "exists": False,
        "writable": True,
        "entries": 0,
        "set_by": "RLKIT2_CACHE",
    }
    assert not (tmp_path / "cache").exists()
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "no problems" in out
    assert str(tmp_path / "builtin") in out


def test_what_is_broken_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")

    def full(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert main(["doctor", "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert any("pyarrow cannot be imported" in problem for problem in problems)
    assert any("set RLKIT2_CACHE to a folder that can" in problem for problem in problems)


def test_a_missing_extra_shows_how_to_install_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "ray" else find(name, *a))
    assert main(["doctor"]) == 0
    assert "pip install 'rlkit2[ray]'" in capsys.readouterr().out
