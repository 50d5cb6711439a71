"""What an audit says: findings, distributions, and a figure of them."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rlkit2.files import save_figure

MOST_PLOTS = 16  # action columns drawn
BINS = 20
Severity: TypeAlias = Literal["error", "warning", "info"]
Place: TypeAlias = dict[str, int | str]
Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing. `where`: its first places (`episode`, `step`, `column`), empty where it concerns the whole dataset."""

    severity: Severity
    code: str
    message: str
    where: tuple[Place, ...] = ()


@dataclass(frozen=True)
class Distribution:
    """Finite values in numbers: `quantiles` at 5, 25, 50, 75 and 95 %; `counts[i]` of them lie from `edges[i]` to `edges[i + 1]`."""

    minimum: float
    maximum: float
    mean: float
    std: float
    quantiles: tuple[float, ...]
    counts: tuple[int, ...]
    edges: tuple[float, ...]

    @classmethod
    def of(cls, values: Array, edges: Array | None = None) -> Distribution | None:
        """The distribution of `values` (any shape), binned by `edges` or by 20 equal bins; None where none is finite."""
        values = np.ravel(values).astype(np.float64)
        values = values[np.isfinite(values)]
        if not len(values):
            return None
        if edges is None:
            apart = np.nextafter(
                values.min(), np.inf
            ) < values.max() and values.max() - values.min() > BINS * np.spacing(abs(values).max())
            edges = (
                np.histogram_bin_edges(values, BINS)
                if apart
                else np.array([values.min(), np.nextafter(values.max(), np.inf)])
            )
        counts, edges = np.histogram(values, edges)
        quantiles = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
        return cls(
            minimum=float(values.min()),
            maximum=float(values.max()),
            mean=float(values.mean()),
            std=float(values.std()),
            quantiles=tuple(quantiles.tolist()),
            counts=tuple(counts.tolist()),
            edges=tuple(edges.tolist()),
        )


@dataclass(frozen=True)
class AuditReport:
    """What `audit` found.

    `endings` counts episodes: `terminated`, `truncated` (`both` are in each), and `cut_off_without_flag` as the loader counted them.
    `actions` has one distribution per column, over at most 2^20 rows. `environment` and `reference_scores` hold JSON values.
    """

    dataset: str
    content_hash: str
    transitions: int
    episodes: int
    findings: tuple[Finding, ...]
    endings: dict[str, int]
    lengths: Distribution | None
    returns: Distribution | None
    rewards: Distribution | None
    actions: tuple[Distribution | None, ...]
    environment: dict[str, Any]
    reference_scores: dict[str, float | None]

    @property
    def ok(self) -> bool:
        """Whether there are no errors (warnings do not count)."""
        return not any(finding.severity == "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {"ok": self.ok, **asdict(self)}

    def figure(self, path: str | os.PathLike[str]) -> Path:
        """Draw the distributions into `path` (its suffix says the format, such as .png or .svg) and return it.

        Raises `ConfigError` for an unknown format, `WriteError` where the file cannot be written; nothing is left half-written.
        """
        from matplotlib.figure import Figure

        target = Path(path)
        shown: list[tuple[str, Distribution | None]] = [
            ("episode return", self.returns),
            ("episode length", self.lengths),
            ("reward", self.rewards),
            *((f"action {i}", column) for i, column in enumerate(self.actions[:MOST_PLOTS])),
        ]
        rows = -(-len(shown) // 3)
        figure = Figure(figsize=(10, 2.6 * rows), layout="constrained")
        figure.suptitle(f"{self.dataset}: {self.transitions:,} transitions, {self.episodes:,} episodes")
        for axes, (name, values) in zip(figure.subplots(rows, 3, squeeze=False).flat, shown, strict=False):
            axes.set(xlabel=name, ylabel="episodes" if name.startswith("episode") else "steps")
            if values is not None:
                axes.stairs(values.counts, values.edges, fill=True)
        for axes in figure.axes[len(shown) :]:
            axes.remove()
        return save_figure(figure, target)
