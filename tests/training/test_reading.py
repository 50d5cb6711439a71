"""How a dataset is read goes with it: trained on, resumed, judged and swept in the same way; missing values, and what training says of its data."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rlkit2
from rlkit2.cli.main import main
from rlkit2.data import DatasetWarning, audit, dataset_from_arrays, read_dataset
from rlkit2.data.audit.glance import glance
from rlkit2.data.audit.scan import reward_outliers
from rlkit2.data.reading import ReadingOptions
from rlkit2.errors import ConfigError, DatasetError
from rlkit2.files import write_json
from rlkit2.sweeps.experiment import load_sweep
from rlkit2.sweeps.worker import train_experiment
from rlkit2.training import load_recipe

COLUMNS = ["observations=x_*", "actions=order", "rewards=earned", "episodes=day"]
FLAGS = ["--columns", *COLUMNS, "--action-space", "box(-5,5)", "--fill-missing", "previous"]
READING: dict[str, Any] = {"columns": COLUMNS, "action_space": "box(-5,5)", "fill_missing": "previous"}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A table that nothing can be read from without being told, with two missing values."""
    draw = np.random.default_rng(0)
    path = tmp_path / "log.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["day", "x_1", "x_2", "order", "earned"])
        for row in range(60):
            seen = draw.normal(size=2).round(3).tolist()
            table.writerow([row // 10, "" if row in (3, 10) else seen[0], seen[1], round(3 * seen[1] % 5, 3), seen[0]])
    return path


def run(arguments: list[str]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DatasetWarning)
        return main(arguments)


def test_train_resume_and_judge_read_in_the_same_way(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["--eval-every", "0", "--batch-size", "8", "--hidden-sizes", "8"]
    assert (
        run(["train", "iql", "--dataset", str(log), *FLAGS, "--steps", "4", "--out", str(tmp_path / "runs"), *how]) == 0
    )
    (folder,) = (tmp_path / "runs").iterdir()
    done = rlkit2.load_run(folder)
    assert done.manifest["reading"] == READING
    assert ReadingOptions(**done.config["reading"]).given == {**READING, "columns": tuple(COLUMNS)}
    assert run(["train", "--resume", str(folder), "--steps", "6"]) == 0
    assert rlkit2.load_run(folder).manifest["step"] == 6
    assert run(["train", "--resume", str(folder), "--steps", "8", "--fill-missing", "mean"]) == 2  # other content
    capsys.readouterr()
    assert run(["evaluate", str(folder), "--offline", "--methods", "fqe", "--steps", "5", "--members", "3"]) == 0
    assert "discounted return" in capsys.readouterr().out
    assert run(["evaluate", str(folder), *FLAGS[-2:]]) == 2
    assert "only --offline takes this; leave --fill-missing out" in capsys.readouterr().err


def test_files_that_ask_for_it(log: Path, tmp_path: Path) -> None:
    """Recipes and sweeps; a sweep without the section has the folders it had."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'agent = "bc"\ndataset = "{log}"\n[reading]\naction_space = "box(-5,5)"\nfill_missing = "previous"\n'
    )
    assert load_recipe(recipe).reading == {"action_space": "box(-5,5)", "fill_missing": "previous"}
    recipe.write_text(f'agent = "bc"\ndataset = "{log}"\n[reading]\nfill_missing = "zero"\n')
    with pytest.raises(ConfigError, match="fill_missing must be one of previous, mean or none, not 'zero'"):
        load_recipe(recipe)
    base = f'[base]\nagent = "bc"\ndataset = "{log}"\n[base.training]\nsteps = 2\neval_every = 0\nbatch_size = 4\n'
    sweep = tmp_path / "sweep.toml"
    sweep.write_text('[base]\nagent = "bc"\ndataset = "builtin/rooms"\n')
    assert load_sweep(sweep).experiments[0].folder == "bc-2558b8e6"
    sweep.write_text(base + f'[base.reading]\ncolumns = {COLUMNS}\naction_space = "box(-5,5)"\nfill_missing = "mean"\n')
    (experiment,) = load_sweep(sweep).experiments
    folder = tmp_path / "one"
    folder.mkdir()
    settings = {**vars(experiment), "device": "cpu", "trust_env": False}
    write_json(folder / "experiment.json", settings)
    with pytest.warns(DatasetWarning, match="2 missing observations were filled"):
        assert train_experiment(folder) == "finished"


def test_what_lies_outside_a_given_space_is_refused(log: Path) -> None:
    arguments = ReadingOptions(columns=tuple(COLUMNS), fill_missing="mean").arguments()
    with pytest.raises(DatasetError, match="action values lie outside the given space Box"):
        read_dataset(log, **{**arguments, "action_space": "box(-1,1)"})
    with pytest.raises(DatasetError, match="observation values lie outside the given space Box"):
        read_dataset(log, **{**arguments, "observation_space": "box(-0.5,0.5)"})
    kept = read_dataset(log, **{**arguments, "observation_space": "box(-9,9)", "action_space": "box(-9,9)"})
    assert kept.spec.observation_space.high.tolist() == [9, 9]
    with pytest.raises(ConfigError, match="this dataset has its own"):
        rlkit2.load_dataset(kept, max_episode_steps=3)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("how", ["previous", "mean"])
def test_missing_values_become_what_was_asked(how: str, seed: int) -> None:
    """Against a loop over every value; nothing else changes, and what follows a filled value is the filled one."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 9, 6)
    total = int(lengths.sum())
    true = draw.normal(size=(total, 3)).astype(np.float32)
    holes = true.copy()
    holes[draw.random(true.shape) < 0.3] = np.nan
    holes[0] = np.where(np.arange(3) == seed % 3, np.nan, true[0])
    holes[-1] = true[-1]
    ends = np.isin(np.arange(total), np.cumsum(lengths) - 1)
    following = np.concatenate([holes[1:], holes[:1]])
    following[ends] = 7.0
    arrays = {
        "observations": holes,
        "next_observations": following,
        "actions": draw.normal(size=(total, 1)),
        "rewards": np.zeros(total),
        "terminals": ends,
    }
    found = read_dataset(arrays, action_space="box(-9,9)", fill_missing=how)
    starts = np.cumsum(lengths) - lengths
    seen = np.concatenate(
        [np.vstack([holes[a : a + n], np.full((1, 3), 7.0)]) for a, n in zip(starts, lengths, strict=True)]
    )
    means = np.nanmean(seen.astype(np.float64), axis=0)
    expected = holes.copy()
    for row in range(total):
        for column in range(3):
            if np.isnan(expected[row, column]):
                first = row in starts
                expected[row, column] = means[column] if first or how == "mean" else expected[row - 1, column]
    np.testing.assert_allclose(found.observations.numpy(), expected, rtol=1e-6)
    inside = ~torch.from_numpy(ends[:-1])
    assert torch.equal(found.next_observations[:-1][inside], found.observations[1:][inside])
    assert (found.next_observations[torch.from_numpy(ends)] == 7.0).all()
    assert found.spec.notes["missing_values_filled"] == int(np.isnan(holes).sum())


def test_a_column_without_any_value_cannot_be_filled() -> None:
    arrays = {
        "observations": np.full((5, 2), np.nan),
        "actions": np.zeros((5, 1)),
        "rewards": np.zeros(5),
        "timeouts": np.arange(5) == 4,
    }
    with pytest.raises(DatasetError, match="observation column 0 has no value at all"):
        read_dataset(arrays, fill_missing="mean")


# What training says


def data(**changed: Any) -> Any:
    draw = np.random.default_rng(0)
    fields: dict[str, Any] = {
        "observations": draw.normal(size=(200, 3)).astype(np.float32),
        "actions": draw.uniform(-1, 1, (200, 1)).astype(np.float32),
        "rewards": draw.normal(size=200).astype(np.float32),
        "next_observations": draw.normal(size=(200, 3)).astype(np.float32),
        "terminations": np.arange(200) % 20 == 19,
        "truncations": np.zeros(200, bool),
    }
    for name, (rows, value) in changed.items():
        fields[name][rows] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DatasetWarning)
        return dataset_from_arrays(**fields)


@pytest.mark.parametrize(
    ("changed", "code", "line"),
    [
        ({"observations": ((slice(3, 5), 1), np.nan)}, "non_finite_observations", "2 values are NaN or infinite"),
        ({"observations": ((slice(None), 2), 5.0)}, "constant_observations", "observation column 2 never changes"),
        ({"rewards": (7, -1e6)}, "reward_outliers", "1 rewards lie far from all others, up to -1e+06"),
    ],
)
def test_the_audit_and_the_training_say_it(changed: dict[str, Any], code: str, line: str, tmp_path: Path) -> None:
    dataset = data(**changed)
    assert code in [finding.code for finding in audit(dataset).findings]
    said = glance(dataset)
    assert said is not None
    assert line in said
    assert "\n" not in said
    with pytest.warns(DatasetWarning, match="see rlkit2 data check"):
        done = rlkit2.train("bc", dataset, steps=1, batch_size=4, eval_every=0, out=tmp_path, progress=False)
    assert done.manifest["warnings"] == [said]


def test_nothing_is_said_of_ordinary_data() -> None:
    assert glance(data()) is None
    assert not any(finding.code == "reward_outliers" for finding in audit(data()).findings)


@pytest.mark.parametrize("seed", range(30))
def test_outliers_are_few_and_far(seed: int) -> None:
    """Rewards of any usual kind have none; one that is a hundred times the largest is found, wherever it stands."""
    draw = np.random.default_rng(seed)
    count = int(draw.integers(40, 2000))
    usual = [
        draw.normal(size=count) * 10.0 ** draw.integers(-3, 4),
        (draw.random(count) < draw.uniform(0.001, 0.5)).astype(float),
        -np.ones(count) + 100.0 * (draw.random(count) < 0.01),
        draw.laplace(size=count),
        np.full(count, 3.0),
        np.where(draw.random(count) < 0.005, -100.0, draw.normal(size=count) * 3),
    ][seed % 6]
    assert not len(reward_outliers(usual)), usual
    row = int(draw.integers(count))
    wild = usual.copy()
    wild[row] = 100.0 * (np.abs(usual).max() + 1) * draw.choice([-1, 1])
    found = reward_outliers(wild)
    assert found.tolist() == ([row] if seed % 6 != 4 else [])
