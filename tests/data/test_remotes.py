"""Downloads from a server that answers as the hub does: whole, interrupted, missing."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from huggingface_hub import constants

import rlkit2
from rlkit2.data import local_datasets, read_dataset
from rlkit2.data.remotes import online
from rlkit2.errors import DatasetNotFoundError
from tests.data.make import FAMILIES, Ending, make_minari

REPO, COMMIT = "farama-minari/far", "0" * 40
ID = "far/away/place-v0"


class Hub(ThreadingHTTPServer):
    """Serves the folder of a namespace as a repository of datasets; `broken` names a file whose download stops half way."""

    folder: Path
    broken: str = ""
    asked: list[str]


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        url = urlsplit(self.path)
        self.server.asked.append(url.path)
        resolve = f"/datasets/{REPO}/resolve/"
        if url.path == "/api/datasets":
            found = (
                [{"id": REPO, "private": False, "tags": []}]
                if "far" in parse_qs(url.query).get("search", ["far"])[0]
                else []
            )
            self._send(json.dumps(found).encode(), body)
        elif url.path.startswith(f"/api/datasets/{REPO}/tree/"):
            files = [path for path in sorted(self.server.folder.rglob("*")) if path.is_file()]
            tree = [
                {
                    "type": "file",
                    "path": path.relative_to(self.server.folder).as_posix(),
                    "size": path.stat().st_size,
                    "oid": "1" * 40,
                }
                for path in files
            ]
            self._send(json.dumps(tree).encode(), body)
        elif url.path.startswith(f"/api/datasets/{REPO}"):
            names = [
                {"rfilename": path.relative_to(self.server.folder).as_posix()}
                for path in self.server.folder.rglob("*")
                if path.is_file()
            ]
            self._send(
                json.dumps({"id": REPO, "sha": COMMIT, "private": False, "tags": [], "siblings": names}).encode(), body
            )
        elif url.path.startswith(resolve):
            name = url.path.removeprefix(resolve).split("/", 1)[1]
            path = self.server.folder / name
            if not path.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self._send(path.read_bytes(), body, half=body and name.endswith(self.server.broken or "\0"))
        else:
            self.send_error(404)

    def _send(self, content: bytes, body: bool, half: bool = False) -> None:
        self.send_response(200)
        for name, value in (
            ("Content-Length", str(len(content))),
            ("ETag", f'"{hash(content):x}"'),
            ("X-Repo-Commit", COMMIT),
        ):
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if half else content)
        if half:
            self.close_connection = True


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub with one dataset in it, which is no longer here; the client's endpoint points there."""
    made = make_minari([Ending(3, True, False), Ending(40, False, True)], *FAMILIES["box32"], dataset_id=ID)
    root = Path(made.storage.data_path).parents[3]
    served = tmp_path / "served"
    shutil.move(root / "far", served)
    (served / "namespace_metadata.json").write_text(json.dumps({"namespaces": ["far/away"], "datasets": [ID]}))
    (served / "away" / "namespace_metadata.json").write_text("{}")
    server = Hub(("127.0.0.1", 0), Answer)
    server.folder, server.asked = served, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)  # read from the variable when the client was imported
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_dataset_is_downloaded_with_its_progress(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    assert ID not in local_datasets()
    dataset = rlkit2.load_dataset(ID)
    assert dataset.episode_lengths.tolist() == [3, 40]
    out, err = capfd.readouterr()
    assert out == ""  # standard output belongs to what the command prints
    assert "Downloading far/away/place-v0" in err
    assert "100%" in err
    assert ID in local_datasets()
    asked = len(hub.asked)
    assert torch.equal(read_dataset(ID, cache=False).observations, dataset.observations)
    assert len(hub.asked) == asked
    assert not list(local_datasets()[ID].parents[3].glob(".building-*"))


def test_an_interrupted_download_leaves_nothing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.broken = "main_data.hdf5"
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits before it tries again
    with pytest.raises(DatasetNotFoundError, match="Minari could not download it"):
        rlkit2.load_dataset(ID)
    assert ID not in local_datasets()
    root = hub.folder.parent / "minari"
    assert not [path for path in root.rglob("*") if path.is_file()]
    hub.broken = ""
    assert len(rlkit2.load_dataset(ID)) == 43


def test_what_the_remote_does_not_have_is_said(hub: Hub) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"far/away/place-v1.*could not download it"):
        rlkit2.load_dataset("far/away/place-v1")


def test_the_endpoint_decides_whether_there_is_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert online()
    monkeypatch.setenv("HF_ENDPOINT", "http://nowhere.invalid")
    assert not online()
