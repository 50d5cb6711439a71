"""`SampledStarc`: STARC distances between rewards from recorded transitions, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from rlkit2.data import Batch, TransitionDataset
from rlkit2.data.environments import EnvSource
from rlkit2.errors import ConfigError, DatasetError
from rlkit2.fields import Checked, Natural, NonNegative
from rlkit2.fields import Interval as Range
from rlkit2.rewards.matrix import RewardDistanceMatrix
from rlkit2.rewards.sampled.absolute import absolute_distances
from rlkit2.rewards.sampled.cells import CellSums, gather_cells
from rlkit2.rewards.sampled.collecting import PolicySource, collect, is_environment
from rlkit2.rewards.sampled.features import (
    Categories,
    EncodedFeatures,
    EncodedRows,
    Encoding,
    FeatureMap,
    FeatureName,
    Features,
    FourierFeatures,
    Inputs,
    candidates,
    named_features,
    numbers_note,
    random_probes,
)
from rlkit2.rewards.sampled.grams import (
    CROSSFITTED,
    Estimator,
    Misfit,
    Split,
    distances_of,
    fold_diagnostics,
    gaps_of,
    gram,
)
from rlkit2.rewards.sampled.intervals import interval
from rlkit2.rewards.sampled.moments import Gathered, count_blocks, gather
from rlkit2.rewards.sampled.network_features import NetworkFeatures
from rlkit2.rewards.sampled.rows import BatchRows, RewardFunctions, Rows

_TRIVIAL = 1e-6  # advantages below this share of the reward's size are rounding and shrinkage
_TESTS = 50  # refits that judge whether an advantage is more than noise, and whether features miss some of it
_POOR = 0.5  # how far features may take a form from that in richer ones before its distances are refused
_CHOOSE_ROWS, _CHOOSE_EPISODES = (
    50_000,
    100,
)  # `auto` chooses features on as many rows, or on those of as many episodes where they are more
_NETWORK_ROWS, _NETWORKS = 20_000, 6  # rows and rewards with which `auto` tries networks too
_FEW_EPISODES = 30
_RESIDUAL = 1.0  # Bellman residual, as a share of the reward's size, from which values do not carry over from one part of the data to another


@dataclass(frozen=True)
class SampledStarc(Checked):
    """Distances between rewards from a data set: the L2 distance of their standardised advantages under the policy that made the data.

    The canonical form is the advantage of the behaviour policy and pairs count as often as they were visited, so that no action is
    sampled, nothing reweighted and no reward asked about transitions that are not there. `E[delta | s, a]` of the TD error `delta = r +
    discount V(s') - V(s)` is the advantage, but products of single TD errors also hold the noise of the next state; the default estimator
    multiplies TD errors of one fold of episodes with an advantage that was fitted on others, and takes the value in the one from other
    episodes than the value in the other.

    Args:
        features: `auto`, `linear`, `quadratic`, `fourier`, `onehot`, `tile`, `network`, or a `Features` object; the same for all rewards.
        discount: in [0, 1), the same for all rewards.
        folds: number of folds of whole episodes (assigned at random), or the fold of each episode `[E]`.
        estimator: `crossfit`; `plugin` squares the fitted advantage: a true pseudometric, biased where data are few; `naive` squares TD errors:
            right only if dynamics and rewards are deterministic; `orthogonal` corrects the cross-fit for the errors of both fits.
        bootstrap: refits of everything on resampled episodes for the 95 % intervals; 0 gives none (50 refits still tell noise from advantages).
        ridge: penalty in whitened features; above 0 the distance is no longer exactly invariant to shaping (see `invariance_gap`).
        norm: `l2`, or `l1` for mean absolute differences (with `plugin` only).
        seed: of folds, features and resampling.

    Raises:
        ConfigError: a value out of range.
    """

    features: FeatureName | Features = "auto"
    _: KW_ONLY
    discount: Annotated[float, Range("[0, 1)")]
    folds: Any = 5
    estimator: Estimator = "crossfit"
    bootstrap: Natural = 200
    ridge: NonNegative = 0.0
    norm: Literal["l1", "l2"] = "l2"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm == "l1" and self.estimator != "plugin":
            raise ConfigError("norm 'l1' has no product form; choose 'l2', or 'l1' with estimator='plugin'")
        if isinstance(self.folds, int) and self.folds < 2:
            raise ConfigError(f"folds is {self.folds}; cross-fitting needs folds at least 2")

    def fit(
        self,
        data: TransitionDataset | Batch | Iterable[Batch] | EnvSource,
        rewards: Mapping[str, Any] | Iterable[Any],
        *,
        policy: PolicySource | None = None,
        episodes: int | None = None,
        max_steps: int | None = None,
        infos: Mapping[str, Any] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> RewardDistanceMatrix:
        """The distances between several rewards on one data set, or on episodes played in a simulator.

        Args:
            data: a `TransitionDataset`, or batches of consecutive transitions without seed axis (an episode ends at its flags and at
                the end of a batch). Terminated steps bootstrap nothing, truncated ones bootstrap from their next observation. Or an environment:
                its id, specification, a function that makes one, or one that is made.
            rewards: names and rewards, or a sequence; each an array `[N]` aligned with the rows, a function or torch module of
                observations, actions, next_observations, terminations and infos or some of them (by their usual names, obs, act, next_state, done,
                ..., or in this order) of n rows that gives n numbers, a reward network with `predict_processed` (imitation's `RewardNet`), or
                `"recorded"`, the rewards of the data or environment.
            policy: what plays in an environment; see `collect`. Its advantages are compared, so it should try every action everywhere; default:
                `"uniform"`.
            episodes: how many it plays; default 100.
            max_steps: cut its episodes there.
            infos: what else came with each row, arrays `[N, ...]` by name, for rewards that read them (`rlkit2.data.read_infos`); those
                of an environment are collected.
            progress: called with (transitions read, transitions in all), and before with (episodes played, episodes).

        Returns:
            `values [K, K]` in [0, 2], `ci [K, K, 2]` 95 % intervals (None without bootstrap), NaN for rewards that are trivial, whose
            advantage the data cannot tell from 0 or the features cannot express (`status`), `diagnostics`, `notes`, and the plug-in
            distances as `pseudometric`.

        Raises:
            RewardError: a reward does not fit the data. DatasetError: too few episodes to split. ConfigError: options of an environment for data.
            EnvironmentUnavailableError: the environment cannot be made or never ends.
        """
        if is_environment(data):
            given = {"policy": policy, "episodes": episodes, "max_steps": max_steps}
            kept: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
            data, infos = collect(data, **kept, seed=self.seed, progress=progress)
        elif (policy, episodes, max_steps) != (None, None, None):
            raise ConfigError("policy, episodes and max_steps belong to an environment; data are compared as they are")
        rows: Rows = (
            data if isinstance(data, TransitionDataset) else BatchRows.of(cast("Batch | Iterable[Batch]", data))
        )
        functions = RewardFunctions(rewards, len(rows), spec=getattr(rows, "spec", None), infos=infos)
        if isinstance(self.features, EncodedFeatures):
            functions = functions.evaluated(rows)  # what features read is not what rewards do
        features = self._features(rows, functions)
        study = _Study.of(self, rows, functions, features, progress=progress)
        return study.matrix()

    def _features(self, rows: Rows, functions: RewardFunctions) -> FeatureMap | Categories:
        """The features asked for; `auto` takes the first of its candidates in which every reward's advantage is clear and nothing of it missed, or
        the one nearest to that."""
        encoder = self.features.encoder if isinstance(self.features, EncodedFeatures) else None
        asked = self.features.features if isinstance(self.features, EncodedFeatures) else self.features
        if asked != "auto":
            return named_features(self.features).fit(rows, functions, self.discount, self.seed)
        options = candidates(rows if encoder is None else EncodedRows(rows, Encoding(encoder)), self.seed)
        if len(options) > 1 and len(rows) >= _NETWORK_ROWS and len(functions.names) <= _NETWORKS:
            options.append(NetworkFeatures())
        best, least = options[0], np.inf
        for option in options if len(options) > 1 else []:
            fitted = self._encoded(option, encoder).fit(rows, functions, self.discount, self.seed)
            trial = _Study.of(self, rows, functions, fitted, most=_CHOOSE_ROWS)
            missed, unclear = trial.misfit.of_rewards(trial.units), ~trial.misfit.clear(trial.units)[0]
            cost = float(missed.square().sum() + 2 * unclear.sum())
            if cost < least:
                best, least = option, cost
            if not cost or (isinstance(option, FourierFeatures) and not bool((missed > _POOR / 2).any())):
                break  # networks are slow, and for what is seen to be missed by far
        return self._encoded(best, encoder).fit(rows, functions, self.discount, self.seed)

    @staticmethod
    def _encoded(option: Features, encoder: Callable[[Tensor], Any] | None) -> Features:
        return option if encoder is None else EncodedFeatures(encoder, option)


@dataclass(frozen=True)
class _Study:
    """One fit: sums of the data under given features, the split of its blocks, and replicates `weights [1 + refits, blocks]`, the data first."""

    settings: SampledStarc
    rows: Rows
    functions: RewardFunctions
    features: FeatureMap | Categories
    gathered: Gathered
    blocks: list[Tensor]
    split: Split
    weights: Tensor
    units: float

    @classmethod
    def of(
        cls,
        settings: SampledStarc,
        rows: Rows,
        functions: RewardFunctions,
        features: FeatureMap | Categories,
        *,
        most: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> _Study:
        """Gather the data (of about `most` rows of whole episodes) under the features."""
        blocks, split = _blocks(settings, rows, features, most)
        probes = None
        if isinstance(features, FeatureMap):
            probes = random_probes(rows, settings.seed, features.encode)
        discount = settings.discount
        if isinstance(features, Categories):
            gathered = gather_cells(rows, functions, features, discount, blocks, progress)
        else:
            gathered = gather(rows, functions, features, probes, discount, blocks, progress)
        refits = max(settings.bootstrap, _TESTS)
        generator = np.random.default_rng(settings.seed)
        drawn = generator.multinomial(len(blocks), np.full(len(blocks), 1 / len(blocks)), refits)
        weights = torch.cat([torch.ones(1, len(blocks), dtype=torch.float64), torch.from_numpy(drawn).double()])
        lengths = rows.episode_starts.diff().double().cpu()[torch.cat(blocks)]
        units = min(float(lengths.sum() ** 2 / lengths.square().sum()), len(blocks))
        return cls(settings, rows, functions, features, gathered, blocks, split, weights, units)

    @cached_property
    def misfit(self) -> Misfit:
        """What the features miss."""
        return Misfit.of(self.gathered, self.split, self.weights[: 1 + _TESTS], self.settings.ridge)

    def grams(self, estimator: Estimator) -> Tensor:
        """`[1 + refits, K, K]`: inner products of advantages on the data and on its replicates, everything refitted."""
        ridge = self.settings.ridge
        return self.split.each(self.gathered.own, self.weights, lambda parts: gram(parts, estimator, ridge))

    def absolute(self) -> Tensor:
        """`[1 + refits, K, K]` L1 distances of fitted advantages."""
        own, ridge = self.gathered.own, self.settings.ridge

        def whole(parts: Any) -> Any:
            return parts.map(lambda sums: sums.sum((1, 2)))

        if isinstance(own, CellSums):
            return self.split.each(
                own, self.weights, lambda parts: whole(parts).absolute_distances(whole(parts).fit(ridge).beta)
            )
        assert isinstance(self.features, FeatureMap)
        beta = self.split.each(own, self.weights, lambda parts: whole(parts).fit(ridge).beta)
        return absolute_distances(self.rows, self.features, self.gathered, self.blocks, self.weights, beta)

    def matrix(self) -> RewardDistanceMatrix:
        """Values, intervals, and what to judge them by."""
        settings, estimator = self.settings, self.settings.estimator
        one = replace(self, weights=self.weights[:1])
        plugin = one.grams("plugin")[0]
        grams = plugin if settings.norm == "l1" else self.grams(estimator)
        # Squares that are positive by construction (plug-in, naive) cannot show that an advantage is nothing but noise.
        squares = grams if estimator in CROSSFITTED else self.grams("crossfit") if self.split.folds > 1 else None
        size = self.gathered.blocks.r_r.sum(0).diagonal() / self.gathered.blocks.count.sum()
        trivial = plugin.diagonal() <= _TRIVIAL**2 * size
        insufficient = torch.zeros_like(trivial)
        rms = plugin.diagonal()
        if squares is not None:
            diagonals = squares.diagonal(dim1=-2, dim2=-1)
            insufficient, rms = ~(interval(diagonals, self.units).low > 0) & ~trivial, diagonals[0]
        misfit = self.misfit.of_rewards(self.units).masked_fill(trivial, 0.0)
        poor = misfit > _POOR
        insufficient = insufficient & ~poor
        if settings.norm == "l1":
            values = self.absolute()
            bounds, values = interval(values, self.units), values[0]
            low, high = bounds.low.clamp(min=0), bounds.high
        else:
            gaps = gaps_of(grams)
            bounds, values = interval(gaps, self.units), distances_of(gaps[0])
            low, high = distances_of(bounds.low), distances_of(bounds.high)
        beyond = self.misfit.of_pairs(self.units)
        ci = torch.stack([(low - beyond).clamp(min=0), (high + beyond).clamp(max=2)], -1)
        unknown = trivial | insufficient | poor
        no_number = unknown[:, None] | unknown[None]
        diagnostics = self._diagnostics(misfit, rms)
        return RewardDistanceMatrix(
            values=values.masked_fill(no_number, torch.nan).numpy(),
            names=tuple(self.functions.names),
            trivial=trivial.numpy(),
            ci=ci.masked_fill(no_number[..., None], torch.nan).numpy() if settings.bootstrap else None,
            insufficient=insufficient.numpy(),
            poor=poor.numpy(),
            pseudometric=None
            if estimator == "plugin"
            else distances_of(gaps_of(plugin)).masked_fill(no_number, torch.nan).numpy(),
            settings={
                "label": f"STARC distance (behaviour policy, {estimator})",
                "estimator": estimator,
                "norm": settings.norm,
                "discount": settings.discount,
                "folds": self.split.folds,
                "bootstrap": settings.bootstrap,
                "ridge": settings.ridge,
                "seed": settings.seed,
            },
            diagnostics=diagnostics,
            notes=tuple(self._notes(diagnostics, misfit, beyond.masked_fill(no_number, 0.0), trivial)),
        )

    def _diagnostics(self, misfit: Tensor, squares: Tensor) -> dict[str, Any]:
        settings, gathered, names = self.settings, self.gathered, self.functions.names
        lengths = self.rows.episode_starts.diff().double().cpu()
        transitions = float(gathered.blocks.count.sum())
        rms = squares.clamp(min=0).sqrt() * gathered.scale
        return {
            "transitions": len(self.rows),
            "episodes": len(lengths),
            "effective_episodes": float(lengths.sum() ** 2 / lengths.square().sum()),
            "resampled_blocks": len(self.blocks),
            "terminated_share": float(gathered.ends[0]) / transitions,
            "truncated_share": float(gathered.ends[1]) / transitions,
            "features": self.features.name,
            "state_features": gathered.columns[0],
            "pair_features": gathered.columns[1],
            **fold_diagnostics(gathered, self.split, settings.estimator, settings.ridge, settings.seed),
            "misfit": dict(zip(names, misfit.tolist(), strict=True)),
            "advantage_rms": dict(zip(names, rms.tolist(), strict=True)),
        }

    def _notes(self, diagnostics: dict[str, Any], misfit: Tensor, beyond: Tensor, trivial: Tensor) -> Iterable[str]:
        names = self.functions.names
        if self.settings.bootstrap and self.units < _FEW_EPISODES:
            yield (
                f"only {self.units:.0f} effective episodes: the 95 % intervals are stretched for it and still hold the truth "
                "less often, in about 90 % of cases"
            )
        if self.settings.estimator == "naive":
            yield "naive products of TD errors are right only if dynamics and rewards are deterministic given (s, a)"
        if diagnostics["coverage"] < 0.9:
            yield (
                f"only {100 * diagnostics['coverage']:.0f} % of the directions of the pair features are in every training part; "
                "use fewer features or more episodes"
            )
        wild = [name for name, far in zip(names, diagnostics["bellman_residual"], strict=True) if far > _RESIDUAL]
        if wild:
            yield (
                f"values fitted on one part of the episodes do not hold on another ({', '.join(wild[:8])}): distances may be off by more than their "
                "intervals say; take fewer features, a lower discount or more episodes"
            )
        if not isinstance(self.features, Categories):
            note = numbers_note(self.features, Inputs.of(_seen(self.rows, self.features), self.settings.seed))
            if note:
                yield note
        missed = [f"{name} {far:.2f}" for name, far in zip(names, misfit.tolist(), strict=True) if far > 0]
        if missed:
            yield (
                f"richer features move canonical forms ({', '.join(missed)}): above {_POOR} there is no number; "
                "try features='fourier' or 'network'"
            )
        if bool((beyond > 0).any()):
            yield (
                f"richer features change distances, by up to {float(beyond.max()) / 2:.2f}: intervals are wider by twice what they change; "
                "try features='fourier' or 'network'"
            )
        for name, flag in zip(names, trivial.tolist(), strict=True):
            if flag:
                yield (
                    f"{name} is taken to be trivial: its advantage is below {_TRIVIAL:g} of its size; if it should say more than a constant "
                    "and a potential, take what is large and known out of it"
                )


def _seen(rows: Rows, features: FeatureMap) -> Rows:
    """The rows as the features see them."""
    return rows if features.encode is None else EncodedRows(rows, features.encode)


def _blocks(
    settings: SampledStarc, rows: Rows, features: FeatureMap | Categories, most: int | None
) -> tuple[list[Tensor], Split]:
    """Blocks of episodes, each within one fold and one half."""
    episodes = len(rows.episode_starts) - 1
    kept = torch.arange(episodes)
    if features.trained_on is not None:
        kept = kept[~torch.isin(kept, features.trained_on)]
    kept = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(settings.seed))]
    if most is not None:
        lengths = rows.episode_starts.diff().cpu()[kept].cumsum(0)
        kept = kept[: max(_CHOOSE_EPISODES, int((lengths <= most).sum()))]
    crossed = settings.estimator in CROSSFITTED
    if isinstance(settings.folds, int):
        count = min(settings.folds, len(kept))
        fold = torch.arange(len(kept)) % count
    else:
        given = torch.as_tensor(np.asarray(settings.folds)).long()
        if given.shape != (episodes,):
            raise ConfigError(f"folds has shape {list(given.shape)}; give one fold per episode, [{episodes}]")
        fold = torch.unique(given[kept], return_inverse=True)[1]
        count = int(fold.max()) + 1
        if count < 2 and crossed:
            raise ConfigError("folds puts all episodes into one fold; cross-fitting needs two")
    each = 8 * 4 * 200**2 if isinstance(features, Categories) else _bytes(rows, features)
    per_fold = max(2, count_blocks(len(kept), each, count) // count)
    blocks, fold_of, half_of = [], [], []
    for index in range(count):
        members = kept[fold == index]
        for number, part in enumerate(torch.tensor_split(members, min(per_fold, len(members)))):
            blocks.append(part.sort().values)
            fold_of.append(index)
            half_of.append((index + number) % 2)
    split = Split(torch.tensor(fold_of), torch.tensor(half_of))
    if crossed and not all(
        bool(((split.fold != index) & (split.half == half)).any()) for index in range(count) for half in (0, 1)
    ):
        raise DatasetError(
            f"{len(kept)} {'episode' if len(kept) == 1 else 'episodes'} to estimate from: cross-fitting needs two "
            "to fit on beside each fold; use estimator='plugin' or more episodes"
        )
    return blocks, split


def _bytes(rows: Rows, features: FeatureMap) -> int:
    """Size of the sums of one block."""
    first = rows.gather(torch.zeros(1, dtype=torch.int64))
    v = features.state(first.observations).shape[1]
    g = features.pair(first.observations, first.actions).shape[1]
    return 8 * (3 * v * v + g * g + g * v)
