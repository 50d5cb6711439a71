"""Finding a dataset: what `rlkit2.load_dataset` accepts, where it looks, and what it says when it finds nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from gymnasium import spaces
from minari import MinariDataset
from minari.serialization import serialize_space

from rlkit2.data.cache import Unpacked, cache_key, find, pack_in_memory, store
from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.episodes import Episode, Progress, closing_all
from rlkit2.data.folders import minari_root
from rlkit2.data.infer import Request, SpaceLike, infer_spaces, parse_space
from rlkit2.data.notes import say_notes
from rlkit2.data.remotes import download, online
from rlkit2.data.sources import find_reader
from rlkit2.data.sources.minari import HDF5_FILE, MinariReader, minari_data
from rlkit2.data.sources.reader import Reader, ReadOptions
from rlkit2.data.sources.rows import cut_rows
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import ConfigError, CorruptDatasetError, DatasetError, DatasetNotFoundError, RLKitError, first_line

Source: TypeAlias = str | os.PathLike[str] | MinariDataset | Mapping[str, Any] | TransitionDataset
Columns: TypeAlias = Mapping[str, str | Sequence[str]]


def read_dataset(
    source: Source,
    *,
    observation_keys: Sequence[str] | None = None,
    cache: bool = True,
    spec: DatasetSpec | None = None,
    observation_space: SpaceLike | None = None,
    action_space: SpaceLike | None = None,
    columns: Columns | None = None,
    max_episode_steps: int | None = None,
    never_terminates: bool = False,
    fill_missing: Literal["previous", "mean"] | None = None,
    trust_env: bool = False,
    progress: Progress | None = None,
) -> TransitionDataset:
    """A dataset that exists on disk, at Minari's remotes or in memory; see `rlkit2.load_dataset`.

    `spec` gives spaces and environment, `observation_space` and `action_space` (spaces, or text for `parse_space`) a space alone; what nobody
    gives is that of the files, else inferred from the data with a notice. `progress` is called with (rows done, rows in all) while files are read.
    """
    if fill_missing not in (None, "previous", "mean"):
        raise ConfigError(f"fill_missing must be previous or mean, not {fill_missing!r}")
    if max_episode_steps is not None and max_episode_steps < 1:
        raise ConfigError(f"max_episode_steps must be a whole number of at least 1, not {max_episode_steps}")
    options = ReadOptions(
        observation_keys=None if observation_keys is None else tuple(observation_keys),
        columns={key: (names,) if isinstance(names, str) else tuple(names) for key, names in (columns or {}).items()},
        max_episode_steps=max_episode_steps,
        never_terminates=never_terminates,
        trust_env=trust_env,
    )
    given = _Given(spec, observation_space, action_space, fill_missing)
    if isinstance(source, TransitionDataset):
        return _as_it_is(source, options, given)
    if isinstance(source, Mapping):
        _no_keys(options)
        arrays = {name: np.asarray(value) for name, value in source.items()}
        return _said(pack_in_memory(_unpacked("arrays", lambda: cut_rows(arrays, "arrays", options), None, given)))
    path, reader, options = _open(source, options)
    if observation_keys is not None and not isinstance(reader, MinariReader):
        _no_keys(options)
    own = reader.spec(path, options)
    if not cache:
        return _said(pack_in_memory(_read(path, reader, options, own, given, progress)))
    what = [str(path.resolve()), reader.name, asdict(replace(options, chosen=None, trust_env=False)), given.described]
    what += [fill_missing] if fill_missing else []
    key = cache_key(reader.files(path), what, options.chosen)
    found = find(key)
    return _said(found if found is not None else store(key, _read(path, reader, options, own, given, progress)))


class _Given:
    """Spaces and environment as a caller gives them, and what becomes of missing values."""

    def __init__(
        self, spec: DatasetSpec | None, observations: SpaceLike | None, actions: SpaceLike | None, fill: str | None
    ) -> None:
        self.spec, self.fill = spec, fill
        self.observations, self.actions = (
            parse_space(space) if isinstance(space, str) else space for space in (observations, actions)
        )
        texts = [
            space if isinstance(space, str | None) else serialize_space(space) for space in (observations, actions)
        ]
        self.described = [None if spec is None else spec.to_json(), *texts]

    def space(self, name: str) -> spaces.Space[Any] | None:
        """A given space that needs no look at the data."""
        space = getattr(self, name)
        return space if isinstance(space, spaces.Space) else None

    def request(self, name: str) -> Request | None:
        """A given space that the columns of the data complete."""
        space = getattr(self, name)
        return None if isinstance(space, spaces.Space) else space


def _unpacked(
    name: str, episodes: Any, own: DatasetSpec | None, given: _Given, steps: int = 0, progress: Progress | None = None
) -> Unpacked:
    """What is to be packed: the specification in full, and the episodes."""
    spec = replace(given.spec, id=own.id if own else name) if given.spec is not None else own
    observations, actions = given.space("observations"), given.space("actions")
    asked = [given.request("observations"), given.request("actions")]
    if spec is None or any(asked):
        known = {} if spec is None else {"observations": spec.observation_space, "actions": spec.action_space}
        with closing_all(episodes()) as stream:
            inferred = infer_spaces(((episode.observations, episode.actions) for episode in stream), *asked)
        parts = []
        for space, request, guess, part in zip(
            (observations, actions), asked, inferred, ("observations", "actions"), strict=True
        ):
            parts.append(space if space is not None else guess if request else known.get(part, guess))
        guessed = spec is None and actions is None and given.actions is None
        notes = {"action_spaces_inferred": 1} if guessed else {}
        spec = replace(
            spec or DatasetSpec(observation_space=parts[0], action_space=parts[1], id=name, notes=notes),
            observation_space=parts[0],
            action_space=parts[1],
        )
    else:
        spec = replace(
            spec,
            observation_space=spec.observation_space if observations is None else observations,
            action_space=spec.action_space if actions is None else actions,
        )
    checked = given.spec is not None or given.actions is not None
    observed = given.observations is not None
    return Unpacked(name, spec, episodes, steps, progress, checked, observed, given.fill)


def _read(
    path: Path, reader: Reader, options: ReadOptions, own: DatasetSpec | None, given: _Given, progress: Progress | None
) -> Unpacked:
    def episodes() -> Iterator[Episode]:
        with _as_damage(path, reader):
            yield from reader.episodes(path, options)

    with _as_damage(path, reader):
        steps = reader.steps(path, options)
    found = _unpacked(str(path), episodes, own, given, steps, progress)
    return found if own is not None else replace(found, spec=replace(found.spec, id=path.stem))


@contextmanager
def _as_damage(path: Path, reader: Reader) -> Iterator[None]:
    """Whatever a reader runs into in a file becomes one line that names it."""
    try:
        yield
    except RLKitError:
        raise
    except Exception as error:  # of numpy, pyarrow, h5py, PIL: every kind
        raise CorruptDatasetError(
            f"{path} cannot be read as {reader.name} ({type(error).__name__}: {first_line(error)})"
        ) from error


def _said(dataset: TransitionDataset) -> TransitionDataset:
    """The dataset, after its notes have been said."""
    say_notes(dataset.spec)
    return dataset


def _open(source: str | os.PathLike[str] | MinariDataset, options: ReadOptions) -> tuple[Path, Reader, ReadOptions]:
    """Path and reader of a source; an open Minari dataset brings the episodes it points to (filters and splits respected)."""
    if isinstance(source, MinariDataset):
        chosen = np.asarray(source.episode_indices, np.int64)
        if len(chosen) == 0:
            raise DatasetError(f"{source.spec.dataset_id} has no episodes left; loosen the filter it was made with")
        everything = len(chosen) == source.storage.total_episodes and (chosen == np.arange(len(chosen))).all()
        path = Path(source.storage.data_path)
        return path, MinariReader(), options if everything else replace(options, chosen=tuple(chosen.tolist()))
    path = Path(source)
    if path.name == HDF5_FILE:
        path = path.parent  # somebody pointed at the data of a Minari dataset
    if not path.exists() and minari_data(minari_root() / path) is not None:
        path = minari_root() / path
    if not path.exists():
        if isinstance(source, os.PathLike) or path.is_absolute() or path.suffix:
            raise DatasetNotFoundError(f"{path} does not exist")
        path = _download(str(source))
    elif path.is_dir() and minari_data(path) is None and minari_data(minari_root() / path) is not None:
        path = minari_root() / path
    return path, find_reader(path), options


def _as_it_is(source: TransitionDataset, options: ReadOptions, given: _Given) -> TransitionDataset:
    keys = options.observation_keys
    if keys is not None and source.spec.observation_keys != keys:
        _no_keys(options)
    if any((given.spec, given.observations, given.actions, given.fill)) or options != ReadOptions(
        observation_keys=keys, trust_env=options.trust_env
    ):
        raise ConfigError("spaces and other ways of reading are given to files and arrays; this dataset has its own")
    return source


def _no_keys(options: ReadOptions) -> None:
    if options.observation_keys is not None:
        raise ConfigError(
            f"observation_keys={list(options.observation_keys)} choose from the Dict of a Minari dataset only"
        )


def local_datasets() -> dict[str, Path]:
    """Ids of the Minari datasets under Minari's root and their `data` folders; links to folders are followed."""
    root = minari_root()
    return dict(
        sorted((data_path.parent.relative_to(root).as_posix(), data_path) for data_path in _walk(root, frozenset()))
    )


def _walk(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    """`data` folders with metadata under `folder`; hidden folders are datasets that are still being written, `above` stops a circle of links."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    if any(entry.name == "metadata.json" for entry in entries):
        if folder.name == "data":
            yield folder
        return
    for entry in entries:
        if not entry.name.startswith(".") and entry.is_dir():
            yield from _walk(folder / entry.name, above | {real})


def _download(dataset_id: str) -> Path:
    """Fetch `dataset_id` through Minari (its own progress bar); `DatasetNotFoundError` says what was searched and which ids are close."""
    known = list(local_datasets())
    if not re.search(r"-v\d+$", dataset_id):
        reason = "it is not a complete Minari id, which ends in a version such as -v0"
    elif not online():
        reason = "there is no network to download it"
    else:
        try:
            return download(dataset_id) / "data"
        except Exception as error:  # noqa: BLE001 - the remotes' clients raise many kinds
            reason = f"Minari could not download it ({first_line(error)})"
    close = get_close_matches(dataset_id, known, 3, 0.5)
    hint = f"; close ids here: {', '.join(close)}" if close else f"; ids here: {', '.join(known[:8]) or 'none'}"
    raise DatasetNotFoundError(f"no dataset {dataset_id!r} in {minari_root()}, and {reason}{hint}")
