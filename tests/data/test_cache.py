"""The cache: shared, read-only, complete or absent, and never in the way."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import rlkit2.data.cache as cache
import rlkit2.data.sources.minari as minari_source
from rlkit2.data import DatasetWarning, read_dataset
from rlkit2.data.cache import verify
from rlkit2.data.folders import OWNER, remove_leftovers
from rlkit2.processes import this_machine
from tests import warm
from tests.data.make import FAMILIES, Ending, box, make_minari

ENDINGS = [Ending(4, True, False), Ending(6, False, True)]


def entry(root: Path) -> Path:
    """The only finished entry of the cache under a test's root."""
    found = [path for path in (root / "cache" / "datasets").iterdir() if not path.name.startswith(".")]
    assert len(found) == 1
    return found[0]


def test_second_opening_reads_the_cache_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_minari(ENDINGS, *FAMILIES["box32"])
    first = read_dataset(made.spec.dataset_id)

    def fail(*_: object) -> None:
        raise AssertionError("the source was read again")

    monkeypatch.setattr(minari_source, "_episodes", fail)
    second = read_dataset(made.spec.dataset_id)
    assert second.spec == first.spec
    for name in (
        "observations",
        "actions",
        "rewards",
        "next_observations",
        "terminations",
        "truncations",
        "episode_starts",
    ):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert verify(second)
    assert sorted(path.name for path in entry(tmp_path).iterdir()) == [
        "blocks.npy",
        "dataset.json",
        "episode_starts.npy",
        "records.bin",
    ]


def test_writing_to_a_tensor_never_reaches_the_file(tmp_path: Path) -> None:
    made = make_minari(ENDINGS, *FAMILIES["box32"])
    dataset = read_dataset(made.spec.dataset_id)
    before = (entry(tmp_path) / "records.bin").read_bytes()
    dataset.observations.fill_(7.0)
    assert (entry(tmp_path) / "records.bin").read_bytes() == before
    assert not verify(dataset)
    assert verify(read_dataset(made.spec.dataset_id))


def test_a_changed_source_is_packed_again() -> None:
    made = make_minari(ENDINGS, *FAMILIES["box32"])
    first = read_dataset(made.spec.dataset_id)
    import h5py

    path = Path(made.storage.data_path) / "main_data.hdf5"
    with h5py.File(path, "a") as file:
        file["episode_0"]["rewards"][1] = 55.0
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 10))
    second = read_dataset(made.spec.dataset_id)
    assert float(second.rewards[1]) == 55.0
    assert second.spec.content_hash != first.spec.content_hash


def overwrite(path: Path, how: str) -> None:
    """Change one reward in an HDF5 file and leave name, size and time of content as they were."""
    before = path.stat()
    changed = path.with_name("changed")
    shutil.copy2(path, changed)
    with h5py.File(changed, "a") as file:
        file["episode_1"]["rewards"][3] = 55.0
    assert changed.stat().st_size == before.st_size
    if how == "in place":
        path.write_bytes(changed.read_bytes())
    elif how == "another file":
        changed.replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("how", ["in place", "another file"])
@pytest.mark.parametrize("blind", [(), ("st_ctime_ns",), ("st_ino",), ("st_ctime_ns", "st_ino")])
def test_a_source_changed_under_the_same_size_and_time_is_packed_again(
    how: str, blind: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on file systems that have no change time or no stable inode, where the sampled content tells."""
    stat = Path.stat

    class Blind:
        """What a file system tells."""

        def __init__(self, info: os.stat_result) -> None:
            self.info = info

        def __getattr__(self, name: str) -> object:
            return 0 if name in blind else getattr(self.info, name)

    monkeypatch.setattr(Path, "stat", lambda path, **how: Blind(stat(path, **how)))
    made = make_minari(ENDINGS, *FAMILIES["box32"])
    first = read_dataset(made.spec.dataset_id)
    overwrite(Path(made.storage.data_path) / "main_data.hdf5", how)
    second = read_dataset(made.spec.dataset_id)
    assert float(second.rewards[7]) == 55.0
    assert second.spec.content_hash != first.spec.content_hash


def test_a_new_state_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    made = make_minari(ENDINGS, *FAMILIES["box32"])
    for _ in range(3):
        read_dataset(made.spec.dataset_id)
        overwrite(Path(made.storage.data_path) / "main_data.hdf5", "another file")
    entry(tmp_path)


def test_the_samples_of_a_large_file_are_few_and_reach_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(40 << 20))
    key = cache.cache_key([path]).state
    assert len(cache._sampled(path, 40 << 20, cache.SAMPLES)) == cache.SAMPLES * cache.BLOCK
    info = path.stat()
    for place in (0, (40 << 20) - 1):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
        assert cache.cache_key([path]).state != key


def test_verify_holds_a_copy_against_its_source() -> None:
    made = make_minari(ENDINGS, *FAMILIES["box32"])
    kept = read_dataset(made.spec.dataset_id)
    assert verify(kept, read_dataset(made.spec.dataset_id, cache=False))
    overwrite(Path(made.storage.data_path) / "main_data.hdf5", "in place")
    assert verify(kept)
    assert not verify(kept, read_dataset(made.spec.dataset_id, cache=False))


def test_entries_are_listed_and_cleaned_down_to_a_limit() -> None:
    made = [make_minari([Ending(steps, True, False)], *FAMILIES["box32"]) for steps in (100, 200, 300)]
    for number, dataset in enumerate(made):
        read_dataset(dataset)
        (found,) = (entry for entry in cache.entries() if entry.dataset == dataset.spec.dataset_id)
        os.utime(found.folder, (number, number))
    found = cache.entries()
    assert [entry.dataset for entry in found] == [dataset.spec.dataset_id for dataset in made]
    assert not any(entry.stale for entry in found)
    assert found[0].bytes > 100 * read_dataset(made[0], cache=False).records.dtype.itemsize
    shutil.rmtree(made[2].storage.data_path)
    removed = cache.clean(limit=found[1].bytes)
    assert [entry.dataset for entry in removed] == [made[2].spec.dataset_id, made[0].spec.dataset_id]
    assert [entry.dataset for entry in cache.entries()] == [made[1].spec.dataset_id]
    assert len(cache.clean()) == 1
    assert cache.entries() == []


def shorten(folder: Path) -> None:
    """A file that lost its end."""
    data = (folder / "records.bin").read_bytes()
    (folder / "records.bin").write_bytes(data[:-8])


DAMAGES = {
    "short records": shorten,
    "no records": lambda folder: (folder / "records.bin").unlink(),
    "bad json": lambda folder: (folder / "dataset.json").write_text("{"),
    "json of something else": lambda folder: (folder / "dataset.json").write_text("[]"),
    "wrong starts": lambda folder: np.save(folder / "episode_starts.npy", np.array([0, 4, 11])),
    "empty starts": lambda folder: np.save(folder / "episode_starts.npy", np.zeros(0, np.int64)),
    "starts is no array": lambda folder: (folder / "episode_starts.npy").write_bytes(b"\x93NUMPY"),
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_built_again_with_a_message(tmp_path: Path, damage: str) -> None:
    made = make_minari(ENDINGS, *FAMILIES["box32"])
    before = read_dataset(made.spec.dataset_id).observations.clone()
    DAMAGES[damage](entry(tmp_path))
    with pytest.warns(DatasetWarning, match="damaged .* built again"):
        second = read_dataset(made.spec.dataset_id)
    assert torch.equal(before, second.observations)
    assert verify(read_dataset(made.spec.dataset_id))


def test_an_unwritable_cache_falls_back_to_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_minari(ENDINGS, *FAMILIES["box32"])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RLKIT2_CACHE", str(tmp_path / "file"))
    with pytest.warns(DatasetWarning, match="cannot be written .* stay in memory"):
        dataset = read_dataset(made.spec.dataset_id)
    assert len(dataset) == 10
    assert verify(dataset)


def test_a_full_disk_falls_back_to_memory_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_minari(ENDINGS, *FAMILIES["box32"])

    class Full:
        """A file on a full disk."""

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "open", lambda *_, **__: Full(), raising=False)
    with pytest.warns(DatasetWarning, match="No space left on device"):
        dataset = read_dataset(made.spec.dataset_id)
    assert len(dataset) == 10
    assert list((tmp_path / "cache" / "datasets").iterdir()) == []


def test_a_kill_while_packing_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_minari(ENDINGS, *FAMILIES["box32"])
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        read_dataset(made.spec.dataset_id)
    monkeypatch.setattr(Path, "rename", rename)
    assert not [path for path in (tmp_path / "cache" / "datasets").iterdir() if not path.name.startswith(".")]
    assert len(read_dataset(made.spec.dataset_id)) == 10


OPEN_MANY = """
import sys, warnings
from rlkit2.data import read_dataset
warnings.simplefilter("error")
print("ready", flush=True)
sys.stdin.readline()
dataset = read_dataset(sys.argv[1])
print(len(dataset), float(dataset.rewards.sum()), dataset.spec.content_hash)
"""


def test_two_processes_open_a_new_dataset_at_once(tmp_path: Path) -> None:
    made = make_minari([Ending(7, True, False)] * 60, *FAMILIES["box32"])
    command, pipe = [sys.executable, "-c", OPEN_MANY, made.spec.dataset_id], warm.PIPE
    processes = [warm.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # all of them have imported everything
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert outputs[0][0].startswith("420 ")
    entry(tmp_path)
    assert not [path for path in (tmp_path / "cache" / "datasets").iterdir() if path.name.startswith(".")]


def test_observation_keys_have_entries_of_their_own(tmp_path: Path) -> None:
    made = make_minari(ENDINGS, *FAMILIES["goal"])
    assert read_dataset(made).spec.observation_size == 4
    assert read_dataset(made, observation_keys=["observation"]).spec.observation_size == 2
    assert read_dataset(made).spec.observation_size == 4
    assert len(list((tmp_path / "cache" / "datasets").iterdir())) == 2


def anonymous_memory() -> float:
    """Memory of this process that no file backs, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to see what memory is made of")
def test_sampling_from_the_map_keeps_nothing_in_memory() -> None:
    """The pages come from the file and may leave memory at any time: that is how a dataset larger than memory trains."""
    space = FAMILIES["box32"][0]
    made = make_minari([Ending(1000, False, True)] * 30, box(shape=(200,)), space)
    read_dataset(made.spec.dataset_id)
    dataset = read_dataset(made.spec.dataset_id)
    generators = [torch.Generator().manual_seed(0)]
    dataset.sample(256, generator=generators)
    before = anonymous_memory()
    seen = torch.zeros(len(dataset), dtype=torch.bool)
    for _ in range(500):
        rows = dataset.sample_indices(256, generators)
        dataset.gather(rows)
        seen[rows] = True
    assert dataset.nbytes > 45e6
    assert seen.float().mean() > 0.95
    assert anonymous_memory() - before < 10


def test_what_a_killed_process_left_goes_at_once_and_that_of_living_or_distant_ones_stays(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    owners = {
        "dead": [this_machine(), dead.pid],
        "living": [this_machine(), os.getppid()],
        "distant": ["elsewhere", dead.pid],
    }
    for name, owner in owners.items():
        (tmp_path / f".building-{name}").mkdir()
        (tmp_path / f".building-{name}" / OWNER).write_text(json.dumps(owner))
    (tmp_path / ".building-nobody").mkdir()
    remove_leftovers(tmp_path, ".building-*")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f".building-{name}" for name in ("distant", "living", "nobody")
    ]
