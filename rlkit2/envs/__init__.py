"""Environments of our own, behaviour policies and the built-in datasets."""
