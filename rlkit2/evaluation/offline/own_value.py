"""What an agent says itself: its Q of its own action, at the initial states.

Not an evaluation of the policy: a Q that was pushed up by its own maximum says too much, one that is kept conservative too little, and its
interval knows the start alone. Between agents it says who is the optimist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlkit2.agents import Agent
from rlkit2.agents.p_iql import PIQL
from rlkit2.agents.preference_agent import PreferenceAgent
from rlkit2.evaluation.offline.estimate import Replicates
from rlkit2.evaluation.offline.problem import Resamples

CAVEAT = "the agent's own opinion: its interval leaves the errors of its Q out"


def own_values(
    agents: Sequence[Agent | None],
    sizes: Sequence[int],
    scales: Sequence[float | None],
    initial: Tensor,
    discount: float,
    deterministic: bool,
    resamples: Resamples,
) -> Replicates:
    """Mean of Q(s0, pi(s0)) of every seed.

    Args:
        agents: one per policy, None where only the policy is there.
        sizes: seeds of each policy.
        scales: factor that each agent's rewards had in training; None where they were more than scaled.
        initial: raw initial observations `[I, obs]`.
        discount: what the estimate is for; an agent of another discount is refused.
    """
    values, reasons = [], []
    for agent, seeds, scale in zip(agents, sizes, scales, strict=True):
        missing = _unusable(agent, scale, discount)
        if missing is not None or agent is None or scale is None:
            values.append(torch.full((seeds, len(initial)), torch.nan))
        else:
            observations = initial.expand(seeds, *initial.shape)
            policy: Any = agent
            actions = agent.policy(
                observations, deterministic=deterministic, generator=torch.Generator().manual_seed(0)
            )
            values.append(policy.q(observations, actions).float() / scale)
        reasons += [[missing or CAVEAT] for _ in range(seeds)]
    found = torch.cat(values)
    resampled = (resamples.initial @ found.T / resamples.initial.sum(1, keepdim=True)).T
    return Replicates(found.mean(1), resampled, reasons)


def _unusable(agent: Agent | None, scale: float | None, discount: float) -> str | None:
    if agent is None:
        return "a policy alone has no value; give the run"
    name = type(agent).__name__
    if isinstance(agent, PreferenceAgent | PIQL):
        return f"{name}'s values are in units of a learned reward"
    if not hasattr(agent, "q"):
        return f"{name} has no Q of its policy" + (
            " (V of a DICE agent is a multiplier, not a value)" if hasattr(agent, "value") else ""
        )
    if scale is None:
        return "the agent was trained on rewards that were transformed by more than a factor"
    if agent.config.discount != discount:
        return f"the agent's discount is {agent.config.discount}, not {discount}"
    return None
