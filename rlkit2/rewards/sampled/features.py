"""Features of states and of state-action pairs, in which sampled distances fit values and advantages."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from rlkit2.errors import ConfigError, RewardError
from rlkit2.rewards.sampled.rows import CHUNK, RewardFunctions, Rows

FeatureName: TypeAlias = Literal["auto", "linear", "quadratic", "fourier", "onehot", "tile", "network"]
FEATURES: tuple[FeatureName, ...] = ("auto", "linear", "quadratic", "fourier", "onehot", "tile", "network")
_SAMPLE = 50_000
_MOST = 2048  # columns of pair features
_ROWS_PER_FEATURE = 500  # fewer transitions per fitted coefficient leave more noise than the fit gains


@dataclass(frozen=True)
class FeatureMap:
    """Fitted features: `state(observations [n, obs])` is `[n, F]`, `pair(observations, actions)` `[n, G]`, float64; `name` says which.

    `trained_on` are the episodes `[e]` that shaped the features and must not be estimated from.
    """

    name: str
    state: Callable[[Tensor], Tensor]
    pair: Callable[[Tensor, Tensor], Tensor]
    trained_on: Tensor | None = None


class Features(ABC):
    """A family of features, fitted to the inputs of a data set (never to its rewards, except `NetworkFeatures`)."""

    @abstractmethod
    def fit(self, rows: Rows, rewards: RewardFunctions, discount: float, seed: int) -> FeatureMap:
        """Fit to the data; deterministic given `seed`."""


@dataclass(frozen=True)
class PolynomialFeatures(Features):
    """A constant, the standardised inputs and, with `degree=2`, their products. Discrete actions get a copy of the state's features each."""

    degree: Literal[1, 2] = 2

    def fit(self, rows: Rows, rewards: RewardFunctions, discount: float, seed: int) -> FeatureMap:
        inputs = Inputs.of(rows, seed)
        return inputs.features(
            lambda width: lambda x: polynomial(x, self.degree), f"polynomials of degree {self.degree}"
        )


@dataclass(frozen=True)
class FourierFeatures(Features):
    """Polynomials and `count` random Fourier features of a Gaussian kernel (Rahimi and Recht 2007).

    `bandwidth` is in standard deviations of the inputs; default: the median distance between two samples.
    """

    count: int = 128
    bandwidth: float | None = None
    degree: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        if self.count < 1 or (self.bandwidth is not None and not self.bandwidth > 0):
            raise ConfigError(f"fourier features need count >= 1 and bandwidth > 0, not {self.count}, {self.bandwidth}")

    def fit(self, rows: Rows, rewards: RewardFunctions, discount: float, seed: int) -> FeatureMap:
        inputs = Inputs.of(rows, seed)

        def waves(width: int) -> Callable[[Tensor], Tensor]:
            generator = torch.Generator().manual_seed(seed)
            sample = inputs.sample if width == inputs.sample.shape[1] else inputs.sample[:, :width]
            typical = float(torch.pdist(sample[:1000]).median()) if len(sample) > 1 else 1.0
            bandwidth = self.bandwidth or max(typical, 1e-3)
            weights = torch.randn(width, self.count, generator=generator, dtype=torch.float64) / bandwidth
            phases = 2 * math.pi * torch.rand(self.count, generator=generator, dtype=torch.float64)
            return lambda x: torch.cat([polynomial(x, self.degree), math.sqrt(2) * torch.cos(x @ weights + phases)], 1)

        return inputs.features(waves, f"{self.count} random Fourier features, polynomials of degree {self.degree}")


@dataclass(frozen=True)
class CellFeatures(Features):
    """One indicator per state (`bins=None`: states are distinct observations) or per occupied cell of a grid of `bins` quantiles a column.

    States or cells that are only ever entered, never left, have value 0.
    """

    bins: int | None = None

    def __post_init__(self) -> None:
        if self.bins is not None and self.bins < 2:
            raise ConfigError(f"tile features need at least 2 bins, not {self.bins}")

    def fit(self, rows: Rows, rewards: RewardFunctions, discount: float, seed: int) -> FeatureMap:
        inputs = Inputs.of(rows, seed)
        if self.bins is None and not inputs.choices:
            raise ConfigError("one-hot features need discrete actions; use features='tile' or 'fourier'")

        def cells(width: int) -> Callable[[Tensor], Tensor]:
            key = self._key(inputs.sample[:, :width])
            known = torch.zeros(0, dtype=torch.float64)
            for start in range(0, len(rows), CHUNK):
                batch = rows.gather(torch.arange(start, min(start + CHUNK, len(rows))))
                x = (
                    inputs.state(batch.observations)
                    if width == inputs.width
                    else inputs.pair(batch.observations, batch.actions)
                )
                known = torch.unique(torch.cat([known, key(x)]))
                if len(known) * max(inputs.choices, 1) > _MOST:
                    raise RewardError(
                        f"more than {len(known) - 1} distinct states or cells; use fewer bins or features='fourier'"
                    )
            return lambda x: _indicators(key(x), known)

        name = "one indicator per state" if self.bins is None else f"{self.bins} tiles per column"
        return inputs.features(cells, name)

    def _key(self, sample: Tensor) -> Callable[[Tensor], Tensor]:
        """A number per row that is the same for equal rows (or rows of one cell) alone."""
        width = sample.shape[1]
        if self.bins is None:
            mix = torch.randn(width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            return lambda x: ((x * mix).sum(1) * 1e8).round()
        if self.bins**width > 2**50:
            raise ConfigError(f"{self.bins} tiles in {width} columns are too many cells; use features='fourier'")
        inner = torch.linspace(0, 1, self.bins + 1, dtype=torch.float64)[1:-1]
        edges = torch.quantile(sample[:10_000], inner, dim=0).T.contiguous()
        powers = self.bins ** torch.arange(width, dtype=torch.float64)
        return lambda x: (torch.searchsorted(edges, x.T.contiguous()).T * powers).sum(1)


def _indicators(keys: Tensor, known: Tensor) -> Tensor:
    place = torch.searchsorted(known, keys).clamp(max=len(known) - 1)
    return torch.nn.functional.one_hot(place, len(known)).double() * (known[place] == keys)[:, None]


def polynomial(x: Tensor, degree: int) -> Tensor:
    """`[1, x]` and, for degree 2, all products `x_i x_j`, i <= j."""
    parts = [torch.ones_like(x[:, :1]), x]
    if degree == 2:
        rows, columns = torch.triu_indices(x.shape[1], x.shape[1])
        parts.append(x[:, rows] * x[:, columns])
    return torch.cat(parts, 1)


@dataclass(frozen=True)
class Inputs:
    """Standardised columns of states `[n, width]` and, for continuous actions, of states and actions; `choices` discrete actions or 0.

    `sample [n, columns]` are up to 50,000 rows of them.
    """

    width: int
    choices: int
    mean: Tensor
    scale: Tensor
    sample: Tensor

    @classmethod
    def of(cls, rows: Rows, seed: int) -> Inputs:
        """Inputs of a data set; raises `RewardError` for image observations."""
        generator = torch.Generator().manual_seed(seed)
        indices = torch.arange(len(rows))
        if len(rows) > _SAMPLE:
            indices = torch.randint(len(rows), (_SAMPLE,), generator=generator).sort().values
        batch = rows.gather(indices)
        observations = as_columns(batch.observations)
        discrete = batch.actions.ndim == 1 and not batch.actions.is_floating_point()
        columns = observations if discrete else torch.cat([observations, as_columns(batch.actions)], 1)
        mean, scale = columns.mean(0), columns.std(0, correction=0)
        scale = torch.where(scale > 1e-9 * (1 + mean.abs()), scale, torch.ones_like(scale))
        sample = (columns - mean) / scale
        sample = sample[torch.randperm(len(sample), generator=generator)]
        return cls(observations.shape[1], _choices(rows) if discrete else 0, mean, scale, sample)

    def state(self, observations: Tensor) -> Tensor:
        """`[n, width]`."""
        return (as_columns(observations) - self.mean[: self.width]) / self.scale[: self.width]

    def pair(self, observations: Tensor, actions: Tensor) -> Tensor:
        """`[n, width + act]`."""
        return (torch.cat([as_columns(observations), as_columns(actions)], 1) - self.mean) / self.scale

    def features(self, make: Callable[[int], Callable[[Tensor], Tensor]], name: str) -> FeatureMap:
        """The map whose state features are `make(width)` of the state columns, and whose pair features follow the kind of actions."""
        of_state = make(self.width)
        if self.choices:

            def pair(observations: Tensor, actions: Tensor) -> Tensor:
                phi = of_state(self.state(observations))
                chosen = torch.nn.functional.one_hot(actions.long().cpu(), self.choices).double()
                return (chosen[:, :, None] * phi[:, None, :]).flatten(1)
        else:
            of_pair = make(len(self.mean))

            def pair(observations: Tensor, actions: Tensor) -> Tensor:
                return of_pair(self.pair(observations, actions))

        return FeatureMap(name, lambda observations: of_state(self.state(observations)), pair)


def as_columns(values: Tensor) -> Tensor:
    """`[n, d]` float64 on the CPU; raises `RewardError` for images."""
    if values.ndim > 2:
        raise RewardError(
            f"observations of shape {list(values.shape[1:])} are images; give a dataset of vectors, such as an encoder's outputs"
        )
    return values.reshape(len(values), -1).double().cpu()


def _choices(rows: Rows) -> int:
    """How many discrete actions there are: the space's, or the largest seen plus one."""
    spec = getattr(rows, "spec", None)
    if spec is not None and spec.discrete:
        return int(spec.action_size)
    most = 0
    for start in range(0, len(rows), 1 << 20):
        most = max(most, int(rows.gather(torch.arange(start, min(start + (1 << 20), len(rows)))).actions.max()))
    return most + 1


@dataclass(frozen=True)
class AutoFeatures(Features):
    """Indicators where states and actions are few and discrete, else polynomials, with random Fourier features where data are many."""

    def fit(self, rows: Rows, rewards: RewardFunctions, discount: float, seed: int) -> FeatureMap:
        inputs = Inputs.of(rows, seed)
        if inputs.choices:
            few = len(torch.unique(inputs.sample[:5000], dim=0))
            if few * inputs.choices <= 512 and few < 0.2 * min(len(inputs.sample), 5000):
                return CellFeatures().fit(rows, rewards, discount, seed)
        columns = len(inputs.mean)
        copies = max(inputs.choices, 1)
        products = (columns + 1) * (columns + 2) // 2
        degree: Literal[1, 2] = 2 if products * copies <= 256 else 1
        used = products if degree == 2 else columns + 1
        count = min(64, len(rows) // (_ROWS_PER_FEATURE * copies) - used)
        if count < 8:
            return PolynomialFeatures(degree).fit(rows, rewards, discount, seed)
        return FourierFeatures(count, degree=degree).fit(rows, rewards, discount, seed)
