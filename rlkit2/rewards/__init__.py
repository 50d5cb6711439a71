"""Tabular MDPs, canonical reward forms and the distances between rewards, exact and from data."""

from rlkit2.rewards.batched import batched_starc_distance as batched_starc_distance
from rlkit2.rewards.canonical import CANONICALIZATIONS as CANONICALIZATIONS
from rlkit2.rewards.canonical import canonicalize as canonicalize
from rlkit2.rewards.distances import dard_distance as dard_distance
from rlkit2.rewards.distances import epic_distance as epic_distance
from rlkit2.rewards.distances import srrd_distance as srrd_distance
from rlkit2.rewards.distances import starc_distance as starc_distance
from rlkit2.rewards.distances import starc_matrix as starc_matrix
from rlkit2.rewards.matrix import RewardDistanceMatrix as RewardDistanceMatrix
from rlkit2.rewards.mdp import RewardWarning as RewardWarning
from rlkit2.rewards.mdp import TabularMDP as TabularMDP
from rlkit2.rewards.norms import NORMS as NORMS
from rlkit2.rewards.norms import minimal_norm as minimal_norm
from rlkit2.rewards.norms import standardize as standardize
from rlkit2.rewards.planning import optimal_policy as optimal_policy
from rlkit2.rewards.planning import policy_return as policy_return
from rlkit2.rewards.regret import RegretBound as RegretBound
from rlkit2.rewards.regret import regret as regret
from rlkit2.rewards.regret import regret_bound as regret_bound
from rlkit2.rewards.regret import worst_case_regret as worst_case_regret
from rlkit2.rewards.sampled.estimator import SampledStarc as SampledStarc
