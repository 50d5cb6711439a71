"""Two passes of a member ensemble that cost less by hand than by autograd: its minimum, and the diversity of its input gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlkit2.nn.mlp import StackedMLP, _Cotangent, _Trace

GROUPED = hasattr(torch.nn.functional, "grouped_mm")  # one product per group of rows, sizes known to the device alone


def member_minimum(network: nn.Module, inputs: Tensor) -> Tensor:
    """min over members of the first output, `[S, B]`, at `inputs [S, B, in]`, for gradients to the inputs, not to the weights.

    Of the backward pass of a `StackedMLP` only each row's minimal member is computed (on a CPU; elsewhere the others take part with weight
    zero): a share of 1/M of its products, with the same result.
    """
    if isinstance(network, StackedMLP) and not torch.compiler.is_compiling():
        minimum: Tensor = _Minimum.apply(inputs, network)  # type: ignore[no-untyped-call]
        return minimum
    outputs = network(inputs, frozen=True) if isinstance(network, StackedMLP) else network(inputs)
    return _first(outputs).amin(1)


def _first(outputs: Tensor) -> Tensor:
    """The first output of `[S, M, B]` or `[S, M, B, out]`."""
    return outputs if outputs.ndim == 3 else outputs[..., 0]


class _Minimum(torch.autograd.Function):
    """The forward pass of all members; the backward pass of the minimal ones."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, network: StackedMLP) -> Tensor:
        outputs, traces = network._run(network._merge(inputs))
        values = outputs if network.output_size is None else outputs[..., 0]
        members = network.members or 1
        minimum, index = values.view(-1, members, values.shape[-1]).min(1)
        ctx.network, ctx.traces, ctx.index = network, traces, index
        return minimum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        network = ctx.network
        if GROUPED and gradient.device.type == "cpu" and _groupable(network):
            return _slopes_of_selected(network, ctx.traces, ctx.index) * gradient.unsqueeze(-1), None
        members = network.members or 1
        chosen = torch.zeros(len(gradient), members, gradient.shape[-1], dtype=gradient.dtype, device=gradient.device)
        chosen.scatter_(1, ctx.index.unsqueeze(1), gradient.unsqueeze(1))
        _, at_inputs = network._backpropagate(ctx.traces, _on_first(network, chosen.flatten(0, 1)), to_inputs=True)
        return at_inputs.view(-1, members, *at_inputs.shape[1:]).sum(1), None


def _groupable(network: StackedMLP) -> bool:
    """Whether `grouped_mm` can take the network: float32 and aligned hidden widths."""
    aligned = bool(network.hidden_sizes) and all(width % 8 == 0 for width in network.hidden_sizes)
    return aligned and not network.layer_norm and network.flat.dtype == torch.float32


def _on_first(network: StackedMLP, cotangent: Tensor) -> Tensor:
    """A cotangent `[SM, B]` on the first output in the layout of the last layer."""
    if network.output_size is None:
        return cotangent.unsqueeze(1)
    return torch.nn.functional.pad(cotangent.unsqueeze(-1), (0, network.output_size - 1))


def _slopes_of_selected(network: StackedMLP, traces: list[_Trace], index: Tensor) -> Tensor:
    """Gradient of the first output of member `index [S, B]` with respect to its input row, `[S, B, in]`."""
    seeds, rows = index.shape
    members = network.members or 1
    group = (index + members * torch.arange(seeds, device=index.device).unsqueeze(1)).flatten()  # into the S M networks
    sorted_group, order = group.sort(stable=True)
    bounds = torch.arange(1, seeds * members + 1, device=index.device)
    ends = torch.searchsorted(sorted_group, bounds).int()
    row = order % rows
    last = network._layers[-1].weight
    slopes = (last[:, 0] if network.output_size is None else last[..., 0])[sorted_group]
    for layer, trace in zip(network._layers[-2::-1], traces[:0:-1], strict=True):
        slopes = slopes * (trace.inputs[sorted_group, row] > 0.0)
        if layer is network._layers[0]:
            break
        slopes = torch.nn.functional.grouped_mm(slopes, layer.weight.transpose(1, 2), offs=ends)
    first = network._layers[0].weight
    padded = torch.nn.functional.pad(first, (0, 0, 0, -first.shape[1] % 8))  # to an aligned width
    slopes = torch.nn.functional.grouped_mm(slopes, padded.transpose(1, 2), offs=ends)[:, : first.shape[1]]
    unsorted = torch.empty_like(slopes)
    unsorted[order] = slopes
    return unsorted.view(seeds, rows, -1)


SlopePullback = Callable[[Tensor, Tensor], Tensor]


def vjp_with_slopes(network: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor, SlopePullback]:
    """Outputs, the gradients of the first output with respect to the inputs, and a pullback of cotangents on both to the weights.

    Args:
        network: a `StackedMLP` without layer norm; anything else goes through autograd, with a loop over members.
        inputs: `[S, B, in]`.

    Returns:
        Outputs `[S, M, B]` or `[S, M, B, out]`, slopes `[S, M, B, in]`, and `pullback(on_outputs, on_slopes) -> gradient [S, P]`. The second
        derivative of a ReLU is zero almost everywhere, so a cotangent on the slopes is a tangent sent forward through the active units;
        it meets the same backward pass as the outputs and costs one more forward pass in all.
    """
    if not isinstance(network, StackedMLP) or network.layer_norm:
        return _vjp_with_slopes_by_autograd(network, inputs)
    with torch.no_grad():
        outputs, traces = network._run(network._merge(inputs))
        ones = torch.ones_like(outputs if network.output_size is None else outputs[..., 0])
        unit_cotangent = _on_first(network, ones)
        unit, slopes = network._backpropagate(traces, unit_cotangent, to_inputs=True)
    assert slopes is not None

    @torch.no_grad()
    def pullback(on_outputs: Tensor, on_slopes: Tensor) -> Tensor:
        on_outputs, tangent = on_outputs.reshape(outputs.shape), on_slopes.reshape(*outputs.shape[:2], -1)
        proportional = network.output_size is None or network.attached_outputs == 1
        if not proportional:  # the hidden layers also learn from other outputs: their own backward pass
            plain = network._weight_gradient(traces, network._backpropagate(traces, on_outputs)[0], None)
            return plain + _tangent_gradient(network, traces, unit, torch.zeros_like(on_outputs), tangent)
        return _tangent_gradient(network, traces, unit, on_outputs, tangent)

    return network._unmerge(outputs), network._unmerge(slopes), pullback


def _tangent_gradient(
    network: StackedMLP, traces: list[_Trace], unit: list[_Cotangent], on_outputs: Tensor, tangent: Tensor
) -> Tensor:
    """Weight gradient `[S, P]` of cotangents on the outputs (below the last layer: on the first) and of `tangent [SM, B, in]` on the slopes."""
    scalar, compiling = network.output_size is None, torch.compiler.is_compiling()
    scale = (on_outputs if scalar else on_outputs[..., 0]).unsqueeze(1)
    gradient = torch.empty_like(network.flat)
    blocks: list[Tensor | None] = [None] * len(network._shapes) if compiling else list(network._blocks(gradient))
    results: list[Tensor] = []

    def contract(left: Tensor, right: Tensor) -> Tensor:
        results.append(torch.bmm(left, right, out=blocks[len(results)]))
        return results[-1]

    for i, layer in enumerate(network._layers[:-1]):
        linear = unit[i].linear
        assert linear is not None
        contract(torch.addcmul(tangent, traces[i].inputs, scale.transpose(1, 2)).transpose(1, 2), linear)
        contract(scale, linear)
        tangent = torch.ops.aten.threshold_backward(torch.bmm(tangent, layer.weight), traces[i + 1].inputs, 0)
    hidden = traces[-1].inputs
    if scalar:
        contract(scale, hidden).add_(tangent.sum(1, keepdim=True))
        results.append(torch.sum(scale, 2, keepdim=True, out=blocks[len(results)]))
    else:
        contract(hidden.transpose(1, 2), on_outputs)[..., 0].add_(tangent.sum(1))
        results.append(torch.sum(on_outputs, 1, keepdim=True, out=blocks[len(results)]))
    return torch.cat([result.flatten(1) for result in results], 1).view_as(gradient) if compiling else gradient


def _vjp_with_slopes_by_autograd(network: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor, SlopePullback]:
    parameters = list(network.parameters())
    with torch.enable_grad():
        inputs = inputs.detach().requires_grad_()
        outputs = network.differentiable(inputs) if isinstance(network, StackedMLP) else network(inputs)
        each = _first(outputs).unbind(1)
        slopes = torch.stack([torch.autograd.grad(q.sum(), inputs, create_graph=True)[0] for q in each], 1)

    def pullback(on_outputs: Tensor, on_slopes: Tensor) -> Tensor:
        gradients = torch.autograd.grad((outputs, slopes), parameters, (on_outputs, on_slopes))
        return torch.cat([gradient.flatten(1) for gradient in gradients], 1)

    return outputs.detach(), slopes.detach(), pullback
