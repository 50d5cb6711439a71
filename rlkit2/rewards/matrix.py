"""`RewardDistanceMatrix`: the distances between several rewards, with names, intervals, tables and pictures."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from rlkit2.errors import MissingExtraError, RewardError
from rlkit2.files import write_atomically

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class RewardDistanceMatrix:
    """Distances between K rewards under one metric.

    `values [K, K]` float64, symmetric, NaN where there is no number to give; `names [K]`; `trivial [K]` marks rewards under which all
    policies are equal, `insufficient [K]` those that the data cannot tell from trivial ones, `poor [K]` those that the features cannot
    express; `ci [K, K, 2]` the bounds of the intervals or None; `settings` says what was computed, `diagnostics` what to judge it by, `notes`
    what its reader should know. `pseudometric [K, K]`, where there is one, are distances that satisfy the triangle inequality, for pictures that
    need it.
    """

    values: Floats
    names: tuple[str, ...]
    trivial: Flags
    ci: Floats | None = None
    insufficient: Flags | None = None
    poor: Flags | None = None
    pseudometric: Floats | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        width = max(8, *(len(name) for name in self.names))
        lines = [" " * width + "".join(f"{name:>{width + 1}}" for name in self.names)]
        for name, row in zip(self.names, self.values, strict=True):
            lines.append(f"{name:<{width}}" + "".join(f"{value:>{width + 1}.4f}" for value in row))
        return "\n".join([*lines, *self.notes])

    def pairs(self) -> Iterator[tuple[int, int]]:
        """The K (K - 1) / 2 pairs of different rewards."""
        return ((i, j) for i in range(len(self)) for j in range(i + 1, len(self)))

    def status(self, index: int) -> str:
        """`"trivial"`, `"insufficient data"`, `"features too poor"` or `""` for one reward."""
        said = {"trivial": self.trivial, "insufficient data": self.insufficient, "features too poor": self.poor}
        return next((what for what, flags in said.items() if flags is not None and flags[index]), "")

    def to_frame(self) -> Any:
        """A pandas DataFrame `[K, K]` with the names on both axes; raises `MissingExtraError` where pandas is not installed."""
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError(
                "pandas is not installed; install it with: pip install pandas, or use to_csv() or to_json()"
            ) from error
        return pandas.DataFrame(self.values, index=list(self.names), columns=list(self.names))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON, NaN as None."""
        return {
            "names": list(self.names),
            "values": _plain(self.values),
            "ci": None if self.ci is None else _plain(self.ci),
            "status": [self.status(index) for index in range(len(self))],
            "settings": _plain(self.settings),
            "diagnostics": _plain(self.diagnostics),
            "notes": list(self.notes),
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Everything as JSON text, also written to `path` where one is given."""
        return _written(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", path)

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """One line per pair, `reward_a,reward_b,distance,low,high` (no number: empty), also written to `path` where one is given."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("reward_a", "reward_b", "distance", "low", "high"))
        for i, j in self.pairs():
            bounds = (np.nan, np.nan) if self.ci is None else self.ci[i, j]
            numbers = ("" if np.isnan(x) else repr(float(x)) for x in (self.values[i, j], *bounds))
            table.writerow((self.names[i], self.names[j], *numbers))
        return _written(text.getvalue(), path)

    def order(self) -> list[int]:
        """The rewards with like ones beside each other (average linkage); those without numbers come last."""
        kept = self._finite()
        if len(kept) < 3:
            return [*kept, *(i for i in range(len(self)) if i not in kept)]
        leaves = hierarchy.leaves_list(self._linkage(kept))
        return [*(kept[i] for i in leaves), *(i for i in range(len(self)) if i not in kept)]

    def heatmap(self, axes: Axes | None = None, *, title: str | None = None) -> Axes:
        """Draw the matrix, like rewards beside each other, with every number and its interval written in."""
        size = 2.2 + 0.95 * len(self)
        axes = axes or Figure(figsize=(size + 1, size), layout="constrained").subplots()
        order = self.order()
        shown = self.values[np.ix_(order, order)]
        top = 2.0 if not np.isfinite(shown).any() else max(2.0, float(np.nanmax(shown)))
        image = axes.imshow(np.ma.masked_invalid(shown), vmin=0, vmax=top, cmap="viridis_r")
        names = [self.names[i] + (f"\n({self.status(i)})" if self.status(i) else "") for i in order]
        axes.set_xticks(range(len(self)), names, rotation=40, ha="right")
        axes.set_yticks(range(len(self)), names)
        if len(self) <= 20:
            for (row, i), (column, j) in ((a, b) for a in enumerate(order) for b in enumerate(order)):
                dark = bool(self.values[i, j] > 0.55 * top)
                axes.text(
                    column, row, self._cell(i, j), ha="center", va="center", color="w" if dark else "k", fontsize=8
                )
        axes.figure.colorbar(image, ax=axes, label=self._label(), shrink=0.8)
        axes.set_title(title or "")
        return axes

    def dendrogram(self, axes: Axes | None = None, *, title: str | None = None) -> Axes:
        """Draw the hierarchical clustering (average linkage); raises `RewardError` where fewer than two rewards have numbers."""
        kept = self._finite(least=2)
        axes = axes or Figure(figsize=(6, 1.2 + 0.4 * len(kept)), layout="constrained").subplots()
        hierarchy.dendrogram(
            self._linkage(kept), labels=[self.names[i] for i in kept], orientation="right", color_threshold=0, ax=axes
        )
        axes.set_xlabel(self._label(picture=True))
        axes.set_title(title or "")
        return axes

    def mds(self, axes: Axes | None = None, *, title: str | None = None) -> Axes:
        """Draw the rewards as points of a plane whose distances come as near as they can (classical scaling)."""
        kept = self._finite(least=2)
        points, share = classical_scaling(self._metric()[np.ix_(kept, kept)])
        axes = axes or Figure(figsize=(5, 5), layout="constrained").subplots()
        axes.scatter(points[:, 0], points[:, 1], s=30)
        together: dict[tuple[float, float], list[str]] = {}  # rewards on the same spot share one label
        for (x, y), index in zip(points.round(2), kept, strict=True):
            together.setdefault((float(x), float(y)), []).append(self.names[index])
        for place, names in together.items():
            axes.annotate(", ".join(names), place, textcoords="offset points", xytext=(5, 4), fontsize=9)
        axes.set_aspect("equal", adjustable="datalim")
        axes.margins(0.2)
        axes.set_xlabel(f"{self._label(picture=True)}\n{100 * share:.0f} % of the squared distances are in the plane")
        axes.set_title(title or "")
        return axes

    def _metric(self) -> Floats:
        return self.values if self.pseudometric is None else self.pseudometric

    def _finite(self, least: int = 0) -> list[int]:
        """Rewards whose distances to one another are numbers."""
        metric = self._metric()
        alone = ~np.isfinite(metric)
        np.fill_diagonal(alone, False)
        mostly = np.flatnonzero(np.isfinite(np.diag(metric)) & (alone.sum(1) < max(len(self) - 1, 1)))
        kept = [int(i) for i in mostly if not alone[i, mostly].any()]
        if len(kept) < least:
            raise RewardError("fewer than two rewards have distances; there is nothing to draw")
        return kept

    def _linkage(self, kept: list[int]) -> Floats:
        between = self._metric()[np.ix_(kept, kept)]
        return np.asarray(hierarchy.linkage(squareform(between, checks=False), "average"), dtype=np.float64)

    def _label(self, *, picture: bool = False) -> str:
        label = str(self.settings.get("label", "distance"))
        return f"{label} (plug-in)" if picture and self.pseudometric is not None else label

    def _cell(self, i: int, j: int) -> str:
        if np.isnan(self.values[i, j]):
            return "n/a"
        interval = "" if self.ci is None or i == j else f"\n{self.ci[i, j, 0]:.2f}-{self.ci[i, j, 1]:.2f}"
        return f"{self.values[i, j]:.2f}{interval}"


def classical_scaling(distances: Floats) -> tuple[Floats, float]:
    """Points `[K, 2]` for distances `[K, K]` and the share of the squared distances they account for (Torgerson 1952)."""
    centred = np.eye(len(distances)) - 1 / len(distances)
    sizes, axes = np.linalg.eigh(-0.5 * centred @ distances**2 @ centred)
    kept = np.maximum(sizes[::-1][:2], 0)
    points = axes[:, ::-1][:, :2] * np.sqrt(kept)
    total = float(np.abs(sizes).sum())
    return points, float(kept.sum()) / total if total > 0 else 1.0


def named_rewards(rewards: Mapping[str, Any] | Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Names and rewards of a mapping, or of a sequence, array `[K, ...]` or iterator, whose members are called `reward_0`, `reward_1`, ..."""
    if isinstance(rewards, Mapping):
        return ((str(name), reward) for name, reward in rewards.items())
    return ((f"reward_{index}", reward) for index, reward in enumerate(rewards))


def _plain(value: Any) -> Any:
    """Arrays as nested lists, NaN as None."""
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _written(text: str, path: str | os.PathLike[str] | None) -> str:
    if path is not None:
        write_atomically(path, text)
    return text
