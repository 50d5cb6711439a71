"""`rlkit2 pull OWNER/NAME`: a run or policy from a hub, whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from rlkit2.cli import output
from rlkit2.cli.parsing import command
from rlkit2.deploy import pull as pull_files
from rlkit2.progress import progress_bar


def pull(
    repository: Positional[Annotated[str, arg(metavar="OWNER/NAME")]],
    *,
    out: Path = Path("runs"),
    revision: str | None = None,
    hub: str | None = None,
) -> int:
    """Fetch a run or policy that was pushed; every checksum is compared, nothing is run, and what is not whole does not appear.

    Example: rlkit2 pull me/pendulum-bc

    Args:
        repository: where from.
        out: folder that gets a new one, called as the repository is.
        revision: branch, tag or commit; default: the newest.
        hub: address of the hub; default: that of the variable HF_ENDPOINT, else Hugging Face's.
    """
    with progress_bar("fetching") as progress:
        place = pull_files(repository, out, revision=revision, hub=hub, progress=progress)
    output.say(f"{place}: whole, from {repository}")
    output.say_next("rlkit2", "evaluate", place)
    return 0


def run(arguments: Sequence[str]) -> int | None:
    """Entry of the command line."""
    return command(pull, arguments, prog="rlkit2 pull")
