"""Diagnostics of TD errors against agents whose truth is known, and the command that prints them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlkit2
from rlkit2.agents import make_agent
from rlkit2.agents.error_model import Heads
from rlkit2.agents.iql import IQL, IQLConfig
from rlkit2.agents.uncertain_agent import PredictedTargets, UncertainAgent
from rlkit2.cli.main import main
from rlkit2.cli.output import finite
from rlkit2.data import Batch, TransitionDataset, dataset_from_arrays
from rlkit2.envs.noisy_rooms import noise_scale, noise_shape
from rlkit2.errors import ConfigError
from rlkit2.evaluation.calibration import auroc, td_diagnostics
from rlkit2.evaluation.noise_map import noise_map
from rlkit2.evaluation.return_coverage import return_coverage, returns_to_go
from rlkit2.nn.distributions import GeneralizedNormal
from rlkit2.training.building import split_dataset
from rlkit2.training.options import DataOptions
from tests.built import give_built


def dataset(count: int = 6000) -> TransitionDataset:
    """Points of the floor and small actions; every tenth step ends an episode."""
    rng = np.random.default_rng(0)
    ends = np.arange(1, count + 1) % 10 == 0
    return dataset_from_arrays(
        observations=rng.uniform(-1, 1, (count, 2)).astype(np.float32),
        actions=rng.uniform(-0.1, 0.1, (count, 2)).astype(np.float32),
        rewards=np.zeros(count, np.float32),
        next_observations=rng.uniform(-1, 1, (count, 2)).astype(np.float32),
        terminations=np.zeros(count, bool),
        truncations=ends,
    )


class Oracle(IQL):
    """Knows the law of its targets up to a factor on the deviation; its members disagree in proportion to the action."""

    factor = 1.0
    skewed = False

    def _heads(self, observations: torch.Tensor, actions: torch.Tensor) -> Heads:
        positions = observations.double().numpy()
        shape, scale = (torch.from_numpy(law(positions)).unsqueeze(1) for law in (noise_shape, noise_scale))
        spread = actions.double().abs().sum(-1).unsqueeze(1)
        members = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1)
        q = 1e-9 * members * spread
        return Heads(q, shape.expand_as(q), (self.factor * scale).log().expand_as(q))

    def predicted_targets(self, batch: Batch) -> PredictedTargets:
        heads = self._heads(batch.observations, batch.actions)
        scale = (heads.log_scale.exp() / self.factor)[:, 0]
        targets = GeneralizedNormal(torch.zeros_like(scale), scale, heads.shape[:, 0]).sample()
        if self.skewed:
            targets = targets.exp()
        return PredictedTargets(targets.unsqueeze(1).expand_as(heads.q), heads)

    def heads_at(self, observations: Any, actions: Any = None) -> Heads:
        observed = torch.as_tensor(observations).expand(1, -1, -1)
        return self._heads(observed, torch.as_tensor(actions).expand(1, -1, -1))


def oracle(factor: float = 1.0, skewed: bool = False) -> Oracle:
    torch.manual_seed(0)
    agent = Oracle(IQLConfig(critic="ggd", num_critics=3, hidden_sizes=(4,)), 2, 2)
    agent.factor, agent.skewed = factor, skewed
    return agent


def test_a_true_law_is_found_true() -> None:
    found = td_diagnostics(oracle(), dataset())
    assert found.error.shape == (1, 3, 6000)
    assert float(found.calibration_error[0]) < 0.01
    assert float(found.coverage[0.9][0]) == pytest.approx(0.9, abs=0.01)
    assert float(found.nll[0]) < float(found.nll_ggd[0]) < float(found.nll_gaussian[0])
    assert float(found.pooled_kurtosis[0]) > 1.0
    assert abs(float(found.mean_standardized[0])) < 0.05
    assert abs(float(found.skewness[0])) < 0.3
    np.testing.assert_allclose(found.qq[0, 9:-9, 0], found.qq[0, 9:-9, 1], atol=0.1)
    # |a| + |b| of random actions in [-1, 1] exceeds that of the data's, within 0.1, unless it is very small: 1 - E[(|a| + |b|)^2] / 2
    assert float(found.auroc[0]) == pytest.approx(1.0 - 0.5 * (0.1**2 + 2.0 * 0.1**2 / 12.0), abs=0.003)
    assert not found.warnings()
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_false_law_is_found_false() -> None:
    wide = td_diagnostics(oracle(factor=3.0), dataset())
    assert float(wide.calibration_error[0]) > 0.2
    assert float(wide.coverage[0.5][0]) > 0.8
    assert any("calibration" in warning for warning in wide.warnings())
    narrow = td_diagnostics(oracle(factor=0.2), dataset())
    assert float(narrow.coverage[0.9][0]) < 0.5
    assert float(narrow.nll[0]) > float(narrow.nll_ggd[0])
    skewed = td_diagnostics(oracle(skewed=True), dataset())
    assert float(skewed.skewness[0]) > 1.0
    assert any("skewed" in warning for warning in skewed.warnings())


def test_a_part_of_the_transitions_and_agents_without_noise() -> None:
    assert td_diagnostics(oracle(), dataset(), max_transitions=500).transitions == 500
    for agent in (make_agent("bc", dataset(10).spec), make_agent("iql", dataset(10).spec)):
        with pytest.raises(ConfigError, match="critic = 'ggd'"):
            td_diagnostics(agent, dataset(20))


class Members(UncertainAgent):
    """Says Q = 10 s_0 + what its members add, `shifts [M]`."""

    def __init__(self, shifts: list[float], discount: float) -> None:
        self.config: Any = SimpleNamespace(
            num_critics=len(shifts), discount=discount, bootstrap="rows", target="independent"
        )
        self.seeds, self.device, self.shifts = (0,), torch.device("cpu"), torch.tensor(shifts)

    def normalize(self, batch: Batch) -> Batch:
        return batch

    def critic(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return 10.0 * observations[..., 0].unsqueeze(1) + self.shifts.view(1, -1, 1)


def returning(episodes: int = 400, noise: float = 1.0, off: float = 0.0) -> TransitionDataset:
    """Episodes of three steps that end; the first observation is a tenth of the mean return from there (discount 1/2), plus `off`."""
    rng = np.random.default_rng(0)
    means = rng.uniform(-3, 3, (episodes, 3))
    observed = np.stack([means[:, t:] @ 0.5 ** np.arange(3 - t) for t in range(3)], 1)
    paid = means + rng.normal(size=means.shape) * noise
    return dataset_from_arrays(
        observations=np.stack([(observed.ravel() + off) / 10.0, observed.ravel()], 1).astype(np.float32),
        actions=np.zeros((3 * episodes, 1), np.float32),
        rewards=paid.ravel().astype(np.float32),
        next_observations=np.zeros((3 * episodes, 2), np.float32),
        terminations=np.tile([False, False, True], episodes),
        truncations=np.zeros(3 * episodes, bool),
    )


def test_returns_tell_whether_epistemic_sd_is_too_small() -> None:
    wide, narrow = ([-width, 0.0, width] for width in (0.5, 0.05))
    true = return_coverage(Members(wide, 0.5), returning(off=0.5))
    assert true.coverage[0] == 1.0  # off by one deviation everywhere
    assert true.ratio[0] == pytest.approx(1.0, abs=0.25)
    assert true.epistemic[0] == pytest.approx(0.5)
    small = return_coverage(Members(narrow, 0.5), returning(off=0.5))
    assert small.coverage[0] < 0.5
    assert small.ratio[0] == pytest.approx(0.1, abs=0.03)
    assert "far more than its critics disagree" in small.verdict()
    right = return_coverage(Members(narrow, 0.5), returning())
    assert right.coverage_without[0] > 0.75  # the noise of the returns alone: nothing is left for Q
    assert np.isnan(right.ratio[0])
    assert "do not tell" in right.verdict()
    json.dumps(finite(right.to_dict()), allow_nan=False)


def test_only_returns_that_are_known_count() -> None:
    rewards = np.ones(12)
    ends = np.arange(1, 13) % 4 == 0
    cut = dataset_from_arrays(
        observations=np.zeros((12, 1), np.float32),
        actions=np.zeros((12, 1), np.float32),
        rewards=rewards.astype(np.float32),
        next_observations=np.zeros((12, 1), np.float32),
        terminations=ends & (np.arange(12) < 4),
        truncations=ends & (np.arange(12) >= 4),
    )
    returns, remaining = returns_to_go(cut, 0.5)
    np.testing.assert_allclose(returns, [1.875, 1.75, 1.5, 1.0] * 3)
    np.testing.assert_allclose(remaining, [0, 0, 0, 0] + [0.0625, 0.125, 0.25, 0.5] * 2)
    with pytest.raises(ConfigError, match="1 held-out episodes have known returns"):
        return_coverage(Members([0.0, 1.0], 0.5), cut)
    with pytest.raises(ConfigError, match="one critic"):
        return_coverage(Members([0.0], 0.5), cut)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_auroc_is_the_share_of_ordered_pairs(positive: list[int], negative: list[int]) -> None:
    x, y = np.array(positive, float), np.array(negative, float)
    pairs = (x[:, None] > y).mean() + 0.5 * (x[:, None] == y).mean()
    assert auroc(x, y) == pytest.approx(pairs)


def test_the_map_of_an_oracle_is_the_truth() -> None:
    found = noise_map(oracle(), dataset(), cells=8)
    assert found.correlation[0] > 0.999
    assert found.ratio[0] == pytest.approx(1.0, abs=0.01)
    assert found.shape_rank_correlation[0] > 0.999
    assert found.visits.sum() == 6000
    assert found.true_sd[0, 0] < found.true_sd[0, -1]  # row 0 in the south, columns from west to east
    assert found.true_shape[0, 0] < found.true_shape[-1, 0]
    assert noise_map(oracle(factor=2.0), dataset(), cells=8).ratio[0] == pytest.approx(2.0, abs=0.02)


def test_held_out_episodes_are_those_not_trained_on() -> None:
    whole = dataset(400)
    training, held_out = split_dataset(whole, DataOptions(held_out=0.25, reward_scale=2.0))
    assert held_out is not None
    assert (training.num_episodes, held_out.num_episodes) == (30, 10)
    rows = {tuple(row) for row in training.observations.tolist()}
    assert not rows & {tuple(row) for row in held_out.observations.tolist()}
    again = split_dataset(whole, DataOptions(held_out=0.25, reward_scale=2.0))[1]
    assert again is not None
    assert torch.equal(again.observations, held_out.observations)
    assert split_dataset(whole, DataOptions())[1] is None
    with pytest.raises(ConfigError, match="held_out"):
        DataOptions(held_out=1.0)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    give_built("builtin/noisy-rooms")
    overrides = {"critic": "ggd", "hidden_sizes": (8,), "num_critics": 2}
    run = rlkit2.train(
        "iql",
        "builtin/noisy-rooms",
        steps=5,
        seeds=2,
        eval_every=0,
        held_out=0.1,
        overrides=overrides,
        progress=False,
        batch_size=16,
    )
    assert main(["uncertainty", str(run.path), "--max-transitions", "300"]) == 0
    text = capsys.readouterr().out
    assert "held-out episodes" in text
    assert "correlation with the true deviation" in text
    assert "size of epistemic_sd: the critics saw the same rows" in text
    assert "size of epistemic_sd: the critics learn from shared targets" in text
    folder = run.path / "uncertainty"
    assert {path.name for path in folder.iterdir()} == {"calibration.png", "diagnostics.json", "noise_map.png"}
    report = json.loads((folder / "diagnostics.json").read_text())
    assert report["held_out"] is True
    assert len(report["calibration_error"]) == 2
    assert len(report["epistemic_limits"]) == 2
    assert isinstance(report["epistemic_size"], str) or len(report["epistemic_size"]["ratio"]) == 2
    assert main(["uncertainty", str(run.path), "--max-transitions", "300", "--json", "--out", "elsewhere"]) == 0
    assert json.loads(capsys.readouterr().out)["seeds"] == [0, 1]

    plain = rlkit2.train(
        "iql",
        "builtin/noisy-rooms",
        steps=2,
        eval_every=0,
        overrides={"hidden_sizes": (8,), "critic": "mse"},
        progress=False,
    )
    assert main(["uncertainty", str(plain.path)]) == 2
    assert "critic = 'ggd'" in capsys.readouterr().err


def test_a_study_writes_plain_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["uncertainty", "study", "weighting", "--out", str(tmp_path / "study")]) == 0
    assert "0.82" in capsys.readouterr().out
    text = (tmp_path / "study" / "weighting.json").read_text()
    rows = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [row["xi"] for row in rows] == [None, 0.0, 1.0, 5.0]


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["iql", "td3bc", "sacn", "edac"])
def test_agents_know_which_actions_they_have_not_seen(agent: str, tmp_path: Path) -> None:
    """An expert's data leave most actions out: after 2000 updates the critics disagree more about random ones, and nothing overflowed."""
    training, held_out = rlkit2.load_dataset("builtin/pendulum/expert-v0").split(0.2, seed=0)
    run = rlkit2.train(
        agent,
        training,
        steps=2000,
        eval_every=0,
        normalize_observations=True,
        reward_scale=0.1,
        out=tmp_path,
        progress=False,
        overrides={"critic": "ggd", "hidden_sizes": (32, 32), "num_critics": 5},
    )
    assert run.manifest["status"] == "finished"
    last = run.metrics()[-1]
    assert last["noise/non_finite"] == 0.0
    assert 0.0 <= last["noise/cap_share"] + last["noise/floor_share"] <= 1.0
    found = td_diagnostics(run.agent, held_out)
    assert np.isfinite(found.nll).all()
    assert (found.auroc > 0.6).all()
