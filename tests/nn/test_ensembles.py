"""The minimum over members and the pullback of input gradients against plain autograd."""

from __future__ import annotations

import pytest
import torch

from rlkit2.nn import StackedMLP, ensembles


def network(
    outputs: int | None,
    detached: int = 0,
    members: int = 5,
    hidden: tuple[int, ...] = (16, 24),
    seeds: int = 2,
    dtype: torch.dtype = torch.float64,
) -> StackedMLP:
    return StackedMLP(3, hidden, outputs, seeds=range(seeds), members=members, detached_outputs=detached, dtype=dtype)


@pytest.mark.parametrize("outputs", [None, 1, 3])
@pytest.mark.parametrize("hidden", [(16,), (16, 24), (16, 24, 8), (7, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_minimum_agrees_with_autograd(outputs: int | None, hidden: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for members, seeds in ((5, 2), (1, 1), (5, 1)):
        mlp = network(outputs, members=members, hidden=hidden, seeds=seeds, dtype=dtype)
        inputs, weights = torch.randn(seeds, 40, 3, dtype=dtype).requires_grad_(), torch.randn(seeds, 40, dtype=dtype)
        found = ensembles.member_minimum(mlp, inputs)
        plain = mlp.differentiable(inputs)
        expected = (plain if outputs is None else plain[..., 0]).amin(1)
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad((out * weights).sum(), inputs)[0] for out in (found, expected)]
        torch.testing.assert_close(*gradients)


def test_minimum_with_layer_norm_and_in_float32() -> None:
    torch.manual_seed(0)
    mlp = StackedMLP(3, (16, 16), seeds=(0,), members=4, layer_norm=True)
    inputs = torch.randn(1, 9, 3, requires_grad=True)
    expected = mlp.differentiable(inputs).amin(1)
    found = ensembles.member_minimum(mlp, inputs)
    gradients = [torch.autograd.grad(out.sum(), inputs)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("outputs", "detached"), [(None, 0), (3, 2), (3, 0), (2, 1)])
@pytest.mark.parametrize("hidden", [(16,), (16, 24), (16, 24, 8)])
def test_slopes_and_their_pullback_agree_with_autograd(
    outputs: int | None, detached: int, hidden: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    mlp = network(outputs, detached, hidden=hidden)
    inputs = torch.randn(2, 11, 3).double()
    found, slopes, pullback = ensembles.vjp_with_slopes(mlp, inputs)
    on_outputs, on_slopes = torch.randn_like(found), torch.randn_like(slopes)

    wide = inputs.unsqueeze(1).expand(-1, 5, -1, -1).clone().requires_grad_()
    plain = mlp.differentiable(wide)
    first = plain if outputs is None else plain[..., 0]
    (plain_slopes,) = torch.autograd.grad(first.sum(), wide, create_graph=True)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(slopes, plain_slopes)
    (expected,) = torch.autograd.grad((plain * on_outputs).sum() + (plain_slopes * on_slopes).sum(), mlp.flat)
    torch.testing.assert_close(pullback(on_outputs, on_slopes), expected)


@pytest.mark.parametrize("outputs", [None, 2])
def test_other_modules_go_through_autograd(outputs: int | None) -> None:
    torch.manual_seed(0)
    mlp = network(outputs)
    inputs = torch.randn(2, 11, 3).double()
    by_hand = ensembles.vjp_with_slopes(mlp, inputs)
    by_autograd = ensembles._vjp_with_slopes_by_autograd(mlp, inputs)
    cotangents = torch.randn_like(by_hand[0]), torch.randn_like(by_hand[1])
    for left, right in zip(by_hand[:2], by_autograd[:2], strict=True):
        torch.testing.assert_close(left, right)
    torch.testing.assert_close(by_hand[2](*cotangents), by_autograd[2](*cotangents))
    plain = torch.nn.Sequential()
    plain.append(mlp)  # not a StackedMLP itself
    torch.testing.assert_close(ensembles.member_minimum(plain, inputs), ensembles.member_minimum(mlp, inputs))
