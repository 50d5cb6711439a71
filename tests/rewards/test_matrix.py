"""Tables and pictures of a matrix of distances."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit2.errors import MissingExtraError, RewardError
from rlkit2.rewards import RewardDistanceMatrix, starc_matrix
from rlkit2.rewards.matrix import classical_scaling
from rlkit2.rewards.norms import euclidean_distances
from tests.rewards.test_properties import make, shape, shaping


def example() -> RewardDistanceMatrix:
    """Two families of rewards, interleaved."""
    mdp, rng = make(1), np.random.default_rng(0)
    a, b = rng.normal(size=(2, *shape(mdp)))
    return starc_matrix(
        {"a": a, "b": b, "a shaped": 2 * a + shaping(mdp, rng.normal(size=mdp.num_states)), "b noisy": b + 0.1 * a}, mdp
    )


def with_gaps() -> RewardDistanceMatrix:
    """One reward without numbers, and intervals."""
    matrix = example()
    values = matrix.values.copy()
    values[1, :], values[:, 1] = np.nan, np.nan
    ci = np.stack([values - 0.1, values + 0.1], -1)
    unknown = np.array([False, True, False, False])
    return RewardDistanceMatrix(values, matrix.names, ~unknown & False, ci=ci, insufficient=unknown)


def test_tables(tmp_path: Path) -> None:
    matrix = example()
    rows = list(csv.DictReader(matrix.to_csv(tmp_path / "d.csv").splitlines()))
    assert (tmp_path / "d.csv").read_text() == matrix.to_csv()
    assert len(rows) == 6
    assert rows[0] == {
        "reward_a": "a",
        "reward_b": "b",
        "distance": repr(float(matrix.values[0, 1])),
        "low": "",
        "high": "",
    }
    found = json.loads(matrix.to_json(tmp_path / "d.json"))
    assert found["values"] == matrix.values.tolist()
    assert found["settings"]["canonicalization"] == "val"
    assert list(tmp_path.iterdir()) == [tmp_path / "d.csv", tmp_path / "d.json"] or len(list(tmp_path.iterdir())) == 2
    gaps = with_gaps()
    assert json.loads(gaps.to_json())["values"][0][1] is None
    assert json.loads(gaps.to_json())["status"] == ["", "insufficient data", "", ""]
    lines = list(csv.DictReader(gaps.to_csv().splitlines()))
    assert lines[0]["distance"] == ""
    assert float(lines[1]["high"]) == pytest.approx(gaps.values[0, 2] + 0.1)
    assert "a shaped" in str(matrix)
    if importlib.util.find_spec("pandas"):
        assert matrix.to_frame().loc["a", "b"] == matrix.values[0, 1]
    else:
        with pytest.raises(MissingExtraError, match="pip install pandas"):
            matrix.to_frame()


def test_order_puts_like_rewards_together() -> None:
    order = [example().names[i] for i in example().order()]
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({"a", "a shaped"}), frozenset({"b", "b noisy"})}
    assert with_gaps().order()[-1] == 1


def test_pictures() -> None:
    matrix, gaps = example(), with_gaps()
    axes = matrix.heatmap(title="four rewards")
    cells = [text.get_text() for text in axes.texts]
    assert f"{matrix.values[0, 1]:.2f}" in cells
    assert len(cells) == 16
    assert axes.get_title() == "four rewards"
    texts = [text.get_text() for text in gaps.heatmap().texts]
    assert "n/a" in texts
    assert any("-" in text and "\n" in text for text in texts)
    assert "insufficient data" in gaps.heatmap().get_xticklabels()[-1].get_text()
    assert {label.get_text() for label in gaps.dendrogram().get_yticklabels()} == {"a", "a shaped", "b noisy"}
    named = [text.get_text() for text in matrix.mds().texts]
    assert "a, a shaped" in named  # on one spot
    nothing = RewardDistanceMatrix(np.full((2, 2), np.nan), ("x", "y"), np.zeros(2, bool))
    for picture in (nothing.dendrogram, nothing.mds):
        with pytest.raises(RewardError, match="nothing to draw"):
            picture()
    assert nothing.heatmap().texts[0].get_text() == "n/a"


def test_scaling_recovers_points_of_a_plane() -> None:
    points = np.random.default_rng(0).normal(size=(7, 2))
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    found, share = classical_scaling(distances)
    np.testing.assert_allclose(np.linalg.norm(found[:, None] - found[None], axis=-1), distances, atol=1e-9)
    assert share == pytest.approx(1)


@given(
    st.integers(0, 10**6),
    st.integers(1, 40),
    st.lists(st.sampled_from([1.0, 1e-2, 1e-5, 1e-9, 0.0]), min_size=1, max_size=4),
    st.sampled_from([torch.float64, torch.float32]),
)
@settings(max_examples=60, deadline=None)
def test_distances_from_a_product_have_the_digits_of_differences(
    seed: int, count: int, spreads: list[float], dtype: torch.dtype
) -> None:
    """Clusters within clusters, lines, copies and zeros, in any order: every distance is what subtraction gives."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((count, 30))
    for spread in spreads:  # every level splits the rows anew
        groups = rng.integers(0, max(1, count // 3), count)
        rows += spread * rng.normal(size=(count, 30))[groups]
    if seed % 3 == 0:
        rows = np.linspace(0, 1, count)[:, None] * rows[:1] + rows[-1:]
    given = torch.from_numpy(rows).to(dtype)
    found = euclidean_distances(given)
    exact = torch.linalg.vector_norm(given[:, None] - given[None], dim=-1)
    assert torch.equal(found, found.mT)
    assert not found.diagonal().any()
    torch.testing.assert_close(found, exact, rtol=1e-13 if dtype == torch.float64 else 3e-5, atol=0)


def test_angles_of_near_and_of_opposite_rewards_keep_their_digits() -> None:
    mdp, rng = make(3), np.random.default_rng(2)
    a, b = rng.normal(size=(2, *shape(mdp)))
    matrix = starc_matrix({"a": a, "near": a + 1e-9 * b, "opposite": -a + 1e-9 * b}, mdp, scale="angle").values
    plain = starc_matrix({"a": a, "near": a + 1e-9 * b}, mdp).values[0, 1]
    assert matrix[0, 1] == pytest.approx(plain, rel=1e-6)
    assert np.pi - matrix[0, 2] == pytest.approx(plain, rel=1e-5)
