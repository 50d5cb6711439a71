"""Runs side by side: who they are, what they scored, and whether the difference is one.

Statistics are those of Agarwal et al. (NeurIPS 2021): mean and interquartile mean over seeds, every dataset counting the same, and the probability of
improvement over a baseline; intervals are those of `rlkit2.evaluation.statistics`, which hold their level with few seeds.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit2.errors import ConfigError, RunError
from rlkit2.evaluation.evaluation import Evaluation, json_numbers, number
from rlkit2.evaluation.scores import score_history
from rlkit2.evaluation.statistics import Estimate, bootstrap, pooled_iqm, probability_of_improvement
from rlkit2.training.run import Run

Array = NDArray[np.float64]
ALL = "all datasets"
MISSING = "n/a"
# What differs between two runs without making them different experiments.
WATCHING = ("training.log_every", "training.eval_every", "training.eval_episodes", "training.checkpoint_every")


@dataclass(frozen=True)
class Group:
    """Runs of one agent and configuration on one dataset; their seeds are the sample."""

    label: str
    dataset: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Row:
    """One line of a comparison; `scores` `[S, E]` per dataset it covers (one, or all of them)."""

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
            "last_evaluations": number(self.last),
            "best_evaluation_oracle": number(self.best),
            "per_seed": [json_numbers(scores.mean(axis=1)) for scores in self.scores],
            "probability_of_improvement": _estimate(self.improvement),
        }


@dataclass(frozen=True)
class Comparison:
    """Rows over labels and datasets. `baseline` is the label the probabilities of improvement refer to; `notes` say what a reader must know."""

    rows: tuple[Row, ...]
    baseline: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"baseline": self.baseline, "rows": [row.to_dict() for row in self.rows], "notes": list(self.notes)}

    @property
    def header(self) -> list[str]:
        """Column titles of `cells`."""
        return [
            "dataset",
            "run",
            "seeds",
            "mean (95 %)",
            "IQM (95 %)",
            "last evaluations",
            "best (oracle)",
            f"P(better than {self.baseline})",
        ]

    def cells(self) -> list[list[str]]:
        """The table as text."""
        return [
            [
                row.dataset + ("" if row.unit == "normalized score" else " (return)"),
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

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.header, ["---"] * len(self.header), *self.cells()]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
        return table + "".join(f"\n{note}\n" for note in self.notes)


def open_runs(paths: Sequence[str | os.PathLike[str]]) -> tuple[list[Run], list[str]]:
    """The runs in these folders whose files can be read, and a line for every folder that is left out.

    Raises `RunError` where a path does not exist, or none is left.
    """
    runs, left_out = [], []
    for path in paths:
        if not os.path.exists(path):
            Run(path)  # says so
        try:
            run = Run(path)
            run.manifest, run.evaluations(), run.metrics()
            runs.append(run)
        except RunError as error:
            left_out.append(f"left out: {error}")
    if left_out and not runs:
        raise RunError(left_out[0].removeprefix("left out: "))
    return runs, left_out


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs by agent, configuration and dataset, in the order given.

    A label is the agent's name, and where a dataset has several configurations of one agent, also the fields that differ.
    Raises `ConfigError` where the same seed of the same experiment comes twice, which would count one result as two.
    """
    if not runs:
        raise ConfigError("nothing to compare; name at least one run folder")
    settings = [_settings(run) for run in runs]
    names = _dataset_names(runs)
    groups: dict[tuple[str, str], list[Run]] = {}
    for run, own, dataset in zip(runs, settings, names, strict=True):
        agent = run.config["agent"]
        rivals = [
            other
            for rival, other, name in zip(runs, settings, names, strict=True)
            if name == dataset and rival.config["agent"] == agent
        ]
        differing = [key for key in own if any(other.get(key) != own[key] for other in rivals)]
        details = ", ".join(f"{key.split('.', 1)[1]}={_value(own[key])}" for key in differing)
        groups.setdefault((f"{agent} ({details})" if details else agent, dataset), []).append(run)
    for (label, dataset), members in groups.items():
        seen: dict[int, Run] = {}
        for run in members:
            for seed in run.config["seeds"]:
                if seed in seen:
                    raise ConfigError(
                        f"{seen[seed].path} and {run.path} both hold seed {seed} of {label} on {dataset}; leave one of them out"
                    )
                seen[seed] = run
    return [Group(label, dataset, tuple(members)) for (label, dataset), members in groups.items()]


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
    groups = group_runs(runs)
    base = _baseline(groups, baseline)
    table = {(group.label, group.dataset): _scores(group, last, evaluate) for group in groups}
    labels = list(dict.fromkeys(group.label for group in groups))
    datasets = list(dict.fromkeys(group.dataset for group in groups))
    rows = [
        _row(
            label, dataset, [table[label, dataset]], [table[base, dataset]] if (base, dataset) in table else None, base
        )
        for dataset in datasets
        for label in labels
        if (label, dataset) in table
    ]
    if len(datasets) > 1 and all(scores.unit in ("normalized score", None) for scores in table.values()):
        full = [label for label in labels if all((label, dataset) in table for dataset in datasets)]
        for label in full:
            against = [table[base, dataset] for dataset in datasets] if base in full else None
            rows.append(_row(label, ALL, [table[label, dataset] for dataset in datasets], against, base))
    return Comparison(tuple(rows), base, (*_methods(rows), *_notes(groups, evaluate is not None)))


@dataclass(frozen=True)
class _GroupScores:
    final: Array  # [S, E]
    last: float
    best: float
    step: int | None
    unit: str | None  # None: never evaluated


def _scores(group: Group, last: int, evaluate: Callable[[Run], Evaluation] | None) -> _GroupScores:
    if evaluate is not None:
        results = [evaluate(run) for run in group.runs]
        normalized = all(result.reference is not None for result in results)
        finals = [
            result.normalized_scores if normalized and result.normalized_scores is not None else result.returns
            for result in results
        ]
        return _GroupScores(
            np.concatenate(finals), float("nan"), float("nan"), None, "normalized score" if normalized else "return"
        )
    histories = [score_history(run) for run in group.runs if run.evaluations()]
    if len({history.unit for history in histories}) > 1:
        raise ConfigError(
            f"some runs of {group.label} on {group.dataset} have normalised scores and some have none; compare them with --episodes"
        )
    episodes = min((history.scores[-1].shape[1] for history in histories), default=1)
    missing = [np.full((len(run.config["seeds"]), episodes), np.nan) for run in group.runs if not run.evaluations()]
    final = np.concatenate([*(history.scores[-1][:, :episodes] for history in histories), *missing])
    recent = [history.per_seed[-last:].mean(axis=0) for history in histories]
    best = [history.per_seed[history.best] for history in histories]
    nan = [scores[:, 0] for scores in missing]
    return _GroupScores(
        final,
        float(np.concatenate([*recent, *nan]).mean()),
        float(np.concatenate([*best, *nan]).mean()),
        max((history.steps[-1] for history in histories), default=None),
        histories[0].unit if histories else None,
    )


def _row(
    label: str, dataset: str, own: Sequence[_GroupScores], base: Sequence[_GroupScores] | None, baseline: str
) -> Row:
    scores = tuple(part.final for part in own)
    improvement = None
    if base is not None and label != baseline:
        improvement = probability_of_improvement(scores, [part.final for part in base])
    return Row(
        label=label,
        dataset=dataset,
        unit=next((part.unit for part in own if part.unit), "normalized score"),
        step=own[0].step if len(own) == 1 else None,
        scores=scores,
        mean=bootstrap(scores),
        iqm=bootstrap(scores, pooled_iqm),
        last=float(np.mean([part.last for part in own])),
        best=float(np.mean([part.best for part in own])),
        improvement=improvement,
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


def _notes(groups: Sequence[Group], played: bool) -> list[str]:
    runs = [(f"{group.label} on {group.dataset}", run) for group in groups for run in group.runs]
    notes = [
        f"{name}: {run.path} has no evaluations: no final score; play its policy with --episodes N, or: rlkit2 evaluate {shlex.quote(str(run.path))}"
        for name, run in runs
        if not played and not run.evaluations()
    ]
    return notes + [
        f"{name}: seed {seed} stopped at step {facts['step']} ({facts['metric']} was not finite): no final score."
        for name, run in runs
        for seed, facts in run.manifest.get("stopped", {}).items()
    ]


def _baseline(groups: Sequence[Group], name: str | None) -> str:
    if name is None:
        return groups[0].label
    for group in groups:
        if name == group.label or any(run.path.resolve() == run.path.__class__(name).resolve() for run in group.runs):
            return group.label
    of_agent = list(dict.fromkeys(group.label for group in groups if group.label.split(" (")[0] == name))
    if len(of_agent) == 1:
        return of_agent[0]
    labels = ", ".join(repr(label) for label in dict.fromkeys(group.label for group in groups))
    raise ConfigError(f"baseline {name!r} is {'more than one' if of_agent else 'none'} of the compared runs: {labels}")


def _settings(run: Run) -> dict[str, Any]:
    """Everything that makes two runs different experiments, flat."""
    sections: Mapping[str, Mapping[str, Any]] = {
        name: run.config.get(name, {}) for name in ("config", "data", "training")
    }
    flat = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    return {key: value for key, value in flat.items() if key not in WATCHING}


def _dataset_names(runs: Sequence[Run]) -> list[str]:
    """Dataset ids, with the start of the content hash where two different contents share an id."""
    hashes: dict[str, set[str]] = {}
    for run in runs:
        hashes.setdefault(run.config["dataset"]["id"], set()).add(run.config["dataset"]["content_hash"])
    return [
        run.config["dataset"]["id"]
        + (f"@{run.config['dataset']['content_hash'][:8]}" if len(hashes[run.config["dataset"]["id"]]) > 1 else "")
        for run in runs
    ]


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


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
