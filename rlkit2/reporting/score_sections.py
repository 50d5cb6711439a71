"""The parts of a report that speak about scores: headline, learning curves, profiles, who beats whom, and what a budget of evaluations finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from rlkit2.evaluation.aggregates import bandit_performance, expected_online_performance, performance_profile, worst_of
from rlkit2.evaluation.scores import ScoreHistory
from rlkit2.evaluation.statistics import Estimate, bootstrap, probability_of_improvement
from rlkit2.reporting.charts import Line, Span, interval_chart, line_chart
from rlkit2.reporting.comparison import ALL, MISSING, SCORE, Comparison, Row, read_histories
from rlkit2.reporting.groups import Group
from rlkit2.reporting.page import Cell, Number, Tables, figure

Array = NDArray[np.float64]
WORST = 5  # episodes of which the worst is shown
MOST_STEPS = 60  # evaluations of a curve that get an interval
LEVELS = 121  # thresholds of a profile
PULLS = 100  # single episodes that the bandit may spend
SERIES = Mapping[str, int]  # label -> its colour


def scores_section(comparison: Comparison, series: SERIES, tables: Tables) -> str:
    """A table and a figure of intervals for each dataset, then what the columns mean."""
    parts = []
    for dataset in dict.fromkeys(row.dataset for row in comparison.rows):
        rows = [row for row in comparison.rows if row.dataset == dataset]
        unit = "normalised score (%)" if rows[0].unit == SCORE else "return"
        spans = [Span(series[row.label], row.label, row.mean.value, row.mean.low, row.mean.high) for row in rows]
        alt = f"Mean {unit} with 95 % interval on {dataset}: " + "; ".join(
            f"{row.label} {_text(row.mean)}" for row in rows
        )
        drawing = interval_chart(spans, x_label=f"mean {unit} with 95 % interval", alt=alt)
        parts.append(f"<h3>{escape(dataset)}</h3>{_score_table(rows, comparison.baseline, tables)}")
        parts.append(f"<div class='figures'>{figure(drawing, f'{dataset}, over training seeds')}</div>")
    return "".join(parts)


def _score_table(rows: Sequence[Row], baseline: str, tables: Tables) -> str:
    pooled, scored = rows[0].dataset == ALL, rows[0].unit == SCORE
    episodes = [table.shape[1] for row in rows for table in row.scores if np.isfinite(table).all()]
    k = min(WORST, *episodes, WORST)
    header = ["run", "seeds", "episodes", "mean [95 %]", "IQM [95 %]", *(["median"] if pooled else [])]
    header += ["optimality gap [95 %]"] if scored else []
    header += [f"worst of {k}", "last", "best*", f"P(> {baseline})"]
    return tables("scores", header, [_score_cells(row, pooled, scored, k) for row in rows])


def _score_cells(row: Row, pooled: bool, scored: bool, k: int) -> list[Cell]:
    known = all(np.isfinite(table).all() for table in row.scores)
    evaluated = row.step is not None or pooled or known
    cells: list[Cell] = [
        row.label if evaluated else f"{row.label} (no evaluations)",
        Number(row.seeds, str(row.seeds)),
        Number(row.scores[0].shape[1], str(row.scores[0].shape[1]) if evaluated else MISSING),
        estimate(row.mean),
        estimate(row.iqm),
    ]
    cells += [_number(row.median)] if pooled else []
    cells += [estimate(row.gap)] if scored else []
    worst = estimate(worst_of(row.scores, k)) if known else Number(np.nan, MISSING)
    return [*cells, worst, _number(row.last), _number(row.best), estimate(row.improvement, digits=2, nothing="")]


def curves(groups: Sequence[Group], series: SERIES, name: str) -> str:
    """Scores over updates on one dataset: the mean over seeds and its interval as a band."""
    found, notes = read_histories(groups)
    labelled = {
        group.label: [history for history in of_group if history is not None]
        for group, of_group in zip(groups, found, strict=True)
    }
    absent = [label for label, known in labelled.items() if not known]
    said = [*notes, *([f"without evaluations: {', '.join(absent)}"] if absent else [])]
    return history_curves(labelled, groups[0].dataset, series, name, said)


def history_curves(
    histories: Mapping[str, Sequence[ScoreHistory]], dataset: str, series: SERIES, name: str, said: Sequence[str] = ()
) -> str:
    """The same for the histories of every label on a dataset; `said`: what the caption adds."""
    lines = [_curve(label, known, series[label]) for label, known in histories.items() if known]
    if not lines:
        return "<p class='note'>No evaluations.</p>"
    unit = "normalised score (%)" if next(known for known in histories.values() if known)[0].unit == SCORE else "return"
    seeds = np.concatenate([history.per_seed.ravel() for known in histories.values() for history in known])
    ends = [f"{line.label} {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in lines]
    drawing = line_chart(
        name,
        lines,
        x_label="updates",
        y_label=unit,
        alt=f"{unit} over updates on {dataset}, first to last evaluation: " + "; ".join(ends),
        view=_view(seeds),
    )
    caption = "mean over seeds; band: its 95 % interval, which two or three seeds leave wide" + "".join(
        f"; {line}" for line in said
    )
    return f"<div class='figures wide'>{figure(drawing, caption)}</div>"


def _curve(label: str, histories: Sequence[ScoreHistory], series: int) -> Line:
    by_step: dict[int, list[Array]] = {}
    for history in histories:
        for step, scores in zip(history.steps, history.scores, strict=True):
            by_step.setdefault(step, []).extend(scores)
    most = max(map(len, by_step.values()))
    steps = sorted(step for step, rows in by_step.items() if len(rows) == most)  # the same seeds at every point
    kept = steps[:: -(-len(steps) // MOST_STEPS)]
    kept += steps[-1:] if kept[-1] != steps[-1] else []
    found = [bootstrap([_stacked(by_step[step])], resamples=300) for step in kept]
    value, low, high = (np.array([getattr(e, end) for e in found]) for end in ("value", "low", "high"))
    return Line(series, label, np.array(kept, dtype=np.float64), value, low, high)


def _stacked(rows: Sequence[Array]) -> Array:
    """Rows of possibly different numbers of episodes as one table, cut to the shortest."""
    return np.stack([row[: min(map(len, rows))] for row in rows])


def _view(values: Array) -> tuple[float, float] | None:
    """The y axis shows where the seeds are; a band of two seeds may be far wider."""
    known = values[np.isfinite(values)]
    if not known.size:
        return None
    room = 0.15 * float(known.max() - known.min()) or 1.0
    return float(known.min()) - room, float(known.max()) + room


def profiles_section(comparison: Comparison, series: SERIES) -> str:
    """Performance profiles of each dataset whose scores are normalised, and of all together."""
    figures = []
    for number, dataset in enumerate(dict.fromkeys(row.dataset for row in comparison.rows)):
        rows = [row for row in _known(comparison, dataset) if row.unit == SCORE]
        if not rows:
            continue
        means = np.concatenate([table.mean(axis=1) for row in rows for table in row.scores])
        low, high = _view(means) or (0.0, 1.0)
        levels = np.linspace(low, high, LEVELS)
        lines = []
        for row in rows:
            found = performance_profile(row.scores, levels)
            lines.append(Line(series[row.label], row.label, levels, found.share, found.low, found.high))
        half = [f"{line.label} {_half(line):.3g}" for line in lines]
        drawing = line_chart(
            f"profile{number}",
            lines,
            x_label="normalised score (%)",
            y_label="share of seeds above it",
            alt=f"Performance profiles on {dataset}; half of the seeds score above: " + "; ".join(half),
            view=(0.0, 1.0),
        )
        figures.append(figure(drawing, dataset))
    if not figures:
        return ""
    note = (
        "<p class='note'>Share of training seeds that end above a score (Agarwal et al., 2021); higher is better. "
        "Bands: 95 %, Wilson's at every score.</p>"
    )
    return f"{note}<div class='figures'>{''.join(figures)}</div>"


def _half(line: Line) -> float:
    above = line.x[line.y >= 0.5]
    return float(above[-1]) if above.size else float(line.x[0])


def improvement_section(comparison: Comparison, tables: Tables) -> str:
    """Who beats whom: a matrix of probabilities for each dataset."""
    parts = []
    for dataset in dict.fromkeys(row.dataset for row in comparison.rows):
        rows = _known(comparison, dataset)
        if len(rows) < 2:
            continue
        pairs = {
            (i, j): probability_of_improvement(rows[i].scores, rows[j].scores)
            for i in range(len(rows))
            for j in range(i)
        }
        pairs.update({(j, i): _mirrored(found) for (i, j), found in pairs.items()})
        cells: list[list[Cell]] = [
            [row.label, *(estimate(pairs.get((i, j)), digits=2, nothing="") for j in range(len(rows)))]
            for i, row in enumerate(rows)
        ]
        sure = [(i, j + 1) for (i, j), found in pairs.items() if found.low > 0.5 or found.high < 0.5]
        table = tables("improvement", ["P(row > column)", *(row.label for row in rows)], cells, marked=sure)
        parts.append(f"<h3>{escape(dataset)}</h3>{table}")
    if not parts:
        return ""
    note = (
        "<p class='note'>Probability that a new training run of the row scores above one of the column, ties counting one half, "
        "with its 95 % interval (Newcombe); marked where the interval leaves out one half.</p>"
    )
    return note + "".join(parts)


def _mirrored(found: Estimate) -> Estimate:
    return Estimate(1 - found.value, 1 - found.high, 1 - found.low, found.confidence, found.method)


def budget_section(comparison: Comparison, series: SERIES) -> str:
    """What the best of a budget of evaluated policies scores, and what a bandit over single episodes finds."""
    figures = []
    for number, dataset in enumerate(dict.fromkeys(group.dataset for group in comparison.groups)):
        pools = _pools(comparison, dataset, series)
        if not pools:
            continue
        unit = "normalised score (%)" if _known(comparison, dataset)[0].unit == SCORE else "return"
        best, bandit = [], []
        for label, colour, policies in pools:
            budgets = np.arange(1, len(policies) + 1)
            means = [policy.mean() for policy in policies]
            best.append(
                Line(colour, label, budgets.astype(np.float64), expected_online_performance(means, budgets.tolist()))
            )
            pulls = np.arange(1.0, PULLS + 1)
            bandit.append(Line(colour, label, pulls, bandit_performance(policies, PULLS)))
        for kind, lines, x_label, caption in (
            ("best", best, "policies evaluated in full", f"{dataset}: the best of a budget of policies"),
            (
                "bandit",
                bandit,
                "single episodes played",
                f"{dataset}: the policy that a bandit (UCB1) holds for the best",
            ),
        ):
            said = "; ".join(f"{line.label} {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in lines)
            drawing = line_chart(f"{kind}{number}", lines, x_label=x_label, y_label=unit, alt=f"{caption}: {said}")
            figures.append(figure(drawing, caption))
    if not figures:
        return ""
    note = (
        "<p class='note'>Expected score of the policy that is chosen, when the policies of an agent (all its settings and seeds here) are drawn "
        "at random and a budget is spent on evaluating them (Kurenkov and Kolesnikov, 2022; Jackson et al., 2025). It is about these policies: "
        "few of them say little.</p>"
    )
    return f"{note}<div class='figures'>{''.join(figures)}</div>"


def _pools(comparison: Comparison, dataset: str, series: SERIES) -> list[tuple[str, int, list[Array]]]:
    """Of every agent with two policies or more on a dataset: its name, colour, and the episode scores of each policy."""
    rows = {row.label: row for row in _known(comparison, dataset)}
    pools: dict[str, tuple[int, list[Array]]] = {}
    for group in comparison.groups:
        if group.dataset == dataset and group.label in rows:
            pools.setdefault(group.agent, (series[group.label], []))[1].extend(rows[group.label].scores[0])
    return [(agent, colour, policies) for agent, (colour, policies) in pools.items() if len(policies) > 1]


def _known(comparison: Comparison, dataset: str) -> list[Row]:
    """Rows of a dataset with a finite score for every seed."""
    rows = [row for row in comparison.rows if row.dataset == dataset]
    return [row for row in rows if all(np.isfinite(table).all() for table in row.scores)]


def estimate(found: Estimate | None, digits: int = 1, nothing: str = MISSING) -> Number:
    """An estimate as a cell."""
    if found is None:
        return Number(np.nan, nothing)
    return Number(found.value, _text(found, digits), found.low, found.high)


def _text(found: Estimate, digits: int = 1) -> str:
    if np.isnan(found.value):
        return MISSING
    if np.isnan(found.low):
        return f"{found.value:.{digits}f}"
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def _number(value: float) -> Number:
    return Number(value, MISSING if np.isnan(value) else f"{value:.1f}")
