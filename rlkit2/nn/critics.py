"""Action values Q(s, a), in the agent's units (observations normalised, actions in [-1, 1] or counted from 0)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlkit2.nn.mlp import StackedMLP, named_tensors


class Critic(nn.Module):
    """M independent estimates of Q for S seeds.

    Continuous actions enter the network beside the observation; with discrete actions the network has one output per action.

    Args:
        observation_size, action_size: widths (number of actions if `discrete`).
        hidden_sizes, layer_norm, seeds, dtype, device: as for `StackedMLP`.
        members: M.
        discrete: actions are int64 choices.
        stream: name of the network, as for `StackedMLP`.

    `network` is a `StackedMLP`; any module with the same shapes may take its place: `[S, B, obs + act]` to `[S, M, B]`, or
    `[S, B, obs]` to `[S, M, B, n]` if `discrete`.
    """

    network: nn.Module

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        hidden_sizes: Sequence[int],
        *,
        seeds: Sequence[int],
        members: int = 2,
        discrete: bool = False,
        layer_norm: bool = False,
        stream: str = "critic",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.discrete = discrete
        self.network = StackedMLP(
            observation_size if discrete else observation_size + action_size,
            hidden_sizes,
            action_size if discrete else None,
            seeds=seeds,
            members=members,
            layer_norm=layer_norm,
            stream=stream,
            dtype=dtype,
            device=device,
        )

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Q of every member, `[S, M, B]`, for observations `[S, B, obs]` and actions `[S, B, act]` (discrete: int64 `[S, B]`)."""
        if not self.discrete:
            values: Tensor = self.network(torch.cat([observations, actions], -1))
            return values
        every = self.every_action(observations)
        taken = actions[:, None, :, None].expand(-1, every.shape[1], -1, 1)
        chosen: Tensor = every.gather(-1, taken)
        return chosen.squeeze(-1)

    def every_action(self, observations: Tensor) -> Tensor:
        """Q of every member and every discrete action, `[S, M, B, n]`."""
        values: Tensor = self.network(observations)
        return values

    def first(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Q of the first member alone, `[S, B]`, for continuous actions; gradients flow to the actions, not to the weights."""
        inputs = torch.cat([observations, actions], -1)
        if isinstance(self.network, StackedMLP):
            first: Tensor = self.network.member(0)(inputs, frozen=True)
            return first.squeeze(1)
        values: Tensor = self.network(inputs)
        return values[:, 0]

    def named_views(self) -> dict[str, Tensor]:
        """The network's tensors, under its own names."""
        return named_tensors(self.network)
