"""How a policy acts while it collects: by its own samples, with noise, or now and then at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from rlkit2.nn.policy import Policy
from rlkit2.training.options import OnlineOptions

STREAM = 2**62  # generators of actions are seeded away from those of minibatches


class Explorer:
    """Chooses the actions of every seed's environments; a seed's chances are its own, whoever collects beside it.

    A policy that samples acts by its samples, a deterministic one with Gaussian noise (`exploration_noise`), a greedy one at random in a share
    `epsilon` of the steps.

    Args:
        policy: of the seeds.
        seeds: the integers that name them.
        options: settled.
        random_steps: so many transitions are chosen uniformly at random first.
    """

    def __init__(self, policy: Policy, seeds: Sequence[int], options: OnlineOptions, random_steps: int) -> None:
        self.policy, self.options, self.random_steps = policy, options, random_steps
        self.generators = [torch.Generator().manual_seed(STREAM + seed % 2**61) for seed in seeds]

    @torch.no_grad()
    def act(self, rows: NDArray[Any], step: int) -> NDArray[Any]:
        """Actions `[S, E, ...]` in the environment's units for observations `[S, E, ...]`; `step`: transitions that each seed has."""
        policy, like = self.policy, torch.empty(len(rows), rows.shape[1], 0, dtype=self._dtype)
        observations = torch.from_numpy(rows).to(self._device)
        if step < self.random_steps:
            return policy.normalizer.environment_actions(self._random(like)).cpu().numpy()
        head = policy.actor.head
        noise = None if head in ("deterministic", "greedy") else self._each(policy.actor.draw_noise, like)
        actions = policy.own_actions(observations.reshape(len(rows), rows.shape[1], -1), noise)
        if head == "deterministic":
            actions = actions + self.options.exploration_noise * self._each(policy.actor.draw_noise, like)
        elif head == "greedy":
            drawn = self._each(lambda part, generator: torch.rand(part.shape[:2], generator=generator), like)
            actions = torch.where(drawn < self.epsilon(step), self._random(like), actions)
        return policy.normalizer.environment_actions(actions).cpu().numpy()

    def epsilon(self, step: int) -> float:
        """Share of random actions of a greedy policy."""
        falling, last = self.options.epsilon_steps or 0, self.options.epsilon
        return last if step >= falling else 1.0 + (last - 1.0) * step / falling

    @property
    def _device(self) -> torch.device:
        return next(self.policy.actor.parameters()).device

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.policy.actor.parameters()).dtype

    def _each(self, draw: Any, like: Tensor) -> Tensor:
        """What `draw(like of one seed, its generator)` gives for every seed, on the policy's device."""
        parts = [draw(part.unsqueeze(0), generator) for part, generator in zip(like, self.generators, strict=True)]
        return torch.cat(parts).to(self._device)

    def _random(self, like: Tensor) -> Tensor:
        """Uniform actions in the actor's own units."""
        actor = self.policy.actor
        if actor.head in ("greedy", "categorical"):
            count = actor.action_size
            return self._each(lambda part, g: torch.randint(count, part.shape[:2], generator=g), like)
        size = actor.action_size
        return self._each(
            lambda part, g: 2.0 * torch.rand(*part.shape[:2], size, generator=g, dtype=part.dtype) - 1.0, like
        )

    def state(self) -> dict[str, Tensor]:
        """The generators, `[S, bytes]`."""
        return {"online.generators": torch.stack([generator.get_state() for generator in self.generators])}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state()`."""
        for generator, own in zip(self.generators, state["online.generators"], strict=True):
            generator.set_state(own.clone())  # torch reads a view of a larger tensor wrongly
