"""All estimators on one dataset: what they share is computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from rlkit2.agents import Agent
from rlkit2.data.dataset import TransitionDataset
from rlkit2.errors import ConfigError
from rlkit2.evaluation.offline.behavior import checked_log_probs, cloned_log_probs, policy_log_probs
from rlkit2.evaluation.offline.dice import OccupancyRatios, fit_ratios
from rlkit2.evaluation.offline.doubly_robust import doubly_robust
from rlkit2.evaluation.offline.estimate import Replicates, estimates
from rlkit2.evaluation.offline.fqe import FittedQ, fit_q, possible_returns, returns_to_go
from rlkit2.evaluation.offline.importance import Ratios, episode_ratios, importance_sampling
from rlkit2.evaluation.offline.options import OfflineOptions
from rlkit2.evaluation.offline.own_value import own_values
from rlkit2.evaluation.offline.problem import Problem, make_problem
from rlkit2.evaluation.offline.result import OfflineEvaluation
from rlkit2.evaluation.offline.support import outside_share
from rlkit2.nn import Policy

METHODS = ("fqe", "dice", "is", "dr", "own")
FAR = (
    0.5  # share of states with actions outside the data beyond which a model of the data is asked about something else
)

SLACK = 0.02  # of the range of possible returns

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Candidate:
    """A policy of S seeds to judge, and the agent it belongs to where there is one.

    `reward_scale`: factor on the rewards the agent was trained with, None where they were transformed otherwise.
    """

    label: str
    policy: Policy
    agent: Agent | None = None
    reward_scale: float | None = 1.0

    @property
    def labels(self) -> list[str]:
        """One per seed."""
        seeds = self.policy.seeds
        return [self.label] if len(seeds) == 1 else [f"{self.label}, seed {seed}" for seed in seeds]


def judge(
    candidates: Sequence[Candidate],
    dataset: TransitionDataset,
    *,
    methods: Sequence[str] = ("fqe", "dice"),
    discount: float = 0.99,
    deterministic: bool = True,
    behavior_log_probs: ArrayLike | Tensor | None = None,
    initial_observations: ArrayLike | Tensor | None = None,
    options: OfflineOptions | None = None,
    progress: Progress | None = None,
    notes: Sequence[str] = (),
) -> OfflineEvaluation:
    """Estimate the discounted return of every seed of every candidate, all stacked along one axis.

    Arguments and errors as for `rlkit2.offline_evaluate`; `notes` go in front of the result's own.
    """
    options = OfflineOptions() if options is None else options
    dataset.spec.refuse_images("an estimate without an environment")
    for method in methods:
        if method not in METHODS:
            raise ConfigError(f"unknown method {method!r}; choose from: {', '.join(METHODS)}")
    if not candidates or not methods:
        raise ConfigError("name at least one policy and one method")
    for candidate in candidates:
        _check_fit(candidate, dataset)
    problem = make_problem(
        [candidate.policy for candidate in candidates],
        dataset,
        discount,
        deterministic=deterministic,
        initial_observations=initial_observations,
        options=options,
    )
    shared = _Shared(problem, options, behavior_log_probs, progress)
    resamples = problem.resamples(options.resamples, options.seed)
    outside = outside_share(problem, options.neighbors, options.seed)
    far = [
        [
            f"{100 * share:.0f} % of the policy's actions are unlike any taken at such states: the estimate is an extrapolation"
        ]
        if share > FAR
        else []
        for share in outside
    ]
    raw_initial = (
        dataset.observations[problem.starts[:-1]]
        if initial_observations is None
        else torch.as_tensor(initial_observations)
    )
    found: dict[str, Replicates] = {}
    for method in methods:
        if method == "fqe":
            found[method] = shared.fitted.estimate()
        elif method == "dice":
            found[method] = shared.occupancy.estimate()
        elif method == "is":
            tails = (
                shared.fitted.next_values
                if bool(problem.cut.any())
                else torch.zeros(problem.num_policies, len(dataset))
            )
            found[method] = importance_sampling(shared.ratios, tails, resamples)
        elif method == "dr":
            found[method] = doubly_robust(shared.fitted, shared.ratios, resamples)
        else:
            found[method] = own_values(
                [candidate.agent for candidate in candidates],
                [len(candidate.policy.seeds) for candidate in candidates],
                [candidate.reward_scale for candidate in candidates],
                raw_initial.float(),
                discount,
                deterministic,
                resamples,
            )
    found = {method: _within(possible_returns(problem), own) for method, own in found.items()}
    labels = tuple(label for candidate in candidates for label in candidate.labels)
    units = {"own": len(problem.initial_observations)}
    returns = returns_to_go(problem)[problem.starts[:-1]]
    return OfflineEvaluation(
        labels=labels,
        estimates={
            method: tuple(
                estimates(
                    method,
                    own,
                    units.get(method, problem.num_episodes),
                    options.confidence,
                    far if method in ("fqe", "dice") else None,
                )
            )
            for method, own in found.items()
        },
        discount=discount,
        deterministic=deterministic,
        dataset=dataset.spec.id,
        episodes=problem.num_episodes,
        transitions=len(dataset),
        data_return=float(returns.mean()),
        outside=tuple(outside.tolist()),
        effective_episodes=tuple(shared.made["ratios"].effective.tolist()) if "ratios" in shared.made else None,
        effective_transitions=tuple(shared.made["occupancy"].effective.tolist())
        if "occupancy" in shared.made
        else None,
        notes=(*notes, *_notes(problem, shared, options)),
    )


class _Shared:
    """What several estimators need, made when first asked for."""

    def __init__(self, problem: Problem, options: OfflineOptions, known: Any, progress: Progress | None) -> None:
        self.problem, self.options, self.known, self.progress = problem, options, known, progress
        self.made: dict[str, Any] = {}

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def _shown(self, label: str) -> Callable[[int, int], None] | None:
        shown = self.progress
        return None if shown is None else lambda done, total: shown(label, done, total)

    @property
    def fitted(self) -> FittedQ:
        return self._once("fitted", lambda: fit_q(self.problem, self.options, self._shown("fitted Q")))  # type: ignore[no-any-return]

    @property
    def occupancy(self) -> OccupancyRatios:
        return self._once("occupancy", lambda: fit_ratios(self.problem, self.options, self._shown("occupancy ratios")))  # type: ignore[no-any-return]

    @property
    def ratios(self) -> Ratios:
        return self._once("ratios", self._ratios)  # type: ignore[no-any-return]

    def _ratios(self) -> Ratios:
        policies = policy_log_probs(self.problem)
        if bool(policies.isnan().all()):
            behavior = torch.zeros(len(self.problem.rewards))
        elif self.known is None:
            behavior = cloned_log_probs(self.problem, self.options)
        else:
            behavior = checked_log_probs(torch.as_tensor(self.known), self.problem)
        return episode_ratios(self.problem, policies, behavior)


def _within(possible: tuple[float, float], found: Replicates) -> Replicates:
    """Refuse values that no sequence of the data's rewards adds up to."""
    low, high = possible
    slack = SLACK * (high - low)
    wrong = (found.values < low - slack) | (found.values > high + slack)
    reasons = [
        [*own, f"{value:.4g} lies beyond every possible return, {low:.4g} to {high:.4g}"] if bad else own
        for own, bad, value in zip(found.reasons, wrong.tolist(), found.values.tolist(), strict=True)
    ]
    return Replicates(torch.where(wrong, torch.nan, found.values), found.resampled, reasons)


def _check_fit(candidate: Candidate, dataset: TransitionDataset) -> None:
    settings, spec = candidate.policy.actor.settings, dataset.spec
    if not spec.discrete and not dataset.actions.is_floating_point():
        raise ConfigError(
            f"{spec.id} has actions of several choices or of whole numbers, which no estimator here takes; play them: rlkit2 evaluate RUN"
        )
    sizes = settings["observation_size"], settings["action_size"], settings["head"] in ("categorical", "greedy")
    wanted = spec.observation_size, spec.action_size, spec.discrete
    if sizes != wanted:

        def said(size: tuple[Any, ...]) -> str:
            return f"{size[0]} observation columns and {size[1]} " + (
                "discrete actions" if size[2] else "action columns"
            )

        raise ConfigError(f"{candidate.label} takes {said(sizes)}, the dataset {spec.id} has {said(wanted)}")
    for parameter in candidate.policy.actor.parameters():  # the largest of NaNs is an action like any other
        broken = (~parameter.isfinite()).flatten(1).any(1)
        if bool(broken.any()):
            seeds = [seed for seed, bad in zip(candidate.policy.seeds, broken.tolist(), strict=True) if bad]
            raise ConfigError(
                f"{candidate.label}: weights of seed {', '.join(map(str, seeds))} are not finite; leave these seeds out"
            )


def _notes(problem: Problem, shared: _Shared, options: OfflineOptions) -> list[str]:
    level = f"{100 * options.confidence:g} %"
    notes = [
        f"intervals: nominal {level} over {problem.num_episodes} episodes; they hold the chance in the episodes, not the bias of a model"
        + ("; with so few episodes they cover less" if problem.num_episodes < 30 else ""),
    ]
    if problem.own_starts:
        notes.append(
            "initial states: the first observations of the data's episodes; give others where the policy will start elsewhere"
        )
    if bool(problem.cut.any()):
        notes.append(f"{int(problem.cut.sum())} episodes were truncated: what follows is estimated, as in training")
    noise = shared.fitted.noise() if "fitted" in shared.made else None
    if noise is not None:
        low, middle, high = noise.deviation.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
        held = ", ".join(f"{100 * share:.0f} %" for share in noise.coverage.tolist())
        notes.append(
            f"noise of fitted Q's targets ({options.critic}): deviation {middle:.3g} at the median step, "
            f"{low:.3g} to {high:.3g} at nine tenths of them; its {100 * noise.level:.0f} % intervals hold {held} of the targets "
            "in episodes that a member has not seen"
        )
    if "ratios" in shared.made and shared.known is None:
        notes.append("behaviour probabilities: cloned from the data; give behavior_log_probs where they are known")
    return notes
