"""Judging policies from data alone: what they would earn, how sure that is, and which of them to try first."""

from rlkit2.evaluation.offline.estimate import ValueEstimate
from rlkit2.evaluation.offline.evaluate import METHODS, Candidate, judge
from rlkit2.evaluation.offline.options import OfflineOptions
from rlkit2.evaluation.offline.ranking import agreement, order, rank_correlation, regret_at_k
from rlkit2.evaluation.offline.result import OfflineEvaluation

__all__ = [
    "METHODS",
    "Candidate",
    "OfflineEvaluation",
    "OfflineOptions",
    "ValueEstimate",
    "agreement",
    "judge",
    "order",
    "rank_correlation",
    "regret_at_k",
]
