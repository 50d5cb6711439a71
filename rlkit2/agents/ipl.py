"""Inverse preference learning: implicit Q-learning whose rewards are those that its own Q and V imply.

Instead of learning a reward first, the reward is read off the values, and the Bradley-Terry likelihood of the labels trains Q:

    r(s, a) = Q(s, a) - gamma V(s'),   R(seg) = sum_t r(s_t, a_t)
    L(Q)  = E_pairs[ -(1 - y) log sigmoid(R_1 - R_2) - y log sigmoid(R_2 - R_1) ] + chi2 (E_pairs[r^2] + E_D[r^2]) / 2
    L(V)  = E[ |tau - 1(A < 0)| A^2 ],   A(s, a) = min_i Q_target_i(s, a) - V(s)
    L(pi) = -E[ min(exp(beta A), 100) log pi(a|s) ]

Both expectations without a subscript give the segments and the dataset's transitions D equal weight. The chi2 penalty keeps rewards small and thereby
bounds values; V(s') is clipped to +-1 / (chi2 (1 - gamma)).

Labels of segments of one length say nothing about a constant in the reward, and the penalty puts it where rewards are zero on average. Once
episodes can end, that constant decides whether ending is good or bad: `terminal_value` is V(s') of a terminated step.

Source: Hejna, Sadigh, "Inverse Preference Learning: Preference-based RL without a Reward Function" (NeurIPS 2023), eqs. 4 to 6, and its released
code. Differences: what follows a termination is a choice (theirs always bootstraps), targets move every step, and segments are not cropped.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

import torch
from torch import Tensor

from rlkit2.agents.base import ACTION_KINDS, PolicyOptions
from rlkit2.agents.preference_agent import PreferenceAgent
from rlkit2.data.batch import Batch
from rlkit2.data.preferences import PreferenceBatch
from rlkit2.fields import Count, Finite, Inside, Interval, NonNegative, Positive, Rate, Widths
from rlkit2.losses.preference import bradley_terry_loss, implicit_reward
from rlkit2.losses.td import expectile_loss
from rlkit2.nn import lerp_


@dataclass(frozen=True)
class IPLConfig(PolicyOptions):
    """Inverse preference learning."""

    # folder of labels (rlkit2 prefs label)
    preferences: str = ""
    # weight of the penalty on squared rewards
    chi2: NonNegative = 0.5
    # transitions of the dataset beside every pair (authors: 256 beside 8 pairs)
    replay: Count = 32
    # clip V(s') to the largest value the penalty allows
    clip_values: bool = True
    # V after a termination: 0 is as good as average, below all values a failure, above a success; none bootstraps
    terminal_value: Finite | None = 0.0
    # tau in (0, 1)
    expectile: Inside = 0.7
    # beta: 0 clones the data, larger values follow the advantage
    inverse_temperature: NonNegative = 3.0
    # upper bound of the policy weight exp(beta A)
    weight_clamp: Positive = 100.0
    # gamma
    discount: Annotated[float, Interval("[0, 1)")] = 0.99
    # estimates of Q; their minimum is the target of V
    num_critics: Count = 2
    # hidden layers of Q, V and the policy
    hidden_sizes: Widths = (256, 256)
    # Adam's step size for Q, V and the policy
    learning_rate: NonNegative = 3e-4
    # Polyak rate of the target Q
    target_update_rate: Rate = 0.005


class IPL(PreferenceAgent):
    """Inverse preference learning for S seeds; arguments as for `Agent`. A batch is a `PreferenceBatch` with replay."""

    config_class = IPLConfig
    action_kinds = ACTION_KINDS
    config: IPLConfig

    def _build(self) -> None:
        config = self.config
        self._build_value(config.hidden_sizes, config.learning_rate)
        self._build_critic(config.learning_rate)
        self.actor = self._build_policy(self._likelihood_actor(config.hidden_sizes), config.learning_rate)

    # The terms of the objective, on normalised rows: those of the segments first (2 B H), then those of the dataset (B replay)

    def rows(self, batch: PreferenceBatch) -> tuple[Batch, Tensor]:
        """All transitions of a batch as one, `[S, n, ...]`, and the weight of each, `[n]`, half a unit for each of the two sources."""
        assert batch.transitions is not None
        parts = (self.normalize_segments(batch.segments), self.normalize(batch.transitions))
        both = {f.name: torch.cat([getattr(part, f.name) for part in parts], 1) for f in fields(Batch)}
        shown, replayed = parts[0].rewards[0].numel(), parts[1].rewards[0].numel()
        ones = both["rewards"].new_ones
        weight = torch.cat([ones(shown) * (0.5 / shown), ones(replayed) * (0.5 / replayed)])
        return Batch(**both), weight

    def advantage(self, rows: Batch) -> Tensor:
        """A = min over target critics of Q(s, a) - V(s), `[S, n]`; differentiable in V."""
        with torch.no_grad():
            target = self.critic_target(rows.observations, rows.actions).amin(1)
        advantage: Tensor = target - self.value_network(rows.observations)
        return advantage

    def rewards(self, rows: Batch) -> Tensor:
        """r of every critic, `[S, M, n]`; differentiable in Q."""
        with torch.no_grad():
            next_value = self.value_network(rows.next_observations)
        config = self.config
        if config.terminal_value is not None:
            next_value = torch.lerp(next_value, torch.full_like(next_value, config.terminal_value), rows.terminations)
        q = self.critic(rows.observations, rows.actions)
        known: Tensor = implicit_reward(
            torch.zeros_like(next_value),
            next_value,
            discount=config.discount,
            chi2=config.chi2,
            clip=config.clip_values,
        )
        reward: Tensor = q + known.unsqueeze(1)
        return reward

    def preference_loss(self, returns: Tensor, label_mass: Tensor) -> Tensor:
        """Bradley-Terry loss of the returns `[S, M, B, 2]` of both segments, mean over critics and pairs, `[S]`."""
        first, second = returns.unbind(-1)
        pairs: Tensor = bradley_terry_loss(first, second, label_mass=label_mass.unsqueeze(1))
        return pairs.mean((1, 2))

    # One update

    def update(self, batch: PreferenceBatch) -> dict[str, Tensor]:  # type: ignore[override]
        """Steps of V, Q and the policy, all at the values before them; then the target of Q."""
        config, label_mass = self.config, batch.label_mass.to(self.dtype)
        rows, weight = self.rows(batch)
        rewards = self.rewards(rows)
        advantage = self.advantage(rows)
        value_loss = expectile_loss(advantage, config.expectile) @ weight

        seeds, pairs, _, steps = batch.segments.rewards.shape
        shown = rewards[..., : 2 * pairs * steps].view(seeds, config.num_critics, pairs, 2, steps)
        preference = self.preference_loss(shown.sum(-1), label_mass)
        penalty = (rewards.square() @ weight).mean(1)

        policy_weight = (config.inverse_temperature * advantage.detach()).exp().clamp(max=config.weight_clamp)
        policy_loss = -(policy_weight * self.actor.log_prob(rows.observations, rows.actions)) @ weight

        value_norm = self.value_optimizer.minimize(value_loss)
        critic_norm = self.critic_optimizer.minimize(preference + config.chi2 * penalty)
        policy_norm = self.policy_optimizer.minimize(policy_loss)
        lerp_(self.critic_target, self.critic, config.target_update_rate)
        self.step += 1
        gap = shown.detach().sum(-1).mean(1).diff(dim=-1).squeeze(-1)
        return {
            "value/loss": value_loss.detach(),
            "value/grad_norm": value_norm,
            "critic/loss": preference.detach(),
            "critic/grad_norm": critic_norm,
            "policy/loss": policy_loss.detach(),
            "policy/grad_norm": policy_norm,
            "preference/accuracy": self.preference_accuracy(gap, label_mass),
            "reward/mean_square": penalty.detach(),
            "advantage/mean": advantage.detach() @ weight,
            "weight/clamp_share": (policy_weight == config.weight_clamp).to(self.dtype) @ weight,
        }

    # What it offers to others

    @torch.no_grad()
    def value(self, observations: Tensor) -> Tensor:
        """V at raw `observations [S, B, obs]`, as `[S, B]`, in units of the implied reward."""
        return self.raw_value(observations)

    @torch.no_grad()
    def q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """min over critics of Q at raw observations `[S, B, obs]` and actions, as `[S, B]`, in units of the implied reward."""
        return self.raw_q(self.critic, observations, actions).amin(1)
