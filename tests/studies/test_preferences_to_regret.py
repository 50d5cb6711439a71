"""The loop from labels to regret: cells, resuming, per-seed rewards, correlations."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlkit2.api import load_dataset
from rlkit2.errors import ConfigError, DatasetError
from rlkit2.reporting.preferences import study_figure
from rlkit2.studies import preferences_to_regret as study
from rlkit2.studies.preferences_to_regret import BASELINES, StudyResult, StudySettings, load_study, run_study
from tests.preferences.make import share_builtin

DATASET = "builtin/rooms/stitch-dense-v0"
TINY = StudySettings(
    DATASET,
    teachers=("noisy",),
    budgets=(20,),
    seeds=2,
    length=8,
    test_pairs=50,
    discount=0.9,
    offset="max",
    reward={"hidden_sizes": [8], "steps": 20},
    agent_settings={"hidden_sizes": [16]},
    steps=30,
    batch_size=32,
    episodes=2,
    bootstrap=10,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return tmp_path_factory.mktemp("builtin")


@pytest.fixture(autouse=True)
def shared(roots, built, monkeypatch):
    share_builtin(DATASET, built, monkeypatch)


def test_the_loop_runs_and_goes_on_where_it_was(tmp_path, monkeypatch):
    said = []
    result = run_study(TINY, tmp_path, say=said.append)
    assert len(said) == len(BASELINES) + 1
    assert len(result.rows) == 2 * len(said)
    by_teacher = {row["teacher"]: row for row in result.rows}
    assert by_teacher["true"]["accuracy"] == 1
    assert by_teacher["true"]["starc"] == pytest.approx(0, abs=1e-6)
    assert by_teacher["zero"]["accuracy"] == 0.5
    assert by_teacher["zero"]["starc"] == 1
    assert 0 < by_teacher["noisy"]["starc"] < 2
    assert all(np.isfinite(row["regret"]) for row in result.rows)
    assert load_study(tmp_path / "study.json").rows == result.rows
    assert json.loads((tmp_path / "study.json").read_text())["table"][0]["teacher"] == "true"

    def refuse(*_):
        raise AssertionError("a finished cell was computed again")

    monkeypatch.setattr(study, "run_cell", refuse)
    assert run_study(TINY, tmp_path).rows == result.rows
    with pytest.raises(AssertionError, match="computed again"):
        run_study(replace(TINY, steps=31), tmp_path)  # another study does not take these cells
    figure = study_figure(result.rows, {"starc": "a", "error": "b"}, "title")
    figure.savefig(tmp_path / "study.png")


def test_every_seed_learns_from_its_own_rewards():
    dataset = load_dataset(DATASET)
    rewards = torch.stack([dataset.rewards, -dataset.rewards]).double()
    both = study.train_on_rewards(TINY, dataset, rewards, [3, 4])
    for k, seed in enumerate((3, 4)):
        alone = study.train_on_rewards(TINY, dataset, rewards[k : k + 1], [seed])
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close(both.state_dict()[name][k : k + 1], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_correlations_have_intervals():
    generator = np.random.default_rng(0)
    rows = [
        {
            "teacher": "oracle",
            "budget": 10,
            "seed": k,
            "accuracy": float(generator.random()),
            "starc": k / 30,
            "starc_low": None,
            "starc_high": None,
            "return": 0.0,
            "regret": k / 30 + 0.1 * float(generator.random()),
        }
        for k in range(30)
    ]
    rows.append({**rows[0], "teacher": "zero", "budget": 0, "starc": 1.0, "regret": -5.0})  # a baseline takes no part
    rows.append({**rows[0], "starc": None, "regret": -5.0})  # nor does a reward without a distance
    result = StudyResult(TINY, rows)
    starc, error = result.correlation("starc"), result.correlation("error")
    assert starc.value > 0.9
    assert starc.low <= starc.value <= starc.high
    assert error.low < 0 < error.high
    assert np.isnan(StudyResult(TINY, rows[:2]).correlation("starc").value)
    table = result.table()
    assert [row["teacher"] for row in table] == ["oracle", "zero"]
    assert table[0]["regret"] == pytest.approx(np.mean([row["regret"] for row in rows if row["teacher"] == "oracle"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": (1,)}, "2 labels or more"),
        ({"seeds": 0}, "seeds of the study"),
        ({"teachers": ("kind",)}, "unknown teacher"),
        ({"agent": "sarsa"}, "unknown agent"),
        ({"agent_settings": {"widths": 3}}, "widths"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)


def test_a_dataset_without_reference_returns_has_no_regret(tmp_path, monkeypatch):
    dataset = load_dataset(DATASET)
    bare = replace(dataset, spec=replace(dataset.spec, ref_min_score=None))
    monkeypatch.setattr(study, "load_dataset", lambda source: bare)
    with pytest.raises(DatasetError, match="no reference returns"):
        run_study(TINY, tmp_path)
