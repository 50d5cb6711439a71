"""Kinds of files that somebody may have sent, whole, and what is done with them once they are damaged."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pyarrow.csv
import pyarrow.parquet
import torch

import rlkit2
from rlkit2.agents.bc import BC, BCConfig
from rlkit2.cli.main import main
from rlkit2.data.preferences import PreferenceDataset
from rlkit2.data.reward_file import load_rewards, save_rewards
from rlkit2.errors import RLKitError
from rlkit2.preferences import ScriptedTeacher, collect_preferences
from rlkit2.reporting.cells import cell_of_run, code_digest, write_cells
from tests.data import test_readers as layouts
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
    weight: int = 1  # how often it is damaged beside the others


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
        'agent = "bc"\ndataset = "tiny/walk-v0"\n[config]\nhidden_sizes = [4]\nlearning_rate = 0.001\nfraction = 1.0\nweight_decay = 0.0\n'
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
    weight=8,
)  # fmt: skip


def make_policy(folder: Path) -> None:
    run = rlkit2.train(
        BCConfig(hidden_sizes=(4,)), tiny_dataset(), steps=2, eval_every=0, out=folder / "made", progress=False
    )
    run.policy.save(folder / "policy")
    shutil.rmtree(folder / "made")


def make_segments(folder: Path) -> None:
    """Labelled pairs of two segments of four steps."""
    data = tiny_dataset()
    rows = torch.arange(8).reshape(2, 4) * 5
    rows = rows[..., None] + torch.arange(4)
    sides = {f"{short}_{side + 1}": getattr(data, name)[rows[side]].numpy()
             for short, name in (("obs", "observations"), ("action", "actions")) for side in range(2)}  # fmt: skip
    np.savez(folder / "segments.npz", **sides, label=np.array([0.0, 1.0, 0.5, 1.0]))


BENCHMARK = {"steps": 12, "batch_size": 4, "eval_every": 6, "eval_episodes": 2}
gym.register("FuzzWalk-v0", entry_point="tests.training.tiny_problem:Walk")


def make_results(folder: Path) -> None:
    """The file of a benchmark that has bc on a dataset with an environment."""
    data = tiny_dataset()
    data = replace(
        data, spec=replace(data.spec, env_spec=gym.spec("FuzzWalk-v0"), ref_min_score=-20.0, ref_max_score=0.0)
    )
    data.to_minari("tiny/known-v0")
    run = rlkit2.train(
        BCConfig(hidden_sizes=(4,)), "tiny/known-v0", seeds=2, out=folder / "made", progress=False, **BENCHMARK
    )
    write_cells(folder / "results.json", [cell_of_run(run, "bc", code_digest(BC))])
    shutil.rmtree(folder / "made")


def make_search(folder: Path) -> None:
    make_sweep(folder)
    text = (folder / "sweep.toml").read_text()
    (folder / "sweep.toml").write_text(
        text[: text.index("[grid]")] + '[search]\nmetric = "policy/loss"\nmethod = "random"\ntrials = 2\nbatch = 2\nseed = 5\nprune = [1, 2]\n'
        '[search.space]\n"config.learning_rate" = { low = 1e-5, high = 1e-1, log = true }\n"training.batch_size" = [2, 4]\n'
    )  # fmt: skip


def read_rewards(path: Path) -> Any:
    """All rewards of files of rows, as their own libraries read them."""
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES) if path.is_dir() else [path]
    return np.concatenate([np.ravel(part) for file in files for part in SUFFIXES[file.suffix](file)] or [np.zeros(0)])


def _of_npz(path: Path) -> list[Any]:
    with np.load(path) as file:
        return [file[name] for name in ("rewards", "reward") if name in file]


def _of_hdf5(path: Path) -> list[Any]:
    found: list[Any] = []
    with h5py.File(path) as file:
        file.visititems(lambda name, it: found.append(it[()]) if "rewards" in name else None)
    return found


def _of_table(path: Path) -> list[Any]:
    table = pyarrow.parquet.read_table(path) if path.suffix == ".parquet" else pyarrow.csv.read_csv(path)
    return [table.column(name).to_numpy() for name in ("earned", "next.reward") if name in table.column_names]


SUFFIXES: dict[str, Callable[[Path], list[Any]]] = {
    ".npz": _of_npz, ".hdf5": _of_hdf5, ".h5": _of_hdf5, ".csv": _of_table, ".parquet": _of_table,
}  # fmt: skip


def data_kind(name: str, make: Callable[[Path], object], files: Sequence[str] = ("*",)) -> Kind:
    """A file or folder of transitions in a layout of others: refused in a line, or read as its own library reads it."""
    mapping = layouts.MAPPING if Path(name).stem == "own" and not name.endswith("npz") else {}
    named = [f"{field}={names if isinstance(names, str) else ','.join(names)}" for field, names in mapping.items()]
    columns = ["--columns", *named] if named else []
    path = f"FOLDER/{name}"

    def load(folder: Path) -> None:
        rewards = rlkit2.load_dataset(folder / name, cache=False, columns=mapping or None).rewards.numpy()
        stored = read_rewards(folder / name).astype(np.float32)
        if len(stored):  # otherwise they count as zeros, which is said
            assert np.isin(rewards[~np.isnan(rewards)], stored).all(), f"{rewards} for {stored}"
        assert len(rewards) <= max(len(stored), layouts.STEPS + 8), f"{len(rewards)} rewards for {len(stored)}"

    return Kind(name, lambda folder: make(folder / name), [f"{name}/**/*" if "." not in name else name], (
        python(load),
        command("data", "check", path, *columns),
        command("train", "bc", "--dataset", path, *columns, "--steps", "1", "--hidden-sizes", "4", "--eval-every", "0", "--out", "FOLDER/r"),
    ))  # fmt: skip


KINDS = (
    RUN,
    Kind("recipe", make_recipe, ("recipe.toml",), (command("train", "--recipe", "FOLDER/recipe.toml", "--out", "FOLDER/runs", "--steps", "3"),), 2),
    Kind("sweep", make_sweep, ("sweep.toml",), (command("sweep", "FOLDER/sweep.toml", "--out", "FOLDER/runs", "--dry-run"),), 2),
    Kind("labels", make_labels, ("labels", "labels/*"), (python(use_labels),), 2),
    Kind("dataset", make_dataset, ("**/metadata.json", "**/main_data.hdf5"), (
        command("data", "check", "FOLDER"),
        python(lambda folder: rlkit2.load_dataset(folder, cache=False)),
        command("train", "bc", "--dataset", "FOLDER", "--steps", "1", "--hidden-sizes", "4", "--eval-every", "0", "--out", "FOLDER/r"),
    ), 3),
    Kind("policy", make_policy, ("policy/*",), (
        python(lambda folder: rlkit2.load_policy(folder / "policy")(np.zeros(3, np.float32))),
        command("evaluate", "FOLDER/policy", "--episodes", "1", "--env", ENV),
    )),
    Kind("segments", make_segments, ("segments.npz",), (
        command("prefs", "label", "tiny/walk-v0", "--people", "FOLDER/segments.npz", "--out", "FOLDER/labels"),
        command("prefs", "label", "tiny/cut-v0", "--people", "FOLDER/segments.npz", "--as-dataset", "--out", "FOLDER/labels"),
    )),
    Kind("results", make_results, ("results.json",), (
        command("benchmark", "--results", "FOLDER/results.json", "--out", "FOLDER/out", "--datasets", "tiny/known-v0", "--agents", "bc", "iql",
                "--seeds", "2", "--hidden-sizes", "4", "--dry-run", *(w for k, v in BENCHMARK.items() for w in (f"--{k.replace('_', '-')}", str(v)))),
    )),
    Kind("search", make_search, ("sweep.toml",), (command("sweep", "FOLDER/sweep.toml", "--out", "FOLDER/runs", "--dry-run"),)),
    data_kind("own.npz", layouts.write_npz),
    data_kind("own.csv", layouts.write_table),
    data_kind("own.parquet", layouts.write_table),
    data_kind("ogbench.npz", layouts.write_ogbench),
    data_kind("robomimic.hdf5", layouts.write_robomimic),
    data_kind("d3rlpy_1.h5", lambda path: layouts.write_d3rlpy(path, 1)),
    data_kind("d3rlpy_2.h5", lambda path: layouts.write_d3rlpy(path, 2)),
    data_kind("vd4rl", lambda path: layouts.write_vd4rl(path, "older")),
    data_kind("lerobot_2", lambda path: layouts.write_lerobot(path, 2, layouts.rewarded())),
    data_kind("lerobot_3", lambda path: layouts.write_lerobot(path, 3, layouts.rewarded())),
    Kind("rewards", make_rewards, ("rewards.safetensors",), (python(lambda folder: load_rewards(folder / "rewards.safetensors", tiny_dataset())),)),
)  # fmt: skip


def chosen_file(folder: Path, kind: Kind, generator: random.Random) -> Path:
    """One of the files of a kind."""
    found = [path for pattern in kind.files for path in sorted(folder.glob(pattern)) if path.is_file()]
    return generator.choice(found)
