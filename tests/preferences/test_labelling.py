"""The labelling page: what it remembers, what it answers to whom, and that a person can use it in a browser."""

import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit2.data.preferences import PreferenceDataset
from rlkit2.errors import ConfigError, CorruptDatasetError, DatasetError, EnvironmentUnavailableError
from rlkit2.preferences.labelling import ANSWERS, LabellingSession, labelling_app, serve_labelling
from rlkit2.preferences.pictures import FrameRenderer, animation, state_plot
from tests import browsers, warm
from tests.built import give_built
from tests.preferences.make import changed, linear_dataset

uvicorn = pytest.importorskip("uvicorn", reason="the extra label is not installed")
pytest.importorskip("starlette", reason="the extra label is not installed")
TOKEN = "a-token"
GIF, PNG = b"GIF89a", b"\x89PNG"


@pytest.fixture(scope="module")
def dataset():
    return linear_dataset(episodes=10, steps=20)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return give_built("builtin/rooms", root=tmp_path_factory.mktemp("builtin"))


@pytest.fixture(autouse=True)
def shared(roots, built, monkeypatch):
    monkeypatch.setenv("RLKIT2_DATA", str(built))


# --- what is remembered


def test_answers_become_labels(dataset, tmp_path):
    session = LabellingSession(dataset, tmp_path, count=4, length=6)
    for index, answer in enumerate(("left", "skip", "right", "equal")):
        assert session.answer(index, answer)
        assert PreferenceDataset.load(tmp_path).label_mass.tolist() == [
            ANSWERS[a] for a in session.answers if ANSWERS[a] is not None
        ]
    labels = PreferenceDataset.load(tmp_path)
    rows_w, rows_l = labels.rows(dataset)
    shown = [pair for pair, answer in zip(session.pairs, session.answers, strict=True) if answer != "skip"]
    assert torch.stack([rows_w[:, 0], rows_l[:, 0]], 1).tolist() == shown
    assert session.state() | {"done": True, "labels": 3} == session.state()


def test_a_pair_is_answered_once_and_undo_takes_it_back(dataset, tmp_path):
    session = LabellingSession(dataset, tmp_path, count=3, length=6)
    assert session.answer(0, "left")
    assert not session.answer(0, "right")  # a second press of the key
    assert not session.answer(2, "right")
    assert not session.undo(0)  # pressed on a page that has not seen the answer
    assert not session.undo(2)
    assert session.answers == ["left"]
    assert session.undo(1)
    assert len(PreferenceDataset.load(tmp_path)) == 0
    assert not session.undo(0)
    with pytest.raises(ConfigError, match="unknown answer 'maybe'"):
        session.answer(0, "maybe")


def test_a_session_goes_on_where_it_was(dataset, tmp_path):
    first = LabellingSession(dataset, tmp_path, count=5, length=6, seed=3)
    first.answer(0, "left")
    first.answer(1, "equal")
    again = LabellingSession(dataset, tmp_path, count=5, length=6, seed=99)
    assert (again.pairs, again.answers) == (first.pairs, ["left", "equal"])
    longer = LabellingSession(dataset, tmp_path, count=8, length=6)
    assert longer.pairs[:5] == first.pairs
    assert len(longer.pairs) == 8


def test_sessions_that_do_not_fit_are_refused(dataset, tmp_path):
    LabellingSession(dataset, tmp_path, count=5, length=6)
    with pytest.raises(DatasetError, match="with segments of 6 steps"):
        LabellingSession(dataset, tmp_path, count=5, length=7)
    with pytest.raises(DatasetError, match="not about arrays"):
        LabellingSession(changed(dataset), tmp_path, count=5, length=6)
    (tmp_path / "session.json").write_text('{"pairs": [[0, 1]]')
    with pytest.raises(CorruptDatasetError, match="damaged"):
        LabellingSession(dataset, tmp_path, count=5, length=6)
    (tmp_path / "session.json").unlink()
    with pytest.raises(DatasetError, match="not made on the labelling page"):
        LabellingSession(dataset, tmp_path, count=5, length=6)


# --- what is drawn


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "MountainCar-v0", "rlkit2/Rooms-v0"])
def test_frames_show_the_stored_state(name):
    pytest.importorskip("pygame")
    import rlkit2.envs  # noqa: F401

    environment = gymnasium.make(name, render_mode="rgb_array")
    observation, _ = environment.reset(seed=5)
    steps = [observation]
    expected = [environment.render()]
    for _ in range(3):
        steps.append(environment.step(environment.action_space.sample())[0])
        expected.append(environment.render())
    renderer = FrameRenderer(gymnasium.make(name, render_mode="rgb_array"), steps[0])
    for found, frame in zip(renderer.frames(np.array(steps)), expected, strict=True):
        assert (
            np.abs(found.astype(int) - frame) > 64
        ).mean() < 0.02  # the pendulum's arrow of torque is not part of its state


def test_frames_of_mujoco(tmp_path):
    pytest.importorskip("mujoco")
    os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        environment = gymnasium.make("Hopper-v5", render_mode="rgb_array")
        environment.reset(seed=0)
        environment.render()
    except Exception as error:  # noqa: BLE001 - every graphics library has its own
        pytest.skip(f"MuJoCo cannot draw here: {error}")
    observation, _ = environment.reset(seed=3)
    frames = FrameRenderer(environment, observation).frames(np.stack([observation, observation + 0.05]))
    assert frames[0].shape == (480, 480, 3)
    assert (frames[0] != frames[1]).any()


def test_environments_that_cannot_show_a_stored_state_say_so():
    class Blind(gymnasium.Env):
        observation_space = action_space = gymnasium.spaces.Box(-1, 1, (2,))

        def reset(self, *, seed=None, options=None):
            return np.zeros(2), {}

    with pytest.raises(EnvironmentUnavailableError, match="no way to show"):
        FrameRenderer(Blind(), np.zeros(2))
    with pytest.raises(EnvironmentUnavailableError, match="observes shape"):
        FrameRenderer(gymnasium.make("CartPole-v1", render_mode="rgb_array"), np.zeros(7))


def test_pictures_are_images(dataset):
    assert animation([np.zeros((8, 8, 3), np.uint8)] * 3).startswith(GIF)
    observations, actions = dataset.observations[:9].numpy(), dataset.actions[:9].numpy()
    assert state_plot(observations, actions, (observations.min(0), observations.max(0))).startswith(PNG)


# --- what is answered to whom


@contextmanager
def served(session, make_environment=None):
    """The page on a free port, in a thread."""
    config = uvicorn.Config(
        labelling_app(session, TOKEN, make_environment), port=0, log_level="error", access_log=False, lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def request(url, body=None, headers=None):
    """Status, body and headers of a reply."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers or {}), timeout=20) as reply:
            return reply.status, reply.read(), dict(reply.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def test_the_page_answers_nothing_without_its_token(dataset, tmp_path):
    with served(LabellingSession(dataset, tmp_path, count=3, length=6)) as base:
        for path in (
            "/",
            "/state",
            "/wrong/",
            "/wrong/state",
            "/a-toke/",
            "/a-token2/state",
            f"//{TOKEN}/",
            "/wrong/segment/0/0",
        ):
            assert request(base + path)[:2] == (404, b""), path
        assert request(f"{base}/wrong/answer", {"index": 0, "answer": "left"})[:2] == (404, b"")
        assert request(f"{base}/{TOKEN}/", headers={"Host": "evil.example"})[:2] == (404, b"")
        status, body, headers = request(f"{base}/{TOKEN}/")
        assert status == 200
        assert b"Which segment is better?" in body
        assert headers["referrer-policy"] == "no-referrer"
        assert "default-src 'none'" in headers["content-security-policy"]
    assert PreferenceDataset.load(tmp_path).label_mass.numel() == 0


def test_answers_over_the_wire(dataset, tmp_path):
    with served(LabellingSession(dataset, tmp_path, count=3, length=6)) as base:
        page = f"{base}/{TOKEN}"
        status, body, _ = request(f"{page}/state")
        assert (status, json.loads(body)["total"], json.loads(body)["frames"]) == (200, 3, False)
        assert request(f"{page}/segment/0/0")[1].startswith(PNG)
        for path in ("segment/3/0", "segment/0/2"):
            assert request(f"{page}/{path}")[0] == 404
        assert request(f"{page}/answer", {"index": 0, "answer": "right"})[0] == 200
        assert request(f"{page}/answer", {"index": 0, "answer": "left"})[0] == 409
        for bad in ({"index": 1, "answer": "no"}, {"answer": "left"}, {"index": "x", "answer": "left"}):
            assert request(f"{page}/answer", bad)[0] == 400
        assert request(f"{page}/answer")[0] == 405  # a link or an image cannot answer
        assert request(f"{page}/undo", {"index": 0})[0] == 409
        assert json.loads(request(f"{page}/undo", {"index": 1})[1])["index"] == 0
        assert request(f"{page}/undo", {"index": 1})[0] == 409  # a second press of the key takes back nothing more
        request(f"{page}/answer", {"index": 0, "answer": "left"})
    assert PreferenceDataset.load(tmp_path).label_mass.tolist() == [0]


WRONG = st.one_of(
    st.none(), st.booleans(), st.floats(), st.text(), st.lists(st.integers()), st.dictionaries(st.text(), st.none())
)
BODIES = st.one_of(
    st.builds(lambda index: {"index": index, "answer": "left"}, WRONG),
    st.builds(lambda answer: {"index": 0, "answer": answer}, WRONG.filter(lambda value: value not in list(ANSWERS))),
    st.dictionaries(st.sampled_from(["index", "other"]), st.integers()),
    WRONG,
    st.integers(),
).map(lambda body: json.dumps(body).encode())
DAMAGED = (
    b"",
    b"{",
    b"\xff\xfe",
    b'{"index": Infinity, "answer": "left"}',
    b'{"index": -Infinity, "answer": "left"}',
    b'{"index": NaN, "answer": "left"}',
    b'{"index": 1e999, "answer": "left"}',
    b'{"index": 0, "answer": "left", "more": 1}',
    b'{"index": 0, "answer": "\\ud800"}',
    b"[" * 4000,
    b'{"a":' * 800,
    b" " * 100_000,
)


def test_what_no_page_sends_is_refused(dataset, tmp_path, caplog):
    """Whatever a request holds: 400 and a reason, or 409 for a whole number that is another pair; never a traceback, never an answer."""
    session = LabellingSession(dataset, tmp_path, count=3, length=6)
    with served(session) as base:

        @given(body=BODIES)
        @settings(max_examples=150, deadline=None, derandomize=True, database=None)
        def refused(body):
            for path in ("answer", "undo"):
                status, found, _ = request(f"{base}/{TOKEN}/{path}", body)
                whole = type(json.loads(body)) is dict and json.loads(body).keys() == {"index"}
                assert status == (409 if whole and path == "undo" else 400), (path, body, status)
                assert status == 409 or json.loads(found)["error"]

        refused()
        for body in DAMAGED:
            for path in ("answer", "undo"):
                assert request(f"{base}/{TOKEN}/{path}", body)[0] == 400, (path, body[:40])
        for place in ("9" * 5000 + "/0", "-1/0", "0/1.0", "x/0", "%D9%A1/0"):
            assert request(f"{base}/{TOKEN}/segment/{place}")[0] == 404
        assert json.loads(request(f"{base}/{TOKEN}/state")[1])["index"] == 0
    assert session.answers == []
    assert "Traceback" not in caplog.text


def test_every_reply_forbids_frames_and_caches(dataset, tmp_path):
    with served(LabellingSession(dataset, tmp_path, count=3, length=6)) as base:
        for path in (f"/{TOKEN}/", f"/{TOKEN}/state", f"/{TOKEN}/segment/0/0", f"/{TOKEN}/none", "/", "/wrong/state"):
            _, _, headers = request(base + path)
            assert "frame-ancestors 'none'" in headers["content-security-policy"], path
            assert (headers["x-frame-options"], headers["cache-control"]) == ("DENY", "no-store"), path


def test_the_token_is_in_nobody_elses_sight(dataset, tmp_path, monkeypatch):
    """The browser's command line names a file that only its owner can read; the session's own file is private too."""
    from rlkit2.preferences import labelling

    opened = []

    def open_page(address):
        file = Path(unquote(urlsplit(address).path))
        opened.append((address, file.read_text(), file.stat().st_mode & 0o777))

    class Server:
        def __init__(self, config):
            pass

        def run(self, sockets):
            raise KeyboardInterrupt

    monkeypatch.setattr(labelling.webbrowser, "open", open_page)
    monkeypatch.setattr(uvicorn, "Server", Server)
    said = []
    before = os.umask(0)
    try:
        serve_labelling(dataset, tmp_path / "a b", count=3, length=6, say=said.append)
    finally:
        os.umask(before)
    ((address, page, mode),) = opened
    target = re.search(r"http://127\.0\.0\.1:\d+/([\w-]+)/", said[0])
    assert address.startswith("file://")
    assert target[1] not in address
    assert target[0] in page
    assert mode == 0o600
    assert (tmp_path / "a b" / "session.json").stat().st_mode & 0o777 == 0o600
    assert not list((tmp_path / "a b").glob("*.html")) + list((tmp_path / "a b").glob(".open*"))


@pytest.mark.parametrize(
    "change",
    [
        {"pairs": [[0, 1.9]]},
        {"pairs": [[0, True]]},
        {"pairs": [[0, 1, 2]]},
        {"pairs": [[0, -1]]},
        {"pairs": [[0, 10**9]]},
        {"pairs": [[0, 17]]},  # runs past its episode
        {"pairs": [[0, float("inf")]]},
        {"pairs": {}},
        {"answers": {"left": 1}},
        {"answers": ["up"]},
        {"answers": [["left"]]},
        {"answers": ["left"] * 9},
    ],
    ids=str,
)
def test_a_session_file_that_was_changed_is_refused(dataset, tmp_path, change):
    LabellingSession(dataset, tmp_path, count=5, length=6)
    file = tmp_path / "session.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CorruptDatasetError, match="damaged"):
        LabellingSession(dataset, tmp_path, count=5, length=6)
    file.write_text("[" * 100_000)
    with pytest.raises(CorruptDatasetError, match="nested too deeply"):
        LabellingSession(dataset, tmp_path, count=5, length=6)


def test_a_full_disk_is_said_on_the_page(dataset, tmp_path, monkeypatch):
    from rlkit2 import files

    session = LabellingSession(dataset, tmp_path, count=3, length=6)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with served(session) as base:
        monkeypatch.setattr(files, "write_synced", full)
        status, body, _ = request(f"{base}/{TOKEN}/answer", {"index": 0, "answer": "left"})
        assert (status, "No space left" in json.loads(body)["error"]) == (500, True)
        monkeypatch.undo()
        assert json.loads(request(f"{base}/{TOKEN}/state")[1])["index"] == 0  # what is not saved does not count
    assert PreferenceDataset.load(tmp_path).label_mass.numel() == 0


def test_one_page_at_a_time(dataset, tmp_path):
    from rlkit2.preferences.labelling import _only_one

    with _only_one(tmp_path), pytest.raises(DatasetError, match="another labelling page is open"):
        serve_labelling(dataset, tmp_path, count=3, length=6, open_browser=False)


# --- the command, killed, and in a browser


@contextmanager
def command(folder, *options):
    """`rlkit2 prefs label builtin/rooms --serve`, with the address it prints."""
    arguments = ["prefs", "label", "builtin/rooms", "--serve", "--no-open-browser", "--out", str(folder), *options]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rlkit2.cli.main", *arguments]
    with warm.Popen(command, env=environment, stdout=warm.PIPE) as process:
        try:
            found = None
            while found is None:
                line = process.stdout.readline()
                assert line, "the command ended without an address"
                found = re.search(r"http://127\.0\.0\.1:\d+/[\w-]+/", line)
            yield process, found[0]
        finally:
            if process.poll() is None:
                process.kill()


def test_a_killed_session_loses_nothing(tmp_path):
    with command(tmp_path / "l", "--count", "6", "--length", "8") as (process, address):
        for index, answer in enumerate(("left", "right", "skip")):
            assert request(f"{address}answer", {"index": index, "answer": answer})[0] == 200
        os.kill(process.pid, signal.SIGKILL)
    assert PreferenceDataset.load(tmp_path / "l").label_mass.tolist() == [0, 1]
    with command(tmp_path / "l", "--count", "6", "--length", "8") as (process, address):
        state = json.loads(request(f"{address}state")[1])
        assert (state["index"], state["labels"], state["total"], state["frames"]) == (3, 2, 6, True)
        assert request(f"{address}segment/3/1")[1].startswith(GIF)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert "2 labels, 3 pairs left" in process.stdout.read()


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium, where this machine has one."""
    if lacks := browsers.missing():
        pytest.skip(lacks)
    with browsers.opened(tmp_path) as found:
        yield found


def test_a_person_labels_in_a_browser(browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def wait_for(index):
        WebDriverWait(browser, 30).until(
            lambda d: d.find_element(By.TAG_NAME, "body").get_attribute("data-index") == str(index)
        )

    def press(key):
        browser.find_element(By.TAG_NAME, "body").send_keys(key)

    with command(tmp_path / "l", "--count", "5", "--length", "8") as (_, address):
        browser.get(address)
        wait_for(0)
        for side in ("left", "right"):
            image = browser.find_element(By.CSS_SELECTOR, f"#{side} img")
            WebDriverWait(browser, 30).until(
                lambda d, image=image: d.execute_script("return arguments[0].naturalWidth", image) > 0
            )
        browser.save_screenshot(str(tmp_path / "page.png"))
        browser.find_element(By.ID, "left").send_keys(Keys.SPACE)  # what has the focus answers as a button does
        wait_for(1)
        press(Keys.ARROW_LEFT)
        wait_for(2)
        press("z")
        wait_for(1)
        press("s")
        wait_for(2)
        press(Keys.ARROW_DOWN)
        wait_for(3)
        browser.find_element(By.ID, "right").click()
        wait_for(4)
        assert "4 of 5 (3 labels)" in browser.find_element(By.ID, "count").text
        browser.find_element(By.CSS_SELECTOR, "[data-answer=left]").click()
        wait_for(5)
        assert browser.find_element(By.ID, "done").is_displayed()
        assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert PreferenceDataset.load(tmp_path / "l").label_mass.tolist() == [0, 0.5, 1, 0]
    if os.environ.get("RLKIT2_KEEP_SCREENSHOT"):
        shutil.copy(tmp_path / "page.png", os.environ["RLKIT2_KEEP_SCREENSHOT"])
