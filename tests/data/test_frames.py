"""Images are kept once: what is read back is what was written, whatever the episodes look like, from memory, from the cache and from selections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit2.data import DatasetSpec, ReplayBuffer, audit, cache, dataset_from_arrays, read_dataset
from rlkit2.data.records import FIELDS, RecordWriter
from rlkit2.errors import DatasetError

Arrays = dict[str, np.ndarray[Any, Any]]
ACTIONS = spaces.Box(-1, 1, (2,), np.float32)
IMAGE = spaces.Box(0, 255, (3, 5, 2), np.uint8)
SPACES = {
    "image": IMAGE,
    "two images": spaces.Dict(a=IMAGE, b=spaces.Box(0, 255, (3,), np.uint8)),
    "mixed": spaces.Dict(a=spaces.Box(-9, 9, (2,), np.float32), image=IMAGE, z=spaces.Discrete(3)),
}


def arrays_of(space: spaces.Space[Any], lengths: list[int], broken: set[int], seed: int = 0) -> Arrays:
    """Episodes of these lengths as flat rows; after the rows in `broken` the next observation is another than the next row's."""
    random, flat = np.random.default_rng(seed), DatasetSpec(observation_space=space, action_space=ACTIONS).flattener
    space.seed(seed)
    total = sum(lengths)

    def draw(count: int) -> np.ndarray[Any, Any]:
        seen = [space.sample() for _ in range(count)]
        if isinstance(space, spaces.Dict):
            return flat.flatten({key: np.stack([np.asarray(s[key]) for s in seen]) for key in space})
        return flat.flatten(np.stack(seen))

    observations, after = draw(total), draw(total)
    ends = np.zeros(total, bool)
    ends[np.cumsum(lengths) - 1] = True
    for row in range(total - 1):
        if not ends[row] and row not in broken:
            after[row] = observations[row + 1]
    return {
        "observations": observations,
        "next_observations": after,
        "actions": random.uniform(-1, 1, (total, 2)).astype(np.float32),
        "rewards": random.normal(size=total).astype(np.float32),
        "terminations": ends & (random.random(total) < 0.5),
        "truncations": ends,
    }


def dataset_of(space: spaces.Space[Any], arrays: Arrays) -> Any:
    arrays = {**arrays, "truncations": arrays["truncations"] & ~arrays["terminations"]}
    return dataset_from_arrays(**arrays, spec=DatasetSpec(observation_space=space, action_space=ACTIONS))  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(list(SPACES)),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.sets(st.integers(0, 15)),
    st.integers(0, 9),
)
def test_what_is_read_is_what_was_written(kind: str, lengths: list[int], broken: set[int], seed: int) -> None:
    arrays = arrays_of(SPACES[kind], lengths, broken, seed)
    dataset = dataset_of(SPACES[kind], arrays)
    for name in ("observations", "next_observations", "actions", "rewards", "terminations"):
        assert np.array_equal(getattr(dataset, name).numpy(), arrays[name]), name
    inside = np.flatnonzero(~arrays["truncations"])
    extra = len(broken & set(inside.tolist()))
    assert len(dataset.records.frames) <= len(dataset) + len(lengths) + extra
    rows = torch.from_numpy(np.random.default_rng(seed).integers(len(dataset), size=(2, 3)))
    batch = dataset.gather(rows)
    for name in ("observations", "next_observations"):
        assert np.array_equal(getattr(batch, name).numpy(), arrays[name][rows.numpy()])
    order = np.random.default_rng(seed).permutation(len(lengths))
    chosen = dataset.select(order)
    starts = dataset.episode_starts.numpy()
    wanted = np.concatenate([np.arange(starts[e], starts[e + 1]) for e in order])
    assert np.array_equal(chosen.next_observations.numpy(), arrays["next_observations"][wanted])
    first = chosen.episode(0)
    assert np.array_equal(first["observations"].numpy(), arrays["observations"][wanted[: len(first["rewards"])]])
    assert all(torch.equal(chosen.to("cpu").episode(-1)[name], chosen.episode(-1)[name]) for name in FIELDS)
    assert cache.verify(dataset)


@pytest.mark.parametrize("kind", list(SPACES))
def test_the_cache_reads_as_memory_does(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKIT2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr(RecordWriter, "BLOCK_BYTES", 200)
    dataset = dataset_of(SPACES[kind], arrays_of(SPACES[kind], [4, 1, 6], set()))
    dataset.to_minari("test/frames-v0")
    cached, memory = read_dataset("test/frames-v0"), read_dataset("test/frames-v0", cache=False)
    (frames,) = (tmp_path / "cache").rglob("frames.bin")
    assert frames.stat().st_size == (11 + 3) * cached.spec.layout.nbytes  # type: ignore[union-attr]
    for name in FIELDS:
        assert torch.equal(getattr(cached, name), getattr(memory, name))
        assert torch.equal(getattr(cached, name), getattr(dataset, name))
    assert cached.spec.content_hash == memory.spec.content_hash == dataset.spec.content_hash
    assert cache.verify(cached, memory)
    assert audit(cached).ok
    frames.write_bytes(frames.read_bytes()[:-8])
    with pytest.warns(UserWarning, match=r"frames.bin has \d+ bytes, \d+ expected"):
        assert cache.verify(read_dataset("test/frames-v0"))


def test_a_changed_pixel_changes_the_content() -> None:
    arrays = arrays_of(IMAGE, [3, 2], set())
    before = dataset_of(IMAGE, arrays)
    arrays["next_observations"][-1, 0, 0, 0] ^= 1
    after = dataset_of(IMAGE, arrays)
    assert before.spec.content_hash != after.spec.content_hash
    after.records.frames[0, 0] ^= 1
    assert not cache.verify(after)


def test_repeated_episodes_of_images_are_found() -> None:
    arrays = arrays_of(IMAGE, [3, 2], set())
    twice = {name: np.concatenate([value, value]) for name, value in arrays.items()}
    assert [f.code for f in audit(dataset_of(IMAGE, twice)).findings if "duplicate" in f.code]
    assert not [f.code for f in audit(dataset_of(IMAGE, arrays)).findings if "duplicate" in f.code]


def test_pixels_that_are_no_bytes_are_refused() -> None:
    arrays = arrays_of(IMAGE, [3], set())
    arrays["observations"] = arrays["observations"] / 255.0
    with pytest.raises(DatasetError, match="images hold other values than whole numbers from 0 to 255"):
        dataset_of(IMAGE, arrays)


def test_a_replay_buffer_takes_a_dataset_of_images() -> None:
    dataset = dataset_of(IMAGE, arrays_of(IMAGE, [3, 2], set()))
    buffer = ReplayBuffer(10, dataset.spec)
    buffer.extend(dataset)
    batch = buffer.sample(4, generator=torch.Generator().manual_seed(0))
    assert batch.observations.shape == (1, 4, *IMAGE.shape)
    assert batch.observations.dtype == torch.uint8
