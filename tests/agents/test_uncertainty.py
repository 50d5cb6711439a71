"""The noise model of ensemble critics: parity with the released losses, what agents report, and what it leaves alone."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from rlkit2.agents import agent_class, make_config
from rlkit2.agents.error_model import RELEASED, ErrorModel, ErrorOptions
from rlkit2.agents.uncertain_agent import UncertainAgent
from rlkit2.data import Batch
from rlkit2.errors import ConfigError
from rlkit2.nn import load_policy
from rlkit2.nn.distributions import GeneralizedNormal, mixture_cdf
from rlkit2.testing import NoHostMethods, NoSynchronisation
from tests.agents.problems import random_batch, small_config
from tests.losses.test_ggd import case
from tests.reference import ROOT

AGENTS = {"sacn": False, "edac": False, "td3bc": False, "iql": False, "cql": True, "dqn": True}
OBS, ACT, ROWS = 4, 3, 32
OPTIONS: dict[str, dict[str, Any]] = {
    "ggd": {"critic": "ggd"},
    "gaussian": {"critic": "gaussian"},
    "coupled": {"critic": "ggd", "coupling": "ggd"},
    "running": {"critic": "ggd", "critic_scale": "running"},
    "iv": {"critic": "ggd", "sample_weighting": "iv"},
    "released": RELEASED,
}
every_agent = pytest.mark.parametrize("name", AGENTS)


def build(name: str, *, seeds: Any = 1, dtype: torch.dtype = torch.float32, **overrides: Any) -> UncertainAgent:
    config = small_config(partial(make_config, name), agent_class(name).config_class, num_critics=4, **overrides)
    agent = agent_class(name)(config, OBS, ACT, seeds=seeds, dtype=dtype, discrete=AGENTS[name])
    assert isinstance(agent, UncertainAgent)
    return agent


def train(agent: UncertainAgent, steps: int, start: int = 0) -> dict[str, torch.Tensor]:
    metrics: dict[str, torch.Tensor] = {}
    for t in range(steps):
        batch = random_batch(
            len(agent.seeds), ROWS, OBS, ACT, discrete=agent.discrete, dtype=agent.dtype, generator=start + t
        )
        metrics = agent.update(batch)
    return metrics


# The loss


@pytest.mark.parametrize("name", ["a05", "a07", "a15"])  # where the released search for xi is exact
def test_released_options_agree_with_the_released_code(name: str) -> None:
    known = case("ggd_losses", name)
    assert float(known["biev_xi"]) == float(known["biev_xi_exact"])
    batch = known["targets"].shape[0]
    options = ErrorOptions(
        **{
            **RELEASED,
            "regulariser_weight": float(known["lam"]),
            "min_effective_fraction": min(1.0, float(known["min_batch_size"]) / batch),
        }
    )
    model = ErrorModel(options, 1, torch.float64, torch.device("cpu"))
    outputs = torch.from_numpy(known["values"]).transpose(0, 1).unsqueeze(0).requires_grad_()
    targets = torch.from_numpy(known["targets"]).T.unsqueeze(0)
    loss, _ = model.loss(outputs, targets, float(known["gamma"]))
    (gradient,) = torch.autograd.grad(loss.sum(), outputs)
    np.testing.assert_allclose(loss.item(), known["total_iev_ggd"], rtol=1e-9)
    expected = known["total_iev_ggd_grad"].transpose(1, 0, 2)
    frozen = known["beta"].T < 0.01  # below the floor of the shape, which keeps float32 finite
    np.testing.assert_allclose(
        gradient[0].numpy()[~frozen], expected[~frozen], rtol=1e-9, atol=1e-12 * np.abs(expected).max()
    )


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_the_running_scale_makes_the_model_blind_to_units(factor: float) -> None:
    torch.manual_seed(0)
    options = ErrorOptions(critic="ggd")
    outputs, targets = torch.randn(1, 4, 64, 3).double(), torch.randn(1, 64).double()
    gradients = []
    for c in (1.0, factor):
        model = ErrorModel(options, 1, torch.float64, torch.device("cpu"))
        scaled = torch.cat([c * outputs[..., :1], outputs[..., 1:]], -1).requires_grad_()
        loss, metrics = model.loss(scaled, c * targets, 0.99)
        gradients.append(torch.autograd.grad(loss.sum(), scaled)[0])
        assert float(metrics["noise/error_scale"]) == pytest.approx(c * float((outputs[..., 0] - targets).abs().mean()))
    torch.testing.assert_close(gradients[0][..., 1:], gradients[1][..., 1:], rtol=1e-6, atol=1e-12)


def test_decoupled_values_are_those_of_least_squares() -> None:
    """Coupling "mean": the cotangent on Q is that of the squared error alone, whatever the noise outputs say."""
    torch.manual_seed(0)
    outputs, targets = torch.randn(2, 4, 16, 3).double().requires_grad_(), torch.randn(2, 16).double()
    for weighting in ("none", "iv"):
        model = ErrorModel(
            ErrorOptions(critic="ggd", sample_weighting=weighting), 2, torch.float64, torch.device("cpu")
        )
        loss, _ = model.loss(outputs, targets, 0.99)
        (gradient,) = torch.autograd.grad(loss.sum(), outputs)
        squares = 2.0 * (outputs[..., 0] - targets.unsqueeze(1)) / 16
        if weighting == "none":
            torch.testing.assert_close(gradient[..., 0], squares)
        else:  # the same weight for all members of a sample, of mean one
            weights = (gradient[..., 0] / squares).detach()
            torch.testing.assert_close(weights, weights[:, :1].expand_as(weights))
            torch.testing.assert_close(weights[:, 0].mean(-1), torch.ones(2).double())
        assert bool((gradient[..., 1:] != 0.0).any())


def test_the_scale_forgets_its_start() -> None:
    model = ErrorModel(ErrorOptions(critic="ggd"), 2, torch.float32, torch.device("cpu"))
    assert torch.equal(model.error_scale(), torch.ones(2))
    errors = torch.tensor([1.0, 5.0]).view(2, 1, 1).expand(2, 3, 4)
    for _ in range(3):
        model.track(errors)
        torch.testing.assert_close(model.error_scale(), torch.tensor([1.0, 5.0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critic": "normal"}, "critic must be one of mse, gaussian, ggd"),
        ({"critic": "mse", "sample_weighting": "iv"}, "need critic"),
        ({"critic": "gaussian", "critic_form": "official"}, "no shape"),
        ({"critic": "ggd", "coupling": "ggd", "sample_weighting": "iv"}, "needs coupling"),
        ({"critic": "ggd", "min_effective_fraction": 0.0}, "min_effective_fraction"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ErrorOptions(**options)


# Agents


@every_agent
@pytest.mark.parametrize("options", OPTIONS)
def test_agents_train_with_every_noise_model(name: str, options: str) -> None:
    agent = build(name, **OPTIONS[options])
    data = [random_batch(1, ROWS, OBS, ACT, discrete=agent.discrete, generator=t) for t in range(12)]
    for step, batch in enumerate(data):
        with ExitStack() as watch:
            if step in (0, 11):  # watching takes longer than updating
                watch.enter_context(NoHostMethods())
                watch.enter_context(NoSynchronisation())
            metrics = agent.update(batch)
        assert all(bool(value.isfinite().all()) for value in metrics.values())
    assert {"noise/shape_mean", "noise/cap_share", "noise/error_scale", "noise/non_finite"} <= metrics.keys()
    if OPTIONS[options].get("sample_weighting"):
        share = float(metrics["weight/effective_share"])
        assert share >= agent.config.min_effective_fraction * 0.999


@every_agent
def test_uncertainty(name: str) -> None:
    agent = build(name, seeds=2, critic="ggd")
    train(agent, 20)
    batch = random_batch(2, 7, OBS, ACT, discrete=agent.discrete, generator=99)
    found = agent.uncertainty(batch.observations, batch.actions, quantiles=(0.1, 0.5, 0.9), per_member=True)
    for part in ("q_mean", "q_lower", "aleatoric_sd", "epistemic_sd", "total_sd", "shape", "scale", "excess_kurtosis"):
        values = getattr(found, part)
        assert values.shape == (2, 7), part
        assert values.dtype == np.float32
        assert np.isfinite(values).all()
    assert (found.aleatoric_sd > 0).all()
    assert (found.epistemic_sd > 0).all()
    assert (found.q_lower < found.q_mean).all()
    np.testing.assert_allclose(found.total_sd**2, found.aleatoric_sd**2 + found.epistemic_sd**2, rtol=1e-5)
    assert found.quantiles.shape == (2, 7, 3)
    assert (np.diff(found.quantiles, axis=-1) > 0).all()
    assert found.members is not None
    np.testing.assert_allclose(found.members["q"].std(1, ddof=1), found.epistemic_sd, rtol=1e-4)
    np.testing.assert_allclose((found.members["aleatoric_sd"] ** 2).mean(1) ** 0.5, found.aleatoric_sd, rtol=1e-5)

    everywhere = agent.uncertainty(batch.observations)
    assert everywhere.q_mean.shape == ((2, 7, ACT) if agent.discrete else (2, 7))
    alone = build(name, critic="ggd")
    train(alone, 5)
    assert alone.uncertainty(np.zeros((5, OBS), np.float32)).q_mean.shape == ((5, ACT) if agent.discrete else (5,))
    with pytest.raises(ConfigError, match="axes"):
        agent.uncertainty(torch.zeros(OBS))


def test_uncertainty_agrees_with_the_vectors() -> None:
    with np.load(ROOT / "ggd_agg.npz") as file:
        known = {name: file[name] for name in file.files if name.startswith("unc")}
    agent = build("iql", critic="ggd")

    class Fixed(type(agent)):  # type: ignore[misc]
        def heads_at(self, observations: Any, actions: Any = None) -> Any:
            from rlkit2.agents.error_model import Heads

            parts = (known["unc_q"], known["unc_beta"], np.log(known["unc_alpha"]))
            return Heads(*(torch.from_numpy(part).T.unsqueeze(0) for part in parts))

    agent.__class__ = Fixed
    found = agent.uncertainty(np.zeros((12, OBS)), quantiles=(0.2, 0.7))
    np.testing.assert_allclose(found.q_mean, known["unc_q_mean"], rtol=1e-6)
    np.testing.assert_allclose(found.aleatoric_sd, known["unc_aleatoric_sd"], rtol=1e-6)
    np.testing.assert_allclose(found.epistemic_sd, known["unc_epistemic_sd_ddof1"], rtol=1e-6)
    total = known["unc_aleatoric_sd"] ** 2 + known["unc_epistemic_sd_ddof1"] ** 2
    np.testing.assert_allclose(found.total_sd, np.sqrt(total), rtol=1e-6)
    np.testing.assert_allclose(found.excess_kurtosis, known["unc_mean_excess_kurtosis"], rtol=1e-5)
    np.testing.assert_allclose(
        found.mixture_excess_kurtosis, known["unc_mixture_excess_kurtosis"], rtol=1e-5, atol=1e-5
    )
    parts = (torch.from_numpy(known[f"unc_{part}"]) for part in ("q", "alpha", "beta"))
    back = mixture_cdf(GeneralizedNormal(*parts), torch.from_numpy(found.quantiles).double())
    np.testing.assert_allclose(back, np.broadcast_to([0.2, 0.7], (12, 2)), rtol=1e-4)


def bandit(discrete: bool, rows: int = 40) -> tuple[Batch, torch.Tensor]:
    """One state, three actions with shares .7, .2, .1 of the data, rewards 0, 1, -1 without noise; and the three actions."""
    which = torch.tensor([0] * (7 * rows // 10) + [1] * (rows // 5) + [2] * (rows // 10))
    actions = torch.arange(3) if discrete else torch.tensor([[-0.7, 0.2, 0.0], [0.0, -0.6, 0.5], [0.6, 0.5, -0.5]])
    ones = torch.ones(1, rows)
    batch = Batch(
        observations=ones.unsqueeze(2),
        actions=actions[which].unsqueeze(0),
        rewards=torch.tensor([0.0, 1.0, -1.0])[which].unsqueeze(0),
        next_observations=ones.unsqueeze(2),
        terminations=ones.bool(),
        truncations=~ones.bool(),
    )
    return batch, actions


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in AGENTS),
        ("cql", {"coupling": "ggd"}),
        ("cql", {"critic": "gaussian", "alpha": 5.0}),
        ("dqn", {"sample_weighting": "biev", "regulariser_weight": 1.0}),
    ],
    ids=str,
)
def test_what_moves_the_values_does_not_pass_for_noise(name: str, options: dict[str, Any]) -> None:
    """Rewards without noise have none, whatever an agent does to Q on purpose; its quantiles lie where the targets do."""
    given = {"critic": "ggd", "hidden_sizes": (16,), "num_critics": 2, "critic_learning_rate": 1e-2, **options}
    agent = agent_class(name)(make_config(name, **given), 1, ACT, discrete=AGENTS[name])
    assert isinstance(agent, UncertainAgent)
    batch, actions = bandit(AGENTS[name])
    for _ in range(160):
        agent.update(batch)
    found = agent.uncertainty(torch.ones(3, 1), actions, quantiles=(0.05, 0.95), per_member=True)
    assert (found.aleatoric_sd < 0.05).all()
    np.testing.assert_allclose(found.target_mean, [0.0, 1.0, -1.0], atol=0.05)
    np.testing.assert_allclose(found.quantiles, [[0.0] * 2, [1.0] * 2, [-1.0] * 2], atol=0.1)
    seen = agent.predicted_targets(batch)
    assert float((seen.heads.location - seen.targets).abs().max()) < 0.05  # what calibration measures
    if agent.moves_values and not options:
        assert np.abs(found.q_mean - found.target_mean).max() > 0.1  # what would have been taken for noise
    elif not agent.moves_values:
        np.testing.assert_allclose(found.q_mean, found.target_mean, atol=0.05)


@every_agent
def test_one_member_knows_no_ignorance(name: str) -> None:
    if name == "edac":
        return
    config = small_config(
        partial(make_config, name), agent_class(name).config_class, num_critics=1, critic="ggd", hidden_sizes=(8,)
    )
    agent = agent_class(name)(config, OBS, ACT, discrete=AGENTS[name])
    train(agent, 3)
    found = agent.uncertainty(torch.zeros(2, OBS))
    assert (found.epistemic_sd == 0.0).all()
    np.testing.assert_allclose(found.total_sd, found.aleatoric_sd)


@every_agent
def test_plain_critics_say_that_they_know_no_noise(name: str) -> None:
    agent = build(name)
    with pytest.raises(ConfigError, match="critic = 'ggd'"):
        agent.uncertainty(torch.zeros(2, OBS))
    with pytest.raises(ConfigError, match="critic = 'ggd'"):
        agent.predicted_targets(random_batch(1, 4, OBS, ACT, discrete=agent.discrete))


@every_agent
def test_a_checkpoint_keeps_scale_and_shape(name: str) -> None:
    agent = build(name, seeds=2, critic="ggd")
    train(agent, 15)
    stored = save(agent.state_dict())
    other = build(name, seeds=2, critic="ggd")
    other.load_state_dict(load(stored))
    observations = random_batch(2, 6, OBS, ACT, generator=5).observations
    before, after = agent.uncertainty(observations), other.uncertainty(observations)
    for part in ("q_mean", "aleatoric_sd", "epistemic_sd", "shape", "scale"):
        np.testing.assert_array_equal(getattr(before, part), getattr(after, part))
    assert bool((other.errors.error_scale() != 1.0).all())


@pytest.mark.parametrize("name", ["sacn", "edac"])
@pytest.mark.parametrize("target", ["min", "independent", "shared_lcb", "released"])
@pytest.mark.parametrize("policy_objective", ["min", "lcb", "released"])
def test_pessimism_of_actor_critics(name: str, target: str, policy_objective: str) -> None:
    agent = build(name, target=target, policy_objective=policy_objective, critic="ggd", risk_coefficient=0.5)
    data = random_batch(1, 9, OBS, ACT, generator=3)
    with NoHostMethods(), NoSynchronisation():
        metrics = agent.update(data)
    assert all(bool(value.isfinite().all()) for value in metrics.values())
    batch = agent.normalize(data)
    targets = agent.critic_targets(batch)
    assert targets.shape == ((1, 4, 9) if target in ("independent", "released") else (1, 9))
    next_values, entropy = agent.next_values(batch)
    gap = targets - agent.targets_at(batch, torch.zeros_like(next_values), entropy)
    bootstrap = 0.99 * (1.0 - batch.terminations)
    if target == "min":
        torch.testing.assert_close(gap, bootstrap * next_values.amin(1))
    elif target == "independent":
        torch.testing.assert_close(gap, bootstrap.unsqueeze(1) * next_values)


def test_risk_moves_the_objective_by_the_noise_alone() -> None:
    plain = build("sacn", critic="ggd", policy_objective="lcb")
    averse = build("sacn", critic="ggd", policy_objective="lcb", risk_coefficient=2.0)
    averse.load_state_dict(plain.state_dict())
    batch = plain.normalize(random_batch(1, 9, OBS, ACT))
    values = [agent.action_value(batch.observations, batch.actions) for agent in (plain, averse)]
    noise = plain.errors.heads(plain.critic.outputs(batch.observations, batch.actions)).variance.mean(1).sqrt()
    torch.testing.assert_close(values[0] - values[1], 2.0 * noise)


@pytest.mark.parametrize("name", ["cql", "dqn"])
@pytest.mark.parametrize("vote", ["mean", "lcb", "shape"])
def test_votes_of_discrete_agents_and_their_saved_policies(name: str, vote: str, tmp_path: Any) -> None:
    agent = build(name, seeds=2, vote=vote, critic="ggd")
    train(agent, 10)
    observations = random_batch(2, 50, OBS, ACT, generator=7).observations
    found = agent.uncertainty(observations, per_member=True)
    q, shape = found.members["q"], found.members["shape"]  # type: ignore[index]
    scores = {
        "mean": q.mean(1),
        "lcb": found.q_lower,
        "shape": (q * shape).sum(1) / shape.sum(1),
    }[vote]
    np.testing.assert_array_equal(agent.policy(observations).numpy(), scores.argmax(-1))
    agent.policy.save(tmp_path)
    again = load_policy(tmp_path)
    assert torch.equal(again(observations), agent.policy(observations))
    torch.testing.assert_close(again.actor.scores(observations), agent.actor.scores(observations))


@pytest.mark.parametrize("target", ["independent", "min", "shared_lcb"])
@pytest.mark.parametrize("double_q", [False, True])
def test_targets_of_discrete_agents(target: str, double_q: bool) -> None:
    agent = build("dqn", target=target, double_q=double_q, dtype=torch.float64)
    train(agent, 5)
    batch = agent.normalize(random_batch(1, 9, OBS, ACT, discrete=True, dtype=torch.float64))
    next_values = agent.critic_target.every_action(batch.next_observations)
    bootstrap = 0.99 * (1.0 - batch.terminations)
    found = agent.critic_targets(batch)
    if target == "min":
        expected = batch.rewards + bootstrap * next_values.amin(1).amax(-1)
    elif target == "shared_lcb":
        lower = next_values.mean(1) - 1.0294 * next_values.std(1)  # the expected minimum of four
        expected = batch.rewards + bootstrap * lower.amax(-1)
    else:
        best = (agent.critic if double_q else agent.critic_target).every_action(batch.next_observations).argmax(-1)
        own = next_values.gather(-1, best.unsqueeze(-1)).squeeze(-1)
        expected = batch.rewards.unsqueeze(1) + bootstrap.unsqueeze(1) * own
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_conservatism_lowers_actions_outside_the_data() -> None:
    """The data knows action 0 alone: with the conservative term its value stands out, without it the others are as good."""
    gaps = {}
    for alpha in (0.0, 2.0):
        agent = build("cql", alpha=alpha, critic_learning_rate=3e-3)
        for t in range(60):
            batch = random_batch(1, ROWS, OBS, ACT, discrete=True, generator=t)
            agent.update(type(batch)(**{**vars(batch), "actions": torch.zeros_like(batch.actions)}))
        q = agent.critic.every_action(random_batch(1, 64, OBS, ACT, generator=500).observations).mean((0, 1, 2))
        gaps[alpha] = float((q[0] - q[1:].max()).detach())
    assert gaps[2.0] > gaps[0.0] + 1.0


@pytest.mark.parametrize(
    ("name", "numbers", "said"),
    [
        ("td3bc", {"critic/q_mean": 99.0}, False),
        ("td3bc", {"critic/q_mean": 121.0}, True),
        ("td3bc", {"critic/q_mean": -9.0}, False),  # a start below 0 that the rewards do not reach
        ("td3bc", {"critic/q_mean": -12.0}, True),
        ("sacn", {"critic/q_mean": 121.0, "policy/temperature": 1.0, "policy/entropy": -3.0}, False),
        ("sacn", {"critic/q_mean": 121.0, "policy/temperature": 0.01, "policy/entropy": -3.0}, True),
    ],
)
def test_values_beyond_what_the_rewards_allow_are_told(name: str, numbers: dict[str, float], said: bool) -> None:
    config, rewards = make_config(name, discount=0.99), {"data/reward_min": 0.2, "data/reward_max": 1.0}
    found = agent_class(name).warnings(config, {**numbers, **rewards})
    assert ("values_out_of_reach" in found) == said
    assert agent_class(name).warnings(config, numbers) == {}
    assert agent_class(name).warnings(make_config(name, discount=1.0), {**numbers, **rewards}) == {}
