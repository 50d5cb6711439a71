"""Worker processes: a killed one is one line, and none outlives what started it."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rlkit2
from rlkit2.errors import RunError
from rlkit2.files import write_atomically
from rlkit2.processes import run_jobs


def square(number: int) -> int:
    return number * number


def die(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    return number


def refuse(number: int) -> int:
    raise ValueError(f"no {number}")


def test_results_come_from_one_process_or_several():
    assert sorted(run_jobs([(square, k) for k in range(4)], 1)) == [0, 1, 4, 9]
    assert sorted(run_jobs([(square, k) for k in range(4)], 2)) == [0, 1, 4, 9]


def test_a_killed_worker_and_an_error_are_what_they_are():
    with pytest.raises(RunError, match=r"a worker process was killed .* run the same command again"):
        list(run_jobs([(die, k) for k in range(4)], 2))
    for workers in (1, 2):
        with pytest.raises(ValueError, match="no 0"):
            list(run_jobs([(refuse, 0), (refuse, 0)], workers))


DRIVER = """
import sys
from rlkit2.processes import run_jobs
from tests.test_processes import wait_for_ever
if __name__ == "__main__":
    list(run_jobs([(wait_for_ever, sys.argv[1], k) for k in range(2)], 2))
"""


def wait_for_ever(folder: str, number: int) -> None:
    write_atomically(Path(folder, str(number)), str(os.getpid()))  # a busy machine shows the file before what is in it
    time.sleep(600)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_driver(tmp_path, number):
    (tmp_path / "driver.py").write_text(DRIVER)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, tmp_path / "driver.py", tmp_path]
    driver = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while len(list(tmp_path.glob("[01]"))) < 2:
        assert driver.poll() is None
        time.sleep(0.05)
    workers = [int(path.read_text()) for path in tmp_path.glob("[01]")]
    driver.send_signal(number)
    driver.wait(timeout=30)
    for _ in range(200):
        if not any(Path(f"/proc/{worker}").exists() for worker in workers):
            break
        time.sleep(0.05)
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]


def test_every_pool_of_processes_is_this_one():
    """Also those to come."""
    root = Path(rlkit2.__file__).parent
    pools = {"ProcessPoolExecutor", "Pool", "Process"}
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and (node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")) in pools
    }
    assert found == {"processes.py"}
