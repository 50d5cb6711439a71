"""Figures and pages of gradient entanglement are drawn from real records."""

import json

import numpy as np
import pytest
import torch

from rlkit2.entanglement.diagnose import diagnose
from rlkit2.entanglement.probe import EntanglementProbe
from rlkit2.errors import ConfigError
from rlkit2.preferences.entanglement import causal_lm_logp
from rlkit2.reporting.entanglement_figures import (
    cosine_histogram,
    logp_curves,
    own_cross_bars,
    predicted_realised,
    regime_map,
    token_heatmap,
    write_model_page,
    write_training_page,
)
from rlkit2.studies.toy_language import SentimentGrammar, SmallGPT


@pytest.fixture(scope="module")
def records():
    torch.manual_seed(0)
    logp = causal_lm_logp(SmallGPT(width=16, layers=1))
    probe = EntanglementProbe(logp, SentimentGrammar(3, 0).pairs(5), "dpo", reference="initial")
    optimizer = torch.optim.Adam(logp.module.parameters(), 1e-3)
    found = []
    for step in range(1, 4):
        probe.before()
        optimizer.zero_grad()
        (-logp.sums(logp.params, probe.batch.chosen).mean()).backward()
        optimizer.step()
        found.append(probe.after(step=step))
    return found


def test_figures_show_the_records(records):
    left, right = logp_curves(records).axes
    np.testing.assert_allclose(left.lines[0].get_ydata(), [r["logp_chosen"] for r in records])
    np.testing.assert_allclose(right.lines[0].get_ydata(), [r["logp_chosen"] - r["logp_rejected"] for r in records])
    counts = cosine_histogram(records).axes[0].collections[0].get_array()
    assert counts.sum() == 15  # every pair of every record is in a bin
    bars = own_cross_bars(records).axes[0].patches
    assert bars[0].get_height() == pytest.approx(records[0]["own_size"])
    scatter = predicted_realised(records).axes[0].collections
    assert [len(points.get_offsets()) for points in scatter] == [15, 15]
    points = np.concatenate([c.get_offsets() for c in regime_map(records[0]).axes[0].collections])
    assert sorted(points[:, 0]) == pytest.approx(sorted(records[0]["per_pair"]["c_w"]))
    image = token_heatmap(np.eye(2, 3), ["a", "$b"], ["x", "y", "z"]).axes[0].images[0]
    assert image.get_array().shape == (2, 3)
    with pytest.raises(ConfigError, match="as many labels"):
        token_heatmap(np.eye(2), ["a"], ["b"])
    with pytest.raises(ConfigError, match="no records"):
        logp_curves([])


def test_pages_stand_alone(records, tmp_path):
    page = write_training_page(records, tmp_path / "training.html").read_text()
    assert page.count("<svg") == 5
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")
    torch.manual_seed(1)
    logp = causal_lm_logp(SmallGPT(width=16, layers=1))
    report = diagnose(logp, SentimentGrammar(2, 1).pairs(4), "simpo", hyperparameters={"beta": 2.0})
    json.dumps(report, allow_nan=False)
    assert report["method"] == "ghost"
    assert report["hyperparameters"]["beta"] == 2.0
    assert set(report["meters"]) == {"pair", "batch"}
    assert report["remedies"]["normalised"]["share_ideal"] == 1
    labels = [[str(i) for i in report["tokens"][f"ids_{side}"]] for side in ("chosen", "rejected")]
    page = write_model_page(report, tmp_path / "model.html", labels=(labels[0], labels[1])).read_text()
    assert page.count("<svg") == 4
    worst = report["tokens"]["pair"]
    assert sum(report["tokens"]["rate_chosen"]) == pytest.approx(report["per_pair"]["rate_chosen"][worst], rel=1e-3)
