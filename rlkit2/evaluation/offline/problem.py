"""What every estimator starts from: a dataset, a discount, and P policies that were asked once what they do at its states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional as F

from rlkit2.agents import make_normalizer
from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.normalizers import observation_statistics
from rlkit2.errors import ConfigError, DatasetError
from rlkit2.evaluation.offline.options import OfflineOptions
from rlkit2.nn import Critic, Normalizer, Policy

CHUNK = 4096  # rows asked at once


@dataclass(frozen=True)
class Resamples:
    """R bootstrap resamples of the episodes: how often each one drew each episode, `episodes [R, E]`, and each initial state, `initial [R, I]`.

    Where the initial states are those of the episodes, both are the same.
    """

    episodes: Tensor
    initial: Tensor

    def __len__(self) -> int:
        return len(self.episodes)


@dataclass(frozen=True)
class Problem:
    """P policies (the S axis of every network) and the transitions of E episodes, in the networks' units, rewards in the data's.

    Attributes:
        discount: gamma, in [0, 1).
        observations, next_observations: `[N, obs]` standardised.
        actions: `[N, act]` in [-1, 1], or int64 `[N]` counted from 0.
        rewards, continues: `[N]`; `continues` is 0 where the step terminated: nothing is bootstrapped there, but is at a truncation.
        cut: bool `[N]`, the last step of an episode that did not terminate.
        starts: `[E + 1]`; episode: `[N]`, which episode a row belongs to; time: `[N]`, steps since its start.
        initial_observations: `[I, obs]`.
        here, after, initial: what the policies do at `observations`, `next_observations`, `initial_observations`: probabilities `[P, N, n]` of
            discrete actions, else K actions per state `[P, N, K, act]`.
    """

    policies: tuple[Policy, ...]
    dataset: TransitionDataset
    normalizer: Normalizer
    discount: float
    deterministic: bool
    observations: Tensor
    next_observations: Tensor
    actions: Tensor
    rewards: Tensor
    continues: Tensor
    cut: Tensor
    starts: Tensor
    episode: Tensor
    time: Tensor
    initial_observations: Tensor
    own_starts: bool
    here: Tensor
    after: Tensor
    initial: Tensor

    @property
    def num_policies(self) -> int:
        """P."""
        return len(self.here)

    @property
    def num_episodes(self) -> int:
        """E."""
        return len(self.starts) - 1

    @property
    def discrete(self) -> bool:
        """Whether actions are one categorical choice."""
        return self.dataset.spec.discrete

    def resamples(self, count: int, seed: int) -> Resamples:
        """`count` resamples of whole episodes with replacement, the same for every policy."""
        generator = torch.Generator().manual_seed(seed)
        episodes = _draw_counts(count, self.num_episodes, generator)
        initial = episodes if self.own_starts else _draw_counts(count, len(self.initial_observations), generator)
        return Resamples(episodes, initial)

    def critic(
        self, options: OfflineOptions, stream: str, *, noise_outputs: int = 0, detach_noise: bool = True
    ) -> Critic:
        """A network with one value per state and action, `[P, M, ...]`; all policies start from the same weights. The rest as for `Critic`."""
        return Critic(
            self.observations.shape[1],
            self.dataset.spec.action_size,
            options.hidden_sizes,
            seeds=[options.seed] * self.num_policies,
            members=options.members,
            discrete=self.discrete,
            noise_outputs=noise_outputs,
            detach_noise=detach_noise,
            stream=stream,
        )

    def at_data(self, critic: Critic, rows: Tensor) -> Tensor:
        """`critic` at the data's states and actions, `[P, M, B]`, of `rows [B]` or of each member's own rows `[M, B]`."""
        return self.outputs_at_data(critic, rows)[..., 0]

    def outputs_at_data(self, critic: Critic, rows: Tensor) -> Tensor:
        """The same with the noise outputs behind each value, `[P, M, B, 1 + noise_outputs]`."""
        observations, actions = self._stacked(self.observations[rows]), self.actions[rows]
        if not self.discrete:
            return critic.outputs(observations, self._stacked(actions))
        every = critic.every_output(observations)
        index = actions.expand(every.shape[:3])[..., None, None].expand(*every.shape[:3], 1, every.shape[-1])
        return every.gather(-2, index).squeeze(-2)

    def at_policy(self, critic: Critic, observations: Tensor, chosen: Tensor, rows: Tensor) -> Tensor:
        """Mean of `critic` over the policies' actions, `[P, M, B]`: `after` or `initial` as `chosen`, beside the observations they belong to."""
        inputs, chosen = self._stacked(observations[rows]), chosen[:, rows]
        if self.discrete:
            every = critic.every_action(inputs)
            return (every * (chosen if chosen.ndim == 4 else chosen.unsqueeze(1))).sum(-1)
        draws = [critic(inputs, actions) for actions in chosen.unbind(-2)]
        return draws[0] if len(draws) == 1 else torch.stack(draws).mean(0)

    def _stacked(self, values: Tensor) -> Tensor:
        return values.expand(self.num_policies, *values.shape)


def chunks(count: int) -> Iterator[Tensor]:
    """Row numbers 0 to `count` - 1 in parts that fit the memory."""
    for first in range(0, count, CHUNK):
        yield torch.arange(first, min(first + CHUNK, count))


def _draw_counts(count: int, size: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(size, (count, size), generator=generator)
    return torch.zeros(count, size).scatter_add_(1, drawn, torch.ones(count, size))


def make_problem(
    policies: Sequence[Policy],
    dataset: TransitionDataset,
    discount: float,
    *,
    deterministic: bool,
    initial_observations: ArrayLike | Tensor | None,
    options: OfflineOptions,
) -> Problem:
    """Ask the policies about every state of `dataset`.

    Raises:
        ConfigError: image observations, several discrete choices per step, a discount outside [0, 1), policies or initial observations that
            do not fit the data.
        DatasetError: values that are not finite.
    """
    spec = dataset.spec
    if not 0.0 <= discount < 1.0:
        raise ConfigError(f"discount is {discount}; an evaluation without an environment needs one in [0, 1)")
    mean, std = observation_statistics(dataset)
    for name in ("observations", "next_observations", "rewards", "actions"):
        if not bool(getattr(dataset, name).isfinite().all()):
            raise DatasetError(f"{spec.id}: {name} are not all finite; see rlkit2 data check {spec.id}")
    normalizer = make_normalizer(spec, observation_mean=mean, observation_std=std).float()
    starts = dataset.episode_starts
    lengths = starts.diff()
    first = dataset.observations[starts[:-1]]
    own = initial_observations is None
    raw_initial = first if own else torch.as_tensor(initial_observations, dtype=torch.float32)
    if raw_initial.ndim != 2 or raw_initial.shape[1] != first.shape[1] or not len(raw_initial):
        raise ConfigError(f"initial_observations must be [I, {first.shape[1]}], not {list(raw_initial.shape)}")

    def ask(observations: Tensor, stream: int) -> Tensor:
        generator = torch.Generator().manual_seed(options.seed + stream)
        parts = [
            torch.cat(
                [
                    chosen_actions(p, part, normalizer, spec.action_size, deterministic, options.draws, generator)
                    for p in policies
                ]
            )
            for part in (observations[rows] for rows in chunks(len(observations)))
        ]
        chosen = torch.cat(parts, 1)
        if not bool(chosen.isfinite().all()):
            raise ConfigError(f"a policy gives actions that are not finite at states of {spec.id}")
        return chosen

    last = torch.zeros(len(dataset), dtype=torch.bool)
    last[starts[1:] - 1] = True
    episode = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return Problem(
        policies=tuple(policies),
        dataset=dataset,
        normalizer=normalizer,
        discount=discount,
        deterministic=deterministic,
        observations=normalizer.observations(dataset.observations.float()).squeeze(0),
        next_observations=normalizer.observations(dataset.next_observations.float()).squeeze(0),
        actions=normalizer.actions(dataset.actions if spec.discrete else dataset.actions.float().unsqueeze(0)).view(
            dataset.actions.shape
        ),
        rewards=dataset.rewards,
        continues=1.0 - dataset.terminations.float(),
        cut=last & ~dataset.terminations,
        starts=starts,
        episode=episode,
        time=torch.arange(len(dataset)) - starts[episode],
        initial_observations=normalizer.observations(raw_initial).squeeze(0),
        own_starts=own,
        here=ask(dataset.observations, 0),
        after=ask(dataset.next_observations, 1),
        initial=ask(raw_initial, 2),
    )


@torch.no_grad()
def chosen_actions(
    policy: Policy,
    observations: Tensor,
    normalizer: Normalizer,
    choices: int,
    deterministic: bool,
    draws: int,
    generator: torch.Generator,
) -> Tensor:
    """What the S seeds of `policy` do at raw `observations [B, obs]`: probabilities `[S, B, n]` or K actions `[S, B, K, act]` in [-1, 1]."""
    seeds = len(policy.seeds)
    inputs = observations.expand(seeds, *observations.shape)
    if not deterministic and policy.actor.head == "categorical":
        parameter = next(policy.actor.parameters())
        logits: Tensor = policy.actor.network(policy.normalizer.observations(inputs.to(parameter.dtype)))
        return logits.softmax(-1).float()
    sampled = not deterministic and policy.actor.head in ("gaussian", "squashed_gaussian", "one_step")
    drawn = [policy(inputs, deterministic=not sampled, generator=generator) for _ in range(draws if sampled else 1)]
    if not drawn[0].is_floating_point():
        return F.one_hot(normalizer.actions(drawn[0]), choices).float()
    return torch.stack([normalizer.actions(actions.float()) for actions in drawn], 2)


class EpisodeSampler:
    """Rows of each member's own resample of the episodes."""

    def __init__(self, counts: Tensor, of_row: Tensor, seed: int) -> None:
        """`counts [M, E]`: how often a member drew an episode; `of_row [N]`: the episode of a row."""
        pools = [torch.repeat_interleave(torch.arange(len(of_row)), own[of_row].long()) for own in counts]
        self.lengths = torch.tensor([[len(pool)] for pool in pools])
        self.pools = torch.nn.utils.rnn.pad_sequence(pools, batch_first=True)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, size: int) -> Tensor:
        """`[M, size]` rows, uniform with replacement."""
        uniform = torch.rand(len(self.pools), size, generator=self.generator, dtype=torch.float64)
        return self.pools.gather(1, (uniform * self.lengths).long())
