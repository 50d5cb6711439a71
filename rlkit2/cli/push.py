"""`rlkit2 push RUN OWNER/NAME`: a run or policy on a hub, with a generated card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from rlkit2.cli import output
from rlkit2.cli.parsing import command
from rlkit2.deploy import push as push_files


def push(
    run: Positional[Annotated[Path, arg(metavar="RUN")]],
    repository: Positional[Annotated[str, arg(metavar="OWNER/NAME")]],
    *,
    checkpoints: bool = False,
    private: bool = False,
    message: str | None = None,
    revision: str | None = None,
    hub: str | None = None,
) -> int:
    """Put a run, or a saved policy, on a hub in one commit, with a generated card: data, command, scores with intervals, versions.

    The manifest goes along as it is: commands, machine, versions. You have to be logged in there (hf auth login, or the variable HF_TOKEN).

    Example: rlkit2 push runs/bc-builtin-pendulum-mixed-v0-001 me/pendulum-bc

    Args:
        run: folder of a run, or of a saved policy.
        repository: where to; made if it is missing.
        checkpoints: the newest checkpoint, too, and what an online run has collected, so that the run can be resumed.
        private: of a repository that is made.
        message: of the commit.
        revision: the branch; default: the main one.
        hub: address of the hub; default: that of the variable HF_ENDPOINT, else Hugging Face's.
    """
    address = push_files(
        run, repository, checkpoints=checkpoints, private=private, message=message, revision=revision, hub=hub
    )
    output.say(f"{run}: pushed, {address}")
    output.say_next("rlkit2", "pull", repository, *(("--hub", hub) if hub else ()))
    return 0


def run(arguments: Sequence[str]) -> int | None:
    """Entry of the command line."""
    return command(push, arguments, prog="rlkit2 push")
