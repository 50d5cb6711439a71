"""What the two value gradients do to each other in a small maze with neural networks (the mechanics, not the returns)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlkit2.agents import make_config
from rlkit2.agents.odice import ODICE
from rlkit2.data import dataset_from_arrays
from rlkit2.data.dataset import TransitionDataset
from rlkit2.training.groups import BatchIndices

CORNERS = np.array([[-0.8, -0.8], [0.8, -0.8], [0.8, 0.8]])  # start, bend and goal of an L-shaped tube
SEEDS = (0, 1, 2, 3)


def tube(goal_reward: float, step_reward: float, trajectories: int = 150) -> TransitionDataset:
    """Noisy walks of a point in [-1, 1]^2 along the tube; a step is a tenth of the action, reaching the goal ends the episode."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(trajectories):
        place, corner = CORNERS[0] + rng.normal(0.0, 0.05, 2), 1
        for step in range(200):
            way = CORNERS[corner] - place
            action = np.clip(0.6 * way / max(np.linalg.norm(way), 0.1) + rng.normal(0.0, 0.4, 2), -1.0, 1.0)
            following = np.clip(place + 0.1 * action, -1.0, 1.0)
            arrived = np.linalg.norm(following - CORNERS[corner]) < 0.15
            done = bool(arrived and corner == 2)
            rows.append(
                (*place, *action, goal_reward if done else step_reward, *following, done, step == 199 and not done)
            )
            place, corner = following, corner + int(arrived and corner < 2)
            if done:
                break
    table = torch.tensor(rows, dtype=torch.float32)
    return dataset_from_arrays(
        table[:, :2], table[:, 2:4], table[:, 4], table[:, 5:7], table[:, 7].bool(), table[:, 8].bool()
    )


def late(dataset: TransitionDataset, steps: int, last: int, **config: object) -> dict[str, torch.Tensor]:
    """Means over the last updates of a training run, `[S]`."""
    small = {"value_hidden_sizes": (64, 64), "policy_hidden_sizes": (64, 64), "value_layer_norm": False}
    agent = ODICE(make_config("odice_released", **small, **config), 2, 2, seeds=SEEDS)  # type: ignore[arg-type]
    indices = BatchIndices(dataset, SEEDS, 256)
    found: list[dict[str, torch.Tensor]] = []
    for step in range(steps):
        metrics = agent.update(dataset.gather(indices.next()))
        if step >= steps - last:
            found.append(metrics)
    return {name: torch.stack([row[name].double() for row in found]).mean(0) for name in found[0]}


@pytest.mark.slow
def test_nearly_all_of_the_backward_gradient_is_removed_once_the_value_has_settled() -> None:
    metrics = late(tube(30.0, 0.0), 6000, 500, discount=0.95, lambda_=0.5, value_learning_rate=1e-3)
    assert ((metrics["projection/coefficient"] > -1.5) & (metrics["projection/coefficient"] < -0.7)).all()
    assert (metrics["projection/cosine"] < -0.9).all()


@pytest.mark.slow
def test_a_step_cost_with_a_large_lambda_leaves_no_official_weight() -> None:
    """The mean weight of the dual is (1 - lambda) / lambda < 1, so with little noise every max(0, R) is zero."""
    fields = {"gradient_rule": "semi", "discount": 0.95, "lambda_": 0.6, "value_learning_rate": 1e-3}
    metrics = late(tube(0.0, -1.0), 6000, 500, **fields)
    assert (metrics["weight/zero_share"] > 0.9).all()
    torch.testing.assert_close(
        metrics["residual/mean"], torch.full((len(SEEDS),), 2 * (0.4 / 0.6 - 1), dtype=torch.float64), atol=0.1, rtol=0
    )
