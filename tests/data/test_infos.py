"""Infos of a Minari dataset, one for every step, for rewards that read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage

from rlkit2.data import read_dataset, reward_values
from rlkit2.data.infos import read_infos
from rlkit2.errors import DatasetError


def episode(number: int, steps: int, rng: np.random.Generator, *, infos: int) -> EpisodeBuffer:
    """Speeds are observations; infos tell the speed (one more than steps of them where the one of `reset` is stored), twice it nested, and a text."""
    speeds = rng.normal(size=(steps + 1, 1)).astype(np.float32)
    told = speeds[steps + 1 - infos :, 0].astype(np.float64)
    ends = np.arange(1, steps + 1) == steps
    return EpisodeBuffer(
        id=number,
        observations=speeds,  # type: ignore[arg-type]
        actions=np.zeros((steps, 1), np.float32),  # type: ignore[arg-type]
        rewards=np.zeros(steps),  # type: ignore[arg-type]
        terminations=ends,  # type: ignore[arg-type]
        truncations=np.zeros(steps, bool),  # type: ignore[arg-type]
        infos={"speed": told, "deep": {"twice": 2 * told}},
    )


def store(folder: Path, data_format: str, extra: int) -> str:
    box = spaces.Box(-9, 9, (1,), np.float32)
    data = folder / "test" / f"told-{data_format}-{extra}-v0" / "data"
    data.mkdir(parents=True)
    storage = MinariStorage.new(data, box, box, data_format=data_format)
    rng = np.random.default_rng(0)
    storage.update_episodes([episode(k, k + 3, rng, infos=k + 3 + extra) for k in range(3)])
    name = f"test/told-{data_format}-{extra}-v0"
    storage.update_metadata({"dataset_id": name})
    return name


@pytest.mark.parametrize("extra", [0, 1])
def test_an_info_belongs_to_the_step_it_came_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: int) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    name = store(tmp_path, "hdf5", extra)
    dataset, infos = read_dataset(name), read_infos(name)
    assert set(infos) == {"speed", "deep/twice"}
    np.testing.assert_allclose(infos["speed"], dataset.next_observations[:, 0], rtol=1e-6)
    values = reward_values(dataset, lambda obs, infos: infos["deep/twice"] - obs[:, 0].numpy(), infos=infos, chunk=5)
    np.testing.assert_allclose(values, 2 * dataset.next_observations[:, 0] - dataset.observations[:, 0], atol=1e-6)


def test_arrow_files_whose_infos_minari_itself_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Minari writes numbers as infos to Arrow files in a form that its own reader fails on."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(DatasetError, match="Minari cannot read the infos of test/told-arrow-1-v0"):
        read_infos(store(tmp_path, "arrow", 1))


def test_infos_that_are_not_one_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(DatasetError, match=r"episode 0: infos\['(speed|deep/twice)'\] has 2 rows for 3 steps"):
        read_infos(store(tmp_path, "hdf5", -1))


def test_where_there_are_none() -> None:
    with pytest.raises(DatasetError, match="not a Minari dataset on this machine"):
        read_infos("no/such-v0")
