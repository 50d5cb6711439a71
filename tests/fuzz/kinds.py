"""Kinds of files that somebody may have sent, whole, and what is done with them once they are damaged."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

import rlkit2
from rlkit2.agents.bc import BCConfig
from rlkit2.cli.main import main
from rlkit2.data.preferences import PreferenceDataset
from rlkit2.data.reward_file import load_rewards, save_rewards
from rlkit2.errors import RLKitError
from rlkit2.preferences import ScriptedTeacher, collect_preferences
from tests.training.tiny_problem import tiny_dataset

ENV = "tests.training.tiny_problem:TinyWalk-v0"
Use = Callable[[Path], object]


@dataclass(frozen=True)
class Kind:
    """`make` writes a whole one into an empty folder; `files` are those that are damaged; `uses` are what is then done, one of them a time."""

    name: str
    make: Callable[[Path], None]
    files: Sequence[str]
    uses: Sequence[Use]


def command(*words: str) -> Use:
    """A command line in which FOLDER stands for the folder. Anything but an exit status is a traceback."""

    def use(folder: Path) -> None:
        status = main([word.replace("FOLDER", str(folder)) for word in words])
        assert status in (0, 1, 2), status

    return use


def python(function: Callable[[Path], object]) -> Use:
    """A call from Python, which may raise errors of rlkit2 only."""

    def use(folder: Path) -> None:
        with suppress(RLKitError):
            function(folder)

    return use


def make_run(folder: Path) -> None:
    run = rlkit2.train(
        BCConfig(hidden_sizes=(4,)), "tiny/walk-v0", steps=12, seeds=2, eval_every=6, eval_episodes=2, checkpoint_every=4, log_every=4,
        batch_size=4, out=folder / "made", env=ENV, progress=False,
    )  # fmt: skip
    for path in run.path.iterdir():
        shutil.move(path, folder / path.name)
    (folder / "made").joinpath(run.path.name).rmdir()
    (folder / "made").rmdir()


def make_recipe(folder: Path) -> None:
    (folder / "recipe.toml").write_text(
        'agent = "bc"\ndataset = "tiny/walk-v0"\n[config]\nhidden_sizes = [4]\nlearning_rate = 0.001\nfraction = 1.0\nlayer_norm = false\n'
        "[data]\nnormalize_observations = true\nreward_scale = 1.0\nheld_out = 0.1\n"
        "[training]\nsteps = 3\nbatch_size = 4\neval_every = 0\nlog_every = 2\ncheckpoint_every = 2\n"
    )


def make_sweep(folder: Path) -> None:
    (folder / "sweep.toml").write_text(
        'name = "n"\n[base]\nagent = "bc"\ndataset = "tiny/walk-v0"\nseeds = 2\n[base.config]\nhidden_sizes = [4]\n[base.training]\nsteps = 3\n'
        'batch_size = 4\n[grid]\n"config.learning_rate" = [0.001, 0.01]\n[[runs]]\nagent = "iql"\nconfig.expectile = 0.7\nseeds = [3, 7]\n'
    )


def make_labels(folder: Path) -> None:
    data = tiny_dataset()
    collect_preferences(data, ScriptedTeacher(), 8, length=4, seed=0).save(folder / "labels")


def make_rewards(folder: Path) -> None:
    data = tiny_dataset()
    save_rewards(folder / "rewards.safetensors", data, torch.zeros(len(data)), {"by": "nobody"})


def make_dataset(folder: Path) -> None:
    data = tiny_dataset(episodes=3, length=5).to_minari(f"tiny/sent{len(list(folder.parents[0].iterdir()))}-v0")
    shutil.copytree(data.storage.data_path, folder / "data")


def use_labels(folder: Path) -> None:
    labels = PreferenceDataset.load(folder / "labels")
    labels.sample(tiny_dataset(), torch.Generator().manual_seed(0), 4) if hasattr(labels, "sample") else len(labels)


RUN = Kind(
    "run",
    make_run,
    ("config.json", "manifest.json", "metrics.jsonl", "evaluations.jsonl", "metrics.csv", "checkpoints/*/checkpoint.json",
     "checkpoints/*/state.safetensors", "policy/policy.json", "policy/policy.safetensors"),
    (
        command("compare", "FOLDER"),
        command("compare", "FOLDER", "--json"),
        command("report", "FOLDER", "--out", "FOLDER/r.html"),
        command("evaluate", "FOLDER", "--episodes", "1", "--env", ENV),
        command("evaluate", "FOLDER", "--episodes", "1", "--env", ENV, "--checkpoint", "last"),
        command("evaluate", "FOLDER/policy", "--episodes", "1", "--env", ENV),
        command("train", "--resume", "FOLDER", "--env", ENV),
        command("train", "--resume", "FOLDER", "--env", ENV, "--steps", "14"),
        python(lambda folder: rlkit2.load_policy(folder)),
        python(lambda folder: rlkit2.load_run(folder).agent),
        python(lambda folder: rlkit2.evaluate(folder, episodes=1)),
    ),
)  # fmt: skip
KINDS = (
    RUN,
    Kind("recipe", make_recipe, ("recipe.toml",), (command("train", "--recipe", "FOLDER/recipe.toml", "--out", "FOLDER/runs", "--steps", "3"),)),
    Kind("sweep", make_sweep, ("sweep.toml",), (command("sweep", "FOLDER/sweep.toml", "--out", "FOLDER/runs", "--dry-run"),)),
    Kind("labels", make_labels, ("labels", "labels/*"), (python(use_labels),)),
    Kind("dataset", make_dataset, ("**/metadata.json", "**/main_data.hdf5"), (
        command("data", "check", "FOLDER"),
        python(lambda folder: rlkit2.load_dataset(folder, cache=False)),
        command("train", "bc", "--dataset", "FOLDER", "--steps", "1", "--hidden-sizes", "4", "--eval-every", "0", "--out", "FOLDER/r"),
    )),
    Kind("rewards", make_rewards, ("rewards.safetensors",), (python(lambda folder: load_rewards(folder / "rewards.safetensors", tiny_dataset())),)),
)  # fmt: skip


def chosen_file(folder: Path, kind: Kind, generator: random.Random) -> Path:
    """One of the files of a kind."""
    found = [path for pattern in kind.files for path in sorted(folder.glob(pattern)) if path.is_file()]
    return generator.choice(found)
