"""Policy heads against `torch.distributions`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from rlkit2.errors import ConfigError
from rlkit2.nn import Actor, make_actor
from rlkit2.nn.actors import SQUASHED_ACTION_LIMIT, GaussianActor, SquashedGaussianActor

F64 = torch.float64
S, B, OBS, ACT = 2, 6, 4, 3


def actor(head: str, **options: Any) -> Any:
    return make_actor(head, OBS, ACT, (8,), seeds=[1, 2], dtype=F64, **options)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("tanh_mean", [False, True])
def test_gaussian(tanh_mean: bool) -> None:
    made: GaussianActor = actor("gaussian", tanh_mean=tanh_mean, log_std_init=-0.7)
    observations, actions, noise = normal(S, B, OBS), normal(S, B, ACT, seed=1), normal(S, B, ACT, seed=2)
    mean = made.network(observations)
    mean = mean.tanh() if tanh_mean else mean
    distribution = Independent(Normal(mean, made.log_std.exp()), 1)
    torch.testing.assert_close(
        made.log_prob(observations, actions), distribution.log_prob(actions), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(made(observations), mean)
    torch.testing.assert_close(made(observations, noise), mean + torch.tensor(-0.7, dtype=F64).exp() * noise)
    ours = torch.autograd.grad(made.log_prob(observations, actions).sum(), list(made.parameters()))
    theirs = torch.autograd.grad(distribution.log_prob(actions).sum(), list(made.parameters()))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("value", [-9.0, 5.0])
def test_log_std_outside_its_bounds_is_clamped_and_not_trained(value: float) -> None:
    made = actor("gaussian", log_std_init=value, log_std_bounds=(-5.0, 2.0))
    observations, actions = normal(S, B, OBS), normal(S, B, ACT, seed=1)
    distribution = Normal(made.network(observations), torch.tensor(min(max(value, -5.0), 2.0), dtype=F64).exp())
    log_prob = made.log_prob(observations, actions)
    torch.testing.assert_close(log_prob, distribution.log_prob(actions).sum(-1))
    (gradient,) = torch.autograd.grad(log_prob.sum(), made.log_std)
    assert (gradient == 0).all()


def test_squashed_gaussian() -> None:
    made: SquashedGaussianActor = actor("squashed_gaussian")
    observations, noise = normal(S, B, OBS), normal(S, B, ACT, seed=2)
    mean, log_std = made.network(observations).chunk(2, -1)
    log_std = log_std.clamp(-5.0, 2.0)
    distribution = Independent(TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform()), 1)
    sample, log_density = made.sample(observations, noise)
    torch.testing.assert_close(sample, (mean + log_std.exp() * noise).tanh())
    torch.testing.assert_close(log_density, distribution.log_prob(sample), rtol=1e-9, atol=1e-9)
    actions = normal(S, B, ACT, seed=3).tanh()
    torch.testing.assert_close(
        made.log_prob(observations, actions), distribution.log_prob(actions), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(made(observations), mean.tanh())


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_squashed_gaussian_at_the_bounds(dtype: torch.dtype) -> None:
    """Recorded actions sit exactly on the bounds: the density is that just inside, and finite with its gradient."""
    made = make_actor("squashed_gaussian", OBS, ACT, (8,), seeds=[1, 2], dtype=dtype)
    observations = normal(S, B, OBS).to(dtype)
    at, inside = torch.ones(S, B, ACT, dtype=dtype), torch.full((S, B, ACT), SQUASHED_ACTION_LIMIT, dtype=dtype)
    torch.testing.assert_close(made.log_prob(observations, at), made.log_prob(observations, inside))
    assert made.log_prob(observations, -at).isfinite().all()
    gradients = torch.autograd.grad(made.log_prob(observations, at).sum(), list(made.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_deterministic() -> None:
    made = actor("deterministic")
    observations, actions = normal(S, B, OBS), normal(S, B, ACT, seed=1)
    mean = made.network(observations).tanh()
    torch.testing.assert_close(made(observations, normal(S, B, ACT)), mean)
    distribution = Normal(mean, 0.5**0.5)
    shift = made.log_prob(observations, actions) - distribution.log_prob(actions).sum(-1)
    torch.testing.assert_close(shift, shift[:1, :1].expand_as(shift))  # the log-density up to a constant


def test_categorical() -> None:
    made = actor("categorical")
    observations, choices = normal(S, B, OBS), torch.randint(0, ACT, (S, B))
    distribution = Categorical(logits=made.network(observations))
    torch.testing.assert_close(
        made.log_prob(observations, choices), distribution.log_prob(choices), rtol=1e-12, atol=1e-12
    )
    assert torch.equal(made(observations), distribution.probs.argmax(-1))


@pytest.mark.parametrize("head", ["gaussian", "squashed_gaussian", "categorical"])
def test_samples_follow_the_law(head: str) -> None:
    """20 000 draws at one observation: means, or frequencies, within five standard errors."""
    made: Actor = actor(head)
    count = 20_000
    observations = normal(S, 1, OBS).expand(S, count, OBS)
    with torch.no_grad():
        samples = made(observations, made.draw_noise(observations, torch.Generator().manual_seed(5)))
        outputs = made.network(observations[:, :1])
    if head == "categorical":
        frequencies = torch.stack([(samples == k).to(F64).mean(1) for k in range(ACT)], -1)
        expected = outputs.softmax(-1)[:, 0]
        assert ((frequencies - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt()).all()
        return
    if head == "squashed_gaussian":
        mean, log_std = outputs.chunk(2, -1)
        samples = samples.atanh()
    else:
        mean, log_std = outputs, made.log_std.detach()
    assert ((samples.mean(1, keepdim=True) - mean).abs() < 5 * log_std.exp() / count**0.5).all()
    assert ((samples.std(1, keepdim=True) / log_std.exp() - 1).abs() < 5 / (2 * count) ** 0.5).all()


def test_extreme_uniform_noise_draws_a_choice() -> None:
    made = actor("categorical")
    for value in (0.0, 1.0):
        drawn = made(normal(S, B, OBS), torch.full((S, B, ACT), value, dtype=F64))
        assert ((drawn >= 0) & (drawn < ACT)).all()


def test_unknown_head() -> None:
    with pytest.raises(ConfigError, match="unknown policy head 'beta'; choose one of: gaussian"):
        actor("beta")
