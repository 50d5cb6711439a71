"""Checksums inside JSON files: of the file itself and of the files beside it, so that damage is seen when they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

KEY = "sha256"
ITSELF = "this file"


class Damaged(ValueError):
    """A file does not have its checksum."""


class UncheckedWarning(UserWarning):
    """A file from before checksums were written."""


def digest(data: bytes) -> str:
    """SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sealed(values: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    """`values` as JSON knows them, with the digests of `files` and of the values themselves under "sha256"."""
    plain: dict[str, Any] = json.loads(json.dumps({**values, KEY: dict(files)}))
    plain[KEY][ITSELF] = _of_values(plain)
    return plain


def opened(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str] | None]:
    """What `sealed` was given: the values and the digests of the files beside them; None for values that were never sealed.

    Raises:
        Damaged: the values are not those that were sealed.
    """
    plain = dict(values)
    if KEY not in plain:
        return plain, None
    files = plain[KEY]
    if not isinstance(files, dict) or files.get(ITSELF) != _of_values(plain):
        raise Damaged("it does not have the checksum it was written with")
    del plain[KEY]
    return plain, {name: value for name, value in files.items() if name != ITSELF}


def _of_values(values: Mapping[str, Any]) -> str:
    files = {name: value for name, value in values[KEY].items() if name != ITSELF}
    return digest(json.dumps({**values, KEY: files}, sort_keys=True).encode())
