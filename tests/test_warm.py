"""Warm processes are processes: their own number, words, files, environment, folder, signals and end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm

SHOW = """
import os, sys
print(os.getpid(), sys.argv[1:], os.getcwd(), os.environ["WORD"], sys.stdin.read(), "torch" in sys.modules)
print("bad", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


def test_it_is_what_a_process_is(tmp_path: Path) -> None:
    command, environment = [sys.executable, "-c", SHOW, "3", "b"], {**os.environ, "WORD": "w"}
    process = warm.Popen(command, stdin=warm.PIPE, stdout=warm.PIPE, stderr=warm.PIPE, env=environment, cwd=tmp_path)
    assert process.poll() is None
    process.stdin.write("text")
    out, error = process.communicate(timeout=60)
    assert out == f"{process.pid} ['3', 'b'] {tmp_path} w text True\n"
    assert (error, process.returncode) == ("bad\n", 3)
    assert process.pid != os.getpid()
    assert not Path(f"/proc/{process.pid}").exists()


def test_ends_are_told() -> None:
    wait = [sys.executable, "-c", "import time; print('on', flush=True); time.sleep(600)"]
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        with warm.Popen(wait, stdout=warm.PIPE, stderr=warm.DEVNULL) as process:
            assert process.stdout.readline() == "on\n"
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.01)
            process.send_signal(number)
            assert process.wait(60) == -number
    done = warm.run([sys.executable, "-c", "1 / 0"])
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_modules_and_files(tmp_path: Path) -> None:
    done = warm.run([sys.executable, "-m", "rlkit2.cli.main", "--version"])
    assert (done.returncode, done.stdout[:7], done.stderr) == (0, "rlkit2 ", "")
    (tmp_path / "beside.py").write_text("word = 'found'")
    (tmp_path / "file.py").write_text("import sys, beside; print(beside.word, sys.argv)")
    done = warm.run([sys.executable, tmp_path / "file.py", "a"])
    assert done.stdout == f"found ['{tmp_path / 'file.py'}', 'a']\n"


def test_files_are_closed_with_their_process() -> None:
    """An end of a pipe that another process held would keep its reader waiting for ever."""
    first = warm.Popen([sys.executable, "-c", "input()"], stdin=warm.PIPE)
    second = warm.Popen([sys.executable, "-c", "print(1)"], stdout=warm.PIPE)
    assert second.communicate(60)[0] == "1\n"
    first.stdin.close()
    assert first.wait(60) == 1
