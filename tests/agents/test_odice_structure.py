"""What an O-DICE update costs by construction: host synchronisations, operations, floating-point work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlkit2.agents import make_config
from rlkit2.agents.odice import ODICE
from tests.agents.odice_problem import make_batch
from tests.agents.test_structure import Operations, measure

WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")


class NoWaiting(Operations):
    """Refuses operations that wait for the device."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(operation).split(".")[1]
        assert name not in WAITING, f"{name} waits for the device"
        return super().__torch_dispatch__(operation, types, args, kwargs)


def hopper_sized(**overrides: Any) -> ODICE:
    """Observations 11, actions 3, two hidden layers of 256 in both networks, no layer norm."""
    fields: dict[str, Any] = {"value_layer_norm": False, "policy_hidden_sizes": (256, 256), **overrides}
    return ODICE(make_config("odice_released", **fields), 11, 3)


@pytest.mark.parametrize(
    ("rule", "operations", "megaflops"), [("orthogonal", 130, 735), ("semi", 95, 385), ("true", 95, 525)]
)
def test_operations_and_work_of_an_update(rule: str, operations: int, megaflops: float) -> None:
    """What follows from other metrics is computed when it is read, not in the update."""
    found = measure(hopper_sized(gradient_rule=rule))
    assert found[0] <= operations
    assert found[1] <= megaflops


@pytest.mark.parametrize(
    "fields",
    [
        {"divergence": "rkl", "target_effective_sample_share": 0.3, "weight_normalization": "mean"},
        {"max_gradient_norm": 1.0, "residual_clip": 5.0},
        {"policy_head": "squashed_gaussian", "divergence": "alpha"},
        {"value_layer_norm": True, "policy_head": "deterministic", "divergence": "soft_chi2"},
    ],
)
def test_no_option_waits_for_the_device(fields: dict[str, Any]) -> None:
    agent = ODICE(make_config("odice_released", value_hidden_sizes=(8,), policy_hidden_sizes=(8,), **fields), 4, 2)
    batch = make_batch(dtype=torch.float32)
    with NoWaiting():
        agent.update(batch)
        agent.terms(batch)
        agent.value_gradients(batch)


def test_waiting_is_noticed() -> None:
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        torch.ones(1).item()
