"""Damage to a cached dataset is seen by whatever reads the damaged rows, and by nothing that does not."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

import rlkit2
from rlkit2.cli.main import main
from rlkit2.data import DatasetWarning, TransitionDataset, read_dataset
from rlkit2.data.blocks import BLOCK_BYTES, BlockChecks, BlockSums, rows_per_block
from rlkit2.data.cache import cache_folder, verify
from rlkit2.data.records import FIELDS
from rlkit2.errors import CorruptDatasetError
from tests.data.make import FAMILIES, Ending, make_minari
from tests.data.test_frames import arrays_of, dataset_of


@pytest.fixture
def made() -> str:
    """A dataset of 5,000 rows in several blocks, cached."""
    made = make_minari([Ending(500, True, False)] * 10, *FAMILIES["box32"])
    read_dataset(made.spec.dataset_id)
    return made.spec.dataset_id


def entry() -> Path:
    (found,) = (path for path in (cache_folder() / "datasets").iterdir() if not path.name.startswith("."))
    return found


def zero(start: int, count: int = BLOCK_BYTES) -> None:
    """Zeros in place of a part of the records, as a disk leaves them."""
    with (entry() / "records.bin").open("r+b") as file:
        file.seek(start)
        file.write(bytes(count))


READERS = {
    "a batch": lambda dataset: dataset.gather(torch.tensor([[2, 700]])),
    "samples": lambda dataset: dataset.sample(4000, generator=torch.Generator().manual_seed(0)),
    "a field": lambda dataset: dataset.rewards,
    "an episode": lambda dataset: dataset.episode(1),
    "a selection": lambda dataset: dataset.select([1]).gather(torch.tensor([[200]])),
    "the rest of a split": lambda dataset: [part.observations for part in dataset.split(0.2)],
    "returns": lambda dataset: dataset.episode_returns,
    "other rewards": lambda dataset: dataset.with_rewards(torch.zeros(5000)).gather(torch.tensor([700])),
    "another device": lambda dataset: dataset.to("meta"),
    "segments": lambda dataset: dataset.observations[dataset.segments(3)],
}


@pytest.mark.parametrize("reader", READERS)
def test_whatever_reads_a_damaged_block_says_so(made: str, reader: str) -> None:
    dataset = read_dataset(made)
    per_block = rows_per_block(dataset.records.dtype.itemsize)
    assert 0 < 700 // per_block < 5000 // per_block - 1
    READERS[reader](dataset)
    zero(700 // per_block * per_block * dataset.records.dtype.itemsize)
    first = 700 // per_block * per_block
    with pytest.raises(
        CorruptDatasetError, match=f"rows {first} to {first + per_block - 1} of the cached copy .* it is removed"
    ):
        READERS[reader](read_dataset(made))
    again = read_dataset(made)  # from the source
    READERS[reader](again)
    assert verify(again)


def test_a_command_ends_in_one_line_and_works_the_next_time(
    made: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "train",
        "bc",
        "--dataset",
        made,
        "--steps",
        "20",
        "--hidden-sizes",
        "8",
        "--eval-every",
        "0",
        "--batch-size",
        "64",
    ]
    zero(0)
    assert main([*command, "--out", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("rlkit2: rows 0 to ")
    assert error.endswith(
        "are damaged; it is removed, then the same command (for a run, its --resume) reads the dataset anew"
    )
    assert main([*command, "--out", str(tmp_path / "runs")]) == 0


def test_rows_of_whole_blocks_are_read_though_others_are_damaged(made: str) -> None:
    """A dataset larger than memory is not read through before the first batch."""
    itemsize = read_dataset(made).records.dtype.itemsize
    zero(4000 * itemsize)
    dataset = read_dataset(made)
    dataset.gather(torch.arange(2000))
    assert dataset.records.checks is not None
    assert dataset.records.checks.left > 0
    with pytest.raises(CorruptDatasetError):
        dataset.gather(torch.tensor([4200]))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_change_of_any_byte_is_seen(data: st.DataObject) -> None:
    """Of sums over pieces of any size, whatever the size of a row."""
    row, rows = data.draw(st.sampled_from([8, 24, 104, BLOCK_BYTES + 8])), data.draw(st.integers(1, 900))
    rows = min(rows, 40) if row > 1000 else rows
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    content = rng.integers(0, 256, row * rows, dtype=np.uint8)
    sums, start = BlockSums(row), 0
    while start < rows:
        count = data.draw(st.integers(1, rows))
        sums.update(content[start * row : (start + count) * row].data)
        start += count
    found: list[tuple[int, int]] = []

    def damaged(first: int, last: int) -> None:
        found.append((first, last))
        raise CorruptDatasetError

    BlockChecks(content, sums.finish(), row, damaged).see_all()
    changed = content.copy()
    place = data.draw(st.integers(0, len(content) - 1))
    changed[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptDatasetError):
        BlockChecks(changed, sums.finish(), row, damaged).see(torch.tensor([[place // row]]))
    assert found[0][0] <= place // row <= found[0][1] < rows


IMAGES = spaces.Dict(image=spaces.Box(0, 255, (32, 32, 3), np.uint8), speed=spaces.Box(-9, 9, (2,), np.float32))


@pytest.fixture
def images() -> tuple[str, TransitionDataset]:
    """A dataset of images and numbers in several blocks, and what it holds."""
    whole = dataset_of(IMAGES, arrays_of(IMAGES, [9, 1, 7] * 6, set()))
    whole.to_minari("test/damaged-v0")
    return "test/damaged-v0", whole


FILES = ("records.bin", "frames.bin", "blocks.npy", "frame_blocks.npy", "episode_starts.npy", "dataset.json")


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), seed=st.integers(0, 99)
)
def test_a_flipped_bit_anywhere_is_never_trained_on(
    name: str, place: float, bit: int, seed: int, images: tuple[str, TransitionDataset]
) -> None:
    """Batches hold what was written, up to the batch at which the command ends in one line or the copy is built again."""
    dataset_id, whole = images
    cached = read_dataset(dataset_id)
    assert sorted(FILES) == sorted(path.name for path in entry().iterdir())
    path = entry() / name
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    generator, damaged = torch.Generator().manual_seed(seed), False
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            cached = read_dataset(dataset_id)
            for _ in range(40):
                rows = torch.randint(len(whole), (2, 16), generator=generator)
                batch, wanted = cached.gather(rows), whole.gather(rows)
                assert all(torch.equal(getattr(batch, field), getattr(wanted, field)) for field in FIELDS)
        except CorruptDatasetError as error:
            damaged = True
            assert "are damaged; it is removed" in str(error)  # noqa: PT017
    assert damaged != any("built again" in str(warning.message) for warning in said)
    again = read_dataset(dataset_id)
    assert verify(again, whole)


@pytest.mark.parametrize("encoder", ["none", "nature"])
def test_training_on_damaged_images_ends_in_one_line(
    encoder: str, images: tuple[str, TransitionDataset], tmp_path: Path
) -> None:
    dataset_id, _ = images
    read_dataset(dataset_id)
    frames = entry() / "frames.bin"
    content = bytearray(frames.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    frames.write_bytes(content)
    options = {"steps": 1, "out": tmp_path, "eval_every": 0, "progress": False, "overrides": {"hidden_sizes": (4,)}}
    with pytest.raises(
        CorruptDatasetError, match=r"images \d+ to \d+ of the cached copy .* are damaged; it is removed"
    ):
        rlkit2.train("bc", dataset_id, **options)


def test_every_reader_of_images_sees_damage(images: tuple[str, TransitionDataset]) -> None:
    """One after the other, each on a copy with all frames of episode 3 damaged."""
    dataset_id, whole = images
    first = int(whole.episode_starts[3])
    readers = {
        "an episode": lambda dataset: dataset.episode(3),
        "an episode with other rewards": lambda dataset: dataset.with_rewards(torch.zeros(len(whole))).episode(3),
        "a stack": lambda dataset: dataset.stacked(2).gather(torch.tensor([first + 2])),
        "a field": lambda dataset: dataset.observations,
        "a selection elsewhere": lambda dataset: dataset.select([3]).to("meta"),
        "an audit": rlkit2.data.audit,
        "steps ahead": lambda dataset: dataset.looking_ahead(3, 0.9).gather(torch.tensor([first])),
    }
    for name, reader in readers.items():
        read_dataset(dataset_id)
        frames = entry() / "frames.bin"
        content = bytearray(frames.read_bytes())
        content[first * whole.records.layout.nbytes :] = bytes(len(content) - first * whole.records.layout.nbytes)  # type: ignore[union-attr]
        frames.write_bytes(content)
        damaged = read_dataset(dataset_id)
        with pytest.raises(CorruptDatasetError, match="images"):
            pytest.fail(f"{name} gave {reader(damaged)}")


@pytest.mark.parametrize("name", ["blocks.npy", "episode_starts.npy", "dataset.json"])
@pytest.mark.parametrize("place", [0.3, 0.6, 0.95])
def test_damage_to_the_other_files_builds_the_entry_again(made: str, name: str, place: float) -> None:
    before = read_dataset(made)
    path = entry() / name
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.warns(DatasetWarning, match=r"damaged .* built again"):
        after = read_dataset(made)
    assert after.spec == before.spec
    assert torch.equal(after.episode_starts, before.episode_starts)


def test_an_entry_without_checksums_is_built_again(made: str) -> None:
    (entry() / "blocks.npy").unlink()
    with pytest.warns(DatasetWarning, match="built again"):
        assert isinstance(read_dataset(made), TransitionDataset)
