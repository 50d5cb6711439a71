"""Learning curves and diagnostics of runs, as matplotlib figures."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rlkit2.errors import ConfigError
from rlkit2.evaluation.scores import score_history
from rlkit2.evaluation.statistics import bootstrap
from rlkit2.reporting.comparison import Group
from rlkit2.training.run import Run

Array = NDArray[np.float64]
MOST_POINTS = 200  # per drawn line
COLUMNS = 3


def learning_curves(groups: Sequence[Group], *, axes: Axes | None = None) -> Figure:
    """Scores over updates of groups on one dataset: a thin line per seed, the mean, and its 95 % interval as a band.

    With two or three seeds a band may be wider than the axes, which show where the seeds are.
    `axes`: draw there instead of on a new figure. Raises `ConfigError` where the groups are on several datasets or in several units.
    """
    histories = [(group, score_history(run)) for group in groups for run in group.runs if run.evaluations()]
    if len({group.dataset for group in groups}) != 1 or len({history.unit for _, history in histories}) != 1:
        raise ConfigError("learning curves need runs on one dataset, scored in one unit")
    if axes is None:
        axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    for index, group in enumerate(groups):
        color = f"C{index % 10}"
        by_step: dict[int, list[Array]] = {}
        if all(entry[0] is not group for entry in histories):
            continue  # never evaluated
        for _, history in (entry for entry in histories if entry[0] is group):
            axes.plot(history.steps, history.per_seed, color=color, linewidth=0.7, alpha=0.45)
            for step, scores in zip(history.steps, history.scores, strict=True):
                by_step.setdefault(step, []).extend(scores)
        runs_at = {step: rows for step, rows in sorted(by_step.items()) if len(rows) == max(map(len, by_step.values()))}
        estimates = [bootstrap([_table(rows)], resamples=500) for rows in runs_at.values()]
        steps = list(runs_at)
        axes.plot(
            steps,
            [e.value for e in estimates],
            color=color,
            linewidth=2,
            marker="." if len(steps) < 30 else None,
            label=group.label,
        )
        axes.fill_between(
            steps, [e.low for e in estimates], [e.high for e in estimates], color=color, alpha=0.18, linewidth=0
        )
    unit = histories[0][1].unit
    everything = np.concatenate([history.per_seed.ravel() for _, history in histories])
    if np.isfinite(everything).any():
        low, high = np.nanmin(everything), np.nanmax(everything)
        room = 0.15 * (high - low) or 1.0
        axes.set_ylim(low - room, high + room)
    axes.set(
        xlabel="updates",
        ylabel="normalised score (%)" if unit == "normalized score" else "return",
        title=groups[0].dataset,
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return figure


def _table(rows: Sequence[Array]) -> Array:
    """Rows of possibly different numbers of episodes as one table, cut to the shortest."""
    episodes = min(len(row) for row in rows)
    return np.stack([row[:episodes] for row in rows])


def metric_curves(run: Run, names: Sequence[str]) -> Figure:
    """One small plot per metric, one line per seed."""
    lines = run.metrics()
    rows = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(3.6 * COLUMNS, 2.3 * rows), layout="constrained")
    panels = np.ravel(figure.subplots(rows, COLUMNS, squeeze=False))
    for axes, name in zip(panels, names, strict=False):
        for index, seed in enumerate(run.config["seeds"]):
            points = [(line["step"], line[name]) for line in lines if line["seed"] == seed and name in line]
            if points:
                steps, values = np.array(points[:: -(-len(points) // MOST_POINTS)], dtype=np.float64).T
                axes.plot(steps, values, color=f"C{index % 10}", linewidth=0.9, label=f"seed {seed}")
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    if 1 < len(run.config["seeds"]) <= 8:
        panels[0].legend(fontsize=7, frameon=False)
    return figure


def svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element to put inline; `name` keeps its ids apart from those of other figures on the page."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    markup = text.getvalue()
    return markup[markup.index("<svg") :]
