"""Multilayer perceptrons for all seeds and ensemble members at once, on one flat parameter vector per seed.

Weights are `[S, M, in, out]` (S seeds, M members), held as views of `flat [S, P]`: the optimiser, target updates and inner products of
gradients are single operations on that tensor. Forward and backward are written by hand; `differentiable` is the same network in plain
autograd, for second derivatives and as the reference in the tests.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rlkit2.nn.random import uniform

LAYER_NORM_EPSILON = 1e-5

Module = TypeVar("Module", bound=nn.Module)

Pullback = Callable[..., Tensor]
"""`pullback(cotangent [S, M, rows] or None for ones, rows=slice) -> gradient [S, P]` of a scalar network at fixed inputs; see `vjp`."""


@dataclass
class _Layer:
    """Views of one layer, member axes merged: weight `[SM, in, out]` (a scalar output: `[SM, 1, in]`), bias `[SM, 1, out]`."""

    weight: Tensor
    bias: Tensor
    gain: Tensor | None = None
    shift: Tensor | None = None


@dataclass
class _Trace:
    """What the backward pass needs of one layer: its input and, with layer norm, the statistics of its linear output."""

    inputs: Tensor
    linear: Tensor | None = None
    normalized: Tensor | None = None
    mean: Tensor | None = None
    rstd: Tensor | None = None


@dataclass
class _Cotangent:
    """Derivatives with respect to a layer's linear output and (with layer norm) its gain-and-shift output."""

    linear: Tensor | None
    affine: Tensor | None = None


class StackedMLP(nn.Module):
    """Linear - [LayerNorm] - ReLU blocks and a linear output, for S seeds and M members.

    Args:
        input_size: width of the inputs.
        hidden_sizes: widths of the hidden layers; empty gives a linear map.
        output_size: width of the outputs; None is a scalar network, whose outputs have no last axis.
        seeds: one integer per seed; initial weights of a seed depend on it and on `stream` alone.
        members: M, or None for a network without a member axis.
        layer_norm: put a layer norm (eps 1e-5) between each hidden linear map and its ReLU.
        detached_outputs: the last so many outputs are read off the hidden layers without training them: only their own weights learn from them
            (gradients to the inputs under `frozen` count all outputs).
        stream: name of the network; networks of one agent need different ones to start different.

    Linear layers start as `torch.nn.Linear` does: uniform in +-1/sqrt(in).

    Shapes: inputs `[S, B, in]` (shared by the members) or `[S, M, B, in]`; outputs `[S, M, B, out]`, without M if `members` is None and
    without `out` for a scalar network.
    """

    def __init__(
        self,
        input_size: int,
        hidden_sizes: Sequence[int],
        output_size: int | None = None,
        *,
        seeds: Sequence[int],
        members: int | None = None,
        layer_norm: bool = False,
        detached_outputs: int = 0,
        stream: str = "",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.attached_outputs = None if output_size is None else output_size - detached_outputs
        self.input_size, self.hidden_sizes, self.output_size = input_size, tuple(hidden_sizes), output_size
        self.num_seeds, self.members, self.layer_norm = len(seeds), members, layer_norm
        self._shapes: dict[str, tuple[int, int]] = {}
        widths = (input_size, *self.hidden_sizes, output_size or 1)
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            self._shapes[f"layers.{i}.weight"] = (fan_in, fan_out)
            self._shapes[f"layers.{i}.bias"] = (1, fan_out)
            if layer_norm and i < len(self.hidden_sizes):
                self._shapes[f"norms.{i}.weight"] = (1, fan_out)
                self._shapes[f"norms.{i}.bias"] = (1, fan_out)
        per_member = sum(math.prod(shape) for shape in self._shapes.values())
        self.flat = nn.Parameter(torch.empty(len(seeds), (members or 1) * per_member, dtype=dtype, device=device))
        self._layers = self._split(self.flat.detach())
        self._initialize(seeds, stream)

    @torch.no_grad()
    def _initialize(self, seeds: Sequence[int], stream: str) -> None:
        keys = torch.tensor(list(seeds), device=self.flat.device)
        bound = 1.0
        for name, view in self.named_views().items():
            if name.startswith("norms"):
                view.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            if name.endswith("weight"):
                bound = 1.0 / math.sqrt(view.shape[-2])
            view.copy_((2.0 * uniform(view.shape, keys, stream=f"{stream}.{name}") - 1.0) * bound)

    # Views of the flat parameter

    def _blocks(self, flat: Tensor) -> list[Tensor]:
        """Cut `flat [S, P]` (a parameter vector or a gradient) into `[SM, rows, columns]` views in parameter order."""
        shapes = list(self._shapes.values())
        rows = flat.view(self.num_seeds * (self.members or 1), -1)
        parts = rows.split_with_sizes([math.prod(shape) for shape in shapes], 1)
        if self.output_size is None:
            shapes[-2] = shapes[-2][::-1]  # the weights of a scalar output lie as a row: its products are dot products
        return [part.view(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]

    def _split(self, flat: Tensor) -> list[_Layer]:
        blocks = iter(self._blocks(flat))
        return [
            _Layer(next(blocks), next(blocks), *((next(blocks), next(blocks)) if self._has_norm(i) else ()))
            for i in range(len(self.hidden_sizes) + 1)
        ]

    def _has_norm(self, layer: int) -> bool:
        return self.layer_norm and layer < len(self.hidden_sizes)

    def named_views(self, flat: Tensor | None = None) -> dict[str, Tensor]:
        """Views `layers.{i}.weight [S, M, in, out]`, `layers.{i}.bias [S, M, 1, out]`, `norms.{i}.weight|bias [S, M, 1, h]` (no M without members).

        Args:
            flat: `[S, P]`, another vector of this network (a gradient); None for the parameters themselves.
        """
        blocks = self._blocks(self.flat.detach() if flat is None else flat)
        lead = (self.num_seeds,) if self.members is None else (self.num_seeds, self.members)
        return {name: block.view(*lead, *self._shapes[name]) for name, block in zip(self._shapes, blocks, strict=True)}

    def _apply(self, fn: Any, recurse: bool = True) -> StackedMLP:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._layers = self._split(self.flat.detach())
        return self

    def member(self, index: int) -> StackedMLP:
        """One member as a network with M = 1 that shares this one's weights; they cannot be trained through it."""
        flat = self.flat.detach().view(self.num_seeds, self.members or 1, -1)[:, index]
        alone = copy.copy(self)
        alone.members = 1
        alone._parameters = {"flat": nn.Parameter(flat, requires_grad=False)}
        alone._layers = alone._split(flat)
        return alone

    def __deepcopy__(self, memo: dict[int, Any]) -> StackedMLP:
        twin = copy.copy(self)
        twin._parameters = {"flat": nn.Parameter(self.flat.detach().clone(), requires_grad=self.flat.requires_grad)}
        twin._layers = twin._split(twin.flat.detach())
        memo[id(self)] = twin
        return twin

    # Evaluation

    def forward(self, inputs: Tensor, *, frozen: bool = False) -> Tensor:
        """Outputs for `inputs`; with `frozen` gradients flow to the inputs only and no weight gradient is computed."""
        if torch.compiler.is_compiling():
            return self.differentiable(inputs, frozen=frozen)
        merged = self._merge(inputs)
        needs_graph = torch.is_grad_enabled() and (merged.requires_grad or (self.flat.requires_grad and not frozen))
        if not needs_graph:
            return self._unmerge(self._run(merged)[0])
        flat = self.flat.detach() if frozen else self.flat
        return self._unmerge(_Evaluate.apply(self, flat, merged))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def features(self, inputs: Tensor) -> Tensor:
        """The last hidden layer at `inputs`, `[S, M, B, h]` (no M without members)."""
        return self._unmerge(self._run(self._merge(inputs))[1][-1].inputs)

    def vjp(self, inputs: Tensor) -> tuple[Tensor, StackedPullback]:
        """Outputs `[S, M, B]` of a scalar network, and their pullback to the parameters.

        `pullback(cotangent, rows=slice(None))` maps a cotangent on the outputs of those rows (None: ones) to the gradient `[S, P]`. Parts of the rows
        share one backward pass, for a unit cotangent: a scalar output makes every hidden derivative proportional to its row's
        cotangent, so further cotangents cost their weight products only.

        Raises:
            RuntimeError: by the pullback, if the weights have changed since.
        """
        if self.output_size is not None:
            raise ValueError("vjp needs a scalar network (output_size=None)")
        with torch.no_grad():
            outputs, traces = self._run(self._merge(inputs))
        return self._unmerge(outputs), StackedPullback(self, traces)

    def differentiable(self, inputs: Tensor, *, frozen: bool = False) -> Tensor:
        """The same outputs by plain autograd operations: slower, but differentiable any number of times."""
        layers = self._split(self.flat.detach() if frozen else self.flat)
        hidden = self._merge(inputs)
        for layer in layers[:-1]:
            hidden = torch.baddbmm(layer.bias, hidden, layer.weight)
            if layer.gain is not None and layer.shift is not None:
                hidden = F.layer_norm(hidden, hidden.shape[-1:], eps=LAYER_NORM_EPSILON) * layer.gain + layer.shift
            hidden = hidden.relu()
        last = layers[-1]
        if self.output_size is None:
            return self._unmerge((hidden * last.weight).sum(-1) + last.bias.squeeze(-1))
        if self.attached_outputs is None or self.attached_outputs == self.output_size or frozen:
            return self._unmerge(torch.baddbmm(last.bias, hidden, last.weight))
        sizes = [self.attached_outputs, self.output_size - self.attached_outputs]
        parts = zip(
            (hidden, hidden.detach()),
            last.bias.split_with_sizes(sizes, -1),
            last.weight.split_with_sizes(sizes, -1),
            strict=True,
        )
        return self._unmerge(torch.cat([torch.baddbmm(bias, inputs, weight) for inputs, bias, weight in parts], -1))

    def _merge(self, inputs: Tensor) -> Tensor:
        if self.members is None or (self.members == 1 and inputs.ndim == 3):
            return inputs
        if inputs.ndim == 3:
            inputs = inputs.unsqueeze(1).expand(-1, self.members, -1, -1)
        return inputs.reshape(-1, *inputs.shape[2:])

    def _unmerge(self, outputs: Tensor) -> Tensor:
        return outputs if self.members is None else outputs.view(self.num_seeds, self.members, *outputs.shape[1:])

    def _run(self, inputs: Tensor) -> tuple[Tensor, list[_Trace]]:
        traces = []
        hidden = inputs
        for layer in self._layers[:-1]:
            linear = torch.baddbmm(layer.bias, hidden, layer.weight)
            if layer.gain is None or layer.shift is None:
                traces.append(_Trace(hidden))
                hidden = linear.relu_()
            else:
                normalized, mean, rstd = torch.native_layer_norm(
                    linear, linear.shape[-1:], None, None, LAYER_NORM_EPSILON
                )
                traces.append(_Trace(hidden, linear, normalized, mean, rstd))
                hidden = torch.addcmul(layer.shift, normalized, layer.gain).relu_()
        traces.append(_Trace(hidden))
        last = self._layers[-1]
        if (
            self.output_size is None
        ):  # as a product with one row: with one column, or as a dot product, it is several times slower
            return torch.baddbmm(last.bias, last.weight, hidden.transpose(1, 2)).squeeze(1), traces
        return torch.baddbmm(last.bias, hidden, last.weight), traces

    def _backpropagate(
        self, traces: list[_Trace], cotangent: Tensor | None, *, to_inputs: bool = False, attached: int | None = None
    ) -> tuple[list[_Cotangent], Tensor | None]:
        """Cotangents of every layer for `cotangent [SM, B, out]`; of a scalar network for `[SM, 1, B]`, or for ones (None).

        `attached`: how many of the outputs send a cotangent below the last layer; None for all.
        """
        found = [_Cotangent(cotangent)]
        for i in range(len(self._layers) - 1, 0 if not to_inputs else -1, -1):
            weight = self._layers[i].weight
            above = found[-1].linear
            if attached is not None and above is not None and i == len(self._layers) - 1:
                above, weight = above[..., :attached], weight[..., :attached]
            if above is None:
                at_input = weight.expand_as(traces[i].inputs)
            elif self.output_size is None and len(found) == 1:
                at_input = above.transpose(1, 2) * weight
            else:
                at_input = torch.bmm(above, weight.transpose(1, 2))
            if i == 0:
                return found[::-1], at_input
            at_input = torch.ops.aten.threshold_backward(at_input, traces[i].inputs, 0)
            gain, trace = self._layers[i - 1].gain, traces[i - 1]
            if gain is None:
                found.append(_Cotangent(at_input))
                continue
            at_linear, _, _ = torch.ops.aten.native_layer_norm_backward(
                at_input * gain,
                trace.linear,
                at_input.shape[-1:],
                trace.mean,
                trace.rstd,
                None,
                None,
                [True, False, False],
            )
            found.append(_Cotangent(at_linear, at_input))
        return found[::-1], None

    def _weight_gradient(
        self, traces: list[_Trace], cotangents: list[_Cotangent], scale: Tensor | None, rows: slice = slice(None)
    ) -> Tensor:
        """Gradient `[S, P]`: over `rows`, the sum of inputs times cotangents times `scale [SM, 1, rows]` (None: one)."""
        compiling = torch.compiler.is_compiling()
        gradient = torch.empty_like(self.flat)
        blocks: list[Tensor | None] = [None] * len(self._shapes) if compiling else list(self._blocks(gradient))
        results: list[Tensor] = []

        def contract(left: Tensor, right: Tensor) -> None:
            results.append(torch.bmm(left, right, out=blocks[len(results)]))

        def total(cotangent: Tensor) -> None:
            if scale is None:
                results.append(torch.sum(cotangent, 1, keepdim=True, out=blocks[len(results)]))
            else:
                contract(scale, cotangent)

        for i, (trace, cotangent) in enumerate(zip(traces, cotangents, strict=True)):
            inputs = trace.inputs[:, rows]
            if self.output_size is None and i == len(traces) - 1:
                top = scale if cotangent.linear is None else cotangent.linear
                if top is None:
                    top = torch.ones_like(inputs[:, None, :, 0])
                contract(top, inputs)
                results.append(torch.sum(top, 2, keepdim=True, out=blocks[len(results)]))
                continue
            assert cotangent.linear is not None
            linear = cotangent.linear[:, rows]
            scaled = inputs if scale is None else inputs * scale.transpose(1, 2)
            contract(scaled.transpose(1, 2), linear)
            total(linear)
            if cotangent.affine is not None and trace.normalized is not None:
                affine = cotangent.affine[:, rows]
                total(affine * trace.normalized[:, rows])
                total(affine)
        if compiling:
            return torch.cat([result.flatten(1) for result in results], 1).view_as(self.flat)
        return gradient


class StackedPullback:
    """The `Pullback` of a `StackedMLP`, which also knows how its rows' gradients multiply."""

    def __init__(self, network: StackedMLP, traces: list[_Trace]) -> None:
        self.network, self.traces = network, traces
        self.version = None if torch.compiler.is_compiling() else network.flat._version
        self.unit: list[_Cotangent] | None = None

    @torch.no_grad()
    def __call__(self, cotangent: Tensor | None, rows: slice = slice(None)) -> Tensor:
        if cotangent is not None:
            cotangent = cotangent.reshape(self.network.num_seeds * (self.network.members or 1), 1, -1)
            if rows == slice(None) and self.unit is None:
                self._check()
                cotangents, _ = self.network._backpropagate(self.traces, cotangent)
                return self.network._weight_gradient(self.traces, cotangents, None)
        return self.network._weight_gradient(self.traces, self._unit(), cotangent, rows)

    @torch.no_grad()
    def products(self, first: slice, second: slice) -> Tensor:
        """Inner products of the gradients of two rows' outputs, pair by pair, `[S, M, pairs]` (no M without members).

        The gradient of a linear map at one row is the outer product of its input and its cotangent, so the inner product of two such gradients
        is that of the inputs times that of the cotangents.
        """
        total: Tensor | None = None
        for trace, cotangent in zip(self.traces, self._unit(), strict=True):
            product = _pairs(trace.inputs, first, second) + 1.0  # 1: the bias
            if cotangent.linear is not None:
                product = product * _pairs(cotangent.linear, first, second)
            if cotangent.affine is not None and trace.normalized is not None:
                gains = cotangent.affine * trace.normalized
                product = product + _pairs(gains, first, second) + _pairs(cotangent.affine, first, second)
            total = product if total is None else total + product
        assert total is not None
        return self.network._unmerge(total)

    def _unit(self) -> list[_Cotangent]:
        """Cotangents of every layer for ones on the outputs."""
        self._check()
        if self.unit is None:
            self.unit = self.network._backpropagate(self.traces, None)[0]
        return self.unit

    def _check(self) -> None:
        if self.version is not None and self.version != self.network.flat._version:
            raise RuntimeError("the weights have changed since vjp; pull back before the optimiser's step")


def _pairs(values: Tensor, first: slice, second: slice) -> Tensor:
    """Inner products of the rows `first` and `second` of `values [SM, B, n]`."""
    products: Tensor = torch.linalg.vecdot(values[:, first], values[:, second])
    return products


class _Evaluate(torch.autograd.Function):
    """Bind the hand-written passes of a `StackedMLP` to autograd."""

    @staticmethod
    def forward(ctx: Any, network: StackedMLP, flat: Tensor, inputs: Tensor) -> Tensor:
        outputs, traces = network._run(inputs)
        ctx.save_for_backward(
            flat
        )  # not read again, but autograd then refuses a backward pass after the weights have changed
        ctx.network, ctx.traces = network, traces
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        _ = ctx.saved_tensors
        network, traces = ctx.network, ctx.traces
        _, to_flat, to_inputs = ctx.needs_input_grad
        cotangent = gradient.unsqueeze(1) if network.output_size is None else gradient
        attached = network.attached_outputs if to_flat and network.attached_outputs != network.output_size else None
        cotangents, at_inputs = network._backpropagate(traces, cotangent, to_inputs=to_inputs, attached=attached)
        at_flat = network._weight_gradient(traces, cotangents, None) if to_flat else None
        return None, at_flat, at_inputs


def vjp(module: nn.Module, *inputs: Tensor) -> tuple[Tensor, Pullback]:
    """`StackedMLP.vjp` for any module with outputs `[S, ..., B]` and parameters that all lead with S.

    The pullback returns the gradients of all parameters as one vector per seed, `[S, P]`, in the order of `module.parameters()`.
    """
    own = getattr(module, "vjp", None)
    if own is None:
        return vjp_by_autograd(module, *inputs)
    outputs, pullback = own(*inputs)
    return outputs, pullback


def vjp_by_autograd(module: nn.Module, *inputs: Tensor) -> tuple[Tensor, Pullback]:
    """What `vjp` does for a module that has no method of that name."""
    parameters = list(module.parameters())
    with torch.enable_grad():
        outputs = module(*inputs)

    def pullback(cotangent: Tensor | None, rows: slice = slice(None)) -> Tensor:
        selected = outputs[..., rows]
        cotangent = torch.ones_like(selected) if cotangent is None else cotangent.expand_as(selected)
        gradients = torch.autograd.grad(selected, parameters, cotangent, retain_graph=True)
        return torch.cat([gradient.flatten(1) for gradient in gradients], 1)

    return outputs.detach(), pullback


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of `module` as live tensors under their public names (`StackedMLP`: the views, not the flat vector)."""
    views = getattr(module, "named_views", None)
    if views is not None:
        return dict(views())
    return {name: tensor.detach() for name, tensor in (*module.named_parameters(), *module.named_buffers())}


def layer_sizes(module: nn.Module) -> list[int]:
    """How many consecutive entries of a vector `[S, P]` (what a pullback returns) belong to each layer, of each member apart."""
    sizes: list[int] = []
    for part in module.modules():
        if isinstance(part, StackedMLP):
            layers: dict[str, int] = {}
            for name, shape in part._shapes.items():
                number = name.split(".")[1]
                layers[number] = layers.get(number, 0) + math.prod(shape)
            sizes += [*layers.values()] * (part.members or 1)
        elif own := [parameter[0].numel() for parameter in part.parameters(recurse=False)]:
            sizes.append(sum(own))
    return sizes


def unflatten(module: nn.Module, vector: Tensor) -> list[Tensor]:
    """Cut `vector [S, P]` (what a pullback returns) into the shapes of the module's tensors, in parameter order."""
    if isinstance(module, StackedMLP):
        return list(module.named_views(vector).values())
    parameters = list(module.parameters())
    parts = vector.split_with_sizes([parameter[0].numel() for parameter in parameters], 1)
    return [part.reshape(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]


def target_copy(module: Module) -> Module:
    """A frozen copy of `module`, to follow it by `lerp_`; an encoder that it borrows is borrowed by the copy, too."""
    lent = [part.lender for part in module.modules() if hasattr(part, "lender")]
    return copy.deepcopy(module, {id(lender): lender for lender in lent}).requires_grad_(False)


@torch.no_grad()
def lerp_(target: nn.Module, online: nn.Module, rate: float | Tensor) -> None:
    """Polyak averaging in place: target <- (1 - rate) target + rate online, parameters only."""
    for old, new in zip(target.parameters(), online.parameters(), strict=True):
        old.lerp_(new, rate)
