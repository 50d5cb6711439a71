"""A benchmark trains what its file of results does not have, each agent with its default setting, and says what it reuses and what does not fit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from rlkit2.agents import agent_class, make_config
from rlkit2.cli.main import main
from rlkit2.data import DatasetSpec, dataset_from_arrays
from rlkit2.errors import ConfigError, DatasetNotFoundError, RunError
from rlkit2.reporting import cells as cells_module
from rlkit2.reporting.cells import code_digest, merge_cells, read_cells, same_setting
from rlkit2.studies.benchmark import run_benchmark
from rlkit2.sweeps import ENGINES, worker
from rlkit2.training import Run
from tests.training.tiny_problem import Walk, tiny_dataset

SMALL = {"steps": 10, "batch_size": 8, "hidden_sizes": (8,), "eval_every": 2, "eval_episodes": 3}
CONTINUOUS, DISCRETE = "tiny/walk-v0", "tiny/choice-v0"


class Choice(Walk):
    """The same with three actions; the last one is right."""

    action_space = gym.spaces.Discrete(3)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._step += 1
        return self._observe(), float(action == 2), False, self._step == 5, {}


# by name, as a dataset's file has it
gym.register("BenchmarkWalk-v0", entry_point="tests.training.tiny_problem:Walk")
gym.register("BenchmarkChoice-v0", entry_point="tests.studies.test_benchmark:Choice")


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two datasets with environments and reference returns; trainings happen in this process."""
    walk = tiny_dataset()
    spec = dataclasses.replace(walk.spec, env_spec=gym.spec("BenchmarkWalk-v0"), ref_min_score=-20.0, ref_max_score=0.0)
    arrays = {
        name: getattr(walk, name)
        for name in ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    }
    dataset_from_arrays(**arrays, spec=spec).to_minari(CONTINUOUS)
    chosen = np.random.default_rng(0).integers(3, size=len(walk))
    other = DatasetSpec(
        observation_space=walk.spec.observation_space,
        action_space=gym.spaces.Discrete(3),
        env_spec=gym.spec("BenchmarkChoice-v0"),
        ref_min_score=1.0,
        ref_max_score=5.0,
        id=DISCRETE,
    )
    dataset_from_arrays(**{**arrays, "actions": chosen}, spec=other).to_minari(DISCRETE)

    def here(
        work: str, folders: Sequence[Path], jobs: int, options: Mapping[str, Any], report: Callable[[Path, str], None]
    ) -> None:
        for folder in folders:
            report(folder, worker.attempt(work, str(folder)))

    monkeypatch.setitem(ENGINES, "local", here)
    return [CONTINUOUS, DISCRETE]


def test_cells_that_fit_are_trained_once_and_grow_by_seeds(tmp_path: Path, datasets: list[str]) -> None:
    said: list[str] = []
    first = run_benchmark(
        tmp_path / "one", datasets=datasets, agents=["bc", "td3bc"], seeds=1, say=said.append, **SMALL
    )
    assert not first.failed
    assert first.board.cells[DISCRETE, "td3bc"] == "not for these actions"
    assert "4 cells of 1 seeds: 0 reused, 3 to be trained, 1 that do not fit" in said
    assert "1/3 bc on tiny/walk-v0: finished" in said
    kept = first.results.read_text()
    said.clear()
    # another folder with the same results: nothing is trained
    again = run_benchmark(
        tmp_path / "two",
        datasets=datasets,
        agents=["bc", "td3bc"],
        seeds=1,
        results=first.results,
        say=said.append,
        **SMALL,
    )
    assert f"reused from {first.results}: bc on 2 datasets, td3bc on 1 dataset" in said
    assert not list((tmp_path / "two").glob("runs/*"))
    assert first.results.read_text() == kept
    assert again.markdown.read_text().partition("\n")[2] == first.markdown.read_text().partition("\n")[2]
    # two more seeds: those alone are trained
    said.clear()
    more = run_benchmark(tmp_path / "one", datasets=[CONTINUOUS], agents=["bc"], seeds=3, say=said.append, **SMALL)
    assert "**" not in more.markdown.read_text()  # alone it is not the best of anything
    assert "there, but for seed 1, 2: bc on tiny/walk-v0" in said
    cell = more.board.cells[CONTINUOUS, "bc"]
    assert isinstance(cell, cells_module.Cell)
    assert cell.seeds == (0, 1, 2)
    assert [run["seeds"] for run in cell.runs] == [[0], [1, 2]]
    before = first.board.cells[CONTINUOUS, "bc"]
    assert isinstance(before, cells_module.Cell)
    np.testing.assert_array_equal(cell.history.scores[-1][:1], before.history.scores[-1].round(3))
    # other steps are another setting
    said.clear()
    run_benchmark(
        tmp_path / "one", datasets=[CONTINUOUS], agents=["bc"], seeds=1, say=said.append, dry_run=True, **{**SMALL, "steps": 12}
    )  # fmt: skip
    assert "1 cells of 1 seeds: 0 reused, 1 to be trained, 0 that do not fit" in said
    assert "| tiny/walk-v0 | not trained |" in (tmp_path / "one/benchmark.md").read_text()


def test_what_the_data_decide_is_part_of_the_setting(tmp_path: Path, datasets: list[str]) -> None:
    """`odice` settles by the data what its weights come from: its cell is found again."""
    said: list[str] = []
    options: dict[str, Any] = {"datasets": [CONTINUOUS], "agents": ["odice"], "seeds": 1, "say": said.append, **SMALL}
    done = run_benchmark(tmp_path, **options)
    cell = done.board.cells[CONTINUOUS, "odice"]
    assert isinstance(cell, cells_module.Cell)
    assert cell.setting["config"]["weight_residual"] in ("return", "mixed")
    said.clear()
    run_benchmark(tmp_path, dry_run=True, **options)
    assert "1 cells of 1 seeds: 1 reused, 0 to be trained, 0 that do not fit" in said


def test_the_numbers_are_those_of_the_runs(tmp_path: Path, datasets: list[str]) -> None:
    done = run_benchmark(tmp_path, datasets=datasets, agents=["bc", "iql"], seeds=2, **SMALL)
    folder = next(path for path in (tmp_path / "runs").glob("iql-tiny-walk*/*") if path.is_dir())
    run = Run(folder)
    assert run.config["config"]["expectile"] == make_config("iql").expectile
    assert run.config["recipe"] is None
    assert run.config["data"]["normalize_observations"]
    scores = {
        seed: [np.mean(line["normalized_scores"]) for line in run.evaluations() if line["seed"] == seed]
        for seed in (0, 1)
    }
    (cell,) = [cell for cell in read_cells(done.results) if (cell.agent, cell.dataset) == ("iql", CONTINUOUS)]
    assert cell.history.steps == (2, 4, 6, 8, 10)
    for index, seed in enumerate((0, 1)):
        np.testing.assert_allclose(cell.history.per_seed[:, index], scores[seed], atol=1e-3)
        assert cell.last(5).scores[-1][index, 0] == pytest.approx(np.mean(scores[seed]), abs=1e-3)
    mean = np.mean([np.mean(values) for values in scores.values()])
    table = done.markdown.read_text()
    line = next(line for line in table.splitlines() if line.startswith(f"| {CONTINUOUS}"))
    assert f"{mean:.1f} [" in line
    for heading in (
        "continuous actions: tiny/walk-v0",
        "discrete actions: tiny/choice-v0",
        "Performance profiles",
        "Final",
    ):
        assert heading in table
    page = done.page.read_text()
    assert "<svg" in page
    assert 'src="http' not in page


def test_changed_code_is_said_and_trained_anew_only_where_asked(
    tmp_path: Path, datasets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_benchmark(tmp_path, datasets=datasets[:1], agents=["bc"], seeds=1, **SMALL)
    for module in ("rlkit2.studies.benchmark", "rlkit2.reporting.cells"):
        monkeypatch.setattr(f"{module}.code_digest", lambda cls: "changed")
    kept = run_benchmark(tmp_path, datasets=datasets[:1], agents=["bc"], seeds=1, **SMALL)
    assert any("the code of these agents has changed since they were trained: bc" in note for note in kept.board.notes)
    anew = run_benchmark(tmp_path, datasets=datasets[:1], agents=["bc"], seeds=1, anew=True, **SMALL)
    assert anew.board.notes == ()
    (cell,) = read_cells(anew.results)
    assert [run["code"] for run in cell.runs] == ["changed"]
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_an_agent_that_fails_is_a_cell_with_its_reason_and_the_rest_runs(tmp_path: Path, datasets: list[str]) -> None:
    done = run_benchmark(tmp_path, datasets=datasets[:1], agents=["p_iql", "bc"], seeds=1, **SMALL)
    assert "rewards" in done.failed[CONTINUOUS, "p_iql"]
    assert isinstance(done.board.cells[CONTINUOUS, "bc"], cells_module.Cell)
    assert done.board.against == "bc"
    assert "error: " in done.markdown.read_text()


def test_settings_written_before_a_field_existed_are_known_again() -> None:
    def setting(**changes: Any) -> dict[str, Any]:
        config = {**dataclasses.asdict(make_config("odice_released")), **changes}
        training = {"steps": 1, "batch_size": 2, "schedule": "constant", "eval_every": 1, "eval_episodes": 1}
        return cells_module.make_setting("odice_released", config, {"normalize_observations": True}, training)

    wanted = setting()
    older = {**wanted, "config": {name: value for name, value in wanted["config"].items() if name != "value_unit"}}
    assert same_setting(older, wanted)  # `former` says "reward", as the preset has it
    without = {name: value for name, value in wanted["training"].items() if name != "schedule"}
    assert same_setting({**wanted, "training": without}, wanted)
    assert not same_setting(setting(lambda_=0.7), wanted)
    assert not same_setting({**wanted, "config": {**wanted["config"], "gone": 1}}, wanted)
    assert not same_setting({**wanted, "data": {"normalize_observations": False}}, wanted)
    assert not same_setting({**wanted, "training": {**wanted["training"], "steps": 2}}, wanted)


def test_code_is_what_runs_not_what_is_said_about_it(tmp_path: Path) -> None:
    assert cells_module._bare('"""Said."""\nx = 1  # why\n') == cells_module._bare("x = 1\n")
    assert cells_module._bare("x = 1\n") != cells_module._bare("x = 2\n")
    assert code_digest(agent_class("cql")) != code_digest(agent_class("dqn"))


def test_a_damaged_file_of_results_is_one_line(tmp_path: Path, datasets: list[str]) -> None:
    done = run_benchmark(tmp_path, datasets=datasets[:1], agents=["bc"], seeds=1, **SMALL)
    content = json.loads(done.results.read_text())
    (cell,) = content["cells"]
    for name, value in (
        ("steps", [1]),
        ("seeds", 5),
        ("setting", "unknown"),
        ("seeds", {"0": {"means": ["a"], "final": []}}),
    ):
        done.results.write_text(json.dumps({**content, "cells": [{**cell, name: value}]}))
        with pytest.raises(RunError, match=r"results.json is not a file of cells, or damaged"):
            read_cells(done.results)
    done.results.write_text(json.dumps({**content, "format": 2}))
    with pytest.raises(RunError, match="upgrade rlkit2"):
        merge_cells(done.results, [])


def test_wrong_words_are_refused_before_anything_is_trained(
    tmp_path: Path, datasets: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="unknown agent 'bcc'"):
        run_benchmark(tmp_path / "new", datasets=datasets, agents=["bc", "bcc"], **SMALL)
    with pytest.raises(DatasetNotFoundError):
        run_benchmark(tmp_path / "new", datasets=["tiny/nothing-v0"], agents=["bc"], **SMALL)
    with pytest.raises(ConfigError, match=r"'iql', is not among bc"):
        run_benchmark(tmp_path / "new", datasets=datasets, agents=["bc"], against="iql", **SMALL)
    with pytest.raises(ConfigError, match="eval_every must be at least 1"):
        run_benchmark(tmp_path / "new", datasets=datasets, agents=["bc"], **{**SMALL, "eval_every": 0})
    assert main(["benchmark", "--out", str(tmp_path / "new"), "--seeds", "x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_the_command_prints_the_summary(
    tmp_path: Path, datasets: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "benchmark",
        "--out",
        str(tmp_path),
        "--datasets",
        *datasets,
        "--agents",
        "bc",
        "dqn",
        "--seeds",
        "0,4",
        "--steps",
        "4",
    ]
    words += ["--batch-size", "8", "--hidden-sizes", "8", "--eval-episodes", "2"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "continuous actions: tiny/walk-v0" in printed
    assert "discrete actions: tiny/choice-v0" in printed
    assert str(tmp_path / "benchmark.html") in printed
    assert (
        f"rlkit2 benchmark --datasets {CONTINUOUS} {DISCRETE} --agents bc dqn --seeds 0,4"
        in (tmp_path / "benchmark.md").read_text()
    )
