"""Per-sequence gradients in the form each method can afford, and the inner products between them.

A set of B gradients is a `Gradients`: for every parameter either a dense matrix `[B, n]` (`[B, S, n]` with a seed axis; a sketch is
dense with n = the sketch's size) or the two factors of a sum of outer products, `dW = sum_t left_t right_t^T`, whose inner products
need no matrix of the weights' size (the ghost trick).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlkit2.entanglement.scores import Rows, SequenceScore
from rlkit2.errors import ConfigError

Score = Callable[[Mapping[str, Tensor], Rows], Tensor]
"""`(params, item) -> scalar` (or `[S]` where every parameter has a leading seed axis)."""


@dataclass(frozen=True)
class Outer:
    """`sum_t left_t right_t^T` per sequence: `left [B, T, rows of W]` and `right [B, T, columns of W]`.

    With `size` the left factors are unit vectors of that size and `left [B, T]` holds their indices (-1: none), as for an embedding.
    """

    left: Tensor
    right: Tensor
    size: int | None = None

    def left_products(self, other: Outer) -> Tensor:
        """`<left_t, other.left_u>`, `[B, T, U]`, of as many sequences as the larger of the two holds."""
        if self.size is None and other.size is None:
            return self.left @ other.left.mT
        if self.size is not None and other.size is not None:
            same = self.left[:, :, None] == other.left[:, None, :]
            return (same & (self.left >= 0)[:, :, None]).to(self.right.dtype)
        if self.size is not None:
            return other.left_products(self).mT
        count = max(len(self.left), len(other.left))
        index = other.left.expand(count, -1)[:, None, :].expand(-1, self.left.shape[1], -1)
        return self.left.expand(count, -1, -1).gather(2, index.clamp(min=0)) * (index >= 0)

    def add_to(self, dense: Tensor) -> None:
        """Add the sum to `dense [B, rows of W, columns of W]` in place."""
        if self.size is None:
            dense.baddbmm_(self.left.mT, self.right)
            return
        for one, index, right in zip(dense, self.left, self.right, strict=True):
            real = index >= 0
            one.index_add_(0, index[real], right[real])

    def along(self, direction: Tensor) -> Tensor:
        """`<sum_t left_t right_t^T, direction>`, `[B]`."""
        pulled = direction[self.left.clamp(min=0)] if self.size is not None else self.left @ direction
        products = (pulled * self.right).sum(-1)
        return (products if self.size is None else products * (self.left >= 0)).sum(-1)

    def select(self, rows: slice) -> Outer:
        """Some of the sequences."""
        return Outer(self.left[rows], self.right[rows], self.size)


@dataclass(frozen=True)
class Factors:
    """A gradient per sequence that is a sum of outer products, one part for each use of the parameter (a tied one has several)."""

    parts: tuple[Outer, ...]

    def dense(self) -> Tensor:
        """The gradients themselves, flattened: `[B, n]`."""
        first = self.parts[0]
        rows = first.size if first.size is not None else first.left.shape[-1]
        found = first.right.new_zeros(len(first.right), rows, first.right.shape[-1])
        for part in self.parts:
            part.add_to(found)
        return found.flatten(1)

    def __add__(self, other: Factors) -> Factors:
        return Factors(self.parts + other.parts)

    def select(self, rows: slice) -> Factors:
        """Some of the sequences."""
        return Factors(tuple(part.select(rows) for part in self.parts))

    @staticmethod
    def stacked(chunks: Sequence[Factors]) -> Factors:
        """The sequences of all chunks behind each other."""
        parts = zip(*(chunk.parts for chunk in chunks), strict=True)
        return Factors(
            tuple(
                Outer(torch.cat([p.left for p in same]), torch.cat([p.right for p in same]), same[0].size)
                for same in parts
            )
        )


Gradients = dict[str, Tensor | Factors]


def _inner(first: Factors, second: Factors) -> Tensor:
    found = [
        (one.left_products(other) * (one.right @ other.right.mT)).sum((1, 2))
        for one in first.parts
        for other in second.parts
    ]
    return torch.stack(found).sum(0)


def paired_inner(first: Tensor | Factors, second: Tensor | Factors) -> Tensor:
    """`<first_i, second_i>`: `[B]`, or `[S, B]` with a seed axis."""
    if isinstance(first, Factors) and isinstance(second, Factors):
        return _inner(first, second)
    first, second = _both_dense(first, second)
    return (first * second).sum(-1).movedim(0, -1)


def cross_inner(first: Tensor | Factors, second: Tensor | Factors) -> Tensor:
    """`<first_i, second_j>`: `[A, B]`, or `[S, A, B]` with a seed axis."""
    if isinstance(first, Factors) and isinstance(second, Factors):
        count = len(first.parts[0].right)
        return torch.stack([_inner(first.select(slice(i, i + 1)), second) for i in range(count)])
    first, second = _both_dense(first, second)
    return first.movedim(0, -2) @ second.movedim(0, -2).mT


def _both_dense(first: Tensor | Factors, second: Tensor | Factors) -> tuple[Tensor, Tensor]:
    """One side may have been cheaper as factors than the other, where their rows differ in length."""
    sides = [side.dense() if isinstance(side, Factors) else side for side in (first, second)]
    return sides[0], sides[1]


def inner_with(gradients: Tensor | Factors, direction: Tensor) -> Tensor:
    """`<gradient_i, direction>` for a direction of the parameter's own shape: `[B]`, or `[S, B]` with a seed axis."""
    if isinstance(gradients, Factors):
        return torch.stack([part.along(direction) for part in gradients.parts]).sum(0)
    return (gradients * direction.reshape(gradients.shape[1:])).sum(-1).movedim(0, -1)


def smaller_form(left: Tensor, right: Tensor) -> Tensor | Factors:
    """The sum of outer products as factors, or as a matrix where that takes fewer numbers."""
    steps, rows, columns = left.shape[1], left.shape[-1], right.shape[-1]
    if rows * columns <= steps * (rows + columns):
        return (left.mT @ right).flatten(1)
    return Factors((Outer(left, right),))


def gradient_bytes(params: Mapping[str, Tensor], length: int) -> int:
    """About what one sequence's gradients take in the ghost method, for sequences of that length."""
    numbers = 0
    for p in params.values():
        rows, columns = (p.shape[0], p.numel() // p.shape[0]) if p.ndim > 1 else (1, p.numel())
        numbers += min(p.numel(), length * (rows + columns))
    return 4 * numbers


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: products of half-precision numbers are summed in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# --- loop and vmap ---------------------------------------------------------------------------------------------------------------


def loop_gradients(
    score: Score, params: Mapping[str, Tensor], rows: Rows, compress: Callable[[Gradients], Gradients] | None = None
) -> Gradients:
    """One backward pass per sequence; `compress` (a sketch) sees each gradient before the next one is made."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    stacked: list[Gradients] = []
    for i in range(_count(rows)):
        with torch.enable_grad():
            value = score(leaves, {name: tensor[i] for name, tensor in rows.items()})
            found = torch.autograd.grad(value.sum(), list(leaves.values()), materialize_grads=True, allow_unused=True)
        one: Gradients = {name: _wide(g).reshape(1, *value.shape, -1) for name, g in zip(leaves, found, strict=True)}
        stacked.append(compress(one) if compress else one)
    return {name: torch.cat([row[name] for row in stacked]) for name in stacked[0]}  # type: ignore[misc]


def vmap_gradients(score: Score, params: Mapping[str, Tensor], rows: Rows) -> Gradients:
    """All sequences in one batched backward pass."""

    def summed(parameters: dict[str, Tensor], item: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        value = score(parameters, item)
        return value.sum(), value

    detached = {name: p.detach() for name, p in params.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batching rule and fall back to a loop
        found, values = vmap(grad(summed, has_aux=True), in_dims=(None, 0))(detached, dict(rows))
    return {name: _wide(g).reshape(*values.shape, -1) for name, g in found.items()}


def _count(rows: Rows) -> int:
    return len(next(iter(rows.values())))


# --- count sketch ----------------------------------------------------------------------------------------------------------------


class CountSketch:
    """Signed hashing of every tensor's coordinates into `dim` buckets: unbiased inner products (Charikar, Chen and Farach-Colton 2002).

    The variance of `<x, y>` is at most `2/dim * sum |x_t|^2 |y_t|^2` over the tensors t with more than `dim` numbers; smaller ones are kept as
    they are. The hash of a tensor depends only on the seed and its name. Memory: one integer per parameter for the hash.
    """

    def __init__(self, params: Mapping[str, Tensor], dim: int, seed: int) -> None:
        if dim < 1:
            raise ConfigError(f"sketch_dim={dim} must be at least 1")
        self.dim = dim
        self.buckets = {name: self._hash(name, p, seed) for name, p in params.items() if p.numel() > dim}

    def _hash(self, name: str, parameter: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ (seed * 0x9E3779B1 & 0xFFFFFFFF))
        buckets = torch.randint(2 * self.dim, (parameter.numel(),), generator=generator)
        return buckets.to(parameter.device)  # the upper half is the negative sign

    def __call__(self, gradients: Gradients) -> Gradients:
        return {name: self._compress(name, gradient) for name, gradient in gradients.items()}

    def _compress(self, name: str, gradient: Tensor | Factors) -> Tensor:
        assert isinstance(gradient, Tensor)
        buckets = self.buckets.get(name)
        if buckets is None:
            return gradient
        if gradient.shape[-1] != len(buckets):
            raise ConfigError(f"the sketch does not support a seed axis in front of {name}: measure seeds one by one")
        halves = gradient.new_zeros(*gradient.shape[:-1], 2 * self.dim).index_add_(-1, buckets, gradient)
        return halves[..., : self.dim] - halves[..., self.dim :]


# --- ghost -----------------------------------------------------------------------------------------------------------------------


@contextmanager
def _recorded_calls(modules: list[nn.Module]) -> Iterator[list[tuple[nn.Module, tuple[Any, ...], Tensor]]]:
    """Every call of the modules as (module, positional inputs, output)."""
    calls: list[tuple[nn.Module, tuple[Any, ...], Tensor]] = []

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        calls.append((module, inputs, output))

    handles = [module.register_forward_hook(record) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def ghost_gradients(score: SequenceScore, params: Mapping[str, Tensor], rows: Rows) -> Gradients:
    """One forward and one backward pass for all sequences: factors for linear and embedding weights, dense vectors for the rest.

    Rules: linear layers and embeddings as outer products (a tied tensor's uses are joined, so the cross terms are there); any other
    module with own parameters (norms) by its own vector-Jacobian product per sequence.

    Raises:
        ConfigError: a layer mixes the sequences or a parameter is used outside a module's forward; use method="loop" there.
    """
    count = _count(rows)
    canonical = {id(p): name for name, p in score.module.named_parameters()}
    owners = {
        module: {
            local: canonical[id(p)] for local, p in module.named_parameters(recurse=False) if canonical[id(p)] in params
        }
        for module in score.module.modules()
    }
    head = score.head if score.hidden is not None else None
    gradients: Gradients = {}
    owners = {module: names for module, names in owners.items() if names and module is not head}
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    with torch.enable_grad(), _recorded_calls(list(owners)) as calls:
        total = score.terms(leaves, rows).sum() if head is None else score.hidden_states(leaves, rows)
    for module, _, output in calls:
        if not isinstance(output, Tensor):
            raise ConfigError(
                f"{type(module).__name__} has parameters of its own but returns no tensor: use method='loop' for this model"
            )
    cotangent = None
    if head is not None:
        names = {local: canonical[id(p)] for local, p in head.named_parameters(recurse=False)}
        cotangent, found = output_layer(head, total.detach(), rows)
        gradients |= {names[local]: g for local, g in found.items() if names[local] in params}
    deltas = torch.autograd.grad(
        total, [output for _, _, output in calls], cotangent, materialize_grads=True, allow_unused=True
    )
    with torch.no_grad():
        for (module, inputs, _), delta in zip(calls, deltas, strict=True):
            _check_rows(module, inputs, delta, count)
            for local, gradient in _layer_gradients(
                module, inputs, _wide(delta.detach()), owners[module], leaves
            ).items():
                name = owners[module][local]
                gradients[name] = _joined(gradients[name], gradient) if name in gradients else gradient
    missing = set(params) - set(gradients)
    if missing:
        raise ConfigError(f"parameter {sorted(missing)[0]!r} is not used by a module's own forward: use method='loop'")
    return {name: gradients[name] for name in params}


def _check_rows(module: nn.Module, inputs: tuple[Any, ...], delta: Tensor, count: int) -> None:
    if not inputs or not isinstance(inputs[0], Tensor) or len(inputs[0]) != count or len(delta) != count:
        raise ConfigError(
            f"{type(module).__name__} does not keep one row per sequence: use method='loop' for this model"
        )


def _joined(first: Tensor | Factors, second: Tensor | Factors) -> Tensor | Factors:
    """The sum of two gradients of one parameter."""
    if isinstance(first, Factors) and isinstance(second, Factors):
        return first + second
    if isinstance(first, Factors):
        first, second = second, first
    if isinstance(second, Tensor):
        return first + second  # type: ignore[operator]
    assert isinstance(first, Tensor)
    for part in second.parts:
        columns = part.right.shape[-1]
        part.add_to(first.view(len(first), -1, columns))
    return first


def output_layer(head: nn.Module, hidden: Tensor, rows: Rows) -> tuple[Tensor, Gradients]:
    """Derivatives of every row's summed log-probability through the output layer, one row at a time, so that logits `[T, V]` exist once.

    Args:
        head: a linear layer `[V, d]` whose outputs are the logits.
        hidden: its inputs at the positions that predict tokens 1..T-1, `[B, T-1, d]`.
        rows: `input_ids` and `completion_mask`.

    Returns:
        The derivative with respect to `hidden`, and the gradients of the layer's parameters.
    """
    assert isinstance(head, nn.Linear)
    weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    mask, ids = rows["completion_mask"][:, 1:].bool(), rows["input_ids"][:, 1:]
    cotangent, steps = torch.zeros_like(hidden), int(mask.sum(1).max())
    as_matrix = weight.numel() <= steps * sum(weight.shape)
    wide = _wide(hidden[:1, :1]).dtype
    count, (size, width) = len(hidden), weight.shape
    dense = weight.new_zeros(count if as_matrix else 0, size, width, dtype=wide)
    left, right = (weight.new_zeros(0 if as_matrix else count, steps, n, dtype=wide) for n in (size, width))
    sums = None if bias is None else weight.new_zeros(count, size, dtype=wide)
    for i in range(count):
        h, places = hidden[i, mask[i]], mask[i].nonzero()[:, 0]
        z = nn.functional.linear(h, weight, bias).to(wide)
        z.sub_(z.amax(-1, keepdim=True)).exp_()
        z.div_(z.sum(-1, keepdim=True)).neg_()
        z[torch.arange(len(places), device=z.device), ids[i, places]] += 1  # e_y - p
        cotangent[i, places] = (z.to(weight.dtype) @ weight).to(hidden.dtype)
        if as_matrix:
            torch.mm(z.T, h.to(wide), out=dense[i])
        else:
            left[i, : len(places)], right[i, : len(places)] = z, h.to(wide)
        if sums is not None:
            sums[i] = z.sum(0)
    found: Gradients = {"weight": dense.flatten(1) if as_matrix else Factors((Outer(left, right),))}
    return cotangent, found if sums is None else {**found, "bias": sums}


def _layer_gradients(
    module: nn.Module, inputs: tuple[Any, ...], delta: Tensor, names: Mapping[str, str], params: Mapping[str, Tensor]
) -> Gradients:
    """Gradients of one call of one module with respect to its own parameters (by local name)."""
    conv1d = type(module).__name__ == "Conv1D"  # transformers' GPT-2 layer: a linear layer with weight [in, out]
    if isinstance(module, nn.Linear) or conv1d:
        x = _wide(inputs[0].detach())
        steps, outs = x.reshape(len(x), -1, x.shape[-1]), delta.reshape(len(x), -1, delta.shape[-1])
        found: Gradients = {
            "weight": smaller_form(steps, outs) if conv1d else smaller_form(outs, steps),
            "bias": outs.sum(1),
        }
    elif isinstance(module, nn.Embedding):
        tokens = inputs[0].reshape(len(inputs[0]), -1)
        if module.padding_idx is not None:
            tokens = tokens.masked_fill(tokens == module.padding_idx, -1)
        right = delta.reshape(len(delta), -1, delta.shape[-1])
        found = {"weight": Factors((Outer(tokens.expand(len(delta), -1), right, module.num_embeddings),))}
    else:
        own = {local: params[name].detach() for local, name in names.items()}
        in_dims = tuple(0 if isinstance(x, Tensor) and x.ndim and len(x) == len(delta) else None for x in inputs)

        def pull(cotangent: Tensor, *one: Any) -> dict[str, Tensor]:
            batched = tuple(x.unsqueeze(0) if d == 0 else x for x, d in zip(one, in_dims, strict=True))
            pullback = vjp(lambda p: functional_call(module, p, batched), own)[1]
            return pullback(cotangent.unsqueeze(0))[0]  # type: ignore[no-any-return]

        detached = tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
        pulled = vmap(pull, in_dims=(0, *in_dims))(delta.to(detached[0].dtype), *detached)
        found = {local: _wide(g).flatten(1) for local, g in pulled.items()}
    return {local: gradient for local, gradient in found.items() if local in names}


# --- the output layer alone ------------------------------------------------------------------------------------------------------


def head_states(score: SequenceScore, params: Mapping[str, Tensor], rows: Rows) -> tuple[Tensor, Tensor]:
    """Inputs `[B, T-1, d]` and logits `[B, T-1, V]` of the output layer at the positions that predict tokens 1..T-1."""
    if score.head is None:
        raise ConfigError(
            "the model has no output layer named lm_head and no get_output_embeddings(): use another method"
        )
    with torch.no_grad(), _recorded_calls([score.head]) as calls:
        score.terms(params, rows)
    _, inputs, logits = calls[-1]
    return _wide(inputs[0][:, :-1]), _wide(logits[:, :-1])


def entering_head(score: SequenceScore, params: Mapping[str, Tensor], rows: Rows) -> Tensor:
    """Inputs `[B, T-1, d]` of the output layer at the positions that predict tokens 1..T-1, without logits where the model allows it."""
    return head_states(score, params, rows)[0] if score.hidden is None else score.hidden_states(params, rows)


def head_gradients(score: SequenceScore, params: Mapping[str, Tensor], rows: Rows) -> Gradients:
    """Gradients of the output matrix as an output map only, from one forward pass: `sum_t (e_y - p)_t h_t^T`.

    A proxy: it leaves out every other layer (and the input side of tied embeddings) and overlooks entanglement that the truth shows.
    """
    hidden, logits = head_states(score, params, rows)
    mask = score.mask(rows)[..., None]
    residual = logits.softmax(-1).neg_()
    residual.scatter_add_(2, rows["input_ids"][:, 1:, None], torch.ones_like(residual[..., :1]))
    return {"head": Factors((Outer(residual * mask, hidden),))}
