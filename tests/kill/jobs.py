"""What is killed: for each kind of work, how it is begun or gone on with, and what must not depend on kills."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

import rlkit2
from rlkit2.agents import agent_class, list_agents
from rlkit2.cli.main import main
from rlkit2.training import Run
from tests.training.tiny_problem import Walk, contents, tiny_dataset

TINY, GRID = "tiny/walk-v0", "own/grid-v0"
RECIPE = f"""
id = "{GRID}"
description = "a few episodes"
seed = 1
environment = {{ id = "rlkit2/GridRooms-v0" }}
behaviors = [{{ policy = "random", episodes = 40, max_steps = 20 }}, {{ policy = "grid", epsilon = 0.3, episodes = 40 }}]
reference = {{ episodes = 20, expert = {{ policy = "grid" }} }}
"""
SWEEP = f"""
[base]
agent = "bc"
dataset = "{TINY}"
seeds = 2
[base.config]
hidden_sizes = [8]
[base.training]
steps = 400
checkpoint_every = 50
eval_every = 0
[grid]
"config.learning_rate" = [1e-3, 1e-2, 1e-4]
"""
PREFERENCES = f"prefs label {TINY} --teacher oracle --count 40 --length 5 --out"
STUDY = (
    f"prefs study {GRID} --teachers oracle --budgets 10 --seeds 1 --length 4 --discount 0.9 --offset max --steps 30 "
    "--reward-steps 20 --hidden-sizes 8 --config hidden_sizes=[8] --episodes 2 --jobs 2 --out"
)
OPTIONS: dict[str, Any] = {"eval_episodes": 2, "progress": False}
SCHEDULE = {"steps": 60, "log_every": 7, "eval_every": 20, "checkpoint_every": 15, "batch_size": 8}
ONLINE: dict[str, Any] = {
    "sacn": Walk,
    "td3bc": Walk,
    "rebrac": Walk,
    "sac": "Pendulum-v1",
    "dqn": "CartPole-v1",
    "ppo": "CartPole-v1",
}
"""Agents that act, and where."""
ONLINE_ALONE = ("ppo",)
Work = Callable[[Path], None]
Contents = Callable[[Path], Any]


@dataclass(frozen=True)
class Job:
    """`work(folder)` begins in an empty folder or goes on in one that a kill left behind; `contents(folder)` is what came out of it."""

    name: str
    work: Work
    contents: Contents


class FailedError(Exception):
    """A command ended with another status than 0."""


def command(words: str | list[str], *more: object) -> None:
    """Run a command of the command line."""
    arguments = [*(words.split() if isinstance(words, str) else words), *map(str, more)]
    status = main(arguments)
    if status:
        raise FailedError(f"status {status}: {' '.join(arguments)}")


def prepare(shared: Path) -> None:
    """What all jobs read: two datasets, labels, learned rewards and a finished run."""
    tiny_dataset().to_minari(TINY)
    (shared / "recipe.toml").write_text(RECIPE)
    (shared / "sweep.toml").write_text(SWEEP)
    command("data build --recipe", shared / "recipe.toml")
    command(PREFERENCES, shared / "labels")
    command(
        "prefs fit",
        shared / "labels",
        "--out",
        shared / "reward",
        *["--steps", "20", "--hidden-sizes", "8", "--no-starc"],
    )
    command(f"train bc --dataset {TINY} --steps 40 --hidden-sizes 8 --eval-every 0 --out", shared / "runs")
    for name in ("sacn", "td3bc", "rebrac"):
        command(
            f"train {name} --dataset {TINY} --steps 20 --seeds 2 --hidden-sizes 8 --eval-every 0 --out", shared / "runs"
        )
    rng = np.random.default_rng(0)
    ends = np.arange(1, 2001) % 50 == 0
    np.savez(
        shared / "steps.npz",
        observations=rng.normal(size=(2000, 4)),
        actions=rng.uniform(-1, 1, (2000, 2)).astype(np.float32),
        rewards=rng.normal(size=2000),
        terminals=ends,
        timeouts=np.zeros(2000, bool),
    )


def jobs(shared: Path, minari: Path) -> list[Job]:
    """Every kind of work."""
    found = [
        Job(f"train {name}", partial(_train, name, shared), _run) for name in list_agents() if name not in ONLINE_ALONE
    ]
    found += [Job(f"online {name}", partial(_online, name, shared), _run) for name in ONLINE]
    rebuild = ["data", "build", "--recipe", str(shared / "recipe.toml"), "--rebuild"]
    found.append(Job("data build", partial(_build, rebuild), partial(_dataset, minari, GRID)))
    found.append(Job("data import", partial(_import, shared, minari), partial(_dataset, minari, None)))
    found.append(Job("prefs fit", partial(_fit, shared), _reward))
    found.append(
        Job("prefs study", lambda folder: command(STUDY, folder / "study"), partial(_json, "study/study.json"))
    )
    found.append(Job("sweep local", partial(_sweep, shared), _runs))
    found.append(Job("starc study", _starc, partial(_bytes, "study/table.csv")))
    found.append(Job("report", partial(_report, shared), partial(_exists, "page.html")))
    return found


def _train(agent: str, shared: Path, folder: Path) -> None:
    """Begin the run in the folder, or resume the one that is there."""
    cls = agent_class(agent)
    dataset = TINY if "continuous" in cls.action_kinds else GRID
    env: dict[str, Any] = {"env": Walk} if dataset == TINY else {}
    begun = sorted(folder.glob("*/config.json"))
    if begun:
        rlkit2.train(resume=begun[0].parent, **env, **OPTIONS)
        return
    places = {"preferences": str(shared / "labels"), "rewards": str(shared / "reward" / "rewards.safetensors")}
    fields = {field for field in cls.config_class.__dataclass_fields__ if field.endswith("hidden_sizes")}
    overrides = {
        **dict.fromkeys(fields, (8,)),
        **{name: place for name, place in places.items() if name in cls.config_class.__dataclass_fields__},
    }
    rlkit2.train(agent, dataset, seeds=2, out=folder, overrides=overrides, **SCHEDULE, **OPTIONS, **env)


def _online(name: str, shared: Path, folder: Path) -> None:
    """Begin a run in an environment in the folder, or resume the one that is there."""
    options = {"env": ONLINE[name], **OPTIONS}
    begun = sorted(folder.glob("*/config.json"))
    if begun:
        rlkit2.train(resume=begun[0].parent, env=ONLINE[name], progress=False)
    elif name == "ppo":
        small = {"hidden_sizes": (8,), "rollout_steps": 16, "epochs": 3}
        rlkit2.train_online(name, seeds=2, out=folder, overrides=small, num_envs=2, **{**SCHEDULE, **options})
    elif name in ("sac", "dqn"):
        rlkit2.train_online(
            name,
            seeds=2,
            out=folder,
            overrides={"hidden_sizes": (8,)},
            num_envs=2,
            warmup=20,
            **{**SCHEDULE, **options},
        )
    else:
        (run,) = (shared / "runs").glob(f"{name}-*")
        rlkit2.train_online(run, out=folder, num_envs=2, warmup=10, **{**SCHEDULE, **options})


def _run(folder: Path) -> Any:
    (config,) = folder.glob("*/config.json")
    return contents(Run(config.parent))


def _build(line: list[str], folder: Path) -> None:
    command(line)


def _dataset(minari: Path, name: str | None, folder: Path) -> Any:
    name = name or f"own/imported{folder.name}-v0"
    dataset = rlkit2.load_dataset(name, cache=False)
    return dataset.spec.content_hash, (minari / name / "data" / "main_data.hdf5").stat().st_size


def _import(shared: Path, minari: Path, folder: Path) -> None:
    name = f"own/imported{folder.name}-v0"
    if not (minari / name).exists():  # else it is whole
        command("data import", shared / "steps.npz", name)


def _fit(shared: Path, folder: Path) -> None:
    command(
        "prefs fit",
        shared / "labels",
        "--out",
        folder / "reward",
        *["--steps", "150", "--hidden-sizes", "8", "--no-starc"],
    )


def _reward(folder: Path) -> Any:
    tensors = {
        name: value.numpy().tobytes() for name, value in load_file(folder / "reward" / "reward.safetensors").items()
    }
    return tensors, load_file(folder / "reward" / "rewards.safetensors")["rewards"].numpy().tobytes()


def _sweep(shared: Path, folder: Path) -> None:
    command("sweep", shared / "sweep.toml", "--jobs", 2, "--out", folder)


def _runs(folder: Path) -> Any:
    configs = sorted(folder.glob("sweep/*/*/config.json"))
    return {config.parent.parent.name: contents(Run(config.parent)) for config in configs}


def _starc(folder: Path) -> None:
    command("starc study --mdps 32 --pairs 2 --steps 8 --states 16 --workers 2 --out", folder / "study")


def _report(shared: Path, folder: Path) -> None:
    command("report", shared / "runs" / "bc-tiny-walk-v0-001", "--out", folder / "page.html")


def _json(name: str, folder: Path) -> Any:
    return json.loads((folder / name).read_text())


def _bytes(name: str, folder: Path) -> Any:
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()


def _exists(name: str, folder: Path) -> Any:
    text = (folder / name).read_text()
    return text.rstrip().endswith("</html>")
