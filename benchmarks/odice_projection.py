"""What the orthogonal projection is worth: rules and projections of O-DICE against the exact optimum of a gridworld, and what each costs.

    python benchmarks/odice_projection.py                    # both parts, results/odice_projection.json and docs/images/odice-projection.svg
    python benchmarks/odice_projection.py --only cost

The four rooms (no slip), data of a behaviour that goes the best way and, with probability epsilon, anywhere: 0.2 is narrow, 1 is wide. V learns from
one-hot cells or from their two coordinates, with reverse KL, whose weights are positive, so that a Kullback-Leibler divergence exists. Compared with
the exact minimum of the objective over the same data (Newton in float64, one number per cell), which `true` aims at:

    kl        of the weighted data's distribution over (s, a) from the optimal one, in nats
    return    discounted return of the policy that follows the weighted data, exactly, as a share of the best
    rank      rank correlation of V with the optimal one over visited cells
    alike     cosine of V's last hidden features at s and s', less that of different transitions
    removed   share of the backward gradient that the projection takes away (batch and layer)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RAW_UNITS, interleaved, ratio, report
from torch import Tensor

from rlkit2.agents import make_config
from rlkit2.agents.odice import ODICE
from rlkit2.data import Batch
from rlkit2.envs.gridworld import GridTables, four_rooms_tables
from rlkit2.losses.divergences import f_conjugate

DISCOUNT, SCALE, DIVERGENCE = 0.95, 20.0, "rkl"
EPSILONS = (0.2, 0.6, 1.0)
RULES: dict[str, dict[str, Any]] = {
    "semi": {"gradient_rule": "semi"},
    "true": {"gradient_rule": "true", "lambda_": 1.0 / (2.0 - DISCOUNT)},
    **{
        f"{projection}, eta {eta:g}": {"projection": projection, "eta": eta}
        for eta in (0.3, 1.0)
        for projection in ("batch", "layer", "sample")
    },
}


@dataclass(frozen=True)
class Grid:
    """Transitions in the gridworld and what can be known about them.

    Attributes:
        tables: the process.
        states, actions, next_states: of the data, int64 `[N]`.
        share: of each (s, a) in the data, `[S, A]`.
        optimum: V of the exact minimum over that data, `[S]`.
    """

    tables: GridTables
    states: Tensor
    actions: Tensor
    next_states: Tensor
    share: Tensor
    optimum: Tensor


def successors(tables: GridTables) -> Tensor:
    """The next cell of every action, int64 `[S, A]`."""
    return torch.as_tensor(tables.transitions.argmax(-1))


def residual(tables: GridTables, value: Tensor) -> Tensor:
    """r + gamma (1 - terminated) V(s') - V(s) for values `[..., S]`: `[..., S, A]`."""
    after = successors(tables)
    arrived = (after == tables.goal).double()
    return arrived + DISCOUNT * (1.0 - arrived) * value[..., after] - value.unsqueeze(-1)


def best_value(tables: GridTables) -> Tensor:
    """The best discounted return from every cell, `[S]`."""
    best = torch.zeros(len(tables.cells), dtype=torch.float64)
    for _ in range(200):
        best = (residual(tables, best) + best.unsqueeze(-1)).amax(-1)
    return best


@cache
def make_grid(epsilon: float, count: int = 20_000) -> Grid:
    """Episodes from the south-west room, at most 200 steps each, until there are `count` transitions."""
    tables = four_rooms_tables(slip=0.0)
    generator = np.random.default_rng(0)
    after = successors(tables).numpy()
    greedy = residual(tables, best_value(tables)).argmax(-1).numpy()
    rows: list[tuple[int, int, int]] = []
    while len(rows) < count:
        state = int(generator.choice(len(tables.cells), p=tables.initial_distribution))
        for _ in range(200):
            action = int(generator.integers(4)) if generator.random() < epsilon else int(greedy[state])
            rows.append((state, action, int(after[state, action])))
            state = rows[-1][2]
            if state == tables.goal:
                break
    states, actions, next_states = torch.tensor(rows[:count]).T
    share = torch.zeros(len(tables.cells), 4, dtype=torch.float64)
    share.index_put_((states, actions), torch.full((count,), 1.0 / count, dtype=torch.float64), accumulate=True)
    return Grid(tables, states, actions, next_states, share, exact_minimum(tables, share))


def exact_minimum(tables: GridTables, share: Tensor, odds: float = 1.0 - DISCOUNT) -> Tensor:
    """V that minimises odds E[V(s)] + E[f*(scale R)] / scale over the data, by Newton with halved steps, `[S]`; 0 in cells without data."""
    seen = share.sum(1) > 0

    def loss(value: Tensor) -> Tensor:
        dual = f_conjugate(DIVERGENCE, SCALE * residual(tables, value)) / SCALE
        return odds * (share.sum(1) * value).sum() + (share * dual).sum()

    value = torch.zeros(len(share), dtype=torch.float64)
    for _ in range(200):
        gradient, hessian = torch.func.grad(loss)(value), torch.func.hessian(loss)(value)
        step = torch.zeros_like(value)
        step[seen] = torch.linalg.lstsq(hessian[seen][:, seen], gradient[seen], driver="gelsd").solution
        length = 1.0
        while loss(value - length * step) > loss(value) and length > 1e-9:
            length /= 2
        value = value - length * step
        if gradient[seen].norm() < 1e-12:
            break
    return value


def occupancy(grid: Grid, value: Tensor) -> Tensor:
    """The data's distribution times the weights (f*)'(scale R), normalised: `[..., S, A]` for values `[..., S]`."""
    scaled = SCALE * residual(grid.tables, value)
    log = torch.where(grid.share > 0, grid.share.log() + scaled, -torch.inf)  # (f*)' of reverse KL is exp(R - 1)
    return log.flatten(-2).softmax(-1).view_as(log)


def exact_return(grid: Grid, weighted: Tensor) -> float:
    """Discounted return from the start room of the policy that takes actions in proportion to `weighted [S, A]`; uniform where there is none."""
    mass = weighted.sum(1, keepdim=True)
    policy = torch.where(mass > 0, weighted / mass.clamp(min=1e-300), 0.25)
    transitions = torch.as_tensor(grid.tables.transitions)
    arrived = torch.as_tensor(grid.tables.rewards)
    moves = torch.einsum("sa,sat->st", policy, transitions)
    moves[:, grid.tables.goal] = 0.0
    gain = torch.einsum("sa,sat,sat->s", policy, transitions, arrived)
    value = torch.linalg.solve(torch.eye(len(moves), dtype=torch.float64) - DISCOUNT * moves, gain)
    return float(value @ torch.as_tensor(grid.tables.initial_distribution))


def inputs_of(tables: GridTables, kind: str) -> Tensor:
    """What V sees of every cell: one-hot `[S, S]`, or row and column in [-1, 1], `[S, 2]`."""
    if kind == "one-hot":
        return torch.eye(len(tables.cells))
    cells = torch.as_tensor(tables.cells).float()
    return (cells - cells.mean(0)) / cells.std(0)


def train(grid: Grid, kind: str, rule: dict[str, Any], seeds: int, steps: int) -> tuple[ODICE, Tensor, float]:
    """An agent after `steps` updates of 256 rows, the cells as it sees them, and the mean share that its projection removed."""
    seen = inputs_of(grid.tables, kind)
    config = make_config(
        "odice",
        **RAW_UNITS
        | {
            "weight": "conjugate_grad",
            "divergence": DIVERGENCE,
            "discount": DISCOUNT,
            "residual_scale": SCALE,
            "num_values": 1,
            "hidden_sizes": (64, 64),
            "value_learning_rate": 1e-3,
            "residual_clip": 20.0,
        }
        | rule,
    )
    agent = ODICE(config, seen.shape[1], 4, seeds=seeds, discrete=True)
    generator = torch.Generator().manual_seed(0)
    removed = []
    for step in range(steps):
        rows = torch.randint(len(grid.states), (seeds, 256), generator=generator)
        metrics = agent.update(make_batch(grid, seen, rows))
        if step >= steps - 500 and "projection/removed_share" in metrics:
            removed.append(metrics["projection/removed_share"].mean())
    return agent, seen, float(torch.stack(removed).mean()) if removed else float("nan")


def make_batch(grid: Grid, seen: Tensor, rows: Tensor) -> Batch:
    """Transitions `rows [seeds, B]`."""
    ended = grid.next_states[rows] == grid.tables.goal
    return Batch(
        observations=seen[grid.states[rows]],
        actions=grid.actions[rows],
        rewards=ended.float(),
        next_observations=seen[grid.next_states[rows]],
        terminations=ended,
        truncations=torch.zeros_like(ended),
    )


def ranks(values: Tensor) -> Tensor:
    """Ranks along the last axis, centred."""
    found = values.argsort(-1).argsort(-1).double()
    return found - found.mean(-1, keepdim=True)


def grid_rows(seeds: int, steps: int) -> Iterator[dict[str, Any]]:
    """Means over seeds, and their standard errors for kl."""
    for kind in ("one-hot", "coordinates"):
        for epsilon in EPSILONS:
            grid = make_grid(epsilon)
            best = occupancy(grid, grid.optimum)
            visited = (grid.share.sum(1) > 0).nonzero().flatten()
            ceiling = float(best_value(grid.tables) @ torch.as_tensor(grid.tables.initial_distribution))
            for name, rule in {"exact optimum": None, "the data": None, **RULES}.items():
                start = time.perf_counter()
                row: dict[str, Any] = {"V sees": kind, "epsilon": epsilon, "rule": name}
                if rule is None:
                    weighted = best if name == "exact optimum" else grid.share
                    yield row | {"kl": kl(best, weighted), "return": exact_return(grid, weighted) / ceiling}
                    continue
                agent, seen, removed = train(grid, kind, rule, seeds, steps)
                value = agent.value(seen.expand(seeds, -1, -1)).double()
                found = occupancy(grid, value)
                kls = torch.tensor([kl(best, one) for one in found])
                rank, wanted = ranks(value[:, visited]), ranks(grid.optimum[visited])
                rank = (rank * wanted).sum(-1) / (rank.norm(dim=-1) * wanted.norm())
                rows = torch.arange(2000).expand(seeds, -1)
                alike = agent.coadaptation(make_batch(grid, seen, rows))
                yield row | {
                    "kl": float(kls.mean()),
                    "standard error": float(kls.std() / seeds**0.5),
                    "return": float(np.mean([exact_return(grid, one) for one in found])) / ceiling,
                    "rank": float(rank.mean()),
                    "alike": float((alike["coadaptation/cosine"] - alike["coadaptation/cosine_shuffled"]).mean()),
                    "removed": removed,
                    "seconds": time.perf_counter() - start,
                }


def kl(best: Tensor, found: Tensor) -> float:
    """sum best log(best / found), `[S, A]` each."""
    return float(torch.xlogy(best, best / found.clamp(min=1e-300)).sum())


def cost_rows() -> Iterator[dict[str, Any]]:
    """Seconds of an update by projection, at the sizes that people train at, in turns."""
    for width, seeds in ((256, 1), (256, 4)):
        generator = torch.Generator().manual_seed(0)
        batch = Batch(
            observations=torch.randn(seeds, 256, 17, generator=generator),
            actions=torch.rand(seeds, 256, 6, generator=generator) * 2 - 1,
            rewards=torch.randn(seeds, 256, generator=generator),
            next_observations=torch.randn(seeds, 256, 17, generator=generator),
            terminations=torch.zeros(seeds, 256, dtype=torch.bool),
            truncations=torch.zeros(seeds, 256, dtype=torch.bool),
        )
        agents = {
            name: ODICE(make_config("odice", projection=name, hidden_sizes=(width, width)), 17, 6, seeds=seeds)
            for name in ("batch", "layer", "sample")
        }

        def run(agent: ODICE, batch: Batch = batch) -> None:
            for _ in range(10):
                agent.update(batch)

        seconds = interleaved(
            {name: lambda a=agent: run(a) for name, agent in agents.items()}, rounds=15, clock=time.process_time
        )
        for name, taken in seconds.items():
            yield {"projection": name, "width": width, "seeds": seeds, "times batch": ratio(taken, seconds["batch"])}


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """kl by coverage, a panel for what V sees."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    kinds = ("one-hot", "coordinates")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), kinds, strict=True):
        for number, name in enumerate(RULES):
            mine = [row for row in rows if row["rule"] == name and row["V sees"] == kind]
            style = {"semi": "k--", "true": "k:"}.get(name, f"C{number % 3}{'-' if 'eta 1' in name else '-.'}")
            axes.errorbar(
                [row["epsilon"] for row in mine],
                [row["kl"] for row in mine],
                [row["standard error"] for row in mine],
                fmt=style + ("" if style[0] == "k" else "o"),
                label=name,
                capsize=2,
            )
        axes.set_title(f"V sees {kind}")
        axes.set_xlabel("epsilon of the behaviour (1: uniform)")
    figure.axes[0].set_ylabel("KL from the exact optimum [nats]")
    figure.axes[0].set_ylim(bottom=0.0)  # of both
    figure.axes[0].legend(fontsize=7, ncols=2, loc="upper left")
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("grid", "cost"))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.only != "grid":
        report("odice_projection_cost", list(cost_rows()))
    if arguments.only != "cost":
        rows = []
        for row in grid_rows(arguments.seeds, arguments.steps):
            print(
                {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )
            rows.append(row)
        report("odice_projection", rows, seeds=arguments.seeds, steps=arguments.steps)
        draw(rows, Path(__file__).parents[1] / "docs" / "images" / "odice-projection.svg")


if __name__ == "__main__":
    main()
