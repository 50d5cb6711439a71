"""Minari's remotes: a dataset is downloaded beside the others and appears among them when it is complete."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from rlkit2.data.folders import minari_root, remove_leftovers

NAMESPACE = "namespace_metadata.json"


def download(dataset_id: str) -> Path:
    """Fetch a dataset, and those it is combined of, through Minari, whose progress bar is shown on standard error; its folder.

    They are downloaded into a hidden folder of Minari's root and renamed when all is there: an interruption leaves nothing behind.
    Minari's clients raise many kinds of exceptions.
    """
    import minari

    root = minari_root().absolute()
    temporary = root / f".building-{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        remove_leftovers(root, ".building-*")
        with _minari_root(temporary), redirect_stdout(sys.stderr):
            minari.download_dataset(dataset_id)
        for metadata in sorted(temporary.rglob("data/metadata.json")):
            place = metadata.parents[1].relative_to(temporary)
            if not any(part.startswith(".") for part in place.parts) and not (root / place).exists():
                (root / place).parent.mkdir(parents=True, exist_ok=True)
                metadata.parents[1].rename(root / place)
        for described in temporary.rglob(NAMESPACE):
            place = described.relative_to(temporary)
            if (root / place.parent).is_dir() and not (root / place).exists():
                described.rename(root / place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if not (root / dataset_id).is_dir():
        raise FileNotFoundError(f"the remote has no files of {dataset_id}")
    return root / dataset_id


@contextmanager
def _minari_root(folder: Path) -> Iterator[None]:
    """Minari reads its root from the environment, and nowhere else."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before


def online() -> bool:
    """Whether a download has a chance: the clients of the remotes retry for half a minute before they say that no name can be resolved."""
    if getproxies():
        return True
    remote = os.environ.get("MINARI_REMOTE", "hf://")
    default = "https://storage.googleapis.com" if remote.startswith("gcp") else "https://huggingface.co"
    server = urlsplit(os.environ.get("HF_ENDPOINT", default) if remote.startswith("hf") else default)
    try:
        socket.getaddrinfo(server.hostname, server.port or 443)
    except (OSError, ValueError):
        return False
    return True
