"""Common mistakes in O-DICE: each must be noticed by the comparison with the released update."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlkit2.agents.odice import ODICE, Residuals
from rlkit2.data import Batch
from rlkit2.nn import lerp_, unflatten
from tests.agents.test_odice_reference import follow
from tests.reference import ReferenceUpdates, odice_files


def with_residuals(agent: ODICE, found: Residuals, both: list[Tensor]) -> Residuals:
    """`found` with other residuals."""
    stacked = torch.stack(both)
    return replace(found, both=stacked, slopes=agent.optimal_weight(stacked))


class MeanTarget(ODICE):
    """Targets take the mean of the heads instead of their minimum."""

    @torch.no_grad()
    def target_value(self, observations: Tensor) -> Tensor:
        return self.value_target(observations).mean(1, keepdim=True)


class OnlineMinimum(ODICE):
    """The online value is the smaller head instead of both."""

    def residuals(self, batch: Batch) -> Residuals:
        found = super().residuals(batch)
        excess = found.value - found.value.amin(1, keepdim=True)
        return with_residuals(self, found, [found.both[0] + excess, *found.both[1:]])

    def cotangents(self, residuals: Residuals) -> Any:
        mean, at_value, at_next = super().cotangents(residuals)
        smaller = residuals.value == residuals.value.amin(1, keepdim=True)
        return mean, at_value * smaller * residuals.value.shape[1], at_next


class ProjectedMutant(ODICE):
    """The orthogonal gradient from g_f, g_b, g_0 by another formula."""

    def total(self, forward: Tensor, backward: Tensor, mean: Tensor) -> Tensor:
        raise NotImplementedError

    def orthogonal(self, g_f: Tensor, g_b: Tensor, g_1: Tensor, mean_term: float) -> tuple[Tensor, dict[str, Tensor]]:
        _, metrics = super().orthogonal(g_f.clone(), g_b, g_1, mean_term)
        return self.total(g_f, g_b, mean_term * g_1), metrics


def off(vector: Tensor, direction: Tensor) -> Tensor:
    """`vector` without its part along `direction`; `[S, P]`."""
    square = (direction * direction).sum(1, keepdim=True).clamp(min=1e-10)
    return vector - (vector * direction).sum(1, keepdim=True) / square * direction


class RightFormula(ProjectedMutant):
    """No mistake: what the mutants below deviate from."""

    def total(self, forward: Tensor, backward: Tensor, mean: Tensor) -> Tensor:
        return mean + forward + off(backward, forward)


class ProjectAgainstWhole(ProjectedMutant):
    """Projection against the gradient that includes (1 - lambda) V."""

    def total(self, forward: Tensor, backward: Tensor, mean: Tensor) -> Tensor:
        return mean + forward + off(backward, mean + forward)


class NoProjection(ProjectedMutant):
    """The backward gradient is added as it is."""

    def total(self, forward: Tensor, backward: Tensor, mean: Tensor) -> Tensor:
        return mean + forward + backward


class ProjectPerTensor(ProjectedMutant):
    """One coefficient per parameter tensor (and head)."""

    def total(self, forward: Tensor, backward: Tensor, mean: Tensor) -> Tensor:
        result = mean + forward + backward
        network = self.value_network
        parts = zip(unflatten(network, result), unflatten(network, forward), unflatten(network, backward), strict=True)
        for part, f, b in parts:
            part -= (f * b).sum((1, 2, 3), keepdim=True) / (f * f).sum((1, 2, 3), keepdim=True).clamp(min=1e-10) * f
        return result


class ProjectPerHead(ProjectedMutant):
    """One coefficient per head."""

    def total(self, forward: Tensor, backward: Tensor, mean: Tensor) -> Tensor:
        heads = self.config.num_values

        def split(x: Tensor) -> Tensor:
            return x.view(x.shape[0] * heads, -1)

        return mean + forward + off(split(backward), split(forward)).view_as(backward)


class ProjectForwardOffBackward(ProjectedMutant):
    """The wrong one of the two is projected."""

    def total(self, forward: Tensor, backward: Tensor, mean: Tensor) -> Tensor:
        return mean + off(forward, backward) + backward


class OnlineBackwardResidual(ODICE):
    """R_b bootstraps from the online V(s) instead of its target."""

    def residuals(self, batch: Batch) -> Residuals:
        found = super().residuals(batch)
        assert found.backward is not None
        backward = found.backward + self.target_value(batch.observations) - found.value
        return with_residuals(self, found, [found.forward, backward])


class SmallerHeadWeight(ODICE):
    """The policy weight comes from the smaller head (the larger residual)."""

    def weights(self, residual: Tensor, episodes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().weights(residual.amax(1, keepdim=True).expand_as(residual), episodes)


class WeightAfterStep(ODICE):
    """The policy weight comes from V after its update."""

    def weights(self, residual: Tensor, episodes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.batch is not None:
            residual = self.residuals(self.batch).forward
        return super().weights(residual, episodes)

    batch: Batch | None = None

    def update(self, batch: Batch) -> dict[str, Tensor]:
        self.batch = self.normalize(batch)
        metrics = super().update(batch)
        self.batch = None
        return metrics


class PolyakBeforeStep(ODICE):
    """The target follows V as it was before its step."""

    def update(self, batch: Batch) -> dict[str, Tensor]:
        before = self.value_target.flat.detach().clone()
        lerp_(self.value_target, self.value_network, self.config.target_update_rate)
        moved = self.value_target.flat.detach().clone()
        with torch.no_grad():
            self.value_target.flat.copy_(before)
        metrics = super().update(batch)
        with torch.no_grad():
            self.value_target.flat.copy_(moved)
        return metrics


class DecoupledDecay(ODICE):
    """AdamW instead of Adam with L2."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(replace(config, policy_weight_decay=0.0), *args, **kwargs)
        self.decay = config.policy_weight_decay * config.policy_learning_rate

    def update(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            for parameter in self.actor.parameters():
                parameter.mul_(1.0 - self.decay)
        return super().update(batch)


class SummedHeads(ODICE):
    """The loss sums over heads instead of averaging."""

    def cotangents(self, residuals: Residuals) -> Any:
        heads = residuals.value.shape[1]
        mean, at_value, at_next = super().cotangents(residuals)
        return mean * heads, at_value * heads, at_next * heads


MUTANTS: list[tuple[type[ODICE], dict[str, Any]]] = [
    (MeanTarget, {}),
    (OnlineMinimum, {}),
    (ProjectAgainstWhole, {}),
    (NoProjection, {}),
    (ProjectPerTensor, {}),
    (ProjectPerHead, {}),
    (ProjectForwardOffBackward, {}),
    (OnlineBackwardResidual, {}),
    (ODICE, {"weight": "conjugate_grad"}),
    (SmallerHeadWeight, {}),
    (WeightAfterStep, {}),
    (PolyakBeforeStep, {}),
    (DecoupledDecay, {}),
    (SummedHeads, {}),
]
# Twin V, orthogonal rule, Pearson: the files that tell every mistake apart.
TWINS = [name for name in odice_files() if name.startswith("odice_orthogonal_pearson_twin_s") and "32" not in name]


def agent_of(file: ReferenceUpdates, kind: type[ODICE], overrides: dict[str, Any]) -> ODICE:
    return file.agent(1, agent_type=kind, **overrides)


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize(
    ("mutant", "overrides"), MUTANTS, ids=lambda x: x.__name__ if isinstance(x, type) else "_".join(x.values())
)
def test_mistakes_are_noticed(mutant: type[ODICE], overrides: dict[str, Any], name: str) -> None:
    file = ReferenceUpdates(name)
    with pytest.raises(AssertionError):
        follow(file, agent_of(file, mutant, overrides))


@pytest.mark.parametrize("name", TWINS)
def test_the_mutants_scaffold_is_sound(name: str) -> None:
    """The formula that the projection mutants vary passes when it is not varied."""
    file = ReferenceUpdates(name)
    follow(file, agent_of(file, RightFormula, {}))
