"""Processes that have imported rlkit2 when they begin: `Popen` and `run` as in `subprocess`, for commands of this Python.

Importing torch and rlkit2 takes a process two seconds, and tests that kill, interrupt or limit one start dozens. Here one server for the whole run of
the tests imports everything, and forks for every command: each is a process of its own, with its own number, signals, limits, files and end. What is
about the imports, the interpreter's own options or the parent of a process takes `subprocess`.
"""

from __future__ import annotations

import array
import atexit
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import IO, Any, NoReturn

import pytest

from rlkit2.sweeps import engines

PRELOADED = (
    "rlkit2.api",
    "rlkit2.cli.train",
    "rlkit2.envs.builtin",
    "rlkit2.preferences.labelling",
    "rlkit2.sweeps.worker",
)
OURS = ("RLKIT2_", "MINARI_")
RLKIT2 = os.path.join(os.path.dirname(sys.executable), "rlkit2")
DEVNULL, PIPE, STDOUT = subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT


class Popen:
    """The part of `subprocess.Popen` that the tests use, for `python -c ...`, `python -m ...`, `python FILE ...` and `rlkit2 ...`."""

    def __class_getitem__(cls, kind: Any) -> type[Popen]:
        return cls

    def __init__(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        start_new_session: bool = False,
        text: bool = True,
    ) -> None:
        assert text, "bytes are not needed yet"
        program, *words = map(os.fspath, command)
        if program == RLKIT2:
            words[:0] = ["-m", "rlkit2.cli.main"]
        else:
            assert program == sys.executable
        self.returncode: int | None = None
        request = {
            "words": words,
            "env": dict(os.environ if env is None else env),
            "cwd": os.getcwd() if cwd is None else os.fspath(cwd),
            "session": start_new_session,
        }
        theirs: list[int] = []
        opened: list[int] = []
        self.stdin = self._end(stdin, 0, theirs, opened)
        self.stdout = self._end(stdout, 1, theirs, opened)
        self.stderr = self._end(stderr, 2, theirs, opened)
        self._status, told = socket.socketpair()
        with told:
            self.pid = _ask(request, [*theirs, told.fileno()])
        for number in opened:
            os.close(number)

    @staticmethod
    def _end(given: int | IO[Any] | None, number: int, theirs: list[int], opened: list[int]) -> Any:
        """Our end of a pipe, if one is wanted; `theirs` gets what the process is to use."""
        if given == PIPE:
            read, write = os.pipe()
            mine, other = (write, read) if number == 0 else (read, write)
            theirs.append(other)
            opened.append(other)
            return open(mine, "w" if number == 0 else "r")
        if given == DEVNULL:
            opened.append(os.open(os.devnull, os.O_RDWR))
            theirs.append(opened[-1])
        elif given == STDOUT:
            theirs.append(theirs[1])
        elif given is None:
            theirs.append(number)
        else:
            theirs.append(given if isinstance(given, int) else given.fileno())
        return None

    def poll(self) -> int | None:
        """The exit status, or minus the signal that killed it; None while it lives."""
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end."""
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("a warm process", timeout or 0.0)
        return code

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            with selectors.DefaultSelector() as ready:
                ready.register(self._status, selectors.EVENT_READ)
                if ready.select(timeout):
                    said = self._status.recv(32)
                    assert said, "the server of warm processes has died"
                    self.returncode = int(said)
                    self._status.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it printed until its end."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if self.stdin is not None:
            self.stdin.close()
        said: dict[Any, list[bytes]] = {stream: [] for stream in (self.stdout, self.stderr) if stream is not None}
        with selectors.DefaultSelector() as ready:
            for stream in said:
                ready.register(stream, selectors.EVENT_READ)
            while ready.get_map():
                left = None if deadline is None else deadline - time.monotonic()
                found = ready.select(left)
                if not found:
                    raise subprocess.TimeoutExpired("a warm process", timeout or 0.0)
                for key, _ in found:
                    part = os.read(key.fd, 1 << 16)
                    said[key.fileobj].append(part)
                    if not part:
                        ready.unregister(key.fileobj)
        self.wait(timeout)
        out, error = (
            b"".join(said[stream]).decode() if stream in said else "" for stream in (self.stdout, self.stderr)
        )
        return out, error

    def send_signal(self, number: int) -> None:
        """As `kill` of a shell; nothing where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Without a chance to save anything."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Popen:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()


def run(command: Sequence[str | os.PathLike[str]], *, timeout: float | None = None, **options: Any) -> Any:
    """As `subprocess.run(command, capture_output=True, text=True)`."""
    with Popen(command, stdout=PIPE, stderr=PIPE, **options) as process:
        out, error = process.communicate(timeout)
    return subprocess.CompletedProcess(command, process.returncode or 0, out, error)


def warm_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The local engine of sweeps and studies begins warm processes; `test_local_runs_are_those_of_train` holds it with plain ones."""
    monkeypatch.setattr(engines, "subprocess", SimpleNamespace(Popen=Popen, PIPE=PIPE))


@cache
def _server() -> tuple[socket.socket, IO[bytes]]:
    """The one of this process, which ends with it."""
    mine, other = socket.socketpair()
    plain = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    with other:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", str(other.fileno())],
            pass_fds=[other.fileno()],
            cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
            env={**plain, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def end() -> None:
        mine.shutdown(socket.SHUT_RDWR)
        server.wait()

    atexit.register(end)
    return mine, mine.makefile("rb")


def _ask(request: dict[str, Any], files: list[int]) -> int:
    connection, answers = _server()
    message = json.dumps(request).encode() + b"\n"
    sent = socket.send_fds(connection, [message], files)
    connection.sendall(message[sent:])
    return int(answers.readline())


# The server


def _requests(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next request with the files it brings."""
    space = socket.CMSG_SPACE(4 * array.array("i").itemsize)
    message, extra, *_ = connection.recvmsg(1 << 16, space)
    if not message:
        return None
    files = array.array("i")
    files.frombytes(extra[0][2])
    while not message.endswith(b"\n"):
        message += connection.recv(1 << 16)
    return json.loads(message), list(files)


def serve(connection: socket.socket) -> dict[str, Any] | None:
    """Fork for every request, and say how each child ended; returns in a child what it is to do, and None at the end."""
    alarm, awake = os.pipe()
    for number in (alarm, awake):
        os.set_blocking(number, False)
    signal.set_wakeup_fd(awake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    told: dict[int, int] = {}
    ready = selectors.DefaultSelector()
    ready.register(connection, selectors.EVENT_READ)
    ready.register(alarm, selectors.EVENT_READ)
    while True:
        called = [key.fileobj for key, _ in ready.select()]
        if connection in called:
            found = _requests(connection)
            if found is None:
                return None
            request, files = found
            child = os.fork()
            if child == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                ready.close()
                for number in (alarm, awake, *told.values()):
                    os.close(number)
                connection.close()
                _put_on(request, files)
                return request
            for number in files[:3]:
                os.close(number)
            told[child] = files[3]
            connection.sendall(b"%d\n" % child)
        if alarm in called:
            os.read(alarm, 1 << 12)
            while told:
                child, status = os.waitpid(-1, os.WNOHANG)
                if child == 0:
                    break
                with socket.socket(fileno=told.pop(child)) as end:
                    end.sendall(b"%d" % os.waitstatus_to_exitcode(status))


def _put_on(request: dict[str, Any], files: list[int]) -> None:
    """Files, environment and folder of a request."""
    if request["session"]:
        os.setsid()
    for number, given in enumerate(files[:3]):
        os.dup2(given, number)
    for number in files:
        os.close(number)
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    os.chdir(request["cwd"])
    buffered = 1 if "PYTHONUNBUFFERED" in os.environ else -1
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", buffered, closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)


def leave(words: list[str]) -> NoReturn:
    """What `python WORDS` does, to its end, but for tearing down all that is imported: that takes as long as the importing."""
    code: Any = 0
    try:
        become(words)
    except SystemExit as end:
        code = end.code or 0
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:  # noqa: BLE001 - the interpreter prints whatever comes
        traceback.print_exc()
        code = 1
    if not isinstance(code, int):
        sys.stderr.write(f"{code}\n")
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # pools end, other threads are waited for
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def become(words: list[str]) -> None:
    """What `python WORDS` does."""
    kind = words.pop(0) if words[0] in ("-c", "-m") else ""
    what, sys.argv = words[0], [kind or words[0], *words[1:]]
    sys.path[0] = os.path.dirname(os.path.abspath(what)) if kind == "" else os.getcwd()
    if kind == "-c":
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.modules.pop(what, None)
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    for module in PRELOADED:
        __import__(module)
    gc.freeze()  # a collection would write to every page that the children share
    if (task := serve(socket.socket(fileno=int(sys.argv[1])))) is not None:
        leave(task["words"])
