"""Adam over parameters that lead with the seed axis."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Adam:
    """Adam (Kingma and Ba, 2015; betas .9/.999, eps 1e-8) in one fused call; weight decay is the L2 term inside Adam.

    Args:
        module: its parameters are optimised; each leads with the seed axis, so seeds never mix.
        learning_rate: step size.
        weight_decay: adds `weight_decay * parameter` to the gradient.
        cosine_steps: if given, the learning rate falls to zero over that many steps along half a cosine.
    """

    def __init__(
        self, module: nn.Module, learning_rate: float, *, weight_decay: float = 0.0, cosine_steps: int | None = None
    ) -> None:
        self._named = dict(module.named_parameters())
        self._parameters = list(self._named.values())
        device = self._parameters[0].device
        self._base_rate, self._weight_decay, self._cosine_steps = learning_rate, weight_decay, cosine_steps
        kind = (
            torch.float32 if device.type == "cuda" else self._parameters[0].dtype
        )  # CUDA's fused Adam reads a float32
        self._rate = torch.tensor(learning_rate, dtype=kind, device=device) if cosine_steps else learning_rate
        self._ones = torch.ones_like(self._parameters[0].flatten(1)[:, 0])
        self._half_rate = torch.tensor(0.5 * learning_rate, dtype=kind, device=device)
        self._optimizer = torch.optim.Adam(
            self._parameters, lr=self._rate, weight_decay=weight_decay, fused=True, capturable=device.type == "cuda"
        )
        for parameter in self._parameters:  # what torch makes in the first step, so that a fresh state is complete
            self._optimizer.state[parameter] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def restarted(self, module: nn.Module) -> Adam:
        """A fresh one of the same settings for another module."""
        return Adam(module, self._base_rate, weight_decay=self._weight_decay, cosine_steps=self._cosine_steps)

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """One step along `gradient [S, P]`: all parameters of a seed as one vector, in the order of `module.parameters()`."""
        sizes = [parameter[0].numel() for parameter in self._parameters]
        parts = gradient.split_with_sizes(sizes, 1) if len(sizes) > 1 else (gradient,)
        for parameter, part in zip(self._parameters, parts, strict=True):
            parameter.grad = _laid_out_like(parameter, part.reshape(parameter.shape))
        self._advance()

    def minimize(self, losses: Tensor) -> Tensor:
        """One step down the sum of `losses [S]`; returns the gradient's norm per seed, `[S]`, before weight decay."""
        gradients = torch.autograd.grad(losses, self._parameters, self._ones)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = _laid_out_like(parameter, gradient)
        rows = [gradient.flatten(1) for gradient in gradients]
        self._advance()
        norm: Tensor = torch.linalg.vector_norm(rows[0] if len(rows) == 1 else torch.cat(rows, 1), dim=1)
        return norm

    def _advance(self) -> None:
        if self._cosine_steps and isinstance(self._rate, Tensor):
            done = self._optimizer.state[self._parameters[0]]["step"]
            angle = (done.to(self._rate.dtype) * (math.pi / self._cosine_steps)).clamp(max=math.pi)
            torch.add(self._half_rate, angle.cos(), alpha=0.5 * self._base_rate, out=self._rate)
        self._optimizer.step()
        for parameter in self._parameters:
            parameter.grad = None

    def named_state(self) -> dict[str, Tensor]:
        """Live tensors `{parameter}.exp_avg`, `.exp_avg_sq` and `.step`; the last is one number, shared by the seeds."""
        return {
            f"{name}.{key}": tensor
            for name, parameter in self._named.items()
            for key, tensor in self._optimizer.state[parameter].items()
        }


def _laid_out_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """`gradient` in the memory layout of `parameter`: fused Adam walks through both without regard to strides."""
    return gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)
