"""What agents with a noise model say about their values: `Uncertainty`, and the class that such agents share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import pdtr, stdtrit  # scipy.stats takes a second to import
from torch import Tensor

from rlkit2.agents.base import Agent, batch_means
from rlkit2.agents.error_model import ErrorModel, Heads, counted, error_warnings
from rlkit2.data.batch import Batch, RowBatch
from rlkit2.errors import ConfigError
from rlkit2.losses.aggregation import lower_bound
from rlkit2.losses.ggd import expected_minimum
from rlkit2.losses.td import squared_error, td_target
from rlkit2.nn import Adam, Critic, as_rows
from rlkit2.nn.distributions import GeneralizedNormal, mixture_excess_kurtosis, mixture_icdf
from rlkit2.nn.random import uniform_at

Array = NDArray[np.float32]

POISSON = [float(pdtr(k, 1.0)) for k in range(10)]  # P(count <= k)


@dataclass(frozen=True)
class Uncertainty:
    """Noise and ignorance about Q(s, a), apart; float32 arrays `[B]` (`[B, n]` for all discrete actions), with the seed axis in front if S > 1.

    "Aleatoric" is the noise of one TD target: of the reward, the transition, the next action and the moving target. It is not the deviation of the
    return, and more data does not reduce it. "Epistemic" is the disagreement of the members, which more data does reduce.
    """

    q_mean: Array  # mean over members
    target_mean: Array  # member mean of the noise's location: `q_mean`, unless the agent moves Q away from its targets (cql, edac)
    q_lower: Array  # mean - k epistemic_sd, k as the agent's lcb_coefficient (matched to the minimum unless given)
    aleatoric_sd: Array  # root of the member-mean variance
    epistemic_sd: Array  # standard deviation over members (M - 1 degrees of freedom); 0 for one member
    total_sd: Array  # root of the sum of their squares
    shape: Array  # member mean of beta: 1 Laplace, 2 Gaussian
    scale: Array  # member mean of alpha
    excess_kurtosis: Array  # member mean, of the noise alone
    mixture_excess_kurtosis: Array  # of the equal-weight mixture of the members' targets: their disagreement included
    quantiles: Array  # of that mixture, `[..., K]`
    num_members: int = 1
    members: dict[str, Array] | None = None  # `q`, `target_mean`, `aleatoric_sd`, `shape`, `scale` per member, `[M, B]`

    def interval(self, level: float = 0.9) -> tuple[Array, Array]:
        """Ends of an interval for Q(s, a) itself, shaped as `q_mean`: q_mean -+ t sqrt(1 + 1/M) epistemic_sd, t of M - 1 degrees of freedom.

        It holds the chance in the data where the members differ as Q does between datasets (bootstrap = "rows" with independent targets), and
        never the bias of the method or of the networks.

        Raises:
            ConfigError: a single member, or a level that is not between 0 and 1.
        """
        if not 0.0 < level < 1.0:
            raise ConfigError(f"level must be between 0 and 1, not {level}")
        if self.num_members < 2:
            raise ConfigError("one critic knows no ignorance, so there is no interval; raise num_critics")
        reach = stdtrit(self.num_members - 1, 0.5 + 0.5 * level) * np.sqrt(1.0 + 1.0 / self.num_members)
        half = (reach * self.epistemic_sd).astype(np.float32)
        return self.q_mean - half, self.q_mean + half


def value_warnings(discount: float, metrics: Mapping[str, float]) -> dict[str, str]:
    """A mean of Q beyond what the rewards of the data could ever be worth, by a tenth of that range: Q diverges.

    Nothing where the metrics lack Q or the rewards, or rewards are not discounted. An entropy bonus counts as a reward.
    """
    if discount >= 1.0 or not {"critic/q_mean", "data/reward_min", "data/reward_max"} <= metrics.keys():
        return {}
    bonus = metrics.get("policy/temperature", 0.0) * abs(metrics.get("policy/entropy", 0.0))
    low = (min(metrics["data/reward_min"], 0.0) - bonus) / (1.0 - discount)
    high = (max(metrics["data/reward_max"], 0.0) + bonus) / (1.0 - discount)
    value, slack = metrics["critic/q_mean"], 0.1 * (high - low)
    if low - slack <= value <= high + slack:
        return {}
    doubt = f"critic/q_mean is {value:.3g}, but by the data's rewards no policy is worth less than {low:.3g} or more than {high:.3g}"
    mend = "keep the policy nearer to the data, lower critic_learning_rate or target_update_rate, or take more critics"
    return {"values_out_of_reach": f"{doubt}: Q diverges; {mend}"}


@dataclass(frozen=True)
class PredictedTargets:
    """Targets of a batch and the distribution each member gives them, all `[S, M, B]`."""

    targets: Tensor
    heads: Heads


class UncertainAgent(Agent):
    """An agent with an ensemble `critic` and an `ErrorModel`; a subclass offers `critic_targets`."""

    several_steps = True
    errors: ErrorModel
    lcb_coefficient: float

    @property
    def moves_values(self) -> bool:
        """Whether the loss moves Q away from the mean of its targets on purpose; the noise then has a location of its own."""
        return False

    @property
    def epistemic_limits(self) -> tuple[str, ...]:
        """Why the size of `epistemic_sd` is not that of Q's error from the chance in the data, a line each; nothing where it is meant to be."""
        found = []
        if self.config.num_critics < 2:
            found.append("one critic knows no ignorance: epistemic_sd is 0; raise num_critics")
        elif self.config.bootstrap == "none":
            found.append(
                "the critics saw the same rows, so epistemic_sd is too small and only ranks; set bootstrap = 'rows'"
            )
        if getattr(self.config, "target", None) != "independent":
            found.append(
                "the critics learn from shared targets, so epistemic_sd misses what these err; set target = 'independent'"
            )
        if self.moves_values:
            found.append(
                "Q is moved away from its targets on purpose (conservative, diverse): epistemic_sd is that of the moved Q, not of the return"
            )
        return tuple(found)

    def critic_targets(self, batch: Batch) -> Tensor:
        """y for a normalised batch, `[S, B]` or `[S, M, B]`, without gradient."""
        raise NotImplementedError

    def td_targets(self, batch: Batch, next_value: Tensor) -> Tensor:
        """r + gamma (1 - terminated) next_value of a normalised batch, for next values `[S, B]`, or `[S, M, B]` where members have their own.

        Where the batch has returns of several steps, r is such a return and gamma is raised to their number.
        """
        rewards, terminations, discounts = batch.rewards, batch.terminations, self.discounts(batch)
        if next_value.ndim == 3:
            rewards, terminations = rewards.unsqueeze(1), terminations.unsqueeze(1)
            discounts = discounts.unsqueeze(1) if isinstance(discounts, Tensor) else discounts
        return td_target(rewards, terminations, next_value, discounts)

    def _build_critics(self, **options: Any) -> None:
        """The critics with the error model of the config, their targets and optimiser, and the k of their lower bounds; `options` as for `Critic`."""
        config = self.config
        if config.prior_scale and self.encoder is not None:
            raise ConfigError(
                "prior_scale is a random function of columns, not of images; leave it at 0 for image observations"
            )
        self.errors = ErrorModel(config, len(self.seeds), self.dtype, self.device, moved=self.moves_values)
        self._register(buffers=self.errors.buffers)
        self._build_critic(
            config.critic_learning_rate,
            noise_outputs=self.errors.outputs,
            detach_noise=self.errors.detached,
            prior_scale=config.prior_scale,
            **options,
        )
        if self.errors.own_location:
            self.location = Critic(
                self.observation_size,
                self.action_size,
                config.hidden_sizes,
                members=config.num_critics,
                discrete=self.discrete,
                encoder=self.encoder,
                stream="location",
                **self._placement,
                **options,
            )
            self.location_optimizer = Adam(self.location, config.critic_learning_rate)
            self._register({"location": self.location}, {"location": self.location_optimizer})
        self._counts = torch.tensor(POISSON, dtype=self.dtype, device=self.device)
        given = getattr(config, "lcb_coefficient", None)
        self.lcb_coefficient = expected_minimum(config.num_critics) if given is None else given

    @torch.no_grad()
    def q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """min over critics of Q at raw observations `[S, B, obs]` and actions, as `[S, B]`, in units of the batch's rewards."""
        return self.raw_q(self.critic, observations, actions).amin(1)

    @classmethod
    def warnings(cls, config: Any, metrics: Mapping[str, float]) -> dict[str, str]:
        """Values that no policy could have; signs of trouble in the noise model."""
        return {**value_warnings(config.discount, metrics), **error_warnings(metrics)}

    def row_weights(self, batch: Batch) -> Tensor | None:
        """How often every row counts for every member, `[S, M, B]` with mean 1: Poisson numbers that seed, member and row alone decide; None: alike.

        So every member sees its own resample of the data (Efron's bootstrap, drawn row by row as by Oza and Russell, 2001).

        Raises:
            ConfigError: with bootstrap = "rows", a batch that does not know its rows.
        """
        if self.config.bootstrap == "none":
            return None
        if not isinstance(batch, RowBatch):
            raise ConfigError(
                "bootstrap = 'rows' needs to know the batch's rows; take it from dataset.gather or dataset.sample"
            )
        members: int = self.config.num_critics
        position = batch.rows.to(self.device).unsqueeze(1) * members + torch.arange(members, device=self.device).view(
            -1, 1
        )
        drawn = uniform_at(position, self.seed_keys, stream="bootstrap", dtype=self.dtype)
        return torch.bucketize(drawn, self._counts).to(self.dtype)

    def fit_location(self, batch: Batch, targets: Tensor, row_weights: Tensor | None = None) -> Tensor | None:
        """One step of the noise's own location on a normalised batch, by squared error; the values before it, `[S, M, B]` (None without one).

        Arguments as for `ErrorModel.loss`.
        """
        if not self.errors.own_location:
            return None
        values, pullback = self.location.vjp(batch.observations, batch.actions)
        error = counted(values - (targets if targets.ndim == 3 else targets.unsqueeze(1)), row_weights)
        self.location_optimizer.step(pullback(error * (2.0 / error.shape[2])))
        return values

    def error_loss(
        self, batch: Batch, outputs: Tensor, targets: Tensor, target_variance: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`ErrorModel.loss` of outputs at a normalised batch, with the weights of its rows and a step of the noise's location."""
        weights = self.row_weights(batch)
        location = self.fit_location(batch, targets, weights)
        return self.errors.loss(outputs, targets, self.discounts(batch), target_variance, weights, location)

    def fit_critic(self, batch: Batch, targets: Tensor, target_variance: Tensor | None = None) -> dict[str, Tensor]:
        """One step of all members on a normalised batch, with metrics.

        Args:
            targets: `[S, B]`, or `[S, M, B]` where members have their own.
            target_variance: as for `ErrorModel.loss`.
        """
        if not self.errors.outputs and targets.ndim == 2 and self.config.bootstrap == "none":
            q, pullback = self.critic.vjp(batch.observations, batch.actions)
            losses, cotangent = squared_error(q, targets)
            gradient = pullback(cotangent)
            self.critic_optimizer.step(gradient)
            means = batch_means({"critic/loss": losses, "critic/q_mean": q[:, 0]})
            return {"critic/grad_norm": torch.linalg.vector_norm(gradient, dim=1), **means}
        outputs = self.critic.outputs(batch.observations, batch.actions)
        loss, metrics = self.error_loss(batch, outputs, targets, target_variance)
        gradient_norm = self.critic_optimizer.minimize(loss)
        q_mean = outputs[:, 0, :, 0].detach().mean(1)
        return {"critic/loss": loss.detach(), "critic/grad_norm": gradient_norm, "critic/q_mean": q_mean, **metrics}

    def _require_noise(self) -> None:
        if not self.errors.outputs:
            raise ConfigError(
                "this agent was trained with critic = 'mse' and knows no noise; train it with critic = 'ggd' or 'gaussian'"
            )

    @torch.no_grad()
    def predicted_targets(self, batch: Batch) -> PredictedTargets:
        """Targets by the current target networks, and the heads at a raw batch's actions: `critic_targets` draws its noise from the agent's step.

        Raises:
            ConfigError: the critic has no noise model.
        """
        self._require_noise()
        batch = self.normalize(batch)
        targets = self.critic_targets(batch)
        heads = self.heads(batch.observations, batch.actions)
        targets = targets if targets.ndim == 3 else targets.unsqueeze(1)
        return PredictedTargets(targets.expand_as(heads.q), heads)

    @torch.no_grad()
    def heads_at(self, observations: Any, actions: Any = None) -> Heads:
        """Heads of every member at raw observations and actions, `[S, M, B]`; see `uncertainty`."""
        observed = self._seeded(as_rows(torch.as_tensor(observations), self.encoder), 2)
        inputs = self.inputs(observed)
        if actions is None and self.discrete:
            return self.heads(inputs)
        if actions is None:
            chosen = self.policy(observed)
        else:
            chosen = self._seeded(actions, 1 if self.discrete else 2)
        return self.heads(inputs, self.normalize_actions(chosen))

    def heads(self, observations: Tensor, actions: Tensor | None = None) -> Heads:
        """Heads of every member at normalised observations and actions, `[S, M, B]`; without actions at every discrete one, `[S, M, B, n]`."""
        location = None
        if actions is None:
            outputs = self.critic.every_output(observations)
            if self.errors.own_location:
                location = self.location.every_action(observations)
        else:
            outputs = self.critic.outputs(observations, actions)
            if self.errors.own_location:
                location = self.location(observations, actions)
        return self.errors.heads(outputs, location)

    def _seeded(self, values: Any, ndim: int) -> Tensor:
        """`[B, ...]` for every seed alike, or `[S, B, ...]`."""
        tensor = torch.as_tensor(values, device=self.device)
        if tensor.ndim == ndim:
            return tensor.expand(len(self.seeds), *tensor.shape)
        if tensor.ndim != ndim + 1 or len(tensor) != len(self.seeds):
            raise ConfigError(
                f"expected {ndim} axes, or {len(self.seeds)} seeds in front, not shape {list(tensor.shape)}"
            )
        return tensor

    def uncertainty(
        self,
        observations: ArrayLike | Tensor,
        actions: ArrayLike | Tensor | None = None,
        quantiles: Sequence[float] = (),
        per_member: bool = False,
    ) -> Uncertainty:
        """Mean, noise and ignorance of Q(s, a), in units of the batch's rewards.

        Args:
            observations: `[B, obs]`, or `[S, B, obs]`, in raw units.
            actions: `[B, act]` or `[S, B, act]` (discrete: int `[B]` or `[S, B]`); None for the policy's, or for every discrete action.
            quantiles: probabilities in (0, 1) whose quantiles of the members' mixture are wanted.
            per_member: also every member's own numbers.

        Raises:
            ConfigError: the critic has no noise model, or a shape does not fit.
        """
        self._require_noise()
        heads = self.heads_at(observations, actions)
        deviation = heads.q.std(1) if heads.q.shape[1] > 1 else torch.zeros_like(heads.q[:, 0])
        scale, variance = heads.log_scale.exp(), heads.variance
        location, alpha, beta = (t.double().movedim(1, -1) for t in (heads.location, scale, heads.shape))
        mixture = GeneralizedNormal(location, alpha, beta, validate_args=False)
        levels = torch.tensor(list(quantiles), dtype=torch.float64, device=self.device)
        aleatoric = variance.mean(1).sqrt()
        found = {
            "q_mean": heads.q.mean(1),
            "target_mean": heads.location.mean(1),
            "q_lower": lower_bound(heads.q, self.lcb_coefficient),
            "aleatoric_sd": aleatoric,
            "epistemic_sd": deviation,
            "total_sd": torch.hypot(aleatoric, deviation),
            "shape": heads.shape.mean(1),
            "scale": scale.mean(1),
            "excess_kurtosis": mixture.excess_kurtosis.mean(-1),
            "mixture_excess_kurtosis": mixture_excess_kurtosis(mixture),
            "quantiles": mixture_icdf(mixture, levels),
        }
        members = {
            "q": heads.q,
            "target_mean": heads.location,
            "aleatoric_sd": variance.sqrt(),
            "shape": heads.shape,
            "scale": scale,
        }
        return Uncertainty(
            **{name: self._array(value) for name, value in found.items()},
            num_members=heads.q.shape[1],
            members={name: self._array(value) for name, value in members.items()} if per_member else None,
        )

    def _array(self, values: Tensor) -> Array:
        values = values.squeeze(0) if len(self.seeds) == 1 else values
        return values.to(torch.float32).cpu().numpy()
