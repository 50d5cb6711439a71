"""The guards guard: each of these mistakes, put into an agent, must fail the test that stands against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import rlkit2.agents.iql as iql_module
import rlkit2.agents.td3bc as td3bc_module
import rlkit2.agents.uncertain_agent as uncertain_module
from rlkit2.agents.bc import BC
from rlkit2.agents.iql import IQL
from rlkit2.agents.td3bc import TD3BC
from rlkit2.data import Batch
from rlkit2.testing import (
    OBSERVATIONS,
    check_resumed_training_ends_the_same,
    check_seeds_learn_alone_as_beside_others,
    check_terminated_steps_ignore_what_follows,
    check_training_is_deterministic,
    check_truncated_steps_bootstrap,
    check_update_never_waits_for_the_device,
    check_values_bootstrap_from_the_next_observation,
)
from tests.agents.test_against_naive import (
    ACT,
    IQL_SETTINGS,
    OBS,
    SEEDS,
    TD3BC_SETTINGS,
    follow_iql,
    follow_td3bc,
)
from tests.agents.test_contract import problem

Patch = Callable[[pytest.MonkeyPatch], Any]
td_target, lerp_ = uncertain_module.td_target, iql_module.lerp_


def undamped(target: Any, online: Any, rate: float) -> None:
    lerp_(target, online, 1.0)


def bootstrap_always(rewards: Tensor, terminations: Tensor, next_value: Tensor, discount: float) -> Tensor:
    return td_target(rewards, torch.zeros_like(terminations), next_value, discount)


@torch.no_grad()
def mean_of_targets(agent: IQL, batch: Batch) -> Tensor:
    return agent.critic_target(batch.observations, batch.actions).mean(1)


@torch.no_grad()
def online_critics(agent: IQL, batch: Batch) -> Tensor:
    return agent.critic(batch.observations, batch.actions).amin(1)


def value_here(agent: IQL, batch: Batch) -> Tensor:
    return ORIGINAL_IQL_TARGETS(agent, replace(batch, next_observations=batch.observations))


def stopped_by_truncation(agent: Any, batch: Batch) -> Tensor:
    original = ORIGINAL_IQL_TARGETS if isinstance(agent, IQL) else ORIGINAL_TD3BC_TARGETS
    return original(agent, replace(batch, terminations=batch.terminations.maximum(batch.truncations.to(agent.dtype))))


def with_online_actor(agent: TD3BC, batch: Batch) -> Tensor:
    kept, agent.actor_target = agent.actor_target, agent.actor
    try:
        return ORIGINAL_TD3BC_TARGETS(agent, batch)
    finally:
        agent.actor_target = kept


ORIGINAL_IQL_TARGETS, ORIGINAL_TD3BC_TARGETS = IQL.critic_targets, TD3BC.critic_targets
ORIGINAL_WEIGHT, ORIGINAL_UPDATE, ORIGINAL_LOAD = IQL.policy_weight, BC.update, TD3BC.load_state_dict
expectile_slope = iql_module.expectile_slope

IQL_MUTANTS: dict[str, Patch] = {
    "V regresses on the mean of the critics": lambda m: m.setattr(IQL, "value_target", mean_of_targets),
    "V regresses on the online critics": lambda m: m.setattr(IQL, "value_target", online_critics),
    "terminated steps bootstrap": lambda m: m.setattr(uncertain_module, "td_target", bootstrap_always),
    "truncated steps do not bootstrap": lambda m: m.setattr(IQL, "critic_targets", stopped_by_truncation),
    "Q bootstraps from V(s)": lambda m: m.setattr(IQL, "critic_targets", value_here),
    "the sign of the advantage is flipped": lambda m: m.setattr(
        IQL, "policy_weight", lambda agent, advantage: ORIGINAL_WEIGHT(agent, -advantage)
    ),
    "weights are not clamped": lambda m: m.setattr(
        IQL, "policy_weight", lambda agent, advantage: (agent.config.inverse_temperature * advantage).exp()
    ),
    "the expectile is reversed": lambda m: m.setattr(
        iql_module, "expectile_slope", lambda difference, tau: expectile_slope(difference, 1.0 - tau)
    ),
    "the derivative of V's loss lacks its factor": lambda m: m.setattr(
        iql_module, "expectile_slope", lambda difference, tau: 0.5 * expectile_slope(difference, tau)
    ),
    "targets follow at once": lambda m: m.setattr(iql_module, "lerp_", undamped),
}


def without(**fields: Any) -> Patch:
    """A setting that the agent ignores: it has this one instead."""
    return lambda m: [m.setitem(OVERRIDES, name, value) for name, value in fields.items()]


OVERRIDES: dict[str, Any] = {}
TD3BC_MUTANTS: dict[str, Patch] = {
    "terminated steps bootstrap": lambda m: m.setattr(uncertain_module, "td_target", bootstrap_always),
    "truncated steps do not bootstrap": lambda m: m.setattr(TD3BC, "critic_targets", stopped_by_truncation),
    "the target action has no noise": without(target_noise=0.0),
    "the noise is not clipped": without(target_noise_clip=1e6),
    "the policy is not delayed": lambda m: m.setattr(
        TD3BC, "phases", property(lambda agent: 1, lambda agent, number: None)
    ),
    "targets follow at once": lambda m: m.setattr(td3bc_module, "lerp_", undamped),
    "the target policy is the online one": lambda m: m.setattr(TD3BC, "critic_targets", with_online_actor),
    "noise from the global generator": lambda m: m.setattr(
        td3bc_module, "normal", lambda shape, *_, dtype, **__: torch.randn(shape, dtype=dtype)
    ),
}


@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "discrete"])
@pytest.mark.parametrize("mutant", IQL_MUTANTS)
def test_iql(mutant: str, discrete: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    IQL_MUTANTS[mutant](monkeypatch)
    agent = IQL(IQL_SETTINGS["stress"], OBS, ACT, seeds=SEEDS, dtype=torch.float64, discrete=discrete)
    with pytest.raises(AssertionError):
        follow_iql(agent)


@pytest.mark.parametrize("fields", [{"policy_cosine_steps": None}, {"inverse_temperature": 9.9}, {"discount": 0.91}])
def test_iql_settings(fields: dict[str, Any]) -> None:
    """An agent with one other setting than its naive twin."""
    settings = replace(IQL_SETTINGS["stress"], **fields)
    agent = IQL(settings, OBS, ACT, seeds=SEEDS, dtype=torch.float64)
    agent_config, agent.config = agent.config, IQL_SETTINGS["stress"]
    with pytest.raises(AssertionError):
        follow_iql(Disguised(agent, agent_config))  # type: ignore[arg-type]


class Disguised:
    """An agent that shows one config and acts by another."""

    def __init__(self, agent: Any, acts_by: Any) -> None:
        self.agent, self.config, self.acts_by, self.discrete = agent, agent.config, acts_by, agent.discrete

    def state_dict(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.agent.state_dict()
        return state

    def update(self, batch: Batch) -> dict[str, Tensor]:
        self.agent.config = self.acts_by
        metrics: dict[str, Tensor] = self.agent.update(batch)
        return metrics


@pytest.mark.parametrize("mutant", TD3BC_MUTANTS)
def test_td3bc(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    TD3BC_MUTANTS[mutant](monkeypatch)
    agent = TD3BC(TD3BC_SETTINGS["stress"], OBS, ACT, seeds=SEEDS, dtype=torch.float64)
    with pytest.raises(AssertionError):
        follow_td3bc(Disguised(agent, replace(agent.config, **OVERRIDES)))  # type: ignore[arg-type]


def slow_update(agent: BC, batch: Batch) -> dict[str, Tensor]:
    metrics = ORIGINAL_UPDATE(agent, batch)
    metrics["policy/loss"] = torch.full_like(metrics["policy/loss"], metrics["policy/loss"].sum().item())
    return metrics


def mixing_update(agent: BC, batch: Batch) -> dict[str, Tensor]:
    """The first seed's batch serves all."""
    return ORIGINAL_UPDATE(agent, Batch(**{k: v[:1].expand_as(v) for k, v in vars(batch).items()}))


def global_noise(agent: BC, batch: Batch) -> dict[str, Tensor]:
    return ORIGINAL_UPDATE(agent, replace(batch, observations=batch.observations + 1e-3 * torch.randn(OBSERVATIONS)))


def forgetful_load(agent: TD3BC, state: dict[str, Tensor]) -> None:
    ORIGINAL_LOAD(agent, state)
    agent.phase = 0


CONTRACT_MUTANTS: dict[str, tuple[Patch, Callable[[], None]]] = {
    "the delay's phase is forgotten by a checkpoint": (
        lambda m: m.setattr(TD3BC, "load_state_dict", forgetful_load),
        lambda: check_resumed_training_ends_the_same(problem("td3bc", "continuous")),
    ),
    "a metric is read on the host": (
        lambda m: m.setattr(BC, "update", slow_update),
        lambda: check_update_never_waits_for_the_device(problem("bc", "continuous")),
    ),
    "seeds share a batch": (
        lambda m: m.setattr(BC, "update", mixing_update),
        lambda: check_seeds_learn_alone_as_beside_others(problem("bc", "continuous")),
    ),
    "noise from the global generator": (
        lambda m: m.setattr(BC, "update", global_noise),
        lambda: check_training_is_deterministic(problem("bc", "continuous")),
    ),
    "truncation counts as termination": (
        lambda m: m.setattr(IQL, "critic_targets", stopped_by_truncation),
        lambda: check_truncated_steps_bootstrap(problem("iql", "continuous")),
    ),
    "terminated steps bootstrap": (
        lambda m: m.setattr(uncertain_module, "td_target", bootstrap_always),
        lambda: check_terminated_steps_ignore_what_follows(problem("iql", "discrete")),
    ),
    "nothing bootstraps": (
        lambda m: m.setattr(uncertain_module, "td_target", lambda rewards, *_: rewards),
        lambda: check_values_bootstrap_from_the_next_observation(problem("iql", "continuous")),
    ),
}


@pytest.mark.parametrize("mutant", CONTRACT_MUTANTS)
def test_contract(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, guard = CONTRACT_MUTANTS[mutant]
    guard()  # passes as it is
    patch(monkeypatch)
    with pytest.raises(AssertionError):
        guard()
