"""Every transition of a dataset is aligned, none is lost, none is invented."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

import rlkit2.data.sources.minari as minari_source
from rlkit2.data import TransitionDataset, read_dataset
from tests.data.make import FAMILIES, WIDTH, Ending, code, make_minari

endings = st.lists(
    st.builds(
        lambda length, flags: Ending(length, *flags),
        st.integers(1, 7),
        st.sampled_from([(True, False), (False, True), (True, True), (False, False)]),
    ),
    min_size=1,
    max_size=6,
)


def decoded(values: torch.Tensor, space: spaces.Space[Any]) -> np.ndarray[Any, Any]:
    """(episode, step) of every row, `[N, 2]`, read back from flattened observations or stored actions."""
    array = values.numpy()
    if isinstance(space, spaces.Discrete):
        index = array.argmax(1) if array.ndim == 2 else array - space.start
        return np.stack([index // WIDTH, index % WIDTH], axis=1)
    if isinstance(space, spaces.MultiDiscrete) and array.shape[1] > 2:
        return np.stack([array[:, :8].argmax(1), array[:, 8:].argmax(1)], axis=1)
    return array[:, :2]


def check(
    dataset: TransitionDataset,
    wanted: Sequence[Ending],
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
) -> None:
    """Compare a loaded dataset with what `make_minari` wrote."""
    episodes = np.repeat(np.arange(len(wanted)), [e.length for e in wanted])
    steps = np.concatenate([np.arange(e.length) for e in wanted])
    flat = dataset.spec.flattener
    for field, shift in (("observations", 0), ("next_observations", 1)):
        rows = [
            flat.flatten(code(observation_space, int(e), np.array([t + shift])))[0]
            for e, t in zip(episodes, steps, strict=True)
        ]
        np.testing.assert_array_equal(getattr(dataset, field).numpy(), np.stack(rows).astype(np.float32), err_msg=field)
    here = np.stack([episodes, steps], axis=1)
    np.testing.assert_array_equal(decoded(dataset.actions, action_space), here)
    np.testing.assert_array_equal(dataset.rewards.numpy(), 100.0 * episodes + steps)
    last = np.cumsum([e.length for e in wanted]) - 1
    terminations, truncations = np.zeros(len(steps), bool), np.zeros(len(steps), bool)
    terminations[last] = [e.terminated for e in wanted]
    truncations[last] = [e.truncated or not e.terminated for e in wanted]
    np.testing.assert_array_equal(dataset.terminations.numpy(), terminations)
    np.testing.assert_array_equal(dataset.truncations.numpy(), truncations)
    np.testing.assert_array_equal(dataset.episode_starts.numpy(), [0, *(last + 1)])
    unflagged = sum(not (e.terminated or e.truncated) for e in wanted)
    assert dataset.spec.notes.get("episodes_without_end_flag", 0) == unflagged


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8)
@given(wanted=endings)
def test_every_transition_is_aligned(family: str, data_format: str, wanted: list[Ending]) -> None:
    observation_space, action_space = FAMILIES[family]
    made = make_minari(wanted, observation_space, action_space, data_format)
    check(read_dataset(made.spec.dataset_id), wanted, observation_space, action_space)
    check(read_dataset(made, cache=False), wanted, observation_space, action_space)


def cut_by_action_indices(episodes: Iterator[Any]) -> Iterator[Any]:
    """The classic mistake: the observations of all episodes in one row, cut where the actions are cut."""
    found = list(episodes)
    joined = np.concatenate([episode.observations for episode in found])
    start = 0
    for episode in found:
        steps = len(episode.actions)
        yield replace(episode, observations=joined[start : start + steps + 1])
        start += steps


@settings(max_examples=10)
@given(wanted=endings.filter(lambda found: len(found) > 1))
def test_the_check_notices_observations_cut_by_action_indices(wanted: list[Ending]) -> None:
    observation_space, action_space = FAMILIES["box32"]
    made = make_minari(wanted, observation_space, action_space)
    right = minari_source._episodes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minari_source, "_episodes", lambda *arguments: cut_by_action_indices(right(*arguments)))
        mutant = read_dataset(made, cache=False)
    with pytest.raises(AssertionError):
        check(mutant, wanted, observation_space, action_space)


@settings(max_examples=10)
@given(wanted=endings, keep=st.data())
def test_a_filtered_minari_dataset_gives_its_episodes_only(wanted: list[Ending], keep: st.DataObject) -> None:
    made = make_minari(wanted, *FAMILIES["box32"])
    chosen = keep.draw(st.lists(st.integers(0, len(wanted) - 1), min_size=1, unique=True))
    made.episode_indices = np.array(chosen)
    dataset = read_dataset(made)
    whole = read_dataset(made.spec.dataset_id)
    assert torch.equal(dataset.observations, whole.select(chosen).observations)
    assert dataset.num_episodes == len(chosen)
