"""Searches: settings are chosen batch by batch from what came of those before, and trials that fall behind end early.

Everything is decided between batches and at fixed steps, never by who was faster: the trials and the best one are the same on every engine, with any
number of jobs, and after any interruption.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rlkit2.errors import RunError
from rlkit2.files import write_atomically, write_json
from rlkit2.progress import polled
from rlkit2.sweeps.engines import run_sweep
from rlkit2.sweeps.experiment import Experiment, Search, Sweep, find_run, share_done, trial_experiment
from rlkit2.sweeps.space import SAMPLERS, Result
from rlkit2.training import Run
from rlkit2.training.selection import SCORE, Goal, mean_over, score_lines

FEWEST = 4  # trials that have come to a step before the worse half of them ends there
BEST = "best.toml"


@dataclass
class Trial:
    """One setting: what was chosen, how far it came (`state`: finished, pruned, or what ended it), and the metric at its last step."""

    number: int
    values: dict[str, Any]
    experiment: Experiment
    state: str = "begun"
    step: int = 0
    value: float | None = None

    @property
    def result(self) -> Result:
        """As samplers take it."""
        known = self.state in ("finished", "pruned")
        return self.value if known else None, self.step if self.state == "pruned" else None


def run_search(
    sweep: Sweep,
    *,
    out: str | os.PathLike[str] = "runs",
    report: Callable[[Trial], None] = lambda trial: None,
    progress: Callable[[int, int], None] | None = None,
    **engine: Any,
) -> list[Trial]:
    """Carry out the search of a sweep file and write its best setting as a recipe, `out/<name>/best.toml`.

    Args:
        sweep: from `load_sweep`, with a `search`.
        out: the runs are in `out/<name of the sweep>/<settings>/`.
        report: called with each trial that has ended.
        progress: called about every second with thousandths of the updates of all trials that are done, and 1,000; a trial that is ended early
            counts as done.
        **engine: `engine`, `jobs`, `device` and `options` of `run_sweep`.

    Returns:
        All trials, in the order in which they were chosen.

    Raises:
        ConfigError, DatasetError: what cannot run, before anything is trained.
        RunError: no trial came to an end with a finite metric.
        MissingExtraError: Optuna or the engine is not installed.
        KeyboardInterrupt: the runs in progress are saved; the same call continues.
    """
    search = sweep.search
    assert search is not None
    root = Path(out).resolve() / sweep.name
    sampler = SAMPLERS[search.method](search.space, search.seed, search.goal.rising)
    trials: list[Trial] = []

    def share() -> float:
        return (
            sum(trial.state != "begun" or share_done(root / trial.experiment.folder) for trial in trials)
            / search.trials
        )

    while len(trials) < search.trials:
        chosen = sampler.ask(min(search.batch, search.trials - len(trials)))
        batch = [
            Trial(number, values, trial_experiment(sweep, number, values))
            for number, values in enumerate(chosen, len(trials))
        ]
        trials += batch
        with polled(share, progress):
            _carry_out(batch, trials, sweep, search, root, engine | {"out": out}, report)
        sampler.tell([trial.result for trial in batch])
    _write(trials, search, root)
    return trials


def _carry_out(
    batch: Sequence[Trial],
    trials: Sequence[Trial],
    sweep: Sweep,
    search: Search,
    root: Path,
    engine: Mapping[str, Any],
    report: Callable[[Trial], None],
) -> None:
    """Train a batch from one step at which it is judged to the next."""
    alive = list(batch)
    for step in (*search.prune, search.steps):
        experiments = tuple({trial.experiment.folder: trial.experiment for trial in alive}.values())
        until = step if step < search.steps else None
        statuses = {
            e.folder: s for e, s in run_sweep(replace(sweep, experiments=experiments), until=until, **engine).items()
        }
        for trial in alive:
            status = statuses[trial.experiment.folder]
            trial.step = step
            trial.value = metric_at(find_run(root / trial.experiment.folder), search.goal, step)
            trial.state = status if status not in ("finished", "paused") else "begun" if until else "finished"
            if trial.value is None and trial.state in ("begun", "finished"):
                trial.state = f"error: no {search.goal.metric} at step {step}"
        if until is not None:
            _prune(alive, trials, search, root, step)
        for trial in [trial for trial in alive if trial.state != "begun"]:
            report(trial)
        alive = [trial for trial in alive if trial.state == "begun"]


def _prune(alive: Sequence[Trial], trials: Sequence[Trial], search: Search, root: Path, step: int) -> None:
    """End the trials that are worse at a step than the median of all that have come so far."""
    found = [
        metric_at(find_run(root / trial.experiment.folder), search.goal, step) for trial in trials if trial.step >= step
    ]
    known = [value for value in found if value is not None]
    if len(known) < FEWEST:
        return
    middle = median(known)
    for trial in alive:
        if trial.state == "begun" and trial.value is not None and search.goal.better(middle, trial.value):
            trial.state = "pruned"


def metric_at(run: Run | None, goal: Goal, step: int) -> float | None:
    """What a run had come to at a step: the mean over seeds and over the log lines of the last tenth before it, or the last evaluation's score.

    None where there is nothing finite.
    """
    if run is None:
        return None
    try:
        lines = score_lines(run.evaluations()) if goal.metric == SCORE else run.metrics()
    except RunError:
        return None
    steps = sorted({line["step"] for line in lines if line["step"] <= step and goal.metric in line})
    if not steps:
        return None
    after = steps[-1] - 1 if goal.metric == SCORE else min(step - math.ceil(step / 10), steps[-1] - 1)
    value = mean_over(lines, goal.metric, run.config["seeds"], after, step)
    return value if math.isfinite(value) else None


def best_trial(trials: Sequence[Trial], goal: Goal) -> Trial | None:
    """The finished trial with the best metric; the earliest of equal ones."""
    best: Trial | None = None
    for trial in trials:
        worst = math.nan if best is None or best.value is None else best.value
        if trial.state == "finished" and trial.value is not None and goal.better(trial.value, worst):
            best = trial
    return best


def _write(trials: Sequence[Trial], search: Search, root: Path) -> None:
    """`search.json` with all trials, and the best one as a recipe."""
    rows = [
        {
            "trial": t.number,
            "values": t.values,
            "state": t.state,
            "step": t.step,
            "value": t.value,
            "folder": t.experiment.folder,
        }
        for t in trials
    ]
    write_json(root / "search.json", {"metric": search.goal.metric, "rising": search.goal.rising, "trials": rows})
    best = best_trial(trials, search.goal)
    if best is None:
        raise RunError(
            f"no trial of {root} came to an end with a finite {search.goal.metric}; search.json there says what ended them"
        )
    write_atomically(root / BEST, recipe_text(best, search))


def recipe_text(trial: Trial, search: Search) -> str:
    """A trial as a recipe for `rlkit2 train --recipe`."""
    experiment = trial.experiment
    how = "highest" if search.goal.rising else "lowest"
    lines = [
        f"# trial {trial.number} of {search.trials}: {how} {search.goal.metric}, {trial.value!r}",
        f"agent = {_toml(experiment.agent)}",
        f"dataset = {_toml(experiment.dataset)}",
    ]
    if search.goal.metric == SCORE:
        lines.insert(1, "# chosen by returns: that score is too good, judge the setting by fresh episodes or seeds")
    for name in ("config", "data", "training"):
        fields = {key: value for key, value in getattr(experiment, name).items() if value is not None}
        if fields:
            lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in fields.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value) if isinstance(value, float) else json.dumps(value)
