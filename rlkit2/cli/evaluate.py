"""`rlkit2 evaluate RUN`: play episodes with every seed of a trained policy and print what it scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from tyro.conf import Positional, arg

from rlkit2.agents import import_agent
from rlkit2.api import evaluate as evaluate_policy
from rlkit2.api import load_policy, load_run
from rlkit2.cli import output
from rlkit2.cli.parsing import AS_IS, HowToRead, command
from rlkit2.data.reading import ReadingOptions
from rlkit2.errors import ConfigError, RLKitError
from rlkit2.evaluation.environments import run_environment
from rlkit2.evaluation.evaluation import Evaluation, mean_text
from rlkit2.nn.policy import Policy, holds_policy
from rlkit2.progress import progress_bar
from rlkit2.training.run import Run

ORACLE = "the best checkpoint is an oracle: it was chosen by its evaluation score"


def evaluate(
    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN...")]],
    *,
    episodes: int = 100,
    env: str | None = None,
    stochastic: bool = False,
    checkpoint: str | None = None,
    seed: int = 0,
    num_envs: int | None = None,
    max_steps: int | None = None,
    trust_env: bool = False,
    video: Path | None = None,
    video_episodes: int = 3,
    target_return: float | None = None,
    offline: bool = False,
    methods: tuple[str, ...] = ("fqe", "dice"),
    dataset: str | None = None,
    reading: HowToRead = AS_IS,
    discount: float | None = None,
    steps: int | None = None,
    members: int | None = None,
    critic: Literal["mse", "gaussian", "ggd"] | None = None,
    sample_weighting: Literal["none", "iv"] | None = None,
    agent: str | None = None,
    json: bool = False,
) -> int:
    """Play episodes with every seed of a trained policy and print its returns and scores, a table for each run.

    With --offline nothing is played: the discounted return is estimated from data alone.

    Example: rlkit2 evaluate runs/odice-builtin-rooms-* --episodes 100
             rlkit2 evaluate runs/iql-builtin-pendulum-mixed-v0-001 --offline

    Args:
        runs: folders of runs, or of saved policies.
        episodes: episodes per seed, counted as they start.
        env: environment: an id, my_envs.py:NAME or module:NAME of a function or class that makes one; default: the dataset's evaluation
            environment, else the one it was collected in.
        stochastic: sample actions instead of taking the mode.
        checkpoint: best, last or a step; default: the policy the run ended with. "best" is an oracle: it was picked by its score.
        seed: which fixed set of evaluation episodes.
        num_envs: environments per seed stepped together; changes time and memory, never the result.
        max_steps: cut episodes there.
        trust_env: build the environment as the file says, which runs the code it names; otherwise only what Gymnasium's registry knows.
        video: film the first episodes of the first seed, with their returns: FILE.gif, or FILE.mp4 with the extra video.
        video_episodes: how many of them.
        target_return: what a policy that is asked for a return (dt) is asked for; default: what it was trained with.
        offline: estimate the discounted return from data instead of playing.
        methods: with --offline: fqe, dice, is, dr, own.
        dataset: with --offline: to judge on; default: that of the run.
        reading: with --offline: how to read it; default: as the run did.
        discount: with --offline; default: that of the training, else 0.99.
        steps: with --offline: updates of every fit; default: 6000.
        members: with --offline: resamples of the episodes that every fit is repeated on; default: 8.
        critic: with --offline: gaussian or ggd lets fitted Q learn the noise of its targets, too, and say whether it is calibrated; default: mse.
        sample_weighting: with --offline: iv weighs transitions by the inverse of that noise; default: none.
        agent: that of the run where it is your own, my_agents.py:MyAgent; for --checkpoint and --offline, which need its code.
        json: print everything as JSON.
    """
    if not runs:
        raise ConfigError("no run is named; give the folder of a run or of a saved policy")
    if agent is not None:
        import_agent(agent)
    if offline:
        _refuse(
            "--offline plays nothing",
            env=env,
            num_envs=num_envs,
            max_steps=max_steps,
            trust_env=trust_env or None,
            video=video,
            target_return=target_return,
        )
        fits = {
            "seed": seed,
            "steps": steps,
            "members": members,
            "critic": critic,
            "sample_weighting": sample_weighting,
        }
        return _judge(
            [_at(run, checkpoint) for run in runs],
            checkpoint,
            dataset,
            reading,
            methods,
            discount,
            stochastic,
            json,
            **fits,
        )
    _refuse(
        "only --offline takes this",
        dataset=dataset,
        discount=discount,
        steps=steps,
        members=members,
        critic=critic,
        sample_weighting=sample_weighting,
        **reading.given,
    )

    def play(run: Path) -> Evaluation:
        policy, own_env = _open(run, checkpoint, env, trust_env)
        with progress_bar("episodes") as progress:
            return evaluate_policy(
                policy,
                episodes=episodes,
                env=own_env,
                deterministic=not stochastic,
                seed=seed,
                num_envs=num_envs,
                max_steps=max_steps,
                progress=progress,
                trust_env=trust_env,
                video=video,
                video_episodes=video_episodes,
                target_return=target_return,
            )

    if video is not None and len(runs) > 1:
        raise ConfigError(f"--video shows one run, and {len(runs)} are named; name one")
    found: list[dict[str, Any]] = []
    for run in runs:
        result = _tried(play, run, alone=len(runs) == 1)
        if result is None:
            continue
        filmed = {} if video is None else {"video": str(video)}
        found.append({"run": str(run), "checkpoint": checkpoint, **filmed, **result.to_dict()})
        if not json:
            _print(output.console(), result, checkpoint, str(run) if len(runs) > 1 else None)
            if video is not None:
                output.say(f"{video}: episodes 1 to {min(video_episodes, episodes)} of seed {result.seeds[0]}")
    if not found:
        raise ConfigError("nothing was evaluated; name at least one folder of a run, such as those below runs/")
    if json:
        output.print_json(found[0] if len(runs) == 1 else {"evaluations": found})
    return 0


def _tried(play: Callable[[Path], Evaluation], run: Path, *, alone: bool) -> Evaluation | None:
    """The evaluation; None and a line where one of several cannot be played."""
    try:
        return play(run)
    except RLKitError as error:
        if alone:
            raise
        output.say(f"left out: {error}", stderr=True)
        return None


def _refuse(why: str, **options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{why}; leave --{name.replace('_', '-')} out")


def _at(path: Path, checkpoint: str | None) -> Path | Run:
    """What --offline judges: the folder, or the run at a checkpoint."""
    if checkpoint is None:
        return path
    if holds_policy(path):
        raise ConfigError(f"{path} is a saved policy and has no checkpoints; leave --checkpoint out")
    run = load_run(path)
    return run.at(checkpoint_step(run, checkpoint) or max(run.checkpoints, default=0))


def _judge(
    runs: Sequence[Path | Run],
    checkpoint: str | None,
    dataset: str | None,
    reading: ReadingOptions,
    methods: Sequence[str],
    discount: float | None,
    stochastic: bool,
    json: bool,
    **options: int | str | None,
) -> int:
    from rlkit2.cli.offline import judged, print_judged
    from rlkit2.evaluation.offline import OfflineOptions

    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    result = judged(
        runs,
        dataset=dataset,
        reading=reading,
        methods=methods,
        discount=discount,
        stochastic=stochastic,
        options=OfflineOptions(**given),
    )
    if json:
        paths = [str(run.path if isinstance(run, Run) else run) for run in runs]
        named = {"run": paths[0]} if len(runs) == 1 else {"runs": paths}
        output.print_json({**named, "checkpoint": checkpoint, **result.to_dict()})
        return 0
    print_judged(result)
    if checkpoint == "best":
        output.say(ORACLE)
    return 0


def _open(path: Path, checkpoint: str | None, env: str | None, trust_env: bool) -> tuple[Policy, str | None]:
    """The policy to play, and the environment: the one given, else the one the run was told to use."""
    if holds_policy(path):
        if checkpoint is not None:
            raise ConfigError(f"{path} is a saved policy and has no checkpoints; leave --checkpoint out")
        return load_policy(path), env
    run = load_run(path)
    policy = run.policy if checkpoint is None else run.load_agent(checkpoint_step(run, checkpoint)).policy
    policy.metadata.setdefault("spec", run.config.get("spec"))
    return policy, env or run_environment(run, trust_env=trust_env)


def checkpoint_step(run: Run, checkpoint: str) -> int | None:
    """The step that --checkpoint names; None for the newest.

    Raises:
        ConfigError: it names none.
    """
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


def _print(out: Console, result: Evaluation, checkpoint: str | None, run: str | None) -> None:
    summary = result.summary()
    scores = summary["normalized"]
    actions = "deterministic" if result.deterministic else "sampled"
    output.say(f"{f'{run}: ' if run else ''}{result.environment}, {actions} actions")
    header = ["seed", "return", "score (%)", "length", *(["success"] if result.successes is not None else [])]
    rows = []
    for index, seed in enumerate(result.seeds):
        cells = [
            str(seed),
            _number(summary["per_seed"][index]),
            _number(scores["per_seed"][index]) if scores else "n/a",
        ]
        cells.append(f"{result.lengths[index].mean():.0f}")
        if result.successes is not None:
            cells.append(f"{100 * result.successes[index].mean():.0f} %")
        rows.append(cells)
    output.print_table(header, rows, left=0)
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
    if run:
        out.print()


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f}"


def run(arguments: Sequence[str]) -> int | None:
    """Entry of the command line."""
    return command(evaluate, arguments, prog="rlkit2 evaluate")
