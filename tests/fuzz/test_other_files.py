"""HDF5 files that take values from other files are refused by every reader, before anything of those files is read."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

import rlkit2
from rlkit2.errors import CorruptDatasetError
from tests.data.make import FAMILIES, Ending, make_minari

SECRET = 7.25


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file whose numbers nobody but its owner should see, raw and as HDF5."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    np.full(64, SECRET).tofile(folder / "raw")
    with h5py.File(folder / "file.h5", "w") as file:
        file["values"] = np.full(64, SECRET)
    return folder


def external_storage(group, name, length, secret):
    group.create_dataset(name, (length,), np.float64, external=[(str(secret / "raw"), 0, 8 * length)])


def external_link(group, name, length, secret):
    group[name] = h5py.ExternalLink(str(secret / "file.h5"), "values")


def virtual(group, name, length, secret):
    layout = h5py.VirtualLayout((length,), np.float64)
    layout[:] = h5py.VirtualSource(str(secret / "file.h5"), "values", (64,))[:length]
    group.create_virtual_dataset(name, layout)


def soft_link_to_an_external_one(group, name, length, secret):
    group.file["beside"] = h5py.ExternalLink(str(secret / "file.h5"), "values")
    group[name] = h5py.SoftLink("/beside")


ROUTES = [external_storage, external_link, virtual, soft_link_to_an_external_one]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["observations", "rewards"])
def test_minari_datasets(route, name, secret):
    made = make_minari([Ending(6, True, False)] * 2, *FAMILIES["box32"])
    path = Path(made.storage.data_path) / "main_data.hdf5"
    with h5py.File(path, "r+") as file:
        del file["episode_1"][name]
        route(file["episode_1"], name, 6, secret)
    with pytest.raises(CorruptDatasetError, match=r"main_data\.hdf5.*another file"):
        rlkit2.load_dataset(made.id)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["rewards", "infos"])
def test_d4rl_files(route, name, secret, tmp_path):
    path = tmp_path / "file.hdf5"
    with h5py.File(path, "w") as file:
        for key in ("observations", "actions"):
            file[key] = np.zeros((6, 2), np.float32)
        for key in ("rewards", "terminals", "timeouts"):
            if key != name:
                file[key] = np.zeros(6)
        route(file, name, 6, secret)
    with pytest.raises(CorruptDatasetError, match=r"file\.hdf5.*another file"):
        rlkit2.load_dataset(path)


def test_an_array_that_claims_more_than_was_stored_is_damaged(tmp_path):
    made = make_minari([Ending(6, True, False)] * 2, *FAMILIES["box32"])
    with h5py.File(Path(made.storage.data_path) / "main_data.hdf5", "r+") as file:
        del file["episode_0"]["rewards"]
        file["episode_0"].create_dataset("rewards", (10**13,), np.float64, chunks=(1024,))
    with pytest.raises(
        CorruptDatasetError, match=r"episode 0.*rewards claims 7.45e\+04 GiB, of which 0 bytes are stored"
    ):
        rlkit2.load_dataset(made.id)


def test_constants_compress_well_and_are_read(tmp_path):
    path = tmp_path / "zeros.hdf5"
    with h5py.File(path, "w") as file:
        file["observations"], file["actions"] = np.zeros((9, 1), np.float32), np.zeros((9, 1), np.float32)
        for name in ("rewards", "terminals", "timeouts"):
            file.create_dataset(name, (9,), np.float32, chunks=(9,), compression=9)
    assert len(rlkit2.load_dataset(path)) > 0
