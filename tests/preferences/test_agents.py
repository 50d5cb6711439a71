"""CPL, IPL and P-IQL: their losses against plain autograd, the contract of all agents, and learning from labels alone."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from rlkit2 import train
from rlkit2.agents import agent_class, make_agent, make_config
from rlkit2.data import dataset_from_arrays
from rlkit2.data.preferences import PreferenceBatch
from rlkit2.data.reward_file import load_rewards, save_rewards
from rlkit2.errors import ConfigError, DatasetError, DatasetNotFoundError, RewardError
from rlkit2.losses.preference import ipl_loss
from rlkit2.preferences import ScriptedTeacher, collect_preferences
from rlkit2.testing import NoHostMethods, NoSynchronisation
from tests.agents.problems import small_config
from tests.preferences.make import changed, generators, linear_dataset
from tests.reference import ROOT

CASES = [(name, kind) for name in ("cpl", "ipl") for kind in ("continuous", "discrete")]
every_case = pytest.mark.parametrize(("name", "kind"), CASES, ids=["-".join(case) for case in CASES])


@pytest.fixture(scope="module")
def datasets():
    continuous = linear_dataset(episodes=12, steps=20, terminate=True)
    discrete = dataset_from_arrays(
        continuous.observations,
        torch.arange(len(continuous)) % 3,
        continuous.rewards,
        continuous.next_observations,
        continuous.terminations,
        continuous.truncations,
    )
    return {"continuous": continuous, "discrete": discrete}


def build(name, datasets, kind="continuous", *, seeds=1, dtype=torch.float64, **overrides):
    config = small_config(partial(make_config, name), agent_class(name).config_class, **overrides)
    return make_agent(config, datasets[kind].spec, seeds=seeds, dtype=dtype)


def batches(name, datasets, kind, count, *, seeds=1):
    dataset = datasets[kind]
    labels = collect_preferences(dataset, ScriptedTeacher("equal", equal_threshold=0.5, equal=0.0), 60, length=6)
    pairs = labels.pairs(dataset, replay=4 if name == "ipl" else 0)
    draws = generators(seeds)
    return [pairs.gather(pairs.sample_indices(8, draws)) for _ in range(count)]


def seed_of(batch, k):
    def part(value):
        if dataclasses.is_dataclass(value):
            return type(value)(**{f.name: part(getattr(value, f.name)) for f in dataclasses.fields(value)})
        return None if value is None else value[k : k + 1]

    return part(batch)


@every_case
@pytest.mark.parametrize("overrides", [{}, {"bc_steps": 3, "reference": True}], ids=["plain", "reference"])
def test_a_seed_learns_the_same_alone_and_beside_others(datasets, name, kind, overrides):
    overrides = overrides if name == "cpl" else {}
    together = build(name, datasets, kind, seeds=3, **overrides)
    data = batches(name, datasets, kind, 8, seeds=3)
    for batch in data:
        metrics = together.update(batch)
    for k in range(3):
        alone = build(name, datasets, kind, seeds=[k], **overrides)
        for batch in data:
            own = alone.update(seed_of(batch, k))
        for part, tensor in alone.state_dict().items():
            torch.testing.assert_close(together.state_dict()[part][k : k + 1], tensor, rtol=1e-9, atol=1e-9, msg=part)
        for metric, value in own.items():
            torch.testing.assert_close(metrics[metric][k : k + 1], value, rtol=1e-8, atol=1e-9, msg=metric)


@every_case
def test_the_contract_of_all_agents(datasets, name, kind):
    data = batches(name, datasets, kind, 10, seeds=2)
    whole = build(name, datasets, kind, seeds=2)
    for batch in data[:5]:
        whole.update(batch)
    stored = save(whole.state_dict())
    with NoHostMethods(), NoSynchronisation():
        for batch in data[5:]:
            metrics = whole.update(batch)
    for metric, value in metrics.items():
        assert "/" in metric
        assert value.shape == (2,), metric
        assert not value.requires_grad, metric
        assert value.isfinite().all(), metric
    resumed = build(name, datasets, kind, seeds=2)
    resumed.load_state_dict(load(stored))
    for batch in data[5:]:
        resumed.update(batch)
    for part, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[part]), part
        assert tensor.shape[0] == 2
    observations = data[0].segments.observations[:, :, 0, 0]
    assert whole.policy(observations).shape[:2] == (2, 8)


def test_the_loss_of_cpl_is_the_stored_one(datasets):
    with np.load(ROOT / "preferences_segments.npz") as file:
        vectors = {key: file[key] for key in file.files}
    logp = torch.from_numpy(np.stack([vectors["cpl/logp_w"], vectors["cpl/logp_l"]], 1))[None]
    agent = build("cpl", datasets, alpha=0.1, lambda_=0.5, discount=0.95)
    loss = agent.preference_loss(logp, torch.zeros(1, 12, dtype=torch.float64))
    expected = vectors["cpl/loss/alpha=0.1/lambda=0.5/gamma=0.95"][2].mean()
    np.testing.assert_allclose(loss[0], expected, rtol=1e-10)
    flipped = agent.preference_loss(logp.flip(2), torch.ones(1, 12, dtype=torch.float64))
    np.testing.assert_allclose(flipped[0], expected, rtol=1e-10)


def test_the_log_likelihood_of_a_deterministic_policy_is_minus_the_squared_error(datasets):
    agent = build("cpl", datasets)
    batch = batches("cpl", datasets, "continuous", 1)[0]
    actions = agent.actor(batch.segments.observations.double().flatten(1, 3)).view(batch.segments.actions.shape)
    expected = -(batch.segments.actions - actions).square().sum(-1)
    torch.testing.assert_close(agent.log_likelihoods(batch.segments), expected)


def test_cpl_clones_first_and_then_starts_anew(datasets):
    data = batches("cpl", datasets, "continuous", 8)
    cloning, learning = build("cpl", datasets, bc_steps=100), build("cpl", datasets, bc_steps=4)
    for batch in data[:4]:
        cloning.update(batch)
        learning.update(batch)
    for part, tensor in cloning.state_dict().items():
        assert torch.equal(tensor, learning.state_dict()[part]), part
    fresh = build("cpl", datasets, bc_steps=0)  # the same weights with a new optimiser
    state = fresh.state_dict()
    state.update({k: v for k, v in learning.state_dict().items() if k.startswith("policy")})
    fresh.load_state_dict(state)
    for batch in data[4:]:
        learning.update(batch)
        fresh.update(batch)
    for part, tensor in fresh.state_dict().items():
        if part != "step":
            torch.testing.assert_close(learning.state_dict()[part], tensor, rtol=1e-12, atol=1e-12, msg=part)


def test_the_reference_is_the_cloned_policy(datasets):
    data = batches("cpl", datasets, "continuous", 8)
    agent = build("cpl", datasets, bc_steps=4, reference=True)
    for batch in data[:4]:
        agent.update(batch)
    cloned = {k: v for k, v in agent.state_dict().items() if k.startswith("policy.")}
    metrics = agent.update(data[4])
    np.testing.assert_allclose(metrics["preference/margin"], 0, atol=1e-12)  # policy and reference are the same here
    for batch in data[5:]:
        metrics = agent.update(batch)
    state = agent.state_dict()
    for name, tensor in cloned.items():
        assert torch.equal(state[name.replace("policy.", "policy_target.")], tensor), name
    assert abs(float(metrics["preference/margin"])) > 1e-6
    with pytest.raises(ConfigError, match="needs bc_steps above 0"):
        make_config("cpl", reference=True, bc_steps=0)


def test_the_losses_of_ipl_are_those_of_its_docstring(datasets):
    agent = build("ipl", datasets, num_critics=1, chi2=0.5, discount=0.9)
    batch = batches("ipl", datasets, "continuous", 1)[0]
    rows, weight = agent.rows(batch)
    shown = 8 * 2 * 6
    assert float(weight.sum()) == pytest.approx(1)
    assert float(weight[:shown].sum()) == pytest.approx(0.5)
    q = agent.critic(rows.observations, rows.actions)[:, 0]
    next_value = agent.value_network(rows.next_observations) * (1 - rows.terminations)
    rewards = agent.rewards(rows)[:, 0]
    torch.testing.assert_close(rewards, q - 0.9 * next_value)
    pairs = [x[:, :shown].view(1, 8, 2, 6) for x in (q, next_value)]
    both = ipl_loss(
        pairs[0][:, :, 0],
        pairs[0][:, :, 1],
        pairs[1][:, :, 0],
        pairs[1][:, :, 1],
        discount=0.9,
        chi2=0.5,
        label_mass=batch.label_mass.double(),
    )
    preference = agent.preference_loss(rewards[:, :shown].view(1, 1, 8, 2, 6).sum(-1), batch.label_mass.double())
    penalty = rewards[:, :shown].square().mean()
    torch.testing.assert_close(both.mean(1), preference + 0.5 * penalty)
    loss = preference + 0.5 * (rewards.square() @ weight)
    expected = preference + 0.5 * (penalty + rewards[:, shown:].square().mean()) / 2
    torch.testing.assert_close(loss, expected)


def test_ipl_clips_values_at_what_its_penalty_allows(datasets):
    agent = build("ipl", datasets, chi2=0.5, discount=0.9)
    rows, _ = agent.rows(batches("ipl", datasets, "continuous", 1)[0])
    with torch.no_grad():
        agent.value_network.flat.mul_(1000)
    q = agent.critic(rows.observations, rows.actions)
    difference = (agent.rewards(rows) - q).abs()
    assert float(difference.detach().max()) == pytest.approx(0.9 * 20)  # gamma / (chi2 (1 - gamma))


@pytest.mark.parametrize(("value", "taken"), [(0.0, 0.0), (-7.0, -7.0), (-1e3, -20.0), (None, None)])
def test_ipl_takes_what_it_is_told_after_a_termination(datasets, value, taken):
    """Also clipped at 1 / (chi2 (1 - gamma)); other steps bootstrap whatever is chosen."""
    agent = build("ipl", datasets, chi2=0.5, discount=0.9, terminal_value=value)
    rows, _ = agent.rows(batches("ipl", datasets, "continuous", 1)[0])
    ended = rows.terminations.bool()
    assert bool(ended.any())
    with torch.no_grad():
        following = agent.value_network(rows.next_observations)
        if taken is not None:
            following[ended] = taken
        expected = agent.critic(rows.observations, rows.actions) - 0.9 * following.unsqueeze(1)
        torch.testing.assert_close(agent.rewards(rows), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["cpl", "ipl", "p_iql"])
def test_labels_alone_teach_a_policy(tmp_path, name):
    """A one-step task with reward -|a - target(s)|: behaviour is uniform, so a policy near the target can only come from the labels."""
    generator = np.random.default_rng(0)
    observations = generator.uniform(-1, 1, (3000, 1)).astype(np.float32)
    actions = generator.uniform(-1, 1, (3000, 1)).astype(np.float32)
    rewards = -np.abs(actions - 0.6 * np.sign(observations))[:, 0]
    ends = np.ones(3000, bool)
    dataset = dataset_from_arrays(observations, actions, rewards, observations, ends, ~ends)
    labels = collect_preferences(dataset, ScriptedTeacher(), 1500, length=1)
    labels.save(tmp_path / "labels")
    settings = {"hidden_sizes": (32, 32), "preferences": str(tmp_path / "labels")}
    if name == "p_iql":
        from rlkit2.preferences import fit_reward_model

        model = fit_reward_model(labels, dataset, hidden_sizes=(32,), members=2, steps=300, learning_rate=3e-3)
        save_rewards(tmp_path / "rewards.safetensors", dataset, model.dataset_rewards(dataset)[0].mean(0), {})
        settings = {
            "hidden_sizes": (32, 32),
            "rewards": str(tmp_path / "rewards.safetensors"),
            "inverse_temperature": 10.0,
        }
    if name == "cpl":
        settings |= {"bc_steps": 100, "learning_rate": 3e-3, "alpha": 1.0}
    if name == "ipl":
        settings |= {"chi2": 0.05, "learning_rate": 2e-3, "inverse_temperature": 5.0, "replay": 4}
    run = train(
        name,
        dataset,
        steps=500,
        batch_size=64,
        out=tmp_path,
        eval_every=0,
        progress=False,
        overrides=settings,
    )
    points = torch.linspace(-1, 1, 40)[:, None]
    error = (run.policy(points) - 0.6 * points.sign()).abs().mean()
    cloned = 0.6  # what the mean of the data's actions would be off by
    assert float(error) < 0.5 * cloned, float(error)


def test_what_is_missing_is_named_before_training(tmp_path):
    dataset = linear_dataset(episodes=5, steps=20)
    options = {"steps": 3, "out": tmp_path / "runs", "eval_every": 0, "progress": False}
    for name in ("cpl", "ipl"):
        with pytest.raises(ConfigError, match="name the folder of the labels"):
            train(name, dataset, **options)
        with pytest.raises(DatasetNotFoundError, match="no labels in"):
            train(name, dataset, overrides={"preferences": str(tmp_path / "none")}, **options)
        collect_preferences(dataset, ScriptedTeacher(), 20, length=5).save(tmp_path / "labels")
        with pytest.raises(DatasetError, match="belong to arrays"):
            train(name, changed(dataset), overrides={"preferences": str(tmp_path / "labels")}, **options)
    with pytest.raises(ConfigError, match="name their file"):
        train("p_iql", dataset, **options)
    with pytest.raises(RewardError, match="holds no learned rewards"):
        train("p_iql", dataset, overrides={"rewards": str(tmp_path / "none")}, **options)
    file = tmp_path / "r" / "rewards.safetensors"
    save_rewards(file, dataset, dataset.rewards, {"from": "a test"})
    assert torch.equal(load_rewards(file, dataset), dataset.rewards)
    with pytest.raises(DatasetError, match="are for arrays"):
        train("p_iql", changed(dataset), overrides={"rewards": str(file)}, **options)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
    for bad in ({"alpha": 0.0}, {"lambda_": 0.0}, {"discount": 1.5}):
        with pytest.raises(ConfigError, match=f"^{next(iter(bad))} must be "):
            make_config("cpl", **bad)
    for bad in ({"chi2": -1.0}, {"replay": 0}, {"discount": 1.0}, {"terminal_value": float("nan")}):
        with pytest.raises(ConfigError, match=f"^{next(iter(bad))} must be "):
            make_config("ipl", **bad)


def test_a_preference_batch_moves_as_one(datasets):
    batch = batches("ipl", datasets, "continuous", 1)[0].to("cpu")
    assert isinstance(batch, PreferenceBatch)
    assert batch.transitions.rewards.shape == (1, 32)
