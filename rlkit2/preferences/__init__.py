"""Preference pairs, teachers and the diagnostics of preference losses."""

from rlkit2.data.preferences import PreferenceDataset, SegmentIndex
from rlkit2.preferences.collecting import advantages, collect_preferences, import_preference_transformer
from rlkit2.preferences.evaluation import (
    RewardEvaluation,
    calibration,
    evaluate_reward,
    shuffled_labels,
    starc_to_truth,
)
from rlkit2.preferences.fitting import fit_reward_model
from rlkit2.preferences.relabelling import relabel, weigh_by_agreement
from rlkit2.preferences.samplers import sample_pairs
from rlkit2.preferences.teachers import ScriptedTeacher
from rlkit2.rewards.models import RewardEnsemble

__all__ = [
    "PreferenceDataset",
    "RewardEnsemble",
    "RewardEvaluation",
    "ScriptedTeacher",
    "SegmentIndex",
    "advantages",
    "calibration",
    "collect_preferences",
    "evaluate_reward",
    "fit_reward_model",
    "import_preference_transformer",
    "relabel",
    "sample_pairs",
    "shuffled_labels",
    "starc_to_truth",
    "weigh_by_agreement",
]
