"""Agents that act: collecting in environments, a replay that survives kills, and learning from it beside offline data."""

from rlkit2.online.recording import collected as collected
from rlkit2.online.recording import record as record
