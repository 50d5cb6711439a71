"""The regret study: its protocol, its correlations against the exact reference, restarts and workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlkit2.errors import ConfigError, RunError
from rlkit2.rewards import epic_distance, regret, starc_distance
from rlkit2.studies.starc_study import (
    Comparisons,
    StudyConfig,
    StudyResult,
    compare_process,
    metrics,
    random_process,
    random_reward,
    reference_table,
    run_study,
)
from tests.rewards.vectors import load

SMALL = StudyConfig(mdps=6, pairs=2, steps=4, states=6, actions=3, seed=5)


def test_metrics_and_reference_table() -> None:
    assert len(metrics()) == len(set(metrics())) == 43
    assert len(metrics("all")) == len(set(metrics("all"))) == 237
    table, file = reference_table(), load("starc_study")
    assert set(metrics("all")) <= set(table)
    for k, name in enumerate(file["metric"].tolist()):
        for column in ("published", "exact_all", "exact_nontrivial"):
            assert table[name][column] == pytest.approx(float(file[column][k]), abs=5.1e-5, nan_ok=True)
    assert set(metrics()) <= set(metrics("all"))


def test_distances_and_regret_are_those_of_the_library() -> None:
    found = compare_process(SMALL, 1)
    assert not found.trivial[:4].any()
    rng = np.random.default_rng([SMALL.seed, 1])
    mdp = random_process(rng, 6, 3, 0.95)
    start, end = (random_reward(rng, 6, 3, 0.95) for _ in range(2))
    names = metrics()
    for step in range(1, 5):
        other = start + step / 4 * (end - start)
        row = found.distances[step - 1]
        for name, choices in (
            ("VAL-2-2", {}),
            ("EPIC-1-1", {"canonicalization": "epic", "norm": "l1", "distance": "l1"}),
            (
                "DARD-weighted_2-weighted_2",
                {"canonicalization": "dard", "norm": "weighted_l2", "distance": "weighted_l2"},
            ),
            ("None-0-2", {"canonicalization": "none", "norm": "none"}),
            (
                "Minimalw2-weighted_2-weighted_2",
                {"canonicalization": "minimal", "p": "weighted_2", "norm": "weighted_l2", "distance": "weighted_l2"},
            ),
            ("RANGE-RANGE", {"norm": "range", "distance": "range"}),
        ):
            expected = starc_distance(start, other, mdp, **choices)  # type: ignore[arg-type]
            assert row[names.index(name)] == pytest.approx(expected, abs=1e-9), name
        pearson = epic_distance(start, other, mdp, coverage="transition")
        assert row[names.index("EPIC-pearson-tau")] == pytest.approx(pearson, abs=1e-9)
        mean = (regret(start, other, mdp) + regret(other, start, mdp)) / 2
        assert found.regret[step - 1] == pytest.approx(mean, abs=1e-9)


def test_protocol() -> None:
    rng = np.random.default_rng(0)
    tau = random_process(rng, 32, 4, 0.95).dense.numpy()
    share = (tau > 1e-6).mean()
    assert 0.14 < share < 0.18
    assert tau.min() > 0
    rewards = np.stack([random_reward(rng, 32, 4, 0.95) for _ in range(400)])
    flat = rewards.reshape(400, -1)
    sparse = (np.abs(flat - np.median(flat, 1, keepdims=True)) < 1e-12).mean(1) > 0.9
    assert 0.05 < sparse.mean() < 0.16  # sparse and unshaped: 0.2 x 0.5


def test_a_stopped_study_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    whole = run_study(SMALL, tmp_path / "a")
    stopped: list[int] = []  # how far it came

    def stop(done: int, total: int) -> None:
        stopped.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(SMALL, tmp_path / "b", progress=stop)
    kept = list((tmp_path / "b").glob("comparisons-*.npz"))
    assert stopped
    assert kept
    again = run_study(SMALL, tmp_path / "b", workers=2)
    np.testing.assert_array_equal(whole.comparisons.distances, again.comparisons.distances)
    np.testing.assert_array_equal(whole.comparisons.regret, again.comparisons.regret)
    assert whole.comparisons.process.tolist() == sorted(whole.comparisons.process.tolist())
    assert (tmp_path / "a" / "table.csv").read_text() == (tmp_path / "b" / "table.csv").read_text()
    assert (tmp_path / "a" / "distance_and_regret.svg").stat().st_size > 10_000
    with pytest.raises(RunError, match="holds a study with other settings"):
        run_study(StudyConfig(mdps=7), tmp_path / "a")
    with pytest.raises(ConfigError, match="2 states"):
        StudyConfig(states=1)


def test_correlations_are_pearsons() -> None:
    found = Comparisons.join([compare_process(SMALL, k) for k in range(SMALL.mdps)])
    result = StudyResult(SMALL, found)
    used = result.usable(trivial=True)
    table = result.correlations(trivial=True, resamples=50)
    for k in (0, 20, 42):
        assert table[k, 0] == pytest.approx(np.corrcoef(used.distances[:, k], used.regret)[0, 1], abs=1e-10)
        assert table[k, 1] <= table[k, 0] + 1e-9
        assert table[k, 0] <= table[k, 2] + 1e-9


def check_against_reference(result: StudyResult, slack: float) -> None:
    rows: dict[str, dict[str, Any]] = {row["metric"]: row for row in result.rows()}
    value = {name: row["correlation"] for name, row in rows.items()}
    assert 0.87 <= value["VAL-2-2"] <= 0.93
    assert value["RANGE-RANGE"] > value["VAL-2-2"] > value["DARD-2-2"]
    assert value["EPIC-2-2"] > value["None-2-2"]
    for name, row in rows.items():
        _, norm, distance = f"{name}--".split("-")[:3]
        if norm == distance or "RANGE" in name:
            assert row["correlation"] == pytest.approx(row["exact_nontrivial"], abs=slack), name


def test_few_processes_come_near_the_reference(tmp_path: Path) -> None:
    check_against_reference(run_study(StudyConfig(mdps=12, seed=1), tmp_path / "study"), 0.12)


@pytest.mark.slow
def test_the_reference(tmp_path: Path) -> None:
    check_against_reference(run_study(StudyConfig(mdps=64, seed=0), tmp_path / "study", workers=2), 0.03)
