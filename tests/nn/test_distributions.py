"""The generalized Gaussian against scipy's tables, its special cases and its estimators."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import quad

from rlkit2.errors import ConfigError
from rlkit2.nn.distributions import (
    GeneralizedNormal,
    fit_mle,
    fit_moments,
    fit_shape,
    mixture_cdf,
    mixture_excess_kurtosis,
    mixture_icdf,
    unit_variance,
)
from tests.reference import ROOT

FITS = [f"s{i}" for i in range(8)]


@pytest.fixture(scope="module")
def table() -> dict[str, np.ndarray]:
    with np.load(ROOT / "ggd_dist.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def samples() -> dict[str, np.ndarray]:
    with np.load(ROOT / "ggd_fit.npz") as file:
        return {name: file[name] for name in file.files}


def close(found: torch.Tensor | np.ndarray, expected: np.ndarray, rtol: float = 1e-10, atol: float = 0.0) -> None:
    np.testing.assert_allclose(np.asarray(found), expected, rtol=rtol, atol=atol)


def test_functions_agree_with_scipy_in_float64(table: dict[str, np.ndarray]) -> None:
    unit = GeneralizedNormal(np.zeros((1, 1)), np.ones((1, 1)), table["beta"][:, None])
    x, p = table["x"], table["p"]
    close(unit.log_prob(x), table["logpdf"])
    close(np.exp(unit.log_prob(x)), table["pdf"], rtol=1e-9)
    # Where the power underflows (1e-8 at shape 50) scipy says 0.5 and is 5e-9 off: see the integral of the density below.
    exact = (np.abs(x) ** table["beta"][:, None] > 0.0) | (x == 0.0)
    close(np.where(exact, unit.cdf(x), 0.5), table["cdf"])
    close(np.where(exact, unit.sf(x), 0.5), table["sf"])
    close(unit.icdf(p), table["ppf"], rtol=1e-9, atol=1e-15)
    close(unit.isf(p), table["isf"], rtol=1e-9, atol=1e-15)
    scaled = GeneralizedNormal(
        0.0, torch.from_numpy(table["alpha"])[:, None, None], torch.from_numpy(table["beta"])[:, None]
    )
    close(scaled.log_prob(x), table["logpdf_scaled"])
    exact = ((np.abs(x) / table["alpha"][:, None, None]) ** table["beta"][:, None] > 0.0) | (x == 0.0)
    close(np.where(exact, scaled.cdf(x), 0.5), table["cdf_scaled"])
    close(scaled.icdf(p), table["ppf_scaled"], rtol=1e-9, atol=1e-14)
    close(scaled.stddev.squeeze(-1), table["std_scaled"])


def test_moments_agree_with_scipy(table: dict[str, np.ndarray]) -> None:
    unit = GeneralizedNormal(0.0, 1.0, table["beta"])
    close(unit.variance, table["variance"])
    close(unit.excess_kurtosis, table["excess_kurtosis"], atol=1e-10)
    close(unit.kurtosis, table["excess_kurtosis"] + 3.0)
    close(unit.entropy(), table["entropy"])
    close(unit.mean_absolute_deviation, table["mean_abs"])
    close(unit.fisher_information, table["fisher_location"])
    close(unit.mean_absolute_deviation.square() / unit.variance, table["moment_ratio"])


def test_log_prob_gradients(table: dict[str, np.ndarray]) -> None:
    x = torch.from_numpy(table["x"]).expand(len(table["beta"]), -1).clone().requires_grad_()
    shape = torch.from_numpy(table["beta"])[:, None].expand_as(x).clone().requires_grad_()
    at_x, at_shape = torch.autograd.grad(
        GeneralizedNormal(0.0, torch.ones(()).double(), shape).log_prob(x).sum(), (x, shape)
    )
    known = ~np.isnan(table["dlogpdf_dx"])
    close(at_x[known], table["dlogpdf_dx"][known], rtol=1e-9)
    assert bool((at_x[~torch.from_numpy(known)] == 0.0).all())
    close(at_shape, table["dlogpdf_dbeta"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_and_laplace_are_special_cases(table: dict[str, np.ndarray], dtype: torch.dtype) -> None:
    mu, sigma, x = (torch.from_numpy(table[f"gauss_{name}"]).to(dtype) for name in ("mu", "sigma", "x"))
    mu, sigma = mu[:, None, None], sigma[:, None]
    rtol = 1e-10 if dtype == torch.float64 else 2e-5
    close(
        GeneralizedNormal(mu, sigma * math.sqrt(2.0), 2.0).log_prob(x),
        table["gauss_logpdf"],
        rtol,
        1e-6 * (dtype == torch.float32),
    )
    close(GeneralizedNormal(mu, sigma, 1.0).log_prob(x), table["laplace_logpdf"], rtol, 1e-6 * (dtype == torch.float32))
    negative = -GeneralizedNormal(mu, sigma * math.sqrt(2.0), 2.0).log_prob(x) - 0.5 * math.log(2.0 * math.pi)
    torch.testing.assert_close(
        negative,
        torch.nn.functional.gaussian_nll_loss(
            mu.expand_as(negative), x.expand_as(negative), sigma.square().expand_as(negative), eps=0.0, reduction="none"
        ),
    )


def test_float32_is_stable(table: dict[str, np.ndarray]) -> None:
    single = GeneralizedNormal(0.0, torch.ones(1, 1), torch.from_numpy(table["beta"]).float()[:, None])
    x = torch.from_numpy(table["x"]).float()
    exact = GeneralizedNormal(0.0, 1.0, single.shape.double())
    for name in ("log_prob", "cdf", "sf"):
        found, expected = getattr(single, name)(x), getattr(exact, name)(x.double())
        assert found.dtype == torch.float32
        representable = expected.abs() < 3e38
        torch.testing.assert_close(found[representable].double(), expected[representable], rtol=5e-6, atol=1e-37)
    for name in ("variance", "kurtosis"):
        torch.testing.assert_close(getattr(single, name).double(), getattr(exact, name), rtol=2e-5, atol=0.0)
    torch.testing.assert_close(single.entropy().double(), exact.entropy(), rtol=1e-6, atol=1e-6)
    q = single.icdf(torch.from_numpy(table["p"]).float())
    assert q.dtype == torch.float32
    assert bool(q.isfinite().all())


@given(
    st.floats(0.3, 8.0),
    st.floats(1e-3, 1e3),
    st.floats(-1e2, 1e2),
    st.floats(1e-9, 1 - 1e-9).filter(lambda p: p != 0.5),
)
def test_cdf_inverts_icdf(shape: float, scale: float, loc: float, p: float) -> None:
    noise = GeneralizedNormal(loc, scale, shape)
    x = noise.icdf(torch.tensor([p], dtype=torch.float64))
    reference = stats.gennorm(shape, loc, scale)
    np.testing.assert_allclose(x.numpy(), reference.ppf([p]), rtol=1e-8, atol=1e-9 * (scale + abs(loc)))
    if abs(loc) <= scale:  # else x carries the digits of loc
        np.testing.assert_allclose(noise.cdf(x).numpy(), [p], rtol=1e-6)
        np.testing.assert_allclose(noise.sf(noise.isf(torch.tensor([p], dtype=torch.float64))).numpy(), [p], rtol=1e-6)


def test_quantiles_at_the_ends() -> None:
    # torch switches the default off once anything was compiled in the process
    noise = GeneralizedNormal(1.0, 2.0, torch.tensor([0.5, 2.0, 50.0]).double(), validate_args=True)
    assert bool((noise.icdf(torch.tensor(0.0)) == -torch.inf).all())
    assert bool((noise.icdf(torch.tensor(1.0)) == torch.inf).all())
    assert bool((noise.icdf(torch.tensor(0.5)) == 1.0).all())
    with pytest.raises(ValueError, match="probabilities"):
        noise.icdf(torch.tensor(1.5))
    with pytest.raises(ValueError, match="shape"):
        GeneralizedNormal(0.0, 1.0, -1.0, validate_args=True)


@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0, 8.0])
def test_samples_follow_the_distribution(shape: float) -> None:
    torch.manual_seed(0)
    noise = GeneralizedNormal(-0.5, 2.0, shape)
    x = noise.sample((20_000,))
    assert x.dtype == torch.float64
    assert stats.kstest(x.numpy(), stats.gennorm(shape, -0.5, 2.0).cdf).pvalue > 0.01


def test_rsample_gradients_are_those_of_the_moments() -> None:
    torch.manual_seed(0)
    parameters = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, 1.5, 1.4)]
    noise = GeneralizedNormal(*parameters)
    estimate = torch.autograd.grad((noise.rsample((400_000,)) - 1.0).square().mean(), parameters)
    noise = GeneralizedNormal(*parameters)
    exact = torch.autograd.grad(noise.variance + (noise.loc - 1.0).square(), parameters)
    for found, expected in zip(estimate, exact, strict=True):
        assert abs(float(found - expected)) < 0.03 * abs(float(expected)) + 0.01
    assert noise.expand((3, 2)).rsample((4,)).shape == (4, 3, 2)


def test_kinds_are_kept() -> None:
    noise = GeneralizedNormal(0.0, 1.0, 1.5)
    assert isinstance(noise.log_prob(np.ones(3)), np.ndarray)
    assert noise.log_prob(np.ones(3, np.float32)).dtype == np.float32
    assert noise.log_prob(torch.ones(3)).dtype == torch.float32
    assert GeneralizedNormal(np.float32([0.0]), 1.0, 2.0).scale.dtype == torch.float32
    assert fit_shape(np.ones(3) * [0.5, 1, 2]).dtype == np.float64
    assert isinstance(fit_shape(torch.tensor([0.5, 1.0])), torch.Tensor)


# Estimators


@pytest.mark.parametrize("case", FITS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_estimators_agree_with_the_vectors(samples: dict[str, np.ndarray], case: str, dtype: type) -> None:
    known = {name.split("__")[1]: samples[name] for name in samples if name.startswith(f"{case}__")}
    x, rtol = known["x"].astype(dtype), 1e-8 if dtype is np.float64 else 1e-4
    mle, moments = fit_mle(x), fit_moments(x)
    for found, name in (
        (mle.shape, "beta_mle"),
        (mle.scale, "alpha_mle"),
        (moments.shape, "beta_moment"),
        (moments.scale, "alpha_moment"),
        (fit_shape(x), "beta_fixed_alpha1"),
        (fit_shape(x, form="official"), "beta_official"),
        (-mle.log_prob(torch.from_numpy(x)).mean(), "nll_mle"),
    ):
        minimised = name == "beta_fixed_alpha1"  # by a minimiser, whose argument has half the digits
        close(found, known[name], max(rtol, 1e-7) if minimised else rtol)
    gauss = GeneralizedNormal(0.0, math.sqrt(2.0) * float(np.sqrt(np.mean(known["x"] ** 2))), 2.0)
    close(-gauss.log_prob(known["x"]).mean(), known["nll_gauss"])
    truth = GeneralizedNormal(0.0, float(known["alpha_true"]), float(known["beta_true"]))
    statistic, p = stats.kstest(known["x"], truth.cdf)
    close(statistic, known["ks_stat"], 1e-8)
    close(p, known["ks_p"], 1e-6)


# standard deviation of the maximum-likelihood shape at n = 2000
MLE_SPREAD = {0.5: 0.017, 0.7: 0.028, 1.0: 0.039, 1.5: 0.064, 2.0: 0.086, 4.0: 0.27}


@pytest.mark.parametrize("shape", sorted(MLE_SPREAD))
def test_mle_recovers_the_truth(shape: float) -> None:
    torch.manual_seed(3)
    found = fit_mle(GeneralizedNormal(2.0, 3.0, shape).sample((20, 2000)), loc=2.0)
    assert found.batch_shape == (20,)
    assert float((found.shape - shape).abs().max()) < 4.0 * MLE_SPREAD[shape]
    assert float(found.shape.std()) == pytest.approx(MLE_SPREAD[shape], rel=0.6)


@given(st.floats(1e-6, 1e6), st.integers(0, 5))
@settings(max_examples=20)
def test_fits_are_equivariant(scale: float, seed: int) -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for fit in (fit_mle, fit_moments):
        one, other = fit(x), fit(scale * x)
        torch.testing.assert_close(one.shape, other.shape, rtol=1e-7, atol=0.0)
        torch.testing.assert_close(one.scale * scale, other.scale, rtol=1e-7, atol=0.0)
    torch.testing.assert_close(fit_shape(x), fit_shape(scale * x, scale=scale), rtol=1e-9, atol=0.0)


def test_mle_is_a_maximum() -> None:
    torch.manual_seed(1)
    x = GeneralizedNormal(0.0, 2.0, 0.8).sample((300,))
    best = fit_mle(x)
    for shape, scale in ((1.02, 1.0), (0.98, 1.0), (1.0, 1.02), (1.0, 0.98)):
        other = GeneralizedNormal(0.0, best.scale * scale, best.shape * shape)
        assert float(other.log_prob(x).sum()) < float(best.log_prob(x).sum())


def test_samples_that_cannot_be_fitted() -> None:
    for bad, message in (
        (torch.zeros(4), "equal the location"),
        (torch.tensor([1.0, torch.nan]), "finite"),
        (torch.ones(0), "n at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit_mle(bad)
    with pytest.raises(ConfigError, match="unknown form"):
        fit_shape(torch.ones(3), form="paper")


# Mixtures


def test_mixture_agrees_with_the_vectors() -> None:
    with np.load(ROOT / "ggd_agg.npz") as file:
        q, beta, alpha, x = (torch.from_numpy(file[f"unc_{name}"]) for name in ("q", "beta", "alpha", "x"))
        members = GeneralizedNormal(q, alpha, beta)
        close(mixture_excess_kurtosis(members), file["unc_mixture_excess_kurtosis"])
        close(members.excess_kurtosis.mean(-1), file["unc_mean_excess_kurtosis"])
        close(members.variance, file["unc_member_variance"])
        at = x.expand(len(q), -1)
        close(mixture_cdf(members, at), file["unc_mixture_cdf"])
    p = torch.tensor([0.001, 0.1, 0.5, 0.9, 0.999]).double()
    torch.testing.assert_close(
        mixture_cdf(members, mixture_icdf(members, p)), p.expand(len(q), -1), rtol=1e-8, atol=0.0
    )


# Extremes


@given(st.floats(math.log(0.2), math.log(1e5)).map(math.exp), st.floats(-1.6, 1.6))
def test_cdf_is_the_integral_of_the_density_for_every_shape(shape: float, z: float) -> None:
    """Around the median too, where |z|^shape underflows for large shapes."""
    noise = GeneralizedNormal(0.0, 1.0, shape)
    fall = min(0.9, 20.0 / shape)  # the density falls around 1
    ends = [end for end in (0.0, 1.0 - fall, 1.0, 1.0 + fall) if end < abs(z)] + [abs(z)]
    pieces = [
        quad(lambda x: float(noise.log_prob(x).exp()), a, b, epsabs=1e-12)[0] for a, b in itertools.pairwise(ends)
    ]
    assert float(noise.cdf(z)) == pytest.approx(0.5 + math.copysign(sum(pieces), z), abs=1e-8)
    assert float(noise.cdf(z) + noise.sf(z)) == pytest.approx(1.0, abs=1e-12)


def test_cdf_near_the_median_at_a_large_shape() -> None:
    """Almost uniform on [-1, 1]."""
    assert float(GeneralizedNormal(0.0, 1.0, 500.0).cdf(0.2)) == pytest.approx(0.6, abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, np.int32, np.float32, torch.float32])
def test_parameters_of_any_kind_of_number(dtype: Any) -> None:
    values = torch.tensor([1, 2], dtype=dtype) if isinstance(dtype, torch.dtype) else np.array([1, 2], dtype)
    noise = GeneralizedNormal(values, values, 1.5)
    expected = torch.float32 if dtype in (np.float32, torch.float32) else torch.float64
    assert {noise.loc.dtype, noise.scale.dtype, noise.shape.dtype} == {expected}
    assert noise.shape.tolist() == [1.5, 1.5]


def test_the_wider_dtype_wins() -> None:
    assert GeneralizedNormal(torch.zeros(2), torch.ones(2, dtype=torch.float64), 2.0).loc.dtype == torch.float64


@pytest.mark.parametrize("name", ["loc", "scale", "shape"])
@pytest.mark.parametrize("value", [math.inf, math.nan, -math.inf])
def test_parameters_that_are_not_finite_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"parameter {name}"):
        GeneralizedNormal(**{"loc": 0.0, "scale": 1.0, "shape": 2.0, name: value}, validate_args=True)


@pytest.mark.parametrize("validate", [True, False])
def test_expanding_keeps_whether_arguments_are_checked(validate: bool) -> None:
    noise = GeneralizedNormal(0.0, 1.0, 2.0, validate_args=validate).expand([3])
    assert noise.batch_shape == (3,)
    if validate:
        with pytest.raises(ValueError, match="support"):
            noise.log_prob(torch.tensor(math.nan))
    else:
        assert noise.log_prob(torch.tensor(math.nan)).isnan().all()


def test_variances_that_leave_float32_stay_numbers_and_do_not_blow_up_a_mean() -> None:
    """A seed whose metrics are no numbers is stopped: a row of a shape that the released code's form allows must not do that."""
    shape = torch.tensor([0.01, 0.05, 0.3, 2.0], requires_grad=True)
    variance = unit_variance(shape)
    variance.sum().backward()
    assert variance.isfinite().all()
    assert variance.mean().isfinite()
    assert shape.grad is not None
    assert shape.grad.isfinite().all()
    assert (variance[:2] > 1e30).all()
    exact = unit_variance(shape.detach().double())
    torch.testing.assert_close(variance[2:].double(), exact[2:], rtol=1e-5, atol=0.0)
    assert exact[1] > 1e40
