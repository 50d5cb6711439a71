"""`rlkit2 entangle` from the command line."""

import json

import pytest

from rlkit2.cli.main import main


def test_losses(capsys):
    assert main(["entangle", "losses", "--only", "dpo", "simpo", "sigmoid", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["loss"] for row in rows] == ["dpo", "simpo", "dpo"]
    assert rows[0]["u"] == 1
    assert rows[0]["chosen_falls_from"] == pytest.approx(1 / 1.2)
    assert rows[0]["regime"] == "both_down"
    assert rows[1]["u"] == pytest.approx(1.4)
    assert main(["entangle", "losses"]) == 0
    assert "aot_unpaired" in capsys.readouterr().out
    assert main(["entangle", "losses", "--only", "dpoo"]) == 2
    assert "did you mean dpo" in capsys.readouterr().err
    assert main(["entangle", "losses", "--cosine", "2"]) == 2
    assert "cosine=2.0 must be in [-1, 1]" in capsys.readouterr().err


def test_toy(capsys, tmp_path):
    folder = tmp_path / "toy"
    arguments = [
        "--suffixes",
        "1",
        "--remedies",
        "normalised",
        "--seeds",
        "1",
        "--steps",
        "1",
        "--fit-steps",
        "1",
        "--workers",
        "1",
    ]
    assert main(["entangle", "toy", "--out", str(folder), *arguments]) == 0
    assert "normalised descent" in capsys.readouterr().out
    assert {"toy.json", "toy.svg", "toy.png"} <= {path.name for path in folder.iterdir()}


def test_model(capsys, tmp_path):
    pytest.importorskip("transformers")
    from tests.entanglement.tiny_trl import gpt2, text_pairs, tokenizer

    for name, labels in (("lm", None), ("rm", 1), ("classifier", 3)):
        gpt2(labels=labels).save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps(pair) for pair in text_pairs(6)))

    def call(name, *arguments):
        out = tmp_path / f"{name}-out"
        return main(
            ["entangle", "model", "--model", str(tmp_path / name), "--pairs", str(pairs), "--out", str(out), *arguments]
        )

    assert call("lm", "--hyper", "beta=0.2", "--limit", "4") == 0
    shown = capsys.readouterr().out
    assert "4 pairs, loss dpo, method ghost" in shown
    report = json.loads((tmp_path / "lm-out" / "report.json").read_text())
    assert report["pairs"] == 4
    assert report["per_pair"]["d_w"] == pytest.approx([0.1] * 4)  # beta s(0) at the reference itself
    assert report["tokens"]["labels_chosen"][-1] == "<eos>"
    assert "<svg" in (tmp_path / "lm-out" / "report.html").read_text()
    assert call("lm", "--reference", str(tmp_path / "rm")) == 2  # a reward model is no reference
    assert call("rm", "--loss", "bradley_terry") == 0
    capsys.readouterr()
    for message, name, arguments in (
        ("is not a folder", "absent", ()),
        ("has no hyper-parameter 'bta'", "lm", ("--hyper", "bta=1")),
        ("must be name=number", "lm", ("--hyper", "beta")),
        ("a reward model has one", "classifier", ()),
        ("unknown margin loss", "lm", ("--loss", "nope")),
    ):
        assert call(name, *arguments) == 2
        assert message in capsys.readouterr().err


_SAY = {"role": "user", "content": "<bos> the film"}
_ANSWER = {"role": "assistant", "content": "positive"}
_GOOD = {"prompt": "<bos> the film <answer>", "chosen": " positive", "rejected": " negative"}


@pytest.mark.parametrize(("rows", "message"), [
    ([{"prompt": "a", "chosen": [_SAY, _ANSWER], "rejected": [_SAY, _SAY]}], "line 1: field 'prompt' is not what the messages"),
    ([{"prompt": _SAY["content"], "chosen": [_SAY, _ANSWER], "rejected": [_SAY, {**_ANSWER, "content": "negative"}]}], "no chat_template"),
    ([{**_GOOD, "prompt": [_SAY]}], "line 1: field 'chosen' is a text but the prompt is a list of chat messages"),
    ([_GOOD, {**_GOOD, "chosen": None}], "line 2: field 'chosen' is null"),
    ([_GOOD, {**_GOOD, "prompt": 7}], "line 2: field 'prompt' is a number"),
    ([{**_GOOD, "chosen": " positive" * 40}], "pair 0 (chosen) has 45 tokens but the model 32 positions"),
    ([{**_GOOD, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}, _GOOD], "line 2: field 'ref_chosen_logps' stands in only some rows"),
    ([_GOOD, [1]], "line 2 is a list"),
    ([{**_GOOD, "prompt": ""}], None),
    ([_GOOD], None),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["lm", "rm"])
def test_rows_of_every_shape_are_read_or_one_line(capsys, tmp_path, rows, message, kind):
    pytest.importorskip("transformers")
    from tests.entanglement.tiny_trl import gpt2, tokenizer

    gpt2(labels=1 if kind == "rm" else None).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps(row) for row in rows))
    loss = "bradley_terry" if kind == "rm" else "dpo"
    capsys.readouterr()
    code = main(
        [
            "entangle",
            "model",
            "--model",
            str(tmp_path / "model"),
            "--pairs",
            str(pairs),
            "--out",
            str(tmp_path / "out"),
            "--loss",
            loss,
        ]
    )
    error = capsys.readouterr().err
    assert "Traceback" not in error
    if message is None:
        assert code == 0 or "is empty" in error or "reward" in error
    else:
        assert code == 2
        assert message in error.replace("\n", " ")


def test_help(capsys):
    assert main(["entangle"]) == 2
    assert main(["entangle", "--help"]) == 0
    assert "losses" in capsys.readouterr().out
    assert main(["entangle", "los"]) == 2
