"""Generalized-Gaussian losses and weights against the released functions, analytic gradients and the facts of the two forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from rlkit2.errors import ConfigError
from rlkit2.losses.ggd import (
    batch_inverse_variance,
    effective_sample_size,
    expected_minimum,
    gaussian_nll,
    ggd_nll,
    inverse_variance_weights,
    mbbe_variance,
    shape_weights,
    solve_xi,
)
from rlkit2.nn.distributions import GeneralizedNormal, fit_mle, fit_shape
from tests.reference import ROOT

CASES = [f"a{i:02d}" for i in range(19)]
XI_CASES = [f"x{i:02d}" for i in range(25)]
DTYPES = [torch.float32, torch.float64]


def case(file: str, name: str) -> dict[str, np.ndarray]:
    with np.load(ROOT / f"{file}.npz") as stored:
        return {key.split("__")[1]: stored[key] for key in stored.files if key.startswith(f"{name}__")}


class Official:
    """One case of `ggd_losses.npz` in this library's layout, `[M, B]`, with the head's own softplus."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64) -> None:
        self.known = case("ggd_losses", name)
        self.raw = torch.from_numpy(self.known["values"]).to(dtype).permute(2, 1, 0).contiguous().requires_grad_()
        self.values, rho = self.raw
        self.targets = torch.from_numpy(self.known["targets"]).to(dtype).T
        self.spread = F.softplus(rho)
        self.errors = self.values - self.targets
        self.wide = dtype == torch.float64

    def check(self, loss: Tensor, name: str, rtol: float | None = None) -> None:
        """The scalar `name` and its gradient."""
        rtol = rtol or (1e-9 if self.wide else 2e-5)
        np.testing.assert_allclose(loss.item(), self.known[name], rtol=rtol)
        if f"{name}_grad" not in self.known:
            return
        (gradient,) = torch.autograd.grad(loss, self.raw, retain_graph=True)
        expected = self.known[f"{name}_grad"].transpose(2, 1, 0)
        largest = np.abs(expected).max()
        np.testing.assert_allclose(
            gradient, expected, rtol=rtol if self.wide else 0.0, atol=(1e-12 if self.wide else 1e-4) * largest
        )

    def ggd(self, form: str) -> Tensor:
        """mean_b sum_i w_i m_i."""
        member = ggd_nll(self.values, self.targets, shape=self.spread, form=form, reduction="none")
        return (shape_weights(self.spread, 0) * member).sum(0).mean()

    def variance(self, kind: str) -> Tensor:
        if kind == "biev":
            return mbbe_variance(self.errors.detach(), 0, ddof=0, floor=1e-6)
        return float(self.known["gamma"]) ** 2 * self.values.detach().var(0).clamp(min=1e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_agree_with_the_released_code(name: str, dtype: torch.dtype) -> None:
    official = Official(name, dtype)
    official.check(official.errors.square().mean(1).sum(), "mse")
    official.check(
        gaussian_nll(official.values, official.targets, official.spread, reduction="none").mean(1).sum(), "gauss"
    )
    official.check(official.ggd("official"), "ggd")
    if name != "a10":
        official.check(official.ggd("power"), "ggd_power")
    if official.wide:
        member = ggd_nll(official.values, official.targets, shape=official.spread, form="official", reduction="none")
        np.testing.assert_allclose(member.detach().T, official.known["ggd_member"], rtol=1e-9)
        np.testing.assert_allclose(
            shape_weights(official.spread, 0).detach().T, official.known["ggd_weight"], rtol=1e-9
        )


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("a00", "a12", "a14")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weighted_terms_agree_with_the_released_code(name: str, dtype: torch.dtype) -> None:
    official = Official(name, dtype)
    known, count = official.known, official.values.shape[1]
    penalties = {
        "mse": official.errors.square(),
        "mae": official.errors.abs(),
        "huber": F.huber_loss(official.values, official.targets, reduction="none"),
    }
    terms = {}
    rtol = (
        1e-9 if official.wide else 2e-3
    )  # float32 differences of nearly equal errors lose digits before any weighting
    for kind in ("biv", "biev"):
        variance = official.variance(kind)
        np.testing.assert_allclose(variance, known[f"{kind}_var"], rtol=rtol)
        weights = batch_inverse_variance(variance, float(known[f"{kind}_xi"])) / count
        np.testing.assert_allclose(weights, known[f"{kind}_weight"], rtol=rtol)
        np.testing.assert_allclose(effective_sample_size(weights), known[f"{kind}_ess"], rtol=rtol)
        for penalty, errors in penalties.items():
            terms[f"{kind}_{penalty}"] = (weights * errors.sum(0)).mean()
            if official.wide:
                official.check(terms[f"{kind}_{penalty}"], f"{kind}_{penalty}")
    if official.wide:
        lam = float(known["lam"])
        gauss = gaussian_nll(official.values, official.targets, official.spread, reduction="none").mean(1).sum()
        official.check(gauss + lam * terms["biv_mse"], "total_iv_gd")
        official.check(official.ggd("official") + lam * terms["biv_mae"], "total_iv_ggd")
        official.check(official.ggd("official") + lam * terms["biev_mae"], "total_iev_ggd")


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("a00", "a12", "a14")])
def test_xi_of_the_loss_cases(name: str) -> None:
    official = Official(name)
    for kind in ("biv", "biev"):
        found = solve_xi(official.variance(kind), float(official.known["min_batch_size"]))
        np.testing.assert_allclose(found, official.known[f"{kind}_xi_exact"], rtol=1e-8)


def test_special_cases_of_the_forms() -> None:
    laplace, normal = Official("a18"), Official("a17")
    torch.testing.assert_close(laplace.ggd("power"), laplace.ggd("official"), rtol=1e-12, atol=0.0)
    expected = normal.errors.square().mean() + math.lgamma(1.5)
    torch.testing.assert_close(normal.ggd("power"), expected, rtol=1e-12, atol=0.0)


def test_members_and_samples_are_interchangeable_and_seeds_independent() -> None:
    generator = torch.Generator().manual_seed(0)
    values, targets, rho = torch.randn(3, 2, 5, 32, generator=generator).double()
    shape = F.softplus(rho)
    member, sample = torch.randperm(5, generator=generator), torch.randperm(32, generator=generator)

    def total(v: Tensor, y: Tensor, b: Tensor) -> Tensor:
        loss = (shape_weights(b) * ggd_nll(v, y, shape=b, form="official", reduction="none")).sum(-2).mean(-1)
        weights = inverse_variance_weights(mbbe_variance(v - y, -2), 20.0)
        return loss + (weights * (v - y).abs().sum(-2)).mean(-1)

    whole = total(values, targets, shape)
    assert whole.shape == (2,)
    moved = total(*(t[:, member][:, :, sample] for t in (values, targets, shape)))
    torch.testing.assert_close(whole, moved, rtol=1e-9, atol=0.0)
    for seed in range(2):
        torch.testing.assert_close(total(values[seed], targets[seed], shape[seed]), whole[seed], rtol=1e-12, atol=0.0)


# Gradients


@pytest.mark.parametrize("form", ["power", "official"])
@pytest.mark.parametrize("smoothing", [0.0, 1e-3])
def test_gradcheck(form: str, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(1)
    q, rho, log_scale = (torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3))
    y = q.detach() + torch.tensor([0.3, -0.2, 1.5, -2.0, 0.05, 4.0]).double()

    def loss(q: Tensor, rho: Tensor, log_scale: Tensor) -> Tensor:
        shape = 0.3 + F.softplus(rho)
        return ggd_nll(q, y, shape=shape, form=form, log_scale=log_scale, smoothing=smoothing, reduction="none")

    assert torch.autograd.gradcheck(loss, (q, rho, log_scale))


@pytest.mark.parametrize("smoothing", [0.0, 1e-3])
@pytest.mark.parametrize("form", ["power", "official"])
@pytest.mark.parametrize("error", [0.0, 1e-12, -1e-12, 1e6])
def test_gradients_are_finite_in_float32(form: str, smoothing: float, error: float) -> None:
    rho = torch.tensor([-50.0, -1.0, 0.0, 1.0, 2.0, 50.0], requires_grad=True)
    fixed = torch.tensor([0.3, 0.5, 1.0, 2.0, 4.0, 8.0], requires_grad=True)
    q, log_scale = torch.full((6,), error, requires_grad=True), torch.zeros(6, requires_grad=True)
    for shape, leaf in ((fixed, fixed), ((0.3 + F.softplus(rho)).clamp(max=8.0), rho)):
        loss = ggd_nll(q, torch.zeros(6), shape=shape, form=form, log_scale=log_scale, smoothing=smoothing)
        gradients = torch.autograd.grad(loss, (q, leaf, log_scale))
        assert bool(loss.isfinite())
        assert all(bool(g.isfinite().all()) for g in gradients)


def test_analytic_gradients() -> None:
    """dL/dq = w beta sign(d) / B and dL/dbeta = [w (|d| - psi(1 + 1/beta) / beta^2) + (m - mean m) / sum beta] / B."""
    generator = torch.Generator().manual_seed(2)
    q, y = torch.randn(2, 5, 16, generator=generator).double()
    beta = F.softplus(torch.randn(5, 16, generator=generator).double()).requires_grad_()
    q.requires_grad_()
    for form in ("official", "power"):
        weights, member = shape_weights(beta), ggd_nll(q, y, shape=beta, form=form, reduction="none")
        at_q, at_beta = torch.autograd.grad((weights * member).sum(0).mean(), (q, beta), retain_graph=True)
        error = q - y
        size = error.abs() if form == "official" else error.abs() ** beta * error.abs().log()
        slope = 1.0 if form == "official" else error.abs() ** (beta - 1.0)
        torch.testing.assert_close(at_q, weights * beta * slope * error.sign() / 16)
        between = (member - (weights * member).sum(0)) / beta.sum(0)
        torch.testing.assert_close(
            at_beta, (weights * (size - torch.digamma(1.0 + 1.0 / beta) / beta**2) + between) / 16
        )


def test_smoothing_bounds_the_slope_and_hardly_moves_the_value() -> None:
    z = torch.logspace(-6, 2, 400, dtype=torch.float64).requires_grad_()
    for shape, steepest in ((0.3, 21.5), (0.5, 9.9)):
        shapes = torch.full_like(z, shape).detach()
        smooth = ggd_nll(z, torch.zeros_like(z), shape=shapes, smoothing=1e-3, reduction="none")
        exact = ggd_nll(z, torch.zeros_like(z), shape=shapes, reduction="none")
        (slope,) = torch.autograd.grad(smooth.sum(), z)
        assert float(slope.max()) < steepest
        assert float((smooth - exact)[z > 0.03].abs().max()) < 6e-5


@settings(max_examples=30)
@given(st.floats(1e-4, 1e4), st.integers(0, 100))
def test_a_scale_of_the_errors_moves_only_the_scale(factor: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, y, rho = torch.randn(3, 4, 8, generator=generator).double()
    shape, log_scale = 0.3 + F.softplus(rho), torch.zeros(4, 8).double()

    def gradients(c: float) -> tuple[Tensor, ...]:
        inputs = [t.clone().requires_grad_() for t in (c * q, shape, log_scale + math.log(c))]
        loss = ggd_nll(inputs[0], c * y, shape=inputs[1], log_scale=inputs[2], smoothing=1e-3)
        return torch.autograd.grad(loss, inputs)

    one, other = gradients(1.0), gradients(factor)
    torch.testing.assert_close(one[0], other[0] * factor, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(one[1], other[1], rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(one[2], other[2], rtol=1e-6, atol=1e-12)
    if not 0.99 < factor < 1.01:  # the released form at alpha = 1 has no such symmetry
        slopes = []
        for c in (1.0, factor):
            b = shape.clone().requires_grad_()
            slopes.append(torch.autograd.grad(ggd_nll(c * q, c * y, shape=b, form="official"), b)[0])
        assert not torch.allclose(slopes[0], slopes[1], rtol=1e-3)


# Weights


@pytest.mark.parametrize("name", XI_CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_xi_agrees_with_the_vectors(name: str, dtype: torch.dtype) -> None:
    known = case("ggd_xi", name)
    variance, wanted = torch.from_numpy(known["variance"]).to(dtype), float(known["min_batch_size"])
    xi = solve_xi(variance, wanted)
    weights = batch_inverse_variance(variance, xi)
    rtol = 1e-8 if dtype == torch.float64 else 2e-4
    np.testing.assert_allclose(xi, known["xi_exact"], rtol=rtol)
    np.testing.assert_allclose(weights / len(variance), known["weight_exact"], rtol=rtol)
    np.testing.assert_allclose(effective_sample_size(batch_inverse_variance(variance)), known["ess_zero"], rtol=rtol)
    assert float(effective_sample_size(weights)) >= min(wanted, len(variance) - 1) * (1.0 - 1e-6)


@settings(max_examples=50)
@given(st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=40), st.floats(1e-3, 1e3), st.floats(0.05, 1.0))
def test_batch_weights(variances: list[float], factor: float, fraction: float) -> None:
    variance = torch.tensor(variances, dtype=torch.float64, requires_grad=True)
    wanted = fraction * len(variances)
    weights = inverse_variance_weights(variance, wanted)
    assert not weights.requires_grad
    assert float(weights.mean()) == pytest.approx(1.0, rel=1e-12)
    assert bool((weights > 0.0).all())
    assert float(effective_sample_size(weights)) >= min(wanted, len(variances) - 1) * (1.0 - 1e-6)
    torch.testing.assert_close(inverse_variance_weights(factor * variance, wanted), weights, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(
        solve_xi(factor * variance, wanted), factor * solve_xi(variance, wanted), rtol=1e-5, atol=0.0
    )


def test_weights_of_equal_and_vanishing_variances() -> None:
    for variance in (torch.zeros(8), torch.full((8,), 1e-30), torch.full((8,), 1e30), torch.tensor([0.0, 1.0, 2.0])):
        weights = inverse_variance_weights(variance, 2.0)
        assert bool(weights.isfinite().all())
        assert float(weights.mean()) == pytest.approx(1.0, rel=1e-5)
    assert float(solve_xi(torch.ones(8), 7.0)) == 0.0


@given(st.integers(1, 12), st.integers(0, 50))
def test_member_weights_sum_to_one(members: int, seed: int) -> None:
    shape = F.softplus(torch.randn(2, members, 5, generator=torch.Generator().manual_seed(seed))).double()
    weights = shape_weights(shape)
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 5).double(), rtol=1e-12, atol=0.0)
    if members == 1:
        assert bool((weights == 1.0).all())


@pytest.mark.parametrize("name", [f"s{i}" for i in range(8)])
def test_mbbe_agrees_with_the_vectors(name: str) -> None:
    known = case("ggd_fit", name)
    np.testing.assert_allclose(mbbe_variance(known["x"]), known["mbbe_variance"], rtol=1e-10)


def test_mbbe_with_a_shared_target_is_that_of_q() -> None:
    generator = torch.Generator().manual_seed(3)
    q, y = torch.randn(5, 16, generator=generator).double(), torch.randn(16, generator=generator).double()
    torch.testing.assert_close(mbbe_variance(q - y, 0), mbbe_variance(q, 0), rtol=1e-12, atol=0.0)


def test_equal_rows_are_finite_and_one_member_is_refused() -> None:
    known = case("ggd_losses", "a14")
    errors = torch.from_numpy(known["values"][..., 0] - known["targets"])
    variance = mbbe_variance(errors, 1, ddof=0, floor=1e-6)
    assert bool(variance.isfinite().all())
    usable = ~np.isnan(known["biev_var"])
    np.testing.assert_allclose(variance[usable], known["biev_var"][usable], rtol=1e-9)
    for dtype in DTYPES:
        assert float(mbbe_variance(torch.full((5,), 0.1, dtype=dtype))) == pytest.approx(0.0, abs=1e-15)
    with pytest.raises(ConfigError, match="at least two"):
        mbbe_variance(torch.ones(4, 1), 1)
    with pytest.raises(ConfigError, match="unknown form"):
        ggd_nll(torch.ones(1), torch.ones(1), shape=torch.ones(1), form="paper")
    with pytest.raises(ConfigError, match="unknown reduction"):
        ggd_nll(torch.ones(1), torch.ones(1), shape=torch.ones(1), reduction="max")


def test_mbbe_is_the_better_variance_estimate() -> None:
    errors = GeneralizedNormal(0.0, 1.0, 1.0).expand((4000, 5)).sample()
    mean_squares = [float((estimate - 2.0).square().mean()) for estimate in (mbbe_variance(errors), errors.var(-1))]
    assert mean_squares[0] < 0.7 * mean_squares[1]


def test_expected_minimum() -> None:
    for count, expected in ((1, 0.0), (2, 0.56), (5, 1.16), (10, 1.54), (20, 1.87), (50, 2.25)):
        assert expected_minimum(count) == pytest.approx(expected, abs=0.005)


def test_numpy_in_numpy_out() -> None:
    with np.load(ROOT / "ggd_losses.npz") as file:
        values, targets = file["a04__values"][..., 0], file["a04__targets"]
        shape = np.logaddexp(0.0, file["a04__values"][..., 1])
        for dtype in (np.float32, np.float64):
            found = ggd_nll(
                values.astype(dtype),
                targets.astype(dtype),
                shape=shape.astype(dtype),
                form="official",
                reduction="none",
            )
            assert isinstance(found, np.ndarray)
            assert found.dtype == dtype
            np.testing.assert_allclose(
                found,
                file["a04__ggd_member"],
                rtol=1e-9 if dtype is np.float64 else 2e-5,
                atol=1e-6 * (dtype is np.float32),
            )
    for result in (
        solve_xi(np.ones((2, 4)), 3.0),
        effective_sample_size(np.ones((2, 4))),
        inverse_variance_weights(np.ones((2, 4)), 3.0),
    ):
        assert isinstance(result, np.ndarray)


# What the two forms estimate


def stationary_shape(x: Tensor, form: str) -> float:
    """The minimising shape of the mean loss at alpha = 1, by descent."""
    rho = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([rho], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ggd_nll(torch.zeros_like(x), x, shape=F.softplus(rho).expand_as(x), form=form)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(F.softplus(rho.detach()))


def test_facts_of_the_official_form() -> None:
    torch.manual_seed(0)
    laplace = GeneralizedNormal(0.0, 1.0, 1.0).sample((200_000,))
    normal = torch.randn(200_000, dtype=torch.float64)
    assert stationary_shape(laplace, "official") == pytest.approx(0.773, abs=0.01)
    assert stationary_shape(normal, "official") == pytest.approx(0.829, abs=0.01)
    assert stationary_shape(laplace, "power") == pytest.approx(1.0, abs=0.01)
    assert stationary_shape(normal, "power") == pytest.approx(1.32, abs=0.01)
    small = stationary_shape(0.1 * normal, "power")
    assert small == pytest.approx(2.42, abs=0.02)
    assert float(GeneralizedNormal(0.0, 1.0, small).stddev) == pytest.approx(0.65, abs=0.01)
    for x in (normal, 0.1 * normal):  # the descent finds the closed estimators
        assert stationary_shape(x, "power") == pytest.approx(float(fit_shape(x)), rel=1e-4)


@given(st.floats(1e-6, 1e6), st.integers(0, 20))
@settings(max_examples=20)
def test_official_shape_never_exceeds_its_bound(scale: float, seed: int) -> None:
    x = scale * torch.randn(20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert float(fit_shape(x, form="official")) < 2.1663


def test_descent_recovers_shape_and_scale() -> None:
    torch.manual_seed(0)
    x = GeneralizedNormal(0.0, 2.0, 0.7).sample((5000,)).float()
    unit = (
        x.abs().mean()
    )  # scales count in it, as in the critics' heads: from scale 1 the descent stops on the ridge at 0.74 and 2.3
    rho, log_scale = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([rho, log_scale], lr=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4000)
    for _ in range(4000):
        batch = x[torch.randint(5000, (256,))]
        shape = (0.3 + F.softplus(rho + 1.498)).expand_as(batch)
        scales = (unit.log() + log_scale).expand_as(batch)
        loss = ggd_nll(torch.zeros(256), batch, shape=shape, log_scale=scales, smoothing=1e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    best = fit_mle(x)
    found = float(0.3 + F.softplus(rho.detach() + 1.498))
    assert found == pytest.approx(float(best.shape), abs=0.01)
    assert found == pytest.approx(0.7, abs=0.08)
    assert float(unit * log_scale.detach().exp()) == pytest.approx(2.0, abs=0.45)


def test_unnormalised_live_weights_corrupt_the_shape() -> None:
    """Weights of one shape per sample let the gradient through: the reason why weights between samples are detached."""
    torch.manual_seed(0)
    x = GeneralizedNormal(0.0, 1.0, 1.0).sample((50_000,))

    def minimum(detach: bool) -> float:
        shapes = torch.linspace(0.3, 1.5, 121, dtype=torch.float64)
        losses: list[Any] = [
            ggd_nll(torch.zeros_like(x), x, shape=b.expand_as(x)) * (1.0 if detach else b) for b in shapes
        ]
        return float(shapes[torch.stack(losses).argmin()])

    assert minimum(True) == pytest.approx(1.0, abs=0.03)
    assert minimum(False) < 0.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smoothing", [0.0, 1e-3])
@given(exponent=st.floats(-3.0, 1.0), shape=st.floats(0.1, 20.0), log_scale=st.floats(-8.0, 8.0))
def test_loss_and_gradients_stay_finite_for_errors_of_any_size(
    dtype: torch.dtype, smoothing: float, exponent: float, shape: float, log_scale: float
) -> None:
    """Up to a hundredth of the largest number: its square has no place in the format."""
    size = torch.finfo(dtype).max ** max(exponent, 0.0) * 10.0 ** min(exponent, 0.0) * 1e-6
    inputs = [torch.tensor(value, dtype=dtype, requires_grad=True) for value in (size, shape, log_scale)]
    loss = ggd_nll(inputs[0], torch.zeros((), dtype=dtype), shape=inputs[1], log_scale=inputs[2], smoothing=smoothing)
    loss.backward()
    assert loss.isfinite()
    assert all(value.grad is not None and value.grad.isfinite() for value in inputs)
