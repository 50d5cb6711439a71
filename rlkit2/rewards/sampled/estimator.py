"""`SampledStarc`: STARC distances between rewards from recorded transitions, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from rlkit2.data import Batch, TransitionDataset
from rlkit2.errors import ConfigError, DatasetError
from rlkit2.rewards.matrix import RewardDistanceMatrix
from rlkit2.rewards.sampled.absolute import absolute_distances
from rlkit2.rewards.sampled.features import (
    AutoFeatures,
    CellFeatures,
    FeatureMap,
    FeatureName,
    Features,
    FourierFeatures,
    PolynomialFeatures,
)
from rlkit2.rewards.sampled.moments import Gathered, Moments, count_blocks, gather
from rlkit2.rewards.sampled.network_features import NetworkFeatures
from rlkit2.rewards.sampled.rows import BatchRows, RewardFunctions, Rows

Estimator: TypeAlias = Literal["crossfit", "plugin", "naive", "orthogonal"]
ESTIMATORS: tuple[Estimator, ...] = ("crossfit", "plugin", "naive", "orthogonal")
_JITTER = 1e-12  # of whitened features: only decides directions without data, where the fit is 0
_TRIVIAL = 1e-6  # advantages below this share of the reward's size are rounding and shrinkage
_REPLICATE_BYTES = 1 << 23
_FEW_EPISODES = 20


@dataclass(frozen=True)
class Fit:
    """Values `phi w` (`w [..., v, k]`) and advantages `psi beta` (`beta [..., g, k]`) of all rewards, by least squares."""

    w: Tensor
    beta: Tensor

    @classmethod
    def of(cls, moments: Moments, ridge: float) -> Fit:
        """Least-squares TD (Bradtke and Barto 1996) and the regression of its TD errors on the pair features."""
        count = moments.count[..., None, None].clamp(min=1.0)
        w = torch.linalg.solve(moments.phi_d / count + _diagonal(moments.phi_d, ridge), moments.phi_r / count)
        target = (moments.psi_r - moments.psi_d @ w) / count
        beta = torch.linalg.solve(moments.psi_psi / count + _diagonal(moments.psi_psi, ridge), target)
        return cls(w, beta)


def _diagonal(like: Tensor, ridge: float) -> Tensor:
    return (ridge + _JITTER) * torch.eye(like.shape[-1], dtype=like.dtype)


@dataclass(frozen=True)
class SampledStarc:
    """Distances between rewards from a data set: the L2 distance of their standardised advantages under the policy that made the data.

    The canonical form is the advantage of the behaviour policy and pairs count as often as they were visited, so that no action is
    sampled, nothing reweighted and no reward asked about transitions that are not there. `E[delta | s, a]` of the TD error `delta = r +
    discount V(s') - V(s)` is the advantage, but products of single TD errors also hold the noise of the next state; the default estimator
    multiplies TD errors of one fold of episodes with an advantage that was fitted on the others.

    Args:
        features: `auto`, `linear`, `quadratic`, `fourier`, `onehot`, `tile`, `network`, or a `Features` object; the same for all rewards.
        discount: in [0, 1), the same for all rewards.
        folds: number of folds of whole episodes (assigned at random), or the fold of each episode `[E]`.
        estimator: `crossfit`; `plugin` squares the fitted advantage: a true pseudometric, biased where data are few; `naive` squares TD errors:
            right only if dynamics and rewards are deterministic; `orthogonal` corrects the cross-fit for the errors of both fits.
        bootstrap: refits of everything on resampled episodes for the 95 % intervals; 0 gives none.
        ridge: penalty in whitened features; above 0 the distance is no longer exactly invariant to shaping (see `invariance_gap`).
        norm: `l2`, or `l1` for mean absolute differences (with `plugin` only).
        seed: of folds, features and resampling.

    Raises:
        ConfigError: a value out of range.
    """

    features: FeatureName | Features = "auto"
    _: KW_ONLY
    discount: float
    folds: int | Any = 5
    estimator: Estimator = "crossfit"
    bootstrap: int = 200
    ridge: float = 0.0
    norm: Literal["l1", "l2"] = "l2"
    seed: int = 0

    def __post_init__(self) -> None:
        make_features(self.features)
        if not 0 <= self.discount < 1:
            raise ConfigError(f"discount is {self.discount}; it must be at least 0 and below 1")
        if self.estimator not in ESTIMATORS:
            raise ConfigError(f"estimator {self.estimator!r} is unknown; choose one of {', '.join(ESTIMATORS)}")
        if self.norm not in ("l1", "l2") or (self.norm == "l1" and self.estimator != "plugin"):
            raise ConfigError(
                f"norm {self.norm!r}: choose 'l2', or 'l1' with estimator='plugin' (it has no product form)"
            )
        if self.bootstrap < 0 or self.ridge < 0 or (isinstance(self.folds, int) and self.folds < 2):
            raise ConfigError("bootstrap and ridge must be at least 0 and folds at least 2")

    def fit(
        self,
        data: TransitionDataset | Batch | Iterable[Batch],
        rewards: Mapping[str, Any] | Iterable[Any],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> RewardDistanceMatrix:
        """The distances between several rewards on one data set.

        Args:
            data: a `TransitionDataset`, or batches of consecutive transitions without seed axis (an episode ends at its flags and at
                the end of a batch). Terminated steps bootstrap nothing, truncated ones bootstrap from their next observation.
            rewards: names and rewards, or a sequence; each an array `[N]` aligned with the rows, a callable `f(observations, actions,
                next_observations, terminations) -> [n]` on tensors of n rows, or a module called like that.
            progress: called with (transitions read, transitions in all).

        Returns:
            `values [K, K]` in [0, 2], `ci [K, K, 2]` 95 % percentile intervals (None without bootstrap), NaN for rewards that are
            trivial or whose advantage the data cannot tell from 0 (`status`), `diagnostics`, and the plug-in distances as `pseudometric`.

        Raises:
            RewardError: a reward does not fit the data. DatasetError: too few episodes to split.
        """
        rows: Rows = data if isinstance(data, TransitionDataset) else BatchRows.of(data)
        functions = RewardFunctions(rewards, len(rows))
        features = make_features(self.features).fit(rows, functions, self.discount, self.seed)
        blocks, fold_of = self._blocks(rows, features)
        gathered = gather(rows, functions, features, self.discount, blocks, progress)
        weights = self._weights(len(blocks))
        folds = by_fold(gathered.blocks, fold_of, weights[:1])
        grams = self._grams(gathered, fold_of, weights, self.estimator)
        plugin = gram(folds, "plugin", self.ridge)[0]
        if self.norm == "l1":
            distances = absolute_distances(
                rows, features, gathered, blocks, weights, self._coefficients(gathered, fold_of, weights)
            )
        else:
            distances = distances_of(grams)
        # Squares that are positive by construction (plug-in, naive) cannot show that an advantage is nothing but noise.
        squares = grams
        if self.estimator in ("plugin", "naive") and folds.count.shape[1] > 1:
            squares = self._grams(gathered, fold_of, weights, "crossfit")
        diagonals = squares.diagonal(dim1=-2, dim2=-1)
        return self._matrix(rows, functions, features, gathered, folds, diagonals, distances, plugin)

    def _blocks(self, rows: Rows, features: FeatureMap) -> tuple[list[Tensor], Tensor]:
        """Blocks of episodes of one fold each, and the fold of every block."""
        episodes = len(rows.episode_starts) - 1
        kept = torch.arange(episodes)
        if features.trained_on is not None:
            kept = kept[~torch.isin(kept, features.trained_on)]
        if len(kept) < 2 and self.estimator in ("crossfit", "orthogonal"):
            raise DatasetError(
                f"{len(kept)} episode to estimate from: cross-fitting needs two; use estimator='plugin' or more episodes"
            )
        generator = torch.Generator().manual_seed(self.seed)
        kept = kept[torch.randperm(len(kept), generator=generator)]
        if isinstance(self.folds, int):
            count = min(self.folds, len(kept))
            fold = torch.arange(len(kept)) % count
        else:
            given = torch.as_tensor(np.asarray(self.folds)).long()
            if given.shape != (episodes,):
                raise ConfigError(f"folds has shape {list(given.shape)}; give one fold per episode, [{episodes}]")
            fold = torch.unique(given[kept], return_inverse=True)[1]
            count = int(fold.max()) + 1
            if count < 2 and self.estimator in ("crossfit", "orthogonal"):
                raise ConfigError("folds puts all episodes into one fold; cross-fitting needs two")
        first = rows.gather(torch.zeros(1, dtype=torch.int64))
        columns = (
            features.state(first.observations).shape[1],
            features.pair(first.observations, first.actions).shape[1],
        )
        per_fold = max(1, count_blocks(len(kept), columns, count) // count)
        blocks, fold_of = [], []
        for index in range(count):
            members = kept[fold == index]
            for part in torch.tensor_split(members, min(per_fold, len(members))):
                blocks.append(part.sort().values)
                fold_of.append(index)
        return blocks, torch.tensor(fold_of)

    def _weights(self, blocks: int) -> Tensor:
        """`[1 + B, blocks]`: ones, then how often each block is drawn in each replicate."""
        drawn = np.random.default_rng(self.seed).multinomial(blocks, np.full(blocks, 1 / blocks), self.bootstrap)
        return torch.cat([torch.ones(1, blocks, dtype=torch.float64), torch.from_numpy(drawn).double()])

    def _grams(self, gathered: Gathered, fold_of: Tensor, weights: Tensor, estimator: Estimator) -> Tensor:
        """`[1 + B, K, K]`: inner products of advantages on the data and on its replicates, everything refitted."""
        parts = [
            gram(by_fold(gathered.blocks, fold_of, some), estimator, self.ridge)
            for some in _chunks(gathered, fold_of, weights)
        ]
        return torch.cat(parts)

    def _coefficients(self, gathered: Gathered, fold_of: Tensor, weights: Tensor) -> Tensor:
        """Advantages fitted on all data, `[1 + B, g, K]`."""
        parts = [
            Fit.of(_all(by_fold(gathered.blocks, fold_of, some)), self.ridge).beta
            for some in _chunks(gathered, fold_of, weights)
        ]
        return torch.cat(parts)

    def _matrix(
        self,
        rows: Rows,
        functions: RewardFunctions,
        features: FeatureMap,
        gathered: Gathered,
        folds: Moments,
        diagonals: Tensor,
        distances: Tensor,
        plugin: Tensor,
    ) -> RewardDistanceMatrix:
        """Values, intervals, and what to judge them by."""
        size = gathered.blocks.r_r.sum(0).diagonal() / gathered.blocks.count.sum()
        trivial = plugin.diagonal() <= _TRIVIAL**2 * size
        insufficient = diagonals[0] <= 0
        ci = None
        if self.bootstrap:
            insufficient = insufficient | (torch.quantile(diagonals[1:], 0.025, dim=0) <= 0)
            bounds = torch.nanquantile(distances[1:], torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
            ci = bounds.permute(1, 2, 0)
        insufficient = insufficient & ~trivial
        unknown = trivial | insufficient
        no_number = unknown[:, None] | unknown[None]
        values = distances[0].masked_fill(no_number, torch.nan)
        if ci is not None:
            ci = ci.masked_fill(no_number[..., None], torch.nan)
        pseudometric = distances_of(plugin).masked_fill(no_number, torch.nan)
        lengths = rows.episode_starts.diff().double().cpu()
        diagnostics = {
            "transitions": len(rows),
            "episodes": len(lengths),
            "effective_episodes": float(lengths.sum() ** 2 / lengths.square().sum()),
            "resampled_blocks": len(gathered.blocks.count),
            "terminated_share": float(gathered.ends[0]) / float(gathered.blocks.count.sum()),
            "truncated_share": float(gathered.ends[1]) / float(gathered.blocks.count.sum()),
            "features": features.name,
            "state_features": gathered.phi_basis.shape[1],
            "pair_features": gathered.psi_basis.shape[1],
            **fold_diagnostics(folds, self.estimator, self.ridge, self.seed),
            "advantage_rms": dict(zip(functions.names, diagonals[0].clamp(min=0).sqrt().tolist(), strict=True)),
        }
        return RewardDistanceMatrix(
            values=values.numpy(),
            names=tuple(functions.names),
            trivial=trivial.numpy(),
            ci=None if ci is None else ci.numpy(),
            insufficient=insufficient.numpy(),
            pseudometric=None if self.estimator == "plugin" else pseudometric.numpy(),
            settings={
                "label": f"STARC distance (behaviour policy, {self.estimator})",
                "estimator": self.estimator,
                "norm": self.norm,
                "discount": self.discount,
                "folds": folds.count.shape[1],
                "bootstrap": self.bootstrap,
                "ridge": self.ridge,
                "seed": self.seed,
            },
            diagnostics=diagnostics,
            notes=tuple(self._notes(len(lengths), diagnostics)),
        )

    def _notes(self, episodes: int, diagnostics: dict[str, Any]) -> Iterable[str]:
        if self.bootstrap and episodes < _FEW_EPISODES:
            yield f"only {episodes} episodes: the intervals resample episodes and are too narrow with so few"
        if self.estimator == "naive":
            yield "naive products of TD errors are right only if dynamics and rewards are deterministic given (s, a)"
        if diagnostics["coverage"] < 0.9:
            yield (
                f"only {100 * diagnostics['coverage']:.0f} % of the directions of the pair features are in every training part; "
                "use fewer features or more episodes"
            )


def by_fold(blocks: Moments, fold_of: Tensor, weights: Tensor) -> Moments:
    """Sums per replicate and fold, `[b, F, ...]`, of blocks counted `weights [b, blocks]` times."""

    def add(sums: Tensor) -> Tensor:
        parts = []
        for fold in range(int(fold_of.max()) + 1):
            mine = fold_of == fold
            part = weights[:, mine] @ sums[mine].flatten(1) if sums.ndim > 1 else weights[:, mine] @ sums[mine]
            parts.append(part.reshape(len(weights), *sums.shape[1:]))
        return torch.stack(parts, 1)

    return blocks.map(add)


def _all(folds: Moments) -> Moments:
    return folds.map(lambda sums: sums.sum(1))


def _chunks(gathered: Gathered, fold_of: Tensor, weights: Tensor) -> Iterable[Tensor]:
    v, g = gathered.phi_basis.shape[1], gathered.psi_basis.shape[1]
    each = 8 * (int(fold_of.max()) + 1) * (3 * v * v + 2 * g * g + g * v)
    return torch.split(weights, max(1, _REPLICATE_BYTES // each))


def gram(folds: Moments, estimator: Estimator, ridge: float) -> Tensor:
    """Mean inner products of advantages, `[b, K, K]`, from sums `[b, F, ...]`."""
    whole = _all(folds)
    count = whole.count[:, None, None]
    if estimator in ("plugin", "naive"):
        fit = Fit.of(whole, ridge)
        if estimator == "plugin":
            return fit.beta.mT @ whole.psi_psi @ fit.beta / count
        return _squared_errors(whole, fit) / count
    fit = Fit.of(folds.map(lambda sums: sums.sum(1, keepdim=True) - sums), ridge)
    products = (folds.psi_r - folds.psi_d @ fit.w).mT @ fit.beta
    products = (products + products.mT) / (2 if estimator == "crossfit" else 1)
    if estimator == "orthogonal":
        products = products - fit.beta.mT @ folds.psi_psi @ fit.beta
    return products.sum(1) / count


def _squared_errors(moments: Moments, fit: Fit) -> Tensor:
    """`sum delta_i delta_j`, `[..., K, K]`."""
    cross = moments.d_r.mT @ fit.w
    return moments.r_r - cross - cross.mT + fit.w.mT @ moments.d_d @ fit.w


def distances_of(grams: Tensor) -> Tensor:
    """`sqrt(2 - 2 rho)` of inner products `[..., K, K]`; NaN where a reward has no positive square."""
    squares = grams.diagonal(dim1=-2, dim2=-1)
    sizes = torch.where(squares > 0, squares, torch.nan).sqrt()
    cosine = (grams / sizes[..., :, None] / sizes[..., None, :]).clamp(-1, 1)
    distances = (2 - 2 * cosine).clamp(min=0).sqrt()
    same = torch.eye(grams.shape[-1], dtype=torch.bool)
    return torch.where(same & ~distances.isnan(), torch.zeros_like(distances), distances)


def fold_diagnostics(folds: Moments, estimator: Estimator, ridge: float, seed: int) -> dict[str, Any]:
    """What the folds left out say about the fits, and how invariant the distance is to shaping in the span of the features.

    `held_out_r2`: share of the TD errors' squares that the advantage explains (the rest is noise of the next state, or misfit);
    `bellman_residual`: mean TD error in the directions of the value features, relative to the reward's size; `coverage`: share of the
    directions of the pair features that every training part holds; `invariance_gap`: the largest distance of a reward to itself
    plus a random potential of its own size in the span of the value features.
    """
    whole = folds.map(lambda sums: sums.sum(1, keepdim=True))
    train = whole if folds.count.shape[1] == 1 else folds.map(lambda sums: sums.sum(1, keepdim=True) - sums)
    fit = Fit.of(train, ridge)
    squares = _squared_errors(folds, fit).diagonal(dim1=-2, dim2=-1).sum(1)[0]
    fitted = (fit.beta.mT @ folds.psi_psi @ fit.beta).diagonal(dim1=-2, dim2=-1).sum(1)[0]
    products = ((folds.psi_r - folds.psi_d @ fit.w).mT @ fit.beta).diagonal(dim1=-2, dim2=-1).sum(1)[0]
    slope = (folds.phi_r - folds.phi_d @ fit.w) / folds.count[..., None, None]
    size = (whole.r_r[0, 0].diagonal() / whole.count[0, 0]).sqrt()
    eigenvalues = torch.linalg.eigvalsh(train.psi_psi / train.count[..., None, None])
    generator = torch.Generator().manual_seed(seed)
    shifts = torch.randn(folds.phi_r.shape[-2:], generator=generator, dtype=torch.float64)
    moved = (shifts.mT @ whole.d_d[0, 0] @ shifts).diagonal() / whole.count[0, 0]
    shifts = shifts * size / moved.sqrt().clamp(min=1e-300)
    gaps = distances_of(gram(folds.with_rewards(shifts), estimator, ridge))[0]
    count = len(size)
    gap = gaps[torch.arange(count), torch.arange(count) + count]
    return {
        "held_out_r2": (1 - (squares - 2 * products + fitted) / squares).tolist(),
        "bellman_residual": (slope.square().sum(-2).mean(1)[0].sqrt() / size).tolist(),
        "coverage": float((eigenvalues > 0.1).double().mean(-1).min()),
        "invariance_gap": float(gap[~gap.isnan()].max()) if bool((~gap.isnan()).any()) else float("nan"),
    }


def make_features(features: FeatureName | Features) -> Features:
    """Features by name; raises `ConfigError` for an unknown one."""
    if isinstance(features, Features):
        return features
    table: dict[str, Features] = {
        "auto": AutoFeatures(),
        "linear": PolynomialFeatures(1),
        "quadratic": PolynomialFeatures(2),
        "fourier": FourierFeatures(),
        "onehot": CellFeatures(),
        "tile": CellFeatures(6),
        "network": NetworkFeatures(),
    }
    if features not in table:
        raise ConfigError(f"features {features!r} are unknown; choose one of {', '.join(table)}")
    return table[features]
