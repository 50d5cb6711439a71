"""`rlkit2 select RUN...`: rank policies by what they would earn, judged from data alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from rlkit2.agents import import_agent
from rlkit2.api import evaluate, load_run
from rlkit2.cli.offline import judged, print_judged
from rlkit2.cli.output import print_json, say
from rlkit2.cli.parsing import AS_IS, HowToRead, command
from rlkit2.errors import ConfigError
from rlkit2.evaluation.offline import OfflineOptions, agreement, order
from rlkit2.nn.policy import holds_policy
from rlkit2.progress import progress_bar
from rlkit2.training.run import Run


def select(
    runs: Positional[tuple[Path, ...]],
    *,
    by: str = "fqe",
    methods: tuple[str, ...] = ("fqe", "dice"),
    dataset: str | None = None,
    reading: HowToRead = AS_IS,
    discount: float | None = None,
    stochastic: bool = False,
    steps: int = OfflineOptions.steps,
    members: int = OfflineOptions.members,
    seed: int = 0,
    checkpoints: bool = False,
    play: int = 0,
    env: str | None = None,
    agent: tuple[str, ...] = (),
    trust_env: bool = False,
    json: bool = False,
) -> int:
    """Rank the policies of runs by their estimated discounted return, without an environment.

    What can be trusted comes first, what is in doubt after it, what was refused last. With --play the policies also play in their environment, and
    the ranking is held against what they earn.

    Example: rlkit2 select runs/iql-* runs/td3bc-*

    Args:
        runs: folders of runs, or of saved policies.
        by: the method that ranks.
        methods: fqe, dice, is, dr, own; all that are shown.
        dataset: to judge on; default: that of the runs.
        reading: how to read it; default: as the runs did.
        discount: default: that of the training, else 0.99.
        stochastic: judge sampled actions instead of the mode.
        steps: updates of every fit.
        members: resamples of the episodes that every fit is repeated on.
        seed: of resamples, weights and batches.
        checkpoints: rank every checkpoint of the runs (`train --checkpoint-every`) instead of their final policies.
        play: episodes per seed to play for the truth; 0: none.
        env: with --play: environment to play in, as of `rlkit2 evaluate`; default: that of each run.
        agent: those of the runs that are your own: my_agents.py:MyAgent.
        trust_env: with --play: build environments as the runs' files say, which runs the code they name.
        json: print everything as JSON.
    """
    for name in agent:
        import_agent(name)
    if env is not None and not play:
        raise ConfigError("--env is for playing: give --play, too")
    if by not in methods:
        methods = (*methods, by)
    options = OfflineOptions(steps=steps, members=members, seed=seed)
    sources = [one for path in runs for one in (_checkpoints(path) if checkpoints else [path])]
    result = judged(
        sources,
        dataset=dataset,
        reading=reading,
        methods=methods,
        discount=discount,
        stochastic=stochastic,
        options=options,
    )
    ranked = order(result.estimates[by])
    truth = _played(sources, play, not stochastic, env, trust_env) if play else None
    agreed = None
    if truth is not None:
        agreed = {method: agreement([one.value for one in found], truth) for method, found in result.estimates.items()}
    if json:
        values: dict[str, Any] = {"by": by, "ranking": [result.labels[index] for index in ranked], **result.to_dict()}
        if truth is not None:
            values |= {"played": truth.tolist(), "agreement": agreed}
        print_json(values)
        return 0
    print_judged(result, by)
    first = result.estimates[by][ranked[0]]
    what = f"first by {by}: {result.labels[ranked[0]]}"
    say(what if first.trusted else f"{what}, but no estimate that can be trusted speaks for it")
    if truth is not None and agreed is not None:
        earned = ", ".join(f"{result.labels[index]} {truth[index]:.4g}" for index in ranked)
        say(f"played, {play} episodes each, mean undiscounted return: {earned}")
        for method, figures in agreed.items():
            texts = [f"{name.replace('_', ' ')} {_figure(value)}" for name, value in figures.items()]
            say(f"{method} against the played returns: {', '.join(texts)}")
    return 0


def _checkpoints(path: Path) -> list[Run]:
    """A run at every checkpoint that is there, oldest first."""
    if holds_policy(path):
        raise ConfigError(f"{path} is a saved policy and has no checkpoints; leave --checkpoints out, or name its run")
    run = load_run(path)
    if not run.checkpoints:
        raise ConfigError(f"{path} has no checkpoint; leave --checkpoints out")
    return [run.at(step) for step in run.checkpoints]


def _figure(value: float) -> str:
    return str(value) if isinstance(value, int) else "unknown" if value != value else f"{value:.2f}"


def _played(
    runs: Sequence[Path | Run], episodes: int, deterministic: bool, env: str | None, trust_env: bool
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Mean return of every seed of every run, `[P]`."""
    means = []
    for run in runs:
        with progress_bar(run.label if isinstance(run, Run) else run.name) as progress:
            played = evaluate(
                run, episodes=episodes, env=env, deterministic=deterministic, progress=progress, trust_env=trust_env
            )
        means.append(played.returns.mean(1))
    found = np.concatenate(means)
    if not np.isfinite(found).all():
        raise ConfigError(
            "a policy gave actions that are not finite while it played, so there is no truth to hold the ranking against"
        )
    return found


def run(arguments: Sequence[str]) -> int | None:
    """Entry of the command line."""
    return command(select, arguments, prog="rlkit2 select")
