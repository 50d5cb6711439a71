"""`rlkit2 starc` from the command line."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest

from rlkit2.cli.main import main
from rlkit2.preferences.reward_ensemble import RewardEnsemble
from rlkit2.rewards import TabularMDP
from rlkit2.rewards.sampled import estimator
from rlkit2.rewards.sampled.network_features import NetworkFeatures
from tests.reference import ROOT

REWARDS = """
import torch
def upright(observations, actions, next_observations, terminations):
    return next_observations[:, 0]
def shaped(observations, actions, next_observations, terminations):
    return 2 * upright(observations, actions, next_observations, terminations) + 0.99 * next_observations[:, 2] - observations[:, 2]
def still(observations, actions, next_observations, terminations):
    return -actions[:, 0] ** 2
def broken(observations, actions):
    return 1
def cells(states, actions, next_states):
    return (next_states == 15) - 0.01 * (actions == 0)
"""


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture
def recorded(tmp_path: Path) -> str:
    """A D4RL-style file of a damped pendulum pushed at random: 30 episodes of 60 steps."""
    rng, steps = np.random.default_rng(0), 30 * 60
    observations, actions = np.zeros((steps, 3)), rng.uniform(-1, 1, (steps, 1))
    for t in range(steps):
        if t % 60 == 0:
            angle, speed = rng.uniform(-3, 3), rng.uniform(-1, 1)
        observations[t] = np.cos(angle), np.sin(angle), speed
        speed = 0.8 * speed + 0.3 * np.sin(angle) + actions[t, 0] + 0.02 * rng.normal()
        angle += 0.1 * speed
    path = tmp_path / "pendulum.hdf5"
    with h5py.File(path, "w") as file:
        file["observations"], file["actions"] = observations.astype(np.float32), actions.astype(np.float32)
        file["rewards"] = (observations[:, 0] - 0.1 * observations[:, 2] ** 2).astype(np.float32)
        file["terminals"], file["timeouts"] = np.zeros(steps, bool), np.arange(1, steps + 1) % 60 == 0
    return str(path)


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["starc", *arguments, "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["starc", "--help"]) == 0
    assert "tabular" in capsys.readouterr().out
    assert main(["starc"]) == 2
    for command in ("tabular", "dataset", "study"):
        with pytest.raises(SystemExit) as stop:
            main(["starc", command, "--help"])
        assert stop.value.code == 0
        assert f"Example: rlkit2 starc {command}" in capsys.readouterr().out


def test_environment(capsys: pytest.CaptureFixture[str], tmp_path: Path, rewards: Path) -> None:
    assert main(["starc", "tabular", "--env", "FrozenLake-v1", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "shaped, ends forgotten" in out
    assert "at most 1 x 0.608" in out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"distances.json", "distances.csv", "heatmap.svg", "dendrogram.svg", "mds.svg"}
    found = run_json(capsys, "tabular", "--env", "FrozenLake-v1", "--reward", f"{rewards}:cells", "--discount", "0.9")
    assert found["names"] == ["environment", "cells"]
    assert 0 < np.array(found["values"])[0, 1] < 0.5
    found = run_json(
        capsys, "tabular", "--env", "FrozenLake-v1", "--norm", "range", "--distance", "range", "--true", "negated"
    )
    assert np.array(found["values"])[0, 5] == pytest.approx(2)
    assert found["regret"]["environment"]["worst_case_regret"] == pytest.approx(1)  # type: ignore[index]


def test_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    reference = np.load(ROOT / "starc_a00.npz")
    found = run_json(capsys, "tabular", str(ROOT / "starc_a00.npz"))
    assert found["names"] == reference["reward_names"].tolist()
    pairs = np.triu_indices(7, 1)
    val, two = reference["canon_names_x"].tolist().index("VAL"), reference["norm_names"].tolist().index("2")
    np.testing.assert_allclose(np.array(found["values"])[pairs], reference["x_dist"][val, two, two], atol=1e-8)
    mdp, own = TabularMDP.from_gym("FrozenLake-v1", 0.9)
    path = tmp_path / "lake.npz"
    np.savez(path, transitions=mdp.dense.numpy(), discount=0.9, mine=own, other=own[..., 0] + np.arange(4))
    assert run_json(capsys, "tabular", str(path))["names"] == ["mine", "other"]
    np.save(tmp_path / "third.npy", own)
    found = run_json(capsys, "tabular", str(path), "--reward", f"same={tmp_path / 'third.npy'}", "--discount", "0.5")
    assert found["names"] == ["mine", "other", "same"]
    assert found["settings"]["discount"] == 0.5  # type: ignore[index]
    assert np.array(found["values"])[0, 2] < 1e-12


def test_dataset(capsys: pytest.CaptureFixture[str], tmp_path: Path, rewards: Path, recorded: str) -> None:
    given = [f"--reward={rewards}:{name}" for name in ("upright", "shaped", "still")]
    settings = ["--features", "quadratic", "--bootstrap", "20"]
    out = tmp_path / "out"
    assert main(["starc", "dataset", recorded, *given, "--true", *settings, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "effective episodes" in text
    assert "invariance gap" in text
    found = json.loads((out / "distances.json").read_text())
    assert found["names"] == ["true", "upright", "shaped", "still"]
    values, ci = np.array(found["values"], float), np.array(found["ci"], float)
    assert values[1, 2] < 1e-6
    assert 0 < values[0, 1] < 2
    assert ci[0, 1, 0] <= values[0, 1] <= ci[0, 1, 1]
    assert (out / "heatmap.svg").stat().st_size > 1000
    again = run_json(capsys, "dataset", recorded, *given, "--true", *settings)
    assert again["values"] == found["values"]


def test_reward_ensembles_and_infos(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, rewards: Path, recorded: str
) -> None:
    """A model of two seeds is two rewards; a reward that reads infos is refused where the data have none, in one line."""
    model = RewardEnsemble(3, 1, hidden_sizes=(8,), seeds=2, members=2)
    model.save(tmp_path / "model")
    same = ["--features", "quadratic", "--bootstrap", "0"]
    found = run_json(capsys, "dataset", recorded, f"--reward=learned={tmp_path / 'model'}", "--true", *same)
    assert found["names"] == ["true", "learned seed 0", "learned seed 1"]
    (tmp_path / "info.py").write_text("def speed(obs, info):\n    return info['speed']\n")
    assert main(["starc", "dataset", recorded, f"--reward={tmp_path / 'info.py'}:speed", "--true"]) == 2
    assert "infos are read from such datasets alone" in capsys.readouterr().err


def test_simulator(capsys: pytest.CaptureFixture[str], tmp_path: Path, rewards: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def near(obs, act, next_obs):\n    return next_obs[:, 14] + next_obs[:, 15]\n"
        "def chance(infos):\n    return infos['prob']\n"
    )
    given = [f"--reward={tmp_path / 'own.py'}:{name}" for name in ("near", "chance")]
    settings = ["--episodes", "300", "--bootstrap", "20", "--discount", "0.9", "--seed", "3"]
    out = tmp_path / "out"
    assert main(["starc", "env", "FrozenLake-v1", *given, "--true", *settings, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "300 episodes" in text
    assert "one indicator per state" in text
    found = json.loads((out / "distances.json").read_text())
    assert found["names"] == ["true", "near", "chance"]
    assert found["diagnostics"]["episodes"] == 300
    again = run_json(
        capsys, "env", "FrozenLake-v1", *given, "--true", *settings, "--policy", "0.5=uniform", "--policy", "uniform"
    )
    assert again["values"] == found["values"]  # a mixture of uniform policies is the uniform policy


@pytest.mark.parametrize("steps", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_recorded_dataset(
    capsys: pytest.CaptureFixture[str],
    rewards: Path,
    real_datasets: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
) -> None:
    """Among the features that are tried are networks, here trained for fewer steps than usual."""
    monkeypatch.setattr(estimator, "NetworkFeatures", partial(NetworkFeatures, steps=steps))
    found = run_json(
        capsys, "dataset", "zoo/pendulum/mixed-v0", "--true", f"--reward={rewards}:still", "--bootstrap", "5"
    )
    assert 0.8 < np.array(found["values"])[0, 1] < 1.6
    assert found["diagnostics"]["transitions"] == 30_000  # type: ignore[index]


def test_study(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = str(tmp_path / "study")
    small = ["--mdps", "4", "--pairs", "2", "--steps", "4", "--states", "6", "--workers", "1", "--out", out]
    assert main(["starc", "study", *small, "--rows", "5"]) == 0
    assert "correlation with regret" in capsys.readouterr().out
    found = run_json(capsys, "study", *small)
    assert len(found["metrics"]) == 43  # type: ignore[arg-type]
    assert (tmp_path / "study" / "table.csv").read_text().startswith("metric,correlation")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "unknown command 'starc nowhere'"),
        (["tabul"], "did you mean tabular?"),
        (["tabular"], "give either a file or --env"),
        (["tabular", "missing.npz"], "missing.npz is not an .npz file of plain arrays"),
        (["tabular", "--env", "Nowhere-v9"], "environment Nowhere-v9 cannot be built"),
        (["tabular", "--env", "FrozenLake-v1", "--true", "mine"], "'mine' is not one of the rewards: environment"),
        (["tabular", "--env", "FrozenLake-v1", "--discount", "1"], "discount is 1.0"),
        (["dataset", "builtin/pendulum", "--true"], "a distance needs two rewards, not 1"),
        (["dataset", "builtin/pendulum", "--true", "--reward", "none.py:f"], "none.py cannot be read"),
        (["dataset", "{recorded}", "--true", "--reward", "{rewards}:broken"], "broken has shape []"),
        (
            ["dataset", "builtin/pendulum", "--reward", "{rewards}:still", "--reward", "{rewards}:still"],
            "two rewards are called 'still'",
        ),
        (["dataset", "builtin/pendulum", "--norm", "l1"], "choose 'l2', or 'l1' with estimator='plugin'"),
        (["study", "--states", "1"], "2 states"),
    ],
)
def test_bad_input(
    capsys: pytest.CaptureFixture[str], rewards: Path, recorded: str, arguments: list[str], message: str
) -> None:
    assert (
        main(["starc", *(a.replace("{rewards}", str(rewards)).replace("{recorded}", recorded) for a in arguments)]) == 2
    )
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
