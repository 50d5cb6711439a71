"""The examples of `--help`, typed as they stand where the runs that they name are, with smaller numbers where they have large ones."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from glob import glob
from pathlib import Path

import pytest

import rlkit2
from rlkit2.cli.main import main
from tests.built import give_built
from tests.cli.test_output import EXAMPLES

RUNS = {  # agent and dataset of the runs that examples name -> options
    ("bc", "builtin/pendulum"): {},
    ("iql", "builtin/pendulum"): {},
    ("td3bc", "builtin/pendulum"): {},
    ("odice", "builtin/rooms"): {},
    ("bc", "builtin/rooms"): {},
    ("iql", "builtin/noisy-rooms"): {"critic": "ggd", "num_critics": 2},
}
SMALLER = {
    "--episodes 100": "--episodes 1",
    "--offline": "--offline --methods own --steps 2",
    "--count 500": "--count 12",
    "--seeds 4": "--seeds 1 --steps 2",
    "policy.onnx": "policy.safetensors",
    "runs/iql-* runs/td3bc-*": "runs/iql-builtin-pendulum-* runs/td3bc-* --methods own --by own --steps 2",
    "--true --policy uniform": "--true --policy uniform --episodes 8 --bootstrap 2",
    "rewards.py:still --true": "rewards.py:still --true --bootstrap 2",
    "--relabel-as my/rooms/learned-v0": "--relabel-as my/rooms/learned-v0 --steps 2 --hidden-sizes 4 --members 2 --no-starc",
    "uncertainty runs/iql-builtin-noisy-rooms-explore-v0-001": "uncertainty runs/iql-builtin-noisy-rooms-explore-v0-001 --max-transitions 200",
    "sweep.toml --jobs 2": "sweep.toml --jobs 2 --dry-run",
    "--seeds 3 --steps 20000": "--seeds 3 --steps 20000 --dry-run",
}
ELSEWHERE = {  # why an example is not typed here
    "data import": "needs a file of another library; docs/data.md types it",
    "data cache": "would clean the cache that the other examples use; tests/data/test_cache.py",
    "entangle model": "needs a language model; docs/entanglement.md types it",
    "entangle rank": "needs a language model; docs/entanglement.md types it",
    "entangle toy": "minutes; tests/cli/test_entangle.py does it smaller",
    "starc study": "hours; docs/starc.md types it smaller",
    "prefs study": "minutes; docs/preferences.md types it smaller",
    "demo": "tests/studies does it smaller",
    "push": "needs a hub; tests/deploy/test_hub.py",
    "pull": "needs a hub; tests/deploy/test_hub.py",
}
REWARDS = """
def distance(observations, actions, next_observations, terminations):
    return -((next_observations - 0.35) ** 2).sum(1)


def upright(observations, actions, next_observations, terminations):
    return next_observations[:, 0]


def still(observations, actions, next_observations, terminations):
    return -(actions[:, 0] ** 2)
"""
SWEEP = '[base]\nagent = "bc"\ndataset = "builtin/pendulum"\n[grid]\n"config.learning_rate" = [1e-3, 1e-4]\n'


pytestmark = pytest.mark.slow  # that their options and ids are understood is among the fast tests


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the runs, labels and files that the examples name, and dataset roots of its own."""
    folder, before = tmp_path_factory.mktemp("fresh"), dict(os.environ)
    for name, place in (("RLKIT2_CACHE", "cache"), ("RLKIT2_DATA", "builtin"), ("MINARI_DATASETS_PATH", "minari")):
        os.environ[name] = str(folder / place)
    give_built("builtin/pendulum", "builtin/rooms", "builtin/rooms/stitch-dense-v0", "builtin/noisy-rooms")
    for (agent, dataset), options in RUNS.items():
        overrides = {**options, "hidden_sizes": (4,)}
        data = {"held_out": 0.1} if options else {}
        short = {"steps": 2, "eval_every": 2, "eval_episodes": 1, "progress": False}
        rlkit2.train(agent, dataset, out=folder / "runs", overrides=overrides, **short, **data)
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "sweep.toml").write_text(SWEEP)
    yield folder
    os.environ.clear()
    os.environ.update(before)


def typed(name: str, line: str) -> list[str]:
    """The words that a shell would hand over."""
    for large, small in SMALLER.items():
        line = line.replace(large, small)
    words = shlex.split(line.partition(" > ")[0])[1:]
    return [found for word in words for found in (sorted(glob(word)) if "*" in word else [word])]


HERE = [
    (name, line) for name, line in EXAMPLES if name not in ELSEWHERE and "--watch" not in line and " train " not in line
]


@pytest.mark.parametrize(("name", "line"), HERE, ids=[line for _, line in HERE])
def test_an_example_does_what_it_says(
    name: str, line: str, machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(machine)
    assert main(typed(name, line)) == 0, capsys.readouterr()


def test_what_is_not_typed_here_is_a_command() -> None:
    assert set(ELSEWHERE) <= {name for name, _ in EXAMPLES}
