"""Reading and sampling against Minari's own iteration, on a dataset of 1,000 episodes x 1,000 steps made here.

.venv/bin/python benchmarks/data.py [--episodes 1000] [--short 20000] [--rounds 7]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import minari
import numpy as np
import torch
from common import interleaved, ratio, report
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from rlkit2.data import read_dataset
from rlkit2.data.cache import cache_folder

STEPS, OBSERVATIONS, ACTIONS = 1000, 11, 3
KEYS = ("observations", "actions", "rewards", "terminations", "truncations")


def make(dataset_id: str, episodes: int, info_keys: int, steps: int = STEPS) -> None:
    """A hopper-shaped dataset of random numbers, with `info_keys` extra arrays per episode."""
    rng = np.random.default_rng(0)
    last = np.arange(steps) == steps - 1
    buffers = [
        EpisodeBuffer(
            id=e,
            observations=rng.normal(size=(steps + 1, OBSERVATIONS)),
            actions=rng.uniform(-1, 1, (steps, ACTIONS)).astype(np.float32),
            rewards=rng.normal(size=steps),
            terminations=last & (e % 2 == 0),
            truncations=last & (e % 2 == 1),
            infos={f"key{k}": rng.normal(size=steps + 1) for k in range(info_keys)} or None,
        )
        for e in range(episodes)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(
            dataset_id,
            buffers,
            observation_space=spaces.Box(-np.inf, np.inf, (OBSERVATIONS,), np.float64),
            action_space=spaces.Box(-1, 1, (ACTIONS,), np.float32),
        )


def make_images(dataset_id: str, episodes: int) -> None:
    """Episodes of 84 x 84 grey images, stored as they are."""
    rng = np.random.default_rng(0)
    last = np.arange(STEPS) == STEPS - 1
    buffers = [
        EpisodeBuffer(
            id=e,
            observations=rng.integers(0, 256, (STEPS + 1, 84, 84, 1), dtype=np.uint8),
            actions=rng.integers(0, 4, STEPS),
            rewards=rng.normal(size=STEPS),
            terminations=last,
            truncations=last & False,
        )
        for e in range(episodes)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(
            dataset_id,
            buffers,
            observation_space=spaces.Box(0, 255, (84, 84, 1), np.uint8),
            action_space=spaces.Discrete(4),
            jpeg_encoding=False,
        )


def image_rows(rounds: int, episodes: int = 10) -> list[dict[str, object]]:
    """Time of the first open of images, and their size in the cache as a share of the file's."""
    dataset_id = "bench/images-v0"
    make_images(dataset_id, episodes)
    times = interleaved({"minari": lambda: iterate(dataset_id), "rlkit2": lambda: first_open(dataset_id)}, rounds)
    first_open(dataset_id)
    sizes = {
        "minari": sum(
            file.stat().st_size for file in Path(os.environ["MINARI_DATASETS_PATH"], dataset_id).rglob("*.hdf5")
        ),
        "rlkit2": sum(file.stat().st_size for file in cache_folder().rglob("*.bin")),
    }
    speedup, share = ratio(times["minari"], times["rlkit2"]), sizes["rlkit2"] / sizes["minari"]
    checks = interleaved(
        {"opened": lambda: first_open(dataset_id), "checked": lambda: checked_open(dataset_id)},
        rounds,
        clock=time.process_time,
    )
    medians = {name: statistics.median(values) for name, values in times.items()}
    return [
        {"what": "first open, images", "ratio": speedup, "gate": 0.8, **medians},
        {"what": "bytes of images (ratio at most)", "ratio": share, "gate": 1.05, **sizes},
        {
            "what": "all checksums of images, share of a first open (at most)",  # of raw bytes, which are loaded as fast as they are copied
            "ratio": ratio(checks["checked"], checks["opened"]),
            "gate": 0.15,
        },
    ]


def iterate(dataset_id: str) -> list[dict[str, np.ndarray]]:
    """What everybody does: Minari's episodes into arrays."""
    return [{key: np.asarray(getattr(episode, key)) for key in KEYS} for episode in minari.load_dataset(dataset_id)]


def first_open(dataset_id: str) -> None:
    """Open with an empty cache."""
    shutil.rmtree(cache_folder(), ignore_errors=True)
    read_dataset(dataset_id)


def second_open(dataset_id: str) -> None:
    """Open from the cache and draw a first batch."""
    read_dataset(dataset_id).sample(256, generator=torch.Generator().manual_seed(0))


def checked_open(dataset_id: str) -> None:
    """Open from the cache and compare every checksum, as whoever reads all rows does once."""
    read_dataset(dataset_id).records.check()


def sample_episodes(episodes: list[dict[str, np.ndarray]], rng: np.random.Generator, batch: int = 256) -> None:
    """Uniform transitions from a list of episodes, one by one."""
    starts = np.cumsum([0, *(len(e["rewards"]) for e in episodes)])
    rows = rng.integers(starts[-1], size=batch)
    chosen = np.searchsorted(starts, rows, side="right") - 1
    picked = [(episodes[e], r - starts[e]) for e, r in zip(chosen, rows, strict=True)]
    for key in KEYS:
        torch.from_numpy(np.stack([episode[key][t] for episode, t in picked]))
    torch.from_numpy(np.stack([episode["observations"][t + 1] for episode, t in picked]))


MEMORY = r"""
import pathlib, re, sys
sys.path.insert(0, {here!r})
import data
# The peak of this program alone: getrusage would count the parent's memory at the fork.
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1])
before = peak()
kept = data.{call}({dataset!r})
print((peak() - before) / 1024)
"""


def growth(call: str, dataset_id: str) -> float:
    """Growth of the peak memory in MiB, measured in a process of its own."""
    code = MEMORY.format(here=str(Path(__file__).parent), call=call, dataset=dataset_id)
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure rows 7 to 10 and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=1000, help="episodes of 1,000 steps")
    parser.add_argument("--short", type=int, default=20_000, help="episodes of 20 steps in the row of short ones")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds; medians are reported")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINARI_DATASETS_PATH"] = str(Path(folder, "minari"))
        os.environ["RLKIT2_CACHE"] = str(Path(folder, "cache"))
        plain, infos, short = "bench/plain-v0", "bench/infos-v0", "bench/short-v0"
        make(plain, options.episodes, 0)
        make(infos, options.episodes, 8)
        make(short, options.short, 0, 20)
        opens = (
            ("first open", plain, 1.3),
            ("first open, 8 info keys", infos, 3.0),
            (f"first open, {options.short:,} episodes of 20 steps", short, 1.5),
        )
        for name, dataset_id, gate in opens:
            times = interleaved(
                {"minari": lambda i=dataset_id: iterate(i), "rlkit2": lambda i=dataset_id: first_open(i)},
                options.rounds,
            )
            speedup = ratio(times["minari"], times["rlkit2"])
            rows.append(
                {"what": name, "ratio": speedup, "gate": gate, **{k: statistics.median(v) for k, v in times.items()}}
            )
        first_open(plain)
        times = interleaved({"minari": lambda: iterate(plain), "rlkit2": lambda: second_open(plain)}, options.rounds)
        speedup = ratio(times["minari"], times["rlkit2"])
        rows.append(
            {
                "what": "second open to first batch",
                "ratio": speedup,
                "gate": 30.0,
                **{k: statistics.median(v) for k, v in times.items()},
            }
        )
        times = interleaved(
            {"first open": lambda: first_open(plain), "checks": lambda: checked_open(plain)}, options.rounds
        )
        checks = [check / opened for check, opened in zip(times["checks"], times["first open"], strict=True)]
        share = statistics.median(checks)
        rows.append({"what": "all checksums, share of a first open (at most)", "ratio": share, "gate": 0.03})
        shutil.rmtree(cache_folder())
        memory = {"minari": growth("iterate", plain), "rlkit2": growth("first_open", plain)}
        share = memory["rlkit2"] / memory["minari"]
        rows.append({"what": "peak memory growth, MiB (ratio at most)", "ratio": share, "gate": 0.8, **memory})
        rows += sampling(plain, options.rounds)
        rows += image_rows(options.rounds)
    report("data", rows, episodes=options.episodes, rounds=options.rounds)


def sampling(dataset_id: str, rounds: int, batches: int = 500) -> list[dict[str, object]]:
    """Row 7: batches from the map, from memory and from a list of episodes."""
    mapped = read_dataset(dataset_id)
    mapped.records.words.sum()  # touch every page once
    memory = read_dataset(dataset_id, cache=False)
    episodes = iterate(dataset_id)
    generators = [torch.Generator().manual_seed(0)]
    rng = np.random.default_rng(0)
    cases = {
        "mapped": lambda: [mapped.sample(256, generator=generators) for _ in range(batches)],
        "memory": lambda: [memory.sample(256, generator=generators) for _ in range(batches)],
        "episodes": lambda: [sample_episodes(episodes, rng) for _ in range(batches // 25)],
    }
    times = interleaved(cases, rounds)
    micro = {
        name: statistics.median(v) / (batches // 25 if name == "episodes" else batches) * 1e6
        for name, v in times.items()
    }
    slow = [value * 25 for value in times["episodes"]]
    return [
        {
            "what": "sampling: memory / mapped, us",
            "ratio": ratio(times["memory"], times["mapped"]),
            "gate": 0.9,
            "rlkit2": micro["mapped"],
        },
        {
            "what": "sampling: list of episodes / mapped, us",
            "ratio": ratio(slow, times["mapped"]),
            "gate": 50.0,
            "rlkit2": micro["mapped"],
        },
    ]


if __name__ == "__main__":
    main()
