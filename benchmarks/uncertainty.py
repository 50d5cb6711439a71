"""Speed of ensembles and of the noise model: `python benchmarks/uncertainty.py [--rounds 7] [--updates 10] [--large]`.

Every case is one update on hopper-like shapes (11 observations, 3 actions), batch 256, one thread, cases in turn. "plain" is the style of most
single-seed libraries (`benchmarks/plain/sacn.py`). `--large` adds N = 50; `--cpu-time` counts the process's own time, for a machine that others use;
`--default-products` leaves our products to torch's default library.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from common import interleaved, ratio, report
from plain.sacn import PlainSACN

from rlkit2.agents.edac import EDAC, EDACConfig
from rlkit2.agents.iql import IQL, IQLConfig
from rlkit2.agents.sacn import SACN, SACNConfig
from rlkit2.data import Batch
from rlkit2.nn.matmul import SMALLEST_WORK, fast_matmul

OBS, ACT, ROWS = 11, 3, 256


def batch() -> dict[str, torch.Tensor]:
    """Random transitions `[B, ...]`."""
    torch.manual_seed(0)
    return {
        "observations": torch.randn(ROWS, OBS),
        "actions": torch.rand(ROWS, ACT) * 2 - 1,
        "rewards": torch.randn(ROWS),
        "next_observations": torch.randn(ROWS, OBS),
        "terminations": torch.zeros(ROWS),
    }


def ours(agent: Any, updates: int, work: int) -> Callable[[], None]:
    """A case that runs updates of an agent, with the products that the trainer chooses on this machine."""
    fields = {name: value.unsqueeze(0) for name, value in batch().items()}
    data = Batch(**fields, truncations=torch.zeros(1, ROWS))

    def case() -> None:
        with fast_matmul(torch.device("cpu"), work):
            for _ in range(updates):
                agent.update(data)

    return case


def plain(members: int, eta: float, updates: int, monitor: bool = True) -> Callable[[], None]:
    """The same by plain autograd."""
    agent, data = PlainSACN(OBS, ACT, members, eta=eta, monitor=monitor), batch()

    def case() -> None:
        for _ in range(updates):
            agent.update(**data)

    return case


def critic_step(critic: str, updates: int, work: int, members: int = 10) -> Callable[[], None]:
    """The critics' step alone, N = 10, 256 x 256, with fixed targets."""
    agent = IQL(IQLConfig(critic=critic, num_critics=members), OBS, ACT)
    fields = {name: value.unsqueeze(0) for name, value in batch().items()}
    data = agent.normalize(Batch(**fields, truncations=torch.zeros(1, ROWS)))
    targets = torch.randn(1, ROWS)

    def case() -> None:
        with fast_matmul(torch.device("cpu"), work):
            for _ in range(updates):
                agent.fit_critic(data, targets)

    return case


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--default-products", action="store_true")
    options = parser.parse_args()
    work = 0 if options.default_products else SMALLEST_WORK
    torch.set_num_threads(1)
    n = options.updates
    cases: dict[str, Callable[[], None]] = {}
    for members in (10, 50) if options.large else (10,):
        count = n if members == 10 else max(1, n // 5)
        cases[f"sacn N={members} plain"] = plain(members, 0.0, count)
        cases[f"sacn N={members}"] = ours(SACN(SACNConfig(num_critics=members), OBS, ACT), count, work)
    cases["sacn N=10 plain, no monitor"] = plain(10, 0.0, n, monitor=False)
    cases["sacn N=10 ggd"] = ours(SACN(SACNConfig(critic="ggd"), OBS, ACT), n, work)
    cases["edac N=10 plain"] = plain(10, 1.0, n)
    cases["edac N=10"] = ours(EDAC(EDACConfig(), OBS, ACT), n, work)
    for critic in ("mse", "gaussian", "ggd"):
        cases[f"critic step N=10 256x256 {critic}"] = critic_step(critic, n, work)
    clock = time.process_time if options.cpu_time else time.perf_counter
    seconds = interleaved(cases, options.rounds, clock=clock)
    rows = []
    for name, times in seconds.items():
        count = max(1, n // 5) if "N=50" in name else n
        row: dict[str, Any] = {"case": name, "ms": 1e3 * sorted(times)[len(times) // 2] / count}
        if f"{name} plain" in seconds:
            row["plain / ours"] = ratio(seconds[f"{name} plain"], times)
        if name.startswith("critic step") and not name.endswith("mse"):
            row["over mse"] = ratio(times, seconds["critic step N=10 256x256 mse"])
        if name == "sacn N=10 ggd":
            row["plain / ours"] = ratio(seconds["sacn N=10 plain"], times)
        if name == "sacn N=10 plain, no monitor":
            row["plain / ours"] = ratio(times, seconds["sacn N=10"])
        rows.append(row)
    name = "uncertainty-default-products" if options.default_products else "uncertainty"
    report(name, rows, rounds=options.rounds, updates=n, clock=clock.__name__)


if __name__ == "__main__":
    main()
