"""`rlkit2 prefs` as users type it."""

import inspect
import json
from dataclasses import dataclass

import pytest

from rlkit2.cli import prefs
from rlkit2.cli.main import main
from rlkit2.data import read_dataset
from rlkit2.data.preferences import PreferenceDataset
from rlkit2.fields import Count, field_types, show_fields
from rlkit2.preferences import RewardEnsemble, fit_reward_model, relabel
from rlkit2.preferences.options import FitOptions, RelabelOptions
from rlkit2.preferences.relabelling import relabelled_rewards
from tests.built import give_built

DATASET, OTHER = "builtin/rooms/stitch-dense-v0", "builtin/rooms/random-dense-v0"
FIT = ("--hidden-sizes", "8", "--steps", "20", "--no-starc")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return give_built(DATASET, OTHER, root=tmp_path_factory.mktemp("builtin"))


@pytest.fixture(autouse=True)
def shared(roots, built, monkeypatch):
    monkeypatch.setenv("RLKIT2_DATA", str(built))


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
        (("fit", "nothing", "--out", "r", "--members", 0), "members must be a whole number of at least 1, not 0"),
        (("fit", "nothing", "--out", "r", "--head", "relu"), "invalid choice 'relu' for argument '--head'"),
        (
            ("fit", "nothing", "--out", "r", "--caution", "mean-std"),
            "reduce must be text such as mean, min or mean-1*std",
        ),
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
    _, err = typed(capsys, "fit", "labels", "--dataset", OTHER, "--out", "reward", status=2)
    assert "these labels belong to builtin/rooms/stitch-dense-v0" in err


def test_an_option_of_fitting_is_written_once(monkeypatch, capsys):
    """A new field is an option of the command line and an argument of the function, checked in both; no signature repeats a field."""

    @dataclass(frozen=True, kw_only=True)
    class More(FitOptions):
        # how often the pairs are shuffled
        shuffles: Count = 3

    @show_fields(More)
    def example(labels, **options):
        """Example.

        Args:
            labels: pairs.
            **options: see above.
        """

    assert "shuffles: how often the pairs are shuffled (default 3); a whole number of at least 1." in example.__doc__
    assert inspect.signature(example).parameters["shuffles"].default == 3
    monkeypatch.setattr(prefs, "FitOptions", More)
    with pytest.raises(SystemExit):
        main(["prefs", "fit", "--help"])
    assert "how often the pairs are shuffled" in capsys.readouterr().out
    _, err = typed(capsys, "fit", "nothing", "--out", "r", "--shuffles", 0, status=2)
    assert "shuffles must be a whole number of at least 1, not 0" in err
    for function, cls in (
        (fit_reward_model, FitOptions),
        (relabel, RelabelOptions),
        (relabelled_rewards, RelabelOptions),
    ):
        fields = set(field_types(cls))
        assert not fields & set(function.__code__.co_varnames[: function.__code__.co_kwonlyargcount + 2])
        assert fields <= set(inspect.signature(function).parameters) or function is relabelled_rewards
    assert not set(inspect.signature(prefs.fit).parameters) & {*field_types(FitOptions), *field_types(RelabelOptions)}


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
