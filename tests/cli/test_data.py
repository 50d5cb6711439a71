"""`rlkit2 data ...` as a user types it: what it prints, what it leaves behind, and one clear line for everything that is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import h5py
import minari
import numpy as np
import pytest
import torch

from rlkit2 import load_dataset
from rlkit2.cli.data_text import BAR, HEIGHT, histogram
from rlkit2.cli.main import main
from rlkit2.data import read_dataset
from rlkit2.data.audit.findings import Distribution
from tests import warm
from tests.data.make import FAMILIES, Ending, make_minari

ENDINGS = [Ending(3, True, False), Ending(5, False, True), Ending(2, True, False)]
RECIPE = """
id = "mine/rooms/tiny-v0"
description = "a few steps"
seed = 3
[environment]
id = "rlkit2/Rooms-v0"
[[behaviors]]
policy = "random"
episodes = 4
max_steps = 7
[reference]
episodes = 3
expert = { policy = "rooms" }
"""


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `rlkit2 data ...`."""
    capsys.readouterr()
    status = main(["data", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What `rlkit2 data ... --json` printed."""
    status, out, _ = run(capsys, *arguments, "--json")
    assert status in (0, 1)
    return json.loads(out)


def test_list_names_built_in_and_local_datasets(capsys: pytest.CaptureFixture[str]) -> None:
    make_minari(ENDINGS, *FAMILIES["box32"], dataset_id="test/hopper/medium-v0")
    status, out, _ = run(capsys, "list")
    assert status == 0
    assert "builtin/rooms/stitch-sparse-v0" in out
    assert "test/hopper/medium-v0" in out
    found = {row["id"]: row for row in run_json(capsys, "list")["datasets"]}
    assert found["test/hopper/medium-v0"]["steps"] == 10
    assert not found["builtin/cartpole/mixed-v0"]["present"]


def test_info_tells_what_is_inside(capsys: pytest.CaptureFixture[str]) -> None:
    made = make_minari(ENDINGS, *FAMILIES["goal"], ref_min_score=1.0)
    found = run_json(capsys, "info", made.spec.dataset_id)
    assert (found["transitions"], found["episodes"], found["terminated"], found["truncated"]) == (10, 3, 2, 1)
    assert found["observation_ranges"] == {"observation": [0, 2], "desired_goal": [2, 4]}
    assert found["content_hash"] == read_dataset(made).spec.content_hash
    status, out, _ = run(capsys, "info", made.spec.dataset_id, "--markdown")
    assert status == 0
    assert out.startswith(f"# {made.spec.dataset_id}\n")
    assert "| transitions | 10 in 3 episodes, 0.0 MB |" in out
    status, out, _ = run(capsys, "info", made.spec.dataset_id, "--observation-keys", "achieved_goal")
    assert status == 0
    assert "achieved_goal 0..1" in out
    assert "no reference returns" in out


def test_check_exits_with_1_on_errors_and_0_with_warnings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    made = make_minari(ENDINGS * 2, *FAMILIES["box32"])
    figure = tmp_path / "plots.png"
    status, out, _ = run(capsys, "check", made.spec.dataset_id, "--figure", str(figure))
    assert status == 0
    assert "no errors" in out
    assert "\u2588" in out
    assert figure.read_bytes()[:4] == b"\x89PNG"
    with h5py.File(Path(made.storage.data_path) / "main_data.hdf5", "a") as file:
        file["episode_1"]["rewards"][2] = np.nan
    status, out, _ = run(capsys, "check", made.spec.dataset_id)
    assert status == 1
    assert "error non_finite_rewards" in out
    assert "episode 1, step 2" in out
    report = run_json(capsys, "check", made.spec.dataset_id)
    assert report["ok"] is False
    assert [f["where"][0] for f in report["findings"] if f["code"] == "non_finite_rewards"] == [
        {"episode": 1, "step": 2}
    ]


def test_a_histogram_shows_every_bin_that_is_not_empty() -> None:
    values = np.concatenate([np.zeros(1000), np.linspace(0, 1, 3)])
    lines = list(histogram("return", Distribution.of(values)))  # type: ignore[arg-type]
    assert len(lines) == HEIGHT + 2
    bottom = lines[HEIGHT][2:]
    assert len(bottom) == 20 * BAR
    shown = [index // BAR for index, character in enumerate(bottom) if character != " "]
    assert sorted(set(shown)) == [0, 10, 19]
    assert "highest bar: 1,001" in lines[-1]


def test_build_makes_built_in_datasets_and_those_of_recipes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE)
    status, out, _ = run(capsys, "build", "--recipe", str(recipe))
    assert status == 0
    assert "mine/rooms/tiny-v0: 28 steps in 4 episodes" in out
    assert len(load_dataset("mine/rooms/tiny-v0")) == 28
    assert len(minari.load_dataset("mine/rooms/tiny-v0")) == 4
    recipe.write_text(RECIPE.replace("max_steps = 7", "max_steps = 8"))
    status, _, err = run(capsys, "build", "--recipe", str(recipe))
    assert status == 2
    assert "made from another recipe" in err
    assert run(capsys, "build", "--recipe", str(recipe), "--rebuild")[0] == 0
    assert len(load_dataset("mine/rooms/tiny-v0")) == 32
    status, out, _ = run(capsys, "build", "builtin/rooms/random-dense-v0")
    assert status == 0
    assert "builtin/rooms/random-dense-v0" in out


def test_import_makes_a_minari_dataset_of_a_d4rl_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "pendulum.hdf5"
    with h5py.File(path, "w") as file:
        file["observations"] = rng.normal(size=(40, 3))
        file["actions"] = rng.uniform(-2, 2, (40, 1)).astype(np.float32)
        file["rewards"] = rng.normal(size=40)
        file["terminals"] = np.zeros(40, bool)
        file["timeouts"] = np.arange(40) % 20 == 19
    scores = ("--ref-min-score=-1200", "--ref-max-score=-150")
    status, out, err = run(capsys, "import", str(path), "mine/pendulum/d4rl-v0", "--env", "Pendulum-v1", *scores)
    assert status == 0, err
    assert "2 last steps were left out" in out
    dataset = load_dataset("mine/pendulum/d4rl-v0")
    assert len(dataset) == 38
    assert torch.equal(dataset.observations, read_dataset(path).observations)
    assert torch.equal(dataset.rewards, read_dataset(path).rewards)
    assert dataset.spec.action_space.high.tolist() == [2.0]
    assert (dataset.spec.ref_min_score, dataset.spec.ref_max_score) == (-1200, -150)
    assert dataset.spec.env_spec is not None
    status, out, _ = run(capsys, "import", str(path), "mine/pendulum/plain-v0", "--format", "arrow")
    assert status == 0
    assert "no --env" in out
    assert torch.equal(load_dataset("mine/pendulum/plain-v0").actions, dataset.actions)
    status, _, err = run(capsys, "import", str(path), "mine/pendulum/plain-v0")
    assert status == 2
    assert "exists" in err


REWARDS = """
import numpy as np
def last(observations, actions, next_observations, terminations):
    return next_observations[:, -1] - 2.0 * terminations
def wide(observations, actions, next_observations, terminations):
    return observations
def broken(observations):
    return 0
not_a_function = 3
"""


@pytest.mark.parametrize("family", ["goal", "discrete action", "box64"])
def test_relabel_changes_the_rewards_and_nothing_else(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, family: str
) -> None:
    made = make_minari(ENDINGS, *FAMILIES[family])
    (tmp_path / "rewards.py").write_text(REWARDS)
    reward = f"{tmp_path}/rewards.py:last"
    status, _, err = run(capsys, "relabel", made.spec.dataset_id, "mine/new-v0", "--reward", reward)
    assert status == 0, err
    old, new = read_dataset(made), load_dataset("mine/new-v0")
    for name in ("observations", "actions", "next_observations", "terminations", "truncations", "episode_starts"):
        assert torch.equal(getattr(old, name), getattr(new, name)), name
    assert torch.equal(new.rewards, old.next_observations[:, -1] - 2.0 * old.terminations)
    assert new.spec.observation_ranges == old.spec.observation_ranges
    provenance = run_json(capsys, "info", "mine/new-v0")["provenance"]
    assert provenance["relabelled_from"] == made.spec.dataset_id
    assert provenance["content_hash"] == old.spec.content_hash
    assert provenance["reward"] == reward
    np.save(tmp_path / "rewards.npy", np.arange(10.0))
    np.savez(tmp_path / "rewards.npz", rewards=np.arange(10.0), other=np.zeros(2))
    for index, name in enumerate(("rewards.npy", "rewards.npz")):
        status, _, err = run(
            capsys, "relabel", made.spec.dataset_id, f"mine/saved{index}-v0", "--reward", str(tmp_path / name)
        )
        assert status == 0, err
        assert load_dataset(f"mine/saved{index}-v0").rewards.tolist() == list(range(10))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("rewards.py:wide", "reward wide has shape [10, 2] for 10 transitions"),
        ("rewards.py:broken", "reward broken has shape []"),
        ("rewards.py:missing", "has no function 'missing'; it has last, wide, broken"),
        ("rewards.py", "names no function"),
        ("nothing.py:f", "cannot be read (No such file"),
        ("short.npy", "has shape [3] for 10 transitions"),
        ("nan.npy", "is nan at row 4"),
        ("objects.npy", "cannot be read (Object arrays"),
        ("bad.npz", "cannot be read"),
        ("syntax.py:f", "fails: SyntaxError"),
        ("rewards.txt", "must be file.py:FUNCTION or a file of type"),
    ],
)
def test_bad_rewards_are_one_line_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, reward: str, message: str
) -> None:
    made = make_minari(ENDINGS, *FAMILIES["box32"])
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "syntax.py").write_text("def f(")
    (tmp_path / "rewards.txt").write_text("1 2 3")
    (tmp_path / "bad.npz").write_bytes(b"PK")
    np.save(tmp_path / "short.npy", np.zeros(3))
    np.save(tmp_path / "nan.npy", np.where(np.arange(10) == 4, np.nan, 0.0))
    np.save(tmp_path / "objects.npy", np.array([{}] * 10))
    status, out, err = run(capsys, "relabel", made.spec.dataset_id, "mine/new-v0", "--reward", f"{tmp_path}/{reward}")
    assert (status, out) == (2, "")
    assert err.startswith("rlkit2: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "minari" / "mine").exists()


def bad_minari(what: str) -> str:
    """A damaged Minari dataset; its id."""
    made = make_minari(ENDINGS, *FAMILIES["box32"])
    file = Path(made.storage.data_path) / "main_data.hdf5"
    metadata = file.with_name("metadata.json")
    if what == "truncated":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        return str(made.spec.dataset_id)
    with h5py.File(file, "a") as opened:
        if what == "missing array":
            del opened["episode_1"]["rewards"]
        elif what == "wrong lengths":
            del opened["episode_1"]["rewards"]
            opened["episode_1"]["rewards"] = np.zeros(3)
        elif what == "mixed shapes":
            del opened["episode_1"]["observations"]
            opened["episode_1"]["observations"] = np.zeros((6, 3), np.float32)
        elif what == "zero episodes":
            for name in list(opened):
                del opened[name]
            metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"total_episodes": 0, "total_steps": 0}))
    return str(made.spec.dataset_id)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", "truncated or damaged"),
        ("missing array", "episode 1 lacks an array"),
        ("wrong lengths", "episode 1 has 5 actions, 3 rewards"),
        ("mixed shapes", "episode 1: observations or actions do not fit the spaces"),
        ("zero episodes", "no usable episode"),
        ("unknown id", "no dataset 'test/unknown-v0' in"),
        ("no network", "there is no network to download it"),
        ("unknown built-in", "no built-in dataset 'builtin/room'; close ids: builtin/rooms"),
        ("a folder", "is a folder but not a dataset"),
        ("no file", "does not exist"),
    ],
)
@pytest.mark.parametrize("command", ["info", "check"])
def test_bad_input_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, what: str, message: str
) -> None:
    sources = {
        "unknown id": "test/unknown-v0",
        "no network": "test/unknown-v0",
        "unknown built-in": "builtin/room",
        "a folder": str(tmp_path),
        "no file": str(tmp_path / "none.hdf5"),
    }
    source = sources.get(what) or bad_minari(what)
    status, out, err = run(capsys, command, source)
    assert (status, out) == (2, "")
    assert err.startswith("rlkit2: ")
    assert err.count("\n") == 1
    assert message in err
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_no_permission_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_minari(ENDINGS, *FAMILIES["box32"])
    path = tmp_path / "file.hdf5"
    path.write_bytes(b"")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(h5py, "File", refuse)  # root may read everything
    for source in (made.spec.dataset_id, str(path)):
        status, _, err = run(capsys, "info", source)
        assert status == 2
        assert "permission denied" in err
        assert err.count("\n") == 1


def test_a_root_that_cannot_be_written_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RLKIT2_DATA", str(tmp_path / "file"))
    status, _, err = run(capsys, "build", "builtin/rooms")
    assert status == 2
    assert err.startswith("rlkit2: cannot write")
    assert "set RLKIT2_DATA to a folder that can be written" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("checks",), "did you mean check?"),
        (("build",), "name built-in datasets, or give --recipe FILE"),
        (("build", "builtin/rooms", "--all"), "name built-in datasets, or give --recipe FILE"),
        (("build", "--recipe", "none.toml"), "none.toml does not exist"),
        (("import", "none.hdf5", "a/b-v0"), "none.hdf5 does not exist"),
        (("import", "none.hdf5", "a/b-v0", "--env", "Nothing-v0"), "Nothing-v0"),
    ],
)
def test_wrong_commands_say_what_to_do(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_help_of_every_command_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0
    names = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert names == ["list", "info", "check", "build", "import", "relabel", "cache"]
    for name in names:
        with pytest.raises(SystemExit) as stopped:
            main(["data", name, "--help"])
        assert stopped.value.code == 0
        assert f"Example: rlkit2 data {name}" in capsys.readouterr().out


def test_a_text_entry_is_one_line_of_warning(tmp_path: Path) -> None:
    from gymnasium import spaces

    space = spaces.Dict({"position": FAMILIES["box32"][0], "mission": spaces.Text(20)})
    from minari.data_collector import EpisodeBuffer

    from tests.data.make import create

    buffer = EpisodeBuffer(
        id=0,
        observations={"position": np.zeros((4, 2), np.float32), "mission": ["go"] * 4},
        actions=np.zeros((3, 2), np.float32),
        rewards=np.zeros(3),
        terminations=np.array([False, False, True]),
        truncations=np.zeros(3, bool),
    )
    made = create([buffer], space, FAMILIES["box32"][1])
    result = warm.run([sys.executable, "-m", "rlkit2.cli.main", "data", "info", made.spec.dataset_id])
    assert result.stderr == "rlkit2: text entry 'mission' is left out of the observations\n"
    assert "position 0..1" in result.stdout
