"""One self-contained HTML page about runs: scores, learning curves, diagnostics, configuration. No script, nothing loaded from elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from rlkit2 import __version__
from rlkit2.evaluation.scores import score_summary
from rlkit2.reporting.comparison import Comparison, Group, compare, group_runs
from rlkit2.reporting.figures import learning_curves, metric_curves, metric_groups, svg
from rlkit2.training.run import Run
from rlkit2.training.run_files import write_atomically

OPEN = ("projection", "weight")  # groups of metrics that are shown unfolded
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; background: #fff; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } th, td { padding: .25rem .8rem; text-align: left; }
thead th { border-bottom: 2px solid #444; } tbody tr:nth-child(even) { background: #f6f6f6; } .scroll { overflow-x: auto; }
svg { max-width: 100%; height: auto; } pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 13px; }
summary { cursor: pointer; font-weight: 600; margin: .5rem 0; } .note { color: #555; }
"""


def write_report(
    runs: Sequence[Run],
    path: str | os.PathLike[str],
    *,
    baseline: str | None = None,
    title: str = "rlkit2 report",
    extra: str = "",
) -> Path:
    """Write the page about `runs` to `path` and return it.

    `baseline`: see `compare`. `extra`: HTML put behind the score table. A run that was never evaluated is shown without scores.
    """
    groups = group_runs(runs)
    sections = [f"<h2>Final scores</h2>{comparison_table(compare(runs, baseline=baseline))}", extra]
    for number, dataset in enumerate(dict.fromkeys(group.dataset for group in groups)):
        members = [group for group in groups if group.dataset == dataset]
        scored = any(run.evaluations() for group in members for run in group.runs)
        curves = svg(learning_curves(members), f"curves{number}") if scored else "<p class='note'>No evaluations.</p>"
        sections.append(f"<h2>Learning curves: {escape(dataset)}</h2>{curves}")
    names = [(group, run) for group in groups for run in group.runs]
    sections += [_run_section(group, run, f"run{number}") for number, (group, run) in enumerate(names)]
    page = (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'><style>{STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{''.join(sections)}<p class='note'>Written by rlkit2 {__version__}.</p></body></html>\n"
    )
    target = Path(path)
    write_atomically(target, page)
    return target


def comparison_table(comparison: Comparison) -> str:
    """The comparison as HTML with the words needed to read it."""
    notes = "".join(f"<p class='note'>{escape(note)}</p>" for note in comparison.notes)
    return (
        f"{html_table(comparison.header, comparison.cells())}"
        "<p class='note'>Mean and interquartile mean (IQM) over training seeds of the last evaluation, every dataset counting the same "
        "(Agarwal et al., NeurIPS 2021). Scores are per cent of the way from a random to an expert policy "
        "unless marked as returns. The best evaluation is an oracle: it is chosen with the returns it reports.</p>"
        + notes
    )


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text as HTML."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _run_section(group: Group, run: Run, name: str) -> str:
    """Everything about one run."""
    parts = [
        f"<h2>{escape(group.label)} on {escape(group.dataset)}</h2><p class='note'>{escape(str(run.path))}</p>",
        _seed_table(run),
    ]
    for prefix, metrics in metric_groups([run]).items():
        figure = svg(metric_curves(run, metrics), f"{name}{prefix}")
        parts.append(
            f"<details{' open' if prefix in OPEN else ''}><summary>{escape(prefix)}</summary>{figure}</details>"
        )
    parts += [_json("configuration", run.config), _json("manifest", run.manifest)]
    return "".join(parts)


def _seed_table(run: Run) -> str:
    if not run.evaluations():
        return f"<p class='note'>{escape(run.status)}, never evaluated: no scores.</p>"
    summary = score_summary(run)
    rows = []
    for index, seed in enumerate(summary["seeds"]):
        scores = [summary[column]["per_seed"][index] for column in ("final", "last", "best")]
        stopped = summary["stopped"].get(str(seed))
        state = f"stopped at step {stopped['step']}: {stopped['metric']} was not finite" if stopped else ""
        rows.append([str(seed), *("n/a" if score is None else f"{score:.1f}" for score in scores), state])
    final = summary["final"]
    errors = ", ".join(
        f"{text} {final[key]:.1f}"
        for key, text in (("between_seed_error", "between seeds"), ("within_policy_error", "within these policies"))
        if final[key] is not None
    )
    last, best = summary["last"]["evaluations"], summary["best"]["step"]
    head = ["seed", f"final (step {final['step']})", f"last {last} evaluations", f"best (oracle, step {best})"]
    note = f"<p class='note'>{escape(summary['unit'])}, {final['episodes']} episodes; standard error of the mean: {errors or 'not defined'}.</p>"
    return html_table([*head, ""], rows) + note


def _json(title: str, content: Any) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(json.dumps(content, indent=2))}</pre></details>"
