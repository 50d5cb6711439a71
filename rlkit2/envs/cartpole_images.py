"""Gymnasium's CartPole seen by a camera that moves with the cart: 32 x 32 grey pixels that show positions, not velocities.

One picture is not the whole state; two in a row (`--frame-stack 2`) are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.spaces import Box
from numpy.typing import NDArray

Array = NDArray[Any]

PIXELS = 32
WIDTH = 1.6  # of the view, in units of the track; the pole is 1 long
POLE = 0.06  # half the width of the pole
GROUND = 0.25  # height of the cart above the lower edge of the view


def camera(state: Array) -> Array:
    """What the camera sees of `state` (position, velocity, angle, angular velocity), uint8 [32, 32, 1]: a bright pole on a track with dark ends."""
    position, _, angle, _ = state
    across = (np.arange(PIXELS) + 0.5) / PIXELS * WIDTH - WIDTH / 2
    up = (PIXELS - 0.5 - np.arange(PIXELS)) / PIXELS * WIDTH - GROUND
    x, y = np.meshgrid(across, up)
    along = np.clip(x * np.sin(angle) + y * np.cos(angle), 0.0, 1.0)
    distance = np.hypot(x - along * np.sin(angle), y - along * np.cos(angle))
    pixel = WIDTH / PIXELS
    pole = np.clip(0.5 + (POLE - distance) / pixel, 0.0, 1.0)  # soft edges show parts of a pixel
    track = np.clip(0.5 + (2.4 - np.abs(x + position)) / pixel, 0.0, 1.0) * (y < 0)
    marks = 0.5 + 0.5 * np.cos((x + position) * 2 * np.pi / 4.8)  # brightest at the centre of the track
    image: Array = np.rint(255 * np.maximum(pole, 0.8 * track * marks)).astype(np.uint8)
    return image[..., None]


class CartPoleImagesEnv(CartPoleEnv):
    """CartPole with pictures as observations; `info["state"]` holds the four numbers."""

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode=render_mode)
        self.observation_space: Any = Box(0, 255, (PIXELS, PIXELS, 1), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        state, info = super().reset(seed=seed, options=options)
        return camera(state), {**info, "state": state}

    def step(self, action: Any) -> Any:
        state, reward, terminated, truncated, info = super().step(action)  # type: ignore[no-untyped-call]
        return camera(state), reward, terminated, truncated, {**info, "state": state}
