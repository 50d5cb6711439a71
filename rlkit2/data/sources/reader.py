"""The protocol of readers: what is detected by a look at a path, and gives its episodes one by one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rlkit2.data.episodes import Episode
from rlkit2.data.spec import DatasetSpec


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a user may say about files that do not say it themselves.

    `observation_keys`: keys of Dict observations, in order. `columns`: names of columns or arrays for `observations, actions, rewards,
    next_observations, terminations, truncations, episodes`; a name may be a pattern such as `o_*`. `max_episode_steps`: steps after which an episode
    was cut off. `never_terminates`: what is flagged as an end is a cut. `chosen`: stored numbers of the episodes to read.
    `trust_env`: where no spaces are stored, build the environment as the file says, which runs the code it names.
    """

    observation_keys: tuple[str, ...] | None = None
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    max_episode_steps: int | None = None
    never_terminates: bool = False
    chosen: tuple[int, ...] | None = None
    trust_env: bool = False


class Reader(ABC):
    """One file format. A reader of your own derives from this class and is named in the entry-point group `rlkit2.readers`.

    `name` is what the format is called in messages.
    """

    name: str

    @abstractmethod
    def detects(self, path: Path) -> bool:
        """Whether the existing file or folder `path` is in this format; cheap, and false where it cannot be read."""

    @abstractmethod
    def episodes(self, path: Path, options: ReadOptions) -> Iterable[Episode]:
        """The episodes of `path`, one by one; called twice where the spaces have to be inferred. Raises `DatasetError`."""

    def spec(self, path: Path, options: ReadOptions) -> DatasetSpec | None:
        """Spaces and environment where the files tell them; None: spaces are inferred from the episodes."""
        return None

    def files(self, path: Path) -> list[Path]:
        """The files the data are in: where one of them changes, a cached copy is stale."""
        return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())

    def steps(self, path: Path, options: ReadOptions) -> int:
        """Steps in all, for progress; 0 where it is not known beforehand."""
        return 0
