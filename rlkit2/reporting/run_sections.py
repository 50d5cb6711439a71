"""The parts of a report that speak about the runs themselves: metrics, settings, data, computing, diagnostics, and each run's own files."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit2.data import audit
from rlkit2.data.audit import AuditReport
from rlkit2.data.cache import cached_dataset
from rlkit2.errors import RLKitError, RunError, first_line
from rlkit2.evaluation.scores import score_summary
from rlkit2.reporting.charts import Line, line_chart
from rlkit2.reporting.comparison import Comparison
from rlkit2.reporting.groups import UNSET, Group, flat_settings, settings_table, value_text
from rlkit2.reporting.page import Cell, Number, Tables, figure
from rlkit2.training.run import Run
from rlkit2.training.run_files import read_json

Array = NDArray[np.float64]
OPEN = ("projection", "weight")  # groups of metrics that are shown unfolded
LINES = 2_500_000  # characters that all lines of metrics of a page may take
AUDITED = 2_000_000  # rows of a dataset that is looked through for a page
NO_SERIES = 10_000  # a line that no button of the legend hides
Curves = dict[str, tuple[Array, Array, Array, Array]]  # metric -> steps, mean, lowest, highest seed


def metrics_sections(groups: Sequence[Group], series: Mapping[str, int]) -> list[tuple[str, str]]:
    """A figure per metric and dataset with all runs in it: the mean over seeds, and a band from the lowest to the highest."""
    found = {(group.label, group.dataset): _curves(group) for group in groups}
    total = sum(len(curves) for curves in found.values())
    points = int(
        np.clip(LINES / max(1, total) / 18, 12, 200)
    )  # a point of a line with a band takes about 18 characters
    sections = []
    for number, dataset in enumerate(dict.fromkeys(group.dataset for group in groups)):
        members = [group for group in groups if group.dataset == dataset]
        names = dict.fromkeys(name for group in members for name in found[group.label, dataset])
        by_prefix: dict[str, list[str]] = {}
        for name in names:
            by_prefix.setdefault(name.partition("/")[0] if "/" in name else "other", []).append(name)
        parts: list[str] = []
        for prefix, metrics in by_prefix.items():
            drawings: list[str] = []
            for name in metrics:
                lines = [
                    Line(series[group.label], group.label, *found[group.label, dataset][name])
                    for group in members
                    if name in found[group.label, dataset]
                ]
                drawings.append(
                    figure(_metric_chart(f"m{number}-{len(parts)}-{len(drawings)}", name, lines, points), name)
                )
            state = " open" if prefix in OPEN else ""
            parts.append(
                f"<details{state}><summary>{escape(prefix)}</summary><div class='figures'>{''.join(drawings)}</div></details>"
            )
        note = "<p class='note'>Mean over seeds; band: from the lowest to the highest seed.</p>"
        sections.append((f"Metrics: {dataset}", note + "".join(parts) if parts else "<p class='note'>No metrics.</p>"))
    return sections


def _metric_chart(ident: str, name: str, lines: Sequence[Line], points: int) -> str:
    ends = "; ".join(f"{line.label} {line.y[-1]:.3g}" for line in lines)
    return line_chart(
        ident, lines, x_label="updates", y_label="", alt=f"{name} over updates, last value: {ends}", points=points
    )


def _curves(group: Group) -> Curves:
    """Every metric of a group, over all its seeds."""
    values: dict[str, dict[int, list[float]]] = {}
    for run in group.runs:
        for line in run.metrics():
            step = line["step"]
            for name, value in line.items():
                if value is not None and math.isfinite(value) and name not in ("step", "seed"):
                    values.setdefault(name, {}).setdefault(step, []).append(value)
    return {name: _over_seeds(by_step) for name, by_step in values.items()}


def _over_seeds(by_step: Mapping[int, Sequence[float]]) -> tuple[Array, Array, Array, Array]:
    """Steps, and mean, lowest and highest of the seeds that have a number there."""
    steps = sorted(by_step)
    most = max(map(len, by_step.values()))
    table = np.array([[*by_step[step], *[np.nan] * (most - len(by_step[step]))] for step in steps], dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.array(steps, dtype=np.float64), np.nanmean(table, 1), np.nanmin(table, 1), np.nanmax(table, 1)


def settings_section(groups: Sequence[Group], tables: Tables) -> str:
    """What the letters of the labels stand for, and all settings of all labels with the unusual ones marked."""
    header, rows = settings_table(groups)
    differing = tables("differences", header, rows) if rows else "<p class='note'>No two runs of one agent differ.</p>"
    first = {group.label: flat_settings(group.runs[0]) for group in groups}
    names = sorted({name for settings in first.values() for name in settings})
    body, marked = [], []
    for row, name in enumerate(names):
        cells = [value_text(settings.get(name, UNSET)) for settings in first.values()]
        given = [cell for cell in cells if cell]
        usual = max(set(given), key=given.count, default="")
        marked += [(row, column + 1) for column, cell in enumerate(cells) if cell and cell != usual]
        body.append([name, *cells])
    every = tables("settings", ["setting", *first], body, marked=marked)
    note = "<p class='note'>Marked: not what most runs have. Of a label on several datasets, the first.</p>"
    return f"{differing}<details><summary>all settings</summary>{note}{every}</details>"


def audit_section(groups: Sequence[Group], tables: Tables) -> str:
    """What `rlkit2 data check` finds in the datasets, as far as they lie in this machine's cache."""
    rows: list[list[Cell]] = []
    findings: list[list[Cell]] = []
    for dataset in dict.fromkeys(group.dataset for group in groups):
        config = next(group for group in groups if group.dataset == dataset).runs[0].config["dataset"]
        found = audited(config["content_hash"])
        if isinstance(found, str):
            rows.append([dataset, found, *[Number(np.nan, "")] * 4])
            continue
        rows.append(_audit_row(dataset, found))
        findings += [[dataset, finding.severity, finding.code, finding.message] for finding in found.findings]
    header = ["dataset", "check", "transitions", "episodes", "mean return", "mean length"]
    listed = tables("findings", ["dataset", "severity", "finding", "what"], findings) if findings else ""
    return tables("data", header, rows) + listed


def _audit_row(dataset: str, found: AuditReport) -> list[Cell]:
    returns, lengths = (
        Number(np.nan, "") if part is None else Number(part.mean, f"{part.mean:.4g}")
        for part in (found.returns, found.lengths)
    )
    counted = [Number(count, f"{count:,}") for count in (found.transitions, found.episodes)]
    return [dataset, "no errors" if found.ok else "errors", *counted, returns, lengths]


@cache
def audited(content_hash: str) -> AuditReport | str:
    """The audit of a dataset in the cache, or why there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are findings
            dataset = cached_dataset(content_hash)
            if dataset is None:
                return "not in this machine's cache: rlkit2 data check"
            if len(dataset) > AUDITED:
                return f"{len(dataset):,} rows, too many to look through here: rlkit2 data check"
            return audit(dataset)
    except RLKitError as error:
        return f"cannot be checked: {first_line(error)}"


def compute_section(groups: Sequence[Group], tables: Tables) -> str:
    """Time, speed and machine of every run."""
    rows = [_compute_row(group, run) for group in groups for run in group.runs]
    header = [
        "run",
        "folder",
        "status",
        "seeds",
        "updates",
        "hours",
        "updates/s and seed",
        "device",
        "processors",
        "system",
        "torch",
        "started",
    ]
    hours = sum(cell.value for row in rows if isinstance(cell := row[5], Number) and np.isfinite(cell.value))
    return f"<p>{hours:.2f} hours in all.</p>" + tables("compute", header, rows)


def _compute_row(group: Group, run: Run) -> list[Cell]:
    manifest = run.manifest
    step, seconds = manifest.get("step"), manifest.get("seconds")
    start: Mapping[str, Any] = (manifest.get("starts") or [{}])[-1]
    rate = step / seconds if step and seconds else np.nan
    return [
        group.label,
        str(run.path),
        run.status,
        Number(len(run.config["seeds"]), str(len(run.config["seeds"]))),
        Number(np.nan if step is None else step, "" if step is None else f"{step:,}"),
        Number(np.nan if seconds is None else seconds / 3600, "" if seconds is None else f"{seconds / 3600:.3f}"),
        Number(rate, "" if np.isnan(rate) else f"{rate:.3g}"),
        *(str(start.get(name, "")) for name in ("device", "processors", "platform")),
        str((start.get("versions") or {}).get("torch", "")),
        str(start.get("time", "")),
    ]


def diagnostics_section(
    groups: Sequence[Group], series: Mapping[str, int], folders: Sequence[Path], tables: Tables
) -> str:
    """Calibration of runs, and the reward distances and gradient entanglement in folders: where they have been measured, and nothing elsewhere."""
    calibration = _calibration(groups, series, tables)
    return calibration + "".join(_of_folder(folder, tables) for folder in folders)


def _calibration(groups: Sequence[Group], series: Mapping[str, int], tables: Tables) -> str:
    """What `rlkit2 uncertainty RUN` has left in the runs."""
    rows: list[list[Cell]] = []
    lines = []
    for group in groups:
        for run in group.runs:
            path = run.path / "uncertainty" / "diagnostics.json"
            if not path.exists():
                continue
            try:
                found = read_json(path)
                for index, seed in enumerate(found["seeds"]):
                    numbers = [_number(found[name], index) for name in ("nll", "calibration_error", "auroc")]
                    rows.append([group.label, Number(seed, str(seed)), *numbers, str(found["episodes"])])
                    inside = np.array([share[index] for share in found["coverage"].values()], dtype=np.float64)
                    levels = np.array([float(level) for level in found["coverage"]])
                    lines.append(Line(series[group.label], f"{group.label}, seed {seed}", levels, inside))
            except (RunError, LookupError, TypeError, ValueError) as error:
                rows.append([group.label, *[Number(np.nan, "")] * 4, f"{path} cannot be read: {first_line(error)}"])
    if not rows:
        return ""
    table = tables(
        "calibration", ["run", "seed", "negative log-likelihood", "calibration error", "AUROC", "episodes"], rows
    )
    if not lines:
        return f"<h3>Calibration of TD errors</h3>{table}"
    said = "; ".join(f"{line.label}: {line.y[-1]:.2f} at {line.x[-1]:g}" for line in lines)
    ideal = Line(NO_SERIES, "calibrated", np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    drawing = line_chart(
        "coverage",
        [ideal, *lines],
        x_label="nominal level",
        y_label="share inside",
        alt=f"Share of TD errors inside their interval: {said}",
        view=(0.0, 1.0),
    )
    drawn = figure(drawing, "share of TD errors inside their interval; on the diagonal where calibrated")
    return f"<h3>Calibration of TD errors</h3>{table}<div class='figures'>{drawn}</div>"


def _number(values: Any, index: int) -> Number:
    value = values[index] if isinstance(values, list) else values
    return Number(np.nan, "n/a") if value is None else Number(float(value), f"{value:.3f}")


def _of_folder(folder: Path, tables: Tables) -> str:
    try:
        if (folder / "distances.json").exists():
            return _distances(folder, read_json(folder / "distances.json"), tables)
        return _entanglement(folder, read_json(folder / "report.json"), tables)
    except (RunError, LookupError, TypeError, ValueError) as error:
        return f"<h3>{escape(str(folder))}</h3><p class='note'>cannot be read: {escape(first_line(error))}</p>"


def _distances(folder: Path, found: Mapping[str, Any], tables: Tables) -> str:
    """The matrix that `rlkit2 starc ... --out` wrote."""
    names, ends = found["names"], found["ci"]
    rows: list[list[Cell]] = []
    for i, name in enumerate(names):
        cells: list[Cell] = []
        for j in range(len(names)):
            value = found["values"][i][j]
            low, high = ends[i][j] if ends is not None else (None, None)
            span = "" if low is None or high is None or i == j else f" [{low:.3f}, {high:.3f}]"
            cells.append(Number(np.nan, "n/a") if value is None else Number(value, f"{value:.3f}{span}", low, high))
        rows.append([name, *cells])
    notes = "".join(f"<p class='note'>{escape(note)}</p>" for note in found["notes"])
    return f"<h3>Distances between rewards: {escape(str(folder))}</h3>{tables('distances', ['reward', *names], rows)}{notes}"


def _entanglement(folder: Path, found: Mapping[str, Any], tables: Tables) -> str:
    """The meters that `rlkit2 entangle model --out` wrote."""
    rows: list[list[Cell]] = [
        [
            name,
            str(meter["means"]),
            *(Number(meter[side], f"{meter[side]:.4g}") for side in ("chosen", "rejected")),
            *(
                Number(meter[share], f"{100 * meter[share]:.0f} %")
                for share in ("share_chosen_rises", "share_rejected_falls")
            ),
        ]
        for name, meter in found["meters"].items()
    ]
    header = ["meter", "what moves", "chosen", "rejected", "chosen rises", "rejected falls"]
    about = f"{found['pairs']} pairs, loss {found['loss']}"
    return f"<h3>Entanglement of gradients: {escape(str(folder))}</h3><p class='note'>{escape(about)}</p>{tables('meters', header, rows)}"


def runs_section(comparison: Comparison, tables: Tables) -> str:
    """Each run: the scores of its seeds, and its files."""
    return "".join(_run(group, run, tables) for group in comparison.groups for run in group.runs)


def _run(group: Group, run: Run, tables: Tables) -> str:
    title = f"{group.label} on {group.dataset}: {run.path}"
    mark = "" if run.evaluations() else " <span class='mark'>no evaluations</span>"
    files = "".join(
        _json(name, content) for name, content in (("configuration", run.config), ("manifest", run.manifest))
    )
    return f"<details><summary>{escape(title)}{mark}</summary>{_seed_table(run, tables)}{files}</details>"


def _seed_table(run: Run, tables: Tables) -> str:
    if not run.evaluations():
        return f"<p class='note'>{escape(run.status)}, never evaluated: no scores.</p>"
    summary = score_summary(run)
    rows: list[list[Cell]] = []
    for index, seed in enumerate(summary["seeds"]):
        scores = [summary[column]["per_seed"][index] for column in ("final", "last", "best")]
        stopped = summary["stopped"].get(str(seed))
        state = f"stopped at step {stopped['step']}: {stopped['metric']} was not finite" if stopped else ""
        numbers = [Number(np.nan, "n/a") if score is None else Number(score, f"{score:.1f}") for score in scores]
        rows.append([Number(seed, str(seed)), *numbers, state])
    final = summary["final"]
    errors = ", ".join(
        f"{text} {final[key]:.1f}"
        for key, text in (("between_seed_error", "between seeds"), ("within_policy_error", "within these policies"))
        if final[key] is not None
    )
    last, best = summary["last"]["evaluations"], summary["best"]["step"]
    head = ["seed", f"final (step {final['step']})", f"last {last} evaluations", f"best (oracle, step {best})", "state"]
    note = f"{summary['unit']}, {final['episodes']} episodes; standard error of the mean: {errors or 'not defined'}."
    return tables("seeds", head, rows) + f"<p class='note'>{escape(note)}</p>"


def _json(title: str, content: Any) -> str:
    text = json.dumps(readable(content), indent=1)
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text, quote=False)}</pre></details>"


def readable(content: Any) -> Any:
    """JSON that stands as text within JSON as what it says, so that nothing is escaped twice."""
    if isinstance(content, Mapping):
        return {name: readable(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [readable(value) for value in content]
    if isinstance(content, str) and content[:1] in "{[" and content[-1:] in "}]" and len(content) > 1:
        try:
            return readable(json.loads(content))
        except (ValueError, RecursionError):
            return content
    return content
