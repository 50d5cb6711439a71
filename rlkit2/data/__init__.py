"""Minari in, tensors out: one replay and dataset layer for every part of rlkit2."""

from rlkit2.data.audit.checks import audit as audit
from rlkit2.data.audit.findings import AuditReport as AuditReport
from rlkit2.data.batch import Batch as Batch
from rlkit2.data.cache import verify as verify
from rlkit2.data.dataset import TransitionDataset as TransitionDataset
from rlkit2.data.dataset import dataset_from_arrays as dataset_from_arrays
from rlkit2.data.episodes import Episode as Episode
from rlkit2.data.infer import parse_space as parse_space
from rlkit2.data.load import local_datasets as local_datasets
from rlkit2.data.load import read_dataset as read_dataset
from rlkit2.data.normalizers import observation_statistics as observation_statistics
from rlkit2.data.normalizers import reward_transform as reward_transform
from rlkit2.data.preferences import PreferenceBatch as PreferenceBatch
from rlkit2.data.preferences import PreferenceDataset as PreferenceDataset
from rlkit2.data.preferences import SegmentIndex as SegmentIndex
from rlkit2.data.relabel import load_reward as load_reward
from rlkit2.data.relabel import reward_values as reward_values
from rlkit2.data.replay import ReplayBuffer as ReplayBuffer
from rlkit2.data.sources.reader import Reader as Reader
from rlkit2.data.sources.reader import ReadOptions as ReadOptions
from rlkit2.data.spaces import DatasetWarning as DatasetWarning
from rlkit2.data.spec import DatasetSpec as DatasetSpec
from rlkit2.data.weighted import WeightedDataset as WeightedDataset
from rlkit2.data.weighted import with_weights as with_weights
