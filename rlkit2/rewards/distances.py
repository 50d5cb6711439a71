"""Distances between reward functions in a finite process: STARC, EPIC, DARD, SRRD."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from rlkit2.errors import ConfigError, RewardError
from rlkit2.fields import Checked, NonNegative
from rlkit2.guard import guarded
from rlkit2.rewards.arrays import Array, Scalar, any_floating, give_back, is_torch, power_of_two, result_dtype, to_float
from rlkit2.rewards.canonical import Canonicalization, Canonicalizer, common_process
from rlkit2.rewards.matrix import RewardDistanceMatrix, named_rewards
from rlkit2.rewards.mdp import TabularMDP
from rlkit2.rewards.minimal import P
from rlkit2.rewards.norms import NEAR, Norm, NormName, rounding, standardized, warn_trivial

Scale: TypeAlias = Literal["starc", "half", "angle"]
TrivialRule: TypeAlias = Literal["zero", "nan", "raise"]
_EVEN = (("l2", "l2"), ("weighted_l2", "weighted_l2"))


@dataclass(frozen=True)
class MetricOptions(Checked):
    """What makes a metric: the keyword arguments of `starc_distance` and `starc_matrix`, which explain them."""

    canonicalization: Canonicalization = "val"
    norm: NormName = "l2"
    distance: NormName = "l2"
    policy: Any = None
    weights: Any = None
    scale: Scale = "starc"
    trivial: TrivialRule = "zero"
    p: P = 2
    tol: NonNegative | None = None
    legacy: bool = False
    restrict_to_reachable: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale == "angle" and (self.norm, self.distance) not in _EVEN:
            raise ConfigError("scale 'angle' needs norm and distance both 'l2' or both 'weighted_l2'")
        if self.canonicalization.startswith("minimal") and self.p not in (2, "weighted_2") and not self.legacy:
            raise ConfigError(
                f"the minimal form for p={self.p!r} need not be unique nor linear; use p=2 or 'weighted_2', or minimal_norm for the value"
            )
        if self.weights is not None and not self._weighted:
            raise ConfigError("weights are used by neither the norm nor the distance; choose 'l1' or 'l2'")

    @property
    def _weighted(self) -> set[NormName]:
        return {self.norm, self.distance} - {"none", "range"}

    def metric(self, mdp: TabularMDP) -> Metric:
        """The metric on a process."""

        def part(name: NormName, role: Literal["norm", "distance"]) -> Norm:
            return Norm(name, mdp, self.weights if name in self._weighted else None, self.legacy, role)

        canonical = Canonicalizer(mdp, self.canonicalization, self.policy, self.p)
        return Metric(
            canonical, part(self.norm, "norm"), part(self.distance, "distance"), self.scale, self.trivial, self.tol
        )


class MetricArguments(TypedDict, total=False):
    """`MetricOptions` as keyword arguments."""

    canonicalization: Canonicalization
    norm: NormName
    distance: NormName
    policy: Array | None
    weights: Array | None
    scale: Scale
    trivial: TrivialRule
    p: P
    tol: float | None
    legacy: bool
    restrict_to_reachable: bool


@dataclass(frozen=True)
class Metric:
    """A STARC metric `m(s(R_1), s(R_2))`, `s(R) = c(R) / n(c(R))`: one canonicalisation c, norm n and distance m for all rewards.

    `scale`: `starc` is `m` itself, in [0, 2] where norm and distance agree; `half` is half of it (the convention of the EPIC paper);
    `angle` the angle between the canonical rewards in radians (l2 forms only). `trivial`: what a reward under which all policies are equal
    becomes: `zero` (distance 1 to others, 0 to its like), `nan` or `raise`.
    """

    canonical: Canonicalizer
    norm: Norm
    distance: Norm
    scale: Scale = "starc"
    trivial: TrivialRule = "zero"
    tol: float | None = None

    def standardize(self, reward: Any, name: str) -> tuple[Tensor, Tensor]:
        """`(s, trivial)` of one reward or of a batch `[K, S, A, S']`; s has the axes of the canonical form."""
        base, size, power, tol = self._read(reward, name)
        return self._standardize(self._form(base, name), size, power, tol, [name])

    def standardize_all(self, rewards: Iterable[tuple[str, Any]]) -> tuple[tuple[str, ...], Tensor, Tensor]:
        """`(names [K], s [K, ...], trivial [K])` of K rewards of any shapes, read one after the other: what s' decides is averaged out at once."""
        names, parts = [], []
        for name, reward in rewards:
            names.append(name)
            base, *rest = self._read(reward, name)
            parts.append((base if self.canonical.reduced else self._form(base, name), *rest))
        if not parts:
            raise RewardError("there are no rewards to compare; give at least one")
        forms, sizes, powers, tols = (torch.stack(column) for column in zip(*parts, strict=True))
        forms = self.canonical.of_expected(forms) if self.canonical.reduced else forms
        return (tuple(names), *self._standardize(forms, sizes, powers, tols, names))

    def _read(self, reward: Any, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Reward (its means over next states where only they count) and its size, both divided by a power of two, that power, and the tolerance
        of its precision. Where only means count, so do the sizes of transitions by their probability: what cannot happen has none."""
        mdp = self.canonical.mdp
        if self.canonical.reduced:
            base, size = mdp.expected_reward(reward, name), mdp.expected_size(reward, name)
        else:
            base = mdp.full_reward(reward, name)
            size = base.detach().abs().flatten(-3).amax(-1)
        power = power_of_two(size)
        tol = default_tolerance(mdp, reward) if self.tol is None else self.tol
        spread = power.reshape(*power.shape, *[1] * (base.ndim - power.ndim))
        return base / spread, size / power, power, torch.full_like(size, tol)

    def _form(self, base: Tensor, name: str) -> Tensor:
        return self.canonical.of_expected(base) if self.canonical.reduced else self.canonical(base, name)

    def _standardize(
        self, form: Tensor, size: Tensor, power: Tensor, tol: Tensor, names: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        scaled, length, trivial = standardized(form, self.axes, self.norm, size, tol)
        if self.norm.name == "none":
            scaled = scaled * power.reshape(*power.shape, *[1] * self.axes)
        warn_trivial(form, self.axes, length, size, trivial, names)
        if self.trivial == "raise" and bool(trivial.any()):
            name = names[int(trivial.reshape(-1).nonzero()[0])] if len(names) > 1 else names[0]
            raise RewardError(
                f"{name} is trivial: every policy has the same return under it; pass trivial='zero' to compare it all the same"
            )
        return scaled, trivial

    @property
    def axes(self) -> int:
        """The number of axes of one canonical form, 2 or 3."""
        return self.canonical.axes

    def finish(self, distances: Tensor, sums: Tensor | None, trivial: Tensor) -> Tensor:
        """Distances in the chosen scale; `sums` are `||s_1 + s_2||`, for the angle; `trivial` marks pairs with a trivial member."""
        if self.scale == "half":
            distances = distances / 2
        elif sums is not None:
            distances = 2 * torch.atan2(distances, sums)
        return (
            torch.where(trivial, torch.full_like(distances, torch.nan), distances)
            if self.trivial == "nan"
            else distances
        )


@guarded(RewardError)
def starc_distance(
    reward_a: Array,
    reward_b: Array,
    mdp: TabularMDP,
    **options: Unpack[MetricArguments],
) -> Scalar:
    """How differently two rewards order policies: 0 for the same ordering of all policies, 2 for opposite ones.

    The distance of Skalse et al. (arXiv 2309.15257) without their factor conventions: `m(s_a, s_b)` of the standardised canonical rewards,
    in [0, 2] where `norm` and `distance` agree. `norm="range", distance="range"` bounds the worst-case regret w in every
    process, `d / 2 <= w <= d`.

    Args:
        reward_a, reward_b: `[S, A, S']`, `[S, A]` or `[S]`; batches `[K, S, A, S']` are compared row by row and give `[K]`.
        mdp: dynamics and discount.
        canonicalization: see `canonicalize`; only `val` and `minimal` (p 2 or "weighted_2") make a distance that is sound and complete.
        norm, distance: `l1, l2, linf, weighted_l1, weighted_l2, range`, the norm also `none`; see `Norm`.
        policy: reference policy of the val forms, the same for both; uniform when left out.
        weights: `[S, A]` (or `[S, A, S']`) weights of the l1 and l2 norms, such as `mdp.occupancy(policy)`.
        scale: `starc`, `half` (divided by 2, as in the EPIC paper) or `angle` (radians).
        trivial: what to do with rewards under which all policies are equal: `zero`, `nan` or `raise`.
        tol: threshold of triviality relative to the largest mean size of a pair's rewards, `max sum_s' tau |R|` (`max |R|` for forms that
            depend on s'); default: what rounding alone makes, 64 eps / (1 - discount) in float64 and 16 eps / (1 - discount) in float32. A
            `RewardWarning` names rewards that are trivial by it and not exactly.
        legacy: admit `weighted_linf` and the minimal forms that are not unique, to reproduce published numbers.
        restrict_to_reachable: leave out states that no policy reaches from the start.

    Returns:
        A float for numpy rewards, a tensor (differentiable) for torch ones.

    Raises:
        RewardError: shapes, non-finite entries, a policy that is not a distribution. ConfigError: choices that do not go together.
    """
    given, chosen = (reward_a, reward_b), MetricOptions(**options)
    metric, cut = _metric(mdp, given, chosen)
    first, first_trivial = metric.standardize(cut(reward_a), "reward_a")
    second, second_trivial = metric.standardize(cut(reward_b), "reward_b")
    sums = metric.distance(first + second, metric.axes) if chosen.scale == "angle" else None
    gap = metric.distance(first - second, metric.axes)
    return give_back(metric.finish(gap, sums, first_trivial | second_trivial), *given)  # type: ignore[no-any-return]


@guarded(RewardError)
def starc_matrix(
    rewards: Mapping[str, Array] | Iterable[Array],
    mdp: TabularMDP,
    **options: Unpack[MetricArguments],
) -> RewardDistanceMatrix:
    """The distances between all of several rewards, under one policy, discount and metric.

    Args:
        rewards: names and rewards; or a sequence, an array `[K, S, A, S']` or `[K, S, A]`, or an iterator, whose members are named
            `reward_0`, `reward_1`, .... They are read one after the other; `val` and `minimal` keep `[S, A]` of each.
        mdp and the rest: as in `starc_distance`.

    Returns:
        A `RewardDistanceMatrix` with `values [K, K]` in float64 (numpy) and `trivial [K]`.

    Raises:
        RewardError, ConfigError: as `starc_distance`, naming the reward.
    """
    chosen = MetricOptions(**options)
    sample = list(rewards.values()) if isinstance(rewards, Mapping) else rewards
    if isinstance(sample, Iterator):
        first = list(itertools.islice(sample, 1))
        rewards = itertools.chain(first, sample)
        sample = first
    metric, cut = _metric(mdp, tuple(sample), chosen)
    with torch.no_grad():
        names, forms, flags = metric.standardize_all((name, cut(reward)) for name, reward in named_rewards(rewards))
        if chosen.scale == "angle":
            values, sums = metric.distance.pairwise(torch.cat([forms, -forms]), metric.axes)[: len(forms)].chunk(2, 1)
        else:
            values, sums = metric.distance.pairwise(forms, metric.axes), None
        values = metric.finish(values, sums, flags[:, None] | flags[None])
    note = None if chosen.restrict_to_reachable else mdp.unreachable_note()
    return RewardDistanceMatrix(
        values=values.double().cpu().numpy(),
        names=names,
        trivial=flags.cpu().numpy(),
        settings={
            "label": f"STARC distance ({chosen.canonicalization}, {chosen.norm}/{chosen.distance})",
            "canonicalization": chosen.canonicalization,
            "norm": chosen.norm,
            "distance": chosen.distance,
            "scale": chosen.scale,
            "discount": mdp.discount,
        },
        notes=() if note is None else (note,),
    )


def _metric(mdp: TabularMDP, rewards: Sequence[Any], options: MetricOptions) -> tuple[Metric, Callable[[Any], Any]]:
    """The metric on a process in the precision of the rewards, and how rewards get onto its states."""
    whole = common_process(mdp, *rewards)
    if not options.restrict_to_reachable:
        whole.warn_unreachable()
        return options.metric(whole), lambda reward: reward
    policy, weights = (None if values is None else whole.cut(values) for values in (options.policy, options.weights))
    return replace(options, policy=policy, weights=weights).metric(whole.reachable_part), whole.cut_reward


def default_tolerance(mdp: TabularMDP, *rewards: Any) -> float:
    """The threshold of triviality of the precision the rewards come in, also where the process is more precise."""
    return rounding(result_dtype(*rewards) if any_floating(*rewards) else mdp.dtype, mdp.discount)


@guarded(RewardError)
def epic_distance(
    reward_a: Array,
    reward_b: Array,
    mdp: TabularMDP,
    *,
    coverage: str | Array = "uniform",
    convention: Literal["pearson", "starc"] = "pearson",
    state_dist: Array | None = None,
    action_dist: Array | None = None,
    discount: float | None = None,
) -> Scalar:
    """The EPIC distance (Gleave et al. 2021, arXiv 2006.13900): 0 for rewards that differ by shaping and scale.

    It is neither sound nor complete as a measure of regret: transitions that never happen move it at will.

    Args:
        coverage: weights of the transitions compared: `uniform` over (s, a, s'), `transition` (proportional to the dynamics) or an array
            `[S, A, S']` or `[S, A]` (times the dynamics). It does not enter the canonical form, `state_dist` and `action_dist` do.
        convention: `pearson`, `sqrt((1 - rho) / 2)` in [0, 1] with the weighted Pearson correlation, as in the EPIC paper, or
            `starc`, the l2 distance of the normalised forms in [0, 2].
        discount: of the canonical form, in [0, 1]: it solves no value equation and takes 1 too; default: that of the process.

    Returns NaN under `pearson` when a canonical form is constant. Raises `RewardError`, `ConfigError` as `starc_distance` does.
    """
    return _compared("epic", reward_a, reward_b, mdp, coverage, convention, state_dist, action_dist, discount)


@guarded(RewardError)
def dard_distance(
    reward_a: Array,
    reward_b: Array,
    mdp: TabularMDP,
    *,
    coverage: str | Array = "transition",
    convention: Literal["pearson", "starc"] = "pearson",
    action_dist: Array | None = None,
    discount: float | None = None,
) -> Scalar:
    """The DARD distance (Wulfe et al. 2022, arXiv 2201.10081), whose canonical form uses the dynamics but not the policy ordering.

    Arguments, conventions and errors as in `epic_distance`; transitions are weighted by the dynamics unless told otherwise.
    """
    return _compared("dard", reward_a, reward_b, mdp, coverage, convention, None, action_dist, discount)


@guarded(RewardError)
def srrd_distance(
    reward_a: Array,
    reward_b: Array,
    mdp: TabularMDP,
    *,
    coverage: str | Array = "transition",
    convention: Literal["pearson", "starc"] = "pearson",
    state_dist: Array | None = None,
    action_dist: Array | None = None,
    discount: float | None = None,
) -> Scalar:
    """The sparsity resilient reward distance (Nyanhongo et al. 2025, arXiv 2504.11508): invariant to shaping, made for thin coverage.

    Its canonical form averages over next states of the dynamics in every term, so that it asks for no transition that cannot happen.
    Arguments, conventions and errors as in `epic_distance`.
    """
    return _compared("srrd", reward_a, reward_b, mdp, coverage, convention, state_dist, action_dist, discount)


def _compared(
    kind: Canonicalization,
    reward_a: Array,
    reward_b: Array,
    mdp: TabularMDP,
    coverage: str | Array,
    convention: str,
    state_dist: Array | None,
    action_dist: Array | None,
    discount: float | None,
) -> Scalar:
    if convention not in ("pearson", "starc"):
        raise ConfigError(f"convention {convention!r} is unknown; choose 'pearson' or 'starc'")
    mdp = common_process(mdp, reward_a, reward_b)
    measure = _Baseline.of(mdp, kind, coverage, state_dist, action_dist, discount)
    pearson = convention == "pearson"
    # Entries that are not finite show in the lengths, and are looked for then.
    tensors = [mdp.full_reward(reward_a, "reward_a", finite=False), mdp.full_reward(reward_b, "reward_b", finite=False)]
    if not tensors[0].ndim == tensors[1].ndim == 3:
        shape = np.broadcast_shapes(tensors[0].shape, tensors[1].shape)
        tensors = [tensor.expand(shape) for tensor in tensors]
    rewards = torch.stack(tensors)
    lengths = torch.linalg.vector_norm(rewards.detach().flatten(-3), dim=-1).flatten().tolist()
    rows = measure.rows(rewards, centred=pearson)
    gap: Tensor | float
    if rows.ndim == 2 and not rows.requires_grad:
        (first, both), (_, second) = (rows @ rows.mT).tolist()
        sizes = [math.sqrt(max(first, 0.0)), math.sqrt(max(second, 0.0))]
    else:
        both, sizes = math.inf, torch.linalg.vector_norm(rows, dim=-1).flatten().tolist()
    if not measure.plain(lengths, sizes):
        given = (("reward_a", reward_a), ("reward_b", reward_b))
        for name, reward in given:
            mdp.full_reward(reward, name)
        tolerances = [default_tolerance(mdp, reward) for _, reward in given]
        return give_back(measure.with_care(rewards, tolerances, pearson), reward_a, reward_b)  # type: ignore[no-any-return]
    squared = 2 - 2 * both / (sizes[0] * sizes[1])
    if squared > 2 * NEAR:
        gap = math.sqrt(squared)
    else:  # a product of forms that are near each other loses the digits of their difference
        scaled = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        gap = torch.linalg.vector_norm(scaled[0] - scaled[1], dim=-1)
    gap = gap / 2 if pearson else gap
    if isinstance(gap, float):
        if not is_torch(reward_a, reward_b):
            return gap
        gap = rows.new_tensor(gap)
    return give_back(gap, reward_a, reward_b)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Baseline:
    """A canonical form over (s, a, s') with the weights of the transitions.

    A form is trivial by no threshold where its norm is above `least` times the l2 norm of the reward.
    """

    canonical: Canonicalizer
    norm: Norm
    least: float
    central: bool  # the forms have mean zero as they are

    @classmethod
    def of(
        cls,
        mdp: TabularMDP,
        kind: Canonicalization,
        coverage: str | Array,
        state_dist: Array | None,
        action_dist: Array | None,
        discount: float | None,
    ) -> _Baseline:
        """Checked; kept with the process where no arrays are given."""
        key = (kind, coverage, discount) if isinstance(coverage, str) and state_dist is action_dist is None else None
        if key is not None and key in mdp.baselines:
            kept: _Baseline = mdp.baselines[key]
            return kept
        canonical = Canonicalizer(mdp, kind, state_dist=state_dist, action_dist=action_dist, discount=discount)
        uniform = isinstance(coverage, str) and coverage == "uniform"
        norm = Norm("l2", mdp) if uniform else Norm("weighted_l2", mdp, _coverage(coverage, mdp))
        total = mdp.num_states**2 * mdp.num_actions if uniform else float(to_float(norm.weights, "coverage").sum())
        least = rounding(torch.float32, min(canonical.gamma, mdp.discount)) * max(1.0, math.sqrt(total))
        found = cls(canonical, norm, least, uniform and kind == "epic" and key is not None)
        if key is not None:
            mdp.baselines[key] = found
        return found

    def form(self, rewards: Tensor, *, centred: bool) -> Tensor:
        """The canonical forms of `[..., S, A, S']`, with mean zero under the weights if `centred`."""
        form = self.canonical.of_full(rewards)
        if not centred or self.central:
            return form
        if self.norm.weights is None:
            return form - form.mean((-3, -2, -1), keepdim=True)
        weights = to_float(self.norm.weights, "coverage")
        return form - ((weights * form).sum((-3, -2, -1), keepdim=True) / weights.sum())

    def rows(self, rewards: Tensor, *, centred: bool) -> Tensor:
        """`[..., n]` whose plain norm is the weighted norm of the form."""
        if self.norm.weights is None:
            return self.form(rewards, centred=centred).flatten(-3)
        return self.norm.embed(self.form(rewards, centred=centred), 3)

    def plain(self, lengths: list[float], sizes: list[float]) -> bool:
        """Whether no square of the rewards over- or underflows and no form is near the threshold of triviality: `lengths` are the l2 norms of
        the rewards, at least their largest entry, and `sizes` those of their forms, at most `sqrt(total)` times their largest."""
        return all(1e-100 < a < 1e100 and b > self.least * a for a, b in zip(lengths, sizes, strict=True))

    def with_care(self, rewards: Tensor, tolerances: Sequence[float], pearson: bool) -> Tensor:
        """The distance of rewards of any size, of which some may be trivial."""
        found = []
        for reward, name, tolerance in zip(rewards, ("reward_a", "reward_b"), tolerances, strict=True):
            size = reward.detach().abs().flatten(-3).amax(-1)
            power = power_of_two(size)
            form = self.form(reward / power[..., None, None, None], centred=pearson)
            scaled, length, trivial = standardized(form, 3, self.norm, size / power, tolerance)
            warn_trivial(form, 3, length, size / power, trivial, [name])
            found.append((scaled, trivial))
        (first, first_trivial), (second, second_trivial) = found
        gap = self.norm(first - second, 3)
        return torch.where(first_trivial | second_trivial, torch.nan, gap / 2) if pearson else gap


def _coverage(coverage: str | Array, mdp: TabularMDP) -> Tensor:
    """Weights `[S, A, S']`."""
    if isinstance(coverage, str):
        if coverage not in ("uniform", "transition"):
            raise ConfigError(f"coverage {coverage!r} is unknown; choose 'uniform', 'transition' or give an array")
        return mdp.dense if coverage == "transition" else torch.ones_like(mdp.dense)
    weights = to_float(coverage, "coverage").to(mdp.dense)
    if (
        weights.shape not in (mdp.dense.shape, mdp.dense.shape[:2])
        or bool((weights < 0).any())
        or not bool(weights.sum() > 0)
    ):
        raise RewardError(
            f"coverage has shape {list(weights.shape)}; give weights of at least 0, {list(mdp.dense.shape)} or {list(mdp.dense.shape[:2])}"
        )
    return weights[..., None] * mdp.dense if weights.ndim == 2 else weights
