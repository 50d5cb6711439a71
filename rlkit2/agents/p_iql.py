"""Implicit Q-learning on rewards that were learned from preferences: the two-stage method that others are held against.

First a Bradley-Terry reward model is fitted to the labels and the dataset gets its rewards (`rlkit2 prefs fit`, which writes them to a file),
then IQL learns from them as from any reward.

Source: Hejna, Rafailov, Sikchi, Finn, Niekum, Knox, Sadigh, "Contrastive Preference Learning" (ICLR 2024), where it is the baseline P-IQL; Kim,
Park, Shin, Lee, Abbeel, Lee, "Preference Transformer" (ICLR 2023), whose Markovian reward model it uses. The agent is `rlkit2.agents.iql`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlkit2.agents.iql import IQL, IQLConfig
from rlkit2.data.reward_file import load_rewards
from rlkit2.errors import ConfigError


@dataclass(frozen=True)
class PIQLConfig(IQLConfig):
    """IQL on rewards learned from preferences."""

    # file of learned rewards (rewards.safetensors of rlkit2 prefs fit)
    rewards: str = ""


class PIQL(IQL):
    """IQL on learned rewards for S seeds; arguments as for `Agent`."""

    config_class = PIQLConfig
    config: PIQLConfig

    @classmethod
    def prepare_dataset(cls, config: PIQLConfig, dataset: Any, load: Callable[[str], Any] | None = None) -> Any:
        """The dataset with the learned rewards in place of its own.

        Raises:
            ConfigError: no file is named; RewardError, DatasetError: it cannot be used for this dataset.
        """
        if not config.rewards:
            raise ConfigError(
                "p_iql learns from learned rewards: name their file (--rewards); make it with: rlkit2 prefs fit"
            )
        return dataset.with_rewards(load_rewards(config.rewards, dataset))
