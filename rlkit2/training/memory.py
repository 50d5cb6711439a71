"""Memory: how much there is, too little of it, and what an update frees and the next one needs again."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from rlkit2.errors import ConfigError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names of malloc.h


def keep_freed_memory(limit: int = 512 << 20) -> bool:
    """Let the C library keep up to `limit` freed bytes for the process instead of returning them to the system.

    The activations of one update, some 10 MB in blocks of 1 MB, would otherwise be unmapped and mapped again at every step: more than a thousand
    page faults, a tenth of the time of an update of 256 x 256 networks. Results do not depend on it.

    Returns:
        Whether this system has such a switch (glibc).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20) and libc.mallopt(_M_TRIM_THRESHOLD, limit))


def total_memory(device: torch.device) -> int:
    """Bytes of a device; of the machine, or of the container where that has less, for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else []
    with suppress(OSError, ValueError):  # another system, or "max": no limit
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found, default=2**63)


@contextmanager
def out_of_memory(what: str) -> Iterator[None]:
    """Turn a failed allocation into one clear line.

    Raises:
        ConfigError: there is too little memory for `what`.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        signs = (
            "allocate memory",
            "out of memory",
            "storage size",
            "overflow",
        )  # torch has no type of its own for these
        if not isinstance(error, MemoryError | OverflowError) and not any(sign in str(error).lower() for sign in signs):
            raise
        raise ConfigError(f"there is too little memory for {what}") from error
