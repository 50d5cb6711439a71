"""How good a learned reward is: on held-out pairs, against the true reward, and beside the baselines that must be beaten."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.preferences import PreferenceDataset
from rlkit2.errors import ConfigError
from rlkit2.preferences.fitting import fit_reward_model
from rlkit2.preferences.reward_ensemble import RewardEnsemble

Array = NDArray[np.float64]
BINS = 10
GAP_BINS = 4


@dataclass(frozen=True)
class RewardEvaluation:
    """What `evaluate_reward` found for one reward (one seed).

    Attributes:
        accuracy: share of decided held-out pairs whose preferred segment has the larger predicted return; predicted ties count one half.
        nll, brier, ece: mean negative log-likelihood in nats, mean squared error and 10-bin calibration error of the probability that the
            second is preferred, ties included as 0.5 (nll, brier) or left out (ece); None for a reward without a temperature.
        accuracy_by_gap: accuracy in quarters of the pairs by the size of the true return gap, smallest first; None without a true reward.
        disagreement_auroc: probability that a wrongly predicted pair has a larger disagreement between the members than a right one; None
            for one member, or where no pair or every pair is wrong.
        return_correlation: Spearman's rank correlation of predicted and true episode returns (which sees the free offset where lengths differ).
        segment_correlation: the same for the segments of the held-out pairs, where the offset has no part.
        pairs, ties: held-out pairs, and those without a decision.
    """

    accuracy: float
    nll: float | None
    brier: float | None
    ece: float | None
    accuracy_by_gap: list[float] | None
    disagreement_auroc: float | None
    return_correlation: float | None
    segment_correlation: float | None
    pairs: int
    ties: int

    def to_dict(self) -> dict[str, Any]:
        """All numbers as JSON values."""
        return asdict(self)


def calibration(probabilities: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Accuracy, NLL (nats), Brier score and 10-bin ECE of probabilities `[P]` that the second is preferred.

    Args:
        probabilities: in [0, 1].
        labels: probability mass on the second in [0, 1]; 0.5 is a tie, left out of accuracy and ECE.

    Source: ECE of Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), on the probability of the second answer; bins are
    `floor(10 p)` with the last one closed.
    """
    p, y = np.asarray(probabilities, np.float64), np.asarray(labels, np.float64)
    if p.shape != y.shape or p.ndim != 1 or not p.size:
        raise ConfigError(f"probabilities {list(p.shape)} and labels {list(y.shape)} must be [P] with P at least 1")
    clipped = np.clip(p, 1e-300, 1 - 1e-16)
    nll = -(y * np.log(clipped) + (1 - y) * np.log1p(-clipped))
    decided = y != 0.5
    bins = np.minimum((BINS * p[decided]).astype(int), BINS - 1)
    ece = 0.0
    for b in range(BINS):
        inside = bins == b
        if inside.any():
            ece += inside.mean() * abs(p[decided][inside].mean() - y[decided][inside].mean())
    return {
        "accuracy": float(_right(p[decided] - 0.5, y[decided]).mean()) if decided.any() else math.nan,
        "nll": float(nll.mean()),
        "brier": float(((p - y) ** 2).mean()),
        "ece": float(ece),
    }


def _right(margin: Array, y: Array) -> Array:
    """1 where the sign of the margin agrees with the label, 0.5 where the margin is zero, else 0."""
    return np.where(margin == 0, 0.5, (margin > 0) == (y > 0.5))


def evaluate_reward(
    reward: RewardEnsemble | ArrayLike,
    held_out: PreferenceDataset,
    dataset: TransitionDataset,
    *,
    true_rewards: ArrayLike | None = None,
) -> RewardEvaluation:
    """Judge one reward on held-out pairs and against the true reward.

    Args:
        reward: an ensemble of one seed, or rewards `[N]` of the dataset.
        held_out: pairs that took no part in fitting.
        dataset: the dataset of the pairs.
        true_rewards: `[N]`; None: not known.

    Raises:
        ConfigError: an ensemble of several seeds; DatasetError: pairs of another dataset.
    """
    first, second = held_out.rows(dataset)
    y = held_out.label_mass.numpy()
    auroc = None
    if isinstance(reward, RewardEnsemble):
        if len(reward.seeds) != 1:
            raise ConfigError(f"evaluate a reward model of one seed, not {len(reward.seeds)}; use select_seed")
        rewards = mean_rewards(reward, dataset)
        members = reward.probabilities(dataset, first, second)[0].double().numpy()
        p = members.mean(0)
        scores: dict[str, float] | None = calibration(p, y)
        margin = p - 0.5
        auroc = _auroc(members.std(0), _right(margin, y), y) if reward.members > 1 else None
    else:
        rewards = np.asarray(reward, np.float64)
        margin = rewards[second].sum(1) - rewards[first].sum(1)
        scores = None
    decided = y != 0.5
    right = _right(margin[decided], y[decided])
    truth = None if true_rewards is None else np.asarray(true_rewards, np.float64)
    by_gap = segment = episode = None
    if truth is not None:
        returns = [truth[rows].sum(1) for rows in (first, second)]
        order = np.argsort(np.abs(returns[1] - returns[0])[decided], kind="stable")
        by_gap = [float(part.mean()) for part in np.array_split(right[order], GAP_BINS) if len(part)]
        rows = np.concatenate([first, second])
        segment = _spearman(rewards[rows].sum(1), truth[rows].sum(1))
        ends = np.asarray(dataset.episode_starts)[:-1]
        episode = _spearman(np.add.reduceat(rewards, ends), np.add.reduceat(truth, ends))
    return RewardEvaluation(
        accuracy=float(right.mean()) if decided.any() else math.nan,
        nll=scores["nll"] if scores else None,
        brier=scores["brier"] if scores else None,
        ece=scores["ece"] if scores else None,
        accuracy_by_gap=by_gap,
        disagreement_auroc=auroc,
        return_correlation=episode,
        segment_correlation=segment,
        pairs=len(y),
        ties=int((~decided).sum()),
    )


def _auroc(disagreement: Array, right: Array, y: Array) -> float | None:
    wrong = (right < 0.5) & (y != 0.5)
    good = (right >= 0.5) & (y != 0.5)
    if not wrong.any() or not good.any():
        return None
    from scipy import stats  # takes a second to import

    return float(stats.mannwhitneyu(disagreement[wrong], disagreement[good]).statistic / (wrong.sum() * good.sum()))


def _spearman(a: Array, b: Array) -> float | None:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None  # a constant has no ranks
    from scipy import stats

    return float(stats.spearmanr(a, b).statistic)


def shuffled_labels(preferences: PreferenceDataset, *, seed: int = 0) -> PreferenceDataset:
    """The same pairs with fair coin flips for labels: a reward fitted to them is the baseline "random labels"."""
    flips = np.random.default_rng(seed).integers(2, size=len(preferences)).astype(np.float64)
    return PreferenceDataset(
        preferences.segments_w,
        preferences.segments_l,
        flips,  # type: ignore[arg-type]
        {"teacher": "coin", "seed": seed},
        length=preferences.length,
        dataset_id=preferences.dataset_id,
        dataset_hash=preferences.dataset_hash,
    )


def baseline_rewards(
    preferences: PreferenceDataset, dataset: TransitionDataset, true_rewards: ArrayLike, *, seed: int = 0, **fit: Any
) -> dict[str, RewardEnsemble | Array]:
    """The rewards that a learned one must be held against.

    "zero" and "constant" (one per step) say what no information gives; "random labels", a model fitted to coin flips about the same pairs,
    what fitting alone gives; "true" is the best there is. On many offline datasets a trivial reward already trains well (Shin et al., TMLR
    2023), so a score of a learned reward means nothing without them.

    Args:
        preferences: the pairs a reward was fitted to.
        dataset: their dataset.
        true_rewards: `[N]`.
        seed: of the coin flips.
        fit: arguments of `fit_reward_model`.
    """
    return {
        "zero": np.zeros(len(dataset)),
        "constant": np.ones(len(dataset)),
        "random labels": fit_reward_model(shuffled_labels(preferences, seed=seed), dataset, seeds=[seed], **fit),
        "true": np.asarray(true_rewards, np.float64),
    }


def mean_rewards(reward: RewardEnsemble | ArrayLike, dataset: TransitionDataset) -> Array:
    """Rewards `[N]` of a dataset: an ensemble's mean over members (one seed), or the array itself."""
    if isinstance(reward, RewardEnsemble):
        return np.asarray(reward.dataset_rewards(dataset)[0].double().mean(0).numpy())
    return np.asarray(reward, np.float64)


def starc_to_truth(
    dataset: TransitionDataset,
    rewards: Mapping[str, ArrayLike],
    true_rewards: ArrayLike,
    *,
    discount: float = 0.99,
    **settings: Any,
) -> dict[str, dict[str, Any]]:
    """STARC distance of every reward to the true one, estimated on the dataset with a 95 % bootstrap interval.

    Args:
        dataset: whose dynamics and behaviour policy canonicalise the rewards.
        rewards: `[N]` each, by name.
        true_rewards: `[N]`.
        discount: of the canonical form, in [0, 1).
        settings: further arguments of `rlkit2.rewards.SampledStarc`.

    Returns:
        name -> `distance`, `low`, `high`; numbers are None where the data do not determine a distance.
    """
    from rlkit2.rewards import SampledStarc

    names = list(rewards)
    matrix = SampledStarc(discount=discount, **settings).fit(dataset, {"true": true_rewards, **rewards})
    found = {}
    for name in names:
        column = matrix.names.index(name)
        row = matrix.names.index("true")
        low, high = (None, None) if matrix.ci is None else matrix.ci[row, column]
        found[name] = {
            key: float(value) if value is not None and math.isfinite(value) else None
            for key, value in (("distance", matrix.values[row, column]), ("low", low), ("high", high))
        }
    return found
