"""Every format of pairs, in every kind of file, found from the rows; and every way a row can be wrong, named by line and field."""

import copy
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit2.entanglement.pair_files import FORMATS, detect_format, read_pairs
from rlkit2.errors import ConfigError, DatasetError, DatasetNotFoundError


def _user(text):
    return {"role": "user", "content": text}


def _assistant(text):
    return {"role": "assistant", "content": text}


CHAT = {"prompt": [_user("Hi")], "chosen": [_assistant("Yes")], "rejected": [_assistant("No")]}
TEXT = {"prompt": "the film was", "chosen": " good", "rejected": " bad"}
SAMPLES = [
    ("explicit", TEXT, TEXT),
    ("explicit", CHAT, CHAT),
    ("implicit", {"chosen": [_user("Hi"), _assistant("Yes")], "rejected": [_user("Hi"), _assistant("No")]}, CHAT),
    ("implicit", {"chosen": "the film was good", "rejected": "the film was bad"}, TEXT),
    ("hh", {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: Yet no"},
     {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Yes", "rejected": " Yet no"}),
    ("hh", {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: e\n\nHuman: f\n\nAssistant: g"},
     {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " b\n\nHuman: c\n\nAssistant: d", "rejected": " e\n\nHuman: f\n\nAssistant: g"}),
    ("ultrafeedback", {"prompt": "Hi", "chosen": [_user("Hi"), _assistant("Yes")], "rejected": [_user("Hi"), _assistant("No")],
                       "score_chosen": 8.0}, CHAT),
    ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}],
                  "chosen": {"from": "gpt", "value": "Yes"},
                  "rejected": {"from": "gpt", "value": "No"}}, CHAT),
    ("alpaca", {"instruction": "Say", "input": "now", "output": ["x", "y"]}, {"prompt": "Say\n\nnow", "chosen": "\n\nx", "rejected": "\n\ny"}),
    ("alpaca", {"instruction": "Say", "input": "", "chosen": "x", "rejected": "y"}, {"prompt": "Say", "chosen": "\n\nx", "rejected": "\n\ny"}),
    ("alpaca", {"instruction": "Say", "output_1": "y", "output_2": "x", "preference": 2}, {"prompt": "Say", "chosen": "\n\nx", "rejected": "\n\ny"}),
]  # fmt: skip


def _write(path, rows, kind):
    if kind == "array":
        path.write_text(json.dumps(rows, indent=1))
    elif kind in ("folder", "parquet"):
        datasets = pytest.importorskip("datasets")
        table = datasets.Dataset.from_list(rows)
        table.save_to_disk(str(path)) if kind == "folder" else table.to_parquet(str(path))
    else:
        text = "\n\n".join(json.dumps(row) for row in rows)
        path.write_text(text, encoding="utf-8-sig" if kind == "bom" else "utf-8")


@pytest.mark.parametrize("kind", ["lines", "bom", "array", "parquet", "folder"])
@pytest.mark.parametrize(("name", "row", "pair"), SAMPLES)
def test_formats_are_found_and_read(tmp_path, name, row, pair, kind, capsys):
    path = tmp_path / {"parquet": "pairs.parquet", "folder": "pairs"}.get(kind, "pairs.json")
    _write(path, [row, row], kind)
    capsys.readouterr()
    said = []
    assert read_pairs(path, tell=said.append) == [pair, pair]
    assert len(said) == 1
    assert f"is read as {name} pairs" in said[0]
    assert read_pairs(path, 1, format=name) == [pair]
    assert detect_format(row) == name


def test_all_formats_have_a_sample():
    assert {name for name, _, _ in SAMPLES} == set(FORMATS)


BAD = st.sampled_from(
    [
        None,
        3,
        2.5,
        True,
        [],
        {},
        "",
        [1],
        [{"role": "user"}],
        [{"role": 1, "content": "x"}],
        {"from": "gpt"},
        float("nan"),
    ]
)


@given(sample=st.sampled_from(SAMPLES), bad=BAD, data=st.data())
def test_a_malformed_field_is_one_line_that_names_it(tmp_path_factory, sample, bad, data):
    name, row, _ = sample
    field = data.draw(st.sampled_from(sorted(set(row) - {"score_chosen"})))
    broken = copy.deepcopy(row)
    if data.draw(st.booleans()):
        del broken[field]
    else:
        broken[field] = bad
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    _write(path, [row, broken], "lines")
    try:
        found = read_pairs(path, format=name)
    except DatasetError as error:
        message = str(error)
        assert re.search(r"line 3", message), message
        assert "\n" not in message
        assert any(word in message for word in (*row, "chosen", "rejected", "output", "preference")), message
    else:  # another way to give the same, such as no input
        for pair in found:
            kinds = {type(pair[side]) for side in ("prompt", "chosen", "rejected")}
            assert kinds in ({str}, {list})
            assert pair["chosen"]
            assert pair["rejected"]


@pytest.mark.parametrize(("text", "message"), [
    ("", "holds no pairs"), ("{]", "line 1 is not JSON"), ('"a"', "line 1 is a text"), ("[1, 2]", "row 1 is a number"), ("[" * 100_000, "not JSON"),
    ('{"a": 1}', "line 1 has the fields a, which are none of the known formats"), ("{}", "line 1 has the fields none"),
    (json.dumps(TEXT) + "\n" + json.dumps({**TEXT, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}),
     "line 2: field 'ref_chosen_logps' stands in only some rows"),
    (json.dumps({**TEXT, "ref_chosen_logps": -1.0}), "has only one of ref_chosen_logps"),
    (json.dumps({**TEXT, "ref_chosen_logps": "x", "ref_rejected_logps": -1}), "line 1: field 'ref_chosen_logps' is 'x'"),
    (json.dumps({**CHAT, "chosen": "yes"}), "line 1: field 'chosen' is a text but the prompt is a list of chat messages"),
    (json.dumps({**TEXT, "chosen": None}), "line 1: field 'chosen' is null"),
    (json.dumps({**TEXT, "prompt": 3}), "line 1: field 'prompt' is a number"),
])  # fmt: skip
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(DatasetError, match=re.escape(message)):
        read_pairs(path)


def test_other_bad_arguments(tmp_path):
    with pytest.raises(DatasetNotFoundError):
        read_pairs(tmp_path / "nothing.jsonl")
    with pytest.raises(ConfigError, match="unknown format 'xml'"):
        read_pairs(tmp_path / "nothing.jsonl", format="xml")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match="not UTF-8"):
        read_pairs(tmp_path / "bytes.jsonl")
    (tmp_path / "bad.parquet").write_bytes(b"PAR")
    pytest.importorskip("pyarrow")
    with pytest.raises(DatasetError, match="cannot be read as preference pairs"):
        read_pairs(tmp_path / "bad.parquet")
