"""Rollouts, scores and their statistics."""

from rlkit2.data.environments import EnvSource, make_environment
from rlkit2.evaluation.aggregates import (
    Profile,
    bandit_performance,
    expected_online_performance,
    optimality_gap,
    performance_profile,
    pooled_gap,
    pooled_median,
    worst_of,
)
from rlkit2.evaluation.evaluation import Evaluation
from rlkit2.evaluation.reference_scores import ReferenceScores, reference_scores
from rlkit2.evaluation.rollouts import Evaluator, evaluate_policy, evaluation_seeds
from rlkit2.evaluation.statistics import (
    Estimate,
    bootstrap,
    interquartile_mean,
    pooled_iqm,
    pooled_mean,
    probability_of_improvement,
    standard_errors,
)

__all__ = [
    "EnvSource",
    "Estimate",
    "Evaluation",
    "Evaluator",
    "Profile",
    "ReferenceScores",
    "bandit_performance",
    "bootstrap",
    "evaluate_policy",
    "evaluation_seeds",
    "expected_online_performance",
    "interquartile_mean",
    "make_environment",
    "optimality_gap",
    "performance_profile",
    "pooled_gap",
    "pooled_iqm",
    "pooled_mean",
    "pooled_median",
    "probability_of_improvement",
    "reference_scores",
    "standard_errors",
    "worst_of",
]
