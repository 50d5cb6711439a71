"""`rlkit2 sweep FILE`: many runs from one file; what is finished is skipped, what is half done is resumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from shlex import join, quote
from typing import Any

from rich.table import Table
from tyro.conf import Positional

from rlkit2.agents import import_agent
from rlkit2.cli import output
from rlkit2.cli.parsing import command, name_values
from rlkit2.data.environments import named_source
from rlkit2.errors import RunError
from rlkit2.evaluation.scores import score_summary
from rlkit2.progress import progress_bar
from rlkit2.sweeps import Experiment, Sweep, load_sweep, run_sweep, sweep_runs, sweep_status
from rlkit2.sweeps.search import BEST, Trial, run_search
from rlkit2.training import Run
from rlkit2.training.selection import Goal


def sweep(
    file: Positional[Path],
    *,
    engine: str = "local",
    jobs: int | None = None,
    out: Path = Path("runs"),
    device: str = "auto",
    option: tuple[str, ...] = (),
    agent: tuple[str, ...] = (),
    env: tuple[str, ...] = (),
    trust_env: bool = False,
    dry_run: bool = False,
) -> int:
    """Train the runs of a sweep file, or the trials of its search, several at a time. Call it again after an interruption or a change of the file:
    finished runs are skipped, half-done ones are resumed from their newest checkpoint.

    Example: rlkit2 sweep sweep.toml --jobs 2

    Args:
        file: TOML with [base], [grid] and [[runs]], or with [base] and [search].
        engine: local (processes on this machine), ray or slurm.
        jobs: runs trained at the same time (local); default: as many as there are cores for.
        out: folder in which the sweep's own folder is made.
        device: auto, cpu, cuda or cuda:1.
        option: settings of the engine, name=value: for slurm those of submitit (partition=gpu timeout_min=240), for ray those of ray.init.
        agent: agents of your own that the file names: my_agents.py:MyAgent. A file alone makes nothing run.
        env: environments of your own that the file names: my_envs.py:make_env.
        trust_env: build environments as the file and its datasets say, which runs the code they name.
        dry_run: show the runs and how far they are, train nothing.
    """
    for name in agent:
        import_agent(name)
    for name in env:
        named_source(name)
    plan = load_sweep(file, trust_env=trust_env)
    console = output.console(stderr=True)
    if plan.search is not None:
        return _search(
            plan, file, out, dry_run, engine=engine, jobs=jobs, device=device, options=name_values(option, "--option")
        )
    failed = False
    if not dry_run:
        folders = [out / plan.name / experiment.folder for experiment in plan.experiments]
        ended = sum(sweep_status(folder) in ("finished", "failed") for folder in folders)
        console.print(f"{plan.name}: {len(plan.experiments)} runs, {ended} of them finished before", soft_wrap=True)

        def report(experiment: Experiment, status: str) -> None:
            nonlocal ended
            ended += status == "finished"
            output.say(f"{ended}/{len(plan.experiments)} {experiment.label or experiment.agent}: {status}", stderr=True)

        try:
            with progress_bar(plan.name) as bar:
                statuses = run_sweep(
                    plan,
                    out=out,
                    engine=engine,
                    jobs=jobs,
                    device=device,
                    options=name_values(option, "--option"),
                    report=report,
                    progress=bar,
                )
            failed = any(status != "finished" for status in statuses.values())
        except KeyboardInterrupt:
            console.print(
                f"interrupted; the runs are saved, resume with the same command: {join(['rlkit2', 'sweep', str(file), '--out', str(out)])}",
                soft_wrap=True,
            )
            raise
    _print(plan, out)
    return 1 if failed else 0


def _search(plan: Sweep, file: Path, out: Path, dry_run: bool, **engine: Any) -> int:
    """Carry out a search, print its trials and where the best setting is."""
    search = plan.search
    assert search is not None
    word = "highest" if search.goal.rising else "lowest"
    output.say(
        f"{plan.name}: {search.trials} trials ({search.method}) for the {word} {search.goal.metric}", stderr=True
    )
    if dry_run:
        output.print_table(["field", "may be"], [[name, str(part)] for name, part in search.space.items()], left=2)
        return 0

    def report(trial: Trial) -> None:
        value = "" if trial.value is None else f", {search.goal.metric} {trial.value:.6g}"
        output.say(f"trial {trial.number}: {trial.state} at step {trial.step}{value} ({_chosen(trial)})", stderr=True)

    try:
        with progress_bar(plan.name) as bar:
            trials = run_search(plan, out=out, report=report, progress=bar, **engine)
    except KeyboardInterrupt:
        again = join(["rlkit2", "sweep", str(file), "--out", str(out)])
        output.say(f"interrupted; the trials are saved, continue with the same command: {again}", stderr=True)
        raise
    ranked = sorted(trials, key=lambda trial: (trial.state != "finished", _rank(trial, search.goal)))
    rows = [
        [str(t.number), _chosen(t), t.state, str(t.step), "" if t.value is None else f"{t.value:.6g}"] for t in ranked
    ]
    output.print_table(["trial", "setting", "state", "step", search.goal.metric], rows, left=3)
    best = out / plan.name / BEST
    output.say(f"best setting: {best}")
    output.say_next("rlkit2", "train", "--recipe", best, "--seeds", 4)
    return 0


def _chosen(trial: Trial) -> str:
    return trial.experiment.label.partition(" ")[2]


def _rank(trial: Trial, goal: Goal) -> float:
    value = math.inf if trial.value is None else trial.value
    return -value if goal.rising and trial.value is not None else value


def _print(plan: Sweep, out: Path) -> None:
    """One line per run: how far it is, what it scored, where it is."""
    table = Table()
    for name in ("run", "status", "step", "final score (95 %)", "folder"):
        table.add_column(name, overflow="fold")
    runs = sweep_runs(out, plan)
    for experiment, run in runs.items():
        label = experiment.label or experiment.agent
        status, steps, score = sweep_status(out / plan.name / experiment.folder), "", ""
        if run is not None:
            steps = f"{max(run.checkpoints, default=0)}/{run.config['training']['steps']}"
            with suppress(RunError):  # the status says so
                score = _score(run)
        table.add_row(label, status, steps, score, "" if run is None else str(run.path))
    output.console().print(table)
    if any(run is not None for run in runs.values()):
        output.say(f"next: rlkit2 compare {quote(str(out / plan.name))}/*/*-[0-9][0-9][0-9]")


def _score(run: Run) -> str:
    if not run.evaluations():
        return ""
    summary = score_summary(run)
    mean, (low, high) = summary["final"]["mean"], summary["final"]["interval"]
    unit = "" if summary["unit"] == "normalized score" else " (return)"
    if mean is None:
        return "n/a"
    return f"{mean:.1f}{unit}" if low is None else f"{mean:.1f} [{low:.1f}, {high:.1f}]{unit}"


def run(arguments: Sequence[str]) -> int | None:
    """Entry of the command line."""
    return command(sweep, arguments, prog="rlkit2 sweep")
