"""Numbers below 1e-38 are flushed while groups train, in every thread, and nowhere else."""

from threading import Event
from typing import Any

import pytest
import torch

from rlkit2.data import dataset_from_arrays
from rlkit2.training.groups import SeedGroup, advance_groups

CPU = torch.device("cpu")


class Halving:
    """An agent whose one weight halves with every update."""

    seeds: tuple[int, ...] = (0,)
    phases = 1
    config = None

    @staticmethod
    def labels_data(config: None) -> bool:
        return False

    def __init__(self, start: float) -> None:
        self.weight = torch.full((1,), start)

    def learn(self, batch: Any) -> dict[str, torch.Tensor]:
        self.weight.mul_(0.5)
        return {"weight/size": self.weight.clone()}


@pytest.mark.parametrize("groups", [1, 3])
def test_subnormals_are_zero_in_every_thread_of_a_training_and_kept_elsewhere(groups: int) -> None:
    column = torch.zeros(8, 1)
    data = dataset_from_arrays(column, column, column[:, 0], column, column[:, 0] > 0, column[:, 0] > 0)
    agents = [Halving(1.5e-38) for _ in range(groups)]
    advance_groups([SeedGroup(agent, data, 2, CPU, "off") for agent in agents], 3, Event())  # type: ignore[arg-type]
    assert [float(agent.weight) for agent in agents] == [0.0] * groups
    assert float(torch.full((1,), 1.5e-38) * 0.25) > 0.0


def test_a_thread_that_flushed_before_goes_on_flushing() -> None:
    column = torch.zeros(8, 1)
    data = dataset_from_arrays(column, column, column[:, 0], column, column[:, 0] > 0, column[:, 0] > 0)
    torch.set_flush_denormal(True)
    try:
        SeedGroup(Halving(1.0), data, 2, CPU, "off").advance(1)  # type: ignore[arg-type]
        assert float(torch.full((1,), 1.5e-38) * 0.25) == 0.0
    finally:
        torch.set_flush_denormal(False)
