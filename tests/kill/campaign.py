"""Kills work at random moments, does it again and compares: `python -m tests.kill.campaign --kills 300`.

Each kill is a SIGKILL of the process that the user started, or of one of its workers where it has any. Afterwards the same work is begun again: it
must end well, with the same result as work that never was killed, without processes or temporary files left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from rlkit2.errors import RLKitError
from tests.kill.jobs import FailedError, Job, jobs, prepare

MARK = "RLKIT2_KILL"  # in the environment of every process of a piece of work
PATIENCE_OF_ORPHANS = 20.0  # seconds in which workers must notice that their parent is gone
LEFTOVERS = (".*.tmp", ".building-*", ".old-*", ".*.safetensors.*")
COLUMNS = ("kills", "of a worker", "same result", "other result", "error", "orphans", "leftovers")


def start(job: Job, folder: Path, mark: str, log: Path) -> int:
    """Do the work in a forked child, in a session of its own; 0 fine, 2 a clear error, 3 a traceback."""
    process = os.fork()
    if process:
        return process
    status = 3
    try:
        os.setsid()
        os.environ[MARK] = mark
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            try:
                job.work(folder)
                status = 0
            except (RLKitError, FailedError) as error:
                file.write(f"{error}\n")
                status = 2
            except BaseException:  # noqa: BLE001 (a forked child must not return)
                traceback.print_exc(file=file)
    finally:
        os._exit(status)


def descendants(process: int) -> list[int]:
    """Processes below one, by /proc."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, waiting = [], [process]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def marked(mark: str) -> Iterator[int]:
    """Processes that the work with this mark has started and that are still there."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in path.read_bytes():
                yield int(path.parent.name)


def ended(process: int, seconds: float) -> int | None:
    """The exit status of a child (negative: the signal), or None when it still runs after that time."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.005)


def kill_once(job: Job, folder: Path, seconds: float, rng: random.Random) -> Counter[str]:
    """One kill and what it came to; empty when the work had ended before."""
    mark = f"{os.getpid()}-{folder.name}"
    log = folder.with_suffix(".log")
    folder.mkdir()
    process = start(job, folder, mark, log)
    if ended(process, rng.uniform(0.02, 0.98) * seconds) is not None:
        return Counter()
    workers = descendants(process)
    victim = rng.choice(workers) if workers and rng.random() < 0.5 else process
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    found = Counter({"kills": 1, "of a worker": int(victim != process)})
    status = ended(process, 120)
    if victim != process and status == 3:
        found["error"] += 1
    until = time.monotonic() + PATIENCE_OF_ORPHANS
    while list(marked(mark)) and time.monotonic() < until:
        time.sleep(0.1)
    for orphan in marked(mark):
        found["orphans"] += 1
        with contextlib.suppress(ProcessLookupError):
            os.kill(orphan, signal.SIGKILL)
    status = ended(start(job, folder, mark, log), 600)
    if status != 0:
        found["error"] += 1
        sys.stdout.write(f"{job.name}: status {status}\n{log.read_text()[-2000:]}\n")
    return found


def judge(job: Job, folder: Path, whole: object, places: list[Path]) -> Counter[str]:
    """What came out of killed work in the end."""
    try:
        same = job.contents(folder) == whole
    except Exception:  # noqa: BLE001 - whatever it is, the result is not the same
        traceback.print_exc()
        same = False
    left = [path for place in places for pattern in LEFTOVERS for path in place.rglob(pattern)]
    for path in left:
        sys.stdout.write(f"{job.name} left {path}\n")
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return Counter({"same result" if same else "other result": 1, "leftovers": len(left)})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="in all, spread evenly over the kinds of work")
    parser.add_argument("--only", default="", help="kinds of work whose name begins so")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=240.0, help="after which no further kill is begun")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rng = random.Random(options.seed)
    table: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        places = [root / part for part in ("minari", "cache", "work")]
        for variable, place in zip(("MINARI_DATASETS_PATH", "RLKIT2_CACHE"), places, strict=False):
            os.environ[variable] = str(place)
        for place in (*places, root / "shared"):
            place.mkdir()
        with contextlib.redirect_stdout(sys.stderr):
            prepare(root / "shared")
        wholes: dict[str, tuple[object, float]] = {}
        chosen = [job for job in jobs(root / "shared", places[0]) if job.name.startswith(options.only)]
        tries, until = 0, time.monotonic() + 60 * options.minutes
        while (
            time.monotonic() < until
            and sum(found["kills"] for found in table.values()) < options.kills
            and tries < 5 * options.kills
        ):
            job = chosen[tries % len(chosen)]
            tries += 1
            if job.name not in wholes:
                folder = places[2] / f"whole{len(wholes)}"
                folder.mkdir()
                began = time.monotonic()
                status = ended(start(job, folder, "whole", folder.with_suffix(".log")), 600)
                if status != 0:
                    sys.stdout.write(f"{job.name} fails by itself: {folder.with_suffix('.log').read_text()[-2000:]}\n")
                    return 1
                wholes[job.name] = job.contents(folder), time.monotonic() - began
            folder = places[2] / f"killed{tries}"
            whole, seconds = wholes[job.name]
            found = kill_once(job, folder, seconds, rng)
            if found:
                found += judge(job, folder, whole, places)
                table.setdefault(job.name, Counter()).update(found)
                sys.stderr.write(f"{job.name}: {dict(found)}\n")
            shutil.rmtree(folder, ignore_errors=True)
    rows = [(name, *(found[column] for column in COLUMNS)) for name, found in table.items()]
    rows.append(("all", *(sum(found[column] for found in table.values()) for column in COLUMNS)))
    for row in (("work", *COLUMNS), *rows):
        sys.stdout.write(f"{row[0]:<16}" + "".join(f"{cell!s:>14}" for cell in row[1:]) + "\n")
    bad = ("other result", "error", "orphans", "leftovers")
    return int(any(found[column] for found in table.values() for column in bad))


if __name__ == "__main__":
    sys.exit(main())
