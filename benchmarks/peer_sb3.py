"""Stable-Baselines3 for `online.py`, in an environment of its own.

peer_sb3.py ENV ENVS STEPS: the processor seconds of every stretch of transitions of SAC
peer_sb3.py --count ENV: millions of multiplications in the matrix products of one update of SAC
peer_sb3.py --scores AGENT ENV STEPS SEED EPISODE...: JSON, returns of the policy's mode after each quarter, with all defaults, in episodes that begin
    from these environment seeds
"""

from __future__ import annotations

import json
import sys
import time

import gymnasium
import numpy as np
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from torch.utils.flop_counter import FlopCounterMode

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


def scores(agent: str, env: str, steps: int, seed: int, episodes: list[int]) -> None:
    model = {"sac": SAC, "ppo": PPO}[agent]("MlpPolicy", env, device="cpu", seed=seed)
    judged = gymnasium.make(env)
    found = []
    for _ in range(4):
        model.learn(steps // 4, reset_num_timesteps=False)
        found.append([play(model, judged, episode) for episode in episodes])
    sys.stdout.write(json.dumps(found) + "\n")


def play(model: SAC | PPO, env: gymnasium.Env, seed: int) -> float:
    """The return of one episode of the policy's mode."""
    observation, _ = env.reset(seed=seed)
    earned, ended = 0.0, False
    while not ended:
        observation, reward, terminated, truncated, _ = env.step(model.predict(observation, deterministic=True)[0])
        earned += float(reward)
        ended = terminated or truncated
    return earned


def count(env: str) -> None:
    model = SAC("MlpPolicy", env, device="cpu", seed=0, learning_starts=300)
    model.learn(300)
    with FlopCounterMode(display=False) as counter:
        model.train(1, 256)
    sys.stdout.write(f"{counter.get_total_flops() / 2e6}\n")


if __name__ == "__main__":
    if sys.argv[1] == "--count":
        count(sys.argv[2])
        sys.exit()
    if sys.argv[1] == "--scores":
        scores(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), [int(word) for word in sys.argv[6:]])
        sys.exit()
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
