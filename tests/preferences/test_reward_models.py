"""Reward ensembles: fitting, seeds and members as axes, files, evaluation, relabelling."""

import json
from dataclasses import replace

import minari
import numpy as np
import pytest
import torch

from rlkit2.data import dataset_from_arrays, read_dataset
from rlkit2.data.weighted import with_weights
from rlkit2.errors import ConfigError, DatasetError, RewardError
from rlkit2.losses.preference import bradley_terry_loss
from rlkit2.preferences import (
    RewardEnsemble,
    ScriptedTeacher,
    calibration,
    collect_preferences,
    evaluate_reward,
    fit_reward_model,
    relabel,
    shuffled_labels,
    weigh_by_agreement,
)
from rlkit2.preferences.relabelling import relabelled_rewards
from tests.preferences.make import changed, generators, linear_dataset
from tests.reference import ROOT

QUICK = {"hidden_sizes": (16,), "steps": 60, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def vectors():
    with np.load(ROOT / "preferences_segments.npz") as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(scope="module")
def dataset():
    return linear_dataset(episodes=200, steps=40)


@pytest.fixture(scope="module")
def labels(dataset):
    return collect_preferences(dataset, ScriptedTeacher(), 120, length=10)


@pytest.fixture(scope="module")
def model(dataset, labels):
    return fit_reward_model(labels, dataset, **QUICK)


def _reference_model(vectors, *, reduce):
    """The stored tanh MLP has another activation; its last layer's rewards are what is compared."""
    rewards = [torch.from_numpy(vectors[f"reward/r_{side}"]) for side in "wl"]
    return [r.sum(-1) if reduce == "sum" else r.mean(-1) for r in rewards]


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_the_likelihood_of_the_logits_is_the_stored_loss(vectors, reduce):
    first, second = _reference_model(vectors, reduce=reduce)
    for beta in (1, 5):
        loss = bradley_terry_loss(torch.zeros_like(first), beta * (second - first), label_mass=0.1)
        np.testing.assert_allclose(loss, vectors[f"bt/{reduce}/beta={beta}/y=0.1/margin=0"][0], rtol=1e-10)


def test_segment_returns_reduce_the_rewards_of_the_steps(dataset):
    rows = dataset.segments(10)[:7]
    for reduce in ("sum", "mean"):
        model = RewardEnsemble.for_spec(
            dataset.spec, seeds=2, members=3, hidden_sizes=(8,), reduce=reduce, dtype=torch.float64
        )
        with torch.no_grad():
            model.log_beta.copy_(torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]))
        rewards = model.dataset_rewards(dataset)[..., rows]
        returns = getattr(rewards, reduce)(-1)
        torch.testing.assert_close(model.segment_returns(model.row_features(dataset, rows)), returns)
        p = model.probabilities(dataset, rows, rows.flip(0))
        torch.testing.assert_close(
            p, torch.sigmoid(model.log_beta.exp()[..., None] * (returns.flip(-1) - returns)).detach()
        )


@pytest.mark.parametrize("head", ["linear", "tanh"])
def test_a_member_as_a_torch_module_predicts_the_same(dataset, labels, head):
    model = fit_reward_model(labels, dataset, head=head, seeds=2, dtype=torch.float64, **{**QUICK, "steps": 5})
    raw = torch.cat([dataset.observations[:50], dataset.actions[:50]], -1).double()
    for seed in (0, 1):
        for member in range(3):
            expected = model.member_rewards(dataset.observations[:50], dataset.actions[:50])[seed, member]
            torch.testing.assert_close(
                model.member_module(seed, member)(raw).squeeze(-1), expected, rtol=1e-9, atol=1e-9
            )


def test_the_gradient_meters_measure_a_member(dataset, labels, model):
    from rlkit2.entanglement.measure import pair_geometry
    from rlkit2.entanglement.scores import PairBatch, segment_return

    rows = [side[:6] for side in labels.rows(dataset)]
    batch = PairBatch(*({"observations": dataset.observations[r], "actions": dataset.actions[r]} for r in rows))
    score = segment_return(model.member_module(), reduce=model.reduce)
    loop = pair_geometry(score, None, batch, method="loop")
    ghost = pair_geometry(score, None, batch, method="ghost")
    torch.testing.assert_close(loop.inner, ghost.inner, rtol=1e-3, atol=1e-5)
    assert (loop.sqnorm_w > 0).all()


@pytest.mark.parametrize("own_labels", [False, True])
def test_a_seed_learns_the_same_alone_as_beside_others(dataset, labels, own_labels):
    each = [collect_preferences(dataset, ScriptedTeacher(), 120, length=10, seed=s) for s in range(3)]
    together = fit_reward_model(each if own_labels else labels, dataset, seeds=3, patience=None, **QUICK)
    alone = fit_reward_model(each[2] if own_labels else labels, dataset, seeds=[2], patience=None, **QUICK)
    part = together.select_seed(2)
    torch.testing.assert_close(part.network.flat, alone.network.flat, rtol=1e-4, atol=1e-5)
    assert part.seeds == (2,)


def test_members_and_seeds_differ(dataset, labels):
    model = fit_reward_model(labels, dataset, seeds=2, **{**QUICK, "steps": 5})
    flat = model.network.flat.view(6, -1)
    assert len(torch.unique(flat, dim=0)) == 6


def test_held_out_pairs_stop_training_and_choose_the_weights(dataset, labels):
    random = shuffled_labels(labels)
    model = fit_reward_model(
        random, dataset, **{**QUICK, "steps": 3000, "learning_rate": 1e-2}, check_every=10, patience=5
    )
    assert model.description["steps"] < 500  # there is nothing to learn
    found = model.description["held_out"]
    assert found["pairs"] == 24
    assert found["nll"][0] < 0.75
    longer = fit_reward_model(random, dataset, **{**QUICK, "steps": 300, "learning_rate": 1e-2}, held_out=0)
    probability = longer.probabilities(dataset, *random.rows(dataset))[0].mean(0)
    assert (
        float(((probability > 0.5) == (random.label_mass > 0.5)).float().mean()) > 0.8
    )  # it can fit noise where nobody stops it


def test_a_constant_offset_leaves_the_loss_unchanged(dataset, labels):
    model = RewardEnsemble.for_spec(dataset.spec, members=2, hidden_sizes=(8,), dtype=torch.float64)
    sides = [model.row_features(dataset, rows) for rows in labels.rows(dataset)]
    before = model.logits(*sides).detach()
    with torch.no_grad():
        model.network.named_views()["layers.1.bias"].add_(3.0)
    after = model.logits(*sides).detach()
    loss = [bradley_terry_loss(torch.zeros_like(z), z, label_mass=labels.label_mass) for z in (before, after)]
    torch.testing.assert_close(*loss, rtol=0, atol=1e-12)


def test_more_labels_make_a_better_reward(dataset):
    """Test 14: held-out accuracy and Pearson distance to a linear reward at 50, 200 and 2,000 oracle pairs."""
    test = collect_preferences(dataset, ScriptedTeacher(), 2000, length=10, seed=99)
    truth = dataset.rewards.double().numpy()
    accuracy, distance = [], []
    for count in (50, 200, 2000):
        labels = collect_preferences(dataset, ScriptedTeacher(), count, length=10)
        model = fit_reward_model(
            labels,
            dataset,
            hidden_sizes=(64, 64),
            steps=300,
            learning_rate=1e-3,
            held_out=0,
            members=1,
            bootstrap=False,
        )
        found = evaluate_reward(model, test, dataset, true_rewards=truth)
        rho = np.corrcoef(model.dataset_rewards(dataset)[0, 0].numpy(), truth)[0, 1]
        accuracy.append(found.accuracy)
        distance.append(np.sqrt((1 - rho) / 2))
    assert accuracy[2] > 0.95
    assert distance[2] < 0.08
    assert accuracy == sorted(accuracy)
    assert distance == sorted(distance, reverse=True)


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_assumed_noise_is_the_mixture_with_a_coin(dataset, labels, noise):
    from rlkit2.preferences import fitting

    model = RewardEnsemble.for_spec(dataset.spec, members=2, hidden_sizes=(8,), dtype=torch.float64)
    sides = [model.row_features(dataset, rows)[None, None].expand(1, 2, -1, -1, -1) for rows in labels.rows(dataset)]
    y = labels.label_mass.expand(1, 2, -1)
    loss = fitting._loss(model, fitting._Pairs(*sides, y), noise, 0.0)
    p = (1 - noise) * torch.sigmoid(model.logits(*sides)) + noise / 2
    expected = -(y * p.log() + (1 - y) * (1 - p).log()).mean(-1).sum(-1)
    torch.testing.assert_close(loss, expected)


def test_a_saved_model_predicts_the_same(dataset, model, tmp_path):
    model.save(tmp_path / "reward")
    again = RewardEnsemble.load(tmp_path / "reward")
    assert torch.equal(model.dataset_rewards(dataset), again.dataset_rewards(dataset))
    assert (again.description, again.content_hash) == (model.description, model.content_hash)
    with pytest.raises(RewardError, match="no reward model here"):
        RewardEnsemble.load(tmp_path)
    other = fit_reward_model(
        collect_preferences(dataset, ScriptedTeacher(), 20, length=5), dataset, **{**QUICK, "steps": 2}
    )
    other.save(tmp_path / "other")
    (tmp_path / "reward" / "reward.safetensors").write_bytes((tmp_path / "other" / "reward.safetensors").read_bytes())
    with pytest.raises(RewardError, match="from different models"):
        RewardEnsemble.load(tmp_path / "reward")
    (tmp_path / "reward" / "reward.safetensors").write_bytes(b"nonsense")
    with pytest.raises(RewardError, match="damaged"):
        RewardEnsemble.load(tmp_path / "reward")


def test_it_is_a_reward_like_any_other(dataset, model):
    fields = (dataset.observations, dataset.actions, dataset.next_observations, dataset.terminations)
    tensors, arrays = model(*fields), model(*(field.numpy() for field in fields))
    assert isinstance(arrays, np.ndarray)
    np.testing.assert_allclose(tensors, arrays, rtol=1e-6)
    torch.testing.assert_close(tensors, model.dataset_rewards(dataset)[0].mean(0), rtol=1e-4, atol=1e-5)


def test_discrete_actions_and_next_observations():
    base = linear_dataset(episodes=8, steps=20)
    choices = torch.arange(len(base)) % 3
    spec_free = dataset_from_arrays(
        base.observations, choices, base.rewards, base.next_observations, base.terminations, base.truncations
    )
    labels = collect_preferences(spec_free, ScriptedTeacher(), 30, length=5)
    model = fit_reward_model(
        labels, spec_free, inputs=("observations", "actions", "next_observations"), **{**QUICK, "steps": 5}
    )
    assert model.network.input_size == 4 + 3 + 4
    assert model.dataset_rewards(spec_free).shape == (1, 3, len(base))
    with pytest.raises(RewardError, match="reads next_observations"):
        model(spec_free.observations, spec_free.actions)


def test_bad_input_is_named_before_training(dataset, labels, model):
    with pytest.raises(DatasetError, match="belong to arrays"):
        fit_reward_model(labels, changed(dataset), **QUICK)
    with pytest.raises(ConfigError, match="2 sets of labels for 3 seeds"):
        fit_reward_model([labels, labels], dataset, seeds=3, **QUICK)
    with pytest.raises(ConfigError, match="differ in their number of pairs"):
        fit_reward_model([labels, labels.select(torch.arange(9))], dataset, seeds=2, **QUICK)
    for bad in ({"beta": -1.0}, {"held_out": 1.0}, {"assumed_noise": 1.0}, {"head": "relu"}, {"patience": 0.5}):
        with pytest.raises(ConfigError, match=f"{next(iter(bad))} must be "):
            fit_reward_model(labels, dataset, **QUICK, **bad)
    with pytest.raises(ConfigError, match="no field 'member'; did you mean members"):
        fit_reward_model(labels, dataset, **QUICK, member=2)
    with pytest.raises(ConfigError, match="head='relu'"):
        RewardEnsemble(4, 2, head="relu")
    wider = dataset_from_arrays(
        torch.cat([dataset.observations, dataset.observations[:, :1]], 1),
        dataset.actions,
        dataset.rewards,
        torch.cat([dataset.next_observations, dataset.next_observations[:, :1]], 1),
        dataset.terminations,
        dataset.truncations,
    )
    with pytest.raises(
        RewardError, match="takes 4 observations and 2 actions, but arrays has 5 observations and 2 actions"
    ):
        relabel(wider, model)
    with pytest.raises(RewardError, match="observations of width 4, not 5"):
        model(wider.observations, wider.actions)


# --- evaluation


def test_calibration(vectors):
    found = calibration(vectors["cal/p2"], vectors["cal/label"])
    for name, key in (("accuracy", "accuracy"), ("nll", "nll"), ("brier", "brier"), ("ece", "ece10_p2")):
        np.testing.assert_allclose(found[name], vectors[f"cal/{key}"], rtol=1e-10, err_msg=name)
    assert calibration(np.array([0.0, 1.0, 0.5]), np.array([0.0, 1.0, 0.5]))["ece"] == 0
    with pytest.raises(ConfigError, match="must be"):
        calibration(np.zeros(2), np.zeros(3))


def test_baselines_of_the_evaluation(dataset, labels):
    truth = dataset.rewards.double().numpy()
    assert evaluate_reward(truth, labels, dataset, true_rewards=truth).accuracy == 1
    assert evaluate_reward(-truth, labels, dataset, true_rewards=truth).accuracy == 0
    for flat in (np.zeros(len(dataset)), np.ones(len(dataset))):
        found = evaluate_reward(flat, labels, dataset, true_rewards=truth)
        assert found.accuracy == pytest.approx(0.5, abs=1e-9)
        assert found.segment_correlation is None
    ties = replace(labels, label_mass=torch.where(torch.arange(120) < 20, 0.5, labels.label_mass))
    found = evaluate_reward(truth, ties, dataset, true_rewards=truth)
    assert (found.ties, found.accuracy) == (20, 1)


def test_evaluation_of_a_model(dataset, model):
    test = collect_preferences(dataset, ScriptedTeacher(), 400, length=10, seed=7)
    found = evaluate_reward(model, test, dataset, true_rewards=dataset.rewards)
    assert 0.6 < found.accuracy < 1
    assert found.accuracy_by_gap[0] < found.accuracy_by_gap[-1]
    assert found.disagreement_auroc > 0.5
    assert found.segment_correlation > 0.5
    assert json.dumps(found.to_dict())
    with pytest.raises(ConfigError, match="one seed"):
        evaluate_reward(RewardEnsemble.for_spec(dataset.spec, seeds=2), test, dataset)


# --- relabelling


def test_relabelling_keeps_everything_but_the_rewards(dataset, model):
    new = relabel(dataset, model)
    for name in ("observations", "actions", "next_observations", "terminations", "truncations", "episode_starts"):
        assert torch.equal(getattr(new, name), getattr(dataset, name))
    assert new.spec.content_hash != dataset.spec.content_hash
    torch.testing.assert_close(
        relabel(dataset, dataset.rewards).rewards, dataset.rewards
    )  # the true reward as an array changes nothing


def test_caution_lowers_the_reward_where_members_disagree(dataset, model):
    rewards = {
        how: relabelled_rewards(dataset, model, reduce=how)[0] for how in ("mean", "min", "mean-1*std", "mean-2*std")
    }
    beta = model.log_beta[0].double().exp()[:, None]
    members = model.dataset_rewards(dataset)[0].double()
    aligned = (members - members.mean(1, keepdim=True)) * beta / beta.mean()
    std = aligned.std(0, correction=0)
    torch.testing.assert_close(rewards["mean"] - rewards["mean-1*std"], std)
    torch.testing.assert_close(rewards["mean"] - rewards["mean-2*std"], 2 * std)
    torch.testing.assert_close(rewards["min"], aligned.amin(0) + members.mean())
    assert (rewards["min"] <= rewards["mean"]).all()


def test_alignment_takes_the_free_offset_of_a_member_out(dataset, model, tmp_path):
    model.save(tmp_path)
    shifted = RewardEnsemble.load(tmp_path)
    with torch.no_grad():
        shifted.network.named_views()["layers.1.bias"][0, 1] += 100
    before, after = (relabelled_rewards(dataset, m, reduce="min", offset="mean")[0] for m in (model, shifted))
    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-3)


def test_offsets_and_scales(dataset, model):
    train, _ = dataset.split(0.3)
    rewards, facts = relabelled_rewards(dataset, model, normalise="std", offset="mean", statistics=train)
    own = relabelled_rewards(train, model, normalise="std", offset="mean", statistics=train)[0]
    assert float(own.mean()) == pytest.approx(0, abs=1e-9)
    assert float(own.std(correction=0)) == pytest.approx(1)
    assert abs(float(rewards.mean())) > 1e-6  # fitted on the training split only
    assert facts["statistics"]["transitions"] == len(train)
    assert float(relabelled_rewards(dataset, model, offset="min")[0].min()) == 0
    returns = relabel(dataset, model, normalise="return_range").episode_returns
    assert float(returns.max() - returns.min()) == pytest.approx(1000, rel=1e-5)


def test_relabelling_to_minari_records_where_it_comes_from(dataset, labels, model, tmp_path):
    new = relabel(dataset, model, dataset_id="test/relabelled-v0")
    again = read_dataset("test/relabelled-v0")
    assert new.spec.content_hash == again.spec.content_hash
    torch.testing.assert_close(again.rewards, relabel(dataset, model).rewards)
    assert torch.equal(again.truncations, dataset.truncations)
    facts = minari.load_dataset("test/relabelled-v0").storage.metadata["provenance"]
    assert facts["relabelled_from"] == dataset.spec.id
    assert facts["content_hash"] == dataset.spec.content_hash
    assert facts["reward_model"] == model.content_hash
    assert facts["reward_description"]["labels"] == len(labels)
    labels.rows(new)  # labels hold for the relabelled dataset
    with pytest.raises(DatasetError, match="exists"):
        relabel(dataset, model, dataset_id="test/relabelled-v0")


def test_bad_relabelling_is_named(dataset, model):
    with pytest.raises(ConfigError, match=r"reduce must be text such as mean, min or mean-1\*std, not 'median'"):
        relabel(dataset, model, reduce="median")
    with pytest.raises(ConfigError, match="normalise must be one of none, std, return_range, not 'max'"):
        relabel(dataset, model, normalise="max")
    with pytest.raises(RewardError, match="all alike"):
        relabel(dataset, np.zeros(len(dataset)), normalise="std")
    with pytest.raises(RewardError, match="not finite"):
        relabel(dataset, np.full(len(dataset), np.nan))
    with pytest.raises(RewardError, match="one seed"):
        relabel(dataset, RewardEnsemble.for_spec(dataset.spec, seeds=2))
    with pytest.raises(ConfigError, match="members of a RewardEnsemble"):
        relabel(dataset, dataset.rewards, reduce="min")


# --- weights


def test_rows_are_drawn_by_weight(dataset):
    weights = torch.arange(len(dataset)).double() % 3
    weighted = with_weights(dataset, weights)
    rows = weighted.sample_indices(60_000, generators(2))
    assert (weights[rows] > 0).all()
    assert (weights[rows] == 2).double().mean() == pytest.approx(2 / 3, abs=0.01)
    assert torch.equal(weighted.sample_indices(50, generators(2))[1:], weighted.sample_indices(50, generators(2)[1:]))
    assert weighted.spec.content_hash != dataset.spec.content_hash
    part = weighted.select([5, 2])
    first = int(dataset.episode_starts[5])
    assert torch.equal(part.weights[:40].double(), weights[first : first + 40])
    assert weighted.sample(8, seeds=3).rewards.shape == (3, 8)
    assert part.with_rewards(np.zeros(len(part))).sample(8).rewards.sum() == 0
    for bad in (torch.zeros(len(dataset)), -weights, weights[:5], weights / 0):
        with pytest.raises(DatasetError, match="weights"):
            with_weights(dataset, bad)


def test_steps_the_members_disagree_about_are_drawn_less(dataset, model):
    weighted = weigh_by_agreement(dataset, model)
    members = model.dataset_rewards(dataset)[0].double()
    beta = model.log_beta[0].double().exp()[:, None]
    std = ((members - members.mean(1, keepdim=True)) * beta).std(0, correction=0)
    assert torch.equal(weighted.weights.argsort(), std.argsort(descending=True))
    assert torch.unique(weigh_by_agreement(dataset, model, temperature=0).weights).tolist() == [1]
    with pytest.raises(RewardError, match="one member"):
        weigh_by_agreement(dataset, RewardEnsemble.for_spec(dataset.spec, members=1))
