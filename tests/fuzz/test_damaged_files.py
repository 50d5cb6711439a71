"""A short run of the fuzzer; `make fuzz MINUTES=30` is a long one."""

from __future__ import annotations

import shutil
from contextlib import nullcontext

import pytest

from tests.fuzz import kinds
from tests.fuzz.campaign import originals, try_one
from tests.fuzz.kinds import KINDS


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One whole folder of every kind, and a place for datasets and cache."""
    root = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLKIT2_CACHE", str(root / "cache"))
        patch.setenv("MINARI_DATASETS_PATH", str(root / "minari"))
        yield originals(root / "whole")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_damage_ends_in_a_line_and_never_in_a_traceback(kind, whole, tmp_path, monkeypatch):
    root = next(iter(whole.values())).parents[1]
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root / "minari"))
    inputs = {"run": 30, "recipe": 12, "sweep": 20, "labels": 20, "dataset": 15, "search": 15}.get(kind.name, 5)
    faults = [fault for number in range(inputs) if (fault := try_one(number, whole, tmp_path, kind))[1] is not None]
    assert not faults, "\n".join("\n".join(map(str, fault)) for fault in faults)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_whole_files_are_not_refused(kind, whole, tmp_path, monkeypatch, capsys):
    """Otherwise their damage is never looked at."""
    root = next(iter(whole.values())).parents[1]
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root / "minari"))
    monkeypatch.setattr(kinds, "suppress", lambda error: nullcontext())
    shutil.copytree(whole[kind.name], tmp_path / "input")
    kind.uses[0](tmp_path / "input")
    assert not [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlkit2:")]
