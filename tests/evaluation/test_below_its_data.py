"""A policy that does worse than the data it learnt from is told so, once, where the two can be compared."""

from __future__ import annotations

from pathlib import Path

import pytest

import rlkit2
from rlkit2.evaluation.scores import below_its_data
from rlkit2.training.run import Run

SMALL = {"hidden_sizes": (8,)}


def trained(dataset: str, out: Path) -> Run:
    """A cloning policy after one update, which has learnt nothing."""
    return rlkit2.train(
        "bc",
        dataset,
        steps=1,
        seeds=3,
        eval_every=1,
        eval_episodes=3,
        overrides=SMALL,
        out=out,
        progress=False,
        device="cpu",
    )


def test_a_policy_below_its_data_is_told_in_the_manifest(tmp_path: Path) -> None:
    run = trained("builtin/cartpole/expert-v0", tmp_path)
    data = run.manifest["data"]
    dataset = rlkit2.load_dataset("builtin/cartpole/expert-v0")
    assert data["mean_return"] == pytest.approx(float(dataset.episode_returns.double().mean()))
    assert data["mean_length"] == pytest.approx(float(dataset.episode_lengths.double().mean()))
    text = below_its_data(run)
    assert text is not None
    assert "worse than what the data do; give it more updates" in text
    assert run.manifest["warnings"].count(text) == 1
    rlkit2.train(resume=run, progress=False)  # it is through: the same is not said to the manifest again
    assert run.manifest["warnings"].count(text) == 1

    for change in (
        {"mean_return": data["mean_return"] * 10},  # other rewards than the environment's
        {"mean_return": 1.0},  # the policy does better
        {"mean_return": None},  # rewards that are no numbers
        {"mean_length": 1e9},  # longer episodes than the environment has
    ):
        run.update_manifest(data={**data, **change})
        assert below_its_data(run) is None
    run.update_manifest(data=data)
    run.rewrite({**run.config, "env": "CartPole-v1"})
    assert below_its_data(run) is None
