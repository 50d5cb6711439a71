"""What a person sees of a segment: frames of the environment where it can show a stored state, plots of the numbers where it cannot."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rlkit2.errors import EnvironmentUnavailableError

Array = NDArray[Any]
Setter = Callable[[Any, Array], Array]
TOLERANCE = 1e-3  # of an observation that is put into the environment and read back
FRAME_SIZE = 320  # largest side of a frame in pixels
STATE_IS_OBSERVATION = ("CartPoleEnv", "MountainCarEnv", "Continuous_MountainCarEnv")
MOST_COLUMNS = 40  # observation columns drawn in a plot


class FrameRenderer:
    """Draws frames of stored observations by putting them into an environment; works for environments whose observation is their state.

    Known are environments with a `position` (the rooms), classic control (`state`), and MuJoCo tasks that observe positions and
    velocities. Every state is read back and compared, so a wrong picture is never shown.

    Args:
        environment: made with `render_mode="rgb_array"`; kept open.
        example: an observation `[obs]`, to find out whether and how it can be shown.

    Raises:
        EnvironmentUnavailableError: this environment cannot show stored observations here; the message says why.
    """

    def __init__(self, environment: gymnasium.Env[Any, Any], example: Array) -> None:
        self.environment = environment
        world = environment.unwrapped
        name = environment.spec.id if environment.spec else type(world).__name__
        try:
            environment.reset(seed=0)
            self._set = _setter(world)
            if self._set is None:
                raise EnvironmentUnavailableError(f"{name} has no way to show a stored observation")
            if np.shape(example) != world.observation_space.shape:
                raise EnvironmentUnavailableError(
                    f"{name} observes shape {world.observation_space.shape}, not {np.shape(example)}"
                )
            self._show(np.asarray(example, np.float64))
        except EnvironmentUnavailableError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise EnvironmentUnavailableError(f"{name} cannot draw frames here: {reason[:200]}") from error

    def _show(self, observation: Array) -> Array:
        world = self.environment.unwrapped
        assert self._set is not None
        again = self._set(world, observation)
        if again.shape != observation.shape or np.abs(again - observation).max() > TOLERANCE:
            raise EnvironmentUnavailableError(f"{type(world).__name__} shows another state than the stored one")
        frame: Any = self.environment.render()
        return np.asarray(frame, np.uint8)

    def frames(self, observations: Array) -> list[Array]:
        """A frame `[height, width, 3]` for every observation `[H, obs]`."""
        return [self._show(row) for row in np.asarray(observations, np.float64)]


def _setter(world: Any) -> Setter | None:
    """How to put an observation into a bare environment and read it back."""
    if isinstance(getattr(world, "position", None), np.ndarray):
        return _set_position
    if hasattr(world, "set_state") and hasattr(world, "init_qpos"):
        return _set_mujoco
    if type(world).__name__ == "PendulumEnv":
        return _set_pendulum
    if type(world).__name__ in STATE_IS_OBSERVATION:
        return _set_state
    return None


def _set_position(world: Any, observation: Array) -> Array:
    world.position = observation.astype(world.position.dtype)
    return np.asarray(world.position, np.float64)


def _set_state(world: Any, observation: Array) -> Array:
    world.state = tuple(float(x) for x in observation)
    return np.asarray(world.state, np.float64)


def _set_pendulum(world: Any, observation: Array) -> Array:
    cosine, sine, speed = observation
    world.state, world.last_u = np.array([np.arctan2(sine, cosine), speed]), None
    return np.asarray(world._get_obs(), np.float64)


def _set_mujoco(world: Any, observation: Array) -> Array:
    positions, velocities = world.init_qpos.copy(), world.init_qvel.copy()
    hidden = len(positions) + len(velocities) - len(observation)  # leading positions that the task does not observe
    if hidden < 0:
        raise EnvironmentUnavailableError("its observation holds more than positions and velocities")
    positions[hidden:] = observation[: len(positions) - hidden]
    velocities[:] = observation[len(positions) - hidden :]
    world.set_state(positions, velocities)
    return np.asarray(world._get_obs(), np.float64)


def offscreen() -> None:
    """Let MuJoCo and pygame draw without a display, unless the user has chosen otherwise; call before an environment is made."""
    if not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


def animation(frames: Sequence[Array], *, frames_per_second: float = 15.0) -> bytes:
    """Frames `[height, width, 3]` uint8 as an endless GIF that pauses on its last frame."""
    images = [Image.fromarray(np.asarray(frame, np.uint8)) for frame in frames]
    for image in images:
        image.thumbnail((FRAME_SIZE, FRAME_SIZE))
    step = round(1000 / frames_per_second)
    return gif(iter(images), [step] * (len(images) - 1) + [600])


def gif(images: Iterator[Image.Image], milliseconds: Sequence[int]) -> bytes:
    """Pictures of one size, each shown for so long, as an endless GIF."""
    out = io.BytesIO()
    next(images).save(out, "GIF", save_all=True, append_images=images, duration=list(milliseconds), loop=0)
    return out.getvalue()


def state_plot(observations: Array, actions: Array, limits: tuple[Array, Array], names: Sequence[str] = ()) -> bytes:
    """Observations `[H, obs]` and actions `[H, act]` over the steps as a PNG.

    `limits`: smallest and largest value of every observation column in the dataset, so that two segments share their axes.
    """
    from matplotlib.figure import Figure  # takes as long to import as torch; evaluations draw without it

    figure = Figure(figsize=(5, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    columns = min(observations.shape[1], MOST_COLUMNS)
    for column in range(columns):
        label = names[column] if column < len(names) else f"s{column}"
        upper.plot(observations[:, column], color=f"C{column % 10}", linewidth=1.3, label=label)
    upper.set(ylabel="observation", ylim=(float(limits[0].min()), float(limits[1].max()) + 1e-6))
    if columns <= 12:
        upper.legend(fontsize=7, ncols=4, frameon=False)
    flat = actions.reshape(len(actions), -1)
    for column in range(flat.shape[1]):
        lower.step(np.arange(len(flat)), flat[:, column], where="mid", color=f"C{column % 10}", linewidth=1.3)
    lower.set(ylabel="action", xlabel="step")
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    return out.getvalue()
