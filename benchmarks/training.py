"""Speed of training against peers: ratios of CPU or wall time, every case in a process of its own, the cases taking turns.

.venv/bin/python benchmarks/training.py [--rounds 7] [--updates 40] [--peers-python /tmp/peers/bin/python]

Hopper's sizes (observations 11, actions 3), batch 256, two hidden layers of 256, sampling included, one thread. d3rlpy runs in an environment of its
own (`requirements-peers.txt` says how to make it); without one its rows say "not measured". One-thread rows compare the CPU time of an update, the
lowest tenth of each round: what the update takes when no other process of the machine has just emptied the caches. The row on two cores compares wall
time. On AMD processors with AVX-512 the trainer lets oneDNN multiply (rlkit2.nn.matmul.py); the rows "default products" leave that to MKL.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from common import report
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).parent
ROWS, OBSERVATIONS, ACTIONS, BATCH = 100_000, 11, 3, 256
SEEDS, GROUP = 16, 4
SETTINGS = ExitStack()  # of the process, while a case runs in it
CONFIGS: dict[str, dict[str, Any]] = {
    "odice_released": {"value_layer_norm": False, "policy_hidden_sizes": (256, 256)},
    "iql": {},
    "td3bc": {},
}


def data() -> tuple[torch.Tensor, ...]:
    """Observations, actions, rewards, next observations and terminations at random."""
    generator = torch.Generator().manual_seed(0)
    s, following = (torch.randn((ROWS, OBSERVATIONS), generator=generator) for _ in range(2))
    actions = torch.rand((ROWS, ACTIONS), generator=generator) * 2.0 - 1.0
    return s, actions, torch.randn(ROWS, generator=generator), following, torch.arange(ROWS) % 1000 == 999


def choose_products() -> None:
    """Multiply by the library that the trainer chooses on this machine, until `SETTINGS` closes."""
    from rlkit2.nn.matmul import SMALLEST_WORK, fast_matmul

    SETTINGS.enter_context(fast_matmul(torch.device("cpu"), SMALLEST_WORK))


def ours(name: str, seeds: list[int], *, products: bool = True) -> Callable[[int], None]:
    """rlkit2's update as its trainer runs it, for these seeds in one agent; without `products` by torch's default library."""
    from rlkit2.agents import agent_class, make_config
    from rlkit2.data import dataset_from_arrays
    from rlkit2.training.groups import BatchIndices
    from rlkit2.training.memory import keep_freed_memory

    keep_freed_memory()
    if products:
        choose_products()
    s, a, r, following, ends = data()
    dataset = dataset_from_arrays(s, a, r, following, ends, torch.zeros_like(ends))
    agent = agent_class(name)(make_config(name, **CONFIGS[name]), OBSERVATIONS, ACTIONS, seeds=seeds)
    indices = BatchIndices(dataset, agent.seeds, BATCH)

    def run(updates: int) -> None:
        for _ in range(updates):
            agent.update(dataset.gather(indices.next()))

    return run


def two_threads() -> Callable[[int], None]:
    """Sixteen seeds in groups of four on two Python threads, as the trainer lays them out on two cores."""
    groups = [ours("odice_released", list(range(first, first + GROUP))) for first in range(0, SEEDS, GROUP)]

    def work(group: Callable[[int], None], updates: int) -> None:
        torch.set_num_threads(1)
        group(updates)

    def run(updates: int) -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, groups, [updates] * len(groups)))

    return run


def plain(*, products: bool = False) -> Callable[[int], None]:
    """The plain O-DICE with the sampling that goes with it: one indexing a field."""
    from plain.odice import PlainODICE

    if products:
        choose_products()
    s, a, r, following, ends = data()
    done = ends.float()
    agent = PlainODICE(OBSERVATIONS, ACTIONS)

    def run(updates: int) -> None:
        for _ in range(updates):
            rows = torch.randint(ROWS, (BATCH,))
            agent.update(s[rows], a[rows], r[rows], following[rows], done[rows])

    return run


CASES: dict[str, Callable[[], Callable[[int], None]]] = {
    "odice": lambda: ours("odice_released", [0]),
    "odice x 4": lambda: ours("odice_released", list(range(GROUP))),
    "odice x 16": lambda: ours("odice_released", list(range(SEEDS))),
    "odice x 16, two threads": two_threads,
    "odice, default products": lambda: ours("odice_released", [0], products=False),
    "plain odice": plain,
    "plain odice, fast products": lambda: plain(products=True),
    "iql": lambda: ours("iql", [0]),
    "iql, default products": lambda: ours("iql", [0], products=False),
    "td3bc": lambda: ours("td3bc", [0]),
    "td3bc, default products": lambda: ours("td3bc", [0], products=False),
}


def work(name: str) -> None:
    """A case's process: read a number of updates, answer with the wall seconds of all and the CPU seconds of one (lowest tenth)."""
    torch.set_num_threads(1)
    with SETTINGS:
        run = CASES[name]()
        print("ready", flush=True)
        for line in sys.stdin:
            marks, wall = [time.process_time()], time.perf_counter()
            for _ in range(int(line)):
                run(1)
                marks.append(time.process_time())
            print(time.perf_counter() - wall, lowest_tenth(marks), flush=True)


def lowest_tenth(marks: list[float]) -> float:
    """The tenth percentile of the differences of a clock's readings."""
    steps = sorted(after - before for before, after in itertools.pairwise(marks))
    return steps[len(steps) // 10]


class Case:
    """The other end of `work`."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE)
        while (line := self.read()) != "ready":
            print(line)  # what a peer says at its start

    def read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(map(str, self.process.args))} ended")
        return line.strip()

    def run(self, updates: int) -> tuple[float, float]:
        """Wall seconds of that many updates and CPU seconds of one."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{updates}\n")
        self.process.stdin.flush()
        wall, cpu = self.read().split()
        return float(wall), float(cpu)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Operations(TorchDispatchMode):
    """Counts dispatched operations without views, detachments and the optimiser's profiling marks."""

    count = 0
    waits = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(operation)
        if not (operation.is_view or name.startswith("profiler") or name.split(".")[1] in ("detach", "alias")):
            self.count += 1
        self.waits += name.split(".")[1] in ("_local_scalar_dense", "nonzero", "equal")
        return operation(*args, **(kwargs or {}))


def structure(name: str) -> dict[str, Any]:
    """Host synchronisations, operations and MFLOP of an update (mean of two)."""
    with SETTINGS:
        run = CASES[name]()
        run(4)
        with Operations() as seen:
            run(2)
        with FlopCounterMode(display=False) as flops:
            run(2)
    return {
        "case": name,
        "host synchronisations": seen.waits // 2,
        "operations with sampling": seen.count // 2,
        "MFLOP": flops.get_total_flops() / 2e6,
    }


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over rounds of slow / fast."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--updates", type=int, default=40, help="updates a round of a one-seed case")
    parser.add_argument("--peers-python", help="python of the environment made from requirements-peers.txt")
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return

    me = [sys.executable, str(HERE / "training.py"), "--worker"]
    commands = {name: [*me, name] for name in CASES}
    if options.peers_python:
        for name in ("iql", "td3bc"):
            commands[f"d3rlpy {name}"] = [options.peers_python, str(HERE / "peer_d3rlpy.py"), name]
    shares = {"odice x 4": GROUP, "odice x 16": SEEDS, "odice x 16, two threads": SEEDS}
    cases = {name: Case(command) for name, command in commands.items()}
    wall: dict[str, list[float]] = {name: [] for name in cases}
    cpu: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(-1, options.rounds):
        for name, case in cases.items():
            updates = max(4, options.updates // shares.get(name, 1))
            seconds = case.run(updates)
            if turn >= 0:
                wall[name].append(1e3 * seconds[0] / updates / shares.get(name, 1))
                cpu[name].append(1e3 * seconds[1] / shares.get(name, 1))
    for case in cases.values():
        case.close()

    def row(
        what: str, slow: str, fast: str, times: dict[str, list[float]], gate: float | None, aim: float | None
    ) -> dict[str, Any]:
        facts = {"what": what, "ratio": "not measured: see requirements-peers.txt"}
        limits = {} if gate is None else {"gate": gate, "aim": aim}
        if slow not in times:
            return facts | limits
        found = median_ratio(times[slow], times[fast])
        return {
            "what": what,
            "ratio": found,
            **limits,
            **({} if gate is None else {"holds": found >= gate}),
            f"ms ({'CPU' if times is cpu else 'wall'})": f"{statistics.median(times[slow]):.2f} / {statistics.median(times[fast]):.2f}",
        }

    rows = [
        row("O-DICE, orthogonal, against plain autograd", "plain odice", "odice", cpu, 1.35, 1.55),
        row("the same, both by torch's default products", "plain odice", "odice, default products", cpu, None, None),
        row("the same, both by oneDNN's", "plain odice, fast products", "odice", cpu, None, None),
        row("IQL against d3rlpy 2.8.1", "d3rlpy iql", "iql", cpu, 1.7, 2.0),
        row("the same by torch's default products", "d3rlpy iql", "iql, default products", cpu, None, None),
        row("TD3+BC against d3rlpy 2.8.1", "d3rlpy td3bc", "td3bc", cpu, 1.6, 1.9),
        row("the same by torch's default products", "d3rlpy td3bc", "td3bc, default products", cpu, None, None),
        row(
            "16 seeds on two cores against 16 plain runs in turn",
            "plain odice",
            "odice x 16, two threads",
            wall,
            2.0,
            2.5,
        ),
        row("1 seed against each of 4 stacked (a group of the trainer)", "odice", "odice x 4", cpu, 0.9, 0.97),
        row("1 seed against each of 16 stacked", "odice", "odice x 16", cpu, 0.9, 0.97),
    ]
    report(
        "training",
        rows,
        structure=[structure(name) for name in ("odice", "iql", "td3bc", "plain odice")],
        milliseconds_per_update_and_seed={"wall": wall, "cpu": cpu},
        updates_per_round=options.updates,
    )
    for line in [structure(name) for name in ("odice", "iql", "plain odice")]:
        print(line)


if __name__ == "__main__":
    main()
