"""Features learned by networks: beside polynomials and waves, a column for each reward that its own networks have learned."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlkit2.errors import RewardError
from rlkit2.fields import Checked, Count, Inside, Positive, Rate
from rlkit2.rewards.sampled.features import FeatureMap, Features, Inputs, PolynomialFeatures, candidates, per_action
from rlkit2.rewards.sampled.rows import RewardFunctions, Rows, episode_rows


@dataclass(frozen=True)
class NetworkFeatures(Checked, Features):
    """Every reward has networks of its own, which learn its value and its action value by squared temporal-difference errors with a slow target.

    What they predict becomes one column each beside the polynomials and random waves that the data can bear. A reward's networks start and learn
    the same whatever other rewards are in the set, so that another reward adds columns, thus a little noise, and nothing else to a
    pair's distance. The networks learn from `share` of the episodes, which are left out of the estimate, so that least squares in these
    columns is as honest there as with fixed features.
    """

    width: Count = 64
    steps: Count = 2000
    batch_size: Count = 256
    learning_rate: Positive = 1e-3
    target_rate: Rate = 0.01
    share: Inside = 0.3

    def fit(self, rows: Rows, rewards: RewardFunctions, discount: float, seed: int) -> FeatureMap:
        episodes = len(rows.episode_starts) - 1
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(episodes, generator=generator)[: max(1, round(self.share * episodes))].sort().values
        if len(chosen) >= episodes:
            raise RewardError(f"{episodes} episode is too few to train features apart from the estimate; use 'fourier'")
        inputs, indices = Inputs.of(rows, seed), episode_rows(rows, chosen)
        mean, scale = _standard(rows, rewards, indices, generator)
        heads = len(rewards.names)
        pair_width = inputs.width + inputs.choices if inputs.choices else len(inputs.mean)
        value, target = (_Networks(inputs.width, self.width, heads, seed) for _ in range(2))
        pair = _Networks(pair_width, self.width, heads, seed + 1)
        optimizer = torch.optim.Adam([*value.parameters(), *pair.parameters()], lr=self.learning_rate)
        for _ in range(self.steps):
            drawn = indices[torch.randint(len(indices), (self.batch_size,), generator=generator)]
            batch = rows.gather(drawn)
            with torch.no_grad():
                alive = (~batch.terminations.bool().cpu()).float()[:, None]
                goal = ((rewards(batch, drawn) - mean) / scale).float() * (1 - discount)
                goal = goal + discount * alive * target(inputs.state(batch.next_observations).float())
            errors = value(inputs.state(batch.observations).float()) - goal
            advantage = pair(_pair_inputs(inputs, batch.observations, batch.actions).float()) - goal
            optimizer.zero_grad()
            (errors.square().mean(0).sum() + advantage.square().mean(0).sum()).backward()
            optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(target.parameters(), value.parameters(), strict=True):
                    slow.lerp_(fast, self.target_rate)
        options = candidates(rows, seed)
        plain = (options[-1] if len(options) > 1 else PolynomialFeatures(1)).fit(rows, rewards, discount, seed)
        assert isinstance(plain, FeatureMap)

        def state(observations: Tensor) -> Tensor:
            return torch.cat([plain.state(observations), value.predict(inputs.state(observations))], 1)

        def of_pair(observations: Tensor, actions: Tensor) -> Tensor:
            learned = pair.predict(_pair_inputs(inputs, observations, actions))
            of_state = value.predict(inputs.state(observations))
            if inputs.choices:
                of_state = per_action(of_state, actions, inputs.choices)
            return torch.cat([plain.pair(observations, actions), of_state, learned], 1)

        return FeatureMap(f"{plain.name}, networks of width {self.width}", state, of_pair, trained_on=chosen)


def _standard(
    rows: Rows, rewards: RewardFunctions, indices: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `[K]` of every reward; 1 where it does not vary beyond rounding, so that it is learned as nothing."""
    sample = indices[torch.randint(len(indices), (min(len(indices), 20_000),), generator=generator)]
    seen = rewards(rows.gather(sample), sample)
    size = seen.abs().amax(0)
    mean = (seen / torch.where(size > 0, size, 1.0)).mean(0) * size
    spread = ((seen - mean) / torch.where(size > 0, size, 1.0)).square().mean(0).sqrt() * size
    varies = spread > 1e-9 * size
    return mean, torch.where(varies, spread, torch.where(size > 0, size, 1.0))


class _Networks(nn.Module):
    """`heads` separate networks with two hidden layers and one output, which start alike: `[n, columns]` to `[n, heads]`."""

    def __init__(self, columns: int, width: int, heads: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = (columns, width, width, 1)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for before, after in itertools.pairwise(sizes):
            bound = 1 / math.sqrt(before)
            weight = (2 * torch.rand(before, after, generator=generator) - 1) * bound
            bias = (2 * torch.rand(1, after, generator=generator) - 1) * bound
            self.weights.append(nn.Parameter(weight.expand(heads, before, after).clone()))
            self.biases.append(nn.Parameter(bias.expand(heads, 1, after).clone()))

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.expand(len(self.weights[0]), *x.shape)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = torch.baddbmm(bias, hidden, weight)
            if layer < 2:
                hidden = (torch.relu, torch.tanh)[layer](hidden)
        return hidden.squeeze(-1).mT

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """`[n, heads]` float64."""
        out: Tensor = self(x.float()).double()
        return out


def _pair_inputs(inputs: Inputs, observations: Tensor, actions: Tensor) -> Tensor:
    if not inputs.choices:
        return inputs.pair(observations, actions)
    chosen = nn.functional.one_hot(actions.long().cpu().reshape(-1), inputs.choices).double()
    return torch.cat([inputs.state(observations), chosen], 1)
