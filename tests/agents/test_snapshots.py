"""Every agent's numbers after 50 updates, held against those written down before: moving code must not move numbers.

A change that is meant to change them writes them anew, and the diff of the file shows whose numbers moved:

    python -m tests.agents.test_snapshots
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rlkit2.agents import agent_class, agent_kinds, list_agents, make_config
from rlkit2.agents.base import Agent
from tests.agents.problems import batch_maker, small_config

SNAPSHOTS = Path(__file__).parents[1] / "data" / "snapshots" / "agents.json"
OBS, ACT, ROWS, UPDATES, SEEDS = 4, 2, 24, 50, (3, 8)

# Options whose arithmetic is not that of the defaults.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "awac": [{"weight_normalization": "none", "critic": "ggd"}],
    "bc": [{"policy_head": "squashed_gaussian"}, {"policy_head": "deterministic"}],
    "cql": [{"critic": "ggd"}],
    "crr": [{"weight": "binary", "advantage": "max", "num_critics": 2}, {"critic": "gaussian"}],
    "dqn": [{"target": "min"}, {"target": "shared_lcb", "critic": "ggd", "vote": "shape"}, {"critic": "gaussian"}],
    "edac": [{"critic": "ggd"}],
    "fql": [{"normalize_q": True, "target": "min", "critic": "ggd"}],
    "iql": [{"critic": "ggd", "sample_weighting": "iv"}, {"critic": "gaussian"}],
    "odice_released": [
        {"divergence": "rkl", "weight": "conjugate_grad", "weight_normalization": "mean"},
        {"divergence": "soft_chi2", "eta": 0.3, "residual_scale": 0.5},
        {"divergence": "alpha", "weight": "conjugate_grad", "target_effective_sample_share": 0.3},
        {"gradient_rule": "semi", "num_values": 1, "max_gradient_norm": 0.5},
        {"gradient_rule": "true", "divergence": "rkl", "residual_clip": 2.0},
    ],
    "odice": [
        {"weight_residual": "sampled", "divergence": "soft_chi2"},
        {"residual_unit": "value", "value_unit": "reward", "weight": "conjugate_grad"},
    ],
    "rebrac": [{"critic_layer_norm": False, "policy_layer_norm": True, "policy_penalty": 0.5}, {"critic": "ggd"}],
    "sacn": [{"critic": "ggd"}, {"critic": "gaussian", "sample_weighting": "iv"}],
    "xql": [{"critic": "ggd"}],
    "td3bc": [{"critic": "ggd"}, {"critic": "gaussian", "policy_delay": 3}],
}


def cases() -> list[tuple[str, str, dict[str, Any]]]:
    """(agent, kind of actions, options) of every snapshot."""
    return [
        (name, kind, options)
        for name in list_agents()
        for options in [{}, *VARIANTS.get(name, [])]
        for kind in agent_kinds(name)
        if kind != "multidiscrete" and not (kind == "discrete" and "policy_head" in options)
    ]


def case_id(name: str, kind: str, options: dict[str, Any]) -> str:
    return " ".join([name, kind, *(f"{key}={value}" for key, value in options.items())])


def trained(name: str, kind: str, options: dict[str, Any]) -> tuple[Agent, dict[str, list[float]]]:
    """The agent and the metrics of its last update."""
    cls = agent_class(name, kind)
    config = small_config(partial(make_config, name, kind), cls.config_class, **options)
    agent = cls(config, OBS, ACT, seeds=SEEDS, dtype=torch.float64, discrete=kind == "discrete")
    make = batch_maker(cls)
    metrics: Any = {}
    for t in range(UPDATES):
        metrics = agent.update(
            make(len(SEEDS), ROWS, OBS, ACT, discrete=kind == "discrete", dtype=torch.float64, generator=t)
        )
    return agent, {metric: value.double().tolist() for metric, value in metrics.items()}


def snapshot(name: str, kind: str, options: dict[str, Any]) -> dict[str, list[float]]:
    """The last metrics, and the size of every part of the state."""
    agent, numbers = trained(name, kind, options)
    for part, tensor in agent.state_dict().items():
        numbers[f"state {part}"] = (
            tensor.double().flatten(1).norm(dim=1).tolist() if tensor.ndim > 1 else tensor.double().tolist()
        )
    return numbers


STORED: dict[str, Any] = json.loads(SNAPSHOTS.read_text()) if SNAPSHOTS.is_file() else {}


@pytest.mark.parametrize(("name", "kind", "options"), cases(), ids=[case_id(*case) for case in cases()])
def test_numbers_stay(name: str, kind: str, options: dict[str, Any]) -> None:
    """To 1e-7: processors sum in different orders, and Adam divides by small numbers."""
    known = STORED[case_id(name, kind, options)]
    found = snapshot(name, kind, options)
    assert found.keys() == known.keys()
    for number, values in found.items():
        assert values == pytest.approx(known[number], rel=1e-7, abs=1e-9, nan_ok=True), number


def test_nothing_is_stored_that_is_not_tested() -> None:
    assert STORED.keys() == {case_id(*case) for case in cases()}


if __name__ == "__main__":
    rows = [f"{json.dumps(case_id(*case))}: {json.dumps(snapshot(*case))}" for case in cases()]
    SNAPSHOTS.parent.mkdir(parents=True, exist_ok=True)
    SNAPSHOTS.write_text("{\n" + ",\n".join(rows) + "\n}\n")
