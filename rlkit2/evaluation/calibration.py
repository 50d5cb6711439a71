"""Are an agent's error bars true? Its distributions of the TD errors held against held-out episodes, and its ignorance against unknown actions.

Use episodes the agent was not trained on (`rlkit2 train --held-out 0.1`): on its own data a critic's errors are too small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from scipy import special, stats
from torch import Tensor

from rlkit2.agents.uncertain_agent import UncertainAgent
from rlkit2.data.spaces import action_layout
from rlkit2.errors import ConfigError
from rlkit2.nn.distributions import GeneralizedNormal, fit_mle

if TYPE_CHECKING:
    from rlkit2.data.dataset import TransitionDataset

Array = NDArray[np.float64]

LEVELS = np.linspace(0.05, 0.95, 19)  # central intervals of the calibration error
COVERAGE = (0.5, 0.8, 0.9, 0.95)
QQ_POINTS = 199
CHUNK = 2048  # transitions evaluated at once


@dataclass(frozen=True)
class TDDiagnostics:
    """TD errors d = target - Q(s, a) of T held-out transitions, as the M members of S seeds see them, and how well they were foretold.

    Where an agent moves Q on purpose (cql, edac), d is reckoned from the location of its noise instead.

    All scalars are arrays `[S]`, taken over the errors of all members of a seed.
    """

    error: Array  # `[S, M, T]`
    pit: Array  # `[S, M, T]`: the member's distribution function at its target; uniform on [0, 1] if the distribution is true
    z_quantile: Array  # `[S, M, T]`: standard normal quantiles of `pit`; standard normal if the distribution is true
    standardized: Array  # `[S, M, T]`: d / sigma(s, a)
    nll: Array  # mean negative log-density of the targets (with log 2)
    nll_gaussian: Array  # of the best constant Gaussian: its deviation fitted to these very errors
    nll_ggd: Array  # of the best constant generalized Gaussian, likewise
    ggd_shape: Array  # the shape of that one
    coverage: dict[float, Array]  # share of targets inside the central interval of 50, 80, 90 and 95 %
    calibration_error: Array  # mean |share - level| over the central intervals of 5, 10, ... 95 %
    reliability: Array  # `[S, 19]`: those shares
    pooled_kurtosis: Array  # excess kurtosis of d: high for heavy tails and for unequal noise alike
    conditional_kurtosis: (
        Array  # excess kurtosis of d / sigma(s, a): what heavy tails remain once unequal noise is taken out
    )
    mean_standardized: Array  # mean of d / sigma(s, a): 0 if the noise is located at the conditional mean
    skewness: Array  # of d / sigma(s, a)
    auroc: Array  # epistemic deviation of uniformly random actions above that of the data's, at the same states; 0.5: blind
    qq: Array  # `[S, 199, 2]`: quantiles of the standard normal, and of `z_quantile`
    transitions: int  # T

    def warnings(self) -> list[str]:
        """What the numbers advise against, one line each."""
        found = []
        if np.any(np.abs(self.skewness) > 1.0):
            found.append(
                f"the standardised errors are skewed ({_range(self.skewness)}): coupling = 'ggd' would bias Q, keep coupling = 'mean'"
            )
        if np.any(self.calibration_error > 0.1):
            found.append(
                f"the calibration error is {_range(self.calibration_error)}: do not read the deviations as they are"
            )
        if np.any(self.nll > self.nll_ggd):
            found.append(
                "a constant generalized Gaussian foretells these errors better than the agent does: it has not learnt where the noise is"
            )
        if np.any(self.auroc < 0.6):
            found.append(
                f"the members hardly disagree more about random actions (AUROC {_range(self.auroc)}); use more of them or train longer"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Scalars and curves as plain lists (not the errors themselves)."""
        large = ("error", "pit", "z_quantile", "standardized")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in large}
        plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}
        plain["coverage"] = {f"{level:g}": share.tolist() for level, share in self.coverage.items()}
        return {**plain, "levels": LEVELS.tolist(), "warnings": self.warnings()}


def _range(values: Array) -> str:
    low, high = float(np.min(values)), float(np.max(values))
    return f"{low:.2f}" if round(low, 2) == round(high, 2) else f"{low:.2f} to {high:.2f}"


def td_diagnostics(
    agent: Any,
    episodes: TransitionDataset,
    *,
    max_transitions: int = 20_000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> TDDiagnostics:
    """Hold the agent's noise model and its epistemic deviation against episodes it was not trained on.

    Args:
        agent: with critic = "ggd" or "gaussian"; its target networks stay as they are.
        episodes: held-out episodes, with rewards as in training.
        max_transitions: a random part of the transitions is used where there are more.
        seed: of that part and of the random actions.
        progress: called with (done, all) transitions.

    Raises:
        ConfigError: the agent has no noise model, or fewer than two transitions.
    """
    if not isinstance(agent, UncertainAgent):
        raise ConfigError(
            f"{type(agent).__name__} has no ensemble of critics; train sacn, edac, td3bc, iql, cql or dqn with critic = 'ggd'"
        )
    generator = np.random.default_rng(seed)
    rows = np.arange(len(episodes))
    if len(rows) < 2:
        raise ConfigError(f"{episodes.spec.id}: {len(rows)} held-out transitions are too few for any diagnostics")
    if len(rows) > max_transitions:
        rows = np.sort(generator.choice(rows, max_transitions, replace=False))
    parts: dict[str, list[Array]] = {}
    for start in range(0, len(rows), CHUNK):
        index = torch.from_numpy(rows[start : start + CHUNK])
        for name, values in _measure(agent, episodes, index, generator).items():
            parts.setdefault(name, []).append(values)
        if progress is not None:
            progress(min(start + CHUNK, len(rows)), len(rows))
    joined = {name: np.concatenate(values, -1) for name, values in parts.items()}
    return _summarise(joined)


def _measure(
    agent: UncertainAgent, episodes: TransitionDataset, index: Tensor, generator: np.random.Generator
) -> dict[str, Array]:
    batch = episodes.gather(index.expand(len(agent.seeds), -1)).to(agent.device)
    found = agent.predicted_targets(batch)
    heads = found.heads
    noise = GeneralizedNormal(
        heads.location.double(), heads.log_scale.double().exp(), heads.shape.double(), validate_args=False
    )
    targets = found.targets.double()
    below, above = noise.cdf(targets), noise.sf(targets)
    quantile = torch.where(below < 0.5, torch.special.ndtri(below), -torch.special.ndtri(above))
    error = targets - noise.loc
    unknown = agent.heads_at(batch.observations, random_actions(episodes, len(index), generator))
    return {
        "error": _array(error),
        "pit": _array(below),
        "z_quantile": _array(quantile),
        "standardized": _array(error / noise.stddev),
        "nll": _array(-noise.log_prob(targets)),
        "known": _array(_spread(heads.q)),
        "unknown": _array(_spread(unknown.q)),
    }


def _array(values: Tensor) -> Array:
    return values.detach().double().cpu().numpy()


def _spread(q: Tensor) -> Tensor:
    return q.std(1) if q.shape[1] > 1 else torch.zeros_like(q[:, 0])


def random_actions(dataset: TransitionDataset, count: int, generator: np.random.Generator) -> Tensor:
    """Uniformly random actions of the dataset's action space, `[count, act]` or int `[count]`; in the data's range where a dimension is unbounded."""
    space = dataset.spec.action_space
    if isinstance(space, spaces.Discrete):
        return torch.from_numpy(int(space.start) + generator.integers(int(space.n), size=count))
    if (choices := action_layout(space).choices) is not None:
        sizes, starts = choices
        return torch.from_numpy(generator.integers(sizes, size=(count, len(sizes))) + np.asarray(starts))
    actions = dataset.actions.double()
    low, high = actions.amin(0).cpu().numpy(), actions.amax(0).cpu().numpy()
    if isinstance(space, spaces.Box):
        own_low, own_high = (np.asarray(end, np.float64).reshape(-1) for end in (space.low, space.high))
        low, high = np.where(np.isfinite(own_low), own_low, low), np.where(np.isfinite(own_high), own_high, high)
    return torch.from_numpy(generator.uniform(low, high, (count, len(low))).astype(np.float32))


def _summarise(joined: Mapping[str, Array]) -> TDDiagnostics:
    error, pit, z = joined["error"], joined["pit"], joined["standardized"]
    seeds = len(error)
    flat, flat_z = error.reshape(seeds, -1), z.reshape(seeds, -1)
    deviation = np.sqrt(np.mean(flat**2, 1)).clip(min=1e-12)
    constant = fit_mle(torch.from_numpy(flat))
    central = np.abs(2.0 * pit.reshape(seeds, -1) - 1.0)  # inside the central interval of every level above it
    reliability = np.stack([np.mean(central <= level, 1) for level in LEVELS], 1)
    steps = (np.arange(QQ_POINTS) + 1.0) / (QQ_POINTS + 1.0)
    quantiles = np.quantile(joined["z_quantile"].reshape(seeds, -1), steps, axis=1).T
    normal = np.broadcast_to(special.ndtri(steps), quantiles.shape)
    return TDDiagnostics(
        error=error,
        pit=pit,
        z_quantile=joined["z_quantile"],
        standardized=z,
        nll=np.mean(joined["nll"], (1, 2)),
        nll_gaussian=0.5 * np.log(2.0 * np.pi * np.e * deviation**2),
        nll_ggd=-constant_log_density(constant, flat),
        ggd_shape=constant.shape.numpy(),
        coverage={level: np.mean(central <= level, 1) for level in COVERAGE},
        calibration_error=np.mean(np.abs(reliability - LEVELS), 1),
        reliability=reliability,
        pooled_kurtosis=stats.kurtosis(flat, axis=1),
        conditional_kurtosis=stats.kurtosis(flat_z, axis=1),
        mean_standardized=np.mean(flat_z, 1),
        skewness=stats.skew(flat_z, axis=1),
        auroc=np.array([auroc(u, k) for u, k in zip(joined["unknown"], joined["known"], strict=True)]),
        qq=np.stack([normal, quantiles], -1),
        transitions=error.shape[-1],
    )


def constant_log_density(noise: GeneralizedNormal, samples: Array) -> Array:
    """Mean log-density of `samples [S, n]` under distributions of batch shape `[S]`."""
    density = GeneralizedNormal(noise.loc.unsqueeze(-1), noise.scale.unsqueeze(-1), noise.shape.unsqueeze(-1)).log_prob(
        samples
    )
    mean: Array = np.mean(density, 1)
    return mean


def auroc(positive: Array, negative: Array) -> float:
    """Probability that a score of `positive` exceeds one of `negative`, ties counting half (the Mann-Whitney statistic)."""
    ranks = stats.rankdata(np.concatenate([positive, negative]))
    below = ranks[: len(positive)].sum() - len(positive) * (len(positive) + 1) / 2
    return float(below / (len(positive) * len(negative)))
