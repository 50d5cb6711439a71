"""New rewards from arrays, functions, modules and files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rlkit2.data import TransitionDataset, load_reward, read_dataset, reward_values
from rlkit2.errors import RewardError
from tests.data.make import FAMILIES, Ending, make_minari


@pytest.fixture
def dataset() -> TransitionDataset:
    """Thirteen transitions whose observations say (episode, step)."""
    return read_dataset(make_minari([Ending(6, True, False), Ending(7, False, True)], *FAMILIES["box32"]))


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_functions_see_the_rows_of_the_dataset(dataset: TransitionDataset, chunk: int) -> None:
    def reward(observations, actions, next_observations, terminations):
        assert len(observations) <= chunk
        return observations[:, 1] + 10 * next_observations[:, 1] + 100 * actions[:, 0] + 1000 * terminations

    expected = (
        dataset.observations[:, 1]
        + 10 * dataset.next_observations[:, 1]
        + 100 * dataset.actions[:, 0]
        + 1000 * dataset.terminations
    )
    calls: list[tuple[int, int]] = []
    values = reward_values(dataset, reward, chunk=chunk, progress=lambda *call: calls.append(call))
    assert torch.equal(values, expected)
    assert calls[-1] == (13, 13)


def test_modules_are_called_without_gradients(dataset: TransitionDataset) -> None:
    class Linear(torch.nn.Module):
        """A reward with a parameter."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, observations, actions, next_observations, terminations):
            return self.weight * observations[:, 1]

    values = reward_values(dataset, Linear())
    assert not values.requires_grad
    assert torch.equal(values, 2 * dataset.observations[:, 1])


def test_arrays_of_numpy_and_torch(dataset: TransitionDataset) -> None:
    assert reward_values(dataset, np.arange(13)).tolist() == list(range(13))
    assert reward_values(dataset, torch.arange(13.0).double()).dtype == torch.float32
    with pytest.raises(RewardError, match=r"has shape \[12\] for 13 transitions"):
        reward_values(dataset, np.zeros(12))
    with pytest.raises(RewardError, match="is inf at row 7; rewards must be finite"):
        reward_values(dataset, lambda s, *_: torch.where((s[:, 0] == 1) & (s[:, 1] == 1), torch.inf, 0.0), chunk=5)
    with pytest.raises(RewardError, match="gives no numbers"):
        reward_values(dataset, lambda *_: "text")


def test_files_of_tensors(tmp_path: Path) -> None:
    save_file({"rewards": torch.arange(3.0), "other": torch.zeros(1)}, tmp_path / "a.safetensors")
    values, origin = load_reward(str(tmp_path / "a.safetensors"))
    assert values.tolist() == [0, 1, 2]
    assert origin["reward"].endswith("a.safetensors")
    assert len(origin["sha256"]) == 64
    np.savez(tmp_path / "two.npz", a=np.zeros(1), b=np.zeros(1))
    with pytest.raises(RewardError, match="must hold one array or one named 'rewards'; it has a, b"):
        load_reward(str(tmp_path / "two.npz"))
