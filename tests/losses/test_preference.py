"""Bradley-Terry, CPL and IPL losses against reference values."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit2.errors import ConfigError
from rlkit2.losses.preference import (
    bradley_terry_loss,
    cpl_loss,
    cpl_rank_loss,
    implicit_reward,
    ipl_loss,
    segment_advantage,
)

REFERENCE = Path(os.environ.get("RLKIT2_REFERENCE", Path(__file__).parents[1] / "data" / "reference"))


@pytest.fixture(scope="module")
def vectors():
    with np.load(REFERENCE / "preferences_segments.npz") as file:
        return {key: file[key] for key in file.files}


def _settings(key):
    return {name: float(value) for name, value in re.findall(r"(\w+)=([\d.]+)", key)}


def test_bradley_terry(vectors):
    keys = [key for key in vectors if key.startswith("bt/")]
    for key in keys:
        reduce = torch.sum if "/sum/" in key else torch.mean
        returns = [reduce(torch.tensor(vectors[f"reward/r_{side}"]), -1).requires_grad_() for side in "wl"]
        s = _settings(key)
        loss = bradley_terry_loss(*returns, label_mass=s["y"], beta=s["beta"], margin=s["margin"])
        rows = [loss.detach(), *torch.autograd.grad(loss.sum(), returns)]
        for ours, theirs in zip(rows, vectors[key], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-13, err_msg=key)
    assert len(keys) == 24
    sums = [vectors[f"reward/r_{side}"].sum(-1) for side in "wl"]
    centered = bradley_terry_loss(*sums, centering=0.01)
    np.testing.assert_allclose(centered, vectors["bt_centered/sum/coef=0.01"], rtol=1e-10)


def test_bradley_terry_is_blind_to_a_common_offset():
    w, l_ = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(bradley_terry_loss(w, l_), bradley_terry_loss(w + 3, l_ + 3), rtol=0, atol=1e-12)


def test_cpl(vectors):
    keys = [key for key in vectors if key.startswith("cpl/loss/")]
    for key in keys:
        s = _settings(key)
        logps = [torch.tensor(vectors[f"cpl/logp_{side}"]) for side in "wl"]
        scores = [segment_advantage(logp, alpha=s["alpha"], discount=s["gamma"]).requires_grad_() for logp in logps]
        loss = cpl_loss(*logps, alpha=s["alpha"], lam=s["lambda"], discount=s["gamma"])
        by_score = torch.nn.functional.softplus(s["lambda"] * scores[1] - scores[0])
        rows = [scores[0].detach(), scores[1].detach(), loss, *torch.autograd.grad(by_score.sum(), scores)]
        for ours, theirs in zip(rows, vectors[key], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-13, err_msg=key)
    assert len(keys) == 12


def test_cpl_rank(vectors):
    for lam in ("1", "0.5"):
        loss = cpl_rank_loss(vectors["cpl_rank/adv"], vectors["cpl_rank/score"], lam=float(lam))
        np.testing.assert_allclose(loss, vectors[f"cpl_rank/lambda={lam}"], rtol=1e-12)
    assert cpl_rank_loss(np.array([1.0, 2.0]), np.array([0.0, 0.0])) == 0


def test_ipl(vectors):
    q, v = vectors["ipl/q"], vectors["ipl/v_next"]
    for key in ("chi2=0.5/clip=1", "chi2=0.5/clip=0", "chi2=0.1/clip=1", "chi2=0.1/clip=0"):
        s = _settings(key)
        chi2, clip = s["chi2"], bool(s["clip"])
        rewards = [implicit_reward(q[i], v[i], discount=0.99, chi2=chi2, clip=clip) for i in (0, 1)]
        preference = bradley_terry_loss(rewards[0].sum(-1), rewards[1].sum(-1))
        penalty = sum((r**2).mean(-1) for r in rewards) / 2
        np.testing.assert_allclose([preference, penalty], vectors[f"ipl/{key}"], rtol=1e-10, err_msg=key)
        loss = ipl_loss(q[0], q[1], v[0], v[1], discount=0.99, chi2=chi2, clip=clip)
        np.testing.assert_allclose(loss.mean(), vectors[f"ipl/{key}/total"], rtol=1e-10, err_msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_labels_mix_both_directions(dtype):
    w, r = torch.randn(2, 7, 5, dtype=dtype, generator=torch.Generator().manual_seed(1))
    tie = cpl_loss(w, r, label_mass=0.5)
    torch.testing.assert_close(tie, (cpl_loss(w, r) + cpl_loss(r, w)) / 2)
    assert tie.dtype == dtype


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match="have shapes"):
        cpl_loss(torch.zeros(2, 5), torch.zeros(2, 6))
    with pytest.raises(ConfigError, match="label_mass"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(2), label_mass=1.5)
    with pytest.raises(ConfigError, match="lam=0"):
        cpl_loss(torch.zeros(2, 5), torch.zeros(2, 5), lam=0)
    with pytest.raises(ConfigError, match="discount=0"):
        segment_advantage(torch.zeros(2, 5), discount=0)


@settings(deadline=None, max_examples=60)
@given(
    bad=st.sampled_from([-0.01, 1.01, float("nan"), float("inf"), -3.0]),
    place=st.integers(0, 3),
    kind=st.sampled_from(["number", "tensor", "numpy"]),
)
def test_labels_out_of_range_are_refused_in_every_form(bad, place, kind):
    mass = np.full(4, 0.5)
    mass[place] = bad
    given_ = {"number": bad, "numpy": mass, "tensor": torch.tensor(mass)}[kind]
    sides = (np.zeros(4), np.ones(4)) if kind == "numpy" else (torch.zeros(4), torch.ones(4))
    for call in (
        lambda: bradley_terry_loss(*sides, label_mass=given_),
        lambda: cpl_loss(sides[0][:, None], sides[1][:, None], label_mass=given_),
    ):
        with pytest.raises(ConfigError, match=r"label_mass must be in \[0, 1\]"):
            call()
    bradley_terry_loss(*sides, label_mass=np.clip(np.nan_to_num(mass), 0, 1))


def test_labels_may_be_batched_by_vmap():
    y = torch.tensor([[0.0, 1.0], [0.5, 0.25]])
    found = torch.func.vmap(lambda one: bradley_terry_loss(torch.zeros(2), torch.ones(2), label_mass=one))(y)
    assert found.shape == (2, 2)
