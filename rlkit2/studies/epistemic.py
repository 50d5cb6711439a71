"""Is epistemic_sd as large as the error that the chance in the data makes in Q? Small problems with known truth, the same training on many datasets.

Every dataset is drawn anew from the same problem, and one agent with D seeds learns from D of them, a seed from its own. At points drawn like the
data,

    ratio     root mean epistemic_sd^2 over datasets, to the standard deviation of q_mean over datasets; its error by a jackknife over datasets
    coverage  share of (dataset, point) whose 90 % interval, `Uncertainty.interval(0.9)`, holds the true Q
    auroc     epistemic_sd of actions that no dataset holds, above that of actions which they do hold, where the data leave some out

Problems: "tabular", an MDP of 6 states and 3 actions with noisy rewards and random successors; "one-step", its rewards alone; "lqr", a line with
linear dynamics, quadratic cost and a linear behaviour policy, whose Q is a quadratic function. Truth: the fixed point of what the agent computes with
the model known, so Q of the optimal policy for dqn, of the behaviour's expectiles for iql, of the cloned policy for td3bc with alpha = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from rlkit2.agents import agent_class, make_config
from rlkit2.agents.error_model import CALIBRATED
from rlkit2.agents.uncertain_agent import UncertainAgent
from rlkit2.data.batch import RowBatch
from rlkit2.evaluation.calibration import auroc

Array = NDArray[np.float64]

STATES, ACTIONS, DISCOUNT = 6, 3, 0.9
POINTS = 200  # of the line, at which Q is compared


@dataclass(frozen=True)
class Problem:
    """How a dataset is drawn, and what is true.

    Attributes:
        draw: (rows, generator) -> observations, actions, rewards, next observations, terminations of that many transitions.
        points: observations `[P, obs]` and actions `[P, act]` or `[P]` at which Q is compared.
        truth: what an agent's Q should be there, `[P]`, by its name.
        missing: observations and actions like the data's, but for actions that the data leave out; None where they leave out none.
        effort: what a budget's updates are multiplied by.
    """

    draw: Callable[[int, torch.Generator], tuple[Tensor, ...]]
    points: tuple[Tensor, Tensor]
    truth: dict[str, Tensor]
    missing: tuple[Tensor, Tensor] | None = None
    discrete: bool = True
    effort: int = 1


def tabular(one_step: bool = False, leave_out: bool = False, seed: int = 0) -> Problem:
    """The MDP, or its rewards alone; `leave_out`: the data never take the last action in half of the states."""
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randn(STATES, ACTIONS, generator=generator)
    successors = torch.softmax(3.0 * torch.randn(STATES, ACTIONS, STATES, generator=generator), -1)
    behavior = torch.tensor([0.5, 0.3, 0.2])[torch.rand(STATES, ACTIONS, generator=generator).argsort(1)]
    if leave_out:
        behavior[: STATES // 2, -1] = 0.0
        behavior /= behavior.sum(1, keepdim=True)
    discount = 0.0 if one_step else DISCOUNT

    def draw(rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        states = torch.randint(STATES, (rows,), generator=generator)
        actions = torch.multinomial(behavior[states], 1, generator=generator)[:, 0]
        after = torch.multinomial(successors[states, actions], 1, generator=generator)[:, 0]
        rewards = reward[states, actions] + torch.randn(rows, generator=generator)
        ends = torch.full((rows,), one_step)
        return _one_hot(states), actions, rewards, _one_hot(after), ends

    taken = behavior > 0.0
    cells = torch.arange(STATES * ACTIONS)
    known, unknown = cells[taken.flatten()], cells[~taken.flatten()]

    def at(chosen: Tensor) -> tuple[Tensor, Tensor]:
        return _one_hot(chosen // ACTIONS), chosen % ACTIONS

    best, expectile = torch.zeros(STATES, ACTIONS), torch.zeros(STATES, ACTIONS)
    for _ in range(300):
        best = reward + discount * successors @ best.masked_fill(~taken, -torch.inf).amax(1)
        expectile = reward + discount * successors @ _expectile(expectile, behavior, 0.7)
    truth = {"dqn": best.flatten()[known], "iql": expectile.flatten()[known]}
    return Problem(draw, at(known), truth, at(unknown) if len(unknown) else None)


def _one_hot(states: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(states, STATES).float()


def _expectile(values: Tensor, weights: Tensor, level: float) -> Tensor:
    """The expectile of every row of `values [n, k]` under probabilities `weights`, `[n]`."""
    found = (weights * values).sum(1)
    for _ in range(100):
        slope = weights * torch.where(values > found.unsqueeze(1), level, 1.0 - level)
        found = (slope * values).sum(1) / slope.sum(1)
    return found


def line(seed: int = 0) -> Problem:
    """s' = .8 s + .3 a + .1 noise, r = -s^2 - .2 a^2 + .3 noise, a = -.4 s + .3 noise: data without actions 1 away from -.4 s."""
    generator = torch.Generator().manual_seed(seed)

    def act(states: Tensor, generator: torch.Generator) -> Tensor:
        return (-0.4 * states + 0.3 * torch.randn(states.shape, generator=generator)).clamp(-1.0, 1.0)

    def draw(rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        states = 2.0 * torch.rand(rows, 1, generator=generator) - 1.0
        actions = act(states, generator)
        after = 0.8 * states + 0.3 * actions + 0.1 * torch.randn(rows, 1, generator=generator)
        rewards = (-states.square() - 0.2 * actions.square())[:, 0] + 0.3 * torch.randn(rows, generator=generator)
        return states, actions, rewards, after, torch.zeros(rows, dtype=torch.bool)

    states = 2.0 * torch.rand(POINTS, 1, generator=generator) - 1.0
    actions = act(states, generator)
    gain = 0.8 - 0.3 * 0.4
    truth = {}
    for name, noise in (("iql", 0.09), ("td3bc", 0.0)):  # variance of the actions around -.4 s
        curve = -(1.0 + 0.2 * 0.16) / (1.0 - DISCOUNT * gain**2)  # V(s) = curve s^2 + level
        level = (-0.2 * noise + DISCOUNT * curve * (0.09 * noise + 0.01)) / (1.0 - DISCOUNT)
        after = 0.8 * states + 0.3 * actions
        value = curve * (after.square() + 0.01) + level
        truth[name] = (-states.square() - 0.2 * actions.square() + DISCOUNT * value)[:, 0]
    far = -0.4 * states + torch.where(torch.rand(POINTS, 1, generator=generator) < 0.5, -1.0, 1.0)
    return Problem(draw, (states, actions), truth, (states, far.clamp(-1.0, 1.0)), discrete=False, effort=2)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "one-step": lambda: tabular(one_step=True),
    "tabular": tabular,
    "tabular, actions left out": lambda: tabular(leave_out=True),
    "lqr": line,
}
AGENTS: dict[str, dict[str, Any]] = {
    "dqn": {},
    "cql": {},
    "iql": {},
    "td3bc": {"alpha": 0.0, "target_noise": 0.0},
}
METHODS: dict[str, dict[str, Any]] = {
    "as released": {"critic": "ggd"},
    "bootstrap alone": {"critic": "ggd", "bootstrap": "rows"},
    "CALIBRATED": CALIBRATED,
    "CALIBRATED, prior": {**CALIBRATED, "prior_scale": 1.0},
}
CELLS = (
    ("one-step", "dqn", 300),
    ("tabular", "dqn", 1000),
    ("tabular", "iql", 1000),
    ("tabular", "cql", 1000),
    ("tabular, actions left out", "iql", 1000),
    ("lqr", "iql", 1000),
    ("tabular", "iql", 20_000),
    ("lqr", "iql", 20_000),
)


@dataclass(frozen=True)
class EpistemicResult:
    """One agent with one method on one problem; NaN where nothing is to be compared."""

    problem: str
    agent: str
    method: str
    rows: int
    ratio: float
    ratio_error: float  # standard error, for the chance in the few datasets
    coverage: float
    auroc: float
    error: float  # root mean square error of q_mean
    spread: float  # deviation of q_mean over datasets

    @property
    def cell(self) -> str:
        """What was trained on what."""
        return f"{self.agent} on {self.problem}, {self.rows:,} rows"

    def row(self) -> dict[str, Any]:
        """For a table."""
        return vars(self) | {}


@dataclass(frozen=True)
class Budget:
    """How much is trained: D datasets, M critics each, updates of the minibatch size, hidden width, Adam's step size."""

    datasets: int = 16
    members: int = 8
    steps: int = 800
    batch: int = 64
    width: int = 16
    learning_rate: float = 2e-3


def run_epistemic_study(
    cells: Sequence[tuple[str, str, int]] = CELLS,
    methods: Sequence[str] = ("as released", "CALIBRATED", "CALIBRATED, prior"),
    budget: Budget | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[EpistemicResult]:
    """Every method in every cell of (problem, agent, rows); `progress` is called with (done, all)."""
    found: list[EpistemicResult] = []
    for problem, agent, rows in cells:
        for method in methods:
            found.append(run_epistemic(problem, agent, method, rows=rows, budget=budget))
            if progress is not None:
                progress(len(found), len(cells) * len(methods))
    return found


def run_epistemic(
    problem: str,
    agent: str,
    method: str,
    *,
    rows: int = 1000,
    budget: Budget | None = None,
    options: dict[str, Any] | None = None,
) -> EpistemicResult:
    """Train on all datasets at once and compare.

    Args:
        problem, agent, method: names in `PROBLEMS`, `AGENTS`, `METHODS`.
        rows: of every dataset.
        budget: of the training.
        options: further fields of the agent's config.
    """
    world = PROBLEMS[problem]()
    trained = _trained(world, agent, {**METHODS[method], **(options or {})}, rows, budget or Budget())
    found = trained.uncertainty(*world.points)
    q, deviation = (np.asarray(part, np.float64) for part in (found.q_mean, found.epistemic_sd))
    ratio, ratio_error = _jackknifed(_ratio, q, deviation)
    coverage = error = score = np.nan
    if agent in world.truth:
        truth = world.truth[agent].numpy()
        low, high = found.interval(0.9)
        coverage = float(((low <= truth) & (truth <= high)).mean())
        error = float(np.sqrt(((q - truth) ** 2).mean()))
    if world.missing is not None:
        unknown = trained.uncertainty(*world.missing).epistemic_sd
        score = float(np.mean([auroc(u, k) for u, k in zip(unknown, deviation, strict=True)]))
    return EpistemicResult(problem, agent, method, rows, ratio, ratio_error, coverage, score, error, _spread(q))


def epistemic_figure(results: Sequence[EpistemicResult]) -> Figure:
    """Ratio and coverage of every cell and method, with what is wanted shaded; bars are two standard errors."""
    figure = Figure(figsize=(11, 1.4 + 0.55 * len({r.cell for r in results})), layout="constrained")
    cells = list(dict.fromkeys(r.cell for r in results))
    sizes, shares = figure.subplots(1, 2, sharey=True)
    for index, method in enumerate(dict.fromkeys(r.method for r in results)):
        own = [r for r in results if r.method == method]
        places = [cells.index(r.cell) + 0.2 * (index - 1) for r in own]
        sizes.errorbar([r.ratio for r in own], places, xerr=[2 * r.ratio_error for r in own], fmt="o", label=method)
        shares.plot([r.coverage for r in own], places, "o")
    sizes.axvspan(0.8, 1.25, alpha=0.15, color="tab:green")
    shares.axvspan(0.85, 0.95, alpha=0.15, color="tab:green")
    sizes.set(yticks=range(len(cells)), yticklabels=cells, xlabel="epistemic_sd / spread of Q over datasets")
    shares.set(xlim=(0, 1), xlabel="share of true Q in 90 % intervals")
    sizes.invert_yaxis()
    sizes.legend(frameon=False, fontsize=8)
    return figure


def _spread(q: Array) -> float:
    """Deviation of `q [D, P]` over datasets."""
    return float(np.sqrt(q.var(0, ddof=1).mean()))


def _ratio(q: Array, deviation: Array) -> float:
    return float(np.sqrt((deviation**2).mean())) / _spread(q)


def _jackknifed(statistic: Callable[..., float], *parts: Array) -> tuple[float, float]:
    """A statistic of D datasets and its standard error, from leaving out one at a time (Efron and Tibshirani, 1993, equation 11.5)."""
    count = len(parts[0])
    left = np.array([statistic(*(np.delete(part, k, 0) for part in parts)) for k in range(count)])
    return statistic(*parts), float(np.sqrt((count - 1) * left.var()))


def _trained(world: Problem, name: str, options: dict[str, Any], rows: int, budget: Budget) -> UncertainAgent:
    """An agent with a seed for each dataset."""
    drawn = [world.draw(rows, torch.Generator().manual_seed(1000 + k)) for k in range(budget.datasets)]
    data = [torch.stack(parts) for parts in zip(*drawn, strict=True)]
    known = {f.name for f in fields(agent_class(name).config_class)}
    given = {
        **{rate: budget.learning_rate for rate in known if rate.endswith("_learning_rate")},
        "discount": DISCOUNT,
        "expectile": 0.7 if world.discrete else 0.5,  # the truth of the line is that of its behaviour
        "hidden_sizes": (budget.width, budget.width),
        "target_update_rate": 0.1,
        **AGENTS[name],
        **options,
        "num_critics": budget.members,
    }
    sizes = data[0].shape[-1], ACTIONS if world.discrete else data[1].shape[-1]
    config = make_config(name, **{field: value for field, value in given.items() if field in known})
    agent = agent_class(name)(config, *sizes, seeds=budget.datasets, discrete=world.discrete)
    assert isinstance(agent, UncertainAgent)
    draws, which = torch.Generator().manual_seed(0), torch.arange(budget.datasets).unsqueeze(1)
    longer = max(1, round((rows / 1000) ** 0.5))  # what is left to learn is small beside the noise of more rows
    for _ in range(budget.steps * world.effort * longer):
        index = torch.randint(rows, (budget.datasets, budget.batch), generator=draws)
        observations, actions, rewards, after, ends = (part[which, index] for part in data)
        batch = RowBatch(
            observations=observations,
            actions=actions,
            rewards=rewards,
            next_observations=after,
            terminations=ends,
            truncations=torch.zeros_like(ends),
            rows=index,
        )
        agent.update(batch)
    return agent
