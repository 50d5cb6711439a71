"""Batches that look ahead: returns of several steps and the data's next actions, against a loop over every episode."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit2.data import DatasetSpec, TransitionDataset, dataset_from_arrays, with_weights
from rlkit2.data.batch import LookaheadBatch, RowBatch
from rlkit2.errors import DatasetError

FIELDS = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
IMAGE = spaces.Box(0, 255, (2, 3, 1), np.uint8)
SEEN: dict[str, spaces.Space[Any]] = {"vector": spaces.Box(-9, 9, (3,), np.float32), "image": IMAGE}
ACTS: dict[str, spaces.Space[Any]] = {
    "continuous": spaces.Box(-1, 1, (2,), np.float32),
    "choice": spaces.Discrete(4),
    "choices": spaces.MultiDiscrete([3, 2]),
}


def make(lengths: list[int], seen: str = "vector", act: str = "continuous", seed: int = 0) -> TransitionDataset:
    """Episodes of these lengths, every second one terminated."""
    rng, total = np.random.default_rng(seed), sum(lengths)
    shape = SEEN[seen].shape
    assert shape is not None
    shown = rng.normal(size=(total + len(lengths), *shape))
    shown = (40 * np.abs(shown)).astype(np.uint8) if seen == "image" else shown.astype(np.float32)
    rows = np.arange(total) + np.repeat(np.arange(len(lengths)), lengths)
    ends = np.zeros(total, bool)
    ends[np.cumsum(lengths) - 1] = True
    even = np.repeat(np.arange(len(lengths)) % 2 == 0, lengths)
    ACTS[act].seed(seed)
    return dataset_from_arrays(
        shown[rows],
        np.stack([ACTS[act].sample() for _ in range(total)]),
        rng.normal(size=total).astype(np.float32),
        shown[rows + 1],
        ends & even,
        ends & ~even,
        spec=DatasetSpec(observation_space=SEEN[seen], action_space=ACTS[act]),
    )


def by_hand(dataset: TransitionDataset, num_steps: int, discount: float) -> list[dict[str, Any]]:
    """What every row looks like, step by step through its episode."""
    found = []
    for e in range(dataset.num_episodes):
        episode = dataset.episode(e)
        length = len(episode["rewards"])
        for t in range(length):
            total, k = 0.0, 0
            while k < num_steps and t + k < length:
                total += discount**k * float(episode["rewards"][t + k])
                k += 1
            last = t + k - 1
            found.append(
                {
                    "observations": episode["observations"][t],
                    "actions": episode["actions"][t],
                    "rewards": total,
                    "next_observations": episode["next_observations"][last],
                    "terminations": bool(episode["terminations"][last]),
                    "truncations": bool(episode["truncations"][last]),
                    "steps": k,
                    "next_actions": episode["actions"][min(last + 1, length - 1)],
                    "followed": last + 1 < length,
                }
            )
    return found


def check(dataset: TransitionDataset, num_steps: int, discount: float, expected: list[dict[str, Any]]) -> None:
    ahead = dataset.looking_ahead(num_steps, discount, next_actions=True)
    rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(1)).view(1, -1)
    batch = ahead.gather(rows)
    assert isinstance(batch, LookaheadBatch)
    assert (batch.discount, batch.steps is None) == ((discount, False) if num_steps > 1 else (1.0, True))
    for i, row in enumerate(rows[0].tolist()):
        for name, value in expected[row].items():
            column = getattr(batch, name)
            if name == "rewards":
                assert column[0, i].item() == pytest.approx(value, rel=1e-6, abs=1e-6)
            elif column is not None:
                assert torch.equal(column[0, i], torch.as_tensor(value, dtype=column.dtype)), (name, row)
    assert batch.rewards.dtype == dataset.rewards.dtype
    for name in FIELDS:  # the dataset itself is as it was
        assert torch.equal(getattr(ahead, name), getattr(dataset, name)), name


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    num_steps=st.integers(1, 8),
    discount=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    seen=st.sampled_from(list(SEEN)),
    act=st.sampled_from(list(ACTS)),
    stack=st.integers(1, 3),
)
def test_every_row_against_a_loop(
    lengths: list[int], num_steps: int, discount: float, seen: str, act: str, stack: int
) -> None:
    dataset = make(lengths, seen, act).stacked(stack)
    check(dataset, num_steps, discount, by_hand(dataset, num_steps, discount))


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 5), min_size=2, max_size=5), num_steps=st.integers(2, 6), data=st.data())
def test_selections_and_new_rewards(lengths: list[int], num_steps: int, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=4))
    dataset = make(lengths)
    dataset = dataset.with_rewards(torch.arange(float(len(dataset)))).select(chosen)
    check(dataset, num_steps, 0.9, by_hand(dataset, num_steps, 0.9))
    other = dataset.with_rewards(-dataset.rewards)
    again = dataset.looking_ahead(num_steps, 0.9).with_rewards(-dataset.rewards)
    assert torch.equal(
        again.gather(torch.arange(len(other))).rewards,
        other.looking_ahead(num_steps, 0.9).gather(torch.arange(len(other))).rewards,
    )


@pytest.mark.parametrize("num_steps", [1, 2, 4, 9])
def test_a_flag_within_a_stored_episode_ends_the_steps(num_steps: int) -> None:
    """Some datasets keep several lives in one episode."""
    lives = make([3, 4, 1, 5])
    together = dataclasses.replace(lives, episode_starts=torch.tensor([0, 13]))
    check(together, num_steps, 0.9, by_hand(lives, num_steps, 0.9))


EARNED = ("returns_to_go", "steps_to_go", "first_returns", "first_steps", "first_observations", "final_observations")


def check_episodes(dataset: TransitionDataset, lives: TransitionDataset, discount: float, num_steps: int) -> None:
    """Every row against a loop over the episode of `lives` that it belongs to."""
    ahead = dataset.looking_ahead(num_steps, discount, episodes=True)
    batch = ahead.gather(torch.randperm(len(dataset), generator=torch.Generator().manual_seed(2)).view(1, -1))
    assert isinstance(batch, LookaheadBatch)
    assert batch.discount == discount
    assert batch.final_terminations is not None
    at = {int(row): i for i, row in enumerate(batch.rows[0])}
    row = 0
    for e in range(lives.num_episodes):
        episode = lives.episode(e)
        length = len(episode["rewards"])
        earned = [
            sum(discount ** (k - t) * float(episode["rewards"][k]) for k in range(t, length)) for t in range(length)
        ]
        for t in range(length):
            i = at[row]
            expected = (
                earned[t],
                length - t,
                earned[0],
                length,
                episode["observations"][0],
                episode["next_observations"][-1],
            )
            for name, value in zip(EARNED, expected, strict=True):
                found = getattr(batch, name)[0, i]
                torch.testing.assert_close(
                    found, torch.as_tensor(value, dtype=found.dtype), rtol=1e-5, atol=1e-5, msg=name
                )
            assert bool(batch.final_terminations[0, i]) == bool(episode["terminations"][-1])
            row += 1


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    num_steps=st.integers(1, 4),
    discount=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    seen=st.sampled_from(list(SEEN)),
    stack=st.integers(1, 3),
)
def test_whole_episodes_against_a_loop(
    lengths: list[int], num_steps: int, discount: float, seen: str, stack: int
) -> None:
    dataset = make(lengths, seen).stacked(stack)
    check_episodes(dataset, dataset, discount, num_steps)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 5), min_size=2, max_size=5), data=st.data())
def test_whole_episodes_of_selections_new_rewards_and_several_lives(lengths: list[int], data: st.DataObject) -> None:
    lives = make(lengths)
    check_episodes(dataclasses.replace(lives, episode_starts=torch.tensor([0, len(lives)])), lives, 0.9, 1)
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=4))
    part = lives.looking_ahead(1, 0.9, episodes=True).with_rewards(torch.arange(float(len(lives)))).select(chosen)
    check_episodes(part, part, 0.9, 1)


def test_one_step_is_the_plain_batch() -> None:
    dataset = make([4, 2])
    assert type(dataset.looking_ahead().gather(torch.arange(6))) is RowBatch
    plain, ahead = dataset.gather(torch.arange(6)), dataset.looking_ahead(next_actions=True).gather(torch.arange(6))
    for name in FIELDS:
        assert torch.equal(getattr(ahead, name), getattr(plain, name)), name


def test_draws_stay_the_same_and_weights_are_kept() -> None:
    dataset = with_weights(make([4, 5]), [0.0] * 4 + [1.0] * 5)
    ahead = dataset.looking_ahead(3, 0.9)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    batch = ahead.sample(50, seeds=1, generator=generators[:1])
    assert isinstance(batch, LookaheadBatch)
    assert torch.equal(batch.rows, dataset.sample(50, seeds=1, generator=generators[1:]).rows)  # type: ignore[attr-defined]
    assert batch.rows.min() >= 4
    moved = batch.to("cpu").with_seed_axis()
    assert moved.discount == 0.9
    assert moved.steps is not None
    assert batch.next_actions is None


@pytest.mark.parametrize(("num_steps", "discount"), [(0, 0.9), (2, 1.5), (2, -0.1)])
def test_numbers_out_of_range(num_steps: int, discount: float) -> None:
    with pytest.raises(DatasetError, match=f"num_steps {num_steps} must be at least 1 and discount {discount} between"):
        make([2]).looking_ahead(num_steps, discount)
