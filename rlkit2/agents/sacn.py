"""SAC-N: soft actor-critic on a fixed dataset, whose pessimism is the minimum over N critics.

    y_i   = r + gamma (1 - terminated) (P_i[Q_target](s', a') - tau log pi(a'|s')),   a' ~ pi(.|s')
    L(Q)  = E[ sum_i (Q_i(s, a) - y_i)^2 ]                       (critic = "mse"; with a noise model see `rlkit2.agents.error_model`)
    L(pi) = E[ tau log pi(a|s) - P[Q](s, a) ],   a ~ pi(.|s)
    tau moves so that the policy's entropy is that of `target_entropy`

P is the minimum over the N critics (the published choice), mean - k std ("shared_lcb" for targets, "lcb" for the policy), or in targets each critic's
own next value ("independent": no critic learns from another's error, and pessimism is left to the policy).

Source: An, Moon, Kim, Song, "Uncertainty-Based Offline Reinforcement Learning with Diversified Q-Ensemble" (NeurIPS 2021) on the SAC of Haarnoja et
al. (2018); independent targets: Ghasemipour, Gu, Nachum, "Why So Pessimistic?" (NeurIPS 2022). Differences from the authors' code: N = 10
unless given; one sample of the policy serves its own step and the temperature's; weights start as torch's linear layers do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rlkit2.agents.error_model import ErrorOptions
from rlkit2.agents.uncertain_agent import UncertainAgent
from rlkit2.data.batch import Batch
from rlkit2.errors import ConfigError
from rlkit2.fields import Bounds, Count, Finite, Fraction, NonNegative, Positive, Rate, Widths
from rlkit2.losses.aggregation import grouped_mean_minimum, grouped_minimum, lower_bound
from rlkit2.nn import Adam, lerp_
from rlkit2.nn.actors import SquashedGaussianActor
from rlkit2.nn.random import normal


@dataclass(frozen=True)
class SACNConfig(ErrorOptions):
    """SAC-N, for continuous actions."""

    # N; the more, the more pessimistic (published: 10 to 500)
    num_critics: Count = 10
    # next value: "min", "independent", "shared_lcb", or "released" (minimum over two groups, member by member)
    target: Literal["min", "independent", "shared_lcb", "released"] = "min"
    # what the policy climbs: "min", "lcb", or "released" (mean over members, minimum over two groups)
    policy_objective: Literal["min", "lcb", "released"] = "min"
    # k in mean - k std; none: as low as the minimum in expectation (1.54 for 10)
    lcb_coefficient: Finite | None = None
    # subtracts this many standard deviations of the noise from the policy's objective
    risk_coefficient: Finite = 0.0
    # gamma
    discount: Fraction = 0.99
    # hidden layers of Q and the policy
    hidden_sizes: Widths = (256, 256, 256)
    # the policy's log standard deviation is clamped to these
    log_std_bounds: Bounds = (-5.0, 2.0)
    # Adam's step size for Q
    critic_learning_rate: NonNegative = 3e-4
    # Adam's step size for the policy
    policy_learning_rate: NonNegative = 3e-4
    # Adam's step size for log tau
    temperature_learning_rate: NonNegative = 3e-4
    # tau at the start
    initial_temperature: Positive = 1.0
    # wanted entropy of the policy; none: minus the number of action dimensions
    target_entropy: Finite | None = None
    # Polyak rate of the target Q
    target_update_rate: Rate = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        if "released" in (self.target, self.policy_objective) and self.num_critics % 2:
            raise ConfigError(f"two groups of critics need an even number of them, not {self.num_critics}")
        if self.risk_coefficient != 0.0 and self.critic == "mse":
            raise ConfigError("risk_coefficient needs a noise model; set critic = 'ggd' or 'gaussian'")


class Temperature(nn.Module):
    """The weight tau of the entropy, one per seed."""

    def __init__(self, initial: float, seeds: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.log_value = nn.Parameter(torch.full((seeds, 1), initial, dtype=dtype, device=device).log())

    def forward(self) -> Tensor:
        """tau, `[S, 1]`."""
        return self.log_value.exp()


class SACN(UncertainAgent):
    """SAC-N for S seeds; arguments as for `Agent`."""

    config_class = SACNConfig
    action_kinds = ("continuous",)
    config: SACNConfig

    def _build(self) -> None:
        config = self.config
        self._build_critics()
        actor = self._make_actor("squashed_gaussian", config.hidden_sizes, log_std_bounds=config.log_std_bounds)
        assert isinstance(actor, SquashedGaussianActor)
        self.actor = self._build_policy(actor, config.policy_learning_rate)
        self.temperature = Temperature(config.initial_temperature, len(self.seeds), self.dtype, self.device)
        self.temperature_optimizer = Adam(self.temperature, config.temperature_learning_rate)
        self._register({"temperature": self.temperature}, {"temperature": self.temperature_optimizer})
        self.target_entropy = -float(self.action_size) if config.target_entropy is None else config.target_entropy

    # The terms of the objective, on normalised batches

    def _sample(self, observations: Tensor, stream: str) -> tuple[Tensor, Tensor]:
        """Actions of the policy `[S, B, act]` and their log-densities `[S, B]`."""
        shape = (*observations.shape[:-1], self.action_size)
        return self.actor.sample(
            observations, normal(shape, self.seed_keys, self.step, stream=stream, dtype=self.dtype)
        )

    @torch.no_grad()
    def next_values(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Target critics at a sampled next action, `[S, M, B]`, and its entropy term tau log pi, `[S, B]`."""
        next_actions, log_prob = self._sample(batch.next_observations, "next_action")
        return self.critic_target(batch.next_observations, next_actions), self.temperature() * log_prob

    @torch.no_grad()
    def critic_targets(self, batch: Batch) -> Tensor:
        """y: `[S, B]` where members share it, `[S, M, B]` where each has its own."""
        return self.targets_at(batch, *self.next_values(batch))

    def targets_at(self, batch: Batch, next_values: Tensor, entropy_term: Tensor) -> Tensor:
        """y for next values `[S, M, B]` and their entropy term `[S, B]`; shaped as `critic_targets`."""
        target = self.config.target
        if target == "min":
            value = next_values.amin(1, keepdim=True)
        elif target == "shared_lcb":
            value = lower_bound(next_values, self.lcb_coefficient).unsqueeze(1)
        elif target == "released":
            value = grouped_minimum(next_values).repeat(1, 2, 1)
        else:
            value = next_values
        bootstrap = self.discounts(batch) * (1.0 - batch.terminations)
        targets = batch.rewards.unsqueeze(1) + bootstrap.unsqueeze(1) * (value - entropy_term.unsqueeze(1))
        return targets if targets.shape[1] > 1 else targets.squeeze(1)

    def regression(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """y, and for weights "iv" gamma^2 (1 - terminated) times the members' variance of the next value, `[S, B]`."""
        next_values, entropy_term = self.next_values(batch)
        spread = None
        if self.config.sample_weighting == "iv":
            spread = (self.discounts(batch) * (1.0 - batch.terminations)).square() * next_values.var(1)
        return self.targets_at(batch, next_values, entropy_term), spread

    def action_value(self, observations: Tensor, actions: Tensor) -> Tensor:
        """P[Q](s, a) as the policy sees it, `[S, B]`: gradients flow to the actions, not to the critics."""
        risk = self.config.risk_coefficient
        if self.config.policy_objective == "min" and risk == 0.0:
            return self.critic.minimum(observations, actions)
        outputs = self.critic.outputs(observations, actions, frozen=True)
        values = outputs[..., 0]
        if self.config.policy_objective == "min":
            value = values.amin(1)
        elif self.config.policy_objective == "lcb":
            value = lower_bound(values, self.lcb_coefficient)
        else:
            value = grouped_mean_minimum(values)
        if risk == 0.0:
            return value
        return value - risk * self.errors.heads(outputs).variance.mean(1).sqrt()

    # One update

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Steps of the policy, the temperature and the critics, then of the targets."""
        batch = self.normalize(batch)
        metrics = self.policy_step(batch) | self.critic_step(batch)
        lerp_(self.critic_target, self.critic, self.config.target_update_rate)
        self.step += 1
        return metrics

    def policy_step(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the policy and of the temperature, both by the same sampled actions."""
        actions, log_prob = self._sample(batch.observations, "action")
        value = self.action_value(batch.observations, actions)
        temperature = self.temperature().detach()
        policy_loss = (temperature * log_prob - value).mean(1)
        policy_gradient_norm = self.policy_optimizer.minimize(policy_loss)

        entropy = -log_prob.detach().mean(1)
        self.temperature_optimizer.minimize(self.temperature.log_value.squeeze(1) * (entropy - self.target_entropy))
        return {
            "policy/loss": policy_loss.detach(),
            "policy/grad_norm": policy_gradient_norm,
            "policy/entropy": entropy,
            "policy/value": value.detach().mean(1),
            "policy/temperature": temperature.squeeze(1),
        }

    def critic_step(self, batch: Batch) -> dict[str, Tensor]:
        """One step of all critics."""
        return self.fit_critic(batch, *self.regression(batch))
