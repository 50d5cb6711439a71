"""Runs side by side: who they are, what they scored, and whether the difference is one.

Statistics are those of Agarwal et al. (NeurIPS 2021): mean and interquartile mean over seeds, every dataset counting the same, and the probability of
improvement over a baseline; intervals are those of `rlkit2.evaluation.statistics`, which hold their level with few seeds.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit2.errors import ConfigError
from rlkit2.evaluation.aggregates import optimality_gap, pooled_median
from rlkit2.evaluation.evaluation import Evaluation, json_numbers, number
from rlkit2.evaluation.scores import ScoreHistory, score_history
from rlkit2.evaluation.statistics import Estimate, bootstrap, pooled_iqm, probability_of_improvement
from rlkit2.reporting.groups import Group, group_runs, open_runs, settings_table, without_repeats
from rlkit2.training.run import Run

__all__ = ["Comparison", "Group", "Row", "compare", "group_runs", "open_runs"]

Array = NDArray[np.float64]
ALL = "all datasets"
MISSING = "n/a"
SCORE = "normalized score"


@dataclass(frozen=True)
class Row:
    """One line of a comparison; `scores` `[S, E]` per dataset it covers (one, or all of them).

    `median`: over datasets, of the mean over seeds. `gap`: optimality gap to the expert, None for returns. `improvement`: None for the baseline
    itself, and where the baseline was not run.
    """

    label: str
    dataset: str
    unit: str
    step: int | None
    scores: tuple[Array, ...]
    mean: Estimate
    iqm: Estimate
    last: float
    best: float
    improvement: Estimate | None
    median: float
    gap: Estimate | None

    @property
    def seeds(self) -> int:
        """Seeds in all."""
        return sum(len(scores) for scores in self.scores)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "label": self.label,
            "dataset": self.dataset,
            "unit": self.unit,
            "step": self.step,
            "seeds": self.seeds,
            "episodes": min(scores.shape[1] for scores in self.scores),
            "mean": _estimate(self.mean),
            "iqm": _estimate(self.iqm),
            "median": number(self.median),
            "optimality_gap": _estimate(self.gap),
            "last_evaluations": number(self.last),
            "best_evaluation_oracle": number(self.best),
            "per_seed": [json_numbers(scores.mean(axis=1)) for scores in self.scores],
            "probability_of_improvement": _estimate(self.improvement),
        }


@dataclass(frozen=True)
class Comparison:
    """Rows over labels and datasets. `baseline` is the label the probabilities of improvement refer to; `notes` say what a reader must know.

    `groups`: the runs behind the rows, whose settings say what the letters of the labels stand for.
    """

    rows: tuple[Row, ...]
    baseline: str
    notes: tuple[str, ...] = ()
    groups: tuple[Group, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "baseline": self.baseline,
            "rows": [row.to_dict() for row in self.rows],
            "settings": {group.label: dict(group.settings) for group in self.groups if group.settings},
            "notes": list(self.notes),
        }

    @property
    def header(self) -> list[str]:
        """Column titles of `cells`."""
        return [
            "dataset",
            "run",
            "seeds",
            "mean [95 %]",
            "IQM [95 %]",
            "last",
            "best*",
            f"P(> {self.baseline})",
        ]

    def cells(self) -> list[list[str]]:
        """The table as text."""
        return [
            [
                row.dataset + ("" if row.unit == SCORE else " (return)"),
                row.label,
                str(row.seeds),
                _text(row.mean),
                _text(row.iqm),
                _number(row.last),
                _number(row.best),
                "" if row.improvement is None else _text(row.improvement, digits=2),
            ]
            for row in self.rows
        ]

    @property
    def settings(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table of what the letters of the labels stand for; no rows where there are no letters."""
        return settings_table(self.groups)

    def markdown(self) -> str:
        """The table in Markdown, that of the settings below it, and the notes."""
        tables = [(self.header, self.cells()), self.settings]
        texts = [markdown_table(header, rows) for header, rows in tables if rows]
        return "\n".join([*texts, *(f"{note}\n" for note in self.notes)])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def compare(
    runs: Sequence[Run],
    *,
    baseline: str | None = None,
    last: int = 5,
    evaluate: Callable[[Run], Evaluation] | None = None,
) -> Comparison:
    """Compare the final scores of runs.

    `baseline`: label, agent name or run path (default: the first run). `last`: evaluations behind the "last evaluations" column. `evaluate`: scores
    the final policies anew instead of reading the last lines of `evaluations.jsonl`; without it a run that was never evaluated has no
    score, and a note.
    """
    kept, repeated = without_repeats(runs)
    groups = group_runs(kept)
    base = _baseline(groups, baseline)
    datasets = list(dict.fromkeys(group.dataset for group in groups))
    table: dict[tuple[str, str], _GroupScores] = {}
    notes: list[str] = []
    for dataset in datasets:
        members = [group for group in groups if group.dataset == dataset]
        found, said = _played(members, evaluate) if evaluate is not None else _recorded(members, last)
        table.update({(group.label, dataset): scores for group, scores in zip(members, found, strict=True)})
        notes += said
    rows, said = _rows(table, base)
    notes = [*_methods(rows), *repeated, *notes, *said, *_stopped(groups)]
    if evaluate is None:
        notes.insert(0, _columns(last))
    return Comparison(tuple(rows), base, tuple(notes), tuple(groups))


def compare_histories(histories: Mapping[tuple[str, str], ScoreHistory], *, baseline: str, last: int = 5) -> Comparison:
    """Compare the last evaluations of (label, dataset) by what was recorded of them, without the folders of the runs.

    `baseline`: one of the labels. `last`: see `compare`.
    """
    rows, said = _rows({key: _of_histories([history], last) for key, history in histories.items()}, baseline)
    return Comparison(tuple(rows), baseline, (*_methods(rows), *said))


@dataclass(frozen=True)
class _GroupScores:
    final: Array  # [S, E]
    last: float
    best: float
    step: int | None
    unit: str | None  # None: never evaluated


def _rows(table: Mapping[tuple[str, str], _GroupScores], base: str) -> tuple[list[Row], list[str]]:
    """A row for every label on every dataset, those over all datasets, and what a reader must know about the latter."""
    rows = [
        _row(label, dataset, [scores], [table[base, dataset]] if (base, dataset) in table else None, base)
        for (label, dataset), scores in table.items()
    ]
    pooled, said = _over_datasets(table, list(dict.fromkeys(dataset for _, dataset in table)), base)
    return [*rows, *pooled], said


def _over_datasets(
    table: Mapping[tuple[str, str], _GroupScores], datasets: Sequence[str], base: str
) -> tuple[list[Row], list[str]]:
    """Rows over all datasets, of the labels that were run on each; returns of different environments are not averaged."""
    if len(datasets) < 2:
        return [], []
    if returns := [dataset for (_, dataset), scores in table.items() if scores.unit not in (SCORE, None)]:
        names = ", ".join(dict.fromkeys(returns))
        return [], [f"no row over all datasets: there are returns and no scores on {names}"]
    labels = list(dict.fromkeys(label for label, _ in table))
    full = [label for label in labels if all((label, dataset) in table for dataset in datasets)]
    rows = []
    for label in full:
        against = [table[base, dataset] for dataset in datasets] if base in full else None
        rows.append(_row(label, ALL, [table[label, dataset] for dataset in datasets], against, base))
    absent = [label for label in labels if label not in full]
    return rows, [f"not in the rows over all datasets, since not run on each: {', '.join(absent)}"] if absent else []


def _played(groups: Sequence[Group], evaluate: Callable[[Run], Evaluation]) -> tuple[list[_GroupScores], list[str]]:
    """Scores of the final policies of groups on one dataset, played anew; all in one unit."""
    results = [[evaluate(run) for run in group.runs] for group in groups]
    scored = all(result.reference is not None for found in results for result in found)
    nan = float("nan")
    tables = []
    for found in results:
        parts = [result.normalized_scores if scored else result.returns for result in found]
        final = np.concatenate([part for part in parts if part is not None])
        tables.append(_GroupScores(final, nan, nan, None, SCORE if scored else "return"))
    return tables, []


def _recorded(groups: Sequence[Group], last: int) -> tuple[list[_GroupScores], list[str]]:
    """Scores of the last evaluations of groups on one dataset, all in one unit, and what a reader must know about them."""
    histories, notes = read_histories(groups)
    tables = []
    for group, found in zip(groups, histories, strict=True):
        evaluated = [history for history in found if history is not None]
        episodes = min((history.scores[-1].shape[1] for history in evaluated), default=1)
        missing = []
        for run, history in zip(group.runs, found, strict=True):
            if history is None:
                told = f"{group.label} on {group.dataset}: {run.path} has no evaluations ({run.status})"
                if evaluated and not run.manifest.get("stopped"):
                    notes.append(f"{told} and is left out")
                    continue
                missing.append(np.full((len(run.config["seeds"]), episodes), np.nan))
                advice = f"play its policy with --episodes N, or: rlkit2 evaluate {shlex.quote(str(run.path))}"
                notes.append(f"{told}: no final score; {advice}")
            elif history.steps[-1] < run.config["training"].get("steps", 0):
                notes.append(
                    f"{group.label} on {group.dataset}: {run.path} is {run.status}; its last evaluation is at step "
                    f"{history.steps[-1]} of {run.config['training']['steps']}"
                )
        tables.append(_of_histories(evaluated, last, missing))
    return tables, notes


def _of_histories(evaluated: Sequence[ScoreHistory], last: int, missing: Sequence[Array] = ()) -> _GroupScores:
    """Scores of the last evaluations of a group's runs, and of seeds that have none, `[S, E]`."""
    episodes = min((history.scores[-1].shape[1] for history in evaluated), default=1)
    final = np.concatenate([*(history.scores[-1][:, :episodes] for history in evaluated), *missing])
    recent = [history.per_seed[-last:].mean(axis=0) for history in evaluated]
    best = [history.per_seed[history.best] for history in evaluated]
    nan = [scores[:, 0] for scores in missing]
    return _GroupScores(
        final,
        float(np.concatenate([*recent, *nan]).mean()),
        float(np.concatenate([*best, *nan]).mean()),
        max((history.steps[-1] for history in evaluated), default=None),
        evaluated[0].unit if evaluated else None,
    )


def read_histories(groups: Sequence[Group]) -> tuple[list[list[ScoreHistory | None]], list[str]]:
    """All evaluations of groups on one dataset, a list per group and None for a run without any, in one unit; a note where that had to be returns.

    Raises:
        RunError: the lines of a run contradict each other.
    """
    found = [[score_history(run) if run.evaluations() else None for run in group.runs] for group in groups]
    units = {history.unit for histories in found for history in histories if history is not None}
    if len(units) < 2:
        return found, []
    found = [
        [score_history(run, unit="return") if run.evaluations() else None for run in group.runs] for group in groups
    ]
    return found, [f"{groups[0].dataset}: some runs have no normalised scores, so these are the returns of all"]


def _row(
    label: str, dataset: str, own: Sequence[_GroupScores], base: Sequence[_GroupScores] | None, baseline: str
) -> Row:
    scores = tuple(part.final for part in own)
    unit = next((part.unit for part in own if part.unit), SCORE)
    known = all(np.isfinite(table).all() for table in scores)
    improvement = None
    if base is not None and label != baseline:
        improvement = probability_of_improvement(scores, [part.final for part in base])
    return Row(
        label=label,
        dataset=dataset,
        unit=unit,
        step=own[0].step if len(own) == 1 else None,
        scores=scores,
        mean=bootstrap(scores),
        iqm=bootstrap(scores, pooled_iqm),
        last=float(np.mean([part.last for part in own])),
        best=float(np.mean([part.best for part in own])),
        improvement=improvement,
        median=float(pooled_median([table.mean(axis=1) for table in scores])),
        gap=optimality_gap(scores) if known and unit == SCORE else None,
    )


def _methods(rows: Sequence[Row]) -> list[str]:
    """How the intervals were found, every way once."""
    kinds = {
        "mean": [row.mean for row in rows],
        "IQM": [row.iqm for row in rows],
        "probability": [row.improvement for row in rows if row.improvement is not None],
    }
    ways = [
        f"{name} by {' or '.join(dict.fromkeys(e.method for e in found if e.method))}" for name, found in kinds.items()
    ]
    ways = [way for way in ways if not way.endswith(" by ")]
    return [f"95 % intervals: {'; '.join(ways)}."] if ways else []


def _columns(last: int) -> str:
    return (
        f"last: mean of the last {last} evaluations; best*: the best evaluation, an oracle, since it is chosen with the scores it reports; "
        "P: probability that a new training run scores higher. All weigh datasets alike, however many seeds."
    )


def _stopped(groups: Sequence[Group]) -> list[str]:
    return [
        f"{group.label} on {group.dataset}: seed {seed} stopped at step {facts['step']} ({facts['metric']} was not finite): no final score."
        for group in groups
        for run in group.runs
        for seed, facts in run.manifest.get("stopped", {}).items()
    ]


def _baseline(groups: Sequence[Group], name: str | None) -> str:
    if name is None:
        return groups[0].label
    for group in groups:
        if name == group.label or any(run.path.resolve() == run.path.__class__(name).resolve() for run in group.runs):
            return group.label
    of_agent = list(dict.fromkeys(group.label for group in groups if group.agent == name))
    if len(of_agent) == 1:
        return of_agent[0]
    labels = ", ".join(repr(label) for label in dict.fromkeys(group.label for group in groups))
    raise ConfigError(f"baseline {name!r} is {'more than one' if of_agent else 'none'} of the compared runs: {labels}")


def _estimate(estimate: Estimate | None) -> dict[str, Any] | None:
    return (
        None
        if estimate is None
        else {
            "value": number(estimate.value),
            "interval": json_numbers([estimate.low, estimate.high]),
            "method": estimate.method,
        }
    )


def _number(value: float) -> str:
    return MISSING if np.isnan(value) else f"{value:.1f}"


def _text(estimate: Estimate, digits: int = 1) -> str:
    if np.isnan(estimate.value):
        return MISSING
    if np.isnan(estimate.low):
        return f"{estimate.value:.{digits}f}"
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"
