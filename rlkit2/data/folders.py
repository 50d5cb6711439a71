"""Dataset folders appear whole or not at all; what a killed process leaves behind is swept up by a later one."""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlkit2.errors import DatasetError
from rlkit2.processes import is_alive, this_machine

DAY = 86400
OWNER = "owner.json"


def home(variable: str) -> Path:
    """The user's home directory.

    Raises:
        DatasetError: there is none; the message names the environment variable that says where to write instead.
    """
    try:
        return Path.home()
    except RuntimeError as error:
        raise DatasetError(
            f"this user has no home directory; set {variable} to a folder that can be written"
        ) from error


def minari_root() -> Path:
    """Minari's own root: `$MINARI_DATASETS_PATH`, else `~/.minari/datasets` (not created by asking)."""
    own = os.environ.get("MINARI_DATASETS_PATH")
    return Path(own) if own else home("MINARI_DATASETS_PATH") / ".minari" / "datasets"


@contextmanager
def new_folder(folder: Path, root: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty folder to write into; when the block ends without an error it becomes `folder`, in one step.

    `root` is on the same disk and holds what is being written. Raises `FileExistsError` where another process was faster (its folder stays),
    other kinds of `OSError` where nothing can be written.
    """
    temporary = root / f".building-{uuid.uuid4().hex}"
    try:
        (temporary / "new").mkdir(parents=True)
        claim(temporary)
        remove_leftovers(root, ".building-*")
        yield temporary / "new"
        folder.parent.mkdir(parents=True, exist_ok=True)
        if replace and folder.exists():
            folder.rename(temporary / "old")
        try:
            (temporary / "new").rename(folder)
        except OSError as error:
            if folder.exists():
                raise FileExistsError(f"{folder} has been made by another process") from error
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def claim(folder: Path) -> None:
    """Write into a temporary folder which process fills it."""
    (folder / OWNER).write_text(json.dumps([this_machine(), os.getpid()]))


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Delete temporary folders of that name pattern whose process is dead: known to be on this machine, taken for dead after a day otherwise."""
    for path in folder.glob(pattern):
        try:
            if _is_abandoned(path) or time.time() - path.stat().st_mtime > DAY:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:  # another process has removed it
            continue


def _is_abandoned(folder: Path) -> bool:
    """Whether the process that filled a temporary folder was one of this machine, and is gone."""
    try:
        machine, process = json.loads((folder / OWNER).read_text())
        return bool(machine == this_machine() and not is_alive(int(process)))
    except (OSError, ValueError, TypeError):
        return False
