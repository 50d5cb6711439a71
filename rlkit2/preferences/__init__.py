"""Preference pairs, teachers and the diagnostics of preference losses."""

from typing import TYPE_CHECKING, Any

from rlkit2.data.preferences import PreferenceDataset, SegmentIndex
from rlkit2.preferences.collecting import advantages, collect_preferences, import_preference_transformer
from rlkit2.preferences.evaluation import (
    RewardEvaluation,
    baseline_rewards,
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

if TYPE_CHECKING:
    from rlkit2.preferences.callback import EntanglementCallback

__all__ = [
    "EntanglementCallback",
    "PreferenceDataset",
    "RewardEnsemble",
    "RewardEvaluation",
    "ScriptedTeacher",
    "SegmentIndex",
    "advantages",
    "baseline_rewards",
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


def __getattr__(name: str) -> Any:
    if name == "EntanglementCallback":  # needs transformers
        from rlkit2.preferences.callback import EntanglementCallback

        return EntanglementCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
