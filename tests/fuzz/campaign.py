"""Damages files of every kind and uses them: `python -m tests.fuzz.campaign --minutes 30`.

Every input has a number: the same number is the same damage and the same use. What ends in anything but an exit status or an error of rlkit2,
takes too long or too much memory, is printed with its number; `--only NUMBER` repeats it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from types import FrameType

from tests.fuzz.kinds import KINDS, Kind, chosen_file
from tests.fuzz.mutate import damaged
from tests.training.tiny_problem import tiny_dataset

SECONDS = 60
MEMORY = 8 * 2**30


class Hang(BaseException):
    """An input took too long."""


def originals(root: Path) -> dict[str, Path]:
    """One whole folder of every kind."""
    tiny_dataset().to_minari("tiny/walk-v0")
    found = {}
    for kind in KINDS:
        folder = root / kind.name
        folder.mkdir(parents=True)
        kind.make(folder)
        found[kind.name] = folder
    return found


def try_one(number: int, whole: dict[str, Path], scratch: Path, kind: Kind | None = None) -> tuple[str, str | None]:
    """Damage one file and use it; what was done, and the traceback where there was one."""
    generator = random.Random(number)
    kind = kind or generator.choices(KINDS, [kind.weight for kind in KINDS])[0]
    folder = scratch / "input"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole[kind.name], folder)
    path = chosen_file(folder, kind, generator)
    what = f"{number}: {kind.name}/{path.relative_to(folder)} {damaged(path, generator)}"
    use = generator.choice(kind.uses)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            use(folder)
    except (Exception, Hang, SystemExit):  # noqa: BLE001 - any of them is a finding
        return what, traceback.format_exc()
    return what, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--kind", choices=[kind.name for kind in KINDS], help="this kind of files alone")
    parser.add_argument("--only", type=int, help="this input alone")
    options = parser.parse_args()
    kind = next((kind for kind in KINDS if kind.name == options.kind), None)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    def late(number: int, frame: FrameType | None) -> None:
        raise Hang(f"longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    faults: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        os.environ.update(RLKIT2_CACHE=str(root / "cache"), MINARI_DATASETS_PATH=str(root / "minari"))
        whole = originals(root / "whole")
        until = time.monotonic() + 60 * options.minutes
        number = options.first if options.only is None else options.only
        done = 0
        while time.monotonic() < until:
            signal.alarm(SECONDS)
            what, fault = try_one(number, whole, root, kind)
            signal.alarm(0)
            done += 1
            if fault is not None:
                faults[fault.strip().splitlines()[-1][:120]] += 1
                sys.stdout.write(f"{what}\n{fault}\n")
            if options.only is not None:
                sys.stdout.write(f"{what}\n")
                break
            number += 1
    sys.stdout.write(f"{done} inputs, {sum(faults.values())} faults of {len(faults)} kinds\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
