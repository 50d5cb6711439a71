"""Which library should multiply float32 matrices on this CPU: `python benchmarks/matmul.py [--rounds 7]`.

Speed and error of one product by torch's default library and by oneDNN (torch's precision "medium"), and the O-DICE update with either, by width,
rows and seeds: where `rlkit2.nn.matmul.SMALLEST_WORK` comes from. One thread, in turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import interleaved, ratio, report

from rlkit2.agents import make_config
from rlkit2.agents.odice import ODICE
from rlkit2.data import Batch
from rlkit2.nn.matmul import SMALLEST_WORK, onednn_is_better

OBSERVATIONS, ACTIONS = 11, 3
LIBRARIES = {"default": "highest", "oneDNN": "medium"}
SIZES = [
    (32, 64, 1),
    (64, 256, 1),
    (64, 256, 2),
    (64, 256, 4),
    (128, 256, 1),
    (256, 64, 1),
    (256, 256, 1),
    (256, 256, 4),
]


def by(library: str, case: Callable[[], Any], times: int = 1) -> Callable[[], None]:
    """The case, so many times, with the products of a library."""

    def run() -> None:
        torch.set_float32_matmul_precision(LIBRARIES[library])
        for _ in range(times):
            case()
        torch.set_float32_matmul_precision("highest")

    return run


def update(width: int, rows: int, seeds: int) -> Callable[[], Any]:
    """An O-DICE update on random transitions."""
    config = make_config(
        "odice_released", value_layer_norm=False, value_hidden_sizes=(width,) * 2, policy_hidden_sizes=(width,) * 2
    )
    agent = ODICE(config, OBSERVATIONS, ACTIONS, seeds=seeds)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn((seeds, rows, *shape), generator=generator)

    zeros = torch.zeros((seeds, rows))
    batch = Batch(
        observations=draw(OBSERVATIONS),
        actions=draw(ACTIONS).tanh(),
        rewards=draw(),
        next_observations=draw(OBSERVATIONS),
        terminations=zeros,
        truncations=zeros,
    )
    return lambda: agent.update(batch)


def errors(left: torch.Tensor, right: torch.Tensor) -> dict[str, float]:
    """Largest error of a product against float64, as a share of the sum of its terms' sizes."""
    exact, sizes = left.double() @ right.double(), left.double().abs() @ right.double().abs()
    found = {}
    for library in LIBRARIES:
        torch.set_float32_matmul_precision(LIBRARIES[library])
        found[library] = left @ right
    torch.set_float32_matmul_precision("highest")
    found["bfloat16 factors"] = left.bfloat16().float() @ right.bfloat16().float()
    return {name: float(((product - exact).abs() / sizes).max()) for name, product in found.items()}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    left, right = torch.randn((512, 256)), torch.randn((256, 256))
    cases = {library: by(library, lambda: left @ right, 50) for library in LIBRARIES}
    seconds = interleaved(cases, rounds)
    speeds = {name: 2e-9 * 50 * 512 * 256 * 256 / sorted(times)[rounds // 2] for name, times in seconds.items()}
    rows = []
    for size in SIZES:
        width, batch, seeds = size
        case = update(*size)
        times = max(4, 2**23 // (width * width * batch * seeds) * 4)
        seconds = interleaved({library: by(library, case, times) for library in LIBRARIES}, rounds)
        work = 2 * seeds * width * width * batch  # twin V
        rows.append(
            {
                "width": width,
                "rows": batch,
                "seeds": seeds,
                "work": work,
                "default / oneDNN": ratio(seconds["default"], seconds["oneDNN"]),
                "chosen": "oneDNN" if work >= SMALLEST_WORK and onednn_is_better() else "default",
            }
        )
    report("matmul", rows, gigaflops=speeds, largest_error=errors(left, right))
    print("GFLOP/s:", {name: round(speed, 1) for name, speed in speeds.items()})
    print("largest error:", {name: f"{error:.1e}" for name, error in errors(left, right).items()})


if __name__ == "__main__":
    main()
