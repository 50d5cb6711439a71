"""What the orthogonal projection does to the policy where data are few: rules and eta of O-DICE in the four rooms and in a maze.

    python benchmarks/odice_rules.py                      # results/odice_rules.json and docs/images/odice-rules.svg
    python benchmarks/odice_rules.py --only rooms --seeds 8

From 100, 200 or 400 episodes, chosen once, with one setting for all rules: in the rooms that of `rooms-stitch-sparse` (agents/odice), in the maze
zoo/pointmaze-umaze/scripted with V and R in units of reward, the released weight and a scale of 1. eta 0 is the semi-gradient. For each seed:

    score      of the mode, 50 episodes, as the task starts them (rooms: per cent that arrive in 100 steps; maze: normalised score)
    noise      the same where every observation carries Gaussian noise of deviation 0.1
    anywhere   the same from starts anywhere (rooms; those of the maze are everywhere)
    rank       rank correlation of V with minus the length of the shortest way to the goal, over transitions of all episodes

with standard errors over seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from common import RAW_UNITS, report
from torch import Tensor

import rlkit2
from rlkit2.data.dataset import TransitionDataset
from rlkit2.envs.geodesic import distances_to
from rlkit2.envs.rooms import GOAL
from rlkit2.evaluation import evaluate_policy

SIZES = (100, 200, 400)
RULES: dict[str, dict[str, Any]] = {
    "semi": {"gradient_rule": "semi"},
    "batch, eta 0.3": {"eta": 0.3},
    "batch, eta 1": {"eta": 1.0},
    "sample, eta 1": {"eta": 1.0, "projection": "sample"},
}
CORNERS = np.array([(-1.0, 1.0), (1.0, 1.0), (1.0, -1.0), (-1.0, -1.0)])  # of the line in the middle of the maze's U


class Noisy(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Gaussian noise on every observation, or on one entry of a dictionary of them; its chances come with the reset's seed."""

    def __init__(self, env: gymnasium.Env[Any, Any], deviation: float, key: str | None = None) -> None:
        super().__init__(env)
        self.deviation, self.key = deviation, key
        self.generator = np.random.default_rng(0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.generator = np.random.default_rng(seed)
        return super().reset(seed=seed, options=options)

    def observation(self, observation: Any) -> Any:
        if self.key is not None:
            return {**observation, self.key: self._noisy(observation[self.key])}
        return self._noisy(observation)

    def _noisy(self, values: Any) -> Any:
        noise = self.generator.normal(size=np.shape(values)) * self.deviation
        return (values + noise).astype(values.dtype)


@dataclass(frozen=True)
class Task:
    """What is trained on, by which setting, and how policies and values are judged.

    Attributes:
        worlds: environments by what is measured in them; None: the dataset's own.
        closeness: minus the length of the way to the goal from observations `[n, obs]`, `[n]`.
    """

    dataset: str
    config: dict[str, Any]
    steps: int
    standardise: bool
    worlds: dict[str, Callable[[], gymnasium.Env[Any, Any]] | None]
    closeness: Callable[[Tensor], Tensor]


def rooms(**start: Any) -> Callable[[], gymnasium.Env[Any, Any]]:
    """A maker of the four rooms."""
    return lambda: gymnasium.make("rlkit2/Rooms-v0", reward="sparse", **start)


def maze() -> gymnasium.Env[Any, Any]:
    """The dataset's environment."""
    spec = rlkit2.load_dataset(TASKS["maze"].dataset).spec.eval_env_spec
    assert spec is not None
    return Noisy(gymnasium.make(spec), 0.1, "observation")


def close_in_rooms(observations: Tensor) -> Tensor:
    """By the shortest way around the walls."""
    places = observations.double().numpy()[:, None]
    return -torch.from_numpy(distances_to(np.array([GOAL]), np.zeros(len(places), int), places)[:, 0])


def close_in_maze(observations: Tensor) -> Tensor:
    """By the way along the middle of the U."""
    here, goal = (along(observations[:, columns].double().numpy()) for columns in (slice(0, 2), slice(4, 6)))
    return -torch.from_numpy(np.abs(here - goal))


def along(places: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """How far along the U the nearest point of its middle line is, `[n]`."""
    best, found, done = np.full(len(places), np.inf), np.zeros(len(places)), 0.0
    for first, last in itertools.pairwise(CORNERS):
        length = float(np.linalg.norm(last - first))
        share = np.clip((places - first) @ (last - first) / length**2, 0.0, 1.0)
        off = np.linalg.norm(places - (first + share[:, None] * (last - first)), axis=1)
        found, best = np.where(off < best, done + share * length, found), np.minimum(off, best)
        done += length
    return found


TASKS = {
    "rooms": Task(
        "builtin/rooms/stitch-sparse-v0",
        {
            **RAW_UNITS,
            "weight": "conjugate_grad",
            "residual_scale": 300.0,
            "discount": 0.97,
            "hidden_sizes": (64, 64),
            "value_learning_rate": 1e-3,
            "policy_learning_rate": 1e-3,
            "target_update_rate": 0.05,
        },
        6000,
        False,
        {
            "score": None,
            "noise": lambda: Noisy(rooms()(), 0.1),
            "anywhere": rooms(start=(-1.0, -1.0, 1.0, 1.0)),
        },
        close_in_rooms,
    ),
    "maze": Task(
        "zoo/pointmaze-umaze/scripted-v0",
        {**RAW_UNITS, "residual_scale": 1.0, "hidden_sizes": (64, 64)},
        4000,
        True,
        {"score": None, "noise": maze},
        close_in_maze,
    ),
}


def ranks(values: Tensor) -> Tensor:
    """Ranks along the last axis, centred."""
    found = values.argsort(-1).argsort(-1).double()
    return found - found.mean(-1, keepdim=True)


def judged(task: Task, dataset: TransitionDataset, run: rlkit2.Run, episodes: int) -> dict[str, Any]:
    """Means over seeds and their standard errors."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    low, high = dataset.spec.ref_min_score, dataset.spec.ref_max_score
    assert low is not None and high is not None  # noqa: PT018
    for name, world in task.worlds.items():
        played = evaluate_policy(run.policy, dataset.spec, episodes=episodes, env=world)
        found[name] = 100.0 * (played.returns.mean(1) - low) / (high - low)
    rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:4000]
    observations = dataset.observations[rows]
    value = ranks(run.agent.value(observations.expand(len(run.agent.seeds), -1, -1)).double())
    wanted = ranks(task.closeness(observations))
    found["rank"] = ((value * wanted).sum(-1) / (value.norm(dim=-1) * wanted.norm())).numpy()
    return {name: float(one.mean()) for name, one in found.items()} | {
        f"{name}, error": float(one.std(ddof=1) / len(one) ** 0.5) for name, one in found.items()
    }


def rows_of(name: str, seeds: int, episodes: int) -> Iterator[dict[str, Any]]:
    """One row for every number of episodes and rule."""
    task = TASKS[name]
    dataset = rlkit2.load_dataset(task.dataset)
    order = torch.randperm(dataset.num_episodes, generator=torch.Generator().manual_seed(0))
    for size in SIZES:
        for rule, fields in RULES.items():
            begun = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                run = rlkit2.train(
                    "odice", dataset.select(order[:size]), seeds=seeds, steps=task.steps, out=folder, eval_every=0, progress=False,
                    normalize_observations=task.standardise, overrides={**task.config, **fields}, device="cpu",
                )  # fmt: skip
                row = {"task": name, "episodes": size, "rule": rule, **judged(task, dataset, run, episodes)}
            yield row | {"seconds": time.perf_counter() - begun}


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Every measure by the number of episodes, a row of panels for each task."""
    import matplotlib
    from matplotlib.figure import Figure

    tasks, measures = list(dict.fromkeys(row["task"] for row in rows)), ("score", "noise", "anywhere", "rank")
    figure = Figure(figsize=(10, 2.6 * len(tasks)), layout="constrained")
    for line, task in zip(figure.subplots(len(tasks), len(measures), squeeze=False), tasks, strict=True):
        for axes, measure in zip(line, measures, strict=True):
            for number, rule in enumerate(RULES):
                mine = [row for row in rows if (row["task"], row["rule"]) == (task, rule) and measure in row]
                if not mine:
                    axes.set_axis_off()
                    continue
                axes.errorbar(
                    [row["episodes"] for row in mine], [row[measure] for row in mine], [row[f"{measure}, error"] for row in mine],
                    fmt="k--o" if rule == "semi" else f"C{number}-o", label=rule, capsize=2, markersize=3,
                )  # fmt: skip
            axes.set_title(f"{task}: {measure}", fontsize=9)
            axes.tick_params(labelsize=7)
    figure.axes[0].legend(fontsize=7)
    figure.supxlabel("episodes of data", fontsize=9)
    with matplotlib.rc_context({"svg.hashsalt": "odice-rules"}):
        figure.savefig(out, metadata={"Date": None})


def main() -> None:
    """Run the tasks that are asked for; the others keep the rows that they have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(TASKS), nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--episodes", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = Path(__file__).parent / "results" / "odice_rules.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for name in arguments.only:
        rows = [row for row in rows if row["task"] != name]
        for row in rows_of(name, arguments.seeds, arguments.episodes):
            rows.append(row)
            report("odice_rules", rows, seeds=arguments.seeds, evaluation_episodes=arguments.episodes)
    draw(rows, Path(__file__).parents[1] / "docs" / "images" / "odice-rules.svg")


if __name__ == "__main__":
    main()
