"""What an update costs whatever the machine: operations, products and host synchronisations."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rlkit2.agents import agent_class, make_config
from rlkit2.agents.base import Agent
from tests.agents.problems import batch_maker, random_batch, small_config
from tests.agents.test_snapshots import case_id, cases

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


class NoHostNumbers(TorchFunctionMode):
    """Refuses tensors made of numbers on the host: on a GPU each is a copy, which waits, and cannot be captured in a graph."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy):
            assert isinstance(args[0], Tensor), f"a tensor made of {args[0]!r}"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", cases(), ids=lambda case: case_id(*case))
def test_no_update_copies_numbers_to_the_device(case: tuple[str, str, dict[str, Any]]) -> None:
    name, kind, options = case
    cls = agent_class(name, kind)
    config = small_config(partial(make_config, name, kind), cls.config_class, **options)
    agent = cls(config, 3, 2, discrete=kind == "discrete")
    make = batch_maker(cls)
    with NoHostNumbers():
        for t in range(agent.phases):
            agent.update(make(1, 8, 3, 2, discrete=kind == "discrete", generator=t))


def test_a_copied_number_is_noticed() -> None:
    with NoHostNumbers(), pytest.raises(AssertionError, match="made of 1"):
        torch.as_tensor(1.0)
