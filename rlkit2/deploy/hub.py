"""Runs and policies on a hub that speaks the protocol of Hugging Face's: pushed in one commit, pulled whole or not at all.

What is pushed has a list of its files with their SHA-256 (`rlkit2.json`). Pulling takes the files of that list alone, into a folder that appears when
every one of them has its checksum and the run or policy in it can be opened. Nothing that a file names is imported or called.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlkit2 import __version__
from rlkit2.checksums import Damaged, digest, opened, sealed
from rlkit2.deploy.card import policy_card, run_card
from rlkit2.errors import ConfigError, HubError, RLKitError, RunError, first_line, require
from rlkit2.files import make_folder, sync_folder, writing
from rlkit2.nn.policy import holds_policy, load_policy
from rlkit2.training.run import Run

LIST = "rlkit2.json"
FORMAT = 1
POLICY_FILES = ("policy.json", "policy.safetensors")
RUN_FILES = (
    *("config.json", "manifest.json", "evaluations.jsonl", "metrics.jsonl", "metrics.csv"),
    *(f"policy/{name}" for name in POLICY_FILES),
)
RESUMING = re.compile(r"checkpoints/\d+/(state\.safetensors|checkpoint\.json)|replay/seed-\d+\.(records|frames)")
REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
Progress = Callable[[int, int], None]


def push(
    run_or_policy: Run | str | os.PathLike[str],
    repository: str,
    *,
    checkpoints: bool = False,
    private: bool = False,
    message: str | None = None,
    revision: str | None = None,
    hub: str | None = None,
) -> str:
    """Put a run, or a saved policy, on a hub, in one commit with a generated card; the repository is made if it is missing.

    Args:
        run_or_policy: a run, or the folder or file of a saved policy.
        repository: `owner/name`.
        checkpoints: the run's newest checkpoint, too, and what it has collected where it learns online, so that it can be resumed.
        private: of a repository that is made.
        message: of the commit.
        revision: the branch; default: the main one.
        hub: address of the hub; default: that of the variable HF_ENDPOINT, else Hugging Face's.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: the repository is not `owner/name`.
        RunError: what is to be pushed is damaged, or being trained.
        HubError: the hub refuses or does not answer; nothing is changed here.
        MissingExtraError: the extra `hub` is not installed.
    """
    _check_repository(repository)
    library: Any = require("huggingface_hub", extra="hub")
    with TemporaryDirectory() as folder:
        name, kind, files, card = _gathered(run_or_policy, repository, checkpoints, Path(folder))
        listed = {"format": FORMAT, "kind": kind, "name": name, "rlkit2": __version__}
        text = json.dumps(sealed(listed, {place: _digest(file) for place, file in files.items()}), indent=2) + "\n"
        contents: dict[str, Any] = {**files, "README.md": card.encode(), LIST: text.encode()}
        api = library.HfApi(endpoint=hub)
        with _answering(api, repository, "nothing is changed here, so the same command can be given again"):
            api.create_repo(repository, private=private, exist_ok=True)
            done = api.create_commit(
                repository,
                [library.CommitOperationAdd(place, content) for place, content in contents.items()],
                commit_message=message or f"{kind} {name}, by rlkit2 {__version__}",
                revision=revision,
            )
    return str(done.commit_url)


def pull(
    repository: str,
    out: str | os.PathLike[str] = "runs",
    *,
    revision: str | None = None,
    hub: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Fetch a run or policy that was pushed, into a new folder of `out`; it is there whole, every checksum compared, or not at all.

    Args:
        repository: `owner/name`.
        out: the folder that gets a new one, called as the repository is.
        revision: branch, tag or commit; default: the newest.
        hub: as for `push`.
        progress: called with (files fetched, files).

    Returns:
        The new folder, for `load_run` or `load_policy`.

    Raises:
        ConfigError: the repository is not `owner/name`, or the folder is there already.
        HubError: the hub does not answer, has no such repository, or what it gave is not what was pushed; nothing is left.
        MissingExtraError: the extra `hub` is not installed.
    """
    _check_repository(repository)
    library: Any = require("huggingface_hub", extra="hub")
    place = Path(out, repository.rpartition("/")[2])
    if place.exists():
        raise ConfigError(f"{place} is there already; name another folder (--out) or remove it")
    make_folder(place.parent)
    api = library.HfApi(endpoint=hub)
    with _workshop(place.parent) as folder:
        with _answering(api, repository, "nothing is left here"), _without_bars(library):
            commit = api.repo_info(repository, revision=revision).sha

            def fetch(name: str) -> Path:
                return Path(api.hf_hub_download(repository, name, revision=commit, local_dir=folder / "hub"))

            kind, files = _listed(fetch(LIST), repository)
            for done, (name, expected) in enumerate(files.items(), 1):
                file = fetch(name)
                if _digest(file) != expected:
                    raise HubError(
                        f"{name} of {repository} does not have the checksum it was pushed with; nothing is left here"
                    )
                whole = folder / "whole" / name
                make_folder(whole.parent)
                with writing(whole):
                    os.replace(file, whole)
                if progress is not None:
                    progress(done, len(files))
        _check_opens(folder / "whole", kind, repository)
        with writing(place):
            os.rename(folder / "whole", place)
            sync_folder(place.parent)
    return place


def _gathered(
    source: Run | str | os.PathLike[str], repository: str, checkpoints: bool, folder: Path
) -> tuple[str, str, dict[str, Path], str]:
    """Name, kind, files by their place, and card of what is pushed; opened first, so that nothing damaged leaves."""
    if not isinstance(source, Run) and holds_policy(Path(source)):
        policy = load_policy(Path(source))
        policy.save(folder)
        return (
            Path(source).stem,
            "policy",
            {name: folder / name for name in POLICY_FILES},
            policy_card(policy, repository),
        )
    run = source if isinstance(source, Run) else Run(source)
    if run.status == "running":
        raise RunError(f"{run.path} is being trained; push it when that has ended, or stopped it (Ctrl-C saves it)")
    _check_opens(run.path, "run", str(run.path))
    places = [name for name in RUN_FILES if (run.path / name).is_file()]
    if checkpoints:
        newest = run.checkpoint().step
        places += [
            f"checkpoints/{run.checkpoints[newest].name}/{one.name}"
            for one in sorted(run.checkpoints[newest].iterdir())
        ]
        places += [f"replay/{one.name}" for one in sorted((run.path / "replay").glob("seed-*"))]
    files = {place: run.path / place for place in places}
    return run.path.name, "run", files, run_card(run, repository)


def _listed(file: Path, repository: str) -> tuple[str, dict[str, str]]:
    """Kind and files with their digests, of a list that may come from anybody."""
    try:
        values, files = opened(json.loads(file.read_text()))
        kind = values["kind"]
        if values["format"] != FORMAT or kind not in ("run", "policy"):
            raise HubError(f"{repository} was pushed by a newer rlkit2 ({values.get('rlkit2')}); upgrade rlkit2")
        if not files:
            raise Damaged("it lists no files")
    except RLKitError:
        raise
    except Exception as error:
        raise HubError(f"{LIST} of {repository} is damaged ({first_line(error)}); nothing is left here") from error
    for name in files:
        known = name in POLICY_FILES if kind == "policy" else name in RUN_FILES or RESUMING.fullmatch(name)
        if not known:
            raise HubError(
                f"{LIST} of {repository} names {name[:80]!r}, which is not a file of a {kind}; nothing is left here"
            )
    return kind, files


def _check_opens(folder: Path, kind: str, owner: str) -> None:
    """Read all that can be read of a run or policy, so that damage is found here.

    Raises:
        RunError: it is damaged.
    """
    if kind == "policy":
        load_policy(folder)
        return
    try:
        run = Run(folder)
        _ = run.manifest, run.evaluations(), run.metrics()
        load_policy(folder / "policy")
    except RunError as error:
        raise RunError(f"{owner} is not a whole run: {error}") from error


@contextmanager
def _workshop(folder: Path) -> Iterator[Path]:
    """A hidden folder that is gone in the end."""
    place = folder / f".pulling-{uuid.uuid4().hex[:8]}"
    with writing(place):
        place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _without_bars(library: Any) -> Iterator[None]:
    """Without the client's own bars, one a file."""
    shown = not library.utils.are_progress_bars_disabled()
    library.utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            library.utils.enable_progress_bars()


@contextmanager
def _answering(api: Any, repository: str, after: str) -> Iterator[None]:
    """Turn whatever the client raises into one line: what the hub said, and what is left."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what it says each time it tries again
    try:
        yield
    except RLKitError:
        raise
    except Exception as error:
        raise HubError(f"{_reason(error, api.endpoint, repository)}; {after}") from error
    finally:
        logger.setLevel(level)


def _reason(error: BaseException, hub: str, repository: str) -> str:
    causes = [error]
    while (deeper := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(deeper)
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    statuses = [getattr(getattr(cause, "response", None), "status_code", None) for cause in causes]
    status, last = next((one for one in statuses if one is not None), None), causes[-1]
    if "RevisionNotFoundError" in kinds:
        return f"{hub} has no such revision of {repository}"
    if "RepositoryNotFoundError" in kinds or status in (401, 403):
        return f"{hub} has no {repository} for you: it does not exist, or you have to log in (hf auth login, or the variable HF_TOKEN)"
    if "EntryNotFoundError" in kinds and status == 404:
        return f"{repository} at {hub} holds no {LIST}, or not the files it lists: rlkit2 did not push it"
    if status is not None:
        return f"{hub} answered {status} about {repository}"
    return f"{hub} could not be reached, or broke off, about {repository} ({type(last).__name__}: {first_line(last)})"


def _check_repository(repository: str) -> None:
    if not REPOSITORY.fullmatch(repository) or ".." in repository:
        raise ConfigError(f"{repository!r} is not a repository; write owner/name")


def _digest(file: Path | bytes) -> str:
    if isinstance(file, bytes):
        return digest(file)
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
