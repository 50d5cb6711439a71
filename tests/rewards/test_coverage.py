"""The coverage study of `benchmarks/starc_coverage.py`, small."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["finite, ends", "finite, cut off", "linear, quadratic", "linear, auto"])
def test_intervals_hold_the_truth(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 40 episodes on at least .9 of the intervals (.95 nominal, 60 data sets) hold the truth; noise gets a number in at most 5 %."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    study = importlib.import_module("starc_coverage")
    for rows, episodes in ((2000, 40), (20_000, 100)):
        found = study.coverage(study.PROBLEMS[problem](), rows, episodes, 60)
        assert found["hold the truth"] >= 0.9, (rows, episodes, found)
        assert found["equivalent holds 0"] >= 0.95
        assert found["noise with a number"] <= 0.05
