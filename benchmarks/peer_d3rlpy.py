"""d3rlpy's IQL and TD3+BC on hopper-sized data; runs in d3rlpy's own environment, told by `training.py` over a pipe how many updates to do."""

from __future__ import annotations

import itertools
import sys
import time

import d3rlpy
import numpy as np
import torch

torch.set_num_threads(1)


def main(name: str) -> None:
    rng = np.random.default_rng(0)
    episodes, steps = 100, 1000
    last = np.arange(steps) == steps - 1
    terminals = np.tile(last, episodes)
    dataset = d3rlpy.dataset.MDPDataset(
        observations=rng.normal(size=(episodes * steps, 11)).astype(np.float32),
        actions=rng.uniform(-1, 1, (episodes * steps, 3)).astype(np.float32),
        rewards=rng.normal(size=episodes * steps).astype(np.float32),
        terminals=terminals.astype(np.float32),
    )
    config = {"iql": d3rlpy.algos.IQLConfig, "td3bc": d3rlpy.algos.TD3PlusBCConfig}[name]
    algorithm = config(batch_size=256).create(device="cpu:0")
    algorithm.build_with_dataset(dataset)
    print("ready", flush=True)
    for line in sys.stdin:
        marks, wall = [time.process_time()], time.perf_counter()
        for _ in range(int(line)):
            algorithm.update(dataset.sample_transition_batch(256))
            marks.append(time.process_time())
        steps = sorted(after - before for before, after in itertools.pairwise(marks))
        print(time.perf_counter() - wall, steps[len(steps) // 10], flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
