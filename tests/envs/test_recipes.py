"""Recipes, behaviours and the datasets that are built from them."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

import rlkit2
from rlkit2.cli import data_text as text
from rlkit2.data import audit, read_dataset
from rlkit2.data.folders import remove_leftovers
from rlkit2.envs.behaviors import make_behavior
from rlkit2.envs.builtin import DEFAULTS, build_recipe, builtin_id, builtin_recipes, ensure_builtin, list_builtin
from rlkit2.envs.recipe import read_recipe
from rlkit2.envs.rollouts import rollout
from rlkit2.errors import ConfigError, CorruptDatasetError, DatasetError, DatasetNotFoundError, MissingExtraError
from tests import warm
from tests.built import give_built

FAST = {name: file for name, file in builtin_recipes().items() if "pointmaze" not in name}
SIMULATED = {name: file for name, file in builtin_recipes().items() if "pointmaze" in name}
RECIPE = """
id = "mine/rooms/tiny-v0"
description = "a few steps"
seed = 3
[environment]
id = "rlkit2/Rooms-v0"
[evaluation]
start = [0.1, 0.1, 0.2, 0.2]
[[behaviors]]
policy = "random"
options = { hold = 4.0 }
episodes = 5
max_steps = 7
[[behaviors]]
policy = "rooms"
noise = 0.3
epsilon = 0.1
episodes = 100
max_steps = 20
kwargs = { start = [0.1, 0.1, 1.0, 1.0] }
[reference]
episodes = 40
expert = { policy = "rooms" }
"""


def write(path: Path, text: str = RECIPE) -> Path:
    """A recipe file."""
    path.write_text(text)
    return path


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_there_is_a_dataset_of_every_family_and_kind() -> None:
    ids = list(builtin_recipes())
    for reward in ("sparse", "dense"):
        for kind in ("random", "medium", "expert", "mixed", "explore", "stitch"):
            assert f"builtin/rooms/{kind}-{reward}-v0" in ids
    for family, default in DEFAULTS.items():
        assert builtin_id(f"builtin/{family}") == f"builtin/{family}/{default}"
        assert builtin_id(f"builtin/{family}/") in ids
    assert {name.split("/")[1] for name in ids} == set(DEFAULTS)
    assert dict(list_builtin()).keys() == set(ids)


@pytest.mark.parametrize("name", builtin_recipes())
def test_recipes_are_whole_and_have_a_card(name: str) -> None:
    file = builtin_recipes()[name]
    recipe = read_recipe(file)
    assert recipe.id == name
    assert recipe.reference.episodes >= 50
    card = (file.parent / "README.md").read_text()
    assert card.startswith(f"# {name}\n")
    assert f"$ rlkit2 data info {name} --markdown" in card
    assert "standard error" in card


def check_built(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A built-in dataset is sound, has reference returns with errors, and is what its card says."""
    give_built(name)
    dataset = rlkit2.load_dataset(name)
    report = audit(dataset)
    assert report.ok, report.findings
    assert report.environment["can_be_built"]
    assert report.environment["spaces_match"]
    assert {finding.code for finding in report.findings} <= {
        "constant_observations",  # the goal of the gridworld is never the start of a step
        "duplicate_episodes",
        "constant_rewards",
        "evaluation_environment_differs",
    }, report.findings
    stored = ensure_builtin(name)
    scores = stored.storage.metadata["reference_scores"]
    assert scores["random"]["mean"] == dataset.spec.ref_min_score
    assert scores["expert"]["mean"] == dataset.spec.ref_max_score
    difference = scores["expert"]["mean"] - scores["random"]["mean"]
    assert difference > 10 * np.hypot(scores["random"]["standard_error"], scores["expert"]["standard_error"])
    text.print_card(text.describe(dataset, name))
    assert capsys.readouterr().out == (builtin_recipes()[name].parent / "README.md").read_text()


@pytest.mark.parametrize(
    "name",
    [
        "builtin/gridworld/mixed-v0",
        "builtin/rooms/random-dense-v0",
        "builtin/cartpole/random-v0",
    ],
)
def test_built_datasets_are_sound_and_as_their_cards_say(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_built(name, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_all_built_datasets_are_sound_and_as_their_cards_say(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_built(name, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIMULATED)
def test_the_mazes_are_sound_and_as_their_cards_say(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gymnasium_robotics")
    check_built(name, capsys)


def test_no_episode_of_the_stitching_mixture_shows_the_way() -> None:
    recipe = read_recipe(builtin_recipes()["builtin/rooms/stitch-sparse-v0"])
    give_built("builtin/rooms")
    dataset = rlkit2.load_dataset("builtin/rooms")
    assert dataset.spec.id == recipe.id
    low, high = torch.tensor(recipe.evaluation["start"]).reshape(2, 2)
    solved = 0
    for index in range(dataset.num_episodes):
        episode = dataset.episode(index)
        from_start = ((episode["observations"] >= low) & (episode["observations"] <= high)).all(1).any()
        reached = bool(episode["terminations"][-1])
        assert not (from_start and reached), f"episode {index} leads from the start to the goal"
        solved += reached
    assert solved > 50  # but the parts of the way are there
    assert dataset.spec.ref_max_score == 1.0


def test_noisy_rooms_have_the_transitions_of_the_rooms(tmp_path: Path) -> None:
    files = {name: builtin_recipes()[f"builtin/{name}-v0"] for name in ("rooms/mixed-dense", "noisy-rooms/mixed")}
    rooms, noisy_rooms = (read_recipe(file) for file in files.values())
    assert (rooms.seed, rooms.behaviors, rooms.environment.kwargs) == (
        noisy_rooms.seed,
        noisy_rooms.behaviors,
        noisy_rooms.environment.kwargs,
    )
    datasets = []
    for index, name in enumerate(("RoomsDense", "NoisyRooms")):
        text = RECIPE.replace("rlkit2/Rooms-v0", f"rlkit2/{name}-v0").replace("tiny", f"tiny{index}")
        datasets.append(read_dataset(build_recipe(write(tmp_path / "tiny.toml", text))))
    plain, noisy = datasets
    for name in ("observations", "actions", "next_observations", "terminations", "truncations", "episode_starts"):
        assert torch.equal(getattr(plain, name), getattr(noisy, name)), name
    assert 0.05 < float((plain.rewards - noisy.rewards).std()) < 0.6


def test_the_same_recipe_gives_the_same_bytes(tmp_path: Path) -> None:
    recipe = write(tmp_path / "tiny.toml")
    first = build_recipe(recipe, root=tmp_path / "a")
    build_recipe(recipe, root=tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert len(digest(tmp_path / "a")) == 2
    write(recipe, RECIPE.replace("seed = 3", "seed = 4"))
    build_recipe(recipe, root=tmp_path / "c")
    assert digest(tmp_path / "a") != digest(tmp_path / "c")
    assert [episode.rewards.shape[0] for episode in first].count(7) >= 5


def test_episodes_replay_from_their_seeds(tmp_path: Path) -> None:
    dataset = build_recipe(write(tmp_path / "tiny.toml"), root=tmp_path)
    kwargs = {5: {}, 100: {"start": [0.1, 0.1, 1.0, 1.0]}}
    replayed = 0
    for episode, metadata in zip(dataset, dataset.storage.get_episode_metadata(range(40)), strict=False):
        for settings in kwargs.values():
            env = gymnasium.make("rlkit2/Rooms-v0", **settings)
            observation, _ = env.reset(seed=metadata["seed"])
            if not np.array_equal(observation, episode.observations[0]):
                continue
            replayed += 1
            for t, action in enumerate(episode.actions):
                observation, reward, terminated, *_ = env.step(action)
                np.testing.assert_array_equal(observation, episode.observations[t + 1])
                assert (reward, terminated) == (episode.rewards[t], episode.terminations[t])
    assert replayed == 40


def test_reference_returns_are_those_of_the_evaluation_environment(tmp_path: Path) -> None:
    dataset = build_recipe(write(tmp_path / "tiny.toml"), root=tmp_path)
    metadata = dataset.storage.metadata
    assert json.loads(metadata["eval_env_spec"])["kwargs"]["start"] == [0.1, 0.1, 0.2, 0.2]
    scores = metadata["reference_scores"]
    assert scores["expert"] == {
        "mean": 1.0,
        "standard_error": 0.0,
        "episodes": 40,
        "seed": 0,
        "policy": '{"policy": "rooms", "noise": 0.0, "epsilon": 0.0}',
    }
    spec = read_recipe(tmp_path / "tiny.toml").spec(start=[0.1, 0.1, 0.2, 0.2])
    env = gymnasium.make(spec)
    episodes = rollout(spec, lambda: make_behavior("random", env), episodes=40, seed=0)
    returns = np.array([episode.rewards.sum() for episode in episodes])
    assert scores["random"]["mean"] == returns.mean()
    assert scores["random"]["standard_error"] == pytest.approx(returns.std(ddof=1) / np.sqrt(40))


def test_progress_is_reported_to_the_end(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    build_recipe(write(tmp_path / "tiny.toml"), root=tmp_path, progress=lambda *call: calls.append(call))
    assert calls == [(n, 185) for n in range(1, 186)]


BUILD = """
import sys
from rlkit2.envs.builtin import build_recipe
print("ready", flush=True)
sys.stdin.readline()
build_recipe(sys.argv[1], root=sys.argv[2], progress=lambda done, total: print(done, flush=True))
"""


def start(recipe: Path, root: Path, count: int = 1) -> list[warm.Popen]:
    """Processes that build a recipe, all of them from the moment on at which the last one has imported everything."""
    command, pipe = [sys.executable, "-c", BUILD, str(recipe), str(root)], warm.PIPE
    processes = [warm.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) for _ in range(count)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return processes


def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    recipe = write(tmp_path / "tiny.toml")
    processes = start(recipe, tmp_path / "root", 2)
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["mine"]
    build_recipe(recipe, root=tmp_path / "alone")
    assert digest(tmp_path / "root") == digest(tmp_path / "alone")


def test_a_killed_build_leaves_no_dataset_and_the_next_one_works(tmp_path: Path) -> None:
    recipe, root = (
        write(tmp_path / "tiny.toml", RECIPE.replace("episodes = 100", "episodes = 20000")),
        tmp_path / "root",
    )
    (process,) = start(recipe, root)
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (left,) = root.iterdir()
    assert left.name.startswith(".building-")
    assert not (root / "mine").exists()
    old = time.time() - 2 * 86400
    os.utime(left, (old, old))
    build_recipe(write(recipe), root=root)
    assert [path.name for path in root.iterdir()] == ["mine"]


def test_only_old_leftovers_are_removed(tmp_path: Path) -> None:
    for name in (".building-old", ".building-new", "other"):
        (tmp_path / name).mkdir()
    old = time.time() - 2 * 86400
    for name in (".building-old", "other"):
        os.utime(tmp_path / name, (old, old))
    remove_leftovers(tmp_path, ".building-*")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".building-new", "other"]


def test_a_failing_build_leaves_nothing(tmp_path: Path) -> None:
    recipe = write(tmp_path / "tiny.toml", RECIPE.replace('"rooms"\nnoise', '"grid"\nnoise'))
    with pytest.raises(ConfigError, match="'grid' acts in GridRoomsEnv only"):
        build_recipe(recipe, root=tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == []


def test_what_is_there_is_not_overwritten_silently(tmp_path: Path) -> None:
    recipe, root = write(tmp_path / "tiny.toml"), tmp_path / "root"
    build_recipe(recipe, root=root)
    before = digest(root)
    write(recipe, RECIPE.replace("seed = 3", "seed = 5"))
    with pytest.raises(DatasetError, match=r"made from another recipe; build it anew with: rlkit2 data build --recipe"):
        build_recipe(recipe, root=root)
    assert digest(root) == before
    build_recipe(recipe, root=root, rebuild=True)
    assert digest(root) != before
    assert [path.name for path in root.iterdir()] == ["mine"]
    (root / "mine/rooms/tiny-v0/data/metadata.json").write_text("{")
    with pytest.raises(CorruptDatasetError, match="cannot be read"):
        build_recipe(recipe, root=root)


def test_a_dataset_that_no_recipe_made_is_not_taken_for_one(tmp_path: Path) -> None:
    dataset = read_dataset(build_recipe(write(tmp_path / "tiny.toml"), root=tmp_path / "root"))
    dataset.to_minari("mine/rooms/tiny-v0")
    with pytest.raises(DatasetError, match="that no recipe made"):
        build_recipe(tmp_path / "tiny.toml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('id = "rlkit2/Rooms-v0"', 'id = "rlkit2/Nothing-v0"', "environment.id"),
        ('id = "mine/rooms/tiny-v0"', 'id = "no version"', "id must have the form namespace/name-v0"),
        ('id = "mine/rooms/tiny-v0"', 'id = "builtin/rooms/tiny-v0"', "namespace of the built-in datasets"),
        ("seed = 3", "seed = 3.5", "seed must be a whole number, not 3.5"),
        ("seed = 3", "", "seed is missing"),
        ("epsilon = 0.1", "epsilon = 1.5", r"behaviors\[1\].epsilon must be at most 1"),
        ("episodes = 5", "episodes = 0", r"behaviors\[0\].episodes must be at least 1"),
        ("noise = 0.3", "noisy = 0.3", r"behaviors\[1\].noisy is unknown; fields: policy"),
        ('policy = "random"', 'policy = "magic"', "unknown policy 'magic'; policies: random"),
        ("hold = 4.0", "grip = 4.0", "has no option 'grip'; options: hold"),
        ("hold = 4.0", "hold = 0.5", "hold must be at least 1"),
        ("[reference]", "[references]", "reference is missing"),
        ('id = "rlkit2/Rooms-v0"', 'id = "rlkit2/Rooms-v0"\nextra = "gpu"', "extra must be one of"),
        ("[environment]", "[environment", "is not readable TOML"),
    ],
)
def test_wrong_recipes_name_the_field(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in RECIPE
    recipe = write(tmp_path / "tiny.toml", RECIPE.replace(old, new, 1))
    with pytest.raises(rlkit2.errors.RLKitError, match=message):
        build_recipe(recipe, root=tmp_path / "root")
    assert not (tmp_path / "root").exists() or not list((tmp_path / "root").iterdir())


def test_unknown_built_in_ids_name_the_close_ones() -> None:
    for name, close in (
        ("builtin/rooms/stich-sparse-v0", "builtin/rooms/stitch-sparse-v0"),
        ("builtin/room", "builtin/rooms"),
        ("builtin/pendulum/mixd-v0", "builtin/pendulum/mixed-v0"),
        ("builtin/zzz", "families: builtin/rooms"),
    ):
        with pytest.raises(DatasetNotFoundError, match=close):
            rlkit2.load_dataset(name)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'rlkit2\[robotics\]'"):
        rlkit2.load_dataset("builtin/pointmaze")


def returns(name: str, policy: str, episodes: int = 30, **mixed: float) -> np.ndarray:
    """Returns of a behaviour."""
    spec, env = gymnasium.spec(name), gymnasium.make(name)
    run = rollout(spec, lambda: make_behavior(policy, env, **mixed), episodes=episodes, seed=0)
    return np.array([episode.rewards.sum() for episode in run])


@pytest.mark.parametrize(
    ("name", "policy"),
    [("rlkit2/RoomsDense-v0", "rooms"), ("Pendulum-v1", "pendulum"), ("CartPole-v1", "cartpole")],
)
def test_more_noise_makes_behaviours_worse(name: str, policy: str) -> None:
    good, middling, bad = (returns(name, policy, epsilon=epsilon) for epsilon in (0.0, 0.5, 1.0))
    assert good.mean() > middling.mean() > bad.mean()
    random = returns(name, "random")  # the same policy from another stream of numbers
    assert abs(bad.mean() - random.mean()) < 4 * np.hypot(bad.std(), random.std()) / np.sqrt(30)


def test_the_grid_behaviour_is_optimal() -> None:
    spec, env = gymnasium.spec("rlkit2/GridRooms-v0"), gymnasium.make("rlkit2/GridRooms-v0")
    episodes = list(rollout(spec, lambda: make_behavior("grid", env), episodes=200, seed=0))
    discounted = np.array([0.95 ** (len(e.rewards) - 1) * e.rewards[-1] for e in episodes])
    from rlkit2.envs import four_rooms_tables
    from rlkit2.rewards import optimal_policy, policy_return

    tables = four_rooms_tables()
    process = tables.mdp(0.95)
    best = float(policy_return(optimal_policy(tables.rewards, process), tables.rewards, process))
    assert discounted.mean() == pytest.approx(best, abs=4 * discounted.std() / np.sqrt(200))


def test_behaviour_noise_needs_continuous_actions() -> None:
    with pytest.raises(ConfigError, match="use epsilon"):
        make_behavior("cartpole", gymnasium.make("CartPole-v1"), noise=0.1)
