"""Where transitions come from: one reader a file, behind the protocol of `rlkit2.data.sources.reader`."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from rlkit2.data.sources.d3rlpy import D3rlpyReader
from rlkit2.data.sources.d4rl import D4RLReader
from rlkit2.data.sources.lerobot import LeRobotReader
from rlkit2.data.sources.minari import MinariReader
from rlkit2.data.sources.npz import NpzReader
from rlkit2.data.sources.ogbench import OGBenchReader
from rlkit2.data.sources.reader import Reader
from rlkit2.data.sources.robomimic import RobomimicReader
from rlkit2.data.sources.tables import TableReader
from rlkit2.data.sources.vd4rl import VD4RLReader
from rlkit2.errors import ConfigError, DatasetError, first_line

# The first that detects a path reads it: the special before the general.
READERS: tuple[Reader, ...] = (
    MinariReader(),
    RobomimicReader(),
    D3rlpyReader(),
    D4RLReader(),
    LeRobotReader(),
    VD4RLReader(),
    OGBenchReader(),
    NpzReader(),
    TableReader(),
)
GROUP = "rlkit2.readers"
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".joblib")


@cache
def readers() -> tuple[Reader, ...]:
    """Readers of installed packages (entry points in the group `rlkit2.readers`), then our own.

    Raises:
        ConfigError: an entry point cannot be loaded or is not a `Reader`; the message names it.
    """
    found = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            reader = point.load()()
        except Exception as error:
            raise ConfigError(f"reader {point.name!r} ({point.value}) cannot be loaded: {first_line(error)}") from error
        if not isinstance(reader, Reader):
            raise ConfigError(f"reader {point.name!r} ({point.value}) does not derive from rlkit2.data.Reader")
        found.append(reader)
    return (*found, *READERS)


def find_reader(path: Path) -> Reader:
    """The reader of an existing file or folder; `DatasetError` says which formats there are where none knows it."""
    found = next((reader for reader in readers() if reader.detects(path)), None)
    if found is not None:
        return found
    if path.suffix in PICKLES:
        raise DatasetError(
            f"{path} is a pickle, which can run any code when it is opened, so it is not read; "
            "save its arrays with numpy.savez(file, observations=..., actions=..., rewards=..., terminals=..., timeouts=...)"
        )
    what = "a folder but not a dataset" if path.is_dir() else "not in a known format"
    kinds = ", ".join(reader.name for reader in readers())
    raise DatasetError(f"{path} is {what}; formats: {kinds}")
