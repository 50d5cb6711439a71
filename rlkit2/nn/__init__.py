"""Stacked networks, heads and distributions; every parameter carries the seed axis in front."""

from rlkit2.nn.actors import Actor, GreedyActor, make_actor
from rlkit2.nn.critics import Critic
from rlkit2.nn.encoders import EncodedMLP, Image, as_rows, choose_encoder, make_network, random_shift
from rlkit2.nn.matmul import fast_matmul
from rlkit2.nn.mlp import StackedMLP, layer_sizes, lerp_, named_tensors, target_copy, unflatten, vjp
from rlkit2.nn.normalizer import Normalizer
from rlkit2.nn.optim import Adam
from rlkit2.nn.policy import Policy, load_policy

__all__ = [
    "Actor",
    "Adam",
    "Critic",
    "EncodedMLP",
    "GreedyActor",
    "Image",
    "Normalizer",
    "Policy",
    "StackedMLP",
    "as_rows",
    "choose_encoder",
    "fast_matmul",
    "layer_sizes",
    "lerp_",
    "load_policy",
    "make_actor",
    "make_network",
    "named_tensors",
    "random_shift",
    "target_copy",
    "unflatten",
    "vjp",
]
