"""Adam over parameters that lead with the seed axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

Schedule = Literal["constant", "cosine", "linear", "refined"]
"""How a step size falls to zero over a number of steps: not at all, along half a cosine, along a line, along a curve of its own."""


class Adam:
    """Adam (Kingma and Ba, 2015; betas .9/.999, eps 1e-8) in one fused call; weight decay is the L2 term inside Adam.

    It calls the operation that `torch.optim.Adam(fused=True)` ends in: that class imports torch's compiler when it is first used, which takes
    as long as importing torch, and does three times the work of a small step around it.

    Args:
        module: its parameters are optimised; each leads with the seed axis, so seeds never mix.
        learning_rate: step size.
        weight_decay: adds `weight_decay * parameter` to the gradient.
        decoupled: takes `learning_rate * weight_decay * parameter` off the parameter instead (AdamW; Loshchilov and Hutter, 2019).
        warmup: steps over which the learning rate rises to what it is, along a line; 0: none.
        max_norm: gradients of a seed that are longer than this are made that long; None: as they are.
        cosine_steps: if given, `follow("cosine", cosine_steps)`.
    """

    def __init__(
        self,
        module: nn.Module,
        learning_rate: float,
        *,
        weight_decay: float = 0.0,
        cosine_steps: int | None = None,
        decoupled: bool = False,
        warmup: int = 0,
        max_norm: float | None = None,
    ) -> None:
        self._named = dict(module.named_parameters())
        self._parameters: list[Tensor] = list(self._named.values())
        device = self._parameters[0].device
        self._base_rate, self._max_norm = learning_rate, max_norm
        self._options: dict[str, Any] = {
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "warmup": warmup,
            "max_norm": max_norm,
        }
        self._warmup = warmup
        # CUDA's fused Adam reads a float32
        kind = torch.float32 if device.type == "cuda" else self._parameters[0].dtype
        self._rate, self._half_rate = (
            torch.tensor(rate, dtype=kind, device=device) for rate in (learning_rate, 0.5 * learning_rate)
        )
        self._steps_done = [torch.zeros((), device=device) for _ in self._parameters]
        self._means, self._squares = ([torch.zeros_like(p) for p in self._parameters] for _ in range(2))
        self.follow("constant", 0)
        if cosine_steps:
            self.follow("cosine", cosine_steps)

    def follow(
        self, schedule: Schedule, steps: int, clock: Tensor | None = None, curve: Sequence[float] | None = None
    ) -> None:
        """From now on the learning rate falls from its start to zero over `steps`, on the device.

        Args:
            schedule: the curve.
            steps: where it arrives.
            clock: `[S]`, how many are done; None counts this optimiser's own.
            curve: of "refined", shares of the learning rate at equal distances from the first step to the last, straight in between.
        """
        self._schedule, self._steps, self._clock = schedule, steps, clock
        self._curve = None if curve is None else torch.tensor(curve, dtype=self._rate.dtype, device=self._rate.device)

    def restarted(self, module: nn.Module) -> Adam:
        """A fresh one of the same settings for another module."""
        fresh = Adam(module, self._base_rate, **self._options)
        fresh.follow(self._schedule, self._steps, self._clock, None if self._curve is None else self._curve.tolist())
        return fresh

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """One step along `gradient [S, P]`: all parameters of a seed as one vector, in the order of `module.parameters()`."""
        sizes = [parameter[0].numel() for parameter in self._parameters]
        parts = gradient.split_with_sizes(sizes, 1) if len(sizes) > 1 else (gradient,)
        self._advance([part.reshape(p.shape) for p, part in zip(self._parameters, parts, strict=True)])

    def minimize(self, losses: Tensor) -> Tensor:
        """One step down the sum of `losses [S]`; returns the gradient's norm per seed, `[S]`, before weight decay and before it is cut."""
        gradients = torch.autograd.grad(losses.sum(), self._parameters)  # with `grad_outputs`, torch imports sympy
        rows = [gradient.flatten(1) for gradient in gradients]
        norm: Tensor = torch.linalg.vector_norm(rows[0] if len(rows) == 1 else torch.cat(rows, 1), dim=1)
        if self._max_norm is not None:
            share = (self._max_norm / (norm + 1e-6)).clamp(max=1.0)
            gradients = tuple(gradient * share.view(-1, *(1 for _ in gradient.shape[1:])) for gradient in gradients)
        with torch.no_grad():
            self._advance(gradients)
        return norm

    def _advance(self, gradients: Sequence[Tensor]) -> None:
        constant = self._schedule == "constant" and not self._warmup
        if not constant:
            self._set_rate()
        laid_out = [_laid_out_like(p, gradient) for p, gradient in zip(self._parameters, gradients, strict=True)]
        advance = _outside_graphs if torch.compiler.is_compiling() else _advance
        advance(
            self._parameters, laid_out, self._means, self._squares, self._steps_done,
            self._base_rate if constant else self._rate, self._options["weight_decay"], self._options["decoupled"],
        )  # fmt: skip

    def _set_rate(self) -> None:
        done = self._steps_done[0] if self._clock is None else self._clock[0]
        done = done.to(self._rate.dtype)
        if self._schedule == "constant":
            self._rate.fill_(self._base_rate)
        elif self._schedule == "linear":
            left = (1.0 - done * (1.0 / self._steps)).clamp(min=0.0)
            torch.mul(left, self._base_rate, out=self._rate)
        elif self._schedule == "refined":
            assert self._curve is not None
            last = len(self._curve) - 1
            place = (done * (last / self._steps)).clamp(max=last)
            before = place.floor().clamp(max=last - 1)
            low, high = self._curve[before.long()], self._curve[before.long() + 1]
            torch.mul(torch.lerp(low, high, place - before), self._base_rate, out=self._rate)
        else:
            angle = (done * (math.pi / self._steps)).clamp(max=math.pi)
            torch.add(self._half_rate, angle.cos(), alpha=0.5 * self._base_rate, out=self._rate)
        if self._warmup:
            self._rate.mul_(((done + 1.0) * (1.0 / self._warmup)).clamp(max=1.0))

    def named_state(self) -> dict[str, Tensor]:
        """Live tensors `{parameter}.exp_avg`, `.exp_avg_sq` and `.step`; the last is one number, shared by the seeds."""
        parts = {"step": self._steps_done, "exp_avg": self._means, "exp_avg_sq": self._squares}
        return {f"{name}.{key}": part[i] for i, name in enumerate(self._named) for key, part in parts.items()}


def _advance(
    parameters: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
    rate: float | Tensor,
    decay: float,
    decoupled: bool,
) -> None:
    torch._foreach_add_(steps, 1)
    fused = torch._fused_adamw_ if decoupled else torch._fused_adam_
    fused(
        parameters, gradients, means, squares, [], steps,
        lr=rate, beta1=0.9, beta2=0.999, weight_decay=decay, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip


# torch.compile cannot take the operation into a graph; this imports the compiler when it is called, not before.
_outside_graphs = _disable_dynamo(_advance)


def _laid_out_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """`gradient` in the memory layout of `parameter`: fused Adam walks through both without regard to strides."""
    return gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)
