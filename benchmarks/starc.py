"""Speed and memory of reward distances; each line is measured in one process, peaks in a child of its own.

python benchmarks/starc.py            # everything
python benchmarks/starc.py --only tabular matrix
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from common import interleaved, report

from rlkit2.data import Batch, TransitionDataset, dataset_from_arrays
from rlkit2.rewards import SampledStarc, TabularMDP, canonicalize, epic_distance, starc_matrix
from rlkit2.rewards.sampled.features import FourierFeatures
from rlkit2.studies.starc_study import StudyConfig, run_study

Row = dict[str, Any]


def megabytes() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Peak:
    """The largest resident memory while it runs beyond that at its start, in MB, looked at every 2 ms."""

    def __enter__(self) -> Peak:
        self._done, self._start = threading.Event(), self._resident()
        self._most = self._start
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.more = (self._most - self._start) / 2**20

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._most = max(self._most, self._resident())

    @staticmethod
    def _resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def once(case: Callable[[], Any]) -> tuple[float, float]:
    """Wall and processor seconds of one run."""
    wall, cpu = time.perf_counter(), time.process_time()
    case()
    return time.perf_counter() - wall, time.process_time() - cpu


def sweeps(reward: Any, mdp: TabularMDP, tol: float = 1e-8) -> np.ndarray[Any, Any]:
    """The advantage by value sweeps until the change is below `tol`, one reward at a time, as the released research code does it."""
    tau = mdp.dense.numpy()
    mean, values = (tau * reward).sum(-1), np.zeros(mdp.num_states)
    while True:
        new = (mean + mdp.discount * tau @ values).mean(1)
        change, values = np.abs(new - values).max(), new
        if change < tol:
            return np.asarray(mean + mdp.discount * tau @ values - values[:, None])


def tabular() -> list[Row]:
    """val of 64 rewards [32, 4, 32] in one process, against sweeps; target: under 0.15 ms per reward."""
    rng = np.random.default_rng(0)
    mdp = TabularMDP(rng.dirichlet(np.ones(32), (32, 4)), 0.95)
    rewards = rng.normal(size=(64, 32, 4, 32))
    seconds = interleaved(
        {
            "together": lambda: canonicalize(rewards, mdp),
            "one by one": lambda: [canonicalize(reward, mdp) for reward in rewards],
            "sweeps": lambda: [sweeps(reward, mdp) for reward in rewards],
        },
        rounds=15,
    )
    best = {name: min(values) / 64 for name, values in seconds.items()}
    np.testing.assert_allclose(canonicalize(rewards[0], mdp), sweeps(rewards[0], mdp), atol=1e-6)
    return [
        {
            "what": f"val, S=32, A=4, 64 rewards {name}",
            "ms per reward": 1e3 * value,
            "times sweeps": best["sweeps"] / value,
        }
        for name, value in best.items()
    ]


def matrix() -> list[Row]:
    """All distances of 256 rewards with S=1000, A=10; target: under 10 s and 1.5 GB."""
    rng = np.random.default_rng(0)
    tau = rng.random((1000, 10, 1000))
    tau /= tau.sum(-1, keepdims=True)
    mdp = TabularMDP(torch.from_numpy(tau), 0.95)
    wall, cpu = once(lambda: starc_matrix((rng.normal(size=(1000, 10)) for _ in range(256)), mdp))
    return [{"what": "matrix of 256 rewards, S=1000, A=10", "s": wall, "cpu s": cpu, "peak MB": megabytes()}]


def plain_gram(rewards: Any, tau: Any, discount: float) -> Any:
    """All distances of `rewards [K, S, A]` as one writes them down in NumPy: advantages of the uniform policy, unit vectors, one Gram matrix, which
    loses half the digits of small distances."""
    values = np.linalg.solve(np.eye(len(tau)) - discount * tau.mean(1), rewards.mean(2).T).T
    forms = rewards + discount * (values @ tau.reshape(-1, len(tau)).T).reshape(rewards.shape) - values[..., None]
    rows = forms.reshape(len(forms), -1)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return np.sqrt(np.maximum(2 - 2 * rows @ rows.T, 0))


def many() -> list[Row]:
    """All distances of 1000 rewards with S=1000, A=4, far apart and in ten tight clusters, against a plain Gram matrix; target: under 1.5 times."""
    rng = np.random.default_rng(0)
    tau = rng.random((1000, 4, 1000))
    tau /= tau.sum(-1, keepdims=True)
    mdp = TabularMDP(torch.from_numpy(tau), 0.95)
    far = rng.normal(size=(1000, 1000, 4))
    rows = []
    for name, rewards in (("far apart", far), ("in ten clusters", far[np.arange(1000) % 10] + 1e-6 * far)):
        cases = {"ours": lambda: starc_matrix(rewards, mdp), "plain": lambda: plain_gram(rewards, tau, 0.95)}  # noqa: B023
        seconds = interleaved(cases, rounds=2, clock=time.process_time)
        found, plain = starc_matrix(rewards, mdp).values, plain_gram(rewards, tau, 0.95)
        some = np.arange(0, 1000, 25)
        forms = np.stack([canonicalize(rewards[k], mdp).ravel() for k in some])
        forms /= np.linalg.norm(forms, axis=1, keepdims=True)
        exact = np.linalg.norm(forms[:, None] - forms[None], axis=-1) + np.eye(len(some))
        errors = [
            float(np.abs((each[np.ix_(some, some)] + np.eye(len(some))) / exact - 1).max()) for each in (found, plain)
        ]
        rows.append(
            {
                "what": f"matrix of 1000 rewards {name}, S=1000, A=4",
                "cpu s": min(seconds["ours"]),
                "plain Gram matrix, cpu s": min(seconds["plain"]),
                "times": min(seconds["ours"]) / min(seconds["plain"]),
                "relative error": errors[0],
                "of the plain one": errors[1],
            }
        )
    return rows


def plain_epic(a: Any, b: Any, discount: float) -> float:
    """EPIC as its definition reads, in NumPy and without a check of anything."""

    def canonical(reward: Any) -> Any:
        mean = reward.mean((1, 2))
        return reward + discount * mean[None, None] - mean[:, None, None] - discount * mean.mean()

    x, y = canonical(a), canonical(b)
    x, y = x - x.mean(), y - y.mean()
    return float(0.5 * np.linalg.norm(x / np.linalg.norm(x) - y / np.linalg.norm(y)))


def epic() -> list[Row]:
    """One EPIC distance, S=32, A=4; target: level with the plain formula."""
    rng = np.random.default_rng(0)
    mdp = TabularMDP(rng.dirichlet(np.ones(32), (32, 4)), 0.95)
    a, b = rng.normal(size=(2, 32, 4, 32))
    assert abs(epic_distance(a, b, mdp) - plain_epic(a, b, 0.95)) < 1e-14

    def often(case: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(200):
                case()

        return run

    cases = {
        "ours": often(lambda: epic_distance(a, b, mdp)),
        "plain": often(lambda: plain_epic(a, b, 0.95)),
    }
    seconds = interleaved(cases, rounds=25, clock=time.process_time)
    ours, plain = (min(seconds[name]) / 200 for name in ("ours", "plain"))
    return [
        {
            "what": "one EPIC distance, S=32, A=4",
            "ms": 1e3 * ours,
            "plain NumPy, ms": 1e3 * plain,
            "times": ours / plain,
        }
    ]


def grid(side: int) -> sp.csr_array:
    """A torus of side * side states with four slippery moves."""
    states = side * side
    x, y = np.divmod(np.arange(states), side)
    moves = [((x + dx) % side) * side + (y + dy) % side for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1))]
    rows = np.concatenate([np.arange(states) * 4 + a for a in range(4) for _ in range(4)])
    columns = np.concatenate([moves[b] for _ in range(4) for b in range(4)])
    chances = np.concatenate([np.full(states, 0.7 if a == b else 0.1) for a in range(4) for b in range(4)])
    return sp.csr_array(sp.coo_array((chances, (rows, columns)), shape=(4 * states, states)))


def sparse() -> list[Row]:
    """val of 8 rewards on 100,489 states with local moves, with the largest residual; target: under 60 s."""
    side, discount, rng = 317, 0.99, np.random.default_rng(0)
    mdp = TabularMDP(grid(side), discount)
    rewards = [rng.normal(size=(side * side, 4)) for _ in range(8)]
    forms: list[Any] = []
    wall, cpu = once(lambda: forms.extend(canonicalize(reward, mdp) for reward in rewards))
    residual = 0.0
    for reward, form in zip(rewards, forms, strict=True):
        expected = torch.from_numpy(reward)
        values = mdp.values(expected, mdp.uniform_policy)
        left = expected.mean(1) + discount * mdp.dynamics.next_mean(values).mean(1) - values
        residual = max(residual, float(left.abs().max() / expected.abs().max()), float(np.abs(form.mean(1)).max()))
    return [
        {
            "what": f"val of 8 rewards, {side * side} states, sparse",
            "s": wall,
            "cpu s": cpu,
            "residual": residual,
            "peak MB": megabytes(),
        }
    ]


def study() -> list[Row]:
    """49,152 comparisons with 43 metrics on two cores; target: under 150 s."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        result = run_study(StudyConfig(seed=42), Path(folder) / "study", workers=2)
        wall = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    count = len(result.comparisons.regret)
    return [
        {
            "what": f"study, {count} comparisons, 43 metrics, 2 workers",
            "s": wall,
            "cpu s": used.ru_utime + used.ru_stime,
        }
    ]


def recorded(transitions: int) -> TransitionDataset:
    """Transitions of a linear system with 11 observations and 3 actions, 1000 to an episode, as a data set in memory."""
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(transitions, 11)).astype(np.float32)
    actions = rng.uniform(-1, 1, size=(transitions, 3)).astype(np.float32)
    following = 0.9 * observations + 0.1 * rng.normal(size=(transitions, 11)).astype(np.float32)
    following[:, :3] += 0.3 * actions
    truncated = np.arange(1, transitions + 1) % 1000 == 0
    nothing = np.zeros(transitions, bool)
    return dataset_from_arrays(observations, actions, following[:, 0], following, nothing, truncated)


REWARDS: dict[str, Callable[..., Any]] = {
    "first": lambda o, a, n, t: n[:, 0],
    "second": lambda o, a, n, t: n[:, 1],
    "quadratic": lambda o, a, n, t: -(o**2).sum(1),
    "frugal": lambda o, a, n, t: n[:, 0] - 0.1 * (a**2).sum(1),
    "mixed": lambda o, a, n, t: o[:, 0] * a[:, 0],
}


def sampled_one(transitions: int) -> Row:
    """5 rewards, 200 refits, 64 features; target for 1e6 transitions: under 60 s and twice the memory of the data."""
    data = recorded(transitions)
    SampledStarc(FourierFeatures(8), discount=0.99, bootstrap=2).fit(recorded(2000), REWARDS)  # loads everything
    # 12 or 15 polynomials and random Fourier features: 64 for values, 67 for advantages.
    starc = SampledStarc(FourierFeatures(52), discount=0.99, bootstrap=200)
    with Peak() as peak:
        wall, cpu = once(lambda: starc.fit(data, REWARDS))
    size = data.nbytes / 2**20
    return {
        "what": f"{transitions:.0e} transitions, 5 rewards, 200 refits, 64 features",
        "s": wall,
        "cpu s": cpu,
        "us per transition": 1e6 * cpu / transitions,
        "data MB": size,
        "more MB": peak.more,
        "times the data": (size + peak.more) / size,
    }


def sampled() -> list[Row]:
    """Cost against the number of transitions, 1e4 to 1e6, each in a fresh process."""
    return [child(sampled_one, count) for count in (10_000, 100_000, 1_000_000)]


def categories_one(transitions: int) -> Row:
    """Taxi's states as integers, 3 rewards, 100 refits; target for 1e5 transitions: under 60 s and 2 GB."""
    mdp, reward = TabularMDP.from_gym("Taxi-v4", 0.95)
    tau, rng = mdp.dense.numpy(), np.random.default_rng(0)
    following, start = tau.argmax(-1), mdp.initial_distribution.numpy()
    ends = (tau[np.arange(len(tau)), :, np.arange(len(tau))] == 1).all(1)
    s, a = np.zeros(transitions + 1, int), rng.integers(tau.shape[1], size=transitions)
    after = np.zeros(transitions, int)
    cut = np.arange(1, transitions + 1) % 200 == 0
    s[0] = rng.choice(len(start), p=start)
    for t in range(transitions):
        after[t] = following[s[t], a[t]]
        s[t + 1] = rng.choice(len(start), p=start) if ends[after[t]] or cut[t] else after[t]
    batch = Batch(
        observations=torch.from_numpy(s[:-1]),
        actions=torch.from_numpy(a),
        rewards=torch.zeros(transitions),
        next_observations=torch.from_numpy(after),
        terminations=torch.from_numpy(ends[after]),
        truncations=torch.from_numpy(cut & ~ends[after]),
    )
    own = reward[s[:-1], a, after]
    rewards = {"own": own, "goal": np.maximum(own, 0), "noisy": own + rng.normal(size=transitions)}
    del tau, mdp, reward
    wall, cpu = once(lambda: SampledStarc(discount=0.95, bootstrap=100).fit(batch, rewards))
    what = f"Taxi, {transitions:.0e} transitions, 3 rewards, 100 refits, states counted"
    return {"what": what, "s": wall, "cpu s": cpu, "peak MB": megabytes()}


def categories() -> list[Row]:
    """States that are categories, in a fresh process."""
    return [child(categories_one, 100_000)]


def child(case: Callable[..., Any], *arguments: Any) -> Any:
    """A case in a process of its own, so that peaks are its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(case, arguments)


CASES: dict[str, Callable[[], list[Row]]] = {
    "tabular": tabular,
    "matrix": matrix,
    "many": many,
    "epic": epic,
    "sparse": sparse,
    "sampled": sampled,
    "categories": categories,
    "study": study,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name in parser.parse_args().only:
        rows += CASES[name]() if name in ("sampled", "categories", "study") else child(CASES[name])
    report("starc", rows)


if __name__ == "__main__":
    main()
