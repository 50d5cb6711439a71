"""A causal transformer over the steps of an episode, for all seeds at once: every parameter leads with the seed axis.

It is that of Chen et al., "Decision Transformer" (NeurIPS 2021), on the blocks of GPT-2: tokens (return to go, observation, action) of every step,
layer norms in front of attention and perceptron, and an action read off each observation's token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlkit2.errors import ConfigError
from rlkit2.nn.random import normal

Drop = Callable[[Tensor, str], Tensor]
"""Sets some entries of a tensor `[S, ...]` to zero, by the name of the place."""
DEVIATION = 0.02  # of initial weights
TOKENS = 3  # of a step


class StackedLinear(nn.Module):
    """A linear map for S seeds: weight `[S, in, out]`, bias `[S, 1, out]`; inputs `[S, ..., in]`."""

    def __init__(self, inputs: int, outputs: int, seeds: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(seeds, inputs, outputs, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(seeds, 1, outputs, dtype=dtype, device=device))

    def forward(self, inputs: Tensor) -> Tensor:
        flat = torch.baddbmm(self.bias, inputs.flatten(1, -2), self.weight)
        return flat.view(*inputs.shape[:-1], -1)


class StackedNorm(nn.Module):
    """A layer norm for S seeds: weight and bias `[S, 1, width]`; inputs `[S, ..., width]`."""

    def __init__(self, width: int, seeds: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(seeds, 1, width, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(seeds, 1, width, dtype=dtype, device=device))

    def forward(self, inputs: Tensor) -> Tensor:
        normalized = F.layer_norm(inputs, inputs.shape[-1:]).flatten(1, -2)
        return torch.addcmul(self.bias, normalized, self.weight).view(inputs.shape)


class Block(nn.Module):
    """Causal self-attention and a perceptron of four times the width, each behind a layer norm and added to its input."""

    def __init__(
        self, width: int, heads: int, seeds: int, dtype: torch.dtype, device: torch.device | str, name: str
    ) -> None:
        super().__init__()
        place = (seeds, dtype, device)
        self.heads, self.name = heads, name
        self.norm1, self.norm2 = StackedNorm(width, *place), StackedNorm(width, *place)
        self.attention = StackedLinear(width, 3 * width, *place)  # queries, keys, values
        self.joined = StackedLinear(width, width, *place)
        self.grown, self.shrunk = StackedLinear(width, 4 * width, *place), StackedLinear(4 * width, width, *place)

    def forward(self, tokens: Tensor, allowed: Tensor, drop: Drop) -> Tensor:
        """Tokens `[S, B, T, width]`; `allowed` `[S, B, 1, T, T]`: which tokens (last axis) each may see."""
        shape = (*tokens.shape[:-1], self.heads, -1)
        parts = self.attention(self.norm1(tokens)).chunk(3, -1)
        queries, keys, values = (part.reshape(shape).transpose(2, 3) for part in parts)  # [S, B, heads, T, e]
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
        weights = drop(scores.masked_fill(~allowed, -torch.inf).softmax(-1), f"{self.name}.attention")
        attended = (weights @ values).transpose(2, 3).flatten(-2)
        tokens = tokens + drop(self.joined(attended), f"{self.name}.joined")
        perceptron = self.shrunk(F.gelu(self.grown(self.norm2(tokens))))
        return tokens + drop(perceptron, f"{self.name}.perceptron")


class DecisionTransformer(nn.Module):
    """Actions from returns to go, observations and the actions before.

    Args:
        observation_size, action_size: widths (number of actions where they are discrete; these enter as one-hot columns).
        hidden_sizes: width of every block; all the same.
        heads: of the attention; they divide the width.
        timesteps: how many steps of an episode are told apart; later ones count as the last.
        seeds: one integer per seed; initial weights of a seed depend on it and on `stream` alone.
        stream: name of the network.

    Raises:
        ConfigError: widths that differ, or that the heads do not divide.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        hidden_sizes: Sequence[int],
        *,
        heads: int,
        timesteps: int,
        seeds: Sequence[int],
        stream: str = "policy",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        if len(set(hidden_sizes)) != 1:
            raise ConfigError(
                f"hidden_sizes of a transformer are one width for each block, all the same, not {list(hidden_sizes)}"
            )
        width = hidden_sizes[0]
        if width % heads:
            raise ConfigError(f"{heads} heads do not divide a width of {width}")
        place = (len(seeds), dtype, device)
        self.timesteps = timesteps
        self.time = nn.Parameter(torch.empty(len(seeds), timesteps, width, dtype=dtype, device=device))
        self.return_ = StackedLinear(1, width, *place)
        self.observation = StackedLinear(observation_size, width, *place)
        self.action = StackedLinear(action_size, width, *place)
        self.norm = StackedNorm(width, *place)
        self.blocks = nn.ModuleList(Block(width, heads, *place, name=f"block{i}") for i in range(len(hidden_sizes)))
        self.last_norm = StackedNorm(width, *place)
        self.head = StackedLinear(width, action_size, *place)
        self._initialize(seeds, stream)

    @torch.no_grad()
    def _initialize(self, seeds: Sequence[int], stream: str) -> None:
        keys = torch.tensor(list(seeds), device=self.time.device)
        for name, parameter in self.named_parameters():
            if name == "time" or (name.endswith("weight") and "norm" not in name):
                parameter.copy_(DEVIATION * normal(parameter.shape, keys, stream=f"{stream}.{name}"))

    def forward(
        self,
        returns: Tensor,
        observations: Tensor,
        actions: Tensor,
        timesteps: Tensor,
        known: Tensor,
        drop: Drop = lambda tensor, name: tensor,
    ) -> Tensor:
        """Outputs `[S, B, K, act]` for returns to go `[S, B, K]`, observations `[S, B, K, obs]`, actions `[S, B, K, act]`, timesteps and `known`
        `[S, B, K]`. Output k sees everything up to observation k; what is not known is seen by nothing."""
        seeds = torch.arange(len(self.time), device=self.time.device).view(-1, 1, 1)
        when = self.time[seeds, timesteps.clamp(max=self.timesteps - 1)]
        kinds = (self.return_(returns.unsqueeze(-1)), self.observation(observations), self.action(actions))
        tokens = torch.stack([kind + when for kind in kinds], 3).flatten(2, 3)  # [S, B, 3 K, width]
        count = tokens.shape[2]
        past = torch.ones(count, count, dtype=torch.bool, device=tokens.device).tril()
        allowed = past & known.repeat_interleave(TOKENS, -1, output_size=count)[:, :, None, None, :]
        tokens = drop(self.norm(tokens), "embedding")
        for block in self.blocks:
            tokens = block(tokens, allowed, drop)
        outputs: Tensor = self.head(self.last_norm(tokens[:, :, 1::TOKENS]))
        return outputs
