"""Preference pairs, teachers and the diagnostics of preference losses."""

from rlkit2.data.preferences import PreferenceDataset, SegmentIndex
from rlkit2.preferences.collecting import advantages, collect_preferences, import_preference_transformer
from rlkit2.preferences.samplers import sample_pairs
from rlkit2.preferences.teachers import ScriptedTeacher

__all__ = [
    "PreferenceDataset",
    "ScriptedTeacher",
    "SegmentIndex",
    "advantages",
    "collect_preferences",
    "import_preference_transformer",
    "sample_pairs",
]
