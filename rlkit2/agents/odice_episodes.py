"""What O-DICE's weights know of whole episodes: whether they differ, what followed every transition, what its episode earned from the start."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlkit2.data.batch import LookaheadBatch
from rlkit2.data.dataset import TransitionDataset

EQUAL_REWARDS = 0.9
EQUAL_RETURNS = 0.5  # of two outcomes, a goal reached or not, one is that of half the episodes at least


def are_rewards_sparse(dataset: TransitionDataset) -> tuple[bool, str]:
    """Whether what an episode earned tells little: most rewards are the same number, and many episodes earned the same; and what was found, in words.

    A cost for every step until an episode ends is the same number, too, but there episodes earn as much less as they last longer.
    """
    returns = dataset.episode_returns
    unit = returns.abs().max().clamp(min=1e-30) * 1e-6  # what differs by less does so by the rounding of sums
    rewards, earned = _commonest(dataset.rewards), _commonest((returns / unit).round())
    if rewards < EQUAL_REWARDS:
        return False, "dense rewards"
    if earned < EQUAL_RETURNS:
        return (
            False,
            f"rewards that are mostly the same number ({rewards:.0%}) in episodes that earned different amounts",
        )
    return True, f"sparse rewards ({rewards:.0%} are the same number, and {earned:.0%} of the episodes earned the same)"


def _commonest(values: Tensor) -> float:
    """The share of the most common value."""
    counts: Tensor = torch.unique(values, return_counts=True)[1]
    return float(counts.max()) / len(values)


def advantages(
    batch: LookaheadBatch,
    value: Callable[[Tensor], Tensor],
    discount: float,
    mean: Tensor | float = 0.0,
    std: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The discounted return to go less V, at each row and at the first row of its episode, `[S, 1, B]` each, in V's unit.

    A return runs to the end of the episode, with V added there where that was cut off: for the row at t of an episode of T steps

        A_t = sum_(k < T - t) gamma^k r_(t+k) + gamma^(T - t) (1 - terminated) V(s_T) - V(s_t).

    Args:
        batch: normalised, of a dataset that is `looking_ahead(discount=..., episodes=True)`; rewards as they are.
        value: `[S, n, obs]` to `[S, 1, n]`.
        discount: gamma, of the batch's returns.
        mean, std: of the unit that `value` counts in, `[S, 1]` or numbers: V = mean + std value.
    """
    assert batch.returns_to_go is not None and batch.steps_to_go is not None  # noqa: PT018
    assert batch.first_returns is not None and batch.first_steps is not None  # noqa: PT018
    assert batch.first_observations is not None and batch.final_observations is not None  # noqa: PT018
    assert batch.final_terminations is not None
    rows = batch.returns_to_go.shape[1]
    three = torch.cat([batch.observations, batch.first_observations, batch.final_observations], 1)
    here, first, final = value(three).split_with_sizes([rows, rows, rows], -1)
    after = (mean + std * final[:, 0]) * (1.0 - batch.final_terminations)

    def less(known: Tensor, earned: Tensor, steps: Tensor) -> Tensor:
        return ((earned + discount**steps * after - mean) / std).unsqueeze(1) - known

    return less(here, batch.returns_to_go, batch.steps_to_go), less(first, batch.first_returns, batch.first_steps)


def discounted_sums(values: Tensor, steps_to_go: Tensor, discount: float) -> Tensor:
    """sum_(k < steps to go) discount^k values[t + k] of every row t, `[S, N]`, by doubling: as many steps as the longest episode has binary digits.

    Args:
        values: `[S, N]`, episode after episode.
        steps_to_go: `[N]`, see `TransitionDataset.steps_to_go`.
        discount: in [0, 1].
    """
    sums, reach, longest = values, 1, int(steps_to_go.max())
    while reach < longest and discount > 0.0:
        later = torch.where(steps_to_go[:-reach] > reach, sums[:, reach:], 0.0)
        sums = torch.cat([sums[:, :-reach] + discount * later, sums[:, -reach:]], 1)
        reach, discount = 2 * reach, discount * discount
    return sums


def episode_weights(earned: Tensor, strength: float, floor: float) -> Tensor | None:
    """Weights of the batch's episodes, `[S, 1, B]` of mean 1: (1 - floor) exp(strength A / sd) / mean + floor; None: all the same.

    Source: Hong et al., "Harnessing Mixed Offline Reinforcement Learning Datasets via Trajectory Weighting" (ICLR 2023), with the spread of the
    batch for their temperature.

    Args:
        earned: A at the first row of each row's episode, `[S, 1, B]`.
        strength: at least 0; 0: none.
        floor: in [0, 1].
    """
    if strength == 0.0:
        return None
    spread = in_spreads(earned) * strength
    weight = (spread - spread.amax(2, keepdim=True)).exp()
    return weight / weight.mean(2, keepdim=True) * (1.0 - floor) + floor


def in_spreads(values: Tensor) -> Tensor:
    """Values `[S, 1, B]` in units of their standard deviation over the batch; 0 where they are all the same but for rounding."""
    spread, size = values.std(2, keepdim=True, correction=0), values.abs().amax(2, keepdim=True)
    return torch.where(spread > 1e-6 * size, values / spread, 0.0)
