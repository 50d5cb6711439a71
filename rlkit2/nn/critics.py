"""Action values Q(s, a), in the agent's units (observations normalised, actions in [-1, 1] or counted from 0)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlkit2.nn.encoders import EncodedMLP, make_network
from rlkit2.nn.ensembles import member_minimum
from rlkit2.nn.mlp import Pullback, StackedMLP, named_tensors, vjp, vjp_by_autograd
from rlkit2.nn.prior import RandomFunctions


class Critic(nn.Module):
    """M independent estimates of Q for S seeds.

    Continuous actions enter the network beside the observation; with discrete actions the network has one output per action.

    Args:
        observation_size, action_size: widths (number of actions if `discrete`).
        hidden_sizes, layer_norm, seeds, dtype, device: as for `StackedMLP`.
        members: M.
        discrete: actions are int64 choices.
        noise_outputs: further outputs beside each value (`outputs`), for a model of its errors.
        detach_noise: keep those outputs from training the hidden layers, as `StackedMLP`'s `detached_outputs`.
        encoder: of images among the observations, as for `make_network`; the members share it.
        prior_scale: deviation, in units of Q, of a fixed random function of its own that every member's Q is the network's output on top of.
        stream: name of the network, as for `StackedMLP`.

    `network` is what `make_network` makes; any module with the same shapes may take its place: `[S, B, obs + act]` to `[S, M, B]`, or
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
        noise_outputs: int = 0,
        detach_noise: bool = True,
        encoder: Mapping[str, Any] | None = None,
        prior_scale: float = 0.0,
        stream: str = "critic",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.discrete, self.noise_outputs = discrete, noise_outputs
        self.num_actions = action_size if discrete else 1
        self.settings = {
            "observation_size": observation_size,
            "action_size": action_size,
            "hidden_sizes": list(hidden_sizes),
            "members": members,
            "layer_norm": layer_norm,
            "noise_outputs": noise_outputs,
            **({"encoder": encoder} if encoder else {}),
            "prior_scale": prior_scale,
        }
        scalar = not discrete and noise_outputs == 0
        self.network = make_network(
            observation_size if discrete else observation_size + action_size,
            hidden_sizes,
            None if scalar else (1 + noise_outputs) * self.num_actions,
            detached_outputs=noise_outputs * self.num_actions if detach_noise else 0,
            seeds=seeds,
            members=members,
            layer_norm=layer_norm,
            encoder=encoder,
            stream=stream,
            dtype=dtype,
            device=device,
        )
        self.prior_scale = prior_scale
        self.prior = None
        if prior_scale > 0.0:
            self.prior = RandomFunctions(
                (observation_size,) if discrete else (observation_size, action_size),
                action_size if discrete else None,
                seeds=seeds,
                members=members,
                stream=f"{stream}.prior",
                dtype=dtype,
                device=device,
            )

    def _with_prior(self, values: Tensor, inputs: Tensor) -> Tensor:
        """Outputs of the network, `[S, M, B, ...]`, with the prior on the values among them."""
        if self.prior is None:
            return values
        prior: Tensor = self.prior_scale * self.prior(inputs)
        if not self.noise_outputs:
            return values + prior
        prior = prior if self.discrete else prior.unsqueeze(-1)
        return torch.cat([values[..., : prior.shape[-1]] + prior, values[..., prior.shape[-1] :]], -1)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Q of every member, `[S, M, B]`, for observations `[S, B, obs]` and actions `[S, B, act]` (discrete: int64 `[S, B]`)."""
        if self.discrete:
            return taken(self.every_action(observations), actions)
        inputs = torch.cat([observations, actions], -1)
        values = self._with_prior(self.network(inputs), inputs)
        return values[..., 0] if self.noise_outputs else values

    def outputs(self, observations: Tensor, actions: Tensor, *, frozen: bool = False) -> Tensor:
        """Q and the noise outputs behind it, `[S, M, B, 1 + noise_outputs]`; `frozen`: gradients to the actions, not to the weights."""
        if self.discrete:
            return taken(self.every_output(observations), actions)
        inputs = torch.cat([observations, actions], -1)
        own = isinstance(self.network, StackedMLP | EncodedMLP)  # another module may not know what frozen is
        found = self.network(inputs, frozen=True) if frozen and own else self.network(inputs)
        found = self._with_prior(found, inputs)
        return found if self.noise_outputs else found.unsqueeze(-1)

    def every_action(self, observations: Tensor) -> Tensor:
        """Q of every member and every discrete action, `[S, M, B, n]`."""
        values = self._with_prior(self.network(observations), observations)
        return values[..., : self.num_actions] if self.noise_outputs else values

    def every_output(self, observations: Tensor) -> Tensor:
        """Q and the noise outputs for every discrete action, `[S, M, B, n, 1 + noise_outputs]`."""
        found = self._with_prior(self.network(observations), observations)
        return found.view(*found.shape[:-1], -1, self.num_actions).transpose(-1, -2)

    def first(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Q of the first member alone, `[S, B]`, for continuous actions; gradients flow to the actions, not to the weights."""
        inputs = torch.cat([observations, actions], -1)
        if isinstance(self.network, StackedMLP):
            values: Tensor = self.network.member(0)(inputs, frozen=True)
        else:
            values = self.network(inputs)
        first = values[:, 0, :, 0] if self.noise_outputs else values[:, 0]
        return first if self.prior is None else first + self.prior_scale * self.prior(inputs)[:, 0]

    def minimum(self, observations: Tensor, actions: Tensor) -> Tensor:
        """min over members of Q, `[S, B]`, for continuous actions; gradients flow to the actions, not to the weights."""
        inputs = torch.cat([observations, actions], -1)
        if self.prior is None:
            return member_minimum(self.network, inputs)
        return self.outputs(observations, actions, frozen=True)[..., 0].amin(1)

    def vjp(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Pullback]:
        """Q of every member, `[S, M, B]`, and its pullback to the parameters; see `rlkit2.nn.vjp`."""
        if self.discrete or self.noise_outputs:
            return vjp_by_autograd(self, observations, actions)
        inputs = torch.cat([observations, actions], -1)
        values, pullback = vjp(self.network, inputs)
        return self._with_prior(values, inputs), pullback

    def named_views(self) -> dict[str, Tensor]:
        """The network's tensors, under its own names."""
        return named_tensors(self.network)


def taken(every: Tensor, actions: Tensor) -> Tensor:
    """Entries of the actions taken: `[S, M, B, n, ...]` and int64 `[S, B]` -> `[S, M, B, ...]`."""
    index = actions[:, None, :, None].view(len(actions), 1, -1, 1, *(1 for _ in every.shape[4:]))
    chosen: Tensor = every.gather(3, index.expand(*every.shape[:3], 1, *every.shape[4:]))
    return chosen.flatten(every.ndim - 2)  # not squeeze(3): tracing by AOT autograd trips over it


# What the outputs behind a value mean, and how members become one


SHAPE_FLOOR, SHAPE_CAP = 0.3, 8.0
SHAPE_OFFSET = 1.498  # softplus of it is 1.7: the shape starts at 2, Gaussian


def noise_shape(rho: Tensor, form: str = "power") -> Tensor:
    """Shape of a generalized Gaussian from a raw output: min(0.3 + softplus(rho + 1.498), 8), or softplus(rho) of the released code ("official")."""
    if form == "official":
        return F.softplus(rho).clamp(min=0.01)  # below, its slope leaves float32
    return (SHAPE_FLOOR + F.softplus(rho + SHAPE_OFFSET)).clamp(max=SHAPE_CAP)


def mean_less_deviations(values: Tensor, count: float) -> Tensor:
    """mean - count std (M - 1 degrees of freedom) over the members of `values [S, M, ...]`, `[S, ...]`; the value itself for one member."""
    if values.shape[1] == 1:
        return values[:, 0]
    variance, mean = torch.var_mean(values, 1)
    return mean - count * (variance + torch.finfo(values.dtype).tiny).sqrt()
