"""Minari in, tensors out."""
