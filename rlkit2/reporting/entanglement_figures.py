"""Figures of gradient entanglement, and one self-contained HTML page with them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rlkit2.entanglement.geometry import REGIMES
from rlkit2.errors import ConfigError
from rlkit2.files import write_atomically
from rlkit2.reporting.figures import svg
from rlkit2.reporting.page import Tables, page

Record = Mapping[str, Any]
COLORS = {"ideal": "C2", "both_down": "C3", "both_up": "C1", "inverted": "C4", "still": "0.6", "undecided": "0.8"}
BINS = np.linspace(-1, 1, 41)


def logp_curves(records: Sequence[Record]) -> Figure:
    """Mean log-probability of chosen and rejected, and their margin, over optimiser steps."""
    _need(records)
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [record["step"] for record in records]
    chosen, rejected = (np.array([record[f"logp_{side}"] for record in records]) for side in ("chosen", "rejected"))
    left.plot(steps, chosen, marker=".", label="chosen")
    left.plot(steps, rejected, marker=".", label="rejected")
    left.set(xlabel="optimiser steps", title="mean log-probability")
    left.legend(frameon=False)
    right.plot(steps, chosen - rejected, marker=".", color="C2")
    right.set(xlabel="optimiser steps", title="margin: chosen - rejected")
    for axes in (left, right):
        axes.grid(alpha=0.25)
    return figure


def regime_map(report: Record) -> Figure:
    """Every pair at `(<g_w,g_l>/|g_w|^2, <g_w,g_l>/|g_l|^2)`: right of `u` the chosen falls, above `1/u` the rejected rises.

    Points are coloured by their regime; with realised changes (a record of the probe) the mark tells whether the chosen really rose.
    """
    pairs = report["per_pair"]
    x, y = np.array(pairs["c_w"]), np.array(pairs["c_l"])
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes = figure.subplots()
    realised = report.get("changes", {}).get("realised")
    rose = np.array(realised[0]) > 0 if realised else None
    regimes = np.array(pairs["regime"])
    for name in REGIMES:
        for mark, which in (
            (("^", rose), ("v", None if rose is None else ~rose)) if rose is not None else (("o", None),)
        ):
            chosen = (regimes == name) if which is None else (regimes == name) & which
            if chosen.any():
                label = name.replace("_", " ") + (
                    "" if rose is None else ", chosen rose" if mark == "^" else ", chosen fell"
                )
                axes.scatter(x[chosen], y[chosen], s=28, marker=mark, color=COLORS[name], label=label, alpha=0.8)
    ratios = [w / n for w, n in zip(pairs["d_w"], pairs["d_l"], strict=True) if w * n > 0]
    u = float(np.median(ratios)) if ratios else 1.0
    axes.axvline(u, color="0.3", linewidth=1, linestyle="--")
    axes.axhline(1 / u, color="0.3", linewidth=1, linestyle="--")
    axes.set(
        xlabel=r"$\langle g_w, g_l\rangle / |g_w|^2$  (chosen falls right of the line)",
        ylabel=r"$\langle g_w, g_l\rangle / |g_l|^2$  (rejected rises above it)",
        title=f"what one step does to each pair (u = {u:.3g})",
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return figure


def cosine_histogram(records: Sequence[Record]) -> Figure:
    """Distribution of the pairs' cosines over optimiser steps: one column per record, darker where more pairs are."""
    _need(records)
    counts = np.stack([np.histogram(record["per_pair"]["cosine"], BINS)[0] for record in records], 1)
    figure = Figure(figsize=(6.5, 3.4), layout="constrained")
    axes = figure.subplots()
    edges = _edges([record["step"] for record in records])
    image = axes.pcolormesh(edges, BINS, counts, cmap="Blues")
    means = [record["cosine"]["mean"] for record in records]
    axes.plot([record["step"] for record in records], means, color="C3", marker=".", label="mean")
    figure.colorbar(image, ax=axes, label="pairs")
    axes.set(xlabel="optimiser steps", ylabel="cosine of the two gradients", ylim=(-1, 1))
    axes.legend(frameon=False)
    return figure


def _edges(steps: Sequence[float]) -> np.ndarray[Any, Any]:
    """Borders between neighbouring steps."""
    x = np.array([0 if step is None else step for step in steps], dtype=float)
    if len(x) == 1:
        return np.array([x[0] - 0.5, x[0] + 0.5])
    middle = (x[1:] + x[:-1]) / 2
    return np.concatenate([[2 * x[0] - middle[0]], middle, [2 * x[-1] - middle[-1]]])


def token_heatmap(cosine: Any, labels_w: Sequence[str], labels_l: Sequence[str]) -> Figure:
    """Cosines between the gradients of single tokens: rows are the chosen's tokens, columns the rejected's.

    Raises:
        ConfigError: a side has another number of labels than tokens.
    """
    values = np.asarray(cosine, dtype=float)
    if values.shape != (len(labels_w), len(labels_l)):
        raise ConfigError(f"{values.shape} cosines need as many labels, not {len(labels_w)} and {len(labels_l)}")
    size = (2.2 + 0.32 * len(labels_l), 1.6 + 0.3 * len(labels_w))
    figure = Figure(figsize=(max(size[0], 4.5), max(size[1], 3.2)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    axes.set_xticks(range(len(labels_l)), [_plain(label) for label in labels_l], rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(labels_w)), [_plain(label) for label in labels_w], fontsize=8)
    axes.set(xlabel="tokens of the rejected", ylabel="tokens of the chosen")
    figure.colorbar(image, ax=axes, label="cosine of the tokens' gradients")
    return figure


def _plain(label: str) -> str:
    return label.replace("$", r"\$").replace("\n", "\\n")


def own_cross_bars(records: Sequence[Record]) -> Figure:
    """How much of a batch step comes from a pair's own gradients and how much from all other pairs, over optimiser steps."""
    _need(records)
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(records))
    axes.bar(places - 0.2, [record["own_size"] for record in records], 0.4, label="own pair")
    axes.bar(places + 0.2, [record["cross_size"] for record in records], 0.4, label="other pairs")
    axes.set_xticks(places, [str(record.get("step", "")) for record in records], rotation=45, fontsize=8)
    axes.set(xlabel="optimiser steps", ylabel="mean size of the rate")
    axes.legend(frameon=False)
    return figure


def predicted_realised(records: Sequence[Record]) -> Figure:
    """Real change of every log-probability against the prediction from the optimiser's real step, one point per pair and record."""
    _need(records)
    figure = Figure(figsize=(4.8, 4.4), layout="constrained")
    axes = figure.subplots()
    ends = 1e-12
    for index, side in enumerate(("chosen", "rejected")):
        x, y = (
            np.concatenate([record["changes"][name][index] for record in records]) for name in ("optimizer", "realised")
        )
        axes.scatter(x, y, s=14, alpha=0.7, label=side)
        ends = max(ends, float(np.abs(np.concatenate([x, y])).max()))
    axes.plot([-ends, ends], [-ends, ends], color="0.4", linewidth=0.8)
    axes.set(
        xlabel="predicted: inner product with the real update",
        ylabel="real change",
        title="change of log-probabilities in one step",
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


def ranking_figure(lines: Sequence[Record], by: str = "head_gap") -> Figure:
    """Lines of `rank_pairs`: the distribution of the cheap score, and against it what the measured pairs' gradients say."""
    scored = [line for line in lines if by in line]
    measured = [line for line in scored if "c_w" in line]
    if not scored:
        raise ConfigError(f"no line of the ranking has the score {by!r}")
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _, edges, _ = left.hist([line[by] for line in scored], bins=40, color="0.7", label="all pairs")
    left.set(xlabel=by, ylabel="pairs", title="cheap score of all pairs")
    right.set(xlabel=by, ylabel=r"$c_w = \langle g_w, g_l\rangle / |g_w|^2$", title="gradients of the worst pairs")
    if measured:
        left.hist([line[by] for line in measured], bins=edges, color="C3", alpha=0.7, label="gradients measured")
        sizes = [line["tokens_chosen"] for line in measured]
        points = right.scatter([line[by] for line in measured], [line["c_w"] for line in measured], c=sizes, s=14)
        figure.colorbar(points, ax=right, label="tokens of the chosen")
        right.axhline(1, color="0.3", linewidth=1, linestyle="--")  # above it a DPO step on the pair lowers its chosen
    left.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    return figure


def _need(records: Sequence[Record]) -> None:
    if not records:
        raise ConfigError("no records to draw: the file has no lines yet (is `every` larger than the number of steps?)")


# --- pages -----------------------------------------------------------------------------------------------------------------------


def write_training_page(
    records: Sequence[Record], path: str | os.PathLike[str], *, title: str = "entanglement"
) -> Path:
    """All figures of a training's records (the callback's JSON lines) in one page."""
    sections = [
        _section("Log-probabilities", logp_curves(records), "curves"),
        _section("Cosines", cosine_histogram(records), "cosines"),
        _section("Regimes at the last record", regime_map(records[-1]), "regimes"),
        _section("Own and cross parts of a batch step", own_cross_bars(records), "parts"),
        _section("Predicted and real change", predicted_realised(records), "changes"),
        f"<h2>Meters at the last record</h2>{_meters(records[-1])}",
        _dry_runs(records[-1].get("dry_run", {})),
    ]
    return _page(path, title, sections)


def write_model_page(
    report: Record,
    path: str | os.PathLike[str],
    *,
    title: str = "entanglement",
    labels: tuple[Sequence[str], Sequence[str]] | None = None,
) -> Path:
    """A page about one measurement (`diagnose`); `labels` are the tokens of the pair in `report["tokens"]`."""
    records = [{**report, "step": 0}]
    sections = [
        f"<p>{report['pairs']} pairs, loss {escape(str(report['loss']))}, method {escape(report['method'])}, {escape(report['parameters'])}.</p>",
        "<p><strong>A proxy: the output matrix alone overlooks entanglement.</strong></p>" if report["proxy"] else "",
        f"<h2>Meters</h2>{_meters(report)}",
        f"<h2>Remedies</h2>{_remedies(report['remedies'])}",
        _section("Regimes", regime_map(report), "regimes"),
        _section("Cosines", cosine_histogram(records), "cosines"),
        _section("Own and cross parts of a batch step", own_cross_bars(records), "parts"),
    ]
    if labels is not None and "tokens" in report:
        heading = f"Tokens of pair {report['tokens']['pair']}, whose chosen suffers most"
        sections.append(_section(heading, token_heatmap(report["tokens"]["cosine"], *labels), "tokens"))
    return _page(path, title, sections)


def _section(heading: str, figure: Figure, name: str) -> str:
    return f"<h2>{escape(heading)}</h2><div class='picture'>{svg(figure, name)}</div>"


def _meters(report: Record) -> str:
    header = ("meter", "what moves", "chosen", "rejected", "chosen rises", "rejected falls")
    rows = [
        (
            name,
            meter["means"],
            f"{meter['chosen']:.4g}",
            f"{meter['rejected']:.4g}",
            f"{100 * meter['share_chosen_rises']:.0f} %",
            f"{100 * meter['share_rejected_falls']:.0f} %",
        )
        for name, meter in report["meters"].items()
    ]
    return Tables()("meters", header, rows)


def _remedies(remedies: Record) -> str:
    header = ("remedy", "ideal", "both down", "both up", "batch rate of chosen", "batch rate of rejected")
    shares = ("share_ideal", "share_both_down", "share_both_up")
    rows = [
        (
            name,
            *(f"{100 * found[s]:.0f} %" for s in shares),
            f"{found['batch_chosen']:.4g}",
            f"{found['batch_rejected']:.4g}",
        )
        for name, found in remedies.items()
    ]
    return Tables()("remedies", header, rows)


def _dry_runs(dry_run: Record) -> str:
    if not dry_run:
        return ""
    header = ("remedy", "batch rate of chosen", "batch rate of rejected", "chosen rises", "rejected falls")
    rows = [
        (
            name,
            f"{found['rate_chosen']:.4g}",
            f"{found['rate_rejected']:.4g}",
            f"{100 * found['share_chosen_rises']:.0f} %",
            f"{100 * found['share_rejected_falls']:.0f} %",
        )
        for name, found in dry_run.items()
    ]
    return f"<h2>What a remedy would have changed</h2>{Tables()('changes', header, rows)}"


def _page(path: str | os.PathLike[str], title: str, sections: Sequence[str]) -> Path:
    target = Path(path)
    write_atomically(target, page(title, [("", section) for section in sections]))
    return target
