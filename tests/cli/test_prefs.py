"""`rlkit2 prefs` as users type it."""

import json

import pytest

from rlkit2.cli.main import main
from rlkit2.data import read_dataset
from rlkit2.data.preferences import PreferenceDataset
from rlkit2.preferences import RewardEnsemble
from tests.preferences.make import share_builtin

DATASET = "builtin/rooms/stitch-dense-v0"
FIT = ("--hidden-sizes", "8", "--steps", "20", "--no-starc")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return tmp_path_factory.mktemp("builtin")


@pytest.fixture(autouse=True)
def shared(roots, built, monkeypatch):
    share_builtin(DATASET, built, monkeypatch)


def typed(capsys, *words, status=0):
    """Output and errors of a command that must end with `status`."""
    assert main(["prefs", *map(str, words)]) == status
    out, err = capsys.readouterr()
    return out, err


def test_label_fit_and_relabel(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out, _ = typed(capsys, "label", DATASET, "--out", "labels", "--count", 60, "--length", 8, "--teacher", "mistake")
    assert "labels: 60 pairs of 8 steps" in out
    labels = PreferenceDataset.load("labels")
    assert labels.source["teacher"] == "mistake"
    _, err = typed(capsys, "label", DATASET, "--out", "labels", "--length", 8, status=2)
    assert "holds labels already" in err
    typed(capsys, "label", DATASET, "--out", "labels", "--count", 20, "--length", 8, "--seed", 1, "--more")
    assert len(PreferenceDataset.load("labels")) == 80
    out, _ = typed(
        capsys,
        "fit",
        "labels",
        "--out",
        "reward",
        *FIT,
        "--figure",
        "f.svg",
        "--relabel-as",
        "my/learned-v0",
        "--offset",
        "max",
    )
    for name in ("learned", "zero", "constant", "random labels", "true"):
        assert name in out
    assert "64 labels of 8 steps, judged on 16 held-out pairs" in out
    assert (tmp_path / "f.svg").stat().st_size > 1000
    assert float(read_dataset("my/learned-v0").rewards.max()) == pytest.approx(0, abs=1e-5)
    model = RewardEnsemble.load("reward")
    assert model.description["labels"] == 64
    assert 0.75 < model.description["evaluation"]["true"]["accuracy"] <= 1  # one answer in ten is a mistake
    assert (tmp_path / "reward" / "rewards.safetensors").exists()
    out, _ = typed(
        capsys,
        "label",
        DATASET,
        "--out",
        "more",
        "--count",
        8,
        "--length",
        8,
        "--sampler",
        "disagreement",
        "--model",
        "reward",
    )
    assert PreferenceDataset.load("more").source["sampler"] == "disagreement"
    out, _ = typed(capsys, "fit", "labels", "--out", "reward2", *FIT, "--json")
    assert json.loads(out)["description"]["labels"] == 64


def test_the_distance_is_in_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    typed(capsys, "label", DATASET, "--out", "labels", "--count", 60, "--length", 8)
    out, _ = typed(capsys, "fit", "labels", "--out", "reward", *FIT[:-1], "--discount", 0.9, "--json")
    rows = json.loads(out)["description"]["evaluation"]
    assert rows["true"]["starc"]["distance"] == pytest.approx(0, abs=1e-5)
    assert rows["zero"]["starc"]["distance"] is None
    assert 0 < rows["learned"]["starc"]["low"] <= rows["learned"]["starc"]["high"] <= 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("label", DATASET, "--out", "l", "--teacher", "kind"), "unknown teacher 'kind'"),
        (("label", DATASET, "--out", "l", "--length", "500"), "has 500 steps; the longest has"),
        (("label", DATASET, "--out", "l", "--length", "8", "--sampler", "disagreement"), "needs a reward ensemble"),
        (("label", DATASET, "--out", "l", "--model", "none", "--sampler", "entropy"), "no reward model here"),
        (("label", DATASET, "--out", "l", "--people", "none"), "files named indices_num"),
        (("label", "builtin/nothing", "--out", "l"), "no built-in dataset"),
        (("fit", "nothing", "--out", "r"), "no labels in nothing"),
        (("fits",), "did you mean fit?"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    _, err = typed(capsys, *words, status=2)
    assert message in err
    assert err.count("\n") == 1


def test_labels_of_another_dataset_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    typed(capsys, "label", DATASET, "--out", "labels", "--count", 10, "--length", 8)
    _, err = typed(capsys, "fit", "labels", "--dataset", "builtin/rooms/random-dense-v0", "--out", "reward", status=2)
    assert "these labels belong to builtin/rooms/stitch-dense-v0" in err


@pytest.mark.parametrize("words", [(), ("--help",), ("label", "--help"), ("fit", "--help"), ("study", "--help")])
def test_help_shows_an_example(capsys, words):
    try:
        status = main(["prefs", *words])
    except SystemExit as end:
        status = end.code
    assert status == (0 if words else 2)
    out = capsys.readouterr().out
    assert "rlkit2 prefs" in out
    assert "Example" in out or "example" in out
