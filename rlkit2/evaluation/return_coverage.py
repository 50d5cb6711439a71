"""Is the epistemic deviation as large as Q's errors? Held-out returns against Q, group by group.

One return is too noisy to judge one Q(s, a); the mean of many is not. The held-out steps are put into groups of like Q. In group g, with G the
discounted return from a step to the end of its episode,

    D = mean_g(G) - mean_g(Q),     e = deviation over members of mean_g(Q_i),     n = standard error of mean_g(G - Q), by episodes

and a true e makes |D| <= t sqrt((1 + 1/M) e^2 + n^2) in 90 % of the groups. Means come before deviations: the errors of a group go together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

from rlkit2.agents.uncertain_agent import UncertainAgent
from rlkit2.errors import ConfigError

if TYPE_CHECKING:
    from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.returns import discounted_returns

Array = NDArray[np.float64]

LEVEL = 0.9
GROUPS = 20
REMAINDER = 0.05  # of the discount: what a truncated episode may leave out
FEWEST_EPISODES = 5
CHUNK = 4096
LIMITS = (
    "returns are those of the data's policy and Q is that of the agent's: where they differ, and where Q is pessimistic, that counts as error too",
)


@dataclass(frozen=True)
class ReturnCoverage:
    """Per seed `[S]`, over the groups: errors, epistemic deviation and the noise of the returns are root mean squares of D, e and n."""

    coverage: Array  # share of groups whose 90 % interval holds the mean return
    coverage_without: Array  # the same with e = 0: what the noise of the returns alone would hold
    error: Array
    epistemic: Array
    noise: Array
    steps: int  # held-out steps whose return is known
    episodes: int
    groups: int
    limits: tuple[str, ...]

    @property
    def error_beyond_noise(self) -> Array:
        """sqrt(error^2 - noise^2), what is left for Q; 0 where the noise explains it all."""
        left: Array = np.sqrt(np.maximum(self.error**2 - self.noise**2, 0.0))
        return left

    @property
    def ratio(self) -> Array:
        """Epistemic deviation to that: below 1 it is too small. NaN where the noise of the returns hides Q's errors."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.error > 1.2 * self.noise, self.epistemic / self.error_beyond_noise, np.nan)

    def verdict(self) -> str:
        """One line on the size of the epistemic deviation."""
        hidden = np.isnan(self.ratio)
        what = f"{self.groups} groups of like Q, {self.steps} steps of {self.episodes} episodes"
        if hidden.all():
            return f"the noise of the returns explains Q's errors, so they do not tell it ({what})"
        ratios = self.ratio[~hidden]
        low, high = (f"{value:.2g}" for value in (ratios.min(), ratios.max()))
        said = f"{low if low == high else f'{low} to {high}'} of Q's error beyond the noise of the returns ({what})"
        return said if ratios.max() > 0.5 else f"{said}: Q errs by far more than its critics disagree"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        names = ("coverage", "coverage_without", "error", "epistemic", "noise", "error_beyond_noise", "ratio")
        return {
            **{name: getattr(self, name).tolist() for name in names},
            **{name: getattr(self, name) for name in ("steps", "episodes", "groups")},
            "limits": list(self.limits),
        }


def return_coverage(agent: UncertainAgent, episodes: TransitionDataset) -> ReturnCoverage:
    """Hold an agent's Q and its members' disagreement against the returns of held-out episodes.

    Args:
        agent: of at least two critics.
        episodes: held out, with rewards as in training.

    Raises:
        ConfigError: one critic, or too few episodes whose returns are known: ended by a termination, or so long that what a truncation cut off is
            discounted away.
    """
    if agent.config.num_critics < 2:
        raise ConfigError("one critic knows no ignorance; raise num_critics")
    discount = agent.config.discount
    returns, remaining = returns_to_go(episodes, discount)
    known = np.flatnonzero(remaining < REMAINDER)
    episode = np.repeat(np.arange(episodes.num_episodes), episodes.episode_lengths.numpy())[known]
    count = len(np.unique(episode))
    if count < FEWEST_EPISODES:
        raise ConfigError(
            f"{count} held-out episodes have known returns (at a discount of {discount} a truncated one must go on for "
            f"{int(np.ceil(np.log(REMAINDER) / np.log(discount))) if 0 < discount < 1 else 1} steps more); {FEWEST_EPISODES} are needed"
        )
    q = _values(agent, episodes, known)
    groups = min(GROUPS, len(known) // 2, 2 * count)
    rows = [_judge(own, returns[known], episode, groups) for own in q]
    error, epistemic, noise, inside, without = (np.array(part) for part in zip(*rows, strict=True))
    return ReturnCoverage(
        coverage=inside,
        coverage_without=without,
        error=error,
        epistemic=epistemic,
        noise=noise,
        steps=len(known),
        episodes=count,
        groups=groups,
        limits=(*agent.epistemic_limits, *LIMITS),
    )


def returns_to_go(episodes: TransitionDataset, discount: float) -> tuple[Array, Array]:
    """Discounted return from every step to the end of its episode, and the discount of what comes after that, 0 after a termination; each `[N]`."""
    starts = episodes.episode_starts
    last = torch.repeat_interleave(starts[1:] - 1, starts.diff())
    remaining = discount ** (last - torch.arange(len(last)) + 1).double() * ~episodes.terminations.cpu()[last]
    return discounted_returns(episodes.rewards, starts, discount).numpy(), remaining.numpy()


@torch.no_grad()
def _values(agent: UncertainAgent, episodes: TransitionDataset, rows: NDArray[np.int64]) -> Array:
    """Q of every member at these rows, `[S, M, n]`."""
    parts = []
    for start in range(0, len(rows), CHUNK):
        index = torch.from_numpy(rows[start : start + CHUNK])
        batch = agent.normalize(episodes.gather(index.expand(len(agent.seeds), -1)).to(agent.device))
        parts.append(agent.critic(batch.observations, batch.actions).double().cpu().numpy())
    return np.concatenate(parts, -1)


def _judge(q: Array, returns: Array, episode: NDArray[np.int64], groups: int) -> tuple[float, ...]:
    """Root mean squares of D, e and n over the groups, and the shares inside the intervals with and without e."""
    members, mean = len(q), q.mean(0)
    order = np.argsort(mean, kind="stable")
    found = np.array([_group(q[:, part], returns[part], episode[part]) for part in np.array_split(order, groups)])
    difference, epistemic, noise = found.T
    reach = stdtrit(members - 1, 0.5 + 0.5 * LEVEL)  # of few members the deviation is uncertain itself
    normal = ndtri(0.5 + 0.5 * LEVEL)
    half = np.hypot(reach * np.sqrt(1.0 + 1.0 / members) * epistemic, normal * noise)
    root = [float(np.sqrt(np.mean(part**2))) for part in (difference, epistemic, noise)]
    return *root, float(np.mean(np.abs(difference) <= half)), float(np.mean(np.abs(difference) <= normal * noise))


def _group(q: Array, returns: Array, episode: NDArray[np.int64]) -> tuple[float, float, float]:
    residual = returns - q.mean(0)
    centred = residual - residual.mean()
    sums = np.bincount(np.unique(episode, return_inverse=True)[1], centred)
    clusters = len(sums)
    noise = np.sqrt(clusters / max(clusters - 1, 1) * np.sum(sums**2)) / len(residual)
    if clusters < 2:  # nothing tells its noise: the spread of the steps is the least that it is
        noise = float(np.std(residual))
    return float(residual.mean()), float(np.std(q.mean(1), ddof=1)), float(noise)
