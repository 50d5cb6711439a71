"""Writing a `TransitionDataset` back as a Minari dataset."""

from __future__ import annotations

import shutil
import warnings
from typing import Any

import minari
import numpy as np
import torch
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.load import minari_root
from rlkit2.errors import DatasetError


def to_minari(dataset: TransitionDataset, dataset_id: str, **metadata: Any) -> minari.MinariDataset:
    """Write `dataset` as the Minari dataset `dataset_id` under Minari's root and return it; `metadata` goes to Minari (author, description, ...).

    Loading it again gives equal tensors. Dict and Tuple observations are written as the flat Box that the dataset holds.
    Raises `DatasetError` where the id is taken or invalid, or where the next observation of a step is not the observation of
    the step after it; nothing is left half-written.
    """
    spec = dataset.spec
    for episode in range(dataset.num_episodes):
        fields = dataset.episode(episode)
        if not torch.equal(_bits(fields["observations"][1:]), _bits(fields["next_observations"][:-1])):
            raise DatasetError(
                f"episode {episode} of {spec.id} is not contiguous; Minari stores one chain of observations per episode"
            )
    folder = minari_root() / dataset_id
    if folder.exists():
        raise DatasetError(f"{dataset_id} exists in {minari_root()}; choose another id or delete it")
    options: dict[str, Any] = {
        "env": spec.env_spec,
        "eval_env": spec.eval_env_spec,
        "ref_min_score": spec.ref_min_score,
        "ref_max_score": spec.ref_max_score,
        "observation_space": _observation_space(dataset),
        "action_space": _action_space(dataset),
        "jpeg_encoding": False,
        **metadata,
    }
    buffers = [_buffer(dataset, episode) for episode in range(dataset.num_episodes)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Minari asks for author and permalink
            return minari.create_dataset_from_buffers(dataset_id, buffers, **options)
    except (ValueError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise DatasetError(f"{dataset_id} could not be written: {error}") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Values compared as bits, so that NaN equals itself."""
    return values.contiguous().view(torch.int32) if values.dtype == torch.float32 else values


def _observation_space(dataset: TransitionDataset) -> spaces.Space[Any]:
    space = dataset.spec.observation_space
    shape = tuple(dataset.observations.shape[1:])
    if isinstance(space, spaces.Box):
        if space.dtype == np.uint8:
            return space
        with np.errstate(over="ignore"):
            return spaces.Box(
                space.low.reshape(shape).astype(np.float32),
                space.high.reshape(shape).astype(np.float32),
                dtype=np.float32,
            )
    return spaces.Box(-np.inf, np.inf, shape, np.float32)


def _action_space(dataset: TransitionDataset) -> spaces.Space[Any]:
    space = dataset.spec.action_space
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) and (
        isinstance(space, spaces.Discrete) or space.nvec.ndim == 1
    ):
        return space
    if isinstance(space, spaces.Box):
        shape = tuple(dataset.actions.shape[1:])
        return spaces.Box(
            space.low.reshape(shape).astype(np.float32), space.high.reshape(shape).astype(np.float32), dtype=np.float32
        )
    if dataset.actions.dtype == torch.int64:
        return spaces.MultiDiscrete((dataset.actions.amax(0) + 1).tolist())
    return spaces.Box(-np.inf, np.inf, tuple(dataset.actions.shape[1:]), np.float32)


def _buffer(dataset: TransitionDataset, episode: int) -> EpisodeBuffer:
    fields = {name: value.numpy() for name, value in dataset.episode(episode).items()}
    return EpisodeBuffer(
        id=episode,
        observations=np.concatenate([fields["observations"], fields["next_observations"][-1:]]),
        actions=np.ascontiguousarray(fields["actions"]),
        rewards=np.ascontiguousarray(fields["rewards"]),
        terminations=np.ascontiguousarray(fields["terminations"]),
        truncations=np.ascontiguousarray(fields["truncations"]),
    )
