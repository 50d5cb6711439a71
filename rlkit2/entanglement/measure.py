"""Measure the gradient geometry of preference pairs under a model, exactly or cheaply.

| method | cost for P pairs (F forward, B backward) | extra memory | error |
| --- | --- | --- | --- |
| loop | 2P F + 2P B, one sequence at a time | two gradients | exact |
| vmap | the same operations, batched | 2 x microbatch gradients | exact |
| ghost | 2 F + 2 B of the whole (micro)batch, and sums over pairs of tokens | activations | exact |
| sketch | as loop | one gradient; two numbers x sketch_dim per pair and tensor | standard error at most sqrt(2 / sketch_dim) of the norms' product |
| head | 1 F of the batch | hidden states | a proxy: only the output matrix; misses entanglement |

"exact" is up to the rounding of the model's number format. Parameters, gradients, training flags and random states stay as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor

from rlkit2.entanglement.geometry import GradientGeometry
from rlkit2.entanglement.gradients import (
    CountSketch,
    Factors,
    Gradients,
    Score,
    cross_inner,
    entering_head,
    ghost_gradients,
    gradient_bytes,
    head_gradients,
    inner_with,
    loop_gradients,
    paired_inner,
    vmap_gradients,
)
from rlkit2.entanglement.scores import (
    PairBatch,
    PairLike,
    Rows,
    SequenceScore,
    as_pair_batch,
    evaluation_mode,
    select_parameters,
)
from rlkit2.errors import ConfigError

METHODS = ("loop", "vmap", "ghost", "sketch", "head")
VMAP_BYTES = 2**28
"""What the gradients of one microbatch of vmap may take where no microbatch is given."""

GHOST_BYTES = 2**27
"""What the gradients of one microbatch of ghost may take where no microbatch is given."""
MANY_NUMBERS = 2**20
MOST_BYTES = 2**31
"""Gradients kept at once (for a Gram matrix, the token products, a probe) may take this much; beyond it sketches are kept, or tokens left out."""

Measured = TypeVar("Measured")
GroupBy = str | Callable[[str], str] | None


class Sizes(TypedDict, total=False):
    """How much is measured at a time and kept.

    Attributes:
        microbatch: pairs at a time; default: 1 for loop and sketch, what fits `VMAP_BYTES` for vmap and `GHOST_BYTES` for ghost, all for head.
        sketch_dim: numbers per sketch; default 1024.
        seed: of the sketch; default 0.
    """

    microbatch: int | None
    sketch_dim: int
    seed: int


class Settings(Sizes, total=False):
    """How gradients are measured: what `pair_geometry`, `gram_matrix`, `update_alignment` and `PairGradients` have in common.

    Attributes:
        method: see the table in this module; default "loop".
    """

    method: str


def pair_geometry(
    logp: Score | tuple[Score, Score],
    params: Mapping[str, Tensor] | None,
    batch: PairLike,
    *,
    group_by: GroupBy = None,
    progress: Callable[[int, int], None] | None = None,
    **settings: Unpack[Settings],
) -> GradientGeometry:
    """Inner products of the gradients of the chosen's and the rejected's score, for every pair.

    Args:
        logp: `causal_lm_logp(model)`, `segment_return(model)`, `segment_logp(policy)`, any functional `(params, item) -> scalar` (loop, vmap
            and sketch), or one such function per side.
        params: parameters that gradients are taken of, by name; None: those of `logp`. A tied tensor counts once.
        batch: P pairs: a `PairBatch`, `(chosen, rejected)` rows, or one mapping of 2P rows, the chosen first.
        group_by: also give the parts by "layer", by "parameter", or by a function of the parameter's name.
        progress: called with (pairs done, all pairs).
        settings: `method`, `microbatch`, `sketch_dim`, `seed`: see `Settings`.

    Returns:
        Numbers `[P]` (`[S, P]` where every parameter has a leading seed axis and the score is `[S]`).

    Raises:
        ConfigError: an unknown method, one that the model does not allow, an empty completion, or a log-probability that is not finite.
    """
    meter = _Meter(logp, params, batch, **settings)
    _grouping(group_by)
    chunks: list[dict[str, Tensor]] = []
    with meter.ready():
        for chosen, rejected in meter.chunks():
            chunks.append(_products(*meter.both(chosen, rejected)))
            if progress:
                progress(sum(chunk[next(iter(chunk))].shape[-1] for chunk in chunks), len(meter.batch))
    by_parameter = {name: torch.cat([chunk[name] for chunk in chunks], -1) for name in chunks[0]}
    return _geometry(meter, by_parameter, group_by)


def _geometry(meter: _Meter, by_parameter: Mapping[str, Tensor], group_by: GroupBy) -> GradientGeometry:
    """The whole and its groups from `_products` by parameter."""
    group = _grouping(group_by)
    grouped: dict[str, Tensor] = {}
    for name, products in by_parameter.items():
        grouped[group(name)] = grouped[group(name)] + products if group(name) in grouped else products
    facts: dict[str, Any] = {
        "method": meter.method,
        "relative_error": meter.relative_error(by_parameter),
        "parameters": meter.description,
    }
    parts = {name: GradientGeometry(*products, **facts) for name, products in grouped.items()}
    return GradientGeometry(*sum(grouped.values()), parts=parts if group_by is not None else {}, **facts)  # type: ignore[misc]


def _products(chosen: Gradients, rejected: Gradients) -> dict[str, Tensor]:
    """`[inner, sqnorm_w, sqnorm_l, gap_w, gap_l]` of a chunk by parameter, each `[5, ..., P]`."""
    return {name: _five(g_w, rejected[name]) for name, g_w in chosen.items()}


def _five(g_w: Tensor | Factors, g_l: Tensor | Factors) -> Tensor:
    if isinstance(g_w, Tensor) and isinstance(g_l, Tensor):
        if g_w.ndim == 2 and len(g_w) > 1 and g_w.numel() > MANY_NUMBERS:  # the products themselves take memory
            return torch.cat([_five(g_w[i : i + 1], g_l[i : i + 1]) for i in range(len(g_w))], -1)
        apart = g_w - g_l
        sides = ((g_w, g_l), (g_w, g_w), (g_l, g_l), (g_w, apart), (g_l, apart))
        return torch.stack([paired_inner(*both) for both in sides])
    products = [paired_inner(*both) for both in ((g_w, g_l), (g_w, g_w), (g_l, g_l))]
    return torch.stack([*products, products[1] - products[0], products[0] - products[2]])


class PairGradients:
    """All gradients of a batch of pairs, kept to answer several questions: their geometry, their Gram matrix, products with a step.

    Memory: 2P gradients (loop, vmap), their activations and output gradients (ghost), 2P sketches (sketch). Arguments: see `pair_geometry`.
    """

    def __init__(
        self,
        logp: Score | tuple[Score, Score],
        params: Mapping[str, Tensor] | None,
        batch: PairLike,
        **settings: Unpack[Settings],
    ) -> None:
        self._meter = _Meter(logp, params, batch, **settings)
        self.chosen, self.rejected = self._meter.all_gradients()

    @property
    def method(self) -> str:
        """How they were taken."""
        return self._meter.method

    def geometry(self, group_by: GroupBy = None) -> GradientGeometry:
        """The geometry of every pair."""
        return _geometry(self._meter, _products(self.chosen, self.rejected), group_by)

    def gram(self, other: PairGradients | None = None) -> Tensor:
        """Inner products of all gradients, `[2P, 2P]`, the chosen first; with `other` its gradients are the columns."""
        columns = (self.chosen, self.rejected) if other is None else (other.chosen, other.rejected)
        blocks = []
        for side in (self.chosen, self.rejected):
            line = [
                sum((cross_inner(side[name], column[name]) for name in side), torch.zeros(())) for column in columns
            ]
            blocks.append(torch.cat(line, -1))
        return torch.cat(blocks, -2)

    def along(self, delta: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """`<gradient, delta>` of every chosen and rejected score, `[P]` each.

        Raises:
            ConfigError: a parameter's change is missing or has another shape.
        """
        for name, p in self._meter.params.items():
            if name not in delta or delta[name].shape != p.shape:
                raise ConfigError(f"delta has no change of shape {tuple(p.shape)} for parameter {name!r}")
        wide = {name: delta[name].to(self._meter.wide) for name in self.chosen}
        if self._meter.sketch is not None:
            sketched = self._meter.sketch({name: step.reshape(1, -1) for name, step in wide.items()})
            wide = {name: step for name, step in sketched.items() if isinstance(step, Tensor)}
        found = [
            torch.stack([inner_with(gradient, wide[name]) for name, gradient in side.items()]).sum(0)
            for side in (self.chosen, self.rejected)
        ]
        return found[0], found[1]


def gram_matrix(
    logp: Score | tuple[Score, Score],
    params: Mapping[str, Tensor] | None,
    batch: PairLike,
    **settings: Unpack[Settings],
) -> Tensor:
    """Inner products of all gradients, `[2P, 2P]` (or `[S, 2P, 2P]`), the P chosen first. Memory: see `PairGradients`.

    Raises:
        ConfigError: see `pair_geometry`.
    """
    return PairGradients(logp, params, batch, **settings).gram()


def update_alignment(
    logp: Score | tuple[Score, Score],
    params: Mapping[str, Tensor] | None,
    batch: PairLike,
    delta: Mapping[str, Tensor],
    **settings: Unpack[Settings],
) -> tuple[Tensor, Tensor]:
    """First-order change of every chosen and rejected score under a real change of the parameters: `<g, delta>`, `[P]` each.

    This is the honest meter under Adam, clipping and weight decay: `delta` is `after - before`, the gradients are taken at `before`.

    Args:
        delta: change of every parameter by name, of the parameter's shape (others are ignored).

    Raises:
        ConfigError: a parameter's change is missing or has another shape; see also `pair_geometry`.
    """
    if settings.get("method", "loop") not in ("loop", "vmap", "ghost"):
        raise ConfigError(f"method={settings['method']!r} of update_alignment must be loop, vmap or ghost")
    return PairGradients(logp, params, batch, **settings).along(delta)


def automatic(measure: Callable[[str], Measured], method: str) -> Measured:
    """What `measure(method)` gives; for "auto" that of ghost where the model allows it, else of loop."""
    if method != "auto":
        return measure(method)
    try:
        return measure("ghost")
    except ConfigError:
        return measure("loop")


def pair_gradients(logp: SequenceScore, batch: PairLike, method: str, **sizes: Unpack[Sizes]) -> PairGradients:
    """`PairGradients` of the score's own parameters; `method` may be "auto": ghost or loop as `automatic`, sketch beyond `MOST_BYTES`."""
    pairs = as_pair_batch(batch)
    if method == "auto" and 2 * len(pairs) * gradient_bytes(logp.params, _length(pairs)) > MOST_BYTES:
        method = "sketch"
    return automatic(lambda name: PairGradients(logp, None, batch, method=name, **sizes), method)


def ches_scores(logp: SequenceScore, params: Mapping[str, Tensor] | None, batch: PairLike) -> Tensor:
    """Centered hidden embedding similarity `<sum h_w, sum h_l> - |sum h_w|^2`, `[P]`, from one forward pass.

    `h` are the last hidden states that predict completion tokens (Razin et al. 2024, "Unintentional unalignment"). It only ranks
    pairs: the higher, the more the chosen is likely to fall.
    """
    meter = _Meter(logp, params, batch, method="head")
    sums = []
    with meter.ready(), torch.no_grad():
        for side in (meter.batch.chosen, meter.batch.rejected):
            hidden = entering_head(logp, meter.params, side).to(meter.wide)
            sums.append((hidden * logp.mask(side)[..., None]).sum(1))
    return (sums[0] * sums[1]).sum(-1) - sums[0].square().sum(-1)


class _Meter:
    """A score, its parameters and a checked batch, with the gradient function of one method."""

    def __init__(
        self,
        logp: Score | tuple[Score, Score],
        params: Mapping[str, Tensor] | None,
        batch: PairLike,
        *,
        method: str = "loop",
        microbatch: int | None = None,
        sketch_dim: int = 1024,
        seed: int = 0,
    ) -> None:
        if method not in METHODS:
            raise ConfigError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
        if microbatch is not None and microbatch < 1:
            raise ConfigError(f"microbatch={microbatch} must be at least 1")
        self.method, self.microbatch = method, microbatch
        self.scores = logp if isinstance(logp, tuple) else (logp, logp)
        sequence = [score for score in self.scores if isinstance(score, SequenceScore)]
        if method in ("ghost", "head") and len(sequence) < 2:
            raise ConfigError(
                f"method={method!r} needs a score of a module, such as causal_lm_logp(model): use loop or vmap for a bare function"
            )
        self.params = select_parameters(params, sequence)
        self.modules = [score.module for score in sequence]
        self.batch = as_pair_batch(batch)
        for score in sequence[:1]:
            self.batch = score.prepare(self.batch)
        dtypes = [p.dtype for p in self.params.values()]
        self.wide = torch.float64 if torch.float64 in dtypes else torch.float32
        self.sketch = CountSketch(self.params, sketch_dim, seed) if method == "sketch" else None
        self._rounding = 8 * max(torch.finfo(dtype).eps for dtype in dtypes)
        numbers = sum(p.numel() for p in self.params.values())
        self.description = f"{len(self.params)} tensors, {numbers:,} numbers"
        self._verified = method != "ghost"

    def relative_error(self, products: Mapping[str, Tensor]) -> float:
        """Standard error of an inner product over the product of the norms, at most, from `_products` by parameter."""
        if self.sketch is None:
            return math.inf if self.method == "head" else self._rounding
        total = sum(products.values())
        assert isinstance(total, Tensor)
        variances = [
            sum((x[a] * x[b] for name, x in products.items() if name in self.sketch.buckets), torch.zeros(()))
            / (total[a] * total[b]).clamp(min=torch.finfo(total.dtype).tiny)
            for a, b in ((1, 2), (1, 1), (2, 2))
        ]
        return self._rounding + math.sqrt(2 / self.sketch.dim * float(torch.stack(variances).max()))

    def ready(self) -> Any:
        """Evaluation mode for the time of the measurement."""
        return evaluation_mode(*self.modules) if self.modules else nullcontext()

    def chunks(self) -> Iterator[tuple[Rows, Rows]]:
        """The pairs, `microbatch` at a time."""
        microbatch = self.microbatch
        if microbatch is None:
            bytes_per_pair = 2 * 4 * sum(p.numel() for p in self.params.values())
            ghost = 2 * gradient_bytes(self.params, _length(self.batch))
            microbatch = {
                "loop": 1,
                "sketch": 1,
                "vmap": max(1, VMAP_BYTES // max(1, bytes_per_pair)),
                "ghost": max(1, GHOST_BYTES // max(1, ghost)),
            }.get(self.method, len(self.batch))
        for start in range(0, len(self.batch), microbatch):
            part = self.batch.select(slice(start, start + microbatch))
            yield part.chosen, part.rejected

    def gradients(self, rows: Rows, side: int) -> Gradients:
        """Gradients of every row of one side (0 chosen, 1 rejected)."""
        score = self.scores[side]
        if self.method in ("loop", "sketch"):
            return loop_gradients(score, self.params, rows, self.sketch)
        if self.method == "vmap":
            return vmap_gradients(score, self.params, rows)
        assert isinstance(score, SequenceScore)
        if self.method == "head":
            return head_gradients(score, self.params, rows)
        found = ghost_gradients(score, self.params, rows)
        if not self._verified:
            self._verify(found, score, rows)
        return found

    def both(self, chosen: Rows, rejected: Rows) -> tuple[Gradients, Gradients]:
        """Gradients of both sides, in one pass where the method works on batches and the rows have one length."""
        alike = all(chosen[name].shape == rejected[name].shape for name in chosen)
        if self.method not in ("vmap", "ghost") or self.scores[0] is not self.scores[1] or not alike:
            return self.gradients(chosen, 0), self.gradients(rejected, 1)
        count = len(next(iter(chosen.values())))
        found = self.gradients({name: torch.cat([chosen[name], rejected[name]]) for name in chosen}, 0)
        return _some_rows(found, slice(0, count)), _some_rows(found, slice(count, None))

    def all_gradients(self) -> tuple[Gradients, Gradients]:
        """Gradients of all rows of both sides."""
        sides: tuple[list[Gradients], list[Gradients]] = ([], [])
        with self.ready():
            for chunk in self.chunks():
                for side, found in zip(sides, self.both(*chunk), strict=True):
                    side.append(found)
        return _joined_rows(sides[0]), _joined_rows(sides[1])

    def _verify(self, found: Gradients, score: SequenceScore, rows: Rows) -> None:
        """Hold the first sequence against autograd: a weight used outside its own module's forward escapes the recorded calls."""
        truth = loop_gradients(score, self.params, {name: tensor[:1] for name, tensor in rows.items()})
        largest = max(float(paired_inner(g, g)) for g in truth.values())
        for name, gradient in truth.items():
            one = _some_rows(found, slice(0, 1))[name]
            gap = float((paired_inner(one, one) - paired_inner(gradient, gradient)).abs())
            if gap > max(1e-3, 16 * self._rounding) * (float(paired_inner(gradient, gradient)) + 1e-6 * largest):
                raise ConfigError(
                    f"the ghost method misses a use of parameter {name!r} outside its own layer: use method='loop' or 'vmap'"
                )
        self._verified = True


def _length(batch: PairBatch) -> int:
    """Tokens or steps of the longest row."""
    return max(x.shape[1] if x.ndim > 1 else 1 for rows in (batch.chosen, batch.rejected) for x in rows.values())


def _some_rows(gradients: Gradients, rows: slice) -> Gradients:
    return {name: g.select(rows) if isinstance(g, Factors) else g[rows] for name, g in gradients.items()}


def _joined_rows(chunks: list[Gradients]) -> Gradients:
    """Chunks of rows behind each other."""
    joined: Gradients = {}
    for name in chunks[0]:
        pieces = [chunk[name] for chunk in chunks]
        factors = [p for p in pieces if isinstance(p, Factors)]
        if len(factors) == len(pieces) and len({f.parts[0].right.shape[1] for f in factors}) == 1:
            joined[name] = Factors.stacked(factors)
        else:
            joined[name] = torch.cat([p.dense() if isinstance(p, Factors) else p for p in pieces])
    return joined


def _grouping(group_by: GroupBy) -> Callable[[str], str]:
    if group_by is None:
        return lambda name: ""
    if callable(group_by):
        return group_by
    if group_by == "parameter":
        return str
    if group_by == "layer":
        return _layer
    raise ConfigError(
        f'group_by={group_by!r} must be None, "layer", "parameter" or a function of the parameter\'s name'
    )


def _layer(name: str) -> str:
    """`transformer.h.0.attn.c_attn.weight` belongs to `transformer.h.0`; without a number, to its module."""
    pieces = name.split(".")
    numbered = next((i for i, piece in enumerate(pieces) if piece.isdigit()), len(pieces) - 2)
    return ".".join(pieces[: numbered + 1]) or name


# --- tokens ----------------------------------------------------------------------------------------------------------------------


def token_geometry(
    logp: SequenceScore,
    params: Mapping[str, Tensor] | None,
    batch: PairLike,
    *,
    pair: int = 0,
    sides: str = "wl",
) -> Tensor:
    """Inner products of the gradients of single tokens (or steps), `K[i, j] = <g_w^i, g_l^j>`: `[T_w, T_l]`, completion tokens only.

    They add up to the pair's `inner`; `sides="ww"` and `"ll"` give the parts of the squared norms. Memory: T_w + T_l gradients.

    Args:
        pair: which pair of the batch.
        sides: first and second side, each "w" or "l".

    Raises:
        ConfigError: no such pair or side.
    """
    if len(sides) != 2 or not set(sides) <= {"w", "l"}:
        raise ConfigError(f'sides={sides!r} must be two of "w" (chosen) and "l" (rejected), such as "wl"')
    per_side = _token_gradients(logp, params, batch, pair, set(sides))
    return per_side[sides[0]] @ per_side[sides[1]].mT


def token_rates(
    logp: SequenceScore,
    params: Mapping[str, Tensor] | None,
    batch: PairLike,
    d_w: float,
    d_l: float,
    *,
    pair: int = 0,
) -> tuple[Tensor, Tensor]:
    """Rate of every token's log-probability when the loss takes a step on its own pair: `[T_w]` and `[T_l]`; they add up to `rates`."""
    per_side = _token_gradients(logp, params, batch, pair, {"w", "l"})
    step = d_w * per_side["w"].sum(0) - d_l * per_side["l"].sum(0)
    return per_side["w"] @ step, per_side["l"] @ step


def token_cosines(inner_wl: Tensor, inner_ww: Tensor, inner_ll: Tensor) -> Tensor:
    """Cosines between single tokens' gradients, `[T_w, T_l]`, from the three products of `token_geometry`."""
    norms = inner_ww.diagonal().sqrt()[:, None] * inner_ll.diagonal().sqrt()[None]
    return torch.where(norms > 0, inner_wl / norms.clamp(min=1e-300 if norms.dtype == torch.float64 else 1e-30), 0)


def _token_gradients(
    logp: SequenceScore, params: Mapping[str, Tensor] | None, batch: PairLike, pair: int, sides: set[str]
) -> dict[str, Tensor]:
    """`[T, D]` gradients of the counted terms of one pair, per side."""
    meter = _Meter(logp, params, batch)
    if not 0 <= pair < len(meter.batch):
        raise ConfigError(f"pair={pair} is not one of the batch's {len(meter.batch)} pairs")
    one = meter.batch.select(slice(pair, pair + 1))
    leaves = {name: p.detach().requires_grad_() for name, p in meter.params.items()}
    found: dict[str, Tensor] = {}
    with meter.ready(), torch.enable_grad():
        for side in sorted(sides):
            rows = one.chosen if side == "w" else one.rejected
            terms = logp.terms(leaves, rows)[0][logp.mask(rows)[0]]
            eye = torch.eye(len(terms), dtype=terms.dtype, device=terms.device)
            gradients = torch.autograd.grad(
                terms, list(leaves.values()), eye, is_grads_batched=True, allow_unused=True, materialize_grads=True
            )
            found[side] = torch.cat([g.to(meter.wide).flatten(1) for g in gradients], 1)
    return found
