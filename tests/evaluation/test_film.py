"""Films of evaluations: the first episodes as they were played, with their returns; what cannot draw says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from PIL import Image

import rlkit2
from rlkit2.agents.bc import BCConfig
from rlkit2.cli.main import main
from rlkit2.errors import ConfigError, EnvironmentUnavailableError, EpisodeError, MissingExtraError
from rlkit2.evaluation.film import CAPTION, Film, as_picture, captioned
from tests.training.tiny_problem import Walk, tiny_dataset


class Drawn(Walk):
    """Draws a picture whose red is the step and whose green is the count of resets."""

    metadata = {"render_modes": ["human", "rgb_array"], "render_fps": 50}  # noqa: RUF012 - as Gymnasium has it
    started = 0
    gives: Any = None

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.number = 0

    def reset(self, **options: Any) -> Any:
        type(self).started += 1
        self.number = type(self).started
        return super().reset(**options)

    def step(self, action: Any) -> Any:
        observation, reward, terminated, _, info = super().step(action)
        return observation, reward, terminated, self._step == 9, info

    def render(self) -> Any:
        if self.gives is not None:
            return self.gives
        picture = np.zeros((30, 40, 3), np.uint8)
        picture[..., 0], picture[..., 1] = 20 * self._step, 20 * self.number
        return picture


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return rlkit2.train(
        BCConfig(hidden_sizes=(8,)), tiny_dataset(), steps=4, seeds=[3, 8], eval_every=0, out=tmp_path_factory.mktemp("runs"), progress=False
    )  # fmt: skip


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    monkeypatch.setattr(Drawn, "started", 0)


def pictures(path: Path) -> list[tuple[np.ndarray[Any, Any], int]]:
    """Every frame of a GIF and the milliseconds it is shown."""
    found = []
    with Image.open(path) as film:
        for index in range(film.n_frames):
            film.seek(index)
            found.append((np.asarray(film.convert("RGB")), film.info["duration"]))
    return found


def test_the_first_episodes_of_the_first_seed_are_shown_as_they_were_played(run: Any, tmp_path: Path) -> None:
    plain = rlkit2.evaluate(run, episodes=5, env=Drawn, num_envs=2)
    Drawn.started = 0
    path = tmp_path / "new" / "film.gif"
    filmed = rlkit2.evaluate(run, episodes=5, env=Drawn, num_envs=2, video=path, video_episodes=3)
    np.testing.assert_array_equal(filmed.returns, plain.returns)
    found = pictures(path)
    reds = [int(picture[10, 10, 0]) for picture, _ in found]
    times = [time for _, time in found]
    steps = [0, 2, 4, 6, 8, 9]  # 50 pictures a second are too many for a GIF: every second, and the last
    np.testing.assert_allclose(reds, [20 * step for step in steps] * 3, atol=6)
    assert times == [40, 40, 40, 40, 40, 1000] * 3
    greens = [int(picture[10, 10, 1]) for picture, _ in found]
    # two environments a seed play together: episodes 0 and 1 of seed 3 begin first, then those of seed 8, then episode 2
    np.testing.assert_allclose(greens, [20] * 6 + [40] * 6 + [100] * 6, atol=6)
    for picture, _ in found:
        assert picture.shape == (7 * 30 + CAPTION, 280, 3)
        assert picture[7 * 30 :].max() > 200  # the caption
    written = [found[at][0][7 * 30 :] for at in (5, 11, 17)]
    caption = [f"seed 3, episode {k}, step 9: return {filmed.returns[0, k]:.1f}" for k in range(3)]
    for picture, text in zip(written, caption, strict=True):
        expected = np.asarray(captioned(Image.new("RGB", (40, 30)), text, 320))[7 * 30 :]
        np.testing.assert_allclose(picture.astype(int), expected, atol=60)


def test_the_command_writes_it_and_says_where(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "film.gif"
    words = ["evaluate", str(run.path), "--env", f"{__name__}:Drawn", "--video", str(path)]
    assert main([*words, "--episodes", "2"]) == 0
    assert f"{path}: episodes 1 to 2 of seed 3\n" in capsys.readouterr().out
    assert len(pictures(path)) == 12
    assert main([*words, "--episodes", "2", "--video-episodes", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["video"] == str(path)
    assert len(pictures(path)) == 6
    assert main(["evaluate", str(run.path), *words[1:]]) == 2
    assert "--video shows one run, and 2 are named" in capsys.readouterr().err
    assert main(["evaluate", str(run.path), "--offline", "--video", str(path)]) == 2
    assert "leave --video out" in capsys.readouterr().err


@pytest.mark.parametrize("env", ["CartPole-v1", "rlkit2/Rooms-v0"])
def test_real_environments_are_filmed(env: str, tmp_path: Path) -> None:
    if env not in gym.registry:
        pytest.importorskip("rlkit2.envs")
    if env == "CartPole-v1":
        pytest.importorskip("pygame")
    made = gym.make(env, render_mode="rgb_array")
    spec = rlkit2.data.DatasetSpec(
        observation_space=made.observation_space, action_space=made.action_space, env_spec=made.spec
    )
    made.close()
    policy = rlkit2.agents.make_agent(BCConfig(hidden_sizes=(4,)), spec).policy
    policy.metadata["spec"] = spec.to_json()
    rlkit2.evaluate(policy, episodes=1, max_steps=12, video=tmp_path / "film.gif")
    found = pictures(tmp_path / "film.gif")
    assert len(found) > 3
    assert (found[0][0] != found[-1][0]).any()


def test_mp4(run: Any, tmp_path: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    path = rlkit2.evaluate(run, episodes=1, env=Drawn, video=tmp_path / "film.mp4") and tmp_path / "film.mp4"
    count, seconds = ffmpeg.count_frames_and_secs(str(path))
    assert count == 10 + 50  # every step at 50 a second, and a second on the last
    assert seconds == pytest.approx(1.2, abs=0.1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        ("film.avi", ConfigError, r"film.avi: a film is a .gif or .mp4 file"),
        (Walk, EnvironmentUnavailableError, "Walk cannot be drawn: its render_mode is None, not rgb_array"),
        (lambda: Drawn(), EnvironmentUnavailableError, "let what makes it take an argument render_mode"),
        (Drawn("human"), EnvironmentUnavailableError, "its render_mode is human, not rgb_array"),
        (
            "gives nothing",
            EpisodeError,
            r"environment Drawn cannot be drawn: render\(\) gave float64 \[2, 2\] instead of",
        ),
    ],
)
def test_what_cannot_be_filmed_is_one_line(
    make: Any, error: type[Exception], message: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "film.avi" if make == "film.avi" else "film.gif"
    if isinstance(make, str):
        monkeypatch.setattr(Drawn, "gives", np.zeros((2, 2)))
        make = Drawn
    with pytest.raises(error, match=message) as caught:
        rlkit2.evaluate(run, episodes=1, env=make, video=tmp_path / name)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*film*"))


def test_without_ffmpeg_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(MissingExtraError, match=r"rlkit2\[video\]', or name a .gif file"):
        Film(tmp_path / "film.mp4")
    with pytest.raises(ConfigError, match="at least 1 episode, not 0"):
        Film(tmp_path / "film.gif", 0)


def test_pictures_are_even_and_no_larger_than_they_may_be() -> None:
    for width, height in ((1001, 333), (333, 1001), (7, 9)):
        found = captioned(as_picture(np.zeros((height, width, 4), np.uint8)), "a", 320)
        assert found.width % 2 == found.height % 2 == 0
        assert found.width <= 320
        assert found.height <= 320 + CAPTION
