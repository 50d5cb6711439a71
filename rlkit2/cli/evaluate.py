"""`rlkit2 evaluate RUN`: play episodes with every seed of a trained policy and print what it scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tyro.conf import Positional

from rlkit2.agents import import_agent
from rlkit2.api import evaluate as evaluate_policy
from rlkit2.api import load_policy, load_run
from rlkit2.cli import output
from rlkit2.cli.parsing import command
from rlkit2.errors import ConfigError
from rlkit2.evaluation.environments import run_environment
from rlkit2.evaluation.evaluation import Evaluation, mean_text
from rlkit2.nn.policy import Policy
from rlkit2.training.run import Run

ORACLE = "the best checkpoint is an oracle: it was chosen by its evaluation score"


def evaluate(
    run: Positional[Path],
    *,
    episodes: int = 100,
    env: str | None = None,
    stochastic: bool = False,
    checkpoint: str | None = None,
    seed: int = 0,
    num_envs: int | None = None,
    max_steps: int | None = None,
    trust_env: bool = False,
    offline: bool = False,
    methods: tuple[str, ...] = ("fqe", "dice"),
    dataset: str | None = None,
    discount: float | None = None,
    steps: int | None = None,
    members: int | None = None,
    agent: str | None = None,
    json: bool = False,
) -> int:
    """Play episodes with every seed of a trained policy and print its returns and scores.

    With --offline nothing is played: the discounted return is estimated from data alone.

    Example: rlkit2 evaluate runs/odice-zoo-hopper-medium-v0-001 --episodes 100
             rlkit2 evaluate runs/iql-zoo-hopper-medium-v0-001 --offline

    Args:
        run: folder of a run, or of a saved policy.
        episodes: episodes per seed, counted as they start.
        env: environment id; default: the dataset's evaluation environment, else the one it was collected in.
        stochastic: sample actions instead of taking the mode.
        checkpoint: best, last or a step; default: the policy the run ended with. "best" is an oracle: it was picked by its score.
        seed: which fixed set of evaluation episodes.
        num_envs: environments per seed stepped together; changes time and memory, never the result.
        max_steps: cut episodes there.
        trust_env: build the environment as the file says, which runs the code it names; otherwise only what Gymnasium's registry knows.
        offline: estimate the discounted return from data instead of playing.
        methods: with --offline: fqe, dice, is, dr, own.
        dataset: with --offline: to judge on; default: that of the run.
        discount: with --offline; default: that of the training, else 0.99.
        steps: with --offline: updates of every fit; default: 6000.
        members: with --offline: resamples of the episodes that every fit is repeated on; default: 8.
        agent: that of the run where it is your own, my_agents.py:MyAgent; for --checkpoint and --offline, which need its code.
        json: print everything as JSON.
    """
    if agent is not None:
        import_agent(agent)
    if offline:
        _refuse(
            "--offline plays nothing",
            env=env,
            num_envs=num_envs,
            max_steps=max_steps,
            trust_env=trust_env or None,
        )
        judged = _at(run, checkpoint)
        return _judge(
            judged, checkpoint, dataset, methods, discount, stochastic, json, seed=seed, steps=steps, members=members
        )
    _refuse("only --offline takes this", dataset=dataset, discount=discount, steps=steps, members=members)
    policy, own_env = _open(run, checkpoint, env, trust_env)
    with episode_bar("episodes") as progress:
        result = evaluate_policy(
            policy,
            episodes=episodes,
            env=own_env,
            deterministic=not stochastic,
            seed=seed,
            num_envs=num_envs,
            max_steps=max_steps,
            progress=progress,
            trust_env=trust_env,
        )
    if json:
        output.print_json({"run": str(run), "checkpoint": checkpoint, **result.to_dict()})
    else:
        _print(output.console(), result, checkpoint)
    return 0


def _refuse(why: str, **options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{why}; leave --{name.replace('_', '-')} out")


def _at(path: Path, checkpoint: str | None) -> Path | Run:
    """What --offline judges: the folder, or the run at a checkpoint."""
    if checkpoint is None:
        return path
    if (path / "policy.json").is_file():
        raise ConfigError(f"{path} is a saved policy and has no checkpoints; leave --checkpoint out")
    run = load_run(path)
    return run.at(_step(run, checkpoint) or max(run.checkpoints, default=0))


def _judge(
    run: Path | Run,
    checkpoint: str | None,
    dataset: str | None,
    methods: Sequence[str],
    discount: float | None,
    stochastic: bool,
    json: bool,
    **options: int | None,
) -> int:
    from rlkit2.cli.offline import judged, print_judged
    from rlkit2.evaluation.offline import OfflineOptions

    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    result = judged(
        [run],
        dataset=dataset,
        methods=methods,
        discount=discount,
        stochastic=stochastic,
        options=OfflineOptions(**given),
    )
    if json:
        path = run.path if isinstance(run, Run) else run
        output.print_json({"run": str(path), "checkpoint": checkpoint, **result.to_dict()})
        return 0
    print_judged(result)
    if checkpoint == "best":
        output.say(ORACLE)
    return 0


@contextmanager
def episode_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over episodes on a terminal's standard error, nothing elsewhere; gives what to call with (done, total)."""
    console = output.console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _open(path: Path, checkpoint: str | None, env: str | None, trust_env: bool) -> tuple[Policy, str | None]:
    """The policy to play, and the environment: the one given, else the one the run was told to use."""
    if (path / "policy.json").is_file():
        if checkpoint is not None:
            raise ConfigError(f"{path} is a saved policy and has no checkpoints; leave --checkpoint out")
        return load_policy(path), env
    run = load_run(path)
    policy = run.policy if checkpoint is None else run.load_agent(_step(run, checkpoint)).policy
    policy.metadata.setdefault("spec", run.config.get("spec"))
    return policy, env or run_environment(run, trust_env=trust_env)


def _step(run: Run, checkpoint: str) -> int | None:
    if checkpoint == "last":
        return None
    if checkpoint == "best":
        best = run.manifest.get("best")
        if not best:
            raise ConfigError(
                f"{run.path} was never evaluated during training, so it has no best checkpoint; use --checkpoint last"
            )
        return int(best["step"])
    if not checkpoint.isdigit():
        raise ConfigError(
            f"--checkpoint must be best, last or a step, not {checkpoint!r}; steps: {', '.join(map(str, run.checkpoints))}"
        )
    return int(checkpoint)


def _print(out: Console, result: Evaluation, checkpoint: str | None) -> None:
    summary = result.summary()
    scores = summary["normalized"]
    actions = "deterministic" if result.deterministic else "sampled"
    out.print(f"{result.environment}, {actions} actions", highlight=False, soft_wrap=True)
    table = Table()
    for name in ("seed", "return", "score (%)", "length") + (("success",) if result.successes is not None else ()):
        table.add_column(name, justify="right")
    for index, seed in enumerate(result.seeds):
        cells = [
            str(seed),
            _number(summary["per_seed"][index]),
            _number(scores["per_seed"][index]) if scores else "n/a",
        ]
        cells.append(f"{result.lengths[index].mean():.0f}")
        if result.successes is not None:
            cells.append(f"{100 * result.successes[index].mean():.0f} %")
        table.add_row(*cells)
    out.print(table)
    for name, statistics in (("return", summary), ("score", scores)):
        if statistics:
            out.print(
                f"{name}: mean {mean_text(statistics)}, IQM {_number(statistics['iqm'])}; "
                f"standard error {_number(statistics['between_seed_error'])} between seeds, "
                f"{_number(statistics['within_policy_error'])} within these policies"
            )
    if len(result.seeds) == 1:
        out.print("one seed: the interval speaks about this policy, not about training again")
    if checkpoint == "best":
        out.print(ORACLE)
    out.print(f"{summary['episodes']} episodes per seed; {result.normalization}", highlight=False)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f}"


def run(arguments: Sequence[str]) -> int | None:
    """Entry of the command line."""
    return command(evaluate, arguments, prog="rlkit2 evaluate")
