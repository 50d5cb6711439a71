"""The divergences: against the released functions, against a numerical maximiser, and their convex-analysis identities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from rlkit2.losses.divergences import DIVERGENCES, f_conjugate, f_conjugate_grad, f_value, policy_weight
from tests.reference import ROOT

KINDS = [("pearson", 1.5), ("rkl", 1.5), ("soft_chi2", 1.5), ("alpha", 1.2), ("alpha", 1.5), ("alpha", 2.0)]
residuals = st.floats(-8.0, 8.0)
weights = st.floats(0.0, 50.0)
kinds = st.sampled_from(KINDS)


def double(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize(("name", "alias"), [("pearson", "Pearson_chi_square"), ("rkl", "Reverse_KL")])
def test_equal_the_released_functions(name: str, alias: str, kind: str) -> None:
    with np.load(ROOT / "odice_ops_tabular.npz") as file:
        ops = {key.removeprefix("ops/"): file[key] for key in file.files if key.startswith("ops/")}
    grid = torch.from_numpy(ops["R"]) if kind == "torch" else ops["R"]
    for n in (name, alias):
        for found, key in (
            (f_conjugate(n, grid), "f_star"),
            (f_conjugate_grad(n, grid), "f_star_grad"),
            (policy_weight(n, grid, clamp=None), "weight_raw"),
            (policy_weight(n, grid), "weight"),
            (policy_weight(n, grid, clamp=100.0), "weight"),
        ):
            assert isinstance(found, type(grid))
            np.testing.assert_allclose(np.asarray(found), ops[f"{name}/{key}"], rtol=1e-12, atol=1e-15)


@given(kinds, residuals)
def test_conjugate_is_the_maximum(kind: tuple[str, float], residual: float) -> None:
    """f*(y) = max over w >= 0 of w y - f(w), attained at w = (f*)'(y)."""
    name, alpha = kind
    best = minimize_scalar(
        lambda w: float(f_value(name, double(w), alpha=alpha)) - w * residual,
        bounds=(0.0, 5000.0),
        method="bounded",
        options={"xatol": 1e-10},
    )
    conjugate = float(f_conjugate(name, double(residual), alpha=alpha))
    weight = float(f_conjugate_grad(name, double(residual), alpha=alpha))
    assert conjugate >= -best.fun - 1e-9
    assert conjugate == pytest.approx(-best.fun, rel=1e-6, abs=1e-6)
    assert weight == pytest.approx(best.x, rel=1e-3, abs=2e-3)


@given(kinds, residuals, weights)
def test_fenchel_young(kind: tuple[str, float], residual: float, weight: float) -> None:
    """f*(y) + f(w) >= w y, with equality at w = (f*)'(y)."""
    name, alpha = kind
    y, w = double(residual), double(weight)
    assert float(f_conjugate(name, y, alpha=alpha) + f_value(name, w, alpha=alpha) - w * y) >= -1e-9
    best = f_conjugate_grad(name, y, alpha=alpha)
    torch.testing.assert_close(
        f_conjugate(name, y, alpha=alpha) + f_value(name, best, alpha=alpha), best * y, rtol=1e-9, atol=1e-9
    )


@given(kinds, residuals, residuals, st.floats(0.0, 1.0))
def test_convex_with_growing_slope(kind: tuple[str, float], a: float, b: float, share: float) -> None:
    name, alpha = kind
    x, y = double(a), double(b)

    def conjugate(r: torch.Tensor) -> torch.Tensor:
        return f_conjugate(name, r, alpha=alpha)

    middle = conjugate(share * x + (1.0 - share) * y)
    assert float(middle) <= float(share * conjugate(x) + (1.0 - share) * conjugate(y)) + 1e-9
    slopes = f_conjugate_grad(name, double(min(a, b), max(a, b)), alpha=alpha)
    assert 0.0 <= float(slopes[0]) <= float(slopes[1])


@pytest.mark.parametrize(("name", "alpha"), KINDS)
def test_slope_is_the_derivative(name: str, alpha: float) -> None:
    kinks = double(-2.0, -1.0 / (alpha - 1.0), 0.0)
    grid = torch.linspace(-7.03, 7.01, 301, dtype=torch.float64)
    grid = grid[(grid[:, None] - kinks).abs().amin(1) > 1e-3].requires_grad_()
    (gradient,) = torch.autograd.grad(f_conjugate(name, grid, alpha=alpha).sum(), grid)
    torch.testing.assert_close(gradient, f_conjugate_grad(name, grid.detach(), alpha=alpha), rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda r: f_conjugate(name, r, alpha=alpha), grid[::10].detach().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda r: f_conjugate_grad(name, r, alpha=alpha), grid[::10].detach().requires_grad_()
    )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_f_is_zero_at_one_and_infinite_below_zero(name: str) -> None:
    assert float(f_value(name, double(1.0))) == pytest.approx(0.0, abs=1e-12)
    assert torch.isinf(f_value(name, double(-0.1)))


@given(st.sampled_from(DIVERGENCES), st.sampled_from(["positive_residual", "conjugate_grad"]), residuals)
def test_weights_carry_no_gradient_and_stay_in_their_range(name: str, kind: str, residual: float) -> None:
    r = double(residual).requires_grad_()
    weight = policy_weight(name, r, clamp=3.0, kind=kind)
    assert not weight.requires_grad
    assert 0.0 <= float(weight) <= 3.0
    raw = policy_weight(name, r, clamp=None, kind=kind)
    assert float(weight) == min(float(raw), 3.0)
    if kind == "conjugate_grad" or name != "pearson":
        assert float(raw) == float(f_conjugate_grad(name, r.detach()))


def test_positive_residual_of_pearson_is_twice_the_excess_of_the_optimal_weight() -> None:
    r = torch.linspace(-6.0, 6.0, 101, dtype=torch.float64)
    excess = 2.0 * (f_conjugate_grad("pearson", r) - 1.0).clamp(min=0.0)
    torch.testing.assert_close(policy_weight("pearson", r), excess, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_kind_shape_and_dtype_come_back(name: str, dtype: type) -> None:
    """Any shape, also strided and empty; numpy in, numpy out, in the same precision."""
    array = np.linspace(-3.0, 3.0, 24, dtype=dtype).reshape(2, 3, 4)
    for x in (array, array.T, array[0, 0, 0], array[:0]):
        for function in (f_conjugate, f_conjugate_grad, policy_weight):
            found = function(name, x)
            assert np.asarray(found).dtype == dtype
            assert np.shape(found) == np.shape(x)
            expected = function(name, torch.from_numpy(np.ascontiguousarray(x)))
            np.testing.assert_array_equal(found, expected.numpy().reshape(np.shape(x)))


def test_exact_far_out() -> None:
    """No hidden cap: exp of 149 in float64; the quadratic at 1e6 in float32 to its precision."""
    assert float(f_conjugate("rkl", double(150.0))) == pytest.approx(np.exp(149.0), rel=1e-12)
    far = torch.tensor([1e6], dtype=torch.float32)
    assert float(f_conjugate("pearson", far)) == pytest.approx(1e6 + 2.5e11, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: f_conjugate("kl", double(0.0)), "pearson, rkl, soft_chi2, alpha"),
        (lambda: f_conjugate_grad("alpha", double(0.0), alpha=1.0), "alpha must lie in"),
        (lambda: f_value("hellinger", double(1.0)), "unknown divergence 'hellinger'"),
        (lambda: policy_weight("pearson", double(0.0), kind="advantage"), "positive_residual, conjugate_grad"),
    ],
)
def test_errors_name_the_choices(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
