"""The toy study: its grammar, resuming, the remedies' objectives, and (slow) the effect itself."""

import json

import numpy as np
import pytest
import torch

from rlkit2.entanglement.token_mask import TokenMask
from rlkit2.errors import ConfigError
from rlkit2.preferences.entanglement import causal_lm_logp
from rlkit2.studies.entanglement_toy import REMEDIES, ToyConfig, figure, fit, objective, run_toy, train
from rlkit2.studies.toy_language import ADJECTIVES, PROMPT_LENGTH, WORDS, SentimentGrammar, SmallGPT

SMALL = ToyConfig(suffixes=(0, 2), seeds=2, fit_steps=2, steps=2, every=1, held_out=6, probes=3, width=16)


def test_pairs_differ_in_the_sentiment_word_alone():
    grammar = SentimentGrammar(5, seed=3)
    pairs = grammar.pairs(50)
    chosen, rejected = (rows["input_ids"] for rows in (pairs.chosen, pairs.rejected))
    assert chosen.shape == (50, grammar.length)
    assert ((chosen != rejected).nonzero()[:, 1] == PROMPT_LENGTH).all()
    for row in chosen:
        words = [WORDS[i] for i in row]
        assert words[5] in ADJECTIVES[words[PROMPT_LENGTH]]
        assert words[8] in ADJECTIVES[words[PROMPT_LENGTH]]
    assert pairs.chosen["completion_mask"].sum(1).tolist() == [7] * 50
    labelled = SentimentGrammar(0, seed=1).labelled(2000)
    wrong = [WORDS[r[5]] not in ADJECTIVES[WORDS[r[PROMPT_LENGTH]]] for r in labelled]
    assert np.mean(wrong) == pytest.approx(0.3, abs=0.04)
    assert torch.equal(SentimentGrammar(3, 7).labelled(4), SentimentGrammar(3, 7).labelled(4))
    with pytest.raises(ConfigError, match="suffix=13"):
        SentimentGrammar(13)


@pytest.mark.parametrize("remedy", list(REMEDIES))
def test_every_objective_moves_the_parameters_its_own_way(remedy):
    torch.manual_seed(0)
    score = causal_lm_logp(SmallGPT(width=16))
    pairs = SentimentGrammar(2, 0).pairs(4)
    reference = score.terms(score.params, pairs.rows).detach() + 0.2 * score.mask(pairs.rows)
    found = {
        name: torch.autograd.grad(objective(name, score, pairs, reference, TokenMask(16)), list(score.params.values()))
        for name in dict.fromkeys(("none", remedy))
    }
    sizes = {name: torch.stack([g.norm() for g in gradients]).norm() for name, gradients in found.items()}
    assert sizes[remedy] > 0
    if remedy not in ("none", "token_mask"):  # masking happens in the pairs
        gap = torch.stack([(a - b).norm() for a, b in zip(found["none"], found[remedy], strict=True)]).norm()
        assert gap > 1e-3 * sizes["none"]
    if remedy == "normalised":
        torch.testing.assert_close(sizes[remedy], sizes["none"], rtol=1e-3, atol=0)


def test_an_interrupted_study_goes_on_and_mixes_nothing(tmp_path):
    seen = []
    summary = run_toy(SMALL, tmp_path, workers=1, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (22, 22)  # 4 fits, 4 plain runs, 7 remedies x 2 seeds
    assert len(summary["cases"]) == 9
    assert json.loads((tmp_path / "toy.json").read_text()) == summary
    lost = tmp_path / "runs" / "suffix2-band-seed1.json"
    kept = (tmp_path / "runs" / "suffix0-none-seed0.json").stat().st_mtime_ns
    before = lost.read_text()
    lost.unlink()
    seen.clear()
    again = run_toy(SMALL, tmp_path, workers=1, progress=lambda done, total: seen.append(done))
    assert seen == [22]
    assert lost.read_text() == before
    assert again == summary
    assert (tmp_path / "runs" / "suffix0-none-seed0.json").stat().st_mtime_ns == kept
    with pytest.raises(ConfigError, match="holds runs with steps=2"):
        run_toy(ToyConfig(**{**SMALL.__dict__, "steps": 3}), tmp_path, workers=1)
    for case in summary["cases"]:
        assert np.shape(case["chosen"]) == (2, 3)
        assert np.isfinite(case["chosen"]).all()
    drawn = figure(summary)
    assert [len(axes.lines) for axes in drawn.axes] == [2 * 3 + 1, 2 * 3, 8 * 3 + 1, 8 * 3 + 1]


def test_bad_settings_are_named():
    for message, settings in (
        ("unknown remedy 'magic'", {"remedies": ("magic",)}),
        ("optimizer='lion'", {"optimizer": "lion"}),
        ("steps=0", {"steps": 0}),
        ("suffixes is empty", {"suffixes": ()}),
    ):
        with pytest.raises(ConfigError, match=message):
            ToyConfig(**settings)


@pytest.mark.slow
def test_a_long_suffix_makes_the_chosen_fall_and_normalised_descent_does_not():
    """Seed 0, Adam 1e-5: 12 shared words lose at least 0.5 nats in 300 steps; normalised descent loses at most 0.05; without shared words the chosen
    is above its start at 100 steps."""
    config = ToyConfig(seeds=1, every=300, held_out=256, probes=8)
    weights = fit(config, 12, 0).state_dict()
    ends = {}
    for remedy in ("none", "normalised"):
        model = SmallGPT()
        model.load_state_dict(weights)
        records = train(config, model, 12, remedy, 0)
        ends[remedy] = records[-1]["chosen"] - records[0]["chosen"]
    assert ends["none"] <= -0.5
    assert ends["normalised"] >= -0.05
    short = ToyConfig(seeds=1, steps=100, every=100, probes=8)
    records = train(short, fit(short, 0, 0), 0, "none", 0)
    assert records[-1]["chosen"] > records[0]["chosen"]
