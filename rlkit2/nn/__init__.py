"""Stacked networks, heads and distributions; every parameter carries the seed axis in front."""
