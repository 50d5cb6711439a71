"""`rlkit2 uncertainty RUN`: are the run's error bars true, and does it know what it does not know?"""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from rlkit2.agents import import_agent
from rlkit2.api import load_dataset, load_run
from rlkit2.cli import output
from rlkit2.cli.output import finite
from rlkit2.cli.parsing import AS_IS, HowToRead, command
from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.reading import ReadingOptions
from rlkit2.errors import ConfigError
from rlkit2.evaluation.calibration import TDDiagnostics, td_diagnostics
from rlkit2.evaluation.noise_map import NoiseMap, has_known_noise, noise_map
from rlkit2.evaluation.return_coverage import LEVEL, LIMITS, ReturnCoverage, return_coverage
from rlkit2.files import make_folder, save_figure, write_atomically
from rlkit2.progress import progress_bar
from rlkit2.training.building import dataset_source, look_ahead, reading_arguments, split_dataset
from rlkit2.training.options import DataOptions
from rlkit2.training.run import Run


@dataclass(frozen=True)
class _Episodes:
    dataset: TransitionDataset
    held_out: bool
    what: str


def uncertainty(
    run: Positional[Path],
    *,
    dataset: str | None = None,
    reading: HowToRead = AS_IS,
    checkpoint: int | None = None,
    max_transitions: int = 20_000,
    seed: int = 0,
    out: Path | None = None,
    agent: str | None = None,
    json: bool = False,
) -> int:
    """Hold a run's noise model against episodes it was not trained on: calibration, tails, AUROC and size of its ignorance.

    Needs an agent trained with --critic ggd or gaussian (sacn, edac, td3bc, rebrac, iql, sql, xql, fql, awac, crr, cql, dqn), best with
    --held-out 0.1.

    `rlkit2 uncertainty study --help`: the losses on problems whose noise is known.

    Example: rlkit2 train iql --dataset builtin/noisy-rooms --critic ggd --held-out 0.1
             rlkit2 uncertainty runs/iql-builtin-noisy-rooms-explore-v0-001

    Args:
        run: folder of a run.
        dataset: other episodes to use, in the run's own units of reward; default: those the run held out, else (with a warning) all of its own.
        reading: how to read the dataset; default: as the run did.
        checkpoint: a step; default: the newest.
        max_transitions: a random part is used where there are more.
        seed: of that part and of the random actions.
        out: folder of diagnostics.json and the figures; default: uncertainty/ in the run.
        agent: that of the run where it is your own: my_agents.py:MyAgent.
        json: print everything as JSON.
    """
    if agent is not None:
        import_agent(agent)
    opened = load_run(run)
    trained: Any = opened.load_agent(checkpoint)
    episodes = _episodes(opened, dataset, reading)
    options = DataOptions(**opened.config["data"])
    seen = look_ahead(episodes.dataset, type(trained), trained.config, options)  # as in training
    with progress_bar("TD errors") as progress:
        found = td_diagnostics(trained, seen, max_transitions=max_transitions, seed=seed, progress=progress)
    size = _size(trained, seen)
    known = noise_map(trained, seen) if has_known_noise(seen.spec) and options.num_steps == 1 else None
    values = {
        "run": str(run),
        "step": checkpoint or max(opened.checkpoints),
        "episodes": episodes.what,
        "held_out": episodes.held_out,
        "seeds": opened.config["seeds"],
        **found.to_dict(),
        "epistemic_size": size if isinstance(size, str) else size.to_dict(),
        "epistemic_limits": list(trained.epistemic_limits),
        **({"noise_map": known.to_dict()} if known else {}),
    }
    report: dict[str, Any] = finite(values)
    folder = _write(out or opened.path / "uncertainty", report, found, known, opened.config["seeds"])
    console = output.console()
    if json:
        output.print_json(report)
    else:
        _print(console, opened, episodes, found, known, size)
        _print_size(console, trained, size)
        console.print(f"figures and numbers: {folder}")
    return 0


def _size(agent: Any, episodes: TransitionDataset) -> ReturnCoverage | str:
    """What held-out returns say about the size of the epistemic deviation, or why they say nothing."""
    try:
        return return_coverage(agent, episodes)
    except ConfigError as error:
        return str(error)


def _episodes(run: Run, dataset: str | None, reading: ReadingOptions) -> _Episodes:
    options = DataOptions(**run.config["data"])
    arguments = reading_arguments(run.config, reading.given)
    if dataset is not None:
        whole, _ = split_dataset(
            load_dataset(dataset, **arguments), DataOptions(**{**run.config["data"], "held_out": 0.0})
        )
        return _Episodes(whole, dataset != run.config["dataset"]["id"], f"all episodes of {dataset}")
    training, held_out = split_dataset(load_dataset(dataset_source(run.config), **arguments), options)
    if held_out is None:
        return _Episodes(training, False, f"all episodes of {run.config['dataset']['id']}")
    return _Episodes(held_out, True, f"{held_out.num_episodes} held-out episodes of {run.config['dataset']['id']}")


def _write(
    folder: Path, report: dict[str, Any], found: TDDiagnostics, known: NoiseMap | None, seeds: Sequence[int]
) -> Path:
    from rlkit2.reporting.calibration_figures import calibration_figure, noise_figure

    make_folder(folder)
    figures = {"calibration": calibration_figure(found, seeds)} | ({"noise_map": noise_figure(known)} if known else {})
    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.png", dpi=110)
    write_atomically(folder / "diagnostics.json", json_format.dumps(report, indent=1) + "\n")
    return folder


def _print(
    console: Console,
    run: Run,
    episodes: _Episodes,
    found: TDDiagnostics,
    known: NoiseMap | None,
    size: ReturnCoverage | str,
) -> None:
    table = Table(title=f"{run.path.name}: {found.transitions} transitions of {episodes.what}", title_justify="left")
    table.add_column("")
    for seed in run.config["seeds"]:
        table.add_column(f"seed {seed}", justify="right")

    def row(name: str, values: NDArray[np.float64], digits: int = 3) -> None:
        table.add_row(name, *(f"{value:.{digits}f}" for value in values))

    row("negative log-likelihood", found.nll)
    row("  best constant Gaussian", found.nll_gaussian)
    row("  best constant generalized Gaussian", found.nll_ggd)
    row("calibration error", found.calibration_error)
    for level, share in found.coverage.items():
        row(f"  inside the {100 * level:g} % interval", share)
    row("excess kurtosis of TD errors", found.pooled_kurtosis, 2)
    row("  of standardised TD errors", found.conditional_kurtosis, 2)
    row("mean of standardised TD errors", found.mean_standardized)
    row("skewness of standardised TD errors", found.skewness, 2)
    row("AUROC, random against data actions", found.auroc)
    if not isinstance(size, str):
        row("Q of groups against their returns, error", size.error)
        row("  noise of the returns in it", size.noise)
        row("  epistemic deviation", size.epistemic)
        row(f"  groups inside the {100 * LEVEL:g} % interval", size.coverage)
        row("  of the noise of the returns alone", size.coverage_without)
    if known is not None:
        row("correlation with the true deviation", known.correlation)
        row("  median ratio to it", known.ratio)
        row("rank correlation with the true shape", known.shape_rank_correlation)
    console.print(table)
    if not episodes.held_out:
        console.print(
            "warning: these episodes were trained on, so the errors are too small; train with --held-out 0.1, or give other episodes with --dataset"
        )
    for warning in found.warnings():
        console.print(f"warning: {warning}")


def _print_size(console: Console, agent: Any, size: ReturnCoverage | str) -> None:
    """What may be made of the size of the epistemic deviation."""
    against = [f"not held against returns: {size}"] if isinstance(size, str) else [size.verdict(), *LIMITS]
    for line in (*agent.epistemic_limits, *against):
        console.print(f"size of epistemic_sd: {line}", soft_wrap=True)


Study = Literal["noisy-mdp", "regression", "weighting", "shape-weights", "epistemic"]


def study(name: Positional[Study], *, out: Path | None = None) -> int:
    """Known truth, all methods: what each makes of the noise, and whether epistemic_sd has the size of Q's errors.

    "noisy-mdp": losses in tabular MDPs; "regression": losses of a network (minutes); "weighting", "shape-weights": weights between samples of a
    linear model; "epistemic": epistemic_sd against the spread of Q over datasets (minutes).

    Example: rlkit2 uncertainty study noisy-mdp --out study

    Args:
        name: which one.
        out: folder for the table as JSON and the figure; default: print only.
    """
    from rlkit2.studies import epistemic, heteroscedastic, noisy_mdp

    if out is not None:  # before the work, not after it
        make_folder(out)
    figure = None
    with progress_bar(name) as progress:
        if name == "noisy-mdp":
            results = noisy_mdp.run_noisy_mdp(progress=progress)
            rows, figure = [r.row() for r in results], noisy_mdp.noisy_mdp_figure(results)
        elif name == "regression":
            fits = heteroscedastic.run_regression(progress=progress)
            rows, figure = [r.row() for r in fits], heteroscedastic.regression_figure(fits)
        elif name == "epistemic":
            sizes = epistemic.run_epistemic_study(progress=progress)
            rows, figure = [r.row() for r in sizes], epistemic.epistemic_figure(sizes)
        elif name == "shape-weights":
            rows = heteroscedastic.run_shape_weighting()
        else:
            rows = [dict(row) for row in heteroscedastic.run_weighting()]
    table = Table()
    for column, value in rows[0].items():
        table.add_column(column, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(
            *(f"{value:.3f}".replace("nan", "") if isinstance(value, float) else str(value) for value in row.values())
        )
    console = output.console()
    console.print(table)
    if out is not None:
        write_atomically(out / f"{name}.json", json_format.dumps(finite(rows), indent=1, allow_nan=False) + "\n")
        if figure is not None:
            save_figure(figure, out / f"{name}.png", dpi=110)
        console.print(f"table and figure: {out}")
    return 0


def run(arguments: Sequence[str]) -> int | None:
    """Entry of the command line."""
    if list(arguments[:1]) == ["study"]:
        return command(study, arguments[1:], prog="rlkit2 uncertainty study")
    return command(uncertainty, arguments, prog="rlkit2 uncertainty")
