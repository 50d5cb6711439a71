"""Pictures of an agent's error bars: calibration on held-out episodes, and the noise over the floor of the noisy rooms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rlkit2.evaluation.calibration import LEVELS, TDDiagnostics
from rlkit2.evaluation.noise_map import NoiseMap

BINS = 20


def calibration_figure(found: TDDiagnostics, seeds: Sequence[int]) -> Figure:
    """PIT histogram, reliability of central intervals, QQ plot and histogram of the standardised errors, one line per seed."""
    figure = Figure(figsize=(14, 3.5), layout="constrained")
    pit, reliability, qq, tails = figure.subplots(1, 4)
    edges = np.linspace(0.0, 1.0, BINS + 1)
    for index, seed in enumerate(seeds):
        style = {"color": f"C{index % 10}", "label": f"seed {seed}", "linewidth": 1.2}
        share, _ = np.histogram(found.pit[index], edges)
        pit.stairs(share * BINS / share.sum(), edges, **style)
        reliability.plot(LEVELS, found.reliability[index], marker=".", **style)
        qq.plot(found.qq[index, :, 0], found.qq[index, :, 1], **style)
        density, ends = np.histogram(found.standardized[index].ravel(), np.linspace(-8, 8, 81), density=True)
        tails.stairs(np.maximum(density, 1e-6), ends, **style)
    pit.axhline(1.0, color="0.6", linewidth=1)
    pit.set(xlabel="distribution function at the target", ylabel="density", title="PIT (flat if true)", ylim=(0, None))
    reliability.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    reliability.set(
        xlabel="central interval",
        ylabel="share of targets inside",
        title=f"calibration error {found.calibration_error.mean():.3f}",
    )
    diagonal = [found.qq[..., 0].min(), found.qq[..., 0].max()]
    qq.plot(diagonal, diagonal, color="0.6", linewidth=1)
    qq.set(
        xlabel="standard normal quantile",
        ylabel="of the targets, by the agent's distribution",
        title="QQ (diagonal if true)",
    )
    grid = np.linspace(-8, 8, 200)
    tails.plot(grid, np.exp(-0.5 * grid**2) / np.sqrt(2 * np.pi), color="0.6", linewidth=1)
    tails.set(
        xlabel="TD error / its predicted deviation",
        yscale="log",
        ylim=(1e-5, 2),
        title=f"excess kurtosis {found.conditional_kurtosis.mean():.1f} (pooled {found.pooled_kurtosis.mean():.1f})",
    )
    if 1 < len(seeds) <= 8:
        pit.legend(frameon=False, fontsize=8)
    return figure


def noise_figure(found: NoiseMap) -> Figure:
    """True and learnt deviation of the reward noise, the epistemic deviation, and true and learnt shape, over the floor (means over seeds)."""
    figure = Figure(figsize=(16, 3.4), layout="constrained")
    panels = figure.subplots(1, 5)
    learnt = found.aleatoric_sd.mean(0)
    top = float(np.nanmax(np.stack([found.true_sd, learnt])))
    _panel(figure, panels[0], found.true_sd, "true deviation of the noise", (0.0, top))
    _panel(figure, panels[1], learnt, f"aleatoric deviation, r = {found.correlation.mean():.2f}", (0.0, top))
    _panel(figure, panels[2], found.epistemic_sd.mean(0), "epistemic deviation", (0.0, None))
    _panel(figure, panels[3], found.true_shape, "true shape", (0.0, 4.0))
    title = f"learnt shape, rank r = {found.shape_rank_correlation.mean():.2f}"
    _panel(figure, panels[4], found.shape.mean(0), title, (0.0, 4.0))
    return figure


def _panel(
    figure: Figure, axes: Axes, values: NDArray[np.float64], title: str, limits: tuple[float, float | None]
) -> None:
    image = axes.imshow(values, origin="lower", extent=(-1, 1, -1, 1), vmin=limits[0], vmax=limits[1], cmap="viridis")
    axes.set_title(title, fontsize=10)
    axes.set(xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    figure.colorbar(image, ax=axes, shrink=0.85)
