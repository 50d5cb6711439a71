"""Norms of canonical forms and the distances they induce."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from rlkit2.errors import ConfigError, RewardError
from rlkit2.fields import Checked
from rlkit2.guard import guarded
from rlkit2.rewards.arrays import Array, Scalar, give_back, power_of_two, to_float
from rlkit2.rewards.canonical import canonicalize
from rlkit2.rewards.mdp import RewardWarning, TabularMDP
from rlkit2.rewards.minimal import P
from rlkit2.rewards.planning import return_ranges

NormName: TypeAlias = Literal["l1", "l2", "linf", "weighted_l1", "weighted_l2", "weighted_linf", "range", "none"]
NORMS: tuple[NormName, ...] = get_args(NormName)
TRIVIAL_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of a form whose reward is not known
_ROUNDINGS = {torch.float64: 64, torch.float32: 16}
NEAR = (
    1 / 16
)  # of the squared sizes of two rows: a smaller squared distance is not taken from their product, which keeps all but 2 digits of it
_PAIRS = 1024  # rows that are subtracted at once


def rounding(dtype: torch.dtype, discount: float) -> float:
    """How large a canonical form rounding alone makes, as a share of the reward's size: a potential as large as `max |R| / (1 - discount)` is
    taken out."""
    return _ROUNDINGS[dtype] * torch.finfo(dtype).eps / (1 - discount)


@dataclass(frozen=True)
class Norm(Checked):
    """A norm on canonical forms, `[..., S, A]` or `[..., S, A, S']`.

    `l1, l2, linf` run over all entries (s, a, s'), so that a form constant in s' counts each of its entries S times; `weighted_l1`,
    `weighted_l2` weight the entries by the transition probabilities. `weights` (`[S, A]`, multiplied by the transition probabilities where
    the form depends on s', or `[S, A, S']`) replaces them, also for `l1` and `l2`; `linf` is then taken over the support. `range` is the
    largest minus the smallest return of any policy, the one norm that needs planning. `weighted_linf`, `max tau |x|`, is not
    the limit of the other weighted norms; it exists for reproduction, behind `legacy`.
    """

    name: NormName
    mdp: TabularMDP | None = None
    weights: Any = None
    legacy: bool = False
    role: Literal["norm", "distance"] = "norm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.role == "distance" and self.name == "none":
            raise ConfigError("distance 'none' would be 1 for every pair; only a norm can be 'none'")
        if self.name == "weighted_linf" and not self.legacy:
            raise ConfigError(
                f"{self.role} 'weighted_linf' is not a limit of the weighted norms; use 'linf', or legacy=True to reproduce"
            )
        if self.mdp is None and (self.name == "range" or (self.name.startswith("weighted") and self.weights is None)):
            raise ConfigError(f"{self.role} {self.name!r} needs the dynamics; pass mdp")
        if self.weights is not None and self.name in ("range", "weighted_linf"):
            raise ConfigError(f"{self.role} {self.name!r} takes no weights; use 'l1' or 'l2' with them")

    @property
    def order(self) -> float:
        """p."""
        return float({"1": 1, "2": 2, "f": float("inf")}[self.name[-1]])

    def embed(self, form: Tensor, axes: int) -> Tensor:
        """`[..., n]` whose plain p-norm is this norm of `form`, whose last `axes` axes (2 or 3) are the form's own."""
        weights = self._weights(form, axes)
        if weights is not None:
            if self.order == float("inf"):
                form = form * (weights if self.name == "weighted_linf" else weights > 0)
            else:
                form = form * (weights if self.order == 1 else weights.sqrt())
        elif axes == 2 and self.order != float("inf"):
            form = form * form.shape[-2] ** (1 / self.order)
        return form.flatten(-axes)

    def _weights(self, form: Tensor, axes: int) -> Tensor | None:
        """The weights of the entries, broadcastable to the form's own axes; None where every (s, a, s') counts once."""
        if self.weights is None:
            if not self.name.startswith("weighted") or self.mdp is None:
                return None
            if axes == 3:
                return self.mdp.dense.to(form)
            return (
                self.mdp.dense.to(form).amax(-1) if self.name == "weighted_linf" else torch.ones_like(form[..., :1, :1])
            )
        weights = to_float(self.weights, "weights").to(form)
        if bool((weights < 0).any()):
            raise RewardError(f"weights{(weights < 0).nonzero()[0].tolist()} is negative; weights must be at least 0")
        own = tuple(form.shape[-axes:])
        if tuple(weights.shape) not in (own[:2], (*own[:2], own[0])):
            raise RewardError(f"weights has shape {list(weights.shape)}; give {list(own[:2])} or {[*own[:2], own[0]]}")
        if axes == 2:
            return weights if weights.ndim == 2 else weights.sum(-1)
        if weights.ndim == 2:
            if self.mdp is None:
                raise ConfigError(
                    "weights [S, A] on a form over (s, a, s') need the dynamics; pass mdp or weights [S, A, S']"
                )
            return weights[..., None] * self.mdp.dense.to(form)
        return weights

    def __call__(self, form: Tensor, axes: int) -> Tensor:
        """The norm of every form of the batch, `[...]`; 1 for `none`."""
        if self.name == "none":
            return form.new_ones(form.shape[:-axes])
        if self.name == "range" and self.mdp is not None:
            expected = form if axes == 2 else self.mdp.dynamics.expected(form)
            worst, best = return_ranges(self.mdp, expected)
            return best - worst
        size: Tensor = torch.linalg.vector_norm(self.embed(form, axes), self.order, dim=-1)
        return size

    def pairwise(self, forms: Tensor, axes: int) -> Tensor:
        """`m(x_i - x_j)` of all pairs of `forms [K, ...]`, `[K, K]`, every one with the digits of a difference."""
        if self.name == "range":
            result = forms.new_zeros(len(forms), len(forms))
            for i in range(len(forms)):
                row = self(forms[i] - forms[i:], axes)
                result[i, i:], result[i:, i] = row, row
            return result
        rows = self.embed(forms, axes)
        if self.order == 2:
            power = power_of_two(rows.abs().amax())
            return euclidean_distances(rows / power) * power
        return torch.cdist(rows, rows, p=self.order)


def euclidean_distances(rows: Tensor, levels: int = 3) -> Tensor:
    """`|x_i - x_j|` of all pairs of `rows [K, n]`, `[K, K]`, by one matrix product, with the digits of differences.

    `|x|^2 + |y|^2 - 2 x.y` loses digits where x and y are nearer to each other than to the origin. Such rows are taken again, group by group, from
    an origin in their midst; after `levels` of that the few pairs that are still near are subtracted.
    """
    squares = rows.square().sum(1)
    sizes = squares[:, None] + squares
    gaps = torch.addmm(sizes, rows, rows.mT, alpha=-2)
    gaps = torch.maximum(
        gaps, gaps.mT
    )  # sums of a product may be added up in another order above and below the diagonal
    near = gaps < NEAR * sizes
    near.fill_diagonal_(False)
    found = gaps.clamp_(min=0).sqrt_()
    found.fill_diagonal_(0)
    first, second = near.triu().nonzero(as_tuple=True)
    if not len(first):
        return found
    if not levels:
        for i, j in zip(torch.split(first, _PAIRS), torch.split(second, _PAIRS), strict=True):
            found[i, j] = found[j, i] = torch.linalg.vector_norm(rows[i] - rows[j], dim=1)
        return found
    count, group = connected_components(sp.coo_array(near.cpu().numpy()), directed=False)
    for members in (np.flatnonzero(group == number) for number in range(count)):
        if len(members) > 1:
            index = torch.from_numpy(members).to(rows.device)
            block = index[:, None], index
            centre = rows[index[found[block].median(1).values.argmin()]]
            found[block] = torch.where(near[block], euclidean_distances(rows[index] - centre, levels - 1), found[block])
    return found


def standardized(
    form: Tensor, axes: int, norm: Norm, magnitude: Tensor | float, tol: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`(s, n, trivial)` for a batch of forms: `s = form / n`, or 0 where `max |form|` or n is at most `tol * magnitude`.

    No gradient is ever NaN.
    """
    tol = TRIVIAL_TOLERANCE[form.dtype] if tol is None else tol
    size = norm(form, axes)
    trivial = (form.detach().abs().flatten(-axes).amax(-1) <= tol * magnitude) | (size.detach() <= tol * magnitude)
    divisor = torch.where(trivial, torch.ones_like(size), size)
    kept = (~trivial).reshape(*trivial.shape, *[1] * axes)
    scaled = form / divisor.reshape(*divisor.shape, *[1] * axes)
    return torch.where(kept, scaled, torch.zeros_like(scaled)), size, trivial


def warn_trivial(form: Tensor, axes: int, length: Tensor, size: Tensor, trivial: Tensor, names: Sequence[str]) -> None:
    """Warn of rewards that the threshold decided to be trivial, not an exact 0; `length` is the norm of the form."""
    least = torch.minimum(form.detach().abs().flatten(-axes).amax(-1), length.detach())
    share = (least / torch.where(size > 0, size, 1.0)).reshape(-1)
    for index in (trivial.reshape(-1) & (share > 0)).nonzero().squeeze(1).tolist():
        name = names[index] if len(names) == len(share) else names[0]
        warnings.warn(
            f"{name} is taken to be trivial: what is left of it, {float(share[index]):.1e} of its size, may be rounding; "
            "tol sets the threshold",
            RewardWarning,
            stacklevel=4,
        )


@guarded(RewardError)
def standardize(
    canonical: Array,
    norm: NormName = "l2",
    *,
    mdp: TabularMDP | None = None,
    weights: Array | None = None,
    tol: float | None = None,
    magnitude: float = 1.0,
    legacy: bool = False,
) -> tuple[Any, Scalar, bool]:
    """Divide a canonical form by its norm: `(standardized, norm_value, trivial)`.

    A form with `max |c|` or norm at most `tol * magnitude` is trivial (all policies are equal) and becomes 0. `magnitude` is the `max |R|` of the
    reward it came from; `tol` is 1e-9 in float64 and 1e-4 in float32 unless given.

    Args:
        canonical: `[S, A]` or `[S, A, S']`.
        norm: one of `NORMS`; see `Norm`. `mdp` is needed for the weighted norms and `range`.

    Raises:
        ConfigError: unknown norm or missing dynamics. RewardError: wrong shapes or non-finite entries.
    """
    form = to_float(canonical, "canonical")
    if form.ndim not in (2, 3) or (form.ndim == 3 and form.shape[0] != form.shape[2]):
        raise RewardError(f"canonical has shape {list(form.shape)}; give [S, A] or [S, A, S']")
    process = mdp.to(form.dtype) if mdp is not None else None
    scaled, size, trivial = standardized(form, form.ndim, Norm(norm, process, weights, legacy), magnitude, tol)
    return give_back(scaled, canonical), give_back(size, canonical), bool(trivial)


@guarded(RewardError)
def minimal_norm(
    reward: Array, mdp: TabularMDP, *, p: P = 2, kind: Literal["minimal", "minimal_potential"] = "minimal"
) -> Scalar:
    """The optimal value of the minimal form: the smallest `p`-norm over all rewards equivalent to `reward` (`[S, A, S']`, `[S, A]`, `[S]`).

    Minimisers of p = 1 and "inf" need not be unique, their value is. Norms sum over all (s, a, s'), the weighted ones by probability.
    """
    form = canonicalize(torch.as_tensor(reward), mdp, kind, p=p)
    full = form if form.ndim == 3 else form[..., None].expand(mdp.dense.shape)
    tau = mdp.dense.to(full)
    if p == "inf":
        value = full.abs().amax()
    elif p in (1, "weighted_1"):
        value = (full.abs() * (tau if p == "weighted_1" else 1)).sum()
    else:
        power = power_of_two(full.detach().abs().amax())
        value = ((full / power).square() * (tau if p == "weighted_2" else 1)).sum().sqrt() * power
    return give_back(value, reward)  # type: ignore[no-any-return]
