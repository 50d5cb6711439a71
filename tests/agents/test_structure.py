"""What an update costs whatever the machine: operations, products and host synchronisations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rlkit2.agents import agent_class, make_config
from rlkit2.agents.base import Agent
from tests.agents.problems import random_batch

# Hopper's sizes, batch 256, two layers of 256 in every network. Counted are operations that read or write data, not views.
LIMITS = {"iql": (125, 525.0), "td3bc": (140, 430.0)}


class Operations(TorchDispatchMode):
    """Counts dispatched operations, without views, detachments and the optimiser's profiling marks."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(operation)
        if not (operation.is_view or name.startswith("profiler") or name.split(".")[1] in ("detach", "alias")):
            self.counts[name] += 1
        return operation(*args, **(kwargs or {}))


def measure(agent: Agent, period: int = 2) -> tuple[float, float]:
    """Operations and MFLOP an update, mean over `period` updates (one policy delay)."""
    batch = random_batch(len(agent.seeds), 256, 11, 3)
    for _ in range(period):
        agent.update(batch)
    with Operations() as operations:
        for _ in range(period):
            agent.update(batch)
    with FlopCounterMode(display=False) as flops:
        for _ in range(period):
            agent.update(batch)
    return sum(operations.counts.values()) / period, flops.get_total_flops() / 1e6 / period


@pytest.mark.parametrize("name", LIMITS)
def test_operations_and_products_of_an_update(name: str) -> None:
    agent = agent_class(name)(make_config(name), 11, 3)
    operations, mflop = measure(agent)
    assert operations <= LIMITS[name][0]
    assert mflop <= LIMITS[name][1]


@pytest.mark.parametrize("name", LIMITS)
def test_more_seeds_cost_no_more_operations(name: str) -> None:
    """The seeds are an axis, not a loop."""
    one, four = (measure(agent_class(name)(make_config(name, hidden_sizes=(32, 32)), 11, 3, seeds=s)) for s in (1, 4))
    assert four[0] <= one[0] + 4  # gradients of several parameters are copied into the seeds' layout
    assert four[1] == pytest.approx(4 * one[1])


def test_the_count_sees_operations_and_not_views() -> None:
    x = torch.ones(4, 4)
    with Operations() as operations:
        _ = (x @ x).view(2, 8).T[0] + 1.0
    assert sum(operations.counts.values()) == 2
