"""Features learned by a network: the last hidden layer of values and action values with one head per reward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlkit2.data import Batch
from rlkit2.errors import ConfigError, RewardError
from rlkit2.rewards.sampled.features import FeatureMap, Features, Inputs
from rlkit2.rewards.sampled.rows import RewardFunctions, Rows, episode_rows


@dataclass(frozen=True)
class NetworkFeatures(Features):
    """One network over states and one over state-action pairs, trained by squared temporal-difference errors with a slow target.

    Every reward has its own head on the shared trunk and is standardised first. The networks learn from `share` of the episodes, which
    are left out of the estimate, so that the fit of the last layer there is as honest as with fixed features.
    """

    width: int = 64
    steps: int = 2000
    batch_size: int = 256
    learning_rate: float = 1e-3
    target_rate: float = 0.01
    share: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or min(self.width, self.steps, self.batch_size) < 1:
            raise ConfigError(f"network features need 0 < share < 1 and positive sizes, not {self}")

    def fit(self, rows: Rows, rewards: RewardFunctions, discount: float, seed: int) -> FeatureMap:
        episodes = len(rows.episode_starts) - 1
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(episodes, generator=generator)[: max(1, round(self.share * episodes))].sort().values
        if len(chosen) >= episodes:
            raise RewardError(f"{episodes} episode is too few to train features apart from the estimate; use 'fourier'")
        inputs, indices = Inputs.of(rows, seed), episode_rows(rows, chosen)
        sample = indices[torch.randint(len(indices), (min(len(indices), 20_000),), generator=generator)]
        seen = rewards(rows.gather(sample), sample)
        scale = seen.std(0, correction=0).clamp(min=1e-9)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            value, target, pair = (
                _Heads(columns, self.width, len(rewards.names))
                for columns in (inputs.width, inputs.width, _pair_columns(inputs))
            )
        target.load_state_dict(value.state_dict())
        optimizer = torch.optim.Adam([*value.parameters(), *pair.parameters()], lr=self.learning_rate)
        for _ in range(self.steps):
            drawn = indices[torch.randint(len(indices), (self.batch_size,), generator=generator)]
            batch = rows.gather(drawn)
            with torch.no_grad():
                alive = (~batch.terminations.bool()).float()[:, None]
                goal = (rewards(batch, drawn) / scale).float() * (1 - discount)
                goal = goal + discount * alive * target(inputs.state(batch.next_observations).float())
            errors = value(inputs.state(batch.observations).float()) - goal
            advantage = pair(_pair_inputs(inputs, batch)) - goal
            optimizer.zero_grad()
            (errors.square().mean() + advantage.square().mean()).backward()
            optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(target.parameters(), value.parameters(), strict=True):
                    slow.lerp_(fast, self.target_rate)
        return FeatureMap(
            f"last layer of networks of width {self.width}",
            lambda observations: value.last(inputs.state(observations)),
            lambda observations, actions: pair.last(_pair_of(inputs, observations, actions)),
            trained_on=chosen,
        )


class _Heads(nn.Module):
    """Two hidden layers and one linear head per reward."""

    def __init__(self, columns: int, width: int, heads: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(columns, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh())
        self.heads = nn.Linear(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.heads(self.trunk(x))
        return out

    @torch.no_grad()
    def last(self, x: Tensor) -> Tensor:
        """A constant and the last hidden layer, `[n, 1 + width]` float64."""
        hidden = self.trunk(x.float()).double()
        return torch.cat([torch.ones_like(hidden[:, :1]), hidden], 1)


def _pair_columns(inputs: Inputs) -> int:
    return inputs.width + inputs.choices if inputs.choices else len(inputs.mean)


def _pair_of(inputs: Inputs, observations: Tensor, actions: Tensor) -> Tensor:
    if not inputs.choices:
        return inputs.pair(observations, actions)
    chosen = nn.functional.one_hot(actions.long().cpu(), inputs.choices).double()
    return torch.cat([inputs.state(observations), chosen], 1)


def _pair_inputs(inputs: Inputs, batch: Batch) -> Tensor:
    return _pair_of(inputs, batch.observations, batch.actions).float()
