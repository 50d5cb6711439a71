"""Films of an evaluation's first episodes: what the environment draws, with a caption that says whose episode it is and what it has earned."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rlkit2.data.environments import Env
from rlkit2.errors import ConfigError, EnvironmentUnavailableError, MissingExtraError, require
from rlkit2.files import make_folder, write_atomically
from rlkit2.preferences.pictures import gif, offscreen

# Suffix -> most pictures in a second, longest side of a picture in pixels.
KINDS = {".gif": (25.0, 320), ".mp4": (60.0, 640)}
DRAWING = "leave --video (video=...) out, or without a display try MUJOCO_GL=egl or MUJOCO_GL=osmesa"
NARROWEST = 280  # pixels that a caption needs
CAPTION = 18  # pixels of its height
PAUSE = 1.0  # seconds on the last picture of an episode


class Film:
    """Pictures of the first episodes of the first seed; handed to `evaluate_policy`, then written.

    Args:
        path: a .gif file, or .mp4 with the extra `video`.
        episodes: how many are shown.

    Raises:
        ConfigError: another suffix, or no episode.
        MissingExtraError: imageio-ffmpeg, which writes .mp4, is not installed.
        WriteError: the folder cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str], episodes: int = 3) -> None:
        self.path, self.episodes = Path(path), episodes
        if self.path.suffix.lower() not in KINDS:
            raise ConfigError(f"{self.path}: a film is a {' or '.join(KINDS)} file")
        if episodes < 1:
            raise ConfigError(f"a film shows at least 1 episode, not {episodes}")
        self.most, self.side = KINDS[self.path.suffix.lower()]
        if self.path.suffix.lower() == ".mp4":
            try:
                require("imageio_ffmpeg", extra="video")
            except MissingExtraError as error:
                raise MissingExtraError(f"{error}, or name a .gif file") from error
        make_folder(self.path.parent)
        offscreen()
        self.rate = 30.0  # of the environment, in pictures a second
        self._taken: dict[int, list[bytes]] = {}  # PNG: whole pictures of long episodes would fill the memory
        self._count: dict[int, int] = {}

    def make(self, build: Callable[[str], Env], name: str) -> Env:
        """An environment that draws, by what builds one for a render mode.

        Raises:
            EnvironmentUnavailableError: it does not draw arrays.
        """
        mode = "rgb_array"
        try:
            env = build(mode)
        except EnvironmentUnavailableError as error:
            raise EnvironmentUnavailableError(f"{error} (for --video it is asked for render_mode={mode!r})") from error
        if env.render_mode != mode:
            modes = ", ".join(map(str, env.metadata.get("render_modes") or ())) or "none"
            raise EnvironmentUnavailableError(
                f"environment {name} cannot be drawn: its render_mode is {env.render_mode}, not {mode} (it has: {modes}); leave --video (video=...) "
                "out, or let what makes it take an argument render_mode"
            )
        self.rate = float(env.metadata.get("render_fps") or self.rate)
        return env

    @property
    def stride(self) -> int:
        """Steps from one picture to the next, so that a film runs as fast as the environment."""
        return math.ceil(self.rate / self.most)

    def shows(self, seed_index: int, episode: int) -> bool:
        """Whether an episode is in the film."""
        return seed_index == 0 and episode < self.episodes

    def add(self, env: Env, episode: int, caption: str, last: bool) -> None:
        """Take the picture after a step of an episode, if it is due; the last one always is."""
        count = self._count.get(episode, 0)
        self._count[episode] = count + 1
        if count % self.stride and not last:
            return
        picture = io.BytesIO()
        captioned(as_picture(env.render()), caption, self.side).save(picture, "PNG", compress_level=1)
        self._taken.setdefault(episode, []).append(picture.getvalue())

    def write(self) -> Path:
        """Write the file, episode after episode; it appears by atomic rename.

        Raises:
            WriteError: the file cannot be written.
        """
        rate = self.rate / self.stride
        episodes = [self._taken[episode] for episode in sorted(self._taken)]
        if self.path.suffix.lower() == ".gif":
            step, pause = round(1000 / rate), round(1000 * PAUSE)
            durations = [pause if at == len(taken) - 1 else step for taken in episodes for at in range(len(taken))]
            content = gif(_opened(picture for taken in episodes for picture in taken), durations)
        else:
            hold = round(PAUSE * rate)
            content = _mp4(_opened(picture for taken in episodes for picture in [*taken, *taken[-1:] * hold]), rate)
        write_atomically(self.path, content)
        return self.path


def as_picture(frame: Any) -> Image.Image:
    """What `env.render()` gave.

    Raises:
        ValueError: it is not a picture.
    """
    array = np.asarray(frame)
    if array.ndim != 3 or array.shape[-1] not in (3, 4) or array.dtype != np.uint8:
        what = "nothing" if frame is None else f"{array.dtype} {list(array.shape)}"
        raise ValueError(f"render() gave {what} instead of a picture [height, width, 3] in bytes")
    return Image.fromarray(array[..., :3])


def captioned(picture: Image.Image, caption: str, side: int) -> Image.Image:
    """A picture with a caption below, at most `side` pixels wide and high; small ones are made larger, pixel by pixel; both sides are even."""
    if picture.width < NARROWEST:
        factor = math.ceil(NARROWEST / picture.width)
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((side, side))
    out = Image.new("RGB", (max(picture.width, NARROWEST) // 2 * 2, (picture.height + CAPTION) // 2 * 2), "black")
    out.paste(picture, ((out.width - picture.width) // 2, 0))
    ImageDraw.Draw(out).text((4, picture.height + 3), caption, fill="white", font=ImageFont.load_default())
    return out


def _opened(pictures: Iterator[bytes]) -> Iterator[Image.Image]:
    """Pictures one at a time."""
    for picture in pictures:
        yield Image.open(io.BytesIO(picture)).convert("RGB")


def _mp4(pictures: Iterator[Image.Image], rate: float) -> bytes:
    """H.264 as browsers play it."""
    ffmpeg: Any = require("imageio_ffmpeg", extra="video")
    first = next(pictures)
    with TemporaryDirectory() as folder:
        file = Path(folder, "film.mp4")
        writer = ffmpeg.write_frames(str(file), first.size, fps=rate, macro_block_size=2, ffmpeg_log_level="error")
        writer.send(None)
        writer.send(first.tobytes())
        for picture in pictures:
            writer.send(picture.tobytes())
        writer.close()
        return file.read_bytes()
