"""A short run of the array fuzzer, and that it leaves out no function."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
import torch

import rlkit2.losses
from rlkit2 import rewards
from rlkit2.errors import ConfigError, RewardError
from rlkit2.evaluation import statistics
from rlkit2.guard import guarded
from rlkit2.losses.ggd import ggd_nll
from rlkit2.rewards import TabularMDP
from tests.fuzz.arrays import calls, try_one

NO_ARRAYS = {  # make losses of losses, or take an object that is fuzzed by itself
    "softplus", "resolve_divergence", "get_margin_loss", "margin_loss", "margin_coefficients", "mixture", "weighted", "wpo_weight", "wpo",
    "on_f_divergence", "on_alpha_reward", "resampled_seed_scores",
}  # fmt: skip


def test_odd_arrays_are_answered_or_refused() -> None:
    every = calls()
    for number in range(0, 40 * len(every), 37):
        what, came = try_one(number, every)
        assert came in ("answered", "refused"), f"{what}: {came}"


def test_no_public_function_is_left_out() -> None:
    modules = [importlib.import_module(f"rlkit2.losses.{m.name}") for m in pkgutil.iter_modules(rlkit2.losses.__path__)]
    own = {
        name
        for module in (*modules, statistics)
        for name, found in vars(module).items()
        if inspect.isfunction(found) and found.__module__ == module.__name__ and not name.startswith("_")
    }
    own |= {name for name, found in vars(rewards).items() if inspect.isfunction(found) and name[0] != "_"}
    fuzzed = {call.name.rpartition(".")[2].partition("[")[0] for call in calls()}
    assert own - NO_ARRAYS <= fuzzed


def test_refusals_show_what_was_given() -> None:
    wrong = torch.zeros(2, 4)
    with pytest.raises(ConfigError, match=r"^ggd_nll\(\[3\] float32, \[2, 4\] float32, shape \[3\] float32\): .*size"):
        ggd_nll(torch.zeros(3), wrong, shape=torch.ones(3))
    with pytest.raises(RewardError, match=r"^TabularMDP\(\[2, 1, 2\] float32, 0\.9\): "):
        TabularMDP(torch.zeros(2, 1, 2, device="meta"), 0.9)


def test_memory_that_runs_out_is_no_fault_of_the_arguments() -> None:
    @guarded()
    def greedy() -> None:
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="out of memory") as caught:
        greedy()
    assert not isinstance(caught.value, ConfigError)
