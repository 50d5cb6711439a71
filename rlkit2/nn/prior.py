"""Fixed random functions that members of an ensemble are trained on top of, so that they differ where there are no data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlkit2.nn.random import normal, uniform

FEATURES = 64


class RandomFunctions(nn.Module):
    """M functions for each of S seeds, drawn from a Gaussian process of mean 0 and deviation 1 and never trained.

    The kernel is exp(-sum_g |x_g - x'_g|^2 / (2 d_g)) over groups of inputs of width d_g, such as observation and action: between two unrelated
    points of standardised inputs every group counts for a factor 1/e. A function is a pure function of its seed, so none is stored.

    Source: the randomised priors of Osband, Aslanides, Cassirer, "Randomized Prior Functions for Deep Reinforcement Learning" (NeurIPS 2018); the
    draws by the random Fourier features of Rahimi and Recht (NeurIPS 2007). Difference: a Gaussian process instead of an untrained network, whose
    deviation grows with the distance from the origin and would be in no units.

    Args:
        groups: widths of the groups of inputs, in order.
        outputs: independent functions of the same input, or None for one, without a last axis.
        seeds, members, stream, dtype, device: as for `StackedMLP`.
    """

    frequencies: Tensor
    phases: Tensor
    weights: Tensor

    def __init__(
        self,
        groups: Sequence[int],
        outputs: int | None = None,
        *,
        seeds: Sequence[int],
        members: int,
        stream: str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.scalar = outputs is None
        keys, lead = torch.tensor(list(seeds), device=device), (len(seeds), members)
        parts = [
            normal((*lead, width, FEATURES), keys, stream=f"{stream}.frequencies.{i}") / math.sqrt(width)
            for i, width in enumerate(groups)
        ]
        drawn = {
            "frequencies": torch.cat(parts, 2),
            "phases": 2.0 * math.pi * uniform((*lead, 1, FEATURES), keys, stream=f"{stream}.phases"),
            "weights": math.sqrt(2.0 / FEATURES)
            * normal((*lead, FEATURES, outputs or 1), keys, stream=f"{stream}.weights"),
        }
        for name, values in drawn.items():
            self.register_buffer(name, values.to(dtype), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Values `[S, M, B]` or `[S, M, B, outputs]` at `inputs [S, B, in]`; differentiable in them."""
        found = torch.cos(inputs.unsqueeze(1) @ self.frequencies + self.phases) @ self.weights
        return found.squeeze(-1) if self.scalar else found
