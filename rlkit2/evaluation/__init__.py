"""Rollouts, scores and their statistics."""

from rlkit2.evaluation.environments import EnvSource, make_environment
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
    "ReferenceScores",
    "bootstrap",
    "evaluate_policy",
    "evaluation_seeds",
    "interquartile_mean",
    "make_environment",
    "pooled_iqm",
    "pooled_mean",
    "probability_of_improvement",
    "reference_scores",
    "standard_errors",
]
