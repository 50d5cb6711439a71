"""Bars for long work: what is done of a sweep is told while its runs go on, and lines appear above the bar."""

from __future__ import annotations

import io
import json
import sys
import threading
from pathlib import Path

import pytest

from rlkit2 import progress, terminal
from rlkit2.cli import output
from rlkit2.errors import RunError
from rlkit2.sweeps.experiment import share_done


def test_polled_work_tells_its_share_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "POLL", 0.001)
    told: list[tuple[int, int]] = []
    twice = threading.Event()

    def measure() -> float:
        if not told:
            told.append((0, 0))
            raise RunError("a file that is just being written")
        return 0.25

    def tell(done: int, total: int) -> None:
        told.append((done, total))
        twice.set()

    with progress.polled(measure, tell):
        assert twice.wait(10)
    count = len(told)
    assert set(told[1:]) == {(250, 1000)}
    assert not [thread for thread in threading.enumerate() if "poll" in thread.name]
    assert len(told) == count
    with progress.polled(measure, None):
        assert not [thread for thread in threading.enumerate() if "poll" in thread.name]


@pytest.mark.parametrize(
    ("status", "last", "share"), [("running", 30, 0.3), ("running", None, 0.0), ("finished", 30, 1.0)]
)
def test_the_share_of_a_run_is_that_of_its_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, last: int | None, share: float
) -> None:
    assert share_done(tmp_path) == 0.0

    class Half:
        path, config = tmp_path, {"training": {"steps": 100}}

    Half.status = status  # type: ignore[attr-defined]
    monkeypatch.setattr("rlkit2.sweeps.experiment.find_run", lambda folder: Half)
    if last is not None:
        lines = [{"step": step, "seed": seed, "value": 1e300} for step in (10, last) for seed in range(3)]
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert share_done(tmp_path) == share


def test_lines_appear_above_a_bar_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    with progress.progress_bar("sweep") as bar:
        bar(1, 4)
        assert output.console(stderr=True) is terminal.live[-1]
        output.say("run 1: finished", stderr=True)
    assert not terminal.live
    assert "run 1: finished" in screen.getvalue()
    assert output.console(stderr=True) is not output.console(stderr=True)
    with terminal.options_of(["--quiet"]), progress.progress_bar("sweep") as bar:
        bar(1, 4)
        assert not terminal.live
