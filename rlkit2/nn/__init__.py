"""Stacked networks, heads and distributions; every parameter carries the seed axis in front."""

from rlkit2.nn.actors import Actor, GreedyActor, make_actor
from rlkit2.nn.critics import Critic
from rlkit2.nn.mlp import StackedMLP, lerp_, linearize, named_tensors, target_copy, unflatten
from rlkit2.nn.normalizer import Normalizer
from rlkit2.nn.optim import Adam
from rlkit2.nn.policy import Policy, load_policy
from rlkit2.nn.products import fast_products

__all__ = [
    "Actor",
    "Adam",
    "Critic",
    "GreedyActor",
    "Normalizer",
    "Policy",
    "StackedMLP",
    "fast_products",
    "lerp_",
    "linearize",
    "load_policy",
    "make_actor",
    "named_tensors",
    "target_copy",
    "unflatten",
]
