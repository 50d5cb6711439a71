"""A hub on this machine's loopback address: repositories in memory, in the protocol of Hugging Face's, with faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """`repositories`: name -> commits, oldest first. `faults`: part of "METHOD path" -> status, or "drop" for an answer that breaks off half way."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, list[Files]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.faults: dict[str, int | str] = {}
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repository: str) -> Files:
        """The newest commit."""
        return self.repositories[repository][-1]


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = f"{self.command} {path}"
        self.server.asked.append(asked)
        fault = next((fault for part, fault in self.server.faults.items() if part in asked), None)
        if isinstance(fault, int):
            self._send(b'{"error": "no"}', status=fault)
            return
        words = path.strip("/").split("/")
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._send(b'{"errors": [], "warnings": []}')
        elif words[:2] == ["api", "models"]:
            self._api("/".join(words[2:4]), words[4:], body)
        elif "resolve" in words:
            at = words.index("resolve")
            self._file("/".join(words[:at]), words[at + 1], "/".join(words[at + 2 :]), half=fault == "drop")
        else:
            self._send(b"{}", status=404)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        there = name in self.server.repositories
        self.server.repositories.setdefault(name, [])
        self.server.private.setdefault(name, bool(asked.get("private")) or asked.get("visibility") == "private")
        self._send(
            json.dumps({"url": f"{self.server.address}/{name}", "name": name}).encode(), status=409 if there else 200
        )

    def _api(self, name: str, rest: list[str], body: bytes) -> None:
        commits = self.server.repositories.get(name)
        if commits is None:
            self._send(b"{}", status=404, more={"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["preupload"]:
            found = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._send(json.dumps({"files": found}).encode())
        elif rest[:1] == ["commit"]:
            files = dict(commits[-1]) if commits else {}
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "header":
                    self.server.messages.append(entry["value"]["summary"])
                elif entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            commits.append(files)
            oid = f"{len(commits) - 1:040x}"
            self._send(
                json.dumps(
                    {"commitUrl": f"{self.server.address}/{name}/commit/{oid}", "commitOid": oid, "hookOutput": ""}
                ).encode()
            )
        elif rest[:1] == ["revision"] and rest[1] not in ("main", *(f"{at:040x}" for at in range(len(commits)))):
            self._send(b"{}", status=404, more={"X-Error-Code": "RevisionNotFound"})
        else:
            sha = rest[1] if rest[:1] == ["revision"] and rest[1] != "main" else f"{len(commits) - 1:040x}"
            self._send(json.dumps({"id": name, "sha": sha, "private": False, "tags": [], "siblings": []}).encode())

    def _file(self, name: str, revision: str, path: str, half: bool) -> None:
        commits = self.server.repositories.get(name, [])
        files = commits[int(revision, 16)] if commits else {}
        if path not in files:
            self._send(b"", status=404, more={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": revision})
            return
        content = files[path]
        etag = hashlib.sha256(content).hexdigest()
        self._send(content, more={"ETag": f'"{etag}"', "X-Repo-Commit": revision}, half=half)

    def _send(self, content: bytes, status: int = 200, more: dict[str, str] | None = None, half: bool = False) -> None:
        self.send_response(status)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **(more or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if half else content)
        if half:
            self.close_connection = True
