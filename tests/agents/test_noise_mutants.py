"""The guards of the noise model guard: each of these mistakes must fail the test that stands against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import rlkit2.agents.error_model as error_model
import rlkit2.evaluation.calibration as diagnostics
import rlkit2.losses.ggd as losses
from rlkit2.agents.error_model import ErrorModel, Heads
from rlkit2.agents.sacn import SACN
from rlkit2.data import Batch
from rlkit2.testing import check_terminated_steps_ignore_what_follows
from tests.agents import test_uncertainty as agents
from tests.agents.test_contract import problem
from tests.evaluation import test_uncertainty as evaluation
from tests.losses import test_ggd as guards

Patch = Callable[[pytest.MonkeyPatch], Any]
ggd_nll, shape_weights = losses.ggd_nll, losses.shape_weights
member_loss, regression = ErrorModel.member_loss, SACN.regression


def climbing_shape(values: Tensor, targets: Tensor, *, shape: Tensor, **options: Any) -> Tensor:
    """The same loss with the gradient of the shape turned round."""
    result: Tensor = ggd_nll(values, targets, shape=2.0 * shape.detach() - shape, **options)
    return result


def deaf_shape(values: Tensor, targets: Tensor, *, shape: Tensor, **options: Any) -> Tensor:
    """The normaliser's part of the shape's gradient is lost."""
    constant = torch.lgamma(1.0 + shape.reciprocal())
    each: Tensor = (
        ggd_nll(values, targets, shape=shape, **{**options, "reduction": "none"}) - constant + constant.detach()
    )
    return (
        each if options.get("reduction") == "none" else each.sum() if options.get("reduction") == "sum" else each.mean()
    )


def live_weights(variance: Tensor, xi: Tensor | float = 0.0) -> Tensor:
    """Weights that the gradient flows through."""
    weights = 1.0 / (variance + torch.as_tensor(xi, dtype=variance.dtype).unsqueeze(-1)).clamp(min=1e-300)
    return weights / weights.mean(-1, keepdim=True)


def over_the_batch(shape: Tensor, axis: int = -2) -> Tensor:
    """Weights that sum to one over the samples instead of the members."""
    return shape / shape.sum(-1, keepdim=True)


def moving_values(model: ErrorModel, heads: Heads, targets: Tensor) -> Tensor:
    """The likelihood trains Q as well, whatever the coupling."""
    model_of = ErrorModel.__new__(ErrorModel)
    model_of.__dict__ = {**model.__dict__, "options": replace(model.options, coupling="ggd")}
    return member_loss(model_of, heads, targets)


def mean_over_members(model: ErrorModel, heads: Heads, targets: Tensor) -> Tensor:
    """The loss becomes a mean over members and a sum over the batch."""
    member = member_loss(model, heads, targets)
    return member * (member.shape[2] / member.shape[1])


def spread_over_the_batch(q: Tensor) -> Tensor:
    """Ignorance as the deviation between states instead of members."""
    return q.std(2, keepdim=True).mean(1).expand_as(q[:, 0])


def bootstrap_always(agent: SACN, batch: Batch) -> Any:
    return regression(agent, replace(batch, terminations=torch.zeros_like(batch.terminations)))


MUTANTS: dict[str, tuple[Patch, Callable[[], None]]] = {
    "the shape climbs": (lambda m: m.setattr(guards, "ggd_nll", climbing_shape), guards.test_analytic_gradients),
    "the shape forgets its normaliser": (
        lambda m: m.setattr(guards, "ggd_nll", deaf_shape),
        guards.test_analytic_gradients,
    ),
    "batch weights are live": (
        lambda m: m.setattr(losses, "batch_inverse_variance", live_weights),
        lambda: guards.test_batch_weights.hypothesis.inner_test([1.0, 2.0, 5.0], 2.0, 0.5),  # type: ignore[attr-defined]
    ),
    "member weights over the batch": (
        lambda m: m.setattr(guards, "shape_weights", over_the_batch),
        lambda: guards.test_member_weights_sum_to_one.hypothesis.inner_test(4, 0),  # type: ignore[attr-defined]
    ),
    "member weights over the batch, in the model": (
        lambda m: m.setattr(error_model, "shape_weights", over_the_batch),
        lambda: agents.test_released_options_agree_with_the_released_code("a05"),
    ),
    "a mean over members, not the batch": (
        lambda m: m.setattr(ErrorModel, "member_loss", mean_over_members),
        lambda: agents.test_released_options_agree_with_the_released_code("a05"),
    ),
    "ignorance between states": (
        lambda m: m.setattr(diagnostics, "_spread", spread_over_the_batch),
        evaluation.test_a_true_law_is_found_true,
    ),
    "the noise moves the values": (
        lambda m: m.setattr(ErrorModel, "member_loss", moving_values),
        agents.test_decoupled_values_are_those_of_least_squares,
    ),
    "what moves the values is noise": (
        lambda m: m.setattr(Heads, "location", property(lambda heads: heads.q)),
        lambda: agents.test_what_moves_the_values_does_not_pass_for_noise("cql", {}),
    ),
    "terminated steps bootstrap": (
        lambda m: m.setattr(SACN, "regression", bootstrap_always),
        lambda: check_terminated_steps_ignore_what_follows(problem("sacn", "continuous")),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mistakes_are_noticed(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, guard = MUTANTS[mutant]
    guard()  # passes as it is
    patch(monkeypatch)
    with pytest.raises(AssertionError):
        guard()
