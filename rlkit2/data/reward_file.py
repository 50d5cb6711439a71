"""Rewards for the transitions of one dataset in a file that knows which dataset they are for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.preferences import transitions_hash
from rlkit2.data.relabel import reward_values
from rlkit2.errors import DatasetError, RewardError
from rlkit2.files import make_folder, write_atomically


def save_rewards(
    path: str | os.PathLike[str], dataset: TransitionDataset, rewards: Tensor, provenance: Mapping[str, Any]
) -> None:
    """Write `rewards [N]` of `dataset` as safetensors, with a hash of the dataset's transitions and `provenance` (JSON values) inside.

    Raises:
        RewardError: rewards that are not one finite number per transition, or a folder that cannot be written.
    """
    values = reward_values(dataset, rewards)
    facts = {
        "dataset": dataset.spec.id,
        "dataset_hash": transitions_hash(dataset),
        "provenance": json.dumps(dict(provenance)),
    }
    make_folder(Path(path).parent)
    write_atomically(path, save({"rewards": values.contiguous()}, metadata=facts))


def load_rewards(path: str | os.PathLike[str], dataset: TransitionDataset) -> Tensor:
    """Rewards `[N]` float32 that `save_rewards` wrote for this dataset.

    Raises:
        RewardError: missing or damaged file.
        DatasetError: the rewards are for another dataset.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts, rewards = file.metadata() or {}, file.get_tensor("rewards")
    except (OSError, SafetensorError, RuntimeError) as error:
        raise RewardError(
            f"{path} holds no learned rewards ({error}); rlkit2 prefs fit writes them as rewards.safetensors"
        ) from error
    if facts.get("dataset_hash") != transitions_hash(dataset):
        raise DatasetError(
            f"the rewards in {path} are for {facts.get('dataset', 'an unknown dataset')}, not for {dataset.spec.id} as given"
        )
    return reward_values(dataset, rewards)
