"""`rlkit2 benchmark --out DIR`: agents by datasets, each with its one default setting; nothing is trained twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlkit2.cli import output
from rlkit2.cli.parsing import as_seeds, command, name_values
from rlkit2.nn.optim import Schedule
from rlkit2.progress import progress_bar
from rlkit2.reporting.board import LAST
from rlkit2.studies.benchmark import AGENTS, DATASETS, run_benchmark


def benchmark(
    *,
    out: Path = Path("runs/benchmark"),
    datasets: tuple[str, ...] = DATASETS,
    agents: tuple[str, ...] = AGENTS,
    seeds: str = "5",
    steps: int = 50_000,
    batch_size: int = 256,
    schedule: Schedule = "constant",
    policy_ema: float | None = None,
    hidden_sizes: tuple[int, ...] | None = None,
    eval_every: int | None = None,
    eval_episodes: int = 10,
    normalize_observations: bool = True,
    against: str | None = None,
    results: Path | None = None,
    anew: bool = False,
    engine: str = "local",
    jobs: int | None = None,
    device: str = "auto",
    option: tuple[str, ...] = (),
    trust_env: bool = False,
    dry_run: bool = False,
) -> int:
    """Train agents on datasets, each agent with its one default setting and no recipe, and compare them: a table, a page, and a small file of results
    that grows. What the file has is not trained again; call it again after an interruption.

    Example: rlkit2 benchmark --out runs/benchmark --datasets builtin/rooms builtin/pendulum --agents bc iql odice --seeds 3 --steps 20000
             rlkit2 benchmark --out runs/benchmark --results benchmarks/results/offline.json --dry-run

    Args:
        out: folder of the runs, benchmark.md and benchmark.html.
        datasets: ids of datasets that have an environment.
        agents: registered agents; a cell of one that is not for a dataset's actions says so.
        seeds: number of seeds, or the seeds themselves: 3,7.
        steps: updates per seed.
        batch_size: transitions per update and seed.
        schedule: learning rates of all networks: constant, or falling to zero along half a cosine or a line.
        policy_ema: decay of the running mean of the policy's weights that is evaluated; 0: the weights as they are; default: each agent's own.
        hidden_sizes: hidden layers of every network; default: each agent's own.
        eval_every: updates between two evaluations; default: a tenth of the steps.
        eval_episodes: episodes per evaluation and seed.
        normalize_observations: standardise observations over the dataset, for every agent.
        against: agent that probabilities of improvement refer to; default: bc, or the first.
        results: file of finished cells to reuse and to add to; default: results.json in --out.
        anew: train cells again whose agent's code has changed since.
        engine: local (processes on this machine), ray or slurm.
        jobs: trainings at the same time (local); default: as many as there are cores for.
        device: auto, cpu, cuda or cuda:1.
        option: settings of the engine, name=value; see rlkit2 sweep.
        trust_env: build environments as the datasets say, which runs the code they name.
        dry_run: train nothing; say what is there and what is missing, write table and page of what is there.
    """
    with progress_bar("benchmark") as bar:
        done = run_benchmark(
            out,
            datasets=datasets,
            agents=agents,
            seeds=as_seeds(seeds),
            steps=steps,
            batch_size=batch_size,
            schedule=schedule,
            policy_ema=policy_ema,
            hidden_sizes=hidden_sizes,
            eval_every=eval_every,
            eval_episodes=eval_episodes,
            normalize_observations=normalize_observations,
            against=against,
            results=results,
            anew=anew,
            engine=engine,
            jobs=jobs,
            device=device,
            options=name_values(option, "--option"),
            dry_run=dry_run,
            trust_env=trust_env,
            say=lambda line: output.say(line, stderr=True),
            progress=bar,
        )
    board = done.board
    for title, rows in board.summaries().items():
        output.print_table(board.header, rows, title=title)
    for (dataset, agent), why in done.failed.items():
        output.say(f"{agent} on {dataset}: {why}", stderr=True)
    for note in board.notes:
        output.say(note)
    output.say(f"headline: mean of the last {LAST} evaluations; scores of every dataset: {done.markdown}")
    output.say(f"page    {done.page}\nresults {done.results}")
    return 1 if done.failed else 0


def run(arguments: Sequence[str]) -> int | None:
    """Entry of the command line."""
    return command(benchmark, arguments, prog="rlkit2 benchmark")
