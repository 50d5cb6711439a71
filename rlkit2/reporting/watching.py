"""A report that is kept up to date while runs are trained: served on this machine alone, made anew when a file of a run has changed."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

WATCHED = ("config.json", "manifest.json", "metrics.jsonl", "evaluations.jsonl")


def state_of(paths: Sequence[Path]) -> str:
    """What changes when a file of these runs grows or is replaced, or a path comes or goes."""
    seen = []
    for path in paths:
        for name in WATCHED:
            try:
                facts = os.stat(path / name)
                seen.append((str(path), name, facts.st_size, facts.st_mtime_ns))
            except OSError:
                seen.append((str(path), name, -1, 0))
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


@contextmanager
def served(page: Callable[[str], str], stamp: Callable[[], str], *, port: int = 0) -> Iterator[str]:
    """Serve `page(stamp)` on loopback while the block runs; gives its address. A page is made when it is asked for and the stamp has changed.

    `port`: 0 takes a free one. Only requests that name this machine are answered, so that no page of another site can read it.
    """
    made: dict[str, bytes] = {}
    lock = threading.Lock()

    def current() -> bytes:
        with lock:
            now = stamp()
            if now not in made:
                made.clear()
                made[now] = page(now).encode()
            return made[now]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the name that http.server calls
            host = (self.headers.get("Host") or "").rpartition(":")[0]
            if host not in ("127.0.0.1", "localhost"):
                self.send_error(HTTPStatus.FORBIDDEN)
            elif self.path == "/":
                self._answer(current(), "text/html; charset=utf-8")
            elif self.path == "/stamp":
                self._answer(stamp().encode(), "text/plain")
            else:
                self.send_error(HTTPStatus.NOT_FOUND)

        def _answer(self, content: bytes, kind: str) -> None:
            self.send_response(HTTPStatus.OK)
            for name, value in (
                ("Content-Type", kind),
                ("Content-Length", str(len(content))),
                ("Cache-Control", "no-store"),
                ("X-Content-Type-Options", "nosniff"),
                ("X-Frame-Options", "DENY"),
            ):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *values: object) -> None:
            """Nothing: the terminal is for the runs."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
