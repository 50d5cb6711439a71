"""Preference pairs, teachers and the diagnostics of preference losses."""
