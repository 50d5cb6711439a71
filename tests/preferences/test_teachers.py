"""Scripted teachers and samplers against stored numbers, and human labels from files."""

import json
import pickle
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlkit2.data.preferences import SegmentIndex
from rlkit2.errors import ConfigError, CorruptDatasetError, DatasetError, DatasetNotFoundError
from rlkit2.preferences import ScriptedTeacher, collect_preferences, import_preference_transformer, sample_pairs
from rlkit2.preferences.inert_pickle import read_inert_pickle
from rlkit2.preferences.samplers import SCORES, disagreement, entropy, k_center, mean_variance
from rlkit2.preferences.teachers import PRESETS, average_segment_return
from tests.preferences.make import linear_dataset
from tests.reference import ROOT


@pytest.fixture(scope="module")
def vectors():
    with np.load(ROOT / "preferences_segments.npz") as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(scope="module")
def dataset():
    return linear_dataset(episodes=20, steps=20)


def test_the_oracle_prefers_the_larger_sum(vectors):
    answers = ScriptedTeacher("oracle").label(vectors["teacher/r1"], vectors["teacher/r2"])
    np.testing.assert_array_equal(answers.label_mass, vectors["teacher/oracle"])
    assert answers.kept.all()
    assert not answers.equal.any()


def test_thresholds(vectors):
    r1, r2 = vectors["teacher/r1"], vectors["teacher/r2"]
    equal = ScriptedTeacher(equal_threshold=float(vectors["teacher/thr_equal"])).label(r1, r2)
    np.testing.assert_array_equal(equal.equal, vectors["teacher/equal_mask"])
    np.testing.assert_array_equal(equal.label_mass[equal.equal], 0.5)
    np.testing.assert_array_equal(equal.label_mass[~equal.equal], vectors["teacher/oracle"][~equal.equal])
    skip = ScriptedTeacher(skip_threshold=float(vectors["teacher/thr_skip"])).label(r1, r2)
    np.testing.assert_array_equal(skip.kept, vectors["teacher/keep_mask"])


@pytest.mark.parametrize("discount", [0.9, 0.5])
def test_the_myopic_teacher_weighs_the_last_step_most(vectors, discount):
    teacher = ScriptedTeacher("myopic", discount=discount)
    key = f"teacher/myopic/gamma={discount}"
    for side in (0, 1):
        np.testing.assert_allclose(
            teacher.scores(vectors[f"teacher/r{side + 1}"]), vectors[f"{key}/returns"][side], rtol=1e-12
        )
    answers = teacher.label(vectors["teacher/r1"], vectors["teacher/r2"])
    np.testing.assert_array_equal(answers.label_mass, vectors[f"{key}/label"])


@pytest.mark.parametrize("beta", [1, 10])
@pytest.mark.parametrize("discount", ["0.9", "0.5", "1"])
def test_the_noisy_teacher_has_the_stored_probabilities(vectors, beta, discount):
    teacher = ScriptedTeacher("noisy", beta=beta, discount=float(discount))
    found = teacher.probabilities(vectors["teacher/r1"], vectors["teacher/r2"])
    np.testing.assert_allclose(found, vectors[f"teacher/noisy/beta={beta}/gamma={discount}/p2"], rtol=1e-10)
    draws = [teacher.label(vectors["teacher/r1"], vectors["teacher/r2"], seed=s).label_mass for s in range(400)]
    error = np.abs(np.mean(draws, 0) - found) / np.sqrt(np.maximum(found * (1 - found), 0.01) / 400)
    assert (error < 5).all()


def test_mistakes_are_binomial_and_equal_cannot_be_flipped():
    r1, r2 = np.random.default_rng(0).normal(size=(2, 20_000, 5))
    r2[:500] = r1[:500] + 1e-3
    answers = ScriptedTeacher("mistake", equal_threshold=0.02).label(r1, r2, seed=1)
    assert answers.equal[:500].all()
    assert (answers.label_mass[answers.equal] == 0.5).all()
    decided = ~answers.equal
    wrong = (answers.label_mass != (r2.sum(1) > r1.sum(1)))[decided]
    assert abs(wrong.mean() - 0.1) < 4 * np.sqrt(0.09 / decided.sum())


def test_ties_of_the_oracle_go_to_the_first():
    r = np.ones((3, 4))
    assert (ScriptedTeacher().label(r, r).label_mass == 0).all()


def test_a_share_is_applied_once(dataset):
    average = average_segment_return(dataset, 10)
    assert average == pytest.approx(
        float(dataset.episode_returns.mean()) * 10 / float(dataset.episode_lengths.double().mean()), rel=1e-5
    )
    shifted = dataset.rewards.double().numpy() + 5
    average = average_segment_return(dataset, 10, shifted)
    rows = dataset.segments(10)
    first, second = shifted[rows[:50]], shifted[rows[50:100]]
    answers = ScriptedTeacher("equal").label(first, second, average=average)
    np.testing.assert_array_equal(answers.equal, np.abs(first.sum(1) - second.sum(1)) < 0.1 * average)


def test_beta_scale_std_forgets_the_scale_of_the_reward():
    r1, r2 = np.random.default_rng(0).normal(size=(2, 100, 5))
    teacher = ScriptedTeacher("noisy", beta_scale="std")
    np.testing.assert_allclose(teacher.probabilities(r1, r2), teacher.probabilities(1e4 * r1, 1e4 * r2))


def test_presets_differ_from_the_oracle_by_one_setting():
    for name, differences in PRESETS.items():
        assert ScriptedTeacher(name).to_dict() == {"teacher": name, **differences}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "kind"}, "unknown teacher 'kind'"),
        ({"beta": 0}, "beta = 0"),
        ({"discount": 1.1}, r"discount = 1\.1"),
        ({"mistake": -1}, "mistake = -1"),
        ({"beta_scale": "iqr"}, "beta_scale"),
    ],
)
def test_bad_teachers_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ScriptedTeacher(**arguments)


def test_bad_queries_are_refused(dataset):
    with pytest.raises(ConfigError, match="cut to one length"):
        ScriptedTeacher().label(np.zeros((3, 4)), np.zeros((3, 5)))
    with pytest.raises(ConfigError, match="give average"):
        ScriptedTeacher("skip").label(np.zeros((3, 4)), np.zeros((3, 4)))
    with pytest.raises(ConfigError, match="give skip_threshold"):
        ScriptedTeacher("skip").label(np.zeros((3, 4)), np.zeros((3, 4)), average=-2)
    with pytest.raises(ConfigError, match="lower its skip threshold"):
        collect_preferences(dataset, ScriptedTeacher(skip_threshold=1e9), 4, length=5)
    with pytest.raises(ConfigError, match="one finite reward"):
        collect_preferences(dataset, ScriptedTeacher(), 4, length=5, rewards=np.zeros(3))


def test_skipped_queries_are_replaced(dataset):
    threshold = float(np.median(dataset.rewards[dataset.segments(8)].sum(1)))
    labels = collect_preferences(dataset, ScriptedTeacher(skip_threshold=threshold), 200, length=8)
    sums = [dataset.rewards[rows].double().sum(1) for rows in labels.rows(dataset)]
    assert len(labels) == 200
    assert (torch.maximum(*sums) > threshold).all()
    assert torch.equal(labels.label_mass, (sums[1] > sums[0]).double())


# --- samplers


def test_scores_of_an_ensemble(vectors):
    p2 = torch.from_numpy(vectors["ens/p2"])
    np.testing.assert_allclose(disagreement(p2), vectors["ens/disagreement_std0"], rtol=1e-10)
    np.testing.assert_allclose(entropy(p2), vectors["ens/mean_entropy"], rtol=1e-10)
    assert (mean_variance(p2) <= 0.25).all()
    certain = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    assert float(entropy(certain)) == 0
    assert float(mean_variance(certain)) == 0.25
    assert float(disagreement(certain)) == 0.5


@pytest.mark.parametrize("sampler", sorted(SCORES))
def test_informed_samplers_take_the_best_of_a_uniform_pool(dataset, sampler):
    index = SegmentIndex(dataset, 6)
    seen = {}

    class Model:
        def probabilities(self, data, rows_1, rows_2):
            seen["rows"] = torch.stack([rows_1[:, 0], rows_2[:, 0]], 1)
            p = torch.rand(3, len(rows_1), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
            seen["score"] = SCORES[sampler](p)
            return p

    pairs = sample_pairs(index, 7, sampler, model=Model(), seed=2)
    assert len(seen["rows"]) == 70
    best = seen["rows"][seen["score"].topk(7).indices]
    assert torch.equal(index.starts[pairs], best)
    with pytest.raises(ConfigError, match="needs a reward ensemble"):
        sample_pairs(index, 7, sampler)


@given(st.sampled_from(["uniform", "episodes"]), st.integers(0, 50))
def test_pairs_never_ask_about_one_segment(sampler, seed):
    index = SegmentIndex(linear_dataset(episodes=2, steps=6), 6)
    pairs = sample_pairs(index, 50, sampler, seed=seed)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert pairs.min() >= 0
    assert pairs.max() < len(index)


def test_uniform_covers_all_starts_and_episodes_weighs_short_episodes_up(dataset):
    index = SegmentIndex(dataset, 20)  # 20, 21, 22 steps: one, two or three starts an episode
    drawn = sample_pairs(index, 30_000, "uniform", seed=0)
    share = torch.bincount(drawn.flatten(), minlength=len(index)) / drawn.numel()
    assert (share - 1 / len(index)).abs().max() < 0.004
    drawn = sample_pairs(index, 30_000, "episodes", seed=0)
    share = torch.bincount(index.segments[drawn.flatten(), 0], minlength=20) / drawn.numel()
    assert (share - 1 / 20).abs().max() < 0.005


def test_k_center_reaches_every_cluster():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    points = (centres[:, None] + 0.1 * torch.rand(4, 25, 2, generator=torch.Generator().manual_seed(0))).flatten(0, 1)
    assert sorted((k_center(points, 4) // 25).tolist()) == [0, 1, 2, 3]
    assert sorted((k_center(points, 2, points[[0, 30]]) // 25).tolist()) == [2, 3]
    with pytest.raises(ConfigError, match="cannot choose"):
        k_center(points, 101)


def test_k_center_sampler(dataset):
    index = SegmentIndex(dataset, 6)
    first = sample_pairs(index, 5, "k_center", seed=1)
    second = sample_pairs(index, 5, "k_center", seed=1, labelled=first)
    assert len({tuple(p) for p in torch.cat([first, second]).tolist()}) == 10
    with pytest.raises(ConfigError, match="unknown sampler"):
        sample_pairs(index, 5, "best")


# --- human labels


def _published(folder, dataset, *, name="_num4_q6", write=pickle.dump, labels=(0, 1, -1, 1)):
    folder.mkdir()
    first, second = np.array([0, 3, 25, 65], np.int32), [7, 1, 30, 90]
    for file, values in ((f"indices{name}", first), (f"indices_2{name}", second), ("label_human", list(labels))):
        with open(folder / file, "wb") as opened:
            write(values, opened)
    return first, second


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_labels_in_the_layout_of_the_preference_transformer(dataset, tmp_path, protocol):
    first, second = _published(
        tmp_path / "hopper", dataset, write=lambda values, file: pickle.dump(values, file, protocol=protocol)
    )
    labels = import_preference_transformer(tmp_path / "hopper", dataset)
    rows_w, rows_l = labels.rows(dataset)
    assert rows_w[:, 0].tolist() == first.tolist()
    assert rows_l[:, 0].tolist() == second
    assert labels.length == 6
    assert labels.label_mass.tolist() == [0, 1, 0.5, 1]
    assert labels.source == {"people": "hopper"}


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.integers(0, 99))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@example(40, 40, 8, 0)  # published: 500 or 1000 rows, 100 labels
def test_label_i_belongs_to_row_i_whatever_the_counts(dataset, rows, others, judged, seed):
    """Rows beyond the last label are left out with a warning; labels without a row and unequal index files are refused."""
    generator = np.random.default_rng(seed)
    starts = SegmentIndex(dataset, 6).starts.numpy()
    first, second = generator.choice(starts, rows), generator.choice(starts, others)
    label = generator.integers(-1, 2, judged)
    with tempfile.TemporaryDirectory() as folder:
        for file, values in (("indices_num500_q6", first), ("indices_2_num500_q6", second), ("label_human", label)):
            (Path(folder) / file).write_bytes(pickle.dumps(values.tolist()))
        if rows != others or rows < judged:
            with pytest.raises(ConfigError, match=f"{rows} first starts, {others} second starts and {judged} labels"):
                import_preference_transformer(folder, dataset)
            return
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            labels = import_preference_transformer(folder, dataset)
    assert [str(w.message).count(f"other {rows - judged} pairs are left out") for w in said] == [1] * (rows > judged)
    rows_w, rows_l = labels.rows(dataset)
    assert rows_w[:, 0].tolist() == first[:judged].tolist()
    assert rows_l[:, 0].tolist() == second[:judged].tolist()
    assert labels.label_mass.tolist() == np.where(label == -1, 0.5, label).tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_and_averages_of_rewards_that_are_not_finite_are_refused(dataset, value):
    rewards = np.zeros((5, 6))
    rewards[3, 2] = value
    teacher = ScriptedTeacher("noisy")
    for judge in (teacher.scores, lambda bad: teacher.probabilities(bad, bad)):
        with pytest.raises(ConfigError, match="of query 3 hold NaN or infinite"):
            judge(rewards)
    with pytest.raises(ConfigError, match="of step 0 hold NaN or infinite"):
        average_segment_return(dataset, 6, np.full(len(dataset), value))


def test_published_labels_that_do_not_fit_are_refused(dataset, tmp_path):
    with pytest.raises(DatasetNotFoundError, match="0 files named indices_num"):
        import_preference_transformer(tmp_path, dataset)
    _published(tmp_path / "a", dataset, name="_num4")
    with pytest.raises(ConfigError, match="does not say how long"):
        import_preference_transformer(tmp_path / "a", dataset)
    assert import_preference_transformer(tmp_path / "a", dataset, length=5).length == 5
    with pytest.raises(DatasetError, match="not inside an episode"):
        import_preference_transformer(tmp_path / "a", dataset, length=19)
    _published(tmp_path / "b", dataset, labels=(0, 1, 2, 1))
    with pytest.raises(ConfigError, match="has label 2"):
        import_preference_transformer(tmp_path / "b", dataset)
    _published(tmp_path / "c", dataset, labels=(0, 1, 1, 0, 1))
    with pytest.raises(ConfigError, match="4 first starts, 4 second starts and 5 labels"):
        import_preference_transformer(tmp_path / "c", dataset)


class _Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_in_a_pickle_is_executed(tmp_path, protocol):
    target, file = tmp_path / "written", tmp_path / "label_human"
    file.write_bytes(pickle.dumps([1, _Payload(str(target))], protocol=protocol))
    with pytest.raises(CorruptDatasetError, match="nothing in it was executed"):
        read_inert_pickle(file)
    assert not target.exists()
    file.write_bytes(json.dumps([1]).encode())
    with pytest.raises(CorruptDatasetError):
        read_inert_pickle(file)


@given(st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=40), st.integers(2, 5))
def test_numbers_survive_the_inert_reader(tmp_path_factory, values, protocol):
    file = tmp_path_factory.mktemp("pickle") / "values"
    for form in (
        values,
        tuple(values),
        np.array(values, np.int64),
        np.array(values, ">f8"),
        [np.int64(v) for v in values],
    ):
        file.write_bytes(pickle.dumps(form, protocol=protocol))
        np.testing.assert_array_equal(np.asarray(read_inert_pickle(file)), np.asarray(form))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("preset", ["oracle", "noisy", "myopic", "mistake"])
def test_rewards_that_are_not_finite_are_refused(bad, side, preset):
    rewards = np.zeros((2, 5, 4))
    rewards[side, 3, 2] = bad
    with pytest.raises(ConfigError, match=f"rewards_{side + 1} of query 3 hold NaN or infinite"):
        ScriptedTeacher(preset).label(*rewards, average=1.0)
