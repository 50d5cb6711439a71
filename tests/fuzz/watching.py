"""What a piece of code imports, opens and starts, seen by Python's audit hook. Files that C libraries open (HDF5, safetensors) are not seen."""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STARTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "pty.spawn",
    "socket.connect",
    "ctypes.dlopen",
)
ROOT = Path(__file__).resolve().parents[2]
# Where code that is installed, and what it reads for itself, lies.
KNOWN = [
    *map(Path, {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sys.prefix, sys.base_prefix}),
    ROOT / "rlkit2",
]
CACHES = [Path.home() / ".cache" / "matplotlib"]  # its list of fonts
SYSTEM = (
    "/dev/null",
    "/dev/urandom",
    "/proc/",
    "/sys/",
    "/usr/share/",
    "/etc/os-release",
    "/etc/localtime",
    "/usr/lib/",
)

_watched: list[tuple[str, tuple[object, ...]]] | None = None


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _watched is not None and (event in ("import", "open") or event in STARTS):
        _watched.append((event, arguments))


sys.addaudithook(_hook)


@contextmanager
def watched(*folders: Path) -> Iterator[list[str]]:
    """Gives a list that afterwards names all that was imported, opened and started beyond what is installed and what lies in `folders`."""
    global _watched
    found: list[str] = []
    _watched = events = []
    try:
        yield found
    finally:
        _watched = None
        found += [text for event, arguments in events if (text := _foreign(event, arguments, folders))]


def _foreign(event: str, arguments: tuple[object, ...], folders: tuple[Path, ...]) -> str | None:
    if event == "import":
        top = str(arguments[0]).partition(".")[0]
        return None if top in sys.stdlib_module_names or _installed(top) else f"import {arguments[0]}"
    if event == "open":
        path = arguments[0]
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        name = os.path.abspath(os.fsdecode(path))
        allowed = name.startswith(SYSTEM) or any(
            Path(name).is_relative_to(folder) for folder in (*KNOWN, *CACHES, *folders)
        )
        return None if allowed else f"open {name}"
    if event == "ctypes.dlopen":
        return (
            None
            if arguments[0] is None or "/" in str(arguments[0]) or str(arguments[0]).startswith("lib")
            else f"dlopen {arguments[0]}"
        )
    if event == "subprocess.Popen" and list(arguments[1])[:1] == [
        "git"
    ]:  # the state of the working directory, for the manifest
        return None
    return f"{event} {arguments}"


def _installed(top: str) -> bool:
    """Whether a module lies among the installed packages, is our own, or does not exist (libraries try optional ones)."""
    if top in ("rlkit2", "tests"):
        return True
    found = importlib.util.find_spec(top)
    places = [] if found is None else [found.origin] if found.origin else list(found.submodule_search_locations or ())
    return all(any(Path(place).is_relative_to(folder) for folder in KNOWN) for place in places)
