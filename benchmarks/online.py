"""Speed and scores of acting and learning together beside Stable-Baselines3, and return curves of the three error models of a critic.

.venv/bin/python benchmarks/online.py [--rounds 3] [--steps 900] [--sb3-python /tmp/sb3/bin/python]
.venv/bin/python benchmarks/online.py --count --sb3-python /tmp/sb3/bin/python
.venv/bin/python benchmarks/online.py --scores --sb3-python /tmp/sb3/bin/python [--seeds 5] [--only TASK ...]
.venv/bin/python benchmarks/online.py --curves [--seeds 5] [--only TASK ...] [--models MODEL ...]

Speed: two hidden layers of 256, batch 256, one update for every transition, one thread, evaluation off; every case in a process of its own, the cases
taking turns. What counts is the processor time of a transition with its update, files and log lines included: the median over stretches of a hundred
transitions. Stable-Baselines3 runs in an environment of its own (`pip install stable-baselines3==2.9.2`); without one its rows say "not measured". On
AMD processors with AVX-512 our trainer lets oneDNN multiply (rlkit2/nn/matmul.py), which is part of the ratio.

Count: the multiplications of one update's matrix products, as torch counts them, and the share of our update's time that they take.

Scores: the settings of Stable-Baselines3's defaults in both, the mean return of ten episodes of the policy's mode after each quarter, with 95 %
intervals over seeds, and the difference at the end with one. Ours train their seeds at once, theirs one after another. With `--only` the other
tasks keep the rows that they have.

Curves: agents whose values are fitted in the ways of `MODELS`, with networks of two layers of 64; the same returns after each eighth, and
docs/images/online-curves.svg. What is not run (`--only`, `--models`) keeps its rows.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from common import report

from rlkit2.agents.error_model import RELEASED

HERE = Path(__file__).parent
WARMUP, STRETCH = 200, 100
# How values are fitted: by likelihoods, then as the paper's released code has it, then in our default, which leaves them a plain regression
MODELS: dict[str, dict[str, Any]] = {
    "mse": {"critic": "mse"},
    "gaussian": {"critic": "gaussian", "coupling": "ggd"},
    "ggd": {"critic": "ggd", "coupling": "ggd"},
    "ggd, released": RELEASED,
    "ggd, default": {"critic": "ggd"},
}
QUARTERS = ("1/4", "2/4", "3/4", "4/4")
# agent, environment, steps, what of our defaults is not that of Stable-Baselines3; steps are whole rollouts where there are any
SCORED: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "sac-pendulum": ("sac", "Pendulum-v1", 6_000, {"warmup": 100}),
    "ppo-cartpole": ("ppo", "CartPole-v1", 40_960, {"batch_size": 64, "overrides": {"critic_learning_rate": 3e-4}}),
    "ppo-lunarlander": (
        "ppo",
        "LunarLander-v3",
        49_152,
        {"batch_size": 64, "overrides": {"critic_learning_rate": 3e-4}},
    ),
    "sac-hopper": ("sac", "Hopper-v5", 20_000, {"warmup": 100}),
}
NOISE_STD, NOISE_SHAPE = 2.0, 0.8
SMALL: dict[str, Any] = {"hidden_sizes": (64, 64), "critic_learning_rate": 1e-3}
ACTING: dict[str, Any] = {"warmup": 500, "batch_size": 64, "overrides": {**SMALL, "policy_learning_rate": 1e-3}}
CHOOSING: dict[str, Any] = {"warmup": 500, "batch_size": 64, "overrides": {**SMALL, "num_critics": 2}}
CURVES: dict[str, tuple[str, Any, int, dict[str, Any]]] = {
    "pendulum": ("sac", "Pendulum-v1", 5_000, ACTING),
    "noisy": ("sac", lambda: noisy_pendulum(), 5_000, ACTING),
    "hopper": ("sac", "Hopper-v5", 3_000, ACTING),
    "cartpole": ("dqn", "CartPole-v1", 5_000, CHOOSING),
    "lunarlander": ("dqn", "LunarLander-v3", 5_000, CHOOSING),
    "ppo": ("ppo", "CartPole-v1", 16_384, {"batch_size": 64, "overrides": {"num_critics": 3}}),
}


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


def count(python: Path) -> None:
    """Multiplications of an update of SAC in both libraries."""
    from torch.utils.flop_counter import FlopCounterMode

    from rlkit2.agents.sac import SAC, SACConfig
    from rlkit2.testing import random_batch

    torch.set_num_threads(1)
    rows = []
    for env in ("Pendulum-v1", "Hopper-v5"):
        spaces = gymnasium.make(env)
        observations, actions = (
            math.prod(space.shape or ()) for space in (spaces.observation_space, spaces.action_space)
        )
        agent, batch = SAC(SACConfig(), observations, actions), random_batch(1, 256, observations, actions, generator=0)
        for _ in range(10):
            agent.learn(batch)
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_work}) as counter:
            agent.learn(batch)
        program = [str(python), str(HERE / "peer_sb3.py"), "--count", env]
        theirs = float(subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True).stdout)
        mine = counter.get_total_flops() / 2e6
        rows.append(
            {
                "environment": env,
                "rlkit2, millions": mine,
                "Stable-Baselines3, millions": theirs,
                "ratio": theirs / mine,
                "share of our time": products_share(lambda own=(agent, batch): own[0].learn(own[1])),
            }
        )
    report("online_count", rows)


def grouped_work(left: Sequence[int], right: Sequence[int], *_: object, **__: object) -> int:
    """Additions and multiplications of rows `[N, in]` that each meet one of the matrices `[groups, in, out]`."""
    return 2 * math.prod(left) * right[-1]


def products_share(update: Callable[[], object]) -> float:
    """Share of matrix products in the time of an update."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(100):
            update()
    events = profiler.key_averages()
    products = sum(one.self_cpu_time_total for one in events if one.key.endswith("mm"))
    return products / sum(one.self_cpu_time_total for one in events)


def our_returns(
    agent: str, env: Any, steps: int, seeds: int, options: Mapping[str, Any], parts: int = 4
) -> np.ndarray[Any, Any]:
    """Returns of ten episodes of every seed after each quarter (eighth, ...), `[parts, S, 10]`, of the seeds that lasted.

    A seed whose numbers diverge is stopped.
    """
    import rlkit2

    with tempfile.TemporaryDirectory() as folder:
        run = rlkit2.train_online(
            agent, env=env, steps=steps, seeds=seeds, out=folder, eval_every=steps // parts, progress=False, device="cpu", **options
        )  # fmt: skip
        lines = run.evaluations()
    every = {seed: [line["returns"] for line in lines if line["seed"] == seed] for seed in range(seeds)}
    lasted = [own for own in every.values() if len(own) == parts]
    return np.array(lasted).reshape(-1, parts, 10).swapaxes(0, 1)


def their_returns(python: Path, agent: str, env: str, steps: int, seeds: int) -> np.ndarray[Any, Any]:
    """The same of Stable-Baselines3 with its defaults, in episodes that begin as ours do."""
    from rlkit2.evaluation import evaluation_seeds

    found = []
    for seed in range(seeds):
        words = [agent, env, steps, seed, *evaluation_seeds(0, 10)]
        program = [str(python), str(HERE / "peer_sb3.py"), "--scores", *map(str, words)]
        found.append(json.loads(subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True).stdout))
    return np.array(found).swapaxes(0, 1)


def by_quarter(returns: np.ndarray[Any, Any]) -> dict[str, str]:
    """Means with intervals over seeds of returns `[4, S, E]`."""
    from rlkit2.evaluation.statistics import bootstrap

    estimates = [bootstrap([part]) for part in returns]
    return {
        name: f"{one.value:.0f} [{one.low:.0f}, {one.high:.0f}]" for name, one in zip(QUARTERS, estimates, strict=True)
    }


def scores(python: Path, seeds: int, only: Sequence[str]) -> None:
    """Returns beside Stable-Baselines3's at the same budget."""
    from rlkit2.evaluation.statistics import bootstrap

    path = HERE / "results" / "online_scores.json"
    known = json.loads(path.read_text()) if path.exists() else {"rows": [], "returns": {}}
    for task in only or SCORED:
        agent, env, steps, options = SCORED[task]
        mine, theirs = our_returns(agent, env, steps, seeds, options), their_returns(python, agent, env, steps, seeds)
        apart = bootstrap(
            [2.0 * mine[-1], -2.0 * theirs[-1]]
        )  # the mean over both "tasks" is the difference of the means
        name = title(task, seeds)
        rows = [
            {
                "id": task,
                "task": name,
                "library": "rlkit2",
                **by_quarter(mine),
                "difference": f"{apart.value:.0f} [{apart.low:.0f}, {apart.high:.0f}]",
            },
            {"id": task, "task": name, "library": "Stable-Baselines3", **by_quarter(theirs)},
        ]
        known["rows"] = [row for row in known["rows"] if row["id"] != task] + rows
        known["returns"][task] = {"rlkit2": mine.mean(2).tolist(), "Stable-Baselines3": theirs.mean(2).tolist()}
        report("online_scores", known["rows"], returns=known["returns"])


def noisy_pendulum() -> gymnasium.Env[Any, Any]:
    """The pendulum whose rewards, -16 to 0, carry heavy-tailed noise."""
    from rlkit2.envs.noisy_rewards import NoisyRewards

    return NoisyRewards(gymnasium.make("Pendulum-v1"), std=NOISE_STD, shape=NOISE_SHAPE)


def curves(seeds: int, only: Sequence[str], models: Sequence[str]) -> None:
    """Returns of agents whose values are fitted in several ways."""
    path = HERE / "results" / "online_curves.json"
    known = json.loads(path.read_text()) if path.exists() else {"rows": [], "returns": {}}
    for task in only or CURVES:
        agent, env, steps, options = CURVES[task]
        for model in models:
            begun = time.process_time()
            overrides = {**options["overrides"], **MODELS[model]}
            returns = our_returns(agent, env, steps, seeds, {**options, "overrides": overrides}, parts=8)
            row = {"id": task, "task": title(task, seeds), "critic": model}
            if returns.shape[1]:
                row |= by_quarter(returns[1::2])
                known["returns"].setdefault(task, {})[model] = returns.tolist()
            if returns.shape[1] < seeds:
                row["seeds that lasted"] = returns.shape[1]
            known["rows"] = [old for old in known["rows"] if (old["id"], old["critic"]) != (task, model)] + [row]
            known["rows"].sort(key=lambda row: (list(CURVES).index(row["id"]), list(MODELS).index(row["critic"])))
            report("online_curves", known["rows"], returns=known["returns"])
            sys.stderr.write(f"{task}, {model}: {time.process_time() - begun:.0f} s of processor time\n")


def title(task: str, seeds: int) -> str:
    agent, env, steps, _ = {**SCORED, **CURVES}[task]
    name = env if isinstance(env, str) else "Pendulum-v1 with noise on its rewards"
    return f"{agent} on {name}, {steps:,} steps, {seeds} seeds"


def draw() -> None:
    """The curves of `results/online_curves.json` as docs/images/online-curves.svg: a panel for every task, means and intervals over seeds."""
    import matplotlib
    from matplotlib.figure import Figure

    from rlkit2.evaluation.statistics import bootstrap

    found = json.loads((HERE / "results" / "online_curves.json").read_text())["returns"]
    figure = Figure(figsize=(9, 2.9 * -(-len(found) // 3)), layout="constrained")
    panels = np.ravel(figure.subplots(-(-len(found) // 3), 3, squeeze=False))
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    for task, axes in zip((name for name in CURVES if name in found), panels, strict=False):
        agent, env, steps, _ = CURVES[task]
        for number, model in enumerate(MODELS):
            if model not in found[task]:
                continue
            returns = np.array(found[task][model])
            at = steps * np.arange(1, len(returns) + 1) // len(returns)
            estimates = [bootstrap([part]) for part in returns]
            ends = np.array([[one.low, one.high] for one in estimates]).T
            axes.plot(at, [one.value for one in estimates], f"C{number}", marker=".", label=model)
            axes.fill_between(at, *ends, color=f"C{number}", alpha=0.15, linewidth=0)
        seen = np.concatenate([np.array(one).mean(-1).ravel() for one in found[task].values()])
        room = 0.1 * np.ptp(seen)
        axes.set_ylim(seen.min() - room, seen.max() + room)  # intervals of five seeds reach beyond what there is
        axes.set_title(f"{agent}, {env if isinstance(env, str) else 'Pendulum-v1, noisy rewards'}", fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("return")
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines), fontsize=8, frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": "online-curves"}):
        figure.savefig(HERE.parent / "docs" / "images" / "online-curves.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--sb3-python", type=Path, default=None)
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--scores", action="store_true")
    parser.add_argument("--only", nargs="+", choices=[*SCORED, *CURVES], default=[])
    parser.add_argument("--curves", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["mse", "gaussian", "ggd"])
    parser.add_argument("--case", nargs=3, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        ours(options.case[0], int(options.case[1]), int(options.case[2]))
    elif (options.scores or options.count) and options.sb3_python is None:
        parser.error("--scores and --count need --sb3-python")
    elif options.count:
        count(options.sb3_python)
    elif options.scores:
        scores(options.sb3_python, options.seeds, options.only)
    elif options.curves:
        curves(options.seeds, options.only, options.models)
        draw()
    else:
        speed(options.sb3_python, options.rounds, options.steps)


if __name__ == "__main__":
    main()
