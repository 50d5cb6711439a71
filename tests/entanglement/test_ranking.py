"""Scores per pair against their definitions, and a ranking that a kill interrupts anywhere."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit2.cli.main import main
from rlkit2.entanglement.measure import ches_scores, pair_geometry
from rlkit2.entanglement.model_folder import ModelFolder
from rlkit2.entanglement.pair_scores import FORWARD, GRADIENT, edit_distance, forward_scores, measured_scores
from rlkit2.entanglement.scores import PairBatch, causal_lm_logp, sums_of_sides
from rlkit2.errors import ConfigError, DatasetError
from rlkit2.studies.pair_ranking import rank_pairs
from rlkit2.studies.toy_language import SentimentGrammar, SmallGPT


def _slow_distance(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = np.arange(len(a) + 1), np.arange(len(b) + 1)
    for i in range(len(a)):
        for j in range(len(b)):
            table[i + 1, j + 1] = min(table[i, j + 1] + 1, table[i + 1, j] + 1, table[i, j] + (a[i] != b[j]))
    return table[-1, -1]


@given(st.lists(st.integers(0, 3), max_size=9), st.lists(st.integers(0, 3), max_size=9))
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_edit_distance_is_levenshteins(a, b):
    assert edit_distance(a, b) == _slow_distance(a, b)


def _uneven(model_width=16):
    """Pairs of unequal lengths on both sides, and a model."""
    torch.manual_seed(0)
    model = SmallGPT(width=model_width).double()
    short, long = (SentimentGrammar(n, 0).pairs(4) for n in (1, 4))
    pad = {name: torch.nn.functional.pad(x, (0, 3)) for name, x in short.rejected.items()}
    rows = {name: torch.cat([long.rejected[name][:2], pad[name][2:]]) for name in pad}
    return causal_lm_logp(model), PairBatch(long.chosen, rows)


def test_scores_are_what_their_definitions_say():
    score, pairs = _uneven()
    found = forward_scores(score, pairs)
    sums = sums_of_sides(score, score.prepare(pairs))
    assert set(found) == {*FORWARD, "logp_chosen", "logp_rejected", "tokens_chosen", "tokens_rejected"}
    torch.testing.assert_close(found["logp_chosen"], sums[0])
    torch.testing.assert_close(found["logp_rejected"], sums[1])
    n_w, n_l = found["tokens_chosen"], found["tokens_rejected"]
    assert n_l.tolist() == [6, 6, 3, 3]
    torch.testing.assert_close(found["ches"], ches_scores(score, None, pairs))
    states = []
    for rows in (score.prepare(pairs).chosen, score.prepare(pairs).rejected):
        hidden = score.hidden_states(score.params, rows)
        states.append((hidden * score.mask(rows)[..., None]).sum(1) / score.mask(rows).sum(1, keepdim=True))
    torch.testing.assert_close(found["ches_mean"], (states[0] * states[1]).sum(1) - states[0].square().sum(1))
    head = pair_geometry(score, None, pairs, method="head")
    torch.testing.assert_close(found["head_gap"], head.inner - head.sqnorm_w)
    torch.testing.assert_close(found["head_ratio"], head.inner / head.sqnorm_w)
    exact, method = measured_scores(score, pairs)
    loop = pair_geometry(score, None, pairs, method="loop")
    assert method == "ghost"
    torch.testing.assert_close(exact["c_w"], loop.inner / loop.sqnorm_w)
    torch.testing.assert_close(exact["gap"], loop.inner - loop.sqnorm_w)
    torch.testing.assert_close(exact["gap_mean"], loop.inner / (n_w * n_l) - loop.sqnorm_w / n_w**2)
    torch.testing.assert_close(exact["cosine"], loop.cosine)
    ids = [rows["input_ids"][2][rows["completion_mask"][2].bool()].tolist() for rows in (pairs.chosen, pairs.rejected)]
    assert found["edit"][2] == pytest.approx(1 - _slow_distance(*ids) / max(map(len, ids)))


def test_scores_need_a_language_model():
    reward = pytest.importorskip("tests.entanglement.tiny_trl").gpt2(labels=1)
    from rlkit2.entanglement.scores import sequence_reward

    with pytest.raises(ConfigError, match="need a causal language model"):
        forward_scores(sequence_reward(reward), SentimentGrammar(1, 0).pairs(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("transformers")
    from tests.entanglement.tiny_trl import gpt2, text_pairs, tokenizer

    place = tmp_path_factory.mktemp("ranking")
    gpt2(dropout=0.0).save_pretrained(place / "lm")
    tokenizer().save_pretrained(place / "lm")
    pairs = [pair for n in (1, 3, 6) for pair in text_pairs(4, suffix=n, seed=n)]
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return place, pairs


class KilledError(Exception):
    """Stands for a kill."""


def _killed_after(count):
    def progress(done, total):
        if done >= count:
            raise KilledError

    return progress


def test_a_killed_ranking_goes_on_and_gives_the_same_bytes(folder, tmp_path, monkeypatch):
    place, pairs = folder
    model = ModelFolder.load(place / "lm")
    lines = rank_pairs(model, pairs, tmp_path / "whole.jsonl", exact=5, microbatch=2)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert [line["rank"] for line in lines] == list(range(1, 13))
    assert sorted(line["index"] for line in lines) == list(range(12))
    assert [set(GRADIENT) <= set(line) for line in lines] == [True] * 5 + [False] * 7
    assert [line["gap"] for line in lines[:5]] == sorted((line["gap"] for line in lines[:5]), reverse=True)
    assert min(line["head_gap"] for line in lines[:5]) >= max(line["head_gap"] for line in lines[5:])
    measured = []
    cheap = forward_scores
    monkeypatch.setattr(
        "rlkit2.studies.pair_ranking.forward_scores", lambda *a, **k: measured.append(len(a[1])) or cheap(*a, **k)
    )
    for count in (2, 6, 12, 13, 17):
        out = tmp_path / f"{count}.jsonl"
        with pytest.raises(KilledError):
            rank_pairs(model, pairs, out, exact=5, microbatch=2, progress=_killed_after(count))
        assert not out.exists()
        with open(tmp_path / f"{count}.scores.jsonl", "a") as file:
            file.write('{"kind": "cheap", "ind')  # a line that was cut off
        rank_pairs(model, pairs, out, exact=5, microbatch=2)
        assert out.read_bytes() == whole
    assert sum(measured) == 5 * 12  # no pair was scored twice
    measured.clear()
    more = rank_pairs(model, pairs, tmp_path / "whole.jsonl", exact=12, by="edit", then_by="c_w")
    assert not measured
    assert [line["c_w"] for line in more] == sorted((line["c_w"] for line in more), reverse=True)


def test_scores_of_something_else_are_not_mixed_in(folder, tmp_path):
    place, pairs = folder
    model = ModelFolder.load(place / "lm")
    out = tmp_path / "r.jsonl"
    rank_pairs(model, pairs[:3], out, exact=1)
    for message, arguments in (
        ("of other pairs", {"examples": pairs[:2]}),
        ("with another max_length", {"max_length": 20}),
        ("with another head", {"head": False, "by": "ches"}),
        ("of another model", {"model": ModelFolder.load(place / "lm", dtype="float64")}),
    ):
        with pytest.raises(ConfigError, match=message):
            rank_pairs(**{"model": model, "examples": pairs[:3], "out": out, "exact": 1, **arguments})
    for message, arguments in (
        ("by='head_gap' .*without head=True", {"head": False}),
        ("then_by='ches'", {"then_by": "ches"}),
        ("exact=-1", {"exact": -1}),
    ):
        with pytest.raises(ConfigError, match=message):
            rank_pairs(model, pairs, tmp_path / "n.jsonl", **arguments)


def test_pairs_that_cannot_be_scored_come_last_with_the_reason(folder, tmp_path):
    place, pairs = folder
    model = ModelFolder.load(place / "lm")
    bad = [{**pairs[0], "chosen": "positive"}, {**pairs[0], "chosen": " film" * 40}]
    lines = rank_pairs(model, [bad[0], *pairs[:3], bad[1]], tmp_path / "r.jsonl", exact=2, microbatch=3)
    assert [line["index"] for line in lines[-2:]] == [0, 4]
    assert "merges prompt and completion" in lines[-2]["skipped"]
    assert "tokens but the model 32 positions" in lines[-1]["skipped"]
    with pytest.raises(DatasetError, match=r"no pair can be scored: .*merges"):
        rank_pairs(model, bad, tmp_path / "none.jsonl")


def test_the_command_line_prints_a_table_and_draws(folder, tmp_path, capsys):
    place, _ = folder
    out = tmp_path / "ranked.jsonl"
    arguments = ["entangle", "rank", str(place / "lm"), str(place / "pairs.jsonl"), "--out", str(out), "--exact", "4"]
    assert main([*arguments, "--top", "3"]) == 0
    said = capsys.readouterr()
    assert "pairs from the most to the least harmful" in said.out
    assert "12 pairs scored by head_gap, the gradients of the worst 4 measured" in said.out
    assert "read as explicit pairs" in said.err
    assert {"ranked.jsonl", "ranked.scores.jsonl", "ranked.svg"} == {path.name for path in tmp_path.iterdir()}
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["ranked"][0] == json.loads(out.read_text().splitlines()[0])
    assert main(["entangle", "rank", str(place / "none"), str(place / "pairs.jsonl"), "--out", str(out)]) == 2
    assert "is not a folder" in capsys.readouterr().err
