"""`rlkit2 export RUN --out FILE`: one file that acts as a trained policy does, in another program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from rlkit2.agents import import_agent
from rlkit2.api import export as export_policy
from rlkit2.api import load_policy, load_run
from rlkit2.cli import output
from rlkit2.cli.evaluate import checkpoint_step
from rlkit2.cli.parsing import command
from rlkit2.errors import ConfigError
from rlkit2.nn.policy import holds_policy


def export(
    run: Positional[Annotated[Path, arg(metavar="RUN")]],
    *,
    out: Path,
    format: Literal["onnx", "torch.export", "torchscript", "safetensors"] | None = None,
    seed: int | None = None,
    sampling: bool = False,
    checkpoint: str | None = None,
    agent: str | None = None,
    json: bool = False,
) -> int:
    """Write one file that acts as a trained policy does, in another program, and hold it against the policy on 1,000 observations.

    Normalisation, stacks of frames, the order of a dictionary's entries and the action bounds are inside; batches may have any size.

    Example: rlkit2 export runs/bc-builtin-pendulum-mixed-v0-001 --out policy.onnx

    Args:
        run: folder of a run, or of a saved policy.
        out: the file; nothing is overwritten.
        format: onnx, torch.export, torchscript (torch calls it deprecated) or safetensors (for rlkit2 itself); default: as the suffix of --out
            says (.onnx, .pt2, .ts, .safetensors).
        seed: the seed, by its integer; default: the first.
        sampling: actions are samples, driven by an input "noise"; default: the mode.
        checkpoint: best, last or a step; default: the policy the run ended with. "best" is an oracle: it was picked by its score.
        agent: that of the run where it is your own, my_agents.py:MyAgent; for --checkpoint, which needs its code.
        json: print everything as JSON.
    """
    if agent is not None:
        import_agent(agent)
    if holds_policy(run):
        if checkpoint is not None:
            raise ConfigError(f"{run} is a saved policy and has no checkpoints; leave --checkpoint out")
        policy = load_policy(run)
        done = export_policy(policy, out, format=format, seed=seed, sampling=sampling)
    else:
        opened = load_run(run)
        step = None if checkpoint is None else checkpoint_step(opened, checkpoint)
        opened = opened if checkpoint is None else opened.at(step or max(opened.checkpoints, default=0))
        policy = opened.policy
        done = export_policy(opened, out, format=format, seed=seed, sampling=sampling)
    if json:
        output.print_json({**asdict(done), "path": str(done.path)})
        return 0
    others = "" if len(policy.seeds) == 1 or seed is not None else f" of {', '.join(map(str, policy.seeds))} (--seed K)"
    output.say(f"{done.path}: {done.format}, {'samples' if sampling else 'mode'} of seed {done.seed}{others}")
    for what, ports in (("in", done.inputs), ("out", done.outputs)):
        for port in ports:
            output.say(f"{what:>4} {port}: {port.meaning}")
    output.say(str(done))
    return 0


def run(arguments: Sequence[str]) -> int | None:
    """Entry of the command line."""
    return command(export, arguments, prog="rlkit2 export")
