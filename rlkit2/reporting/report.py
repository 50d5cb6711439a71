"""One self-contained HTML page about runs: scores, learning curves, comparisons, metrics, settings, data, computing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from rlkit2.files import write_atomically
from rlkit2.reporting.comparison import Comparison, compare
from rlkit2.reporting.groups import Group
from rlkit2.reporting.page import Tables, legend, page
from rlkit2.reporting.run_sections import (
    audit_section,
    compute_section,
    diagnostics_section,
    metrics_sections,
    runs_section,
    settings_section,
)
from rlkit2.reporting.score_sections import (
    budget_section,
    curves,
    improvement_section,
    profiles_section,
    scores_section,
)
from rlkit2.training.run import Run


def write_report(
    runs: Sequence[Run],
    path: str | os.PathLike[str],
    *,
    baseline: str | None = None,
    title: str = "rlkit2 report",
    extra: str = "",
    folders: Sequence[str | os.PathLike[str]] = (),
) -> Path:
    """Write the page about `runs` to `path` and return it.

    `baseline`: see `compare`. `extra`: HTML put behind the score table. `folders`: what `rlkit2 starc ... --out` and `rlkit2 entangle model --out`
    wrote, shown among the diagnostics. A run that was never evaluated is shown without scores.
    """
    target = Path(path)
    write_atomically(target, report_page(runs, baseline=baseline, title=title, extra=extra, folders=folders))
    return target


def report_page(
    runs: Sequence[Run],
    *,
    baseline: str | None = None,
    title: str = "rlkit2 report",
    extra: str = "",
    folders: Sequence[str | os.PathLike[str]] = (),
    left_out: Sequence[str] = (),
    stamp: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """The page of `write_report` as text. `left_out`: lines about what is not on it; `stamp`: see `page`; `progress`: (parts done, all)."""
    comparison = compare(runs, baseline=baseline)
    groups = comparison.groups
    series = {label: index for index, label in enumerate(dict.fromkeys(group.label for group in groups))}
    tables = Tables()
    parts: list[Callable[[], list[tuple[str, str]]]] = [
        lambda: [
            ("Final scores", _notes(left_out) + scores_section(comparison, series, tables) + _notes(comparison.notes))
        ],
        lambda: [("", extra)],
        lambda: _curve_sections(comparison, series),
        lambda: [("Performance profiles", profiles_section(comparison, series))],
        lambda: [("Probability of improvement", improvement_section(comparison, tables))],
        lambda: [("What a budget of evaluations finds", budget_section(comparison, series))],
        lambda: [("Settings", settings_section(groups, tables))],
        lambda: [("Data", audit_section(groups, tables))],
        lambda: [("Computing", compute_section(groups, tables))],
        lambda: [("Diagnostics", diagnostics_section(groups, series, [Path(folder) for folder in folders], tables))],
        lambda: metrics_sections(groups, series),
        lambda: [("Runs", runs_section(comparison, tables))],
    ]
    sections = []
    for number, part in enumerate(parts):
        sections += [(heading, body) for heading, body in part() if body]
        progress(number + 1, len(parts))
    return page(title, sections, top=legend(list(series)), stamp=stamp)


def _curve_sections(comparison: Comparison, series: dict[str, int]) -> list[tuple[str, str]]:
    by_dataset: dict[str, list[Group]] = {}
    for group in comparison.groups:
        by_dataset.setdefault(group.dataset, []).append(group)
    return [
        (f"Learning curves: {dataset}", curves(members, series, f"curves{number}"))
        for number, (dataset, members) in enumerate(by_dataset.items())
    ]


def _notes(lines: Sequence[str]) -> str:
    return "".join(f"<p class='note'>{escape(line)}</p>" for line in lines)
