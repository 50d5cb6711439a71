"""Speed of acting and learning together beside Stable-Baselines3's SAC, and return curves of the three error models of a critic.

.venv/bin/python benchmarks/online.py [--rounds 3] [--steps 900] [--sb3-python /tmp/sb3/bin/python]
.venv/bin/python benchmarks/online.py --curves [--seeds 5]

Speed: two hidden layers of 256, batch 256, one update for every transition, one thread, evaluation off; every case in a process of its own, the cases
taking turns. What counts is the processor time of a transition with its update, files and log lines included: the median over stretches of a hundred
transitions. Stable-Baselines3 runs in an environment of its own (`pip install stable-baselines3==2.9.2`); without one its rows say "not measured". On
AMD processors with AVX-512 our trainer lets oneDNN multiply (rlkit2/nn/matmul.py), which is part of the ratio.

Curves: SAC on the pendulum and DQN on the cart with critics fitted by squared error, Gaussian and generalized Gaussian likelihood; the mean return
of ten episodes of the policy's mode after each quarter of a short run, with 95 % intervals over seeds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import report

HERE = Path(__file__).parent
WARMUP, STRETCH = 200, 100
MODELS = ("mse", "gaussian", "ggd")


def ours(env: str, envs: int, steps: int) -> None:
    """Print the processor seconds of every stretch of transitions, updates included."""
    import rlkit2
    from rlkit2.training.progress import Progress

    class Clock(Progress):
        def log(self, lines: Sequence[Mapping[str, Any]]) -> None:
            times.append(time.process_time())

    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        rlkit2.train_online(
            "sac", env=env, steps=WARMUP + steps, warmup=WARMUP, num_envs=envs, out=folder, progress=Clock(None), eval_every=0,
            log_every=STRETCH, checkpoint_every=WARMUP + steps, device="cpu",
        )  # fmt: skip
    sys.stdout.write(" ".join(map(str, np.diff(times[WARMUP // STRETCH :]))) + "\n")


def speed(python: Path | None, rounds: int, steps: int) -> None:
    """Ratios at one and at four environments, on a cheap and on a simulated one."""
    cases = [(env, envs) for env in ("Pendulum-v1", "Hopper-v5") for envs in (1, 4)]
    found: dict[tuple[str, str, int], list[float]] = {}
    for _ in range(rounds):
        for env, envs in cases:
            words = [env, str(envs), str(steps)]
            programs = {"rlkit2": [sys.executable, str(HERE / "online.py"), "--case", *words]}
            if python is not None:
                programs["sb3"] = [str(python), str(HERE / "peer_sb3.py"), *words]
            for name, program in programs.items():
                done = subprocess.run(program, capture_output=True, text=True, check=True)
                stretches = [float(word) for word in done.stdout.split()]
                found.setdefault((name, env, envs), []).append(1e3 * statistics.median(stretches) / STRETCH)
    rows = []
    for env, envs in cases:
        mine, theirs = found[("rlkit2", env, envs)], found.get(("sb3", env, envs))
        rows.append(
            {
                "environment": f"{env} x {envs}",
                "rlkit2, ms": statistics.median(mine),
                "Stable-Baselines3, ms": statistics.median(theirs) if theirs else "not measured",
                "ratio": statistics.median(b / a for a, b in zip(mine, theirs, strict=True))
                if theirs
                else "not measured",
            }
        )
    report("online", rows, rounds=rounds, steps=steps)


def curves(seeds: int) -> None:
    """Returns of the three error models."""
    import rlkit2
    from rlkit2.evaluation.statistics import bootstrap

    small = {"hidden_sizes": (64, 64), "critic_learning_rate": 1e-3}
    tasks = {
        "Pendulum-v1": ("sac", 2000, {**small, "policy_learning_rate": 1e-3}),
        "CartPole-v1": ("dqn", 3000, {**small, "num_critics": 2}),
    }
    rows = []
    for env, (agent, steps, overrides) in tasks.items():
        for model in MODELS:
            with tempfile.TemporaryDirectory() as folder:
                run = rlkit2.train_online(
                    agent, env=env, steps=steps, warmup=500, seeds=seeds, overrides={**overrides, "critic": model}, out=folder,
                    eval_every=steps // 4, batch_size=64, progress=False, device="cpu",
                )  # fmt: skip
                lines = run.evaluations()
            row: dict[str, Any] = {"task": f"{agent} on {env}, {steps} steps", "critic": model}
            for step in sorted({line["step"] for line in lines}):
                found = bootstrap([np.array([line["returns"] for line in lines if line["step"] == step])])
                row[f"{4 * step // steps}/4"] = f"{found.value:.0f} [{found.low:.0f}, {found.high:.0f}]"
            rows.append(row)
    report("online_curves", rows, seeds=seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--sb3-python", type=Path, default=None)
    parser.add_argument("--curves", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--case", nargs=3, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        ours(options.case[0], int(options.case[1]), int(options.case[2]))
    elif options.curves:
        curves(options.seeds)
    else:
        speed(options.sb3_python, options.rounds, options.steps)


if __name__ == "__main__":
    main()
