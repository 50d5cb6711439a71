"""Stable-Baselines3's SAC for `online.py`, in an environment of its own: prints the processor seconds of every stretch of transitions."""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

WARMUP, STRETCH = 200, 100
torch.set_num_threads(1)


class Clock(BaseCallback):
    """Notes the time at every stretch."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def _on_step(self) -> bool:
        if self.num_timesteps % STRETCH == 0:
            self.times.append(time.process_time())
        return True


def main(env: str, envs: int, steps: int) -> None:
    model = SAC(
        "MlpPolicy", make_vec_env(env, envs, seed=0), learning_starts=WARMUP, batch_size=256, gradient_steps=-1, device="cpu", seed=0
    )  # fmt: skip
    clock = Clock()
    model.learn(WARMUP + steps + envs, callback=clock)
    sys.stdout.write(" ".join(map(str, np.diff(clock.times[WARMUP // STRETCH :]))) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
