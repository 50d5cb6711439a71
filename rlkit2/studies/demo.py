"""The main job in two minutes: build a dataset, audit it, train O-DICE and behaviour cloning, compare them, draw what was learnt.

In the stitching mixture of the four rooms no episode leads from the start to the goal: cloning what the data do gets nowhere, while an agent
whose weights come from a value function joins the legs that lie on the way.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlkit2.api import load_dataset, train
from rlkit2.data.audit.checks import audit
from rlkit2.data.audit.findings import AuditReport
from rlkit2.envs.rooms import RoomsVectorEnv, is_free
from rlkit2.files import save_figure
from rlkit2.reporting.comparison import Comparison, compare, group_runs
from rlkit2.reporting.figures import learning_curves, svg
from rlkit2.reporting.report import write_report
from rlkit2.training.progress import Progress, console_progress
from rlkit2.training.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rlkit2.data.dataset import TransitionDataset

DATASET = "builtin/rooms/stitch-sparse-v0"
AGENTS = ("bc", "odice")
GRID = 60  # points along each side of the value map
SHOWN_EPISODES = 60  # of the dataset
SHOWN_PATHS = 12  # of the policy
LONGEST_PATH = 60


@dataclass(frozen=True)
class Demo:
    """What the demo made: the audit, a run per agent, their comparison (baseline: behaviour cloning), the picture and the page."""

    audit: AuditReport
    runs: dict[str, Run]
    comparison: Comparison
    picture: Path
    page: Path


def run_demo(
    out: str | os.PathLike[str] = "runs/demo",
    *,
    seeds: int | Sequence[int] = 4,
    steps: int | None = None,
    device: str = "auto",
    progress: bool | Progress = True,
) -> Demo:
    """Run the demo into the folder `out`.

    Args:
        out: folder of the two runs, `demo.png` and `demo.html`; runs that are there already stay.
        seeds: n for seeds 0 to n - 1, or the integers.
        steps: updates per seed; default: those of the recipes in `agents/`.
        device: as for `rlkit2.train`.
        progress: show what is being done on standard error.

    Raises:
        RunError: the folder cannot be written.
    """
    shown = progress if isinstance(progress, Progress) else console_progress() if progress else Progress(None)
    shown.message(f"1/4 the dataset {DATASET}")
    dataset = load_dataset(DATASET)
    report = audit(dataset)
    shown.message(
        f"    {len(dataset):,} transitions, {report.episodes} episodes, audit: "
        + ("no errors" if report.ok else "errors, see rlkit2 data check")
    )
    runs = {}
    for number, agent in enumerate(AGENTS):
        shown.message(f"{number + 2}/4 train {agent}")
        runs[agent] = train(agent, dataset, steps=steps, seeds=seeds, out=out, device=device, progress=shown)
    shown.message("4/4 compare and draw")
    comparison = compare(list(runs.values()), baseline="bc")
    figure = demo_figure(dataset, runs)
    picture = Path(out) / "demo.png"
    save_figure(figure, picture, dpi=130)
    page = write_report(
        list(runs.values()),
        Path(out) / "demo.html",
        baseline="bc",
        title="rlkit2 demo",
        extra=f"<div class='picture'>{svg(figure, 'demo')}</div>",
    )
    return Demo(report, runs, comparison, picture, page)


def demo_figure(dataset: TransitionDataset, runs: dict[str, Run]) -> Figure:
    """Learning curves, some episodes of the dataset, and the value that O-DICE learnt with paths of both policies."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.4), layout="constrained")
    curves, data, value = figure.subplots(1, 3)
    learning_curves(group_runs(list(runs.values())), axes=curves)
    _draw_world(data)
    observations = torch.as_tensor(dataset.observations)
    for episode in np.linspace(0, len(dataset.episode_starts) - 2, SHOWN_EPISODES).astype(int):
        first, last = int(dataset.episode_starts[episode]), int(dataset.episode_starts[episode + 1])
        path = torch.cat([observations[first:last], torch.as_tensor(dataset.next_observations[last - 1])[None]])
        data.plot(*path.numpy().T, linewidth=0.8, alpha=0.7)
    data.set_title("some episodes of the dataset")
    _draw_value(figure, value, runs)
    return figure


def _draw_world(axes: Axes) -> None:
    pixels = (np.arange(400) + 0.5) / 200 - 1
    free = is_free(np.stack(np.meshgrid(pixels, pixels), -1))
    axes.imshow(np.where(free[..., None], 1.0, 0.25).repeat(3, -1), extent=(-1, 1, -1, 1), origin="lower")
    axes.set(xlim=(-1, 1), ylim=(-1, 1), xticks=[], yticks=[])


def _draw_value(figure: Figure, axes: Axes, runs: dict[str, Run]) -> None:
    line = torch.linspace(-1 + 1 / GRID, 1 - 1 / GRID, GRID)
    points = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(-1, 2)
    agent: Any = runs["odice"].agent
    values = agent.value(points.expand(len(agent.seeds), -1, -1)).mean(0)
    values[~torch.from_numpy(is_free(points.numpy()))] = torch.nan
    image = axes.imshow(values.view(GRID, GRID).cpu(), extent=(-1, 1, -1, 1), origin="lower", cmap="viridis")
    figure.colorbar(image, ax=axes, shrink=0.8)
    for name, color in (("bc", "orange"), ("odice", "red")):
        for number, path in enumerate(_paths(runs[name])):
            axes.plot(*path.T, color=color, linewidth=1.1, alpha=0.8, label=name if number == 0 else None)
    axes.set(xticks=[], yticks=[], title="value learnt by odice, paths of both policies")
    axes.legend(frameon=False, loc="upper left", labelcolor="white")


def _paths(run: Run) -> list[NDArray[Any]]:
    """Positions of the first episodes of the first seed's policy."""
    from rlkit2.nn.policy import load_policy

    policy = load_policy(run.path / "policy", seed_index=0)
    worlds = RoomsVectorEnv(SHOWN_PATHS, max_episode_steps=LONGEST_PATH)
    position, _ = worlds.reset(seed=0)
    steps, alive = [position], np.ones(SHOWN_PATHS, bool)
    lengths = np.ones(SHOWN_PATHS, int)
    while alive.any():
        position, _, terminations, truncations, _ = worlds.step(policy(torch.from_numpy(position)).numpy())
        steps.append(position)
        lengths += alive
        alive &= ~(terminations | truncations)
    return [np.stack([step[i] for step in steps[: lengths[i]]]) for i in range(SHOWN_PATHS)]
