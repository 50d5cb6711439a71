"""The loop from labels to regret: cells, resuming, per-seed rewards, correlations."""

import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from rlkit2.api import load_dataset
from rlkit2.cli.main import main
from rlkit2.cli.prefs import _print_study
from rlkit2.errors import ConfigError, DatasetError, RunError
from rlkit2.reporting.preference_figures import study_figure
from rlkit2.studies import preferences_to_regret as study
from rlkit2.studies.preferences_to_regret import BASELINES, StudyResult, StudySettings, load_study, run_study
from tests import warm
from tests.built import give_built

DATASET = "builtin/rooms/stitch-dense-v0"
TINY = StudySettings(  # what the command line below says
    DATASET,
    teachers=("noisy",),
    budgets=(20,),
    seeds=2,
    length=8,
    discount=0.9,
    offset="max",
    reward={"hidden_sizes": [8], "steps": 20, "learning_rate": 1e-3},
    agent_settings={"hidden_sizes": [16]},
    steps=30,
    episodes=2,
)
COMMAND = (
    f"prefs study {DATASET} --teachers noisy --budgets 20 --seeds 2 --length 8 --discount 0.9 --offset max --steps 30 "
    "--reward-steps 20 --hidden-sizes 8 --config hidden_sizes=[16] --episodes 2 --jobs 1"
).split()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return give_built(DATASET, root=tmp_path_factory.mktemp("builtin"))


@pytest.fixture(autouse=True)
def shared(roots, built, monkeypatch):
    monkeypatch.setenv("RLKIT2_DATA", str(built))


def compute_here(work, folders, *, report, **_):
    """An engine without processes."""
    for folder in folders:
        report(folder, work(folder))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, built):
    """Folder of a study whose cells were computed in this process; the local engine computes some of them below."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLKIT2_DATA", str(built))
        done = []
        patch.setattr(study, "run_folders", compute_here)
        run_study(TINY, folder, jobs=2, progress=lambda *numbers: done.append(numbers))
    assert done == [(count, len(BASELINES) + 1) for count in range(len(BASELINES) + 2)]
    return folder


def test_rows_of_a_study(finished):
    result = load_study(finished / "study.json")
    rows = result.rows
    assert len(rows) == 2 * (len(BASELINES) + 1)
    by_teacher = {row["teacher"]: row for row in rows}
    assert by_teacher["true"]["accuracy"] == 1
    assert by_teacher["true"]["starc"] == pytest.approx(0, abs=1e-6)
    assert by_teacher["zero"]["accuracy"] == 0.5
    assert by_teacher["zero"]["starc"] == 1
    assert 0 < by_teacher["noisy"]["starc"] < 2
    assert {row["budget"] for row in rows} == {0, 20}
    assert all(np.isfinite(row["regret"]) for row in rows)
    assert json.loads((finished / "study.json").read_text())["table"][0]["teacher"] == "true"
    study_figure(result.rows, {"starc": "a", "error": "b"}, "title").savefig(finished / "study.png")


def test_finished_cells_are_not_computed_again_and_new_ones_are(finished, monkeypatch):
    asked = []
    monkeypatch.setattr(study, "run_folders", lambda work, folders, **_: asked.append([f.name for f in folders]))
    assert run_study(TINY, finished).rows == load_study(finished / "study.json").rows
    with pytest.raises(RunError, match=r"random-labels-40.rows\.json is missing"):  # nobody computed them here
        run_study(replace(TINY, budgets=(20, 40)), finished)
    # as many random labels as the largest budget, so that this baseline is another one now
    assert asked == [[], ["random-labels-40", "noisy-40"]]


def test_a_killed_study_is_resumed_from_the_command_line(finished, tmp_path, capsys, monkeypatch):
    """A cell before and a cell after the kill; through the engine they are what they are in this process."""
    warm.warm_engine(monkeypatch)
    out = tmp_path / "study"
    for name in ("true-0", "zero-0", "constant-0"):  # to compute two cells here, not five
        shutil.copytree(finished / "cells" / name, out / "cells" / name)
    shutil.copy(finished / "settings.json", out)
    given = [*COMMAND, "--out", str(out)]
    process = warm.Popen([Path(sys.executable).with_name("rlkit2"), *given], stdout=warm.DEVNULL)
    while len(rows := list(out.glob("cells/*/rows.json"))) < 4:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    written = {path: path.stat().st_mtime_ns for path in rows}
    assert out / "cells" / "noisy-20" / "rows.json" not in written
    assert main([*given, "--engine", "local"]) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written
    shown = capsys.readouterr().out
    assert "rank correlation with regret of 2 learned rewards" in shown
    assert (out / "study.png").exists()
    assert load_study(out / "study.json") == load_study(finished / "study.json")


def test_every_seed_learns_from_its_own_rewards():
    dataset = load_dataset(DATASET)
    rewards = torch.stack([dataset.rewards, -dataset.rewards]).double()
    both = study.train_on_rewards(TINY, dataset, rewards, [3, 4])
    for k, seed in enumerate((3, 4)):
        alone = study.train_on_rewards(TINY, dataset, rewards[k : k + 1], [seed])
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close(both.state_dict()[name][k : k + 1], tensor, rtol=1e-3, atol=1e-4, msg=name)


def table(cells, seeds, generator, *, alike=False):
    """Rows whose regret rises with the distance, while the error knows nothing; `alike`: the seeds of a cell do not differ."""
    rows = []
    for cell in range(cells):
        for seed in range(seeds):
            if not (alike and seed):
                starc, error, noise = generator.random(3)
            rows.append(
                {"teacher": "oracle", "budget": 10 * (cell + 1), "seed": seed, "accuracy": 1 - error, "starc": starc}
                | {"starc_low": None, "starc_high": None, "return": 0.0, "regret": starc + 0.05 * noise}
            )
    return rows


def test_correlations_of_a_constructed_table():
    rows = table(6, 5, np.random.default_rng(3))
    measures = {name: [row[name] for row in rows] for name in ("starc", "accuracy", "regret")}
    rows.append({**rows[0], "teacher": "zero", "budget": 0, "starc": 1.0, "regret": -5.0})  # a baseline takes no part
    rows.append({**rows[0], "starc": None, "regret": -5.0})  # nor does a reward without a distance
    result = StudyResult(TINY, rows)
    found = result.correlations
    assert found["starc"].value == pytest.approx(stats.spearmanr(measures["starc"], measures["regret"]).statistic)
    assert found["error"].value == pytest.approx(-stats.spearmanr(measures["accuracy"], measures["regret"]).statistic)
    assert found["difference"].value == pytest.approx(found["starc"].value - abs(found["error"].value))
    assert found["starc"].low > 0.9
    assert found["error"].low < 0 < found["error"].high
    assert 0 < found["difference"].low < found["difference"].value < found["difference"].high < 1
    assert result.to_dict()["spearman_with_regret"]["starc"][0] == found["starc"].value
    assert np.isnan(StudyResult(TINY, rows[:5]).correlations["starc"].value)  # one cell
    shown = result.table()
    assert [row["teacher"] for row in shown] == ["oracle"] * 6 + ["zero"]
    assert shown[1]["regret"] == pytest.approx(np.mean([row["regret"] for row in rows[5:10]]))


def test_seeds_that_do_not_differ_make_no_interval_narrower():
    """A bootstrap over rows would take 40 rewards of 8 cells for 40 independent ones and halve the interval."""

    def width(rows):
        error = StudyResult(TINY, rows).correlations["error"]
        return error.high - error.low

    alike = table(8, 5, np.random.default_rng(1), alike=True)
    assert width(alike) == pytest.approx(width([row for row in alike if row["seed"] == 0]), rel=0.15)
    assert width(table(8, 5, np.random.default_rng(1))) < 0.8 * width(alike)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": (1,)}, "2 labels or more"),
        ({"seeds": 0}, "seeds of the study"),
        ({"teachers": ("kind",)}, "unknown teacher"),
        ({"agent": "sarsa"}, "unknown agent"),
        ({"agent_settings": {"widths": 3}}, "widths"),
        ({"reward": {"member": 3}}, "no field 'member'; did you mean members"),
        ({"reward": {"steps": 0}}, "steps must be a whole number of at least 1, not 0"),
        ({"offset": "median"}, "offset must be one of none, mean, min, max, not 'median'"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)


def test_what_cannot_run_is_said_before_anything_is_computed(tmp_path):
    with pytest.raises(ConfigError, match="unknown engine 'locale'; there are local, ray, slurm"):
        run_study(TINY, tmp_path / "study", engine="locale")
    with pytest.raises(ConfigError, match="jobs must be at least 1, not 0"):
        run_study(TINY, tmp_path / "study", jobs=0)
    assert not (tmp_path / "study").exists()


def test_a_folder_keeps_to_its_settings(finished):
    before = (finished / "study.json").read_text()
    with pytest.raises(RunError, match="holds a study with another steps, episodes; give another folder"):
        run_study(replace(TINY, steps=31, episodes=3), finished)
    assert (finished / "study.json").read_text() == before


def test_a_cell_that_fails_is_named(tmp_path, monkeypatch):
    def fail(work, folders, *, report, **_):
        for folder in folders:
            report(folder, "error: the disk is full" if folder.name == "zero-0" else "finished")

    monkeypatch.setattr(study, "run_folders", fail)
    with pytest.raises(RunError, match="1 of 5 cells of the study did not finish; zero-0: error: the disk is full"):
        run_study(TINY, tmp_path)


def test_a_dataset_without_reference_returns_has_no_regret(tmp_path, monkeypatch):
    dataset = load_dataset(DATASET)
    bare = replace(dataset, spec=replace(dataset.spec, ref_min_score=None))
    monkeypatch.setattr(study, "load_dataset", lambda source: bare)
    with pytest.raises(DatasetError, match="no reference returns"):
        run_study(TINY, tmp_path)


@pytest.mark.parametrize(("true", "zero", "said"), [(0.1, 0.4, False), (0.5, 0.2, True)])
def test_a_study_whose_true_reward_trains_nothing_says_so(true, zero, said, capsys):
    rows = table(2, 2, np.random.default_rng(0))
    rows += [
        {**rows[0], "teacher": name, "budget": 0, "regret": regret} for name, regret in (("true", true), ("zero", zero))
    ]
    _print_study(StudyResult(TINY, rows))
    assert ("the true reward trains no better than none (regret 0.500, 0.200)" in capsys.readouterr().out) == said


def test_constructed_rewards_are_what_they_say():
    dataset = load_dataset(DATASET)
    truth = dataset.rewards.double().numpy()
    made = {
        name: study.constructed_reward(name, dataset, truth, 0.9, 3)
        for name in ("shaped 5", "noise 1", "offset -2", "blend 0", "blend 90")
    }
    np.testing.assert_allclose(made["offset -2"], truth - 2 * truth.std())
    np.testing.assert_allclose(made["blend 0"], (truth - truth.mean()) / truth.std(), atol=1e-12)
    assert abs(np.corrcoef(made["blend 90"], truth)[0, 1]) < 0.9
    assert (made["noise 1"] - truth).std() == pytest.approx(truth.std(), rel=0.1)
    assert (made["shaped 5"] - truth).std() == pytest.approx(5 * truth.std(), rel=1e-6)
    # One seed has one potential, at every size.
    shaping, rows = made["shaped 5"] - truth, slice(int(dataset.episode_starts[0]), int(dataset.episode_starts[1]))
    again = study.constructed_reward("shaped 10", dataset, truth, 0.9, 3) - truth
    np.testing.assert_allclose(again[rows], 2 * shaping[rows], rtol=1e-9)
    assert not np.allclose(study.constructed_reward("shaped 5", dataset, truth, 0.9, 4), made["shaped 5"])
    for name in ("shaped", "bent 2", "noise much"):
        with pytest.raises(ConfigError, match="such as 'shaped 2'"):
            replace(TINY, constructed=(name,))


def test_groups_of_rewards_are_tested_apart():
    rows = table(4, 5, np.random.default_rng(3))
    rows += [{**row, "teacher": "shaped 5", "budget": 0, "starc": 0.0, "regret": 0.1} for row in rows[:5]]
    rows += [{**row, "teacher": "blend 90", "budget": 0, "starc": 1.4, "regret": 0.9} for row in rows[:5]]
    result = StudyResult(replace(TINY, constructed=("shaped 5", "blend 90")), rows)
    assert (len(result.learned), len(result.constructed)) == (20, 10)
    found = result.all_correlations
    assert list(found) == ["learned", "constructed", "all"]
    assert found["constructed"]["starc"].value == pytest.approx(1)
    assert result.to_dict()["by_group"]["all"]["starc"] is not None
