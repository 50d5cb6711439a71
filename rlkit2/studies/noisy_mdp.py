"""When does a generalized-Gaussian likelihood help Q, and when does it bias it? Offline tabular MDPs with known noise.

Each MDP has 8 states, 3 actions, deterministic transitions, mean rewards of deviation 0.5, and a dataset of 25 noisy rewards per cell. The noise
is GGD(0.7) or Gaussian with deviation 0.3 (3 in 40 % of the cells), or a centred jackpot: Bernoulli(0.1) scaled to deviation 0.1 (1 in 40 %).
Transitions are deterministic and every loss is equivariant under shifts, so the fixed point of fitted Q iteration is a location per cell followed by
planning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from rlkit2.agents.error_model import ErrorModel, ErrorOptions
from rlkit2.nn import Adam
from rlkit2.nn.distributions import GeneralizedNormal

Array = NDArray[np.float64]

STATES, ACTIONS, SAMPLES, DISCOUNT = 8, 3, 25, 0.9
NOISES = ("ggd 0.7", "gaussian", "jackpots")
METHODS: dict[str, ErrorOptions] = {
    "squared error": ErrorOptions(),
    "GGD, decoupled": ErrorOptions(critic="ggd"),
    "GGD, coupled": ErrorOptions(critic="ggd", coupling="ggd"),
    "GGD, coupled, scale 1": ErrorOptions(critic="ggd", coupling="ggd", critic_scale="fixed"),
    "official form": ErrorOptions(critic="ggd", coupling="ggd", critic_scale="fixed", critic_form="official"),
}


@dataclass(frozen=True)
class NoisyMDPResult:
    """Errors of one method under one noise, per MDP."""

    noise: str
    method: str
    rmse: Array  # `[mdps]`: root mean square error of Q against the true optimal Q
    regret: Array  # `[mdps]`: optimal less achieved value, mean over states

    def row(self) -> dict[str, Any]:
        """Means and standard errors."""
        root = np.sqrt(len(self.rmse))
        return {
            "noise": self.noise,
            "method": self.method,
            "RMSE of Q": float(self.rmse.mean()),
            "s.e. of RMSE": float(self.rmse.std(ddof=1) / root),
            "regret": float(self.regret.mean()),
            "s.e. of regret": float(self.regret.std(ddof=1) / root),
        }


def run_noisy_mdp(
    mdps: int = 24,
    *,
    noises: Sequence[str] = NOISES,
    methods: Sequence[str] = tuple(METHODS),
    seed: int = 0,
    steps: int = 1500,
    progress: Callable[[int, int], None] | None = None,
) -> list[NoisyMDPResult]:
    """All methods under all noises, on the same MDPs.

    Args:
        mdps: number of MDPs.
        noises, methods: names in `NOISES` and `METHODS`.
        seed: of MDPs, noise and initial outputs.
        steps: of Adam, for the location, shape and scale of every cell.
        progress: called with (done, all).
    """
    generator = torch.Generator().manual_seed(seed)
    cells = STATES * ACTIONS
    means = 0.5 * torch.randn(mdps, cells, generator=generator, dtype=torch.float64)
    successors = torch.randint(STATES, (mdps, cells), generator=generator)
    loud = torch.rand(mdps, cells, generator=generator) < 0.4
    optimal = _plan(means, successors)
    results = []
    for noise in noises:
        rewards = means.unsqueeze(-1) + _noise(noise, loud, generator, seed)
        for method in methods:
            locations = _locations(rewards, METHODS[method], steps)
            q = _plan(locations, successors)
            rmse = (q - optimal).square().mean(1).sqrt()
            regret = _regret(q, optimal, means, successors)
            results.append(NoisyMDPResult(noise, method, rmse.numpy(), regret.numpy()))
            if progress is not None:
                progress(len(results), len(noises) * len(methods))
    return results


def _noise(kind: str, loud: Tensor, generator: torch.Generator, seed: int) -> Tensor:
    """Noise `[mdps, cells, samples]`."""
    shape = (*loud.shape, SAMPLES)
    if kind == "jackpots":
        hits = (torch.rand(shape, generator=generator, dtype=torch.float64) < 0.1).double()
        return (hits - 0.1) / 0.3 * torch.where(loud, 1.0, 0.1).unsqueeze(-1)
    beta = 2.0 if kind == "gaussian" else 0.7
    density = GeneralizedNormal(0.0, 1.0, beta)
    with torch.random.fork_rng(devices=[]):  # the gamma sampler knows the global generator alone
        torch.manual_seed(seed)
        unit = density.sample(shape) / density.stddev
    return unit * torch.where(loud, 3.0, 0.3).unsqueeze(-1)


class _Cells(nn.Module):
    """Outputs of an error model for every cell, `[mdps, cells, 1 + k]`."""

    def __init__(self, start: Tensor, outputs: int) -> None:
        super().__init__()
        zeros = start.new_zeros(*start.shape, outputs)
        self.table = nn.Parameter(torch.cat([start.unsqueeze(-1), zeros], -1))


def _locations(rewards: Tensor, options: ErrorOptions, steps: int) -> Tensor:
    """What each loss takes for the mean reward, `[mdps, cells]`: descent from the sample mean, where all of them start Gaussian."""
    start = rewards.mean(-1)
    if options.critic == "mse" or options.coupling == "mean":
        return start  # the minimiser of the squared error, which the decoupled likelihood leaves alone
    model = ErrorModel(options, len(rewards), rewards.dtype, rewards.device)
    cells = _Cells(start, model.outputs)
    optimizer = Adam(cells, 0.03, cosine_steps=steps)
    for _ in range(steps):
        outputs = cells.table.unsqueeze(2).expand(-1, -1, rewards.shape[-1], -1)
        loss, _ = model.loss(outputs, rewards, DISCOUNT)
        optimizer.minimize(loss)
    return cells.table[..., 0].detach()


def _plan(rewards: Tensor, successors: Tensor) -> Tensor:
    """Optimal Q `[mdps, cells]` for deterministic successors."""
    q = torch.zeros_like(rewards)
    for _ in range(400):
        q = rewards + DISCOUNT * q.view(-1, STATES, ACTIONS).amax(-1).gather(1, successors)
    return q


def _regret(q: Tensor, optimal: Tensor, rewards: Tensor, successors: Tensor) -> Tensor:
    """Mean over states of V* less the value of the policy that is greedy in `q`, `[mdps]`."""
    chosen = q.view(-1, STATES, ACTIONS).argmax(-1, keepdim=True)
    step_reward, step_to = (t.view(-1, STATES, ACTIONS).gather(2, chosen).squeeze(2) for t in (rewards, successors))
    value = torch.zeros_like(step_reward)
    for _ in range(400):
        value = step_reward + DISCOUNT * value.gather(1, step_to)
    return (optimal.view(-1, STATES, ACTIONS).amax(-1) - value).mean(1)


def noisy_mdp_figure(results: list[NoisyMDPResult]) -> Figure:
    """RMSE of Q and regret, one group of bars per noise, with standard errors."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    rows = [result.row() for result in results]
    for axes, name, error in zip(
        figure.subplots(1, 2), ("RMSE of Q", "regret"), ("s.e. of RMSE", "s.e. of regret"), strict=True
    ):
        for index, method in enumerate(METHODS):
            own = [row for row in rows if row["method"] == method]
            places = np.arange(len(own)) + (index - 2) * 0.16
            axes.bar(places, [row[name] for row in own], 0.15, yerr=[row[error] for row in own], label=method)
        axes.set(xticks=range(len(NOISES)), xticklabels=NOISES, ylabel=name)
        axes.grid(axis="y", alpha=0.25)
    figure.axes[1].legend(frameon=False, fontsize=8)
    return figure
