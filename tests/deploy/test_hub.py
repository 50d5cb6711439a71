"""Pushing to and pulling from a hub on loopback: whole or not at all, whatever the hub does; nothing that a file names is run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rlkit2
from rlkit2.agents.bc import BCConfig
from rlkit2.checksums import digest, sealed
from rlkit2.cli.main import main
from rlkit2.deploy.card import policy_card, run_card
from rlkit2.deploy.hub import LIST
from rlkit2.errors import ConfigError, HubError, MissingExtraError, RunError
from rlkit2.training import Run
from tests.deploy.hub_server import Hub, running
from tests.training.tiny_problem import Walk, tiny_dataset

pytest.importorskip("huggingface_hub")
NAME = "me/walk"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits before it tries again
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return rlkit2.train(
        BCConfig(hidden_sizes=(8,)), tiny_dataset(), steps=6, seeds=[3, 8], eval_every=2, eval_episodes=2, checkpoint_every=3, env=Walk,
        out=tmp_path_factory.mktemp("runs"), progress=False,
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_goes_there_and_comes_back(run: Run, hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = contents(run.path)
    address = rlkit2.push(run, NAME, hub=hub.address, private=True, message="the first")
    assert address == f"{hub.address}/{NAME}/commit/{0:040x}"
    assert hub.private[NAME]
    assert hub.messages == ["the first"]
    assert contents(run.path) == before
    assert set(hub.files(NAME)) == {
        *("README.md", LIST, "config.json", "manifest.json", "evaluations.jsonl", "metrics.jsonl", "metrics.csv"),
        *("policy/policy.json", "policy/policy.safetensors"),
    }
    asked: list[tuple[int, int]] = []
    place = rlkit2.pull(NAME, tmp_path / "there", hub=hub.address, progress=lambda *call: asked.append(call))
    assert place == tmp_path / "there" / "walk"
    assert asked == [(at, 7) for at in range(1, 8)]
    assert contents(place) == {name: before[name] for name in before if not name.startswith(("checkpoints", ".lock"))}
    assert [one.name for one in place.parent.iterdir()] == ["walk"]
    again = rlkit2.load_run(place)
    assert again.id == run.id
    np.testing.assert_array_equal(
        rlkit2.evaluate(again, episodes=2, env=Walk).returns, rlkit2.evaluate(run, episodes=2, env=Walk).returns
    )
    assert capfd.readouterr().err == ""
    with pytest.raises(ConfigError, match=r"walk is there already; name another folder"):
        rlkit2.pull(NAME, tmp_path / "there", hub=hub.address)


def test_with_checkpoints_it_is_resumed(run: Run, hub: Hub, tmp_path: Path) -> None:
    rlkit2.push(run.path, NAME, hub=hub.address, checkpoints=True)
    place = rlkit2.pull(NAME, tmp_path, hub=hub.address)
    assert list(rlkit2.load_run(place).checkpoints) == [6]
    on = rlkit2.train(resume=place, dataset=tiny_dataset(), steps=8, env=Walk, progress=False)
    assert on.checkpoint().step == 8


def test_an_online_run_is_resumed_with_what_it_has_collected(hub: Hub, tmp_path: Path) -> None:
    options = {"hidden_sizes": (8,)}
    part = rlkit2.train_online(
        "sac", env="Pendulum-v1", steps=40, warmup=10, until=25, out=tmp_path / "runs", overrides=options, eval_every=0, progress=False
    )  # fmt: skip
    rlkit2.push(part, NAME, hub=hub.address)
    assert not any(name.startswith("replay") for name in hub.files(NAME))
    rlkit2.push(part, NAME, hub=hub.address, checkpoints=True)
    place = rlkit2.pull(NAME, tmp_path / "pulled", hub=hub.address)
    ends = [rlkit2.train(resume=one, progress=False).checkpoint().tensors for one in (part, place)]
    assert ends[0].keys() == ends[1].keys()
    assert all(bool((ends[0][name] == ends[1][name]).all()) for name in ends[0])


def test_a_policy_goes_there_and_comes_back(run: Run, hub: Hub, tmp_path: Path) -> None:
    one = run.policy.select_seed(1)
    one.save(tmp_path / "one.safetensors")
    rlkit2.push(tmp_path / "one.safetensors", NAME, hub=hub.address)
    place = rlkit2.pull(NAME, tmp_path, hub=hub.address)
    loaded = rlkit2.load_policy(place)
    assert loaded.seeds == (8,)
    seen = torch.zeros(2, 3)
    assert torch.equal(loaded(seen), one(seen))
    assert loaded.metadata == one.metadata
    assert "it was shared without its run" in hub.files(NAME)["README.md"].decode()


def test_revisions(run: Run, hub: Hub, tmp_path: Path) -> None:
    rlkit2.push(run, NAME, hub=hub.address)
    rlkit2.push(run.path / "policy", NAME, hub=hub.address)
    assert rlkit2.load_policy(rlkit2.pull(NAME, tmp_path / "new", hub=hub.address)).seeds == (3, 8)
    old = rlkit2.pull(NAME, tmp_path / "old", hub=hub.address, revision=f"{0:040x}")
    assert rlkit2.load_run(old).id == run.id
    with pytest.raises(HubError, match=f"has no such revision of {NAME}; nothing is left here"):
        rlkit2.pull(NAME, tmp_path / "other", hub=hub.address, revision="nowhere")


def test_the_commands(
    run: Run, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["push", str(run.path), NAME, "--hub", hub.address]) == 0
    out = capsys.readouterr().out
    assert f"{run.path}: pushed, {hub.address}/{NAME}/commit/" in out
    assert f"next: rlkit2 pull {NAME} --hub {hub.address}" in out
    assert main(["pull", NAME, "--hub", hub.address]) == 0
    assert "runs/walk: whole, from me/walk\nnext: rlkit2 evaluate runs/walk" in capsys.readouterr().out
    hub.faults["commit"] = 500
    assert main(["push", str(run.path), "me/other", "--hub", hub.address]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert (
        f"{hub.address} answered 500 about me/other; nothing is changed here, so the same command can be given again"
        in error
    )


@pytest.mark.parametrize("where", ["/api/repos/create", "/preupload/", "/commit/"])
def test_a_hub_that_answers_500_changes_nothing_here(where: str, run: Run, hub: Hub) -> None:
    before = contents(run.path)
    hub.faults[where] = 500
    with pytest.raises(HubError, match=f"answered 500 about {NAME}; nothing is changed here"):
        rlkit2.push(run, NAME, hub=hub.address)
    assert contents(run.path) == before
    assert not any(hub.repositories.values())
    hub.faults.clear()
    rlkit2.push(run, NAME, hub=hub.address)


@pytest.mark.parametrize(
    ("where", "fault", "message"),
    [
        (f"GET /api/models/{NAME}", 500, "answered 500 about"),
        (LIST, 500, "answered 500 about"),
        ("policy.safetensors", 503, "answered 503 about"),
        ("policy.safetensors", "drop", "could not be reached, or broke off, about|answered 200 about"),
        ("config.json", 401, r"has no me/walk for you: it does not exist, or you have to log in \(hf auth login"),
    ],
)
def test_a_pull_that_fails_leaves_nothing(
    where: str, fault: Any, message: str, run: Run, hub: Hub, tmp_path: Path
) -> None:
    rlkit2.push(run, NAME, hub=hub.address)
    hub.faults[where] = fault
    out = tmp_path / "there"
    with pytest.raises(HubError, match=message) as caught:
        rlkit2.pull(NAME, out, hub=hub.address)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("nothing is left here")
    assert list(out.iterdir()) == []
    hub.faults.clear()
    assert rlkit2.load_run(rlkit2.pull(NAME, out, hub=hub.address)).id == run.id


def test_a_hub_that_is_not_there(run: Run, hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(
        HubError,
        match=r"http://127.0.0.1:1 could not be reached, or broke off, about me/walk \(.*; nothing is changed here",
    ):
        rlkit2.push(run, NAME, hub="http://127.0.0.1:1")
    with pytest.raises(HubError, match=r"could not be reached.*; nothing is left here"):
        rlkit2.pull(NAME, tmp_path, hub="http://127.0.0.1:1")
    with pytest.raises(HubError, match="has no me/nothing for you: it does not exist, or you have to log in"):
        rlkit2.pull("me/nothing", tmp_path, hub=hub.address)
    hub.repositories["me/other"] = [{"README.md": b"of somebody else"}]
    with pytest.raises(HubError, match=f"holds no {LIST}, or not the files it lists: rlkit2 did not push it"):
        rlkit2.pull("me/other", tmp_path, hub=hub.address)


def damaged(files: dict[str, bytes], how: str) -> dict[str, bytes]:
    """What a hub may hold instead of what was pushed."""
    files = dict(files)
    listed = json.loads(files[LIST])
    digests = {name: value for name, value in listed.pop("sha256").items() if name != "this file"}
    if how == "file":
        files["policy/policy.safetensors"] = files["policy/policy.safetensors"][:-1] + b"x"
    elif how == "list":
        files[LIST] = files[LIST].replace(b'"run"', b'"policy"', 1)
    elif how == "nonsense":
        files[LIST] = b"[1]"
    elif how == "newer":
        files[LIST] = json.dumps(sealed({**listed, "format": 2}, digests)).encode()
    elif how == "outside":
        files["../../evil.json"] = b"{}"
        files[LIST] = json.dumps(sealed(listed, {**digests, "../../evil.json": digest(b"{}")})).encode()
    elif how == "code":
        files["policy/hook.py"] = b"raise SystemExit"
        files[LIST] = json.dumps(sealed(listed, {**digests, "policy/hook.py": digest(b"raise SystemExit")})).encode()
    elif how == "missing":
        del digests["config.json"]
        files[LIST] = json.dumps(sealed(listed, digests)).encode()
    elif how == "empty":
        files[LIST] = json.dumps(sealed(listed, {})).encode()
    elif how == "rewritten":
        config = json.loads(files["config.json"])
        files["config.json"] = json.dumps({**config, "seeds": "many"}).encode()
        files[LIST] = json.dumps(sealed(listed, {**digests, "config.json": digest(files["config.json"])})).encode()
    return files


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        (
            "file",
            HubError,
            "policy/policy.safetensors of me/walk does not have the checksum it was pushed with; nothing is left",
        ),
        ("list", HubError, f"{LIST} of me/walk is damaged"),
        ("nonsense", HubError, f"{LIST} of me/walk is damaged"),
        ("newer", HubError, "was pushed by a newer rlkit2"),
        ("outside", HubError, "names '../../evil.json', which is not a file of a run"),
        ("code", HubError, "names 'policy/hook.py', which is not a file of a run"),
        ("missing", RunError, "me/walk is not a whole run: .* holds no config.json"),
        ("empty", HubError, "is damaged"),
        ("rewritten", RunError, "me/walk is not a whole run"),
    ],
)
def test_what_is_not_what_was_pushed_does_not_appear(
    how: str, error: type[Exception], message: str, run: Run, hub: Hub, tmp_path: Path
) -> None:
    rlkit2.push(run, NAME, hub=hub.address)
    hub.repositories[NAME].append(damaged(hub.files(NAME), how))
    out = tmp_path / "there"
    with pytest.raises(error, match=message) as caught:
        rlkit2.pull(NAME, out, hub=hub.address)
    assert "\n" not in str(caught.value)
    assert list(out.iterdir()) == []
    assert not (tmp_path / "evil.json").exists()


def test_nothing_damaged_or_unfinished_leaves(
    run: Run, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nothing", "me", "me/../x", "me/a b", "/a/b"):
        with pytest.raises(ConfigError, match="is not a repository; write owner/name"):
            rlkit2.push(run, name, hub=hub.address)
    with pytest.raises(RunError, match="does not exist"):
        rlkit2.push(tmp_path / "nothing", NAME, hub=hub.address)
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    (copy / "policy/policy.safetensors").write_bytes(b"nonsense")
    with pytest.raises(RunError, match=f"{copy} is not a whole run"):
        rlkit2.push(copy, NAME, hub=hub.address)
    monkeypatch.setattr(Run, "status", "running")
    with pytest.raises(RunError, match="is being trained; push it when that has ended"):
        rlkit2.push(run, NAME, hub=hub.address)
    assert hub.asked == []


def test_without_the_extra_it_is_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: rlkit2.push(run, NAME), lambda: rlkit2.pull(NAME, tmp_path)):
        with pytest.raises(MissingExtraError, match=r"pip install 'rlkit2\[hub\]'"):
            call()


def test_the_card_says_what_it_is(run: Run) -> None:
    card = run_card(run, NAME)
    assert card.startswith("---\nlibrary_name: rlkit2\npipeline_tag: reinforcement-learning\n")
    head = card.split("---\n")[1]
    yaml = pytest.importorskip("yaml")
    values = yaml.safe_load(head)
    assert values["tags"][-1] == "bc"
    (result,) = values["model-index"][0]["results"]
    assert result["dataset"]["name"] == "tiny/walk-v0"
    assert "95 % interval" in result["metrics"][0]["value"]
    final = rlkit2.evaluate(run, episodes=2, env=Walk).summary()
    assert (
        f"| **final** (the number to report) | step 6 | {final['mean']:.1f} (95 % interval {final['interval'][0]:.1f} to "
        in card
    )
    assert "best (an oracle: picked by the score it shows)" in card
    assert run.config["dataset"]["content_hash"] in card
    command = run.manifest["starts"][0]["command"]
    assert f"```sh\n{command}\n```" in card
    assert "2 episodes per seed; seeds 3, 8." in card
    assert f"torch {torch.__version__}" in card
    assert f"rlkit2 pull {NAME}" in card
    assert "\n| hidden_sizes | `[8]` |\n" in card
    policy = rlkit2.load_policy(run.path)
    alone = policy_card(policy, NAME)
    assert "| dataset | tiny/walk-v0 |" in alone
    policy.metadata = {}
    assert "trained offline on `unknown`" in policy_card(policy, NAME)


def test_a_run_without_evaluations_has_a_card(tmp_path: Path) -> None:
    run = rlkit2.train(BCConfig(hidden_sizes=(8,)), tiny_dataset(), steps=2, eval_every=0, out=tmp_path, progress=False)
    card = run_card(run, NAME)
    assert "It was never evaluated while it was trained." in card
    assert "model-index" not in card
