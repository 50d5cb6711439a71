"""Agents that act: collecting in environments, a replay that survives kills, and learning from it beside offline data."""
