"""Flags that are not flags are refused, wherever rows come from; spaces of arrays can be given in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from rlkit2.api import load_dataset
from rlkit2.data import dataset_from_arrays
from rlkit2.data.flags import as_flags
from rlkit2.errors import ConfigError, DatasetError

ROWS = 6


def arrays(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "observations": rng.normal(size=(ROWS, 2)).astype(np.float32),
        "actions": np.array([0, 1, 2, 0, 1, 2]),
        "rewards": np.zeros(ROWS, np.float32),
        "next_observations": rng.normal(size=(ROWS, 2)).astype(np.float32),
        "terminations": np.zeros(ROWS),
        "truncations": np.zeros(ROWS),
        **changes,
    }


@given(st.lists(st.floats(allow_nan=True, width=32), min_size=1, max_size=8), st.sampled_from("?bBiIqfd"))
def test_zeros_and_ones_and_nothing_else(values: list[float], kind: str) -> None:
    with np.errstate(invalid="ignore"):
        array = np.array(values).astype(kind)
    good = [bool(value) for value in array.tolist() if value in (0, 1)]
    if len(good) == len(array):
        assert as_flags(array, "x").tolist() == good
        assert as_flags(array, "x").dtype == bool
    else:
        bad = next(i for i, value in enumerate(array.tolist()) if value not in (0, 1))
        with pytest.raises(DatasetError, match=rf"x must be true or false \(1 or 0\), not .*\(entry {bad}\)"):
            as_flags(array, "x")


def one_odd(value: float) -> Any:
    flags = np.zeros(ROWS)
    flags[3] = value
    return flags


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, np.nan])
@pytest.mark.parametrize("name", ["terminations", "truncations"])
def test_arrays_in_memory(name: str, value: float) -> None:
    for read in (lambda a: dataset_from_arrays(**a), load_dataset):
        with pytest.raises(DatasetError, match=rf"{name} must be true or false \(1 or 0\), not .*\(entry 3\)"):
            read(arrays(**{name: one_odd(value)}))
    with pytest.raises(DatasetError, match="must be true or false"):
        dataset_from_arrays(**arrays(**{name: np.array(["no"] * ROWS)}))


def d4rl(path: Path) -> tuple[Path, str]:
    with h5py.File(path / "a.hdf5", "w") as file:
        for name in ("observations", "actions", "rewards"):
            file[name] = np.ones((ROWS, 1), np.float32)
        file["terminals"] = one_odd(0.5)
        file["timeouts"] = np.zeros(ROWS)
    return path / "a.hdf5", "terminals"


def robomimic(path: Path) -> tuple[Path, str]:
    with h5py.File(path / "a.hdf5", "w") as file:
        demo = file.create_group("data/demo_0")
        for name in ("actions", "rewards", "obs/state", "next_obs/state"):
            demo[name] = np.ones((ROWS, 1), np.float32)
        demo["dones"] = one_odd(0.5)
    return path / "a.hdf5", "dones"


def ogbench(path: Path) -> tuple[Path, str]:
    rows = {name: np.ones((ROWS, 1), np.float32) for name in ("observations", "actions", "next_observations")}
    np.savez(path / "a.npz", **rows, rewards=np.zeros(ROWS), terminals=np.zeros(ROWS), masks=one_odd(0.5))
    return path / "a.npz", "masks"


def vd4rl(path: Path) -> tuple[Path, str]:
    rows = {"image": np.zeros((ROWS, 3, 8, 8), np.uint8), "action": np.ones((ROWS, 1), np.float32)}
    np.savez(path / "a.npz", **rows, reward=np.zeros(ROWS), discount=np.ones(ROWS), is_first=one_odd(0.5))
    return path / "a.npz", "is_first"


def table(path: Path) -> tuple[Path, str]:
    lines = [f"{i},0.5,0,{0.5 if i == 3 else 0},0" for i in range(ROWS)]
    (path / "a.csv").write_text("\n".join(["observations,actions,rewards,terminations,timeouts", *lines]))
    return path / "a.csv", "terminations"


@pytest.mark.parametrize("make", [d4rl, robomimic, ogbench, vd4rl, table])
def test_files(make: Any, tmp_path: Path) -> None:
    path, name = make(tmp_path)
    with pytest.raises(DatasetError, match=rf"{name} must be true or false \(1 or 0\), not 0.5 \(entry 3\)"):
        load_dataset(path)


def test_spaces_of_arrays_in_words() -> None:
    data = arrays()
    assert dataset_from_arrays(**data).spec.action_space == spaces.Discrete(3)
    wide = dataset_from_arrays(**data, action_space="discrete(5)", observation_space="box(-9,9)")
    assert wide.spec.action_space == spaces.Discrete(5)
    assert wide.spec.observation_space == spaces.Box(-9, 9, (2,), np.float32)
    assert "action_spaces_inferred" not in wide.spec.notes
    given = spaces.Discrete(4)
    assert dataset_from_arrays(**data, action_space=given).spec.action_space == given
    with pytest.raises(DatasetError, match="action"):
        dataset_from_arrays(**data, action_space="discrete(2)")
    with pytest.raises(ConfigError, match="give spec, which holds the spaces, or"):
        dataset_from_arrays(**data, spec=wide.spec, action_space="discrete")
