"""Who may write a run's folder: one process, also where several machines see the folder and their locks do not see each other."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlkit2.errors import RunError
from rlkit2.files import writing
from rlkit2.processes import is_alive, this_machine

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

BEAT = 10.0  # seconds between two signs of life
SILENCE = 60.0  # seconds without one after which an owner on another machine is taken for dead
FILE = ".owner"


class TakenOverError(RunError):
    """The folder belongs to another process by now; nothing more may be written to it."""


class Owner:
    """The process that holds a folder. `.owner` names it, and its time of change is the last sign of life, by the clock of the file system.

    Args:
        folder: what is held.
        alone: whether the system's own lock says that no process of this machine holds it.
        say: told when a silent owner's place is taken.
    """

    def __init__(self, folder: Path, *, alone: bool, say: Callable[[str], None] = lambda text: None) -> None:
        self.path = folder / FILE
        self.token = uuid.uuid4().hex
        self._end = threading.Event()
        mine = folder / f"{FILE}.{self.token}.tmp"
        try:
            mine.write_text(
                json.dumps(
                    {
                        "host": socket.gethostname(),
                        "machine": this_machine(),
                        "process": os.getpid(),
                        "token": self.token,
                    }
                )
            )
            self._take(mine, alone, say)
        finally:
            mine.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise `TakenOverError` where another process has taken the folder since, as from a machine that was asleep."""
        found = read_owner(self.path)
        if found is None or found["token"] != self.token:
            by = "" if found is None else f" by process {found['process']} on {found['host']}"
            raise TakenOverError(f"{self.path.parent} was taken over{by} while this process was silent; it stops here")

    def release(self) -> None:
        """Give the folder back."""
        self._end.set()
        self._thread.join()
        with suppress(OSError, RunError):
            self.check()
            self.path.unlink()

    def _take(self, mine: Path, alone: bool, say: Callable[[str], None]) -> None:
        before = read_owner(self.path)
        if before is None and self.path.exists() and read_owner(self.path) is None:
            self.path.unlink()  # half a file, of nobody
        if before is not None:
            silent, who = mine.stat().st_mtime - before["seen"], f"process {before['process']} on {before['host']}"
            here = before["machine"] == this_machine()
            if silent < SILENCE and not (here and (alone or not _lives(before["process"]))):
                raise RunError(
                    f"{self.path.parent} is being trained by {who} (last sign of life {max(silent, 0):.0f} s ago); stop it first, or wait until it "
                    f"was silent for {SILENCE:.0f} s"
                )
            if not here:
                say(f"{who} was silent for {silent:.0f} s; its place is taken")
            os.replace(self.path, mine.with_suffix(".old"))
            mine.with_suffix(".old").unlink()
        try:
            os.link(mine, self.path)  # decides between machines that come together
        except FileExistsError:
            self.check()
        except OSError:  # a file system without links
            os.replace(mine, self.path)

    def _beat(self) -> None:
        while not self._end.wait(BEAT):
            try:
                self.check()
                os.utime(self.path)
            except (OSError, RunError):  # said where something is to be written
                return


def read_owner(path: Path) -> dict[str, Any] | None:
    """What an `.owner` file says, with `seen`, its last sign of life; None where there is none, or half a one."""
    try:
        found = json.loads(path.read_text())
        names = {name: str(found[name]) for name in ("host", "machine", "token")}
        return {**names, "process": int(found["process"]), "seen": path.stat().st_mtime}
    except (OSError, ValueError, LookupError, TypeError):
        return None


def is_owned(folder: Path) -> bool:
    """Whether a process on another machine gave a sign of life lately, or one on this machine holds the folder."""
    if fcntl is not None and (folder / ".lock").exists():
        descriptor = os.open(folder / ".lock", os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:  # held, or a file system without locks
            return True
        finally:
            os.close(descriptor)
    owner = read_owner(folder / FILE)
    if owner is None:
        return False
    if owner["machine"] == this_machine():
        return bool(fcntl is None and _lives(owner["process"]))
    return bool(time.time() - owner["seen"] < SILENCE)


@contextmanager
def owned(folder: Path, say: Callable[[str], None] = lambda text: None) -> Iterator[Owner]:
    """Hold a folder for writing; the system gives it back even when the process is killed.

    Raises:
        RunError: another process holds it.
    """
    with writing(folder):
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        alone = False
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except BlockingIOError as error:
                raise RunError(f"{folder} is being trained by another process; wait for it or stop it first") from error
            except OSError:  # a file system without locks
                alone = False
        with writing(folder):
            owner = Owner(folder, alone=alone, say=say)
        try:
            yield owner
        finally:
            owner.release()
    finally:
        os.close(descriptor)


def _lives(process: int) -> bool:
    """Whether another process of that number is there on this machine."""
    return process != os.getpid() and is_alive(process)
