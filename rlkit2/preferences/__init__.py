"""Reward learning from preferences: labels of pairs and the teachers that give them, reward ensembles fitted to them and judged, relabelling.

Names load on first use. The diagnostics of preference losses are a room of their own, `rlkit2.entanglement`; `EntanglementCallback` and
`rlkit2.preferences.entanglement` only hand its names on.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlkit2.data.preferences import PreferenceDataset as PreferenceDataset
    from rlkit2.data.preferences import SegmentIndex as SegmentIndex
    from rlkit2.entanglement.callback import EntanglementCallback as EntanglementCallback
    from rlkit2.preferences.collecting import advantages as advantages
    from rlkit2.preferences.collecting import collect_preferences as collect_preferences
    from rlkit2.preferences.collecting import import_preference_transformer as import_preference_transformer
    from rlkit2.preferences.evaluation import RewardEvaluation as RewardEvaluation
    from rlkit2.preferences.evaluation import baseline_rewards as baseline_rewards
    from rlkit2.preferences.evaluation import calibration as calibration
    from rlkit2.preferences.evaluation import evaluate_reward as evaluate_reward
    from rlkit2.preferences.evaluation import shuffled_labels as shuffled_labels
    from rlkit2.preferences.evaluation import starc_to_truth as starc_to_truth
    from rlkit2.preferences.fitting import fit_reward_model as fit_reward_model
    from rlkit2.preferences.relabelling import relabel as relabel
    from rlkit2.preferences.relabelling import weigh_by_agreement as weigh_by_agreement
    from rlkit2.preferences.reward_ensemble import RewardEnsemble as RewardEnsemble
    from rlkit2.preferences.samplers import sample_pairs as sample_pairs
    from rlkit2.preferences.segment_arrays import SegmentArrays as SegmentArrays
    from rlkit2.preferences.teachers import ScriptedTeacher as ScriptedTeacher

_LAZY = {
    "rlkit2.data.preferences": ("PreferenceDataset", "SegmentIndex"),
    "rlkit2.entanglement.callback": ("EntanglementCallback",),
    "rlkit2.preferences.collecting": ("advantages", "collect_preferences", "import_preference_transformer"),
    "rlkit2.preferences.evaluation": (
        "RewardEvaluation",
        "baseline_rewards",
        "calibration",
        "evaluate_reward",
        "shuffled_labels",
        "starc_to_truth",
    ),
    "rlkit2.preferences.fitting": ("fit_reward_model",),
    "rlkit2.preferences.relabelling": ("relabel", "weigh_by_agreement"),
    "rlkit2.preferences.samplers": ("sample_pairs",),
    "rlkit2.preferences.segment_arrays": ("SegmentArrays",),
    "rlkit2.preferences.teachers": ("ScriptedTeacher",),
    "rlkit2.preferences.reward_ensemble": ("RewardEnsemble",),
}
_PLACES = {name: module for module, names in _LAZY.items() for name in names}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'rlkit2.preferences' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
