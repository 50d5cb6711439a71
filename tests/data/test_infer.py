"""Spaces from data and from text: every action of the data lies inside, choices are choices, and training refuses what lies outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

import rlkit2
from rlkit2.data import DatasetSpec, DatasetWarning, audit, dataset_from_arrays, parse_space, read_dataset
from rlkit2.data.infer import infer_spaces
from rlkit2.errors import ConfigError, DatasetError

ROWS = 60


def rows(actions: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """D4RL-style arrays in episodes of 20 steps."""
    rng = np.random.default_rng(seed)
    return {
        "observations": rng.normal(size=(len(actions), 3)),
        "actions": actions,
        "rewards": rng.normal(size=len(actions)),
        "terminals": np.arange(len(actions)) % 20 == 19,
        "timeouts": np.zeros(len(actions), bool),
    }


@given(
    low=st.integers(-30, 30),
    count=st.integers(2, 20),
    columns=st.integers(0, 3),
    dtype=st.sampled_from([np.int8, np.int32, np.int64, np.float32, np.float64]),
    seed=st.integers(0, 9),
)
def test_whole_numbers_are_choices_from_the_smallest_to_the_largest(
    low: int, count: int, columns: int, dtype: Any, seed: int
) -> None:
    every = np.arange(low, low + count)
    shape = (ROWS, columns) if columns else (ROWS,)
    actions = np.random.default_rng(seed).choice(every, shape)
    actions[:count] = every[:, None] if columns else every
    with pytest.warns(DatasetWarning, match="inferred"):
        dataset = read_dataset(rows(actions.astype(dtype)))
    if columns > 1:
        assert dataset.spec.action_space == spaces.MultiDiscrete([count] * columns, start=[low] * columns)
    else:
        assert dataset.spec.action_space == spaces.Discrete(count, start=low)
    np.testing.assert_array_equal(dataset.actions.numpy(), actions[:, 0] if columns == 1 else actions)
    assert dataset.spec.notes["action_spaces_inferred"] == 1


@given(
    scale=st.sampled_from([1e-3, 0.9, 1.5, 40.0, 1e6]),
    offset=st.sampled_from([0.0, -3.0, 11.0, 1e4]),
    shape=st.sampled_from([(), (1,), (3,)]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_continuous_actions_lie_inside_their_bounds(
    scale: float, offset: float, shape: tuple[int, ...], dtype: Any
) -> None:
    actions = (np.random.default_rng(0).uniform(-1, 1, (ROWS, *shape)) * scale + offset).astype(dtype)
    _, space = infer_spaces([(np.zeros((ROWS, 2)), actions)])
    assert isinstance(space, spaces.Box)
    flat, low, high = actions.reshape(ROWS, -1), space.low, space.high
    assert (low <= flat).all()
    assert (flat <= high).all()
    spread = flat.max(0) - flat.min(0)
    unit = (low == -1) & (high == 1)
    assert (unit == ((flat >= -1) & (flat <= 1)).all(0)).all()
    assert (unit | (high - low <= 1.2 * spread + 1e-3 * np.abs(flat).max())).all()


@pytest.mark.parametrize(
    ("actions", "space"),
    [
        (np.tile([[True, False], [False, True]], (30, 1)), spaces.MultiBinary(2)),
        (np.tile([True, False], 30), spaces.Discrete(2)),
        (np.tile([-1.0, 1.0], 30), spaces.Box(-1, 1, (1,))),  # bang-bang: zero is missing
        (np.tile([[0.0], [1.0], [2.0]], (20, 1)), spaces.Discrete(3)),
        (np.zeros((60, 2), np.float32), spaces.Box(-1, 1, (2,))),
        (np.tile([0, 4, 19], 20), spaces.Discrete(20)),
    ],
)
def test_the_kind_of_actions(actions: np.ndarray, space: spaces.Space[Any]) -> None:
    assert infer_spaces([(np.zeros((len(actions), 1)), actions)])[1] == space


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(DatasetError, match="too many for choices"):
        infer_spaces([(np.zeros((3, 1)), np.array([0, 5, 100_000]))])
    with pytest.raises(DatasetError, match="are not numbers"):
        infer_spaces([(np.zeros((2, 1)), np.array(["up", "down"]))])
    with pytest.raises(DatasetError, match="no finite value"):
        infer_spaces([(np.zeros((2, 1)), np.full((2, 1), np.nan))])
    with pytest.raises(DatasetError, match=r"shape \(2,\) in one episode and \(3,\)"):
        infer_spaces([(np.zeros((2, 1)), np.zeros((2, 2))), (np.zeros((2, 1)), np.zeros((2, 3)))])


@pytest.mark.parametrize(
    ("text", "actions", "space"),
    [
        ("box(-20,20)", np.full((60, 2), 15.5), spaces.Box(-20, 20, (2,))),
        ("Box([-1, 0], [16, 17])", np.full((60, 2), 15.5), spaces.Box(np.float32([-1, 0]), np.float32([16, 17]))),
        ("box(-inf,inf)", np.full((60, 1), 15.5), spaces.Box(-np.inf, np.inf, (1,))),
        ("discrete(4)", np.tile([0.0, 1.0, 2.0], 20), spaces.Discrete(4)),
        ("discrete(5,-2)", np.tile([-1, 0, 1], 20), spaces.Discrete(5, start=-2)),
        ("discrete", np.tile([-1.0, 1.0], 30), spaces.Discrete(3, start=-1)),
        ("continuous", np.tile([0, 1, 2], 20), spaces.Box(0, 2.1, (1,))),
        ("multidiscrete(3,2)", np.tile([[2, 1], [0, 0]], (30, 1)), spaces.MultiDiscrete([3, 2])),
        ("multibinary(2)", np.tile([[1, 1], [0, 0]], (30, 1)), spaces.MultiBinary(2)),
    ],
)
def test_a_space_in_words(text: str, actions: np.ndarray, space: spaces.Space[Any]) -> None:
    dataset = rlkit2.load_dataset(rows(actions), action_space=text)
    assert dataset.spec.action_space == space
    assert "action_spaces_inferred" not in dataset.spec.notes


@pytest.mark.parametrize(
    "text", ["", "box", "box(1)", "box(2,1)", "discrete(x)", "discrete(-3)", "sphere(2)", "box(1,2", "box('a',2)"]
)
def test_words_that_are_not_a_space(text: str) -> None:
    with pytest.raises(ConfigError):
        read_dataset(rows(np.zeros((60, 1), np.float32)), action_space=text)
    assert callable(parse_space("box(-1,1)"))


@pytest.mark.parametrize(
    ("text", "actions", "message"),
    [
        ("box(-2,2)", np.full((60, 1), 4.0), "60 action values|20 action values .* column 0: 4"),
        ("discrete(3)", np.tile([1, 2, 3], 20), "outside the given space Discrete"),
        ("discrete(3)", np.full((60, 1), 0.5), "not whole numbers"),
        ("multidiscrete(2,2)", np.tile([[0, 2]], (60, 1)), "column 1: 2"),
    ],
)
def test_values_outside_a_given_space_are_refused(text: str, actions: np.ndarray, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read_dataset(rows(actions), action_space=text)


def test_training_refuses_actions_outside_their_space(tmp_path: Path) -> None:
    given_rows = rows(np.tile([[0, 2], [1, 0]], (30, 1)))
    with pytest.warns(DatasetWarning, match="inferred"):
        dataset = read_dataset(given_rows)
    how = {"steps": 2, "batch_size": 4, "eval_every": 0, "out": tmp_path, "progress": False}
    wrong = DatasetSpec(observation_space=dataset.spec.observation_space, action_space=spaces.Box(-1, 1, (2,)))
    fields = {
        name: getattr(dataset, name).numpy()
        for name in ("observations", "next_observations", "rewards", "terminations", "truncations")
    }
    outside = dataset_from_arrays(**fields, actions=dataset.actions.float().numpy(), spec=wrong)
    assert not audit(outside).ok
    with pytest.raises(DatasetError, match="action value 2 in row 0, column 1 lies outside its space Box"):
        rlkit2.train("bc", outside, **how)


def test_timestamps_that_float32_cannot_hold_are_refused() -> None:
    values = rows(np.zeros((60, 1), np.float32))
    values["observations"][:, 1] = 1.7e9 + np.arange(60)
    with pytest.raises(DatasetError, match=r"observation column 1 is as large as 1.7e\+09 and changes by 1 a step"):
        read_dataset(values)
    values["observations"][:, 1] -= 1.7e9
    values["observations"][:, 2] = 1e5 * np.arange(60)
    assert len(read_dataset(values, action_space="continuous")) == 60


def test_observations_outside_their_box_are_found() -> None:
    spec = DatasetSpec(observation_space=spaces.Box(-1, 1, (3,)), action_space=spaces.Box(-1, 1, (1,)))
    values = rows(np.zeros((60, 1), np.float32))
    values["observations"] = np.clip(values["observations"], -1, 1)
    values["observations"][7, 2] = 3.0
    report = audit(read_dataset(values, spec=spec))
    (found,) = (finding for finding in report.findings if finding.code == "observations_out_of_bounds")
    assert found.where == ({"episode": 0, "step": 7, "column": 2},)
