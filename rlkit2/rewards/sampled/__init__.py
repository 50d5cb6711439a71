"""Distances between rewards estimated from recorded transitions, with intervals."""

from rlkit2.rewards.sampled.collecting import collect as collect
from rlkit2.rewards.sampled.estimator import SampledStarc as SampledStarc
from rlkit2.rewards.sampled.features import EncodedFeatures as EncodedFeatures
from rlkit2.rewards.sampled.features import FeatureMap as FeatureMap
from rlkit2.rewards.sampled.features import Features as Features
