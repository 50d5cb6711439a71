"""`rlkit2 compare RUN...`: final scores of runs side by side, with intervals and the probability of improvement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tyro.conf import Positional

from rlkit2.api import evaluate
from rlkit2.cli import output
from rlkit2.cli.parsing import command
from rlkit2.errors import ConfigError
from rlkit2.evaluation.evaluation import Evaluation
from rlkit2.progress import progress_bar
from rlkit2.reporting.comparison import Comparison, open_runs
from rlkit2.reporting.comparison import compare as compare_runs
from rlkit2.training.run import Run


def compare(
    runs: Positional[tuple[Path, ...]],
    *,
    baseline: str | None = None,
    episodes: int | None = None,
    last: int = 5,
    env: str | None = None,
    trust_env: bool = False,
    json: bool = False,
    markdown: bool = False,
) -> int:
    """Compare the final scores of runs: mean, IQM, 95 % intervals and probability of improvement over a baseline.

    Example: rlkit2 compare runs/bc-* runs/odice-* --baseline bc

    Args:
        runs: folders of runs.
        baseline: agent, label or run folder the others are held against; default: the first run.
        episodes: play this many episodes per seed with the final policies, instead of reading the last evaluation of the training.
        last: number of evaluations in the column "last evaluations".
        env: with --episodes: environment to play all of them in, as of `rlkit2 evaluate`; default: that of each run.
        trust_env: with --episodes: build environments as the runs' files say, which runs the code they name.
        json: print JSON.
        markdown: print a Markdown table.
    """

    def score(run: Run) -> Evaluation:
        assert episodes is not None
        with progress_bar(run.path.name) as progress:
            return evaluate(run, episodes=episodes, env=env, progress=progress, trust_env=trust_env)

    if env is not None and episodes is None:
        raise ConfigError("--env is for playing: give --episodes, too")
    scorer = None if episodes is None else score
    opened, left_out = open_runs(runs)
    for line in left_out:
        output.say(line, stderr=True)
    comparison = compare_runs(opened, baseline=baseline, last=last, evaluate=scorer)
    if json:
        output.print_json(comparison.to_dict())
    elif markdown:
        output.say(comparison.markdown().rstrip("\n"))
    else:
        print_comparison(comparison)
    return 0


def print_comparison(comparison: Comparison) -> None:
    """A table per dataset, what the letters stand for, and the notes."""
    cells = comparison.cells()
    for dataset in dict.fromkeys(row[0] for row in cells):
        output.print_table(comparison.header[1:], [row[1:] for row in cells if row[0] == dataset], title=dataset)
    header, rows = comparison.settings
    if rows:
        output.print_table(header, rows, left=len(header), title="what differs")
    for note in comparison.notes:
        output.say(note)


def run(arguments: Sequence[str]) -> int | None:
    """Entry of the command line."""
    return command(compare, arguments, prog="rlkit2 compare")
