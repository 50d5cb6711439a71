"""How often the 95 % intervals of sampled STARC distances hold the truth, and how often pure noise gets a number.

python benchmarks/starc_coverage.py                             # the table of docs/starc.md
python benchmarks/starc_coverage.py --sets 40 --rows 2000       # smaller
python benchmarks/starc_coverage.py --noise zoo/hopper/medium-replay-v0   # 30 rewards of noise, and the true reward with noise added

A finite process with terminations and one without (episodes cut off), whose exact distances the tabular code gives, and a linear system with
quadratic rewards, whose advantages are known polynomials. Every set of data is drawn anew.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import report
from numpy.typing import NDArray

from rlkit2.api import load_dataset
from rlkit2.data import Batch
from rlkit2.rewards import SampledStarc, TabularMDP, starc_matrix

Floats = NDArray[np.float64]
DISCOUNT = 0.95


@dataclass(frozen=True)
class Problem:
    """`draw(seed, rows, episodes)` gives transitions and rewards by name (the last one noise), `exact(rows, episodes)` their true distances
    without the noise; `features` to estimate with."""

    features: str
    draw: Callable[[int, int, int], tuple[Batch, dict[str, Floats]]]
    exact: Callable[[int, int], Floats]


def finite(*, ends: bool) -> Problem:
    """8 states, 3 actions; with `ends` the last state ends an episode with chance 1, else all are cut off."""
    rng = np.random.default_rng(5)
    states, actions = 8, 3
    tau = rng.dirichlet(np.ones(states) * 0.4, (states, actions))
    if ends:
        tau[:, :, -1] = np.minimum(tau[:, :, -1], 0.02)
        tau /= tau.sum(-1, keepdims=True)
        tau[-1] = np.eye(states)[-1]
    pi = rng.dirichlet(np.ones(actions) * 2, states)
    start = np.full(states, 1 / (states - ends))
    if ends:
        start[-1] = 0
    mdp = TabularMDP(tau, DISCOUNT, start)
    base, other = rng.normal(size=(2, states, actions, states))
    phi = rng.normal(size=states)
    if ends:
        phi[-1] = 0
    same = 3 * base + DISCOUNT * phi[None, None] - phi[:, None, None]
    rewards = {"base": base, "same": same, "near": base + 0.5 * other, "other": other}
    if ends:
        for reward in rewards.values():
            reward[-1] = 0

    def draw(seed: int, rows: int, episodes: int) -> tuple[Batch, dict[str, Floats]]:
        rng = np.random.default_rng([seed, rows, episodes])
        length = rows // episodes
        s = np.zeros((episodes, length + 1), int)
        a = np.zeros((episodes, length), int)
        s[:, 0] = rng.choice(states, episodes, p=start)
        for t in range(length):
            a[:, t] = (rng.random((episodes, 1)) > pi[s[:, t]].cumsum(1)).sum(1).clip(max=actions - 1)
            s[:, t + 1] = (rng.random((episodes, 1)) > tau[s[:, t], a[:, t]].cumsum(1)).sum(1).clip(max=states - 1)
        alive = np.ones((episodes, length), bool) if not ends else s[:, :-1] != states - 1
        kept = [(e, t) for e in range(episodes) for t in range(length) if alive[e, t]]
        e, t = np.array(kept).T
        here, act, after = s[e, t], a[e, t], s[e, t + 1]
        last = np.r_[e[1:] != e[:-1], True]
        done = (after == states - 1) if ends else np.zeros(len(e), bool)
        values = {name: reward[here, act, after] for name, reward in rewards.items()}
        return batch(here, act, after, done, last & ~done), values | {"noise": rng.normal(size=len(e))}

    def exact(rows: int, episodes: int) -> Floats:
        visits, now = np.zeros(states), start.copy()
        step = np.einsum("sa,saz->sz", pi, tau)
        for _ in range(rows // episodes):
            visits += now
            now = now @ step
        if ends:
            visits[-1] = 0
        return starc_matrix(rewards, mdp, policy=pi, weights=visits[:, None] * pi).values

    return Problem("auto", draw, exact)


def linear(features: str) -> Problem:
    """s' = .9 s + .5 u + .4 noise, u = -.6 s + .7 noise; rewards `alpha s^2 + beta u^2 + kappa s'`, and a shaped copy of the first."""
    parts = {"base": (-1.0, -0.1, 0.0), "same": (-1.0, -0.1, 0.0), "near": (-1.0, -0.1, 1.0), "other": (0.0, 0.0, 1.0)}
    variance = (0.25 * 0.49 + 0.16) / (1 - 0.36)

    def draw(seed: int, rows: int, episodes: int) -> tuple[Batch, dict[str, Floats]]:
        rng = np.random.default_rng([seed, rows, episodes])
        length = rows // episodes
        s, u = np.zeros((episodes, length + 1)), np.zeros((episodes, length))
        s[:, 0] = rng.normal(size=episodes) * variance**0.5
        for t in range(length):
            u[:, t] = -0.6 * s[:, t] + 0.7 * rng.normal(size=episodes)
            s[:, t + 1] = 0.9 * s[:, t] + 0.5 * u[:, t] + 0.4 * rng.normal(size=episodes)
        here, act, after = s[:, :-1].ravel(), u.ravel(), s[:, 1:].ravel()
        last = np.tile(np.arange(1, length + 1) == length, episodes)
        values = {name: a * here**2 + b * act**2 + k * after for name, (a, b, k) in parts.items()}
        values["same"] = 2 * values["same"] + 3 * (DISCOUNT * after**2 - here**2)
        made = batch(here[:, None], act[:, None], after[:, None], np.zeros(len(last), bool), last)
        return made, values | {"noise": rng.normal(size=len(last))}

    def exact(rows: int, episodes: int) -> Floats:
        x, weight = np.polynomial.hermite_e.hermegauss(12)
        s = (x * variance**0.5)[:, None]
        u = -0.6 * s + 0.7 * x[None]
        forms = []
        for a, b, k in parts.values():
            p, q = (a + 0.36 * b) / (1 - DISCOUNT * 0.36), 0.6 * k / (1 - DISCOUNT * 0.6)
            constant = (0.49 * b + DISCOUNT * p * (0.25 * 0.49 + 0.16)) / (1 - DISCOUNT)
            mean = 0.9 * s + 0.5 * u
            ahead = p * (mean**2 + 0.16) + q * mean + constant
            forms.append(a * s**2 + b * u**2 + k * mean + DISCOUNT * ahead - p * s**2 - q * s - constant)
        scaled = np.stack(forms) * np.sqrt(np.outer(weight, weight))
        scaled /= np.sqrt((scaled**2).sum((1, 2), keepdims=True))
        return np.sqrt(((scaled[:, None] - scaled[None]) ** 2).sum((2, 3)))

    return Problem(features, draw, exact)


def batch(s: Any, a: Any, after: Any, done: Any, cut: Any) -> Batch:
    """Transitions from arrays."""
    tensors = (torch.from_numpy(np.ascontiguousarray(x)) for x in (s, a, np.zeros(len(done)), after, done, cut))
    observations, actions, rewards, following, terminations, truncations = tensors
    return Batch(
        observations=observations,
        actions=actions,
        rewards=rewards,
        next_observations=following,
        terminations=terminations,
        truncations=truncations,
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "finite, ends": lambda: finite(ends=True),
    "finite, cut off": lambda: finite(ends=False),
    "linear, quadratic": lambda: linear("quadratic"),
    "linear, auto": lambda: linear("auto"),
}


def coverage(problem: Problem, rows: int, episodes: int, sets: int, bootstrap: int = 100) -> dict[str, Any]:
    """Over `sets` data sets: share of intervals that hold the truth (pairs of different rewards with a number), that hold 0 (an equivalent
    pair), pairs with a number, and noise with a number."""
    exact = problem.exact(rows, episodes)
    pairs = [(0, 2), (0, 3), (2, 3)]
    held, zero, same, noise = [], [], 0, 0
    for seed in range(sets):
        data, rewards = problem.draw(seed, rows, episodes)
        starc = SampledStarc(problem.features, discount=DISCOUNT, bootstrap=bootstrap, seed=seed)  # type: ignore[arg-type]
        found = starc.fit(data, rewards)
        assert found.ci is not None
        for i, j in pairs:
            if np.isfinite(found.values[i, j]):
                held.append(found.ci[i, j, 0] <= exact[i, j] <= found.ci[i, j, 1])
        if np.isfinite(found.values[0, 1]):
            zero.append(found.ci[0, 1, 0] <= 1e-6)
            same += 1
        noise += found.status(4) == ""
    return {
        "hold the truth": float(np.mean(held)) if held else float("nan"),
        "equivalent holds 0": float(np.mean(zero)) if zero else float("nan"),
        "pairs with a number": len(held) / (sets * len(pairs)),
        "noise with a number": noise / sets,
    }


def table(sets: int, sizes: list[int], episodes: list[int], problems: list[str]) -> Iterator[dict[str, Any]]:
    """A row a problem, size and number of episodes."""
    for name in problems:
        for rows in sizes:
            for count in episodes:
                if rows // count >= 5:
                    found = coverage(PROBLEMS[name](), rows, count, sets)
                    yield {"problem": name, "rows": rows, "episodes": count, **found}


def noise_on(dataset: str, discount: float = 0.99, bootstrap: int = 100) -> list[dict[str, Any]]:
    """30 rewards of noise, and 80 of the true reward with noise of .25 to 2 of its deviation, whose distance to it is 0."""
    data, rng = load_dataset(dataset), np.random.default_rng(0)
    true = data.rewards.double().numpy()
    starc = SampledStarc(discount=discount, bootstrap=bootstrap)
    pure = starc.fit(data, {"true": true, **{f"noise {k}": rng.normal(size=len(true)) for k in range(30)}})
    levels = [level for level in (0.25, 0.5, 1.0, 2.0) for _ in range(20)]
    noisy = {
        f"{level} sd, {k}": true + level * true.std() * rng.normal(size=len(true)) for k, level in enumerate(levels)
    }
    near = starc.fit(data, {"true": true, **noisy})
    known = [k for k in range(1, 81) if np.isfinite(near.values[0, k])]
    assert near.ci is not None
    low, high, value = near.ci[0, known, 0], near.ci[0, known, 1], near.values[0, known]
    return [
        {
            "dataset": dataset,
            "features": pure.diagnostics["features"],
            "status of the true reward": pure.status(0) or "a number",
            "noise with a number": sum(pure.status(k) == "" for k in range(1, 31)),
            "of": 30,
            "true + noise with a number": len(known),
            "that hold 0": int((low <= 1e-6).sum()),
            "that hold their estimate": int(((low <= value) & (value <= high)).sum()),
        }
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=200)
    parser.add_argument("--rows", type=int, nargs="*", default=[2000, 20_000])
    parser.add_argument("--episodes", type=int, nargs="*", default=[10, 20, 40, 100, 400])
    parser.add_argument("--problems", nargs="*", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument(
        "--noise", nargs="*", metavar="DATASET", help="run the noise experiment on these datasets instead"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if given.noise:
        report("starc_noise", [row for dataset in given.noise for row in noise_on(dataset)])
    else:
        report("starc_coverage", list(table(given.sets, given.rows, given.episodes, given.problems)))


if __name__ == "__main__":
    main()
