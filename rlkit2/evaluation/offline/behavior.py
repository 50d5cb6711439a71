"""How likely the data's actions were: under the policies, and under a clone of whatever collected them."""

from __future__ import annotations

import torch
from torch import Tensor

from rlkit2.agents import make_agent
from rlkit2.agents.bc import BCConfig
from rlkit2.data.dataset import TransitionDataset
from rlkit2.errors import ConfigError
from rlkit2.evaluation.offline.options import OfflineOptions
from rlkit2.evaluation.offline.problem import Problem, chunks
from rlkit2.nn import Normalizer, Policy


def no_density(problem: Problem) -> list[str | None]:
    """Per policy: why it has no density at the data's actions, or None."""
    reasons: list[str | None] = []
    for policy in problem.policies:
        sampled = policy.actor.head in ("gaussian", "squashed_gaussian") and not problem.deterministic
        reason = None
        if policy.actor.head == "one_step":
            reason = (
                "importance weights need action probabilities, which a policy that is a function of noise does not have"
            )
        elif not problem.discrete and not sampled:
            reason = (
                "importance weights need action probabilities, which a deterministic policy with continuous actions does not have; "
                "judge its sampled actions (deterministic=False, --stochastic)"
            )
        reasons += [reason] * len(policy.seeds)
    return reasons


@torch.no_grad()
def policy_log_probs(problem: Problem) -> Tensor:
    """log pi(a_t | s_t) of the data's actions, `[P, N]`, densities per unit of the raw actions; NaN for a policy without any."""
    if problem.discrete:
        index = problem.actions.expand(problem.num_policies, -1).unsqueeze(-1)
        return problem.here.gather(-1, index).squeeze(-1).log()
    missing = no_density(problem)
    found, first = [], 0
    for policy in problem.policies:
        seeds = len(policy.seeds)
        if missing[first] is None:
            found.append(_log_densities(policy, problem.dataset))
        else:
            found.append(torch.full((seeds, len(problem.rewards)), torch.nan))
        first += seeds
    return torch.cat(found)


def _log_densities(policy: Policy, dataset: TransitionDataset) -> Tensor:
    parameter = next(policy.actor.parameters())
    parts = []
    for rows in chunks(len(dataset)):
        shape = (len(policy.seeds), len(rows), -1)
        observations = dataset.observations[rows].to(parameter.dtype).expand(shape)
        actions = dataset.actions[rows]
        actions = actions.to(parameter.dtype) if actions.is_floating_point() else actions
        inputs = policy.normalizer.actions(actions.expand(shape if actions.ndim == 2 else shape[:2]))
        found = policy.actor.log_prob(policy.normalizer.observations(observations), inputs)
        parts.append(found - _log_scale(policy.normalizer))
    return torch.cat(parts, 1).float()


def _log_scale(normalizer: Normalizer) -> Tensor | float:
    """log of the raw units that one unit of the actor's actions stands for, summed over dimensions, `[S, 1]`."""
    return 0.0 if normalizer.action_scale is None else normalizer.action_scale.log().sum(-1)


def cloned_log_probs(problem: Problem, options: OfflineOptions) -> Tensor:
    """log of a cloned behaviour at the data's actions, `[N]`: maximum likelihood with the options' networks (Hanna, Niekum, Stone, "Importance
    Sampling Policy Evaluation with an Estimated Behavior Policy", ICML 2019: an estimated behaviour often weighs better than the true one).
    """
    dataset = problem.dataset
    config = BCConfig(hidden_sizes=options.hidden_sizes, learning_rate=options.learning_rate)
    agent = make_agent(config, dataset.spec, seeds=[options.seed], normalizer=problem.normalizer)
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.steps):
        agent.update(dataset.sample(options.batch_size, generator=generator))
    with torch.no_grad():
        return _log_densities(agent.policy, dataset)[0]


def checked_log_probs(values: Tensor, problem: Problem) -> Tensor:
    """Given log-probabilities of the behaviour, float32 `[N]`; `ConfigError` for another shape or anything not finite."""
    values = values.detach().float().cpu()
    if values.shape != (len(problem.rewards),) or not bool(values.isfinite().all()):
        raise ConfigError(
            f"behavior_log_probs must be {len(problem.rewards)} finite numbers, one per transition, not shape {list(values.shape)}"
        )
    return values
