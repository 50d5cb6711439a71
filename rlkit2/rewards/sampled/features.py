"""Features of states and of state-action pairs, in which sampled distances fit values and advantages."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from rlkit2.data import Batch
from rlkit2.errors import ConfigError, RewardError, first_line
from rlkit2.fields import Checked, Count, Interval, Positive
from rlkit2.rewards.sampled.rows import CHUNK, RewardFunctions, Rows

FeatureName: TypeAlias = Literal["auto", "linear", "quadratic", "fourier", "onehot", "tile", "network"]
_SAMPLE = 50_000
_MOST_CELLS = 2048  # columns of pair features that are laid out
_MOST_STATES = 20_000  # categories, which are counted
_VISITS = 5  # how often an observation is seen at least, on average, where distinct ones are states
_VISITS_OF_WHOLE = 2  # the same where they are whole numbers
_ROWS_PER_FEATURE = 500  # fewer transitions per fitted coefficient leave more noise than the fit gains
_PROBES = 32
_ROWS_PER_PROBE = 100
_PROJECTIONS = 8  # of encoded observations, at which probes look


@dataclass(frozen=True)
class FeatureMap:
    """Fitted features: `state(observations [n, obs])` is `[n, F]`, `pair(observations, actions)` `[n, G]`, float64; `name` says which.

    `trained_on` are the episodes `[e]` that shaped the features and must not be estimated from. `encode` is what observations went through first:
    whatever else looks at them (functions outside the span of the features) looks at what it gives.
    """

    name: str
    state: Callable[[Tensor], Tensor]
    pair: Callable[[Tensor, Tensor], Tensor]
    trained_on: Tensor | None = None
    encode: Callable[[Tensor], Tensor] | None = None

    def after(self, encode: Callable[[Tensor], Tensor] | None, name: str | None = None) -> FeatureMap:
        """The same features of what `encode` makes of observations."""
        if encode is None:
            return self
        return FeatureMap(
            name or self.name,
            lambda observations: self.state(encode(observations)),
            lambda observations, actions: self.pair(encode(observations), actions),
            self.trained_on,
            encode,
        )


@dataclass(frozen=True)
class Categories:
    """States that are categories: `ids(observations)` `[n]` int64 below `size`, or `size` for states that no recorded step leaves."""

    size: int
    choices: int
    ids: Callable[[Tensor], Tensor]
    name: str
    trained_on: Tensor | None = None


class Features(ABC):
    """A family of features, fitted to the inputs of a data set. Yours too: subclass it and return a `FeatureMap`.

    @dataclass(frozen=True)
    class Angles(Features):
        def fit(self, rows, rewards, discount, seed):
            state = lambda o: torch.cat([torch.ones(len(o), 1), o[:, :1].cos(), o[:, :1].sin(), o[:, 1:]], 1).double()
            return FeatureMap("angles", state, lambda o, a: torch.cat([state(o), a, a * o[:, 1:]], 1).double())

    Images go through an encoder first: `EncodedFeatures`.
    """

    @abstractmethod
    def fit(self, rows: Rows, rewards: RewardFunctions, discount: float, seed: int) -> FeatureMap | Categories:
        """Fit to the data; deterministic given `seed`."""


@dataclass(frozen=True)
class PolynomialFeatures(Checked, Features):
    """A constant, the standardised inputs and, with `degree=2`, their products. Discrete actions get a copy of the state's features each."""

    degree: Literal[1, 2] = 2

    def fit(self, rows: Rows, rewards: RewardFunctions, discount: float, seed: int) -> FeatureMap:
        inputs = Inputs.of(rows, seed)
        return inputs.features(
            lambda width: lambda x: polynomial(x, self.degree), f"polynomials of degree {self.degree}"
        )


@dataclass(frozen=True)
class FourierFeatures(Checked, Features):
    """Polynomials and `count` random Fourier features of a Gaussian kernel (Rahimi and Recht 2007).

    `bandwidth` is in standard deviations of the inputs; default: the median distance between two samples.
    """

    count: Count = 128
    bandwidth: Positive | None = None
    degree: Literal[1, 2] = 1

    def fit(self, rows: Rows, rewards: RewardFunctions, discount: float, seed: int) -> FeatureMap:
        inputs = Inputs.of(rows, seed)

        def waves(width: int) -> Callable[[Tensor], Tensor]:
            sample = inputs.sample if width == inputs.sample.shape[1] else inputs.sample[:, :width]
            wave = random_waves(sample, self.count, seed, self.bandwidth)
            return lambda x: torch.cat([polynomial(x, self.degree), wave(x)], 1)

        return inputs.features(waves, f"{self.count} random Fourier features, polynomials of degree {self.degree}")


def random_waves(sample: Tensor, count: int, seed: int, bandwidth: float | None = None) -> Callable[[Tensor], Tensor]:
    """`count` random Fourier features of columns like `sample [n, columns]`."""
    generator = torch.Generator().manual_seed(seed)
    if bandwidth is None:
        bandwidth = max(float(torch.pdist(sample[:1000]).median()), 1e-3) if len(sample) > 1 else 1.0
    weights = torch.randn(sample.shape[1], count, generator=generator, dtype=torch.float64) / bandwidth
    phases = 2 * math.pi * torch.rand(count, generator=generator, dtype=torch.float64)
    return lambda x: math.sqrt(2) * torch.cos(x @ weights + phases)


def random_probes(rows: Rows, seed: int, encode: Callable[[Tensor], Tensor] | None = None) -> FeatureMap | None:
    """Functions that features are tested against: random waves of states, and of states and actions together, half of them of half the
    usual length; None where the rows are too few to tell anything by them. Where observations go through an encoder first, of what it gives and of
    what it was given."""
    if encode is not None:
        both = beside_raw(encode, rows, seed)
        found = random_probes(EncodedRows(rows, both), seed)
        return None if found is None else found.after(both)
    count = min(_PROBES, len(rows) // _ROWS_PER_PROBE)
    if count < 2:
        return None
    inputs = Inputs.of(rows, seed)

    def waves(sample: Tensor, turn: int) -> Callable[[Tensor], Tensor]:
        typical = max(float(torch.pdist(sample[:1000]).median()), 1e-3) if len(sample) > 1 else 1.0
        parts = [
            random_waves(sample, count - count // 2, seed + turn, typical),
            random_waves(sample, count // 2, seed + turn + 1, typical / 2),
        ]
        return lambda x: torch.cat([part(x) for part in parts], 1)

    of_state = waves(inputs.sample[:, : inputs.width], 7_000_001)
    if not inputs.choices:
        of_pair = waves(inputs.sample, 7_000_003)
        return FeatureMap("probes", lambda o: of_state(inputs.state(o)), lambda o, a: of_pair(inputs.pair(o, a)))
    # One wave a state, shifted by a random phase for every action.
    generator = torch.Generator().manual_seed(seed + 7_000_003)
    signs = torch.randn(inputs.choices, count, generator=generator, dtype=torch.float64)
    other = waves(inputs.sample[:, : inputs.width], 7_000_005)

    def pair(observations: Tensor, actions: Tensor) -> Tensor:
        return other(inputs.state(observations)) * signs[actions.long().cpu().reshape(-1)]

    return FeatureMap("probes", lambda o: of_state(inputs.state(o)), pair)


@dataclass(frozen=True)
class CellFeatures(Checked, Features):
    """One indicator per state (`bins=None`: states are distinct observations) or per occupied cell of a grid of `bins` quantiles a column.

    States or cells that are only ever entered, never left, have value 0.
    """

    bins: Annotated[int, Interval("[2, inf)")] | None = None

    def fit(self, rows: Rows, rewards: RewardFunctions, discount: float, seed: int) -> FeatureMap | Categories:
        inputs = Inputs.of(rows, seed)
        if self.bins is None:
            if not inputs.choices:
                raise ConfigError("one-hot features need discrete actions; use features='tile' or 'fourier'")
            return categories(rows, inputs)

        def cells(width: int) -> Callable[[Tensor], Tensor]:
            key = self._key(inputs.sample[:, :width])
            columns = [
                inputs.state(batch.observations)
                if width == inputs.width
                else inputs.pair(batch.observations, batch.actions)
                for batch in _batches(rows)
            ]
            known = _distinct([key(x) for x in columns], _MOST_CELLS // max(inputs.choices, 1))
            return lambda x: _indicators(key(x), known)

        return inputs.features(cells, f"{self.bins} tiles per column")

    def _key(self, sample: Tensor) -> Callable[[Tensor], Tensor]:
        """A number per row that is the same for rows of one cell alone."""
        assert self.bins is not None
        width = sample.shape[1]
        if self.bins**width > 2**50:
            raise ConfigError(f"{self.bins} tiles in {width} columns are too many cells; use features='fourier'")
        inner = torch.linspace(0, 1, self.bins + 1, dtype=torch.float64)[1:-1]
        edges = torch.quantile(sample[:10_000], inner, dim=0).T.contiguous()
        powers = self.bins ** torch.arange(width, dtype=torch.float64)
        return lambda x: (torch.searchsorted(edges, x.T.contiguous()).T * powers).sum(1)


@dataclass(frozen=True)
class EncodedFeatures(Checked, Features):
    """Features of what an encoder makes of observations, images above all.

    `encoder` takes observations as the data hold them (`[n, height, width, channels]` bytes for images) and gives numbers `[n, d]`; a torch module is
    called without gradients and in evaluation mode, on its own device. It must not have learned from the rewards compared. `features` are those of
    its outputs, as in `SampledStarc`. What the encoder loses of a state can be seen by `misfit`, whose waves look at random projections of the
    observations too.
    """

    encoder: Callable[[Tensor], Any]
    features: FeatureName | Features = "auto"

    def fit(self, rows: Rows, rewards: RewardFunctions, discount: float, seed: int) -> FeatureMap | Categories:
        encode = Encoding(self.encoder)
        found = named_features(self.features).fit(EncodedRows(rows, encode), rewards, discount, seed)
        name = f"{found.name}, of an encoder's outputs"
        if isinstance(found, FeatureMap):
            return found.after(encode, name)
        return Categories(found.size, found.choices, lambda o: found.ids(encode(o)), name, found.trained_on)


class Encoding:
    """An encoder on observations `[n, ...]`, `[n, d]` float64 on the CPU; it remembers the last few tensors, which are asked for again and again."""

    def __init__(self, encoder: Callable[[Tensor], Any]) -> None:
        self.encoder = encoder
        self._last: deque[tuple[Tensor, Tensor]] = deque(maxlen=2)

    def __call__(self, observations: Tensor) -> Tensor:
        for seen, encoded in self._last:
            if seen is observations:
                return encoded
        encoded = self._encode(observations)
        self._last.append((observations, encoded))
        return encoded

    @torch.no_grad()
    def _encode(self, observations: Tensor) -> Tensor:
        module = self.encoder if isinstance(self.encoder, nn.Module) else None
        training = module is not None and module.training
        if module is not None:
            module.eval()
            observations = observations.to(next((part.device for part in module.parameters()), observations.device))
        try:
            found = torch.as_tensor(self.encoder(observations)).detach().double().cpu()
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            raise RewardError(
                f"the encoder failed on observations {list(observations.shape)} {observations.dtype} ({first_line(error)}); it takes them as the "
                "data hold them and gives [n, d]"
            ) from error
        finally:
            if module is not None:
                module.train(training)
        if found.ndim != 2 or len(found) != len(observations):
            raise RewardError(
                f"the encoder gave shape {list(found.shape)} for {len(observations)} observations; give [{len(observations)}, d]"
            )
        return found


def beside_raw(encode: Callable[[Tensor], Tensor], rows: Rows, seed: int) -> Callable[[Tensor], Tensor]:
    """What an encoder gives, and beside it the observations themselves, in random projections where they have many numbers."""
    width = rows.gather(torch.zeros(1, dtype=torch.int64)).observations[0].numel()
    turn = torch.eye(width, dtype=torch.float64)
    if width > _PROJECTIONS:
        generator = torch.Generator().manual_seed(seed + 7_000_007)
        turn = torch.randn(width, _PROJECTIONS, generator=generator, dtype=torch.float64) / math.sqrt(width)
    return lambda o: torch.cat([encode(o), o.reshape(len(o), -1).double().cpu() @ turn], 1)


@dataclass(frozen=True)
class EncodedRows:
    """Rows whose observations are what an encoder makes of them."""

    rows: Rows
    encode: Callable[[Tensor], Tensor]

    @property
    def episode_starts(self) -> Tensor:
        return self.rows.episode_starts

    @property
    def spec(self) -> Any:
        """That of the rows, for their actions."""
        return getattr(self.rows, "spec", None)

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, indices: Tensor) -> Batch:
        batch = self.rows.gather(indices)
        return replace(
            batch,
            observations=self.encode(batch.observations),
            next_observations=self.encode(batch.next_observations),
        )


def named_features(features: FeatureName | Features) -> Features:
    """Features by name, except `auto`."""
    from rlkit2.rewards.sampled.network_features import NetworkFeatures

    if isinstance(features, Features):
        return features
    table: dict[str, Features] = {
        "linear": PolynomialFeatures(1),
        "quadratic": PolynomialFeatures(2),
        "fourier": FourierFeatures(),
        "onehot": CellFeatures(),
        "tile": CellFeatures(6),
        "network": NetworkFeatures(),
    }
    return table[features]


def _batches(rows: Rows) -> Iterator[Batch]:
    for start in range(0, len(rows), CHUNK):
        yield rows.gather(torch.arange(start, min(start + CHUNK, len(rows))))


def _distinct(keys: Iterator[Tensor] | list[Tensor], most: int) -> Tensor:
    known = torch.zeros(0, dtype=torch.float64)
    for part in keys:
        known = torch.unique(torch.cat([known, part]))
        if len(known) > most:
            raise RewardError(f"more than {most} distinct states or cells; use fewer bins or features='fourier'")
    return known


def _indicators(keys: Tensor, known: Tensor) -> Tensor:
    place = torch.searchsorted(known, keys).clamp(max=len(known) - 1)
    return torch.nn.functional.one_hot(place, len(known)).double() * (known[place] == keys)[:, None]


def categories(rows: Rows, inputs: Inputs) -> Categories:
    """Every distinct observation as a state of its own; raises `RewardError` where there are more than 20,000."""
    mix = torch.randn(inputs.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def key(observations: Tensor) -> Tensor:
        return ((inputs.state(observations) * mix).sum(1) * 1e8).round()

    known = _distinct((key(batch.observations) for batch in _batches(rows)), _MOST_STATES)

    def ids(observations: Tensor) -> Tensor:
        keys = key(observations)
        place = torch.searchsorted(known, keys).clamp(max=len(known) - 1)
        return torch.where(known[place] == keys, place, len(known))

    return Categories(len(known), inputs.choices, ids, f"one indicator per state ({len(known)})")


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

    `sample [n, columns]` are up to 50,000 rows of them; `whole` says that observations are whole numbers, as numbers of states are.
    """

    width: int
    choices: int
    mean: Tensor
    scale: Tensor
    sample: Tensor
    whole: bool

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
        whole = bool((observations == observations.round()).all())
        return cls(observations.shape[1], _choices(rows) if discrete else 0, mean, scale, sample, whole)

    @property
    def few_states(self) -> bool:
        """Whether the observations are those of a finite process: discrete actions, and every one seen several times on average."""
        visits = _VISITS_OF_WHOLE if self.whole else _VISITS
        return bool(self.choices) and len(torch.unique(self.sample, dim=0)) * visits <= len(self.sample)

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
                return per_action(of_state(self.state(observations)), actions, self.choices)
        else:
            of_pair = make(len(self.mean))

            def pair(observations: Tensor, actions: Tensor) -> Tensor:
                return of_pair(self.pair(observations, actions))

        return FeatureMap(name, lambda observations: of_state(self.state(observations)), pair)


def per_action(phi: Tensor, actions: Tensor, choices: int) -> Tensor:
    """A copy of `phi [n, F]` for each of the discrete actions, `[n, choices * F]`: that of the action taken, zeros for the others."""
    chosen = torch.nn.functional.one_hot(actions.long().cpu().reshape(-1), choices).double()
    return (chosen[:, :, None] * phi[:, None, :]).flatten(1)


def as_columns(values: Tensor) -> Tensor:
    """`[n, d]` float64 on the CPU; raises `RewardError` for images."""
    if values.ndim > 2:
        raise RewardError(
            f"observations of shape {list(values.shape[1:])} are images; give features=EncodedFeatures(encoder), or a dataset of vectors"
        )
    return values.reshape(len(values), -1).double().cpu()


def _choices(rows: Rows) -> int:
    """How many discrete actions there are: the space's, or the largest seen plus one."""
    spec = getattr(rows, "spec", None)
    if spec is not None and spec.discrete:
        return int(spec.action_size)
    return 1 + max(int(batch.actions.max()) for batch in _batches(rows))


def numbers_note(features: FeatureMap | Categories, inputs: Inputs) -> str | None:
    """What to say where observations that look like numbers of states were used as numbers."""
    if isinstance(features, Categories) or inputs.width > 1 or not inputs.whole:
        return None
    return "observations are whole numbers and were used as numbers; if they name states, use features='onehot'"


def candidates(rows: Rows, seed: int) -> list[Features]:
    """The features that `auto` chooses from, simplest first: indicators alone where the process is finite, else polynomials and random Fourier
    features, as many as the rows can bear."""
    inputs = Inputs.of(rows, seed)
    if inputs.few_states:
        return [CellFeatures()]
    columns, copies = len(inputs.mean), max(inputs.choices, 1)
    products = (columns + 1) * (columns + 2) // 2
    degree: Literal[1, 2] = 2 if products * copies <= 256 else 1
    used = products if degree == 2 else columns + 1
    found: list[Features] = [PolynomialFeatures(degree)]
    room = len(rows) // (_ROWS_PER_FEATURE * copies) - used
    found += [FourierFeatures(count, degree=degree) for count in (64, 192) if count <= room]
    if 8 <= room < 64:
        found.append(FourierFeatures(room, degree=degree))
    return found
