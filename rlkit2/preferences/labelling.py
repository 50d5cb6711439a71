"""Labelling by a person: a page in the browser that shows two segments and remembers every answer.

The page is for the person at this computer: it listens on the loopback interface alone, and answers nothing to a request that does
not carry the token of its address.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import socket
import webbrowser
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.preferences import PreferenceDataset, SegmentIndex, parse_json, transitions_hash
from rlkit2.errors import ConfigError, CorruptDatasetError, DatasetError, EnvironmentUnavailableError, require
from rlkit2.files import make_folder, write_atomically, writing
from rlkit2.preferences.pictures import FrameRenderer, animation, offscreen, state_plot
from rlkit2.preferences.samplers import PairModel, sample_pairs

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None  # type: ignore[assignment]

SESSION_FILE = "session.json"
ANSWERS = {"left": 0.0, "right": 1.0, "equal": 0.5, "skip": None}
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}
LONGEST_BODY = 4096  # bytes; an answer has fewer than 50
OPENER = ".open.html"
EnvironmentMaker = Callable[[], "gymnasium.Env[Any, Any]"]


class LabellingSession:
    """Pairs to ask about and the answers so far, both in the folder of the labels; every answer is on the disk before it counts.

    `session.json` holds pairs and answers; the labels (`PreferenceDataset`) are written from it after every change, so a kill at any moment
    loses nothing: the next session starts where the last answer was.

    Args:
        dataset: where the segments are.
        out: folder of the labels; a session that is there is resumed.
        count: pairs in all; a larger number prolongs a session.
        length, stride: see `SegmentIndex`.
        sampler, model, seed: see `sample_pairs`.

    Raises:
        DatasetError: the folder belongs to another dataset or length, or cannot be written; CorruptDatasetError: `session.json` is damaged.
    """

    def __init__(
        self,
        dataset: TransitionDataset,
        out: str | os.PathLike[str],
        *,
        count: int = 100,
        length: int = 50,
        stride: int = 1,
        sampler: str = "uniform",
        model: PairModel | None = None,
        seed: int = 0,
    ) -> None:
        self.dataset, self.out, self.length = dataset, Path(out), length
        self.index = SegmentIndex(dataset, length, stride)
        self.pairs: list[list[int]] = []  # rows at which the first and the second segment start
        self.answers: list[str] = []
        self.source = {"person": "labelling page", "sampler": sampler, "seed": seed}
        if (self.out / SESSION_FILE).exists():
            self._read()
        elif (self.out / "preferences.json").exists():
            raise DatasetError(f"{self.out} holds labels that were not made on the labelling page; name another folder")
        missing = count - len(self.pairs)
        if missing > 0:
            ids = sample_pairs(self.index, missing, sampler, model=model, seed=seed + len(self.pairs))
            self.pairs += self.index.starts[ids].tolist()
        self._save()

    def _read(self) -> None:
        path = self.out / SESSION_FILE
        try:
            found = parse_json(path.read_bytes())
            self.pairs, self.answers = found["pairs"], found["answers"]
            known, length = found["dataset_hash"], found["length"]
            if not all(isinstance(kept, list) for kept in (self.pairs, self.answers)):
                raise ValueError("pairs and answers are lists")
            if not all(len(pair) == 2 and all(type(start) is int for start in pair) for pair in self.pairs):
                raise ValueError("a pair is not two rows")
            if not set(self.answers) <= set(ANSWERS) or len(self.answers) > len(self.pairs):
                raise ValueError("answers that do not fit the pairs")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptDatasetError(f"{path} is damaged ({error}); move it away to start again") from error
        if known != transitions_hash(self.dataset) or length != self.length:
            raise DatasetError(
                f"{self.out} is a session about {found['dataset']} with segments of {length} steps, not about {self.dataset.spec.id} "
                f"as given with {self.length}; name another folder"
            )
        known_rows = set(SegmentIndex(self.dataset, self.length).starts.tolist())
        outside = [start for pair in self.pairs for start in pair if start not in known_rows]
        if outside:
            raise CorruptDatasetError(
                f"{path} is damaged (no segment starts at row {outside[0]}); move it away to start again"
            )

    def _save(self) -> None:
        session = {
            "dataset": self.dataset.spec.id,
            "dataset_hash": transitions_hash(self.dataset),
            "length": self.length,
            "pairs": self.pairs,
            "answers": self.answers,
        }
        make_folder(self.out)
        write_atomically(self.out / SESSION_FILE, json.dumps(session) + "\n", private=True)
        self.labels().save(self.out)

    def labels(self) -> PreferenceDataset:
        """The answers that are labels (all but skipped pairs)."""
        kept = [i for i, answer in enumerate(self.answers) if ANSWERS[answer] is not None]
        starts = torch.tensor([self.pairs[i] for i in kept], dtype=torch.int64).reshape(-1, 2)
        mass = torch.tensor([ANSWERS[self.answers[i]] for i in kept], dtype=torch.float64)
        return PreferenceDataset.from_starts(
            self.dataset, starts[:, 0], starts[:, 1], mass, self.source, length=self.length
        )

    def answer(self, index: int, answer: str) -> bool:
        """Record the answer to pair `index`; False (and nothing changes) where that pair is not the one being asked.

        Raises:
            ConfigError: no such answer.
        """
        if answer not in ANSWERS:
            raise ConfigError(f"unknown answer {answer!r}; choose one of: {', '.join(ANSWERS)}")
        if index != len(self.answers) or index >= len(self.pairs):
            return False
        self._keep([*self.answers, answer])
        return True

    def undo(self, index: int) -> bool:
        """Take the answer before pair `index` back; False (and nothing changes) where `index` is not being asked, or is the first."""
        if not self.answers or index != len(self.answers):
            return False
        self._keep(self.answers[:-1])
        return True

    def _keep(self, answers: list[str]) -> None:
        """Save with other answers; they count only if they are on the disk."""
        before, self.answers = self.answers, answers
        try:
            self._save()
        except DatasetError:
            self.answers = before
            raise

    def state(self) -> dict[str, Any]:
        """Where the session stands."""
        return {
            "index": len(self.answers),
            "total": len(self.pairs),
            "labels": sum(ANSWERS[answer] is not None for answer in self.answers),
            "done": len(self.answers) >= len(self.pairs),
            "dataset": self.dataset.spec.id,
            "steps": self.length,
        }

    def fields(self, index: int, side: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Observations `[H, obs]` and actions `[H, ...]` of the first (0) or second (1) segment of a pair."""
        start = self.pairs[index][side]
        rows = torch.arange(start, start + self.length)
        return self.dataset.observations[rows].numpy(), self.dataset.actions[rows].numpy()


class Pictures:
    """Pictures of segments: animated frames, or plots where there are none (`reason` says why). Use from one thread."""

    def __init__(self, session: LabellingSession, make_environment: EnvironmentMaker | None) -> None:
        self.session = session
        self.reason = "no environment is known"
        self.renderer: FrameRenderer | None = None
        observations = session.dataset.observations
        self.limits = observations.amin(0).numpy(), observations.amax(0).numpy()
        self._names = _column_names(session.dataset)
        self.picture = lru_cache(maxsize=32)(self._picture)
        if make_environment is not None:
            try:
                offscreen()
                self.renderer = FrameRenderer(make_environment(), observations[0].numpy())
                self.reason = ""
            except EnvironmentUnavailableError as error:
                self.reason = str(error)

    def _picture(self, start: int) -> tuple[bytes, str]:
        rows = torch.arange(start, start + self.session.length)
        observations = self.session.dataset.observations[rows].numpy()
        if self.renderer is not None:
            try:
                return animation(self.renderer.frames(observations)), "image/gif"
            except EnvironmentUnavailableError as error:
                self.renderer, self.reason = None, str(error)
        actions = self.session.dataset.actions[rows].numpy()
        return state_plot(observations, actions, self.limits, self._names), "image/png"


def _column_names(dataset: TransitionDataset) -> list[str]:
    ranges = dataset.spec.observation_ranges
    return [f"{key}[{i - start}]" for key, (start, stop) in ranges.items() if key for i in range(start, stop)]


def labelling_app(session: LabellingSession, token: str, make_environment: EnvironmentMaker | None = None) -> Any:
    """The page as an ASGI application.

    Everything lives under `/<token>/`; any other request, and one whose Host is not this computer's loopback name, gets an empty 404.
    Pictures and files are handled by one thread, as graphics contexts belong to a thread.

    Raises:
        MissingExtraError: the extra `label` is not installed.
    """
    require("starlette", extra="label")
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    page = resources.files("rlkit2.preferences").joinpath("labelling_page.html").read_text(encoding="utf-8")
    worker = ThreadPoolExecutor(1, thread_name_prefix="rlkit2-label")
    made: list[Pictures] = []

    async def apart(function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(worker, function, *arguments)

    def pictures() -> Pictures:
        if not made:
            made.append(Pictures(session, make_environment))
        return made[0]

    def state() -> dict[str, Any]:
        return {**session.state(), "frames": pictures().renderer is not None, "reason": pictures().reason}

    def answered(index: int, answer: str) -> tuple[bool, dict[str, Any]]:
        return session.answer(index, answer), state()

    def undone(index: int) -> tuple[bool, dict[str, Any]]:
        return session.undo(index), state()

    def drawn(index: int, side: int) -> tuple[bytes, str] | None:
        if not (0 <= index < len(session.pairs) and side in (0, 1)):
            return None
        return pictures().picture(session.pairs[index][side])

    async def show_page(request: Request) -> Response:
        return HTMLResponse(page)

    async def show_state(request: Request) -> Response:
        return JSONResponse(await apart(state))

    async def take(
        request: Request, function: Callable[..., tuple[bool, dict[str, Any]]], kinds: dict[str, type]
    ) -> Response:
        """Call a function with the fields of a request; 409 where it says that they do not fit the pair being asked."""
        try:
            fits, now = await apart(function, *_fields(await _body(request.stream()), kinds))
        except DatasetError as error:  # the disk is full, the folder is gone
            return JSONResponse({"error": str(error)}, 500)
        except (ValueError, ClientDisconnect) as error:  # other fields than these, or an answer that does not exist
            return JSONResponse({"error": str(error)}, 400)
        return JSONResponse(now, 200 if fits else 409)

    async def take_answer(request: Request) -> Response:
        return await take(request, answered, {"index": int, "answer": str})

    async def take_undo(request: Request) -> Response:
        return await take(request, undone, {"index": int})

    async def show_segment(request: Request) -> Response:
        place = [request.path_params[name] for name in ("index", "side")]
        if not all(re.fullmatch("[0-9]{1,9}", part) for part in place):
            return Response(status_code=404)
        found = await apart(drawn, *map(int, place))
        return Response(status_code=404) if found is None else Response(found[0], media_type=found[1])

    routes = [
        Route("/{token}/", show_page),
        Route("/{token}/state", show_state),
        Route("/{token}/answer", take_answer, methods=["POST"]),
        Route("/{token}/undo", take_undo, methods=["POST"]),
        Route("/{token}/segment/{index}/{side}", show_segment),
    ]
    inner = Starlette(routes=routes)

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    *((k.lower().encode(), v.encode()) for k, v in HEADERS.items()),
                ]
            await send(message)

        if scope["type"] == "http" and not _allowed(scope, token):
            await Response(status_code=404)(scope, receive, with_headers)
        else:
            await inner(scope, receive, with_headers)

    return guarded


async def _body(stream: AsyncIterator[bytes]) -> bytes:
    """What a request holds; ValueError where that is too long to be an answer."""
    body = b""
    async for part in stream:
        body += part
        if len(body) > LONGEST_BODY:
            raise ValueError(f"more than {LONGEST_BODY} bytes")
    return body


def _fields(body: bytes, kinds: dict[str, type]) -> list[Any]:
    """The values of a JSON object that has exactly these fields of exactly these types (1.9, true and "1" are not integers)."""
    found = parse_json(body)
    if not isinstance(found, dict) or found.keys() != kinds.keys():
        raise ValueError(f"an object with the fields {', '.join(kinds)} is expected")
    for name, kind in kinds.items():
        if type(found[name]) is not kind:
            raise ValueError(f"{name} must be of type {kind.__name__}, not {type(found[name]).__name__}")
    return [found[name] for name in kinds]


def _allowed(scope: Any, token: str) -> bool:
    """Whether a request carries the token, and was addressed to the loopback interface by name (a foreign page cannot rebind that)."""
    hosts = [value.decode("latin1") for name, value in scope["headers"] if name == b"host"]
    host = hosts[0].rpartition(":")[0] if hosts and ":" in hosts[0] else (hosts or [""])[0]
    given = scope["path"].split("/")[1] if scope["path"].startswith("/") else ""
    return host in ("127.0.0.1", "localhost") and secrets.compare_digest(given.encode(), token.encode())


def serve_labelling(
    dataset: TransitionDataset,
    out: str | os.PathLike[str],
    *,
    make_environment: EnvironmentMaker | None = None,
    port: int = 0,
    open_browser: bool = True,
    say: Callable[[str], None] = print,
    **settings: Any,
) -> PreferenceDataset:
    """Serve the labelling page on the loopback interface until it is interrupted (Ctrl-C), and return the labels.

    Args:
        dataset, out, settings: see `LabellingSession`.
        make_environment: makes an environment with `render_mode="rgb_array"`; None shows plots.
        port: 0 takes any free one.
        open_browser: open the page.
        say: told the address and, at the end, where the labels are.

    Raises:
        MissingExtraError: the extra `label` is not installed.
        ConfigError: the port is taken.
        DatasetError: see `LabellingSession`, or another page is open on the folder.
    """
    uvicorn = require("uvicorn", extra="label")
    with _only_one(Path(out)):
        session = LabellingSession(dataset, out, **settings)
        token = secrets.token_urlsafe(24)
        application = labelling_app(session, token, make_environment)
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen(128)  # so that the address works from the moment it is printed
        except OSError as error:
            raise ConfigError(
                f"port {port} cannot be used ({error.strerror}); choose another or leave it out"
            ) from error
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/{token}/"
        say(f"label here: {address}")
        say(
            f"{len(session.answers)} of {len(session.pairs)} pairs answered; every answer is saved in {out}; Ctrl-C ends"
        )
        opener = Path(out) / OPENER
        if open_browser:
            _open(address, opener)
        server = uvicorn.Server(uvicorn.Config(application, log_level="warning", access_log=False, lifespan="off"))
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            pass
        finally:
            listener.close()
            opener.unlink(missing_ok=True)
        labels = session.labels()
        say(f"{out}: {len(labels)} labels, {len(session.pairs) - len(session.answers)} pairs left")
        return labels


def _open(address: str, opener: Path) -> None:
    """Show an address through a file that only this person can read: everybody on this computer can read a browser's command line."""
    page = f'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url={address}"><a href="{address}">label</a>\n'
    write_atomically(opener, page, private=True)
    webbrowser.open(opener.resolve().as_uri())


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """One page at a time may write a folder."""
    make_folder(folder)
    with writing(folder):
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise DatasetError(f"another labelling page is open on {folder}; close it first") from error
        yield
    finally:
        os.close(descriptor)
