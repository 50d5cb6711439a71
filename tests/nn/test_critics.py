"""Critics with outputs for the noise of their targets: what learns from what."""

from __future__ import annotations

import pytest
import torch

from rlkit2.nn import Critic, StackedMLP


def network(
    detached: int, members: int | None = 3, hidden: tuple[int, ...] = (7, 6), layer_norm: bool = False
) -> StackedMLP:
    return StackedMLP(
        4,
        hidden,
        3,
        seeds=(0, 1),
        members=members,
        layer_norm=layer_norm,
        detached_outputs=detached,
        dtype=torch.float64,
    )


@pytest.mark.parametrize("detached", [0, 1, 2])
@pytest.mark.parametrize("hidden", [(), (7,), (7, 6)])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_detached_outputs_agree_with_autograd(detached: int, hidden: tuple[int, ...], layer_norm: bool) -> None:
    torch.manual_seed(0)
    mlp = network(detached, hidden=hidden, layer_norm=layer_norm)
    inputs, weights = torch.randn(2, 9, 4).double(), torch.randn(2, 3, 9, 3).double()
    by_hand, by_autograd = mlp(inputs), mlp.differentiable(inputs)
    torch.testing.assert_close(by_hand, by_autograd)
    gradients = [torch.autograd.grad((out * weights).sum(), mlp.flat)[0] for out in (by_hand, by_autograd)]
    torch.testing.assert_close(*gradients)


def test_detached_outputs_train_their_own_weights_alone() -> None:
    torch.manual_seed(0)
    mlp = network(2)
    (gradient,) = torch.autograd.grad(mlp(torch.randn(2, 9, 4).double())[..., 1:].sum(), mlp.flat)
    parts = mlp.named_views(gradient)
    assert all(bool((part == 0.0).all()) for name, part in parts.items() if not name.startswith("layers.2"))
    assert bool((parts["layers.2.weight"][..., 1:] != 0.0).any())
    assert bool((parts["layers.2.weight"][..., 0] == 0.0).all())


def test_frozen_gradients_to_the_inputs_count_all_outputs() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2, 9, 4).double().requires_grad_()
    one, other = (torch.autograd.grad(network(d)(inputs, frozen=True).sum(), inputs)[0] for d in (0, 2))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("discrete", [False, True])
def test_outputs_and_values_agree(discrete: bool) -> None:
    torch.manual_seed(0)
    critic = Critic(3, 4, (8, 8), seeds=(0, 1), members=5, discrete=discrete, noise_outputs=2)
    observations = torch.randn(2, 6, 3)
    actions = torch.randint(4, (2, 6)) if discrete else torch.randn(2, 6, 4)
    outputs = critic.outputs(observations, actions)
    assert outputs.shape == (2, 5, 6, 3)
    torch.testing.assert_close(outputs[..., 0], critic(observations, actions))
    if discrete:
        every = critic.every_output(observations)
        assert every.shape == (2, 5, 6, 4, 3)
        torch.testing.assert_close(every[..., 0], critic.every_action(observations))
        for b in range(6):
            torch.testing.assert_close(outputs[1, :, b], every[1, :, b, actions[1, b]])
    else:
        torch.testing.assert_close(critic.first(observations, actions), outputs[:, 0, :, 0])
