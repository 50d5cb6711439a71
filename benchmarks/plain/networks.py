"""Networks and helpers as most single-seed libraries write them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def mlp(inputs: int, hidden: tuple[int, ...], outputs: int, *, layer_norm: bool = False) -> nn.Sequential:
    """Linear - [LayerNorm] - ReLU blocks and a linear output."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), *([nn.LayerNorm(width)] if layer_norm else []), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class Gaussian(nn.Module):
    """A Gaussian policy whose standard deviation does not depend on the state."""

    def __init__(self, observations: int, actions: int, hidden: tuple[int, ...], *, tanh_mean: bool) -> None:
        super().__init__()
        self.net = mlp(observations, hidden, actions)
        self.log_std = nn.Parameter(torch.zeros(actions))
        self.tanh_mean = tanh_mean

    def forward(self, observations: Tensor) -> torch.distributions.MultivariateNormal:
        """The distribution of the action."""
        mean = self.net(observations)
        std = torch.exp(self.log_std.clamp(-5.0, 2.0))
        return torch.distributions.MultivariateNormal(
            mean.tanh() if self.tanh_mean else mean, scale_tril=torch.diag(std)
        )


class Twin(nn.Module):
    """Two networks with one output each."""

    def __init__(self, inputs: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.second = mlp(inputs, hidden, 1), mlp(inputs, hidden, 1)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Both outputs `[B]`."""
        return self.first(inputs).squeeze(-1), self.second(inputs).squeeze(-1)


def target_of(network: nn.Module) -> nn.Module:
    """A frozen copy."""
    return copy.deepcopy(network).requires_grad_(False)


def follow(target: nn.Module, online: nn.Module, rate: float) -> None:
    """Polyak averaging, parameter by parameter."""
    for old, new in zip(target.parameters(), online.parameters(), strict=True):
        old.data.copy_((1.0 - rate) * old.data + rate * new.data)
