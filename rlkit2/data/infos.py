"""What a Minari dataset stores beside its steps: the `infos` of the environment, for rewards that read them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from minari.dataset.minari_storage import MinariStorage
from numpy.typing import NDArray

from rlkit2.data.load import local_datasets
from rlkit2.data.sources.hdf5 import open_hdf5
from rlkit2.data.sources.minari import HDF5_FILE, minari_data
from rlkit2.errors import CorruptDatasetError, DatasetError, first_line


def read_infos(source: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """The infos of every step of a Minari dataset, arrays `[N, ...]` by name (`goal/distance` for nested ones), in the order of its transitions.

    Minari stores T + 1 of them an episode, the first from `reset`: step t has the one that came back with it, number t + 1.

    Args:
        source: id of a dataset on this machine, or its folder.

    Raises:
        DatasetError: it is not here, is not a Minari dataset, or its infos are not one a step.
    """
    folder = local_datasets().get(str(source), Path(source))
    data = minari_data(folder)
    if data is None:
        raise DatasetError(f"{source} is not a Minari dataset on this machine; infos are read from such datasets alone")
    if (data / HDF5_FILE).exists():
        with open_hdf5(data / HDF5_FILE):
            pass  # points into no other file
    parts: dict[str, list[NDArray[Any]]] = {}
    count = 0
    try:
        storage = MinariStorage.read(data)
        for count, episode in enumerate(storage.get_episodes(range(storage.total_episodes)), 1):
            steps = len(np.asarray(episode["rewards"]))
            for name, values in _leaves(episode.get("infos") or {}):
                if len(values) not in (steps, steps + 1):
                    raise DatasetError(
                        f"{source} episode {count - 1}: infos[{name!r}] has {len(values)} rows for {steps} steps"
                    )
                parts.setdefault(name, []).append(values[len(values) - steps :])
    except DatasetError:
        raise
    except Exception as error:  # Minari's readers raise anything
        raise CorruptDatasetError(f"Minari cannot read the infos of {source} ({first_line(error)})") from error
    return {name: np.concatenate(found) for name, found in parts.items() if len(found) == count}


def _leaves(infos: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, NDArray[Any]]]:
    """Arrays of numbers by their path; texts and other objects are left out."""
    for key, value in infos.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{key}/")
        else:
            array = np.asarray(value)
            if array.ndim and array.dtype.kind in "biuf":
                yield f"{above}{key}", array
