"""Contrastive preference learning: a policy straight from preferences, without a reward and without values.

If people prefer the segment with less regret, and the policy is the optimum of a maximum-entropy task, its log-likelihoods are advantages; so the
policy itself is the Bradley-Terry model of the labels. With A(seg) = sum_t alpha gamma^t log pi(a_t|s_t), y the probability that the second segment
is preferred and lambda in (0, 1] a conservative bias towards what was shown,

    L(pi) = -E[ (1 - y) log sigmoid(A_1 - lambda A_2) + y log sigmoid(A_2 - lambda A_1) ] - c E[log pi(a|s)]

after `bc_steps` updates of cloning all segments (L = -E[log pi(a|s)]), at whose end the optimiser starts anew. c (`cloning_weight`) is 0 in the
paper: with few labels the loss then lowers the likelihood of both segments until the policy has left the data.

Source: Hejna, Rafailov, Sikchi, Finn, Niekum, Knox, Sadigh, "Contrastive Preference Learning: Learning from Human Feedback without Reinforcement
Learning" (ICLR 2024), eqs. 5 and 6. With `reference` the log-likelihoods are relative to the cloned policy (its CPL-KL). Differences from the
authors' code: no dropout (theirs 0.25), hidden layers of 256 (theirs 512), and no variant that ranks all segments of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from rlkit2.agents.base import ACTION_KINDS, PolicyOptions
from rlkit2.agents.preference_agent import PreferenceAgent
from rlkit2.data.batch import Batch
from rlkit2.data.preferences import PreferenceBatch
from rlkit2.errors import ConfigError
from rlkit2.fields import Natural, NonNegative, Positive, Rate, Widths
from rlkit2.losses.preference import cpl_loss
from rlkit2.nn import target_copy
from rlkit2.nn.actors import PolicyHead


@dataclass(frozen=True)
class CPLConfig(PolicyOptions):
    """Contrastive preference learning."""

    # folder of labels (rlkit2 prefs label)
    preferences: str = ""
    # temperature: how much an advantage a unit of log-likelihood is
    alpha: Positive = 0.1
    # conservative bias in (0, 1]: the smaller, the closer to what was preferred
    lambda_: Rate = 0.5
    # weight of -E[log pi(a|s)] of all segments beside the preference loss: keeps the policy near the data
    cloning_weight: NonNegative = 0.0
    # gamma inside a segment
    discount: Rate = 1.0
    # updates of behaviour cloning before (authors: two fifths of all)
    bc_steps: Natural = 10_000
    # log-likelihoods relative to the cloned policy
    reference: bool = False
    # widths of the policy's hidden layers
    hidden_sizes: Widths = (256, 256)
    # what the policy's outputs mean: "deterministic" has minus the squared error as its log-likelihood
    policy_head: PolicyHead = "deterministic"
    # Adam's step size
    learning_rate: NonNegative = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference and not self.bc_steps:
            raise ConfigError("reference = true needs bc_steps above 0: the reference is the policy cloned by then")


class CPL(PreferenceAgent):
    """Contrastive preference learning for S seeds; arguments as for `Agent`. A batch is a `PreferenceBatch`."""

    config_class = CPLConfig
    action_kinds = ACTION_KINDS
    config: CPLConfig

    def _build(self) -> None:
        config = self.config
        self.actor = self._build_policy(self._likelihood_actor(config.hidden_sizes), config.learning_rate)
        if config.reference:
            self.policy_target = cast(Any, target_copy(self.actor))
            self._register({"policy_target": self.policy_target})

    # The terms of the objective

    def log_likelihoods(self, segments: Batch) -> Tensor:
        """log pi(a_t|s_t) of raw segments, `[S, B, 2, H]`; minus the reference's where there is one."""
        steps = self.normalize_segments(segments)
        found: Tensor = self.actor.log_prob(steps.observations, steps.actions)
        if self.config.reference:
            with torch.no_grad():
                known = self.policy_target.log_prob(steps.observations, steps.actions)
            cloned = (self.step >= self.config.bc_steps).unsqueeze(-1)
            found = found - torch.where(cloned, known, 0.0)
        return found.view(segments.rewards.shape)

    def preference_loss(self, log_likelihoods: Tensor, label_mass: Tensor) -> Tensor:
        """L(pi), `[S]`."""
        first, second = log_likelihoods.unbind(2)
        config = self.config
        pairs: Tensor = cpl_loss(
            first, second, alpha=config.alpha, lam=config.lambda_, discount=config.discount, label_mass=label_mass
        )
        return pairs.mean(1)

    def start_anew(self) -> None:
        """At the end of cloning: forget the optimiser's moments, and keep the policy as the reference."""
        at_end = self.step == self.config.bc_steps
        for tensor in self.policy_optimizer.named_state().values():
            keep = (~at_end).to(tensor.dtype)
            tensor.mul_(keep.amin() if tensor.ndim == 0 else keep.view(-1, *[1] * (tensor.ndim - 1)))
        if self.config.reference:
            for old, new in zip(self.policy_target.parameters(), self.actor.parameters(), strict=True):
                old.copy_(torch.where(at_end.view(-1, *[1] * (new.ndim - 1)), new, old))

    # One update

    def update(self, batch: PreferenceBatch) -> dict[str, Tensor]:  # type: ignore[override]
        """One step of cloning or of the preference loss, as the number of updates so far says."""
        label_mass = batch.label_mass.to(self.dtype)
        with torch.no_grad():
            if self.config.bc_steps:
                self.start_anew()
        log_likelihoods = self.log_likelihoods(batch.segments)
        preference = self.preference_loss(log_likelihoods, label_mass)
        cloning = -log_likelihoods.mean((1, 2, 3))
        cloning_now = self.step < self.config.bc_steps
        loss = preference if self.config.cloning_weight == 0.0 else preference + self.config.cloning_weight * cloning
        gradient_norm = self.policy_optimizer.minimize(torch.where(cloning_now, cloning, loss))
        self.step += 1
        margin = log_likelihoods.detach().sum(-1).diff(dim=-1).squeeze(-1)
        return {
            "policy/loss": preference.detach(),
            "policy/cloning_loss": cloning.detach(),
            "policy/grad_norm": gradient_norm,
            "preference/accuracy": self.preference_accuracy(margin, label_mass),
            "preference/margin": margin.mean(1),
        }
