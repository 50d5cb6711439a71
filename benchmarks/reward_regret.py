"""Does the STARC distance foretell what optimising a reward costs better than its accuracy on pairs does? Exact answers in a gridworld.

python benchmarks/reward_regret.py                 # the tables of docs/starc.md
python benchmarks/reward_regret.py --seeds 3       # smaller

The four rooms with 104 cells, slippery moves and an end at the goal. Every seed is a world: a true reward of its own (a cost of each step, larger in
cells of that seed's draw), 300 recorded episodes of a policy that follows the true values loosely, 1000 pairs of segments of 16 steps that judge
every reward. Rewards are

- learned: a Bradley-Terry model over cells and actions, fitted to 5 to 500 labels of three teachers;
- constructed from the true one: shaped copies, reward moved between next states, noise in the table, offsets, errors where the data never went,
  turns towards a random reward, constants.

The exact planner trains on each; its regret is the share of the range of true returns that is lost. The distance is the sampled estimate on the
recorded episodes, what somebody without the dynamics would have; the exact ones stand beside it.

THE TEST, stated before the first run: over all learned and constructed rewards that have a distance, |rho(STARC, regret)| - |rho(pair error, regret)|
is above 0, in that its 95 % interval (cells and seeds drawn independently of each other) excludes 0. Partial correlations, given accuracy and labels,
and the two groups apart are reported beside it, whatever they are.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import report
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import minimize

from rlkit2.data import Batch
from rlkit2.envs.gridworld import four_rooms_tables
from rlkit2.rewards import SampledStarc, TabularMDP, epic_distance, optimal_policy, regret, starc_distance
from rlkit2.studies.rank_tests import QUESTIONS, Measured, answers, spearman

Floats = NDArray[np.float64]
DISCOUNT, EPISODES, STEPS, LENGTH, PAIRS = 0.95, 300, 60, 16, 1000
TEACHERS, BUDGETS = ("oracle", "mistake", "noisy"), (5, 15, 50, 150, 500)


@dataclass(frozen=True)
class World:
    """One seed: process, true reward, behaviour, recorded steps `s, a, z, end [N]` and the first rows of segments."""

    mdp: TabularMDP
    goal: int
    cells: NDArray[np.int64]
    true: Floats
    behaviour: Floats
    s: NDArray[np.int64]
    a: NDArray[np.int64]
    z: NDArray[np.int64]
    last: NDArray[np.bool_]
    starts: NDArray[np.int64]
    rng: np.random.Generator

    @classmethod
    def of(cls, seed: int) -> World:
        """Drawn from a seed."""
        tables, rng = four_rooms_tables(), np.random.default_rng(seed)
        mdp, goal, states = tables.mdp(DISCOUNT), tables.goal, len(tables.cells)
        cost = np.where(rng.random(states) < 0.2, 4.0, 1.0) + 0.2 * rng.random(states)
        true = np.broadcast_to(-cost, (states, 4, states)).copy()
        true[goal] = 0
        tau = mdp.dense.numpy()
        best = optimal_policy(true, mdp)
        behaviour = 0.55 * np.eye(4)[best] + 0.45 * rng.dirichlet(np.ones(4), states)
        rows, lengths = [], []
        for _ in range(EPISODES):
            state = int(rng.choice(states, p=tables.initial_distribution))
            for step in range(1, STEPS + 1):
                action = int(rng.choice(4, p=behaviour[state]))
                after = int(rng.choice(states, p=tau[state, action]))
                rows.append((state, action, after, after == goal or step == STEPS))
                state = after
                if after == goal:
                    break
            lengths.append(step)
        s, a, z, last = (np.array(column) for column in zip(*rows, strict=True))
        firsts = np.cumsum([0, *lengths[:-1]])
        starts = np.concatenate(
            [first + np.arange(n - LENGTH + 1) for first, n in zip(firsts, lengths, strict=True) if n >= LENGTH]
        )
        return cls(mdp, goal, tables.cells, true, behaviour, s, a, z, last.astype(bool), starts, rng)

    def batch(self) -> Batch:
        """The recorded steps."""
        ends = self.z == self.goal
        return Batch(
            observations=torch.from_numpy(self.s),
            actions=torch.from_numpy(self.a),
            rewards=torch.zeros(len(self.s)),
            next_observations=torch.from_numpy(self.z),
            terminations=torch.from_numpy(ends),
            truncations=torch.from_numpy(self.last & ~ends),
        )

    def values(self, reward: Floats) -> Floats:
        """`R(s, a, s')` of every recorded step."""
        return np.asarray(reward[self.s, self.a, self.z])

    def pairs(self, count: int) -> NDArray[np.int64]:
        """Rows `[count, 2, LENGTH]` of pairs of segments."""
        return np.asarray(self.rng.choice(self.starts, (count, 2))[..., None] + np.arange(LENGTH))

    def ended(self, reward: Floats) -> Floats:
        """The reward with nothing paid after the end."""
        reward[self.goal] = 0
        return reward


def learned(world: World, teacher: str, budget: int) -> Floats:
    """A Bradley-Terry fit over cells and actions, `[S, A, S]`; the penalty is that of a prior with deviation 1, whatever the budget."""
    rows = world.pairs(budget)
    returns = world.values(world.true)[rows].sum(-1)
    gap = returns[:, 1] - returns[:, 0]
    if teacher == "noisy":
        second = world.rng.random(budget) < 1 / (1 + np.exp(-gap / (gap.std() or 1.0)))
    else:
        second = gap > 0
        second ^= (teacher == "mistake") & (world.rng.random(budget) < 0.1)
    states = len(world.true)
    pair = (world.s * 4 + world.a)[rows]
    counts = np.zeros((budget, states * 4))
    for side, sign in ((0, -1.0), (1, 1.0)):
        np.add.at(counts, (np.arange(budget)[:, None], pair[:, side]), sign)
    design = sparse.csr_array(counts * np.where(second, 1.0, -1.0)[:, None])

    def loss(theta: Floats) -> tuple[float, Floats]:
        margin = design @ theta
        grad = design.T @ (-1 / (1 + np.exp(np.clip(margin, -50, 50))))
        return float(np.logaddexp(0, -margin).sum() + 0.5 * theta @ theta), grad + theta

    theta = minimize(loss, np.zeros(states * 4), jac=True, method="L-BFGS-B", options={"maxiter": 300}).x
    # Preferences leave the offset open; every step costs, so that arriving is worth something, as a user of such a task would say.
    table = theta.reshape(states, 4) - theta.max()
    return world.ended(np.broadcast_to(table[..., None], world.true.shape).copy())


def constructed(world: World) -> Iterator[tuple[str, Floats]]:
    """Cells and rewards."""
    rng, true, states = world.rng, world.true, len(world.true)
    tau = world.mdp.dense.numpy()
    spread = world.values(true).std()
    seen = np.zeros((states, 4), bool)
    seen[world.s, world.a] = True
    other = world.ended(np.broadcast_to(rng.normal(size=(states, 4, 1)), true.shape).copy())
    for size in (0.3, 1, 3, 10):
        phi = rng.normal(size=states)
        phi[world.goal] = 0
        yield f"shaped {size}", world.ended(true + size * spread * (DISCOUNT * phi[None, None] - phi[:, None, None]))
    for size in (1, 10):
        moved = rng.normal(size=true.shape)
        moved -= (tau * moved).sum(-1, keepdims=True)
        yield f"moved between next states {size}", world.ended(true + size * spread * moved)
    for size in (0.1, 0.3, 1, 3):
        table = rng.normal(size=(states, 4, 1))
        yield f"noise in the table {size}", world.ended(true + size * spread * table)
    for size in (-1, 0.5, 1, 2, 5):
        yield f"offset {size}", world.ended(true + size * spread)
    for size in (1, 5, 25):
        wrong = np.where(seen, 0.0, np.abs(rng.normal(size=(states, 4))))[..., None]
        yield f"errors off the data {size}", world.ended(true + size * spread * wrong)
    for degrees in (15, 30, 60, 90, 120, 180):
        angle, base = np.deg2rad(degrees), true / spread
        scaled = other / world.values(other).std()
        yield f"turned by {degrees}", world.ended(np.cos(angle) * base + np.sin(angle) * scaled)
    yield "constant", world.ended(np.ones_like(true))
    yield "minus a constant", world.ended(-np.ones_like(true))


def rows_of(seed: int) -> list[dict[str, Any]]:
    """One world: a row a reward."""
    world = World.of(seed)
    rewards = dict(constructed(world))
    budgets = dict.fromkeys(rewards, 0)
    for teacher in TEACHERS:
        for budget in BUDGETS:
            name = f"{teacher} {budget}"
            rewards[name], budgets[name] = learned(world, teacher, budget), budget
    test = world.pairs(PAIRS)
    visits = np.zeros((len(world.true), 4))
    np.add.at(visits, (world.s, world.a), 1)
    recorded = {"true": world.values(world.true)} | {name: world.values(r) for name, r in rewards.items()}
    sampled = SampledStarc("onehot", discount=DISCOUNT, bootstrap=0).fit(world.batch(), recorded)
    truth = recorded["true"][test].sum(-1)
    right = truth[:, 1] > truth[:, 0]
    clear = np.abs(truth[:, 1] - truth[:, 0]) > 1e-9
    found = []
    for index, (name, reward) in enumerate(rewards.items(), 1):
        judged = recorded[name][test].sum(-1)
        gap = judged[:, 1] - judged[:, 0]
        accuracy = np.where(np.abs(gap) <= 1e-9, 0.5, (gap > 0) == right)[clear].mean()
        found.append(
            {
                "cell": name,
                "seed": seed,
                "budget": budgets[name],
                "accuracy": float(accuracy),
                "starc": float(sampled.values[0, index]),
                "exact": starc_distance(world.true, reward, world.mdp, policy=world.behaviour, weights=visits),
                "uniform": starc_distance(world.true, reward, world.mdp),
                "range": starc_distance(world.true, reward, world.mdp, norm="range", distance="range"),
                "epic": epic_distance(world.true, reward, world.mdp),
                "regret": regret(world.true, reward, world.mdp),
            }
        )
    return found


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, a row a cell."""
    cells = dict.fromkeys(row["cell"] for row in rows)
    kinds = ("accuracy", "starc", "exact", "uniform", "regret")
    return [
        {"reward": cell}
        | {kind: float(np.nanmean([row[kind] for row in rows if row["cell"] == cell])) for kind in kinds}
        for cell in cells
    ]


def tests(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every question for every group, and the plain correlation of the exact distances."""
    known = [row for row in rows if np.isfinite(row["starc"]) and np.isfinite(row["regret"])]
    groups = {
        "all": known,
        "learned": [row for row in known if row["budget"]],
        "constructed": [row for row in known if not row["budget"]],
    }
    found = []
    for group, some in groups.items():
        columns = {key: np.array([row[key] for row in some], float) for key in some[0] if key not in ("cell", "seed")}
        measured = Measured(
            tuple(row["cell"] for row in some),
            tuple(row["seed"] for row in some),
            columns["starc"],
            1 - columns["accuracy"],
            columns["regret"],
            columns["budget"],
        )
        results = answers(measured)
        for question in QUESTIONS:
            estimate = results[question]
            found.append(
                {
                    "rewards": group,
                    "n": len(some),
                    "measure": question,
                    "rho": estimate.value,
                    "low": estimate.low,
                    "high": estimate.high,
                }
            )
        for kind in ("exact", "uniform", "range", "epic"):
            value = spearman(columns[kind], columns["regret"])
            found.append({"rewards": group, "n": len(some), "measure": f"{kind} distance, exact", "rho": value})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    rows = [row for seed in range(given.seeds) for row in rows_of(seed)]
    report("reward_regret_cells", table(rows))
    report("reward_regret", tests(rows))
    without = sum(not np.isfinite(row["starc"]) for row in rows)
    print(f"{len(rows)} rewards, {without} without a distance, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
