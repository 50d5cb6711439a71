"""O-DICE: offline RL by distribution correction with an orthogonal-gradient value update.

A value function V is the Lagrange multiplier of the flow constraint of a regularised optimal occupancy; the convex conjugate of an f-divergence
turns its residual into importance weights, and the policy clones the weighted data:

    R(s, a, s') = r + gamma (1 - terminated) V(s') - V(s)
    L(V)  = (1 - lambda) E[V(s)] + lambda E[f*(R)]
    L(pi) = -E[w(R) log pi(a|s)]

The gradient of the second term of L(V) has a forward part (through V(s), at R_f = r + gamma V_target(s') - V(s)) and a backward part
(through V(s'), at R_b = r + gamma V(s') - V_target(s)) that nearly cancel. The orthogonal rule removes from the backward part what is
parallel to the forward one, over all parameters of a seed at once:

    c = <g_f, g_b> / <g_f, g_f>,    total = g_0 + g_f + (g_b - c g_f)

That is the paper's rule, for a batch (`projection`; `rlkit2.agents.odice_projection` has the same for each layer and each transition).
`semi` uses g_0 + g_f alone; `true` differentiates one residual through both values, without targets.

By default every number is in the data's own units, so that one setting serves data of any reward size, horizon and discount: V counts in standard
deviations of the data's returns around their mean, R in its own running spread, and the multiplier of E[w] = 1 is a quantile q of the batch:

    w = (1 - floor) max(0, A - q) / mean + floor.

The floor clones everything a little: where V is a little too high, at the starts of episodes first, nothing lies above the quantile, and the policy
would never learn to begin. What A is, `weight_residual` says. On the data of whole episodes it is what really followed, the return from s_t to the
end of the episode less V(s_t): the R of a single step ranks actions by the errors of V, which are the same for the same action every time, so that
the policy follows them; those of a whole return are not, and average out. A second factor weighs whole episodes by A at their first step.
"expected" is the theory's R in expectation over s' where the environment is random, a regression e(s, a).

Source: Mao, Xu, Zhang, Zhan, "ODICE: Revealing the Mystery of Distribution Correction Estimation via Orthogonal-gradient Update" (ICLR 2024), and its
released code, which the preset `odice_released` reproduces number for number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from rlkit2.agents.base import ACTION_KINDS, Agent, EncoderOptions, PolicyOptions
from rlkit2.agents.metrics import Metrics
from rlkit2.agents.odice_diagnostics import (
    batch_statistics,
    coadaptation,
    derived_metrics,
    sample_share,
    signs_of_trouble,
)
from rlkit2.agents.odice_episodes import (
    advantages,
    are_rewards_sparse,
    discounted_sums,
    episode_weights,
    in_spreads,
)
from rlkit2.agents.odice_projection import coefficients, orthogonal_by_layer, orthogonal_by_sample
from rlkit2.data.batch import Batch, LookaheadBatch
from rlkit2.data.dataset import Lookahead, TransitionDataset
from rlkit2.errors import ConfigError
from rlkit2.fields import Count, Finite, Fraction, Inside, Interval, NonNegative, Positive, Rate, Widths
from rlkit2.losses.divergences import (
    Divergence,
    f_conjugate_grad,
    policy_weight,
    resolve_divergence,
)
from rlkit2.nn import Adam, Critic, layer_sizes, lerp_, target_copy, unflatten, vjp
from rlkit2.nn.mlp import Pullback, StackedPullback

LABELLED_AT_ONCE = 4096  # rows


@dataclass(frozen=True)
class ODICEConfig(EncoderOptions, PolicyOptions):
    """O-DICE; one setting for every dataset. The preset `odice_released` has the values of the released code."""

    # which parts of the conjugate term's gradient V follows, see the module
    gradient_rule: Literal["orthogonal", "semi", "true"] = "orthogonal"
    # f, see rlkit2.losses.divergences
    divergence: Divergence = "pearson"
    # order of the "alpha" divergence, in (1, 2]
    alpha: Annotated[float, Interval("(1, 2]")] = 1.5
    # weight of the conjugate term, in (0, 1); fixes the mean of (f*)' at about (1 - lambda) / lambda
    lambda_: Inside = 0.5
    # weight of the projected backward gradient (orthogonal rule); 0 is the semi rule
    eta: NonNegative = 0.1
    # what is made orthogonal: the gradients of the "batch" (released code), of each "layer" of it, or of each "sample"
    projection: Literal["batch", "layer", "sample"] = "batch"
    # gamma
    discount: Fraction = 0.99
    # value heads; targets take their minimum
    num_values: Count = 2
    # hidden layers of all networks; none: 256 256
    hidden_sizes: Widths | None = None
    # hidden layers of V alone
    value_hidden_sizes: Widths | None = None
    # layer norm before each ReLU of V
    value_layer_norm: bool = False
    # hidden layers of the policy alone
    policy_hidden_sizes: Widths | None = None
    # Adam's step size for V
    value_learning_rate: NonNegative = 3e-4
    # Adam's step size for the policy
    policy_learning_rate: NonNegative = 3e-4
    # L2 inside Adam, on every policy parameter
    policy_weight_decay: NonNegative = 1e-4
    # Polyak rate of the target V
    target_update_rate: Rate = 0.02
    # units of V: "return" (standard deviations of the data's discounted returns, around their mean, where the normalizer knows them, as the trainer's
    # does) or "reward" (as they are)
    value_unit: Literal["return", "reward"] = "return"
    # units of R in the objective: "spread" (its own running standard deviation, if it were normal) or "value" (those of V)
    residual_unit: Literal["spread", "value"] = "spread"
    # policy weight: "above_quantile" (max(0, R - quantile)), "positive_residual" (released code; max(0, R) for pearson) or "conjugate_grad" ((f*)')
    weight: Literal["above_quantile", "positive_residual", "conjugate_grad"] = "above_quantile"
    # share of the data that "above_quantile" gives no weight
    weight_quantile: Inside = 0.6
    # share of the weight that "above_quantile" spreads evenly over the batch
    weight_floor: Fraction = 0.2
    # what the policy weight ranks transitions by: the "return" to go less V; "mixed": its sum with R, each in its own spread; R "expected" over s' by
    # a network e(s, a); R as "sampled", luck included; "auto": "mixed" where rewards are sparse (nine in ten the same number, and half
    # of the episodes earned the same), else "return", and "expected" where transitions come without their episodes, or for another weight than
    # "above_quantile"
    weight_residual: Literal["auto", "return", "mixed", "expected", "sampled"] = "auto"
    # lambda of generalized advantage estimation, of "return" and "mixed": a residual counts for (gae_lambda gamma)^k k steps before it; 1: V has no
    # say before the end of the episode
    gae_lambda: Fraction = 1.0
    # how much whole episodes count ("return" and "mixed"): exp(this times the return above V at an episode's start, in deviations); 0: none
    trajectory_weight: NonNegative = 1.0
    # upper bound of the policy weight
    weight_clamp: Positive | None = 100.0
    # "mean" divides a seed's weights by their batch mean before the clamp
    weight_normalization: Literal["none", "mean"] = "mean"
    # factor on the residual in the whole objective: the inverse temperature (its start, if adapted)
    residual_scale: Positive = 1.0
    # adapt residual_scale per seed until (sum w)^2 / (B sum w^2) is this; None: off
    target_effective_sample_share: Inside | None = None
    # speed of that adaptation, in log scale per update
    residual_scale_rate: Positive = 1e-3
    # floor of <g_f, g_f> in the projection
    projection_guard: NonNegative = 1e-10
    # clip of V's gradient, per seed
    max_gradient_norm: Positive | None = None
    # upper clip of R in V's gradient, against overflow of rkl
    residual_clip: Finite | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        selective = self.weight == "positive_residual" and resolve_divergence(self.divergence) == "pearson"
        if self.target_effective_sample_share is not None and (selective or self.weight == "above_quantile"):
            raise ConfigError(
                "target_effective_sample_share needs weight = 'conjugate_grad' (or 'positive_residual' without pearson): "
                "the share of max(0, R) and of max(0, R - quantile) does not depend on the scale of R"
            )
        if self.weight_residual in ("return", "mixed") and self.weight != "above_quantile":
            raise ConfigError(
                f"weight_residual = '{self.weight_residual}' has no residual for weight = '{self.weight}'; choose 'expected' or 'sampled', "
                "or weight = 'above_quantile'"
            )
        if self.gae_lambda < 1.0 and (
            self.weight_residual in ("expected", "sampled") or self.weight != "above_quantile"
        ):
            raise ConfigError(
                f"gae_lambda is about what followed, and weight_residual = '{self.weight_residual}' with weight = '{self.weight}' is about one step; "
                "leave it at 1"
            )
        if self.projection != "batch" and self.gradient_rule != "orthogonal":
            raise ConfigError(f"gradient_rule = '{self.gradient_rule}' projects nothing; leave projection = 'batch'")

    @property
    def value_widths(self) -> tuple[int, ...]:
        """Hidden layers of V."""
        return _first(self.value_hidden_sizes, self.hidden_sizes, (256, 256))

    @property
    def policy_widths(self) -> tuple[int, ...]:
        """Hidden layers of the policy."""
        return _first(self.policy_hidden_sizes, self.hidden_sizes, (256, 256))

    @classmethod
    def former(cls, stored: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a run from before V and R had units of their own."""
        if "value_unit" in stored:
            return dict(stored)
        policy = _first(stored.get("policy_hidden_sizes"), stored.get("hidden_sizes"), (1024, 1024))
        return {
            "value_unit": "reward",
            "residual_unit": "value",
            "weight_residual": "sampled",
            **stored,
            "policy_hidden_sizes": policy,
        }


@dataclass(frozen=True)
class Residuals:
    """One evaluation of V: R_f and (orthogonal rule) R_b as `[1 or 2, S, M, B]`, (f*)' at them, V(s), and the pullback of V on rows [s; s']."""

    both: Tensor
    slopes: Tensor
    value: Tensor
    bootstrap: Tensor
    pullback: Pullback

    @property
    def forward(self) -> Tensor:
        """R_f, `[S, M, B]`; the one residual of the other rules."""
        return self.both[0]

    @property
    def backward(self) -> Tensor | None:
        """R_b, `[S, M, B]`."""
        return self.both[1] if len(self.both) == 2 else None


@dataclass(frozen=True)
class ODICETerms:
    """Of a batch, each `[S, M, B]` (weights of expected residuals `[S, 1, B]`); residuals include the scale, values have V's unit."""

    residual_forward: Tensor
    residual_backward: Tensor | None
    weight_raw: Tensor
    weight: Tensor
    value: Tensor


@dataclass(frozen=True)
class ODICEGradients:
    """Gradients of V's objective as lists of `[S, M, ...]` in parameter order, and the projection coefficient `[S]`.

    `forward` and `backward` are before the projection; for `semi` and `true` the whole gradient of the conjugate term is `forward`.
    """

    forward: list[Tensor]
    backward: list[Tensor] | None
    value_term: list[Tensor]
    total: list[Tensor]
    coefficient: Tensor


class ODICE(Agent):
    """O-DICE for S seeds; arguments as for `Agent`."""

    config_class = ODICEConfig
    action_kinds = ACTION_KINDS
    sees_images = True
    several_steps = True
    config: ODICEConfig

    def _build(self) -> None:
        config = self.config
        if config.projection == "sample" and self.encoder is not None:
            raise ConfigError(
                "projection = 'sample' does not go through an encoder of images; choose 'batch' or 'layer'"
            )
        value_options = {"members": config.num_values, "layer_norm": config.value_layer_norm}
        self._build_value(config.value_widths, config.value_learning_rate, **value_options)
        self.value_target = target_copy(self.value_network)
        actor = self._likelihood_actor(config.policy_widths)
        self.actor = self._build_policy(actor, config.policy_learning_rate, weight_decay=config.policy_weight_decay)
        self._register({"value_target": self.value_target})
        self._derived = derived_metrics(config)
        self.adaptive = config.target_effective_sample_share is not None
        ones = torch.ones(len(self.seeds), dtype=self.dtype, device=self.device)
        self.residual_scale, self.residual_spread = ones * config.residual_scale, ones
        if self.adaptive:
            self._register(buffers={"residual_scale": self.residual_scale})
        if config.residual_unit == "spread":
            self._register(buffers={"residual_spread": self.residual_spread})
        if config.gae_lambda < 1.0:
            if not self.labels_data(config):
                raise ConfigError(
                    "gae_lambda < 1 needs weight_residual = 'return' or 'mixed'; the trainer chooses one by the data, here you do"
                )
            self.labelling_value = target_copy(self.value_network)
            self._register({"labelling_value": self.labelling_value})
        self.advantage_labels: Tensor | None = None
        self.expects = config.weight_residual in ("auto", "expected")
        if self.expects:
            self._build_expected_residual()

    def _build_expected_residual(self) -> None:
        """e(s, a), which R regresses on."""
        sizes = self.observation_size, self.action_size, self.config.value_widths
        options = {"discrete": self.discrete, "encoder": self.encoder, **self._placement}
        self.expected_residual = Critic(*sizes, members=1, stream="residual", **options)
        self.expected_optimizer = Adam(self.expected_residual, self.config.value_learning_rate)
        self._register({"residual": self.expected_residual}, {"residual": self.expected_optimizer})

    @classmethod
    def settled(cls, config: ODICEConfig, dataset: Any = None) -> tuple[ODICEConfig, str | None]:
        """`weight_residual` by the data: see the field."""
        kind = config.weight_residual
        if dataset is None and cls.needs_episodes(
            config
        ):  # what is collected is learnt from before its episode has ended
            text = f"odice learns from what it collects before an episode has ended: weight_residual = 'sampled' instead of '{kind}'"
            return replace(config, weight_residual="sampled", gae_lambda=1.0), text
        if dataset is None and config.gae_lambda < 1.0:
            text = f"odice learns from what it collects before an episode has ended: gae_lambda = 1 instead of {config.gae_lambda:g}"
            return replace(config, gae_lambda=1.0), text
        if dataset is None or kind != "auto" or config.weight != "above_quantile":
            return config, None
        sparse, why = are_rewards_sparse(dataset)
        kind = "mixed" if sparse else "return"
        text = f"odice: weight_residual = '{kind}', as for {why}; --weight-residual chooses another"
        return replace(config, weight_residual=kind), text

    @classmethod
    def default_policy_ema(cls, config: ODICEConfig) -> float:
        """For the default weights a long mean: the noise in what followed, which long training learns by heart, averages out a second time."""
        return 0.9999 if config.weight == "above_quantile" else 0.0

    @classmethod
    def needs_episodes(cls, config: ODICEConfig) -> bool:
        """Where what followed decides the weights."""
        return config.weight_residual in ("return", "mixed")

    @classmethod
    def labels_data(cls, config: ODICEConfig) -> bool:
        """Where V has its say in what followed."""
        return cls.needs_episodes(config) and config.gae_lambda < 1.0

    @torch.no_grad()
    def label(self, dataset: TransitionDataset, *, anew: bool = True) -> None:
        """The advantage of every row, by V_target as it is now and is kept for a resume."""
        if anew:
            lerp_(self.labelling_value, self.value_target, 1.0)
        found = self.lambda_advantages(dataset)
        if self.advantage_labels is None:
            self.advantage_labels = found
        else:
            self.advantage_labels.copy_(found)

    @classmethod
    def return_discount(cls, config: ODICEConfig) -> float | None:
        """The discount where V counts in the spread of returns."""
        return config.discount if config.value_unit == "return" else None

    def normalize(self, batch: Batch) -> Batch:
        """As for every agent, with rewards for V in its unit: (r - mean (1 - gamma (1 - terminated))) / sd changes R by the factor 1 / sd alone."""
        batch = super().normalize(batch)
        mean, std = self.value_units()
        if isinstance(std, float):
            return batch
        return replace(batch, rewards=(batch.rewards - mean * (1.0 - self.bootstrap(batch))) / std)

    def bootstrap(self, batch: Batch) -> Tensor:
        """gamma (1 - terminated) of a normalised batch, gamma^k for returns of k steps, `[S, B]`."""
        discount = self.discounts(batch)
        if isinstance(discount, Tensor):
            return discount * (1.0 - batch.terminations)
        return torch.rsub(batch.terminations, discount, alpha=discount)

    # The terms of the objective, on normalised batches. Tests and variants change the method by overriding one of these.

    @torch.no_grad()
    def target_value(self, observations: Tensor) -> Tensor:
        """min over heads of V_target, `[S, 1, n]`."""
        minimum: Tensor = self.value_target(observations).amin(1, keepdim=True)
        return minimum

    def residuals(self, batch: Batch) -> Residuals:
        """R_f = r + gamma V_target(s') - V(s) and R_b = r + gamma V(s') - V_target(s), online heads apart; gamma counts as 0 at a termination."""
        rows = batch.rewards.shape[1]
        rewards = batch.rewards.unsqueeze(1)
        bootstrap = self.bootstrap(batch).unsqueeze(1)
        if self.config.gradient_rule == "semi":
            value, pullback = vjp(self.value_network, batch.observations)
            here, ahead = value.unsqueeze(0), self.target_value(batch.next_observations)
        else:
            both = torch.cat([batch.observations, batch.next_observations], 1)
            values, pullback = vjp(self.value_network, both)
            value, next_value = values[..., :rows], values[..., rows:]
            if self.config.gradient_rule == "true":
                here, ahead = value.unsqueeze(0), next_value
            else:
                target, next_target = self.target_value(both).expand_as(values).split_with_sizes([rows, rows], -1)
                here, ahead = torch.stack([value, target]), torch.stack([next_target, next_value])
        residuals = self._scaled(torch.addcmul(rewards, bootstrap, ahead) - here)
        return Residuals(residuals, self.optimal_weight(residuals), value, bootstrap, pullback)

    def optimal_weight(self, residual: Tensor) -> Tensor:
        """(f*)'(R), as V's gradient uses it."""
        return f_conjugate_grad(self.config.divergence, self.clipped(residual), alpha=self.config.alpha)

    def clipped(self, residual: Tensor) -> Tensor:
        """R, at most `residual_clip`."""
        return residual if self.config.residual_clip is None else residual.clamp(max=self.config.residual_clip)

    def _scaled(self, residual: Tensor) -> Tensor:
        if self.adaptive or self.config.residual_unit == "spread":
            return residual * (self.residual_scale / self.residual_spread).view(-1, 1, 1)
        return residual if self.config.residual_scale == 1.0 else residual * self.config.residual_scale

    def cotangents(self, residuals: Residuals) -> tuple[float, Tensor, Tensor | None]:
        """Derivatives of L(V) by the values, as means over heads and batch: what the pullback turns into g_0, g_f and g_b.

        Of (1 - lambda) E[V(s)] by each V(s), one number; of lambda E[f*(R)] by V(s) and by V(s'), `[S, M, B]` (None: not by V(s')).
        """
        config = self.config
        share = 1.0 / (residuals.value.shape[1] * residuals.value.shape[2])
        at_value = residuals.slopes[0] * (-config.lambda_ * share)
        at_next = None
        if config.gradient_rule == "true":
            at_next = residuals.bootstrap * -at_value
        elif residuals.backward is not None:
            at_next = residuals.bootstrap * residuals.slopes[1] * (config.lambda_ * config.eta * share)
        return (1.0 - config.lambda_) * share, at_value, at_next

    def orthogonal(self, g_f: Tensor, g_b: Tensor, g_1: Tensor, mean_term: float) -> tuple[Tensor, dict[str, Tensor]]:
        """g_0 + g_f + (g_b - c g_f) of vectors `[S, P]`, c = <g_f, g_b> / <g_f, g_f> per seed; g_0 = `mean_term` g_1. In place of g_f."""
        norm_f, norm_b = (torch.linalg.vector_norm(gradient, dim=1) for gradient in (g_f, g_b))
        dot, square = torch.linalg.vecdot(g_f, g_b), norm_f * norm_f
        c = coefficients(dot, square, self.config.projection_guard)
        if self.config.projection == "layer":
            perpendicular = orthogonal_by_layer(g_f, g_b, layer_sizes(self.value_network), self.config.projection_guard)
        else:
            perpendicular = torch.addcmul(g_b, g_f, c.unsqueeze(1), value=-1.0)
        metrics = {
            "projection/forward_norm": norm_f,
            "projection/backward_norm": norm_b,
            "projection/dot": dot,
            "projection/perpendicular_norm": torch.linalg.vector_norm(perpendicular, dim=1),
            "value/dot_after_projection": torch.linalg.vecdot(g_f, perpendicular),
            "projection/coefficient": c,
        }
        return g_f.add_(perpendicular).add_(g_1, alpha=mean_term), metrics

    def value_gradient(self, residuals: Residuals) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient of L(V) by the rule of the config, `[S, P]`, and what went into it."""
        pullback, rows = residuals.pullback, residuals.value.shape[2]
        mean_term, at_value, at_next = self.cotangents(residuals)
        if at_next is None:
            return pullback(at_value + mean_term), {}
        if self.config.gradient_rule == "true":
            return pullback(torch.cat([at_value + mean_term, at_next], 2)), {}
        here, there = slice(0, rows), slice(rows, 2 * rows)
        if self.config.projection == "sample":
            if not isinstance(pullback, StackedPullback):
                raise ConfigError("projection = 'sample' needs a V that is a StackedMLP; choose 'batch' or 'layer'")
            square, product = pullback.products(here, here), pullback.products(here, there)
            at_value, metrics = orthogonal_by_sample(at_value, at_next, square, product, self.config.projection_guard)
            return pullback(torch.cat([at_value + mean_term, at_next], 2)), metrics
        g_f, g_b, g_1 = pullback(at_value, here), pullback(at_next, there), pullback(None, here)
        return self.orthogonal(g_f, g_b, g_1, mean_term)

    def ranked_by(self, batch: Batch, residual: Tensor, expected: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What `weight_residual` ranks a normalised batch by, `[S, 1 or M, B]`, and the weights of its episodes, `[S, 1, B]` (None: all the same).

        Args:
            batch: normalised.
            residual: R_f, `[S, M, B]`.
            expected: e(s, a), `[S, 1, B]`; None where it is not learnt.

        Raises:
            ConfigError: it needs the episodes of the batch, which does not know them.
        """
        kind = self.config.weight_residual
        if not self.needs_episodes(self.config):
            return residual if expected is None else expected, None
        followed, whole = self.advantages(batch)
        if kind == "mixed":
            followed = in_spreads(followed) + in_spreads(residual.mean(1, keepdim=True))
        return followed, episode_weights(whole, self.config.trajectory_weight, self.config.weight_floor)

    def advantages(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What followed each row of a normalised batch, and what followed the first row of its episode, less V_target there, `[S, 1, B]` each.

        Both to the end of the episode, plus V_target there where it was cut off; the first, where gae_lambda < 1, as `label` found it.
        """
        if not isinstance(batch, LookaheadBatch) or batch.returns_to_go is None:
            raise ConfigError(
                f"weight_residual = '{self.config.weight_residual}' needs whole episodes: take batches from "
                "dataset.looking_ahead(discount=..., episodes=True), or choose 'expected' or 'sampled'"
            )
        followed, whole = advantages(batch, self.target_value, self.config.discount, *self.value_units())
        if self.config.gae_lambda < 1.0:
            if self.advantage_labels is None:
                raise ConfigError("gae_lambda < 1 needs agent.label(dataset), once an epoch; the trainer does that")
            followed = self.advantage_labels.gather(1, batch.rows).unsqueeze(1)
        return followed, whole

    def lambda_advantages(self, dataset: TransitionDataset) -> Tensor:
        """sum_k (gae_lambda gamma)^k R_(t+k) to the end of every row's episode, by V of the last `label`, `[S, N]`.

        Source: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (ICLR 2016), equation 16.
        """
        single = replace(dataset, lookahead=Lookahead())
        parts = []
        for rows in torch.split(torch.arange(len(dataset), device=dataset.device), LABELLED_AT_ONCE):
            raw = single.gather(rows.expand(len(self.seeds), -1)).to(self.device)
            batch = self.normalize(raw)
            here, there = (self.labelling_value(seen).amin(1) for seen in (batch.observations, batch.next_observations))
            parts.append(batch.rewards + self.bootstrap(batch) * there - here)
        decay = self.config.gae_lambda * self.config.discount
        return discounted_sums(torch.cat(parts, 1), dataset.steps_to_go.to(self.device), decay)

    def value_units(self) -> tuple[Tensor | float, Tensor | float]:
        """Mean and standard deviation that V counts in, `[S, 1]`; 0 and 1 where it counts in rewards."""
        mean, std = self.normalizer.return_mean, self.normalizer.return_std
        if self.config.value_unit == "reward" or mean is None or std is None:
            return 0.0, 1.0
        return mean, std

    def weights(self, residual: Tensor, episodes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """w before and after normalisation and clamp, `[S, M, B]`, of what ranks the transitions and the weights of their episodes."""
        config = self.config
        if config.weight == "above_quantile":
            quantile = residual.flatten(1).quantile(config.weight_quantile, dim=1).view(-1, 1, 1)
            raw = (residual - quantile).clamp(min=0.0)
            above = raw.mean((1, 2), keepdim=True)
            # where nothing lies above (few distinct residuals, the largest of them common) the largest share the weight
            best = (residual >= quantile).to(raw.dtype)
            raw = torch.where(above > 0.0, raw / above, best / best.mean((1, 2), keepdim=True))
            raw = raw * (1.0 - config.weight_floor) + config.weight_floor
        else:
            raw = policy_weight(config.divergence, residual, None, kind=config.weight, alpha=config.alpha)
        if episodes is not None:
            raw = raw * episodes
        weight = raw
        if config.weight_normalization == "mean":
            finite = raw.clamp(max=torch.finfo(raw.dtype).max / raw[0].numel())  # so that their mean is finite
            weight = finite / finite.mean((1, 2), keepdim=True).clamp(min=1e-3)
        return raw, weight if config.weight_clamp is None else weight.clamp(max=config.weight_clamp)

    # One update

    def update(self, batch: Batch) -> Metrics:
        """Value step, target step, then the policy step on weights of the residual before the value step."""
        batch = self.normalize(batch)
        residuals = self.residuals(batch)
        gradient, metrics = self.value_gradient(residuals)
        value_gradient_norm = torch.linalg.vector_norm(gradient, dim=1)
        if self.config.max_gradient_norm is not None:
            gradient = gradient * (self.config.max_gradient_norm / value_gradient_norm).clamp(max=1.0).unsqueeze(1)
        expected = self.learn_expected_residual(batch, residuals.forward) if self.expects else None
        ranked = self.ranked_by(batch, residuals.forward, expected)
        self.value_optimizer.step(gradient)
        lerp_(self.value_target, self.value_network, self.config.target_update_rate)

        raw, weight = self.weights(*ranked)
        log_prob = self.actor.log_prob(batch.observations, batch.actions)
        policy_loss = (log_prob * (weight.mean(1) * (-1.0 / log_prob.shape[1]))).sum(1)
        policy_gradient_norm = self.policy_optimizer.minimize(policy_loss)

        if self.adaptive or self.config.residual_unit == "spread":
            metrics["temperature/residual_scale"] = self.residual_scale / self.residual_spread
        if self.config.residual_unit == "spread":
            self.follow_spread(residuals.forward)
        if self.adaptive:
            self.adapt_scale(raw)
        self.step += 1
        made = {
            "value/grad_norm": value_gradient_norm,
            "policy/loss": policy_loss.detach(),
            "policy/grad_norm": policy_gradient_norm,
            **metrics,
            **batch_statistics(self.config, batch.rewards, residuals, self.clipped(residuals.both), weight),
        }
        return Metrics(made, self._derived)

    def adapt_scale(self, raw: Tensor) -> None:
        """Move log residual_scale towards the target share of the unclamped weights, at most `residual_scale_rate` per update.

        Scaling the residual r + gamma V(s') - V(s) rather than the reward leaves V in units of reward: a change of scale moves what V should be
        through the temperature alone, and the weights respond at once. Dead weights (all zero, or overflowing) count as a share of zero:
        the scale falls, and at scale zero every weight is (f*)'(0), a share of one.
        """
        target = self.config.target_effective_sample_share
        assert target is not None
        raw = raw / raw.amax((1, 2), keepdim=True)  # against under- and overflow of the squares
        share = sample_share(raw.mean((1, 2)), raw.square().mean((1, 2))).nan_to_num(0.0, 0.0, 0.0).clamp(min=1e-6)
        error = (share / target).log().clamp(-1.0, 1.0)
        self.residual_scale.mul_((self.config.residual_scale_rate * error).exp()).clamp_(1e-4, 1e4)

    def follow_spread(self, residual: Tensor) -> None:
        """Move `residual_spread` towards that of a batch `[S, M, B]`: the mean over the updates so far, then a running mean of about 200.

        From the mean absolute deviation, which few large residuals (last steps before a termination) move less than they move a variance.
        """
        deviation = (residual - residual.mean((1, 2), keepdim=True)).abs().mean((1, 2)) * (math.pi / 2.0) ** 0.5
        spread = deviation * (self.residual_spread / self.residual_scale)
        rate = (1.0 / (self.step + 1)).clamp(min=0.005).to(self.dtype)
        self.residual_spread.lerp_(spread, rate).clamp_(min=1e-6)

    def learn_expected_residual(self, batch: Batch, residual: Tensor) -> Tensor:
        """e(s, a), `[S, 1, B]`, before one step of its regression on the batch's R (where that counts in spreads, at most 20 of them)."""
        target = residual.mean(1, keepdim=True)
        if self.config.residual_unit == "spread":
            most = 20.0 * self.residual_scale.view(-1, 1, 1)
            target = target.clamp(-most, most)
        expected: Tensor = self.expected_residual(batch.observations, batch.actions)
        self.expected_optimizer.minimize((expected - target).square().mean((1, 2)))
        found: Tensor = expected.detach()
        return found

    # What it offers to others

    def terms(self, batch: Batch) -> ODICETerms:
        """Residuals, weights and values of a raw batch, without an update."""
        batch = self.normalize(batch)
        residuals = self.residuals(batch)
        with torch.no_grad():
            expected = self.expected_residual(batch.observations, batch.actions) if self.expects else None
            raw, weight = self.weights(*self.ranked_by(batch, residuals.forward, expected))
        return ODICETerms(residuals.forward, residuals.backward, raw, weight, residuals.value)

    def value_gradients(self, batch: Batch) -> ODICEGradients:
        """The parts of V's gradient on a raw batch (before `max_gradient_norm`), without an update."""
        residuals = self.residuals(self.normalize(batch))
        pullback, rows = residuals.pullback, residuals.value.shape[2]
        here, there = slice(0, rows), slice(rows, 2 * rows)
        mean_term, at_value, at_next = self.cotangents(residuals)
        total, metrics = self.value_gradient(residuals)
        g_0 = pullback(None, here) * mean_term
        g_f, g_b = total - g_0, None
        if residuals.backward is not None and at_next is not None:
            g_f, g_b = pullback(at_value, here), pullback(at_next, there)

        def parts(vector: Tensor) -> list[Tensor]:
            return unflatten(self.value_network, vector)

        return ODICEGradients(
            parts(g_f),
            None if g_b is None else parts(g_b),
            parts(g_0),
            parts(total),
            metrics.get("projection/coefficient", total.new_zeros(len(self.seeds))),
        )

    @torch.no_grad()
    def value(self, observations: Tensor) -> Tensor:
        """min over heads of V at raw `observations [S, B, obs]`, as `[S, B]`, in units of the batch's rewards."""
        mean, std = self.value_units()
        return mean + std * self.raw_value(observations).amin(1)

    @torch.no_grad()
    def coadaptation(self, batch: Batch) -> dict[str, Tensor]:
        """See `rlkit2.agents.odice_diagnostics.coadaptation`; on a raw batch."""
        batch = self.normalize(batch)
        return coadaptation(self.value_network, batch.observations, batch.next_observations)

    @classmethod
    def warnings(cls, config: ODICEConfig, metrics: Mapping[str, float]) -> dict[str, str]:
        """Dead or saturated weights, the offset of `true`, overflow, an unsettled projection."""
        return signs_of_trouble(config, metrics)


def _first(*sizes: tuple[int, ...] | None) -> tuple[int, ...]:
    """The first that is given; none at all, (), is a linear network."""
    return next(size for size in sizes if size is not None)
