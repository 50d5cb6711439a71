"""Known noise: where the generalized Gaussian helps, where it biases, and what it recovers."""

from __future__ import annotations

import numpy as np
import pytest

from rlkit2.studies.epistemic import (
    CELLS,
    Budget,
    _jackknifed,
    _ratio,
    epistemic_figure,
    run_epistemic,
    run_epistemic_study,
)
from rlkit2.studies.heteroscedastic import (
    WEIGHTED,
    regression_figure,
    run_regression,
    run_shape_weighting,
    run_weighting,
)
from rlkit2.studies.noisy_mdp import noisy_mdp_figure, run_noisy_mdp


def test_noisy_mdp() -> None:
    methods = ("squared error", "GGD, decoupled", "GGD, coupled")
    results = run_noisy_mdp(noises=("ggd 0.7", "jackpots"), methods=methods, steps=300)
    assert len(results) == 6
    rmse = {(r.noise, r.method): float(r.rmse.mean()) for r in results}
    assert rmse["ggd 0.7", "GGD, coupled"] < 0.6 * rmse["ggd 0.7", "squared error"]
    assert rmse["jackpots", "GGD, coupled"] > 2.0 * rmse["jackpots", "squared error"]  # the bias under skew
    assert rmse["jackpots", "GGD, decoupled"] == pytest.approx(rmse["jackpots", "squared error"], rel=0.01)
    assert all((r.regret > -1e-9).all() for r in results)
    assert noisy_mdp_figure(results).axes


def test_weighting_helps_a_stiff_model() -> None:
    plain, *weighted = (row["error"] for row in run_weighting(40))
    assert weighted[0] < weighted[1] < weighted[2] < plain
    assert weighted[0] < plain / 3.0
    assert [round(row["ESS/B"], 2) for row in run_weighting(1)] == [1.0, 0.51, 0.61, 0.82]


def test_weights_by_shape_help_where_the_scale_is_one_and_nowhere_else() -> None:
    found = run_shape_weighting(8, steps=0)  # least squares alone: no descent of the likelihood
    error = {(r["noise"], r["weight"]): r["error"] for r in found if r["loss"] == "squared error"}
    assert error["same scale", "shape"] < 0.8 * error["same scale", "none"]
    assert error["same deviation", "shape"] > 1.1 * error["same deviation", "none"]
    loud = [error["louder with lighter tails", weight] for weight in ("inverse variance", "none", "shape")]
    assert loud == sorted(loud)  # the shape says nothing of the deviation here, and misleads


def test_the_error_of_the_ratio_is_that_of_its_datasets() -> None:
    rng = np.random.default_rng(0)
    drawn = [_jackknifed(_ratio, rng.normal(size=(16, 5)), np.ones((16, 5))) for _ in range(200)]
    assert np.mean([error for _, error in drawn]) == pytest.approx(np.std([ratio for ratio, _ in drawn]), rel=0.15)


def test_the_figure_shows_every_cell() -> None:
    budget = Budget(datasets=3, members=2, steps=2, width=4)
    cells = [("one-step", "dqn", 50), ("lqr", "iql", 50)]
    found = run_epistemic_study(cells, methods=("as released", "CALIBRATED"), budget=budget)
    labels = [text.get_text() for text in epistemic_figure(found).axes[0].get_yticklabels()]
    assert labels == ["dqn on one-step, 50 rows", "iql on lqr, 50 rows"]
    assert all(r.ratio_error > 0.0 for r in found)


@pytest.mark.slow
def test_resampled_rows_give_epistemic_sd_its_size() -> None:
    """A bandit of 18 cells and 300 rows, with 6 datasets of it: members that see the same rows agree far more than datasets do."""
    budget = Budget(datasets=6, members=6, steps=250, learning_rate=5e-3)
    shared, own = (run_epistemic("one-step", "dqn", m, rows=300, budget=budget) for m in ("as released", "CALIBRATED"))
    assert shared.ratio < 0.5
    assert 0.75 < own.ratio < 1.3
    assert shared.coverage < 0.5 < 0.75 < own.coverage


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_epistemic_sd_has_the_size_of_errors_on_problems_with_known_truth() -> None:
    cells = [cell for cell in CELLS if cell[2] <= 1000]
    for found in run_epistemic_study(cells, methods=("as released", "CALIBRATED")):
        low, high = found.ratio - 2 * found.ratio_error, found.ratio + 2 * found.ratio_error
        if found.method == "CALIBRATED":
            assert low < 1.25, found
            assert high > 0.8, found
            assert not found.coverage < 0.8, found
        else:
            assert high < 0.7, found


@pytest.mark.slow
@pytest.mark.timeout(900)  # 100 s of processor time
def test_regression_recovers_the_noise() -> None:
    results = run_regression()
    assert regression_figure(results).axes
    by = {(r.noise_shape, r.method): r.row() for r in results}
    ggd, gauss = "GGD, coupled", "Gaussian"
    assert by[0.7, ggd]["nll"] < by[0.7, gauss]["nll"] - 0.1
    assert by[2.0, ggd]["nll"] == pytest.approx(by[2.0, gauss]["nll"], abs=0.02)
    for shape in (0.7, 1.0, 2.0):
        assert by[shape, ggd]["calibration_error"] < 0.03
        assert 0.9 < by[shape, ggd]["sd_ratio"] < 1.1
        assert by[shape, ggd]["shape"] == pytest.approx(shape, abs=0.15 if shape <= 1.0 else 0.4)
        assert by[shape, "official form"]["sd_ratio"] > 2.0
        assert np.isfinite(by[shape, "squared error"]["rmse"])
    assert by[2.0, "official form"]["sd_rank"] > 0.9
    plain, *weighted = (by[0.7, name]["rmse"] for name in ("squared error", *WEIGHTED))
    assert min(weighted) > 0.9 * plain  # weights do not help a flexible model, though they are the true ones
