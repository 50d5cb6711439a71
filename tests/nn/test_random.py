"""Counter-based random numbers: what they depend on, and that they look random."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from rlkit2.nn.random import normal, uniform


def keys(*seeds: int) -> Tensor:
    return torch.tensor(seeds)


def test_a_seed_draws_the_same_alone_and_beside_others() -> None:
    together = uniform((3, 5, 2), keys(7, 0, 12345), 4, stream="a")
    for k, seed in enumerate((7, 0, 12345)):
        assert torch.equal(together[k : k + 1], uniform((1, 5, 2), keys(seed), 4, stream="a"))


def test_every_coordinate_matters() -> None:
    base = uniform((1, 50), keys(1), 2, stream="a")
    others = [
        uniform((1, 50), keys(s), t, stream=n) for s, t, n in ((2, 2, "a"), (1, 3, "a"), (1, 2, "b"), (2, 1, "a"))
    ]
    assert all((base != other).all() for other in others)
    assert torch.equal(base, uniform((1, 50), keys(1), keys(2), stream="a"))  # a step on the device is the same step


def test_numbers_do_not_depend_on_how_many_are_drawn() -> None:
    assert torch.equal(uniform((1, 10), keys(3)), uniform((1, 1000), keys(3))[:, :10])


@pytest.mark.parametrize("axis", ["position", "step", "seed"])
def test_laws(axis: str) -> None:
    """Along each counter: uniform by Kolmogorov-Smirnov, and no correlation from one value to the next."""
    n = 20_000
    if axis == "position":
        draws = uniform((1, n), keys(5)).flatten()
    elif axis == "step":
        draws = uniform((n, 1), torch.full((n,), 5), torch.arange(n)).flatten()
    else:
        draws = uniform((n, 1), torch.arange(n)).flatten()
    assert stats.kstest(draws.numpy(), "uniform").pvalue > 1e-3
    centred = draws - draws.mean()
    for lag in (1, 2, 64):
        correlation = (centred[lag:] * centred[:-lag]).mean() / centred.square().mean()
        assert abs(correlation) < 4.0 / n**0.5
    bits = (draws * 2**16).long()
    ones = torch.stack([(bits >> k & 1).double().mean() for k in range(16)])
    assert ((ones - 0.5).abs() < 4.0 * 0.5 / n**0.5).all()


def test_normal_numbers() -> None:
    draws = normal((2, 20_000), keys(1, 2), 3, stream="noise")
    assert draws.isfinite().all()
    for row in draws:
        assert stats.kstest(row.numpy(), "norm").pvalue > 1e-3
    assert normal((1, 4), keys(1), dtype=torch.float32).dtype == torch.float32
