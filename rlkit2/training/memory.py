"""Memory that an update frees and the next one needs again."""

from __future__ import annotations

import ctypes
import platform

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
