"""The hand-written passes of `StackedMLP` against autograd and against plain torch layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from torch import Tensor, nn

from rlkit2.nn import StackedMLP, lerp_, named_tensors, target_copy, unflatten, vjp

F64 = torch.float64


def network(**overrides: Any) -> StackedMLP:
    """Two hidden layers, parameters of a scale at which layer norms, biases and dead units all matter."""
    settings: dict[str, Any] = {"seeds": [3, 8], "dtype": F64, **overrides}
    made = StackedMLP(
        settings.pop("input_size", 4),
        settings.pop("hidden_sizes", (6, 5)),
        settings.pop("output_size", None),
        **settings,
    )
    with torch.no_grad():
        made.flat.add_(0.3 * torch.randn(made.flat.shape, generator=torch.Generator().manual_seed(0), dtype=F64))
    return made


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


shapes = st.fixed_dictionaries(
    {
        "hidden_sizes": st.sampled_from([(), (5,), (6, 4), (3, 4, 5)]),
        "output_size": st.sampled_from([None, 1, 3]),
        "members": st.sampled_from([None, 1, 3]),
        "layer_norm": st.booleans(),
        "seeds": st.sampled_from([[0], [5, 2]]),
    }
)


@limits(max_examples=50)
@given(settings=shapes, rows=st.integers(1, 7), own_inputs=st.booleans(), frozen=st.booleans())
def test_both_passes_equal_autograd(settings: dict[str, Any], rows: int, own_inputs: bool, frozen: bool) -> None:
    """Outputs, gradients to weights and gradients to inputs, to 1e-12 of float64."""
    net = network(**settings)
    lead = (
        (len(settings["seeds"]), settings["members"])
        if own_inputs and settings["members"]
        else (len(settings["seeds"]),)
    )
    inputs = normal(*lead, rows, 4).requires_grad_()
    expected = net.differentiable(inputs, frozen=frozen)
    found = net(inputs, frozen=frozen)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(net(inputs), expected, rtol=1e-12, atol=1e-13)
    cotangent = normal(*expected.shape, seed=2)
    wanted = [inputs] if frozen else [net.flat, inputs]
    for one, two in zip(
        torch.autograd.grad(found, wanted, cotangent), torch.autograd.grad(expected, wanted, cotangent), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)
    if frozen and settings["hidden_sizes"]:
        assert not net(inputs.detach(), frozen=True).requires_grad


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("members", [None, 2])
def test_forward_equals_torch_layers(members: int | None, layer_norm: bool) -> None:
    """One seed and member at a time, through `torch.nn`."""
    net = network(members=members, layer_norm=layer_norm, output_size=3)
    inputs = normal(2, 7, 4)
    views = net.named_views()
    outputs = net(inputs)
    for seed in range(2):
        for member in range(members or 1):
            part = {n: (v[seed] if members is None else v[seed, member]) for n, v in views.items()}
            hidden = inputs[seed]
            for i in range(3):
                hidden = nn.functional.linear(hidden, part[f"layers.{i}.weight"].T, part[f"layers.{i}.bias"][0])
                if layer_norm and i < 2:
                    weight, bias = part[f"norms.{i}.weight"][0], part[f"norms.{i}.bias"][0]
                    hidden = nn.functional.layer_norm(hidden, hidden.shape[-1:], weight, bias)
                hidden = hidden.relu() if i < 2 else hidden
            own = outputs[seed] if members is None else outputs[seed, member]
            torch.testing.assert_close(own, hidden, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_finite_differences(layer_norm: bool) -> None:
    """The gradient along a random direction, by central differences."""
    net = network(members=2, layer_norm=layer_norm)
    inputs = normal(2, 6, 4)
    (gradient,) = torch.autograd.grad(net(inputs).sin().sum(), [net.flat])
    direction, start = normal(*net.flat.shape, seed=3), net.flat.detach().clone()

    def at(distance: float) -> float:
        with torch.no_grad():
            net.flat.copy_(start + distance * direction)
            return net(inputs).sin().sum().item()

    slope = (at(1e-6) - at(-1e-6)) / 2e-6
    assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-6)


# vjp


@limits(max_examples=30)
@given(
    settings=shapes.filter(lambda s: s["output_size"] is None),
    order=st.permutations([slice(None), slice(0, 3), slice(3, 7), slice(0, 3)]),
)
def test_pullbacks_equal_autograd_in_any_order(settings: dict[str, Any], order: list[slice]) -> None:
    net = network(**settings)
    inputs = normal(len(settings["seeds"]), 7, 4)
    outputs, pullback = vjp(net, inputs)
    expected = net.differentiable(inputs)
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-13)
    for k, rows in enumerate(order):
        part = expected[..., rows]
        cotangent = normal(*part.shape, seed=10 + k)
        (wanted,) = torch.autograd.grad(part, [net.flat], cotangent, retain_graph=True)
        torch.testing.assert_close(pullback(cotangent, rows), wanted, rtol=1e-11, atol=1e-12)


def test_pullback_of_another_module_has_the_order_of_its_parameters() -> None:
    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(normal(2, 1)), nn.Parameter(normal(2, 3, seed=4))

        def forward(self, x: Tensor) -> Tensor:
            return self.a * x.square().sum(-1) + (x * self.b.unsqueeze(1)).sum(-1)

    module, x = Quadratic(), normal(2, 5, 3)
    outputs, pullback = vjp(module, x)
    cotangent = normal(2, 5, seed=5)
    expected = torch.cat(
        [(cotangent * x.square().sum(-1)).sum(1, keepdim=True), (cotangent.unsqueeze(-1) * x).sum(1)], 1
    )
    torch.testing.assert_close(pullback(cotangent), expected)
    assert [part.shape for part in unflatten(module, expected)] == [(2, 1), (2, 3)]
    assert not outputs.requires_grad


def test_a_pullback_refuses_changed_weights() -> None:
    net = network()
    _, pullback = vjp(net, normal(2, 5, 4))
    with torch.no_grad():
        net.flat.add_(1.0)
    with pytest.raises(RuntimeError, match="weights have changed"):
        pullback(normal(2, 5))


def test_vjp_needs_a_scalar_network() -> None:
    with pytest.raises(ValueError, match="scalar"):
        network(output_size=2).vjp(normal(2, 5, 4))


def test_backward_refuses_changed_weights() -> None:
    net = network()
    outputs = net(normal(2, 5, 4))
    with torch.no_grad():
        net.flat.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.sum().backward()


# Views, members, copies


def test_views_are_the_parameters() -> None:
    net = network(members=3, layer_norm=True)
    views = named_tensors(net)
    assert views["layers.0.weight"].shape == (2, 3, 4, 6)
    assert views["layers.2.weight"].shape == (2, 3, 5, 1)
    assert views["norms.1.bias"].shape == (2, 3, 1, 5)
    assert sum(view.numel() for view in views.values()) == net.flat.numel()
    before = net(normal(2, 5, 4)).detach()
    views["layers.2.bias"].add_(1.0)
    torch.testing.assert_close(net(normal(2, 5, 4)), before + 1.0)
    torch.testing.assert_close([*unflatten(net, net.flat.detach())], [*views.values()])


def test_a_member_shares_the_weights_and_trains_none() -> None:
    net = network(members=3, layer_norm=True)
    inputs = normal(2, 5, 4).requires_grad_()
    for index in range(3):
        alone = net.member(index)
        torch.testing.assert_close(alone(inputs)[:, 0], net(inputs)[:, index])
        (own,) = torch.autograd.grad(alone(inputs).sum(), inputs)
        (whole,) = torch.autograd.grad(net(inputs)[:, index].sum(), inputs)
        torch.testing.assert_close(own, whole)
    alone = net.member(1)
    with torch.no_grad():
        net.flat.mul_(0.5)
    torch.testing.assert_close(alone(inputs)[:, 0], net(inputs)[:, 1])
    assert not alone.flat.requires_grad


def test_initial_weights_depend_on_the_seed_and_the_stream_alone() -> None:
    def fresh(seeds: list[int], stream: str) -> Tensor:
        return StackedMLP(4, (6,), seeds=seeds, stream=stream, members=2, dtype=F64).flat.detach()

    both = fresh([5, 9], "value")
    assert torch.equal(both[:1], fresh([5], "value"))
    assert torch.equal(both[1:], fresh([9], "value"))
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both, fresh([5, 9], "critic"))


def test_initial_weights_are_those_of_torch_layers() -> None:
    """Uniform in +-1/sqrt(in), members apart; layer norms start as the identity."""
    net = StackedMLP(100, (200,), 50, seeds=[0], members=2, layer_norm=True)
    views = net.named_views()
    for i, width in enumerate((100, 200)):
        for kind in ("weight", "bias"):
            tensor = views[f"layers.{i}.{kind}"]
            bound = width**-0.5
            assert tensor.abs().max() <= bound
            assert tensor.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
            assert not torch.equal(tensor[:, 0], tensor[:, 1])
    assert (views["norms.0.weight"] == 1).all()
    assert (views["norms.0.bias"] == 0).all()


def test_copies_and_polyak_steps() -> None:
    net = network(members=2)
    target = target_copy(net)
    assert not any(parameter.requires_grad for parameter in target.parameters())
    start = target.flat.clone()
    with torch.no_grad():
        net.flat.add_(1.0)
    torch.testing.assert_close(target.flat, start)  # no shared memory
    lerp_(target, net, 0.25)
    torch.testing.assert_close(target.flat, start + 0.25)
    inputs = normal(2, 5, 4)
    torch.testing.assert_close(target(inputs), target.differentiable(inputs))  # the views followed


def test_moving_a_network_moves_its_views() -> None:
    net = network().float()
    assert net.named_views()["layers.0.weight"].dtype == torch.float32
    inputs = normal(2, 5, 4).float()
    torch.testing.assert_close(net(inputs), net.differentiable(inputs))
