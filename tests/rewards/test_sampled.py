"""Distances from samples: reference vectors, bias and coverage of the estimators, features, ends of episodes, kinds of rewards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rlkit2.data import Batch, dataset_from_arrays
from rlkit2.errors import ConfigError, DatasetError, RewardError
from rlkit2.rewards import RewardDistanceMatrix, SampledStarc, TabularMDP, starc_matrix
from rlkit2.rewards.sampled.cells import gather_cells
from rlkit2.rewards.sampled.features import (
    Categories,
    CellFeatures,
    FeatureMap,
    Features,
    FourierFeatures,
    PolynomialFeatures,
    per_action,
)
from rlkit2.rewards.sampled.grams import Split, gram
from rlkit2.rewards.sampled.intervals import interval
from rlkit2.rewards.sampled.network_features import NetworkFeatures
from rlkit2.rewards.sampled.rows import BatchRows, RewardFunctions
from tests.rewards.vectors import ROOT, load

Array = np.ndarray[Any, Any]
EYE = torch.eye(12, dtype=torch.float64)


def tabular_batch(s: Array, a: Array, s_next: Array, terminated: Array, episode: Array) -> Batch:
    """One-hot float64 transitions."""
    ends = np.r_[np.diff(episode) != 0, True]
    return Batch(
        observations=EYE[torch.from_numpy(s).long()],
        actions=torch.from_numpy(a).long(),
        rewards=torch.zeros(len(s), dtype=torch.float64),
        next_observations=EYE[torch.from_numpy(s_next).long()],
        terminations=torch.from_numpy(terminated.astype(bool)),
        truncations=torch.from_numpy(ends & ~terminated.astype(bool)),
    )


def samples() -> tuple[dict[str, Array], Batch, list[Array], Array]:
    """The tabular file: arrays, transitions, five rewards, two folds."""
    file = load("starc_samples")
    batch = tabular_batch(*(file[key] for key in ("s", "a", "s_next", "terminated", "episode")))
    episodes = int(file["episode"].max()) + 1
    return file, batch, list(file["rewards"].T), (np.arange(episodes) >= episodes // 2).astype(int)


def simulate(file: dict[str, Array], transitions: int, seed: int) -> tuple[Batch, list[Array]]:
    """Episodes of the file's process under its behaviour policy, at least so many transitions."""
    rng = np.random.default_rng(seed)
    tau, pi = file["tau"].cumsum(-1), file["pi"].cumsum(-1)
    state, rows, episode = int(rng.choice(12, p=file["mu0"])), [], 0
    while len(rows) < transitions or rows[-1][3] == 0:
        action = int((rng.random() > pi[state]).sum())
        nxt = int((rng.random() > tau[state, action]).sum())
        end = nxt == int(file["terminal_state"])
        rows.append((state, action, nxt, end, episode))
        episode += end
        state = int(rng.choice(12, p=file["mu0"])) if end else nxt
    s, a, z, end_flags, episodes = (np.array(column) for column in zip(*rows, strict=True))
    return tabular_batch(s, a, z, end_flags, episodes), [R[s, a, z] for R in file["R"]]


def test_tabular_reference() -> None:
    file, batch, rewards, folds = samples()
    for estimator in ("naive", "plugin"):
        starc = SampledStarc("onehot", discount=float(file["gamma"]), folds=folds, estimator=estimator, bootstrap=0)  # type: ignore[arg-type]
        np.testing.assert_allclose(starc.fit(batch, rewards).values, file[f"{estimator}_dist"], rtol=1e-9, atol=1e-7)
    # The file's cross-fit takes the value of both factors from one fit, which is biased by less than this with so many transitions.
    crossfit = SampledStarc("onehot", discount=float(file["gamma"]), folds=folds, bootstrap=0).fit(batch, rewards)
    np.testing.assert_allclose(crossfit.values, file["crossfit_dist"], atol=0.03)


def test_sums_of_the_tabular_reference() -> None:
    """Naive products and values of the file, from cells that are counted."""
    file, batch, rewards, folds = samples()
    rows = BatchRows.of(batch)
    functions = RewardFunctions(rewards, len(rows))
    states = CellFeatures().fit(rows, functions, 0.95, 0)
    assert isinstance(states, Categories)
    blocks = [torch.from_numpy(np.flatnonzero(folds == k)) for k in (0, 1)]
    gathered = gather_cells(rows, functions, states, float(file["gamma"]), blocks)
    split = Split(torch.tensor([0, 1]), torch.tensor([0, 1]))
    parts = split.parts(gathered.blocks, torch.ones(1, 2, dtype=torch.float64))
    found = gram(parts, "naive", 0.0)[0] * gathered.scale * gathered.scale[:, None]
    np.testing.assert_allclose(found.numpy(), file["naive_gram"], rtol=1e-8)
    values = parts.map(lambda sums: sums.sum((0, 1, 2))).fit(0.0).w[states.ids(EYE[:11])] * gathered.scale
    np.testing.assert_allclose(values.T, file["lstd_V"], rtol=1e-9)


def test_cells_agree_with_indicators_laid_out() -> None:
    """Counting transitions gives what the products of one-hot features give, for every estimator and diagnostic."""
    batch, rewards = simulate(load("starc_samples"), 1200, 3)

    class LaidOut(Features):
        def fit(self, rows: Any, rewards: Any, discount: float, seed: int) -> FeatureMap:
            return FeatureMap("one-hot", lambda o: o[:, :11], lambda o, a: per_action(o[:, :11], a, 3))

    for estimator in ("crossfit", "orthogonal", "plugin", "naive"):
        cells, dense = (
            SampledStarc(features, discount=0.95, estimator=estimator, bootstrap=20).fit(batch, rewards)  # type: ignore[arg-type]
            for features in ("onehot", LaidOut())
        )
        np.testing.assert_allclose(cells.values, dense.values, atol=2e-6)
        for name in ("held_out_r2", "bellman_residual", "coverage"):
            np.testing.assert_allclose(cells.diagnostics[name], dense.diagnostics[name], atol=1e-6, err_msg=name)
        assert max(dense.diagnostics["misfit"].values()) == 0


def test_the_default_is_right_and_naive_is_not() -> None:
    file, batch, rewards, _ = samples()
    fitted = SampledStarc("onehot", discount=0.95, bootstrap=50).fit(batch, rewards)
    exact = file["x_dist_exact"]
    assert np.abs(fitted.values - exact).max() <= 0.1
    assert fitted.values[0, 1] <= 0.03
    assert fitted.values[0, 3] == pytest.approx(2, abs=1e-6)
    assert fitted.ci is not None
    assert (fitted.ci[..., 0] <= fitted.ci[..., 1]).all()
    naive = SampledStarc("onehot", discount=0.95, estimator="naive", bootstrap=0).fit(batch, rewards)
    assert naive.values[0, 1] > 0.3
    assert "deterministic" in naive.notes[0]
    # The exact value, computed by the tabular code with the weights of the visited pairs.
    mdp = TabularMDP(file["tau"], 0.95, file["mu0"])
    tabular = starc_matrix(file["R"], mdp, policy=file["pi"], weights=file["weights_sa"])
    np.testing.assert_allclose(tabular.values, exact, atol=1e-9)


def lqr() -> tuple[dict[str, Array], Batch, dict[str, Array], Array]:
    if not (ROOT / "starc_lqr.npz").exists():
        pytest.skip("the continuous reference data are large; set RLKIT2_REFERENCE to a folder that has them")
    file = load("starc_lqr")
    count = len(file["s"])
    batch = Batch(
        observations=torch.from_numpy(file["s"])[:, None],
        actions=torch.from_numpy(file["u"])[:, None],
        rewards=torch.zeros(count, dtype=torch.float64),
        next_observations=torch.from_numpy(file["s_next"])[:, None],
        terminations=torch.zeros(count, dtype=torch.bool),
        truncations=torch.from_numpy(np.r_[np.diff(file["episode"]) != 0, True]),
    )
    return file, batch, dict(zip(file["reward_names"].tolist(), file["rewards"].T, strict=True)), np.arange(20) // 10


def test_linear_quadratic_reference() -> None:
    file, batch, rewards, folds = lqr()
    for estimator in ("naive", "crossfit"):
        starc = SampledStarc("quadratic", discount=0.95, folds=folds, estimator=estimator, bootstrap=100)  # type: ignore[arg-type]
        matrix = starc.fit(batch, rewards)
        if estimator == "naive":
            np.testing.assert_allclose(matrix.values[:6, :6], file["naive_dist"], rtol=1e-8, atol=1e-7)
        assert matrix.trivial.tolist() == [False] * 6 + [True]
        assert np.isnan(matrix.values[6, :6]).all()
        error = np.abs(matrix.values[:6, :6] - file["x_dist_VAL_L2"][:6, :6]).max()
        assert error <= 0.1 if estimator == "crossfit" else error > 0.5
    assert SampledStarc("auto", discount=0.95, bootstrap=0).fit(batch, rewards).values[0, 1] < 0.2


def analytic_lqr(episodes: int, seed: int) -> tuple[Batch, dict[str, Any]]:
    """Fresh data of a linear system and three rewards given as functions: quadratic, an equivalent one, an unrelated one."""
    rng = np.random.default_rng(seed)
    s = np.zeros((episodes, 201))
    u = np.zeros((episodes, 200))
    s[:, 0] = rng.normal(size=episodes)
    for t in range(200):
        u[:, t] = -0.6 * s[:, t] + 0.7 * rng.normal(size=episodes)
        s[:, t + 1] = 0.9 * s[:, t] + 0.5 * u[:, t] + 0.4 * rng.normal(size=episodes)
    flags = np.zeros((episodes, 200), dtype=bool)
    ends = flags.copy()
    ends[:, -1] = True
    batch = Batch(
        observations=torch.from_numpy(s[:, :-1].reshape(-1, 1)),
        actions=torch.from_numpy(u.reshape(-1, 1)),
        rewards=torch.zeros(episodes * 200, dtype=torch.float64),
        next_observations=torch.from_numpy(s[:, 1:].reshape(-1, 1)),
        terminations=torch.from_numpy(flags.ravel()),
        truncations=torch.from_numpy(ends.ravel()),
    )

    def base(o: torch.Tensor, a: torch.Tensor, n: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return -(o[:, 0] ** 2) - 0.1 * a[:, 0] ** 2

    return batch, {
        "base": base,
        "equivalent": lambda o, a, n, t: 3 * base(o, a, n, t) + 0.95 * 2 * n[:, 0] ** 2 - 2 * o[:, 0] ** 2,
        "other": lambda o, a, n, t: n[:, 0].numpy(),
    }


def test_callables_on_a_continuous_problem() -> None:
    batch, rewards = analytic_lqr(40, 0)
    matrix = SampledStarc("quadratic", discount=0.95, bootstrap=50).fit(batch, rewards)
    assert matrix.values[0, 1] < 1e-6  # in-span shaping is absorbed exactly
    assert matrix.values[0, 2] == pytest.approx(np.sqrt(2), abs=0.05)
    assert matrix.diagnostics["invariance_gap"] < 1e-6
    penalised = SampledStarc("quadratic", discount=0.95, bootstrap=0, ridge=0.1).fit(batch, rewards)
    assert penalised.diagnostics["invariance_gap"] > 1e-3
    scaled = SampledStarc("quadratic", discount=0.95, bootstrap=0).fit(
        batch, {"a": lambda *x: 1e-6 * rewards["base"](*x), "b": lambda *x: 1e6 * rewards["other"](*x)}
    )
    assert scaled.values[0, 1] == pytest.approx(matrix.values[0, 2], abs=1e-9)


@pytest.mark.parametrize(
    "features",
    [PolynomialFeatures(2), FourierFeatures(24), NetworkFeatures(width=32, steps=400), "auto"],
)
def test_features_on_a_continuous_problem(features: Any) -> None:
    batch, rewards = analytic_lqr(60, 1)
    matrix = SampledStarc(features, discount=0.95, bootstrap=0).fit(batch, rewards)
    assert matrix.values[0, 1] < 0.2
    assert matrix.values[0, 2] == pytest.approx(np.sqrt(2), abs=0.15)
    again = SampledStarc(features, discount=0.95, bootstrap=0).fit(batch, rewards)
    np.testing.assert_array_equal(matrix.values, again.values)


@pytest.mark.parametrize("count", [20, pytest.param(50, marks=pytest.mark.slow)])
def test_coverage_of_the_intervals(count: int) -> None:
    """Data sets of 2000 transitions: the 95 % intervals hold the exact distance 90-100 % of the time, and their estimate always."""
    file = load("starc_samples")
    exact, hits = file["x_dist_exact"], np.zeros((5, 5))
    pairs = [(0, 1), (0, 2), (0, 4), (1, 4), (2, 4)]
    for seed in range(count):
        batch, rewards = simulate(file, 2000, seed)
        matrix = SampledStarc("onehot", discount=0.95, seed=seed, bootstrap=100).fit(batch, rewards)
        assert matrix.ci is not None
        hits += (matrix.ci[..., 0] - 1e-9 <= exact) & (exact <= matrix.ci[..., 1] + 1e-9)
        assert ((matrix.ci[..., 0] <= matrix.values) & (matrix.values <= matrix.ci[..., 1])).all()
    for pair in pairs:
        assert hits[pair] >= 0.9 * count, (pair, hits[pair])


def test_ends_of_episodes() -> None:
    """A terminated step bootstraps nothing, a truncated one does: the same rows under other flags are another problem."""
    file, batch, rewards, _ = samples()
    # What is recorded after the end must not matter where it terminates, and does where it is cut off.
    where = torch.where(batch.terminations[:, None], EYE[3], batch.next_observations)
    batch = replace(batch, next_observations=where)
    flipped = replace(batch, terminations=torch.zeros_like(batch.terminations), truncations=batch.terminations)
    right = SampledStarc("onehot", discount=0.95, bootstrap=0).fit(batch, rewards)
    wrong = SampledStarc("onehot", discount=0.95, bootstrap=0).fit(flipped, rewards)
    assert np.abs(right.values - file["x_dist_exact"]).max() < 0.1
    assert np.nanmax(np.abs(wrong.values - right.values)) > 0.05
    assert right.diagnostics["terminated_share"] > 0.04
    assert wrong.diagnostics["terminated_share"] == 0
    # A constant is trivial where nothing terminates, and an incentive to live on or to end where something does.
    ones = {"reward": rewards[0], "constant": np.ones(len(rewards[0]))}
    assert not SampledStarc("onehot", discount=0.95, bootstrap=50).fit(batch, ones).trivial.any()
    keep = file["terminated"] == 0
    alive = tabular_batch(*(file[key][keep] for key in ("s", "a", "s_next", "terminated", "episode")))
    matrix = SampledStarc("onehot", discount=0.95, bootstrap=50).fit(alive, {k: v[keep] for k, v in ones.items()})
    assert matrix.status(1) == "trivial"
    assert np.isnan(matrix.values[0, 1])


def test_noise_is_insufficient_data_not_a_number() -> None:
    _, batch, rewards, _ = samples()
    noise = np.random.default_rng(0).normal(size=len(rewards[0]))
    for estimator in ("crossfit", "plugin", "naive"):
        starc = SampledStarc("onehot", discount=0.95, bootstrap=100, estimator=estimator)  # type: ignore[arg-type]
        matrix = starc.fit(batch, {"reward": rewards[0], "noise": noise})
        assert matrix.status(1) == "insufficient data"
        assert np.isnan(matrix.values[1]).all()
        assert np.isfinite(matrix.values[0, 0])
        assert '"insufficient data"' in matrix.to_json()


def test_absolute_distances() -> None:
    file, batch, rewards, _ = samples()
    matrix = SampledStarc("onehot", discount=0.95, estimator="plugin", norm="l1", bootstrap=20).fit(batch, rewards)
    mdp = TabularMDP(file["tau"], 0.95, file["mu0"])
    exact = starc_matrix(file["R"], mdp, policy=file["pi"], weights=file["weights_sa"], norm="l1", distance="l1")
    assert np.abs(matrix.values - exact.values).max() < 0.1
    assert matrix.ci is not None
    assert (matrix.ci[0, 2, 0] < exact.values[0, 2]) & (exact.values[0, 2] < matrix.ci[0, 2, 1])
    with pytest.raises(ConfigError, match="estimator='plugin'"):
        SampledStarc(discount=0.95, norm="l1")


def test_datasets_modules_and_arrays_agree() -> None:
    rng = np.random.default_rng(0)
    batch, _ = analytic_lqr(12, 3)
    fields = {k: v.float() if v.is_floating_point() else v for k, v in vars(batch).items()}
    dataset = dataset_from_arrays(**{**fields, "actions": fields["actions"].clamp(-1, 1)})
    torch.manual_seed(0)

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, o: torch.Tensor, a: torch.Tensor, n: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layers(torch.cat([o, a], -1))
            return out

    module = Learned()
    module.train()
    values = module.eval()(dataset.observations, dataset.actions, None, None).detach().squeeze(1)
    module.train()
    matrix = SampledStarc("quadratic", discount=0.9, bootstrap=20).fit(
        dataset, {"module": module, "array": values, "half": rng.normal(size=len(dataset)) * 0.01 + values.numpy()}
    )
    assert module.training
    assert matrix.values[0, 1] < 1e-6
    assert isinstance(matrix, RewardDistanceMatrix)
    pieces = [Batch(**{k: v[i : i + 200] for k, v in fields.items()}) for i in range(0, len(dataset), 200)]
    by_batches = SampledStarc("quadratic", discount=0.9, bootstrap=0).fit(iter(pieces), {"a": values, "b": values**2})
    assert by_batches.diagnostics["episodes"] == 12


def test_values_that_are_not_finite() -> None:
    _, batch, rewards, _ = samples()
    starc = SampledStarc("linear", discount=0.95, bootstrap=0)
    after_the_end = torch.where(batch.terminations[:, None], torch.nan, batch.next_observations)
    found = starc.fit(replace(batch, next_observations=after_the_end), rewards)
    np.testing.assert_array_equal(found.values, starc.fit(batch, rewards).values)
    spoilt = batch.observations.clone()
    spoilt[7, 3] = torch.inf
    with pytest.raises(RewardError, match="rlkit2 data check"):
        starc.fit(replace(batch, observations=spoilt), rewards)


def test_bad_input() -> None:
    batch, rewards = analytic_lqr(4, 0)
    starc = SampledStarc("linear", discount=0.9, bootstrap=0)
    one = Batch(**{k: v[:50] for k, v in vars(batch).items()})
    for call, error, message in (
        (lambda: SampledStarc(discount=1.0), ConfigError, r"discount must be a number in \[0, 1\), not 1.0"),
        (lambda: SampledStarc("waves", discount=0.9), ConfigError, "features must be one of auto, linear"),  # type: ignore[arg-type]
        (lambda: SampledStarc(discount=0.9, estimator="best"), ConfigError, "estimator must be one of crossfit"),  # type: ignore[arg-type]
        (lambda: SampledStarc(discount=0.9, folds=1), ConfigError, "folds at least 2"),
        (
            lambda: SampledStarc(discount=0.9, folds=[0, 1]).fit(batch, rewards),
            ConfigError,
            r"one fold per episode, \[4\]",
        ),
        (lambda: starc.fit(batch, []), RewardError, "no rewards"),
        (lambda: starc.fit([], rewards), RewardError, "no transitions"),
        (lambda: starc.fit(batch, {"short": np.ones(3)}), RewardError, r"short has shape \[3\]; the data has 800"),
        (
            lambda: starc.fit(batch, {"f": lambda o, a: o @ a}),
            RewardError,
            r"f failed on a batch .* with observations, actions",
        ),
        (lambda: starc.fit(batch, {"f": lambda o, a, n, t: o.repeat(1, 2)}), RewardError, "return one number per"),
        (lambda: starc.fit(batch, {"f": lambda o, a, n, t: o[:, 0] / 0}), RewardError, "f is .*inf at row 0"),
        (lambda: starc.fit(one, {"a": np.ones(50)}), DatasetError, "cross-fitting needs two"),
        (lambda: SampledStarc("onehot", discount=0.9).fit(batch, rewards), ConfigError, "need discrete actions"),
        (
            lambda: starc.fit(replace(batch, observations=torch.zeros(800, 3, 8, 8)), rewards),
            RewardError,
            "are images",
        ),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("bootstrap", [0, 100])
@pytest.mark.parametrize("features", ["onehot", "quadratic", "fourier"])
def test_noise_gets_no_number(features: Any, bootstrap: int) -> None:
    """30 rewards of pure noise, of any scale: at most 2 of them get a number, and the real reward beside them has one."""
    if features == "onehot":
        _, batch, rewards, _ = samples()
        true = rewards[0]
    else:
        batch, named = analytic_lqr(60, 2)
        true = named["base"](batch.observations, batch.actions, batch.next_observations, batch.terminations).numpy()
    rng = np.random.default_rng(1)
    noise = {f"noise {k}": 10.0 ** rng.uniform(-8, 8) * rng.normal(size=len(true)) for k in range(30)}
    matrix = SampledStarc(features, discount=0.95, bootstrap=bootstrap).fit(batch, {"true": true, **noise})
    assert matrix.status(0) == ""
    assert sum(matrix.status(k) == "" for k in range(1, 31)) <= 2


def test_noise_added_to_a_reward_leaves_it_at_distance_zero() -> None:
    _, batch, rewards, _ = samples()
    rng, true = np.random.default_rng(2), rewards[0]
    noisy = {f"{k}": true + (0.5 + k % 3) * true.std() * rng.normal(size=len(true)) for k in range(20)}
    matrix = SampledStarc("onehot", discount=0.95, bootstrap=100).fit(batch, {"true": true, **noisy})
    assert matrix.ci is not None
    assert (matrix.ci[0, 1:, 0] < 1e-6).mean() >= 0.9
    assert ((matrix.ci[..., 0] <= matrix.values) & (matrix.values <= matrix.ci[..., 1])).all()


@given(st.integers(0, 10**6), st.integers(2, 60), st.floats(-200, 200))
@settings(max_examples=30)
def test_intervals_hold_their_estimate(seed: int, units: int, shift: float) -> None:
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.normal(size=(1 + int(rng.integers(1, 90)), 4)) ** 3)
    values[0] += shift
    found = interval(values, units)
    assert bool(((found.low <= values[0]) & (values[0] <= found.high)).all())
    wider = interval(values, 2)
    assert bool((wider.high - wider.low >= found.high - found.low).all())


@pytest.mark.parametrize("features", ["onehot", "linear"])
def test_rewards_of_any_size(features: Any) -> None:
    _, batch, rewards, _ = samples()
    starc = SampledStarc(features, discount=0.95, bootstrap=10)
    plain = starc.fit(batch, {"a": rewards[0], "b": rewards[2]})
    for scale in (1e-300, 1e-160, 1e160, 1e300):
        found = starc.fit(batch, {"a": scale * rewards[0], "b": rewards[2] / scale})
        np.testing.assert_allclose(found.values, plain.values, atol=1e-9, err_msg=f"{scale}")


@pytest.mark.parametrize("features", ["quadratic", FourierFeatures(16), NetworkFeatures(width=16, steps=100)])
def test_a_pair_does_not_depend_on_the_other_rewards(features: Any) -> None:
    """Constants, noise and huge rewards beside a pair move its distance by no more than its interval says."""
    batch, rewards = analytic_lqr(40, 5)
    rng = np.random.default_rng(0)
    count = len(batch.rewards)
    starc = SampledStarc(features, discount=0.95, bootstrap=40)
    pair = {name: rewards[name] for name in ("base", "other")}
    alone = starc.fit(batch, pair)
    assert alone.ci is not None
    for others in (
        {"constant": np.full(count, 3.0)},
        {"zero": np.zeros(count), "noise": rng.normal(size=count)},
        {"huge": 1e200 * rng.normal(size=count), "third": rewards["equivalent"]},
    ):
        with_them = starc.fit(batch, {**others, **pair})
        i, j = with_them.names.index("base"), with_them.names.index("other")
        assert alone.ci[0, 1, 0] <= with_them.values[i, j] <= alone.ci[0, 1, 1]
        if not isinstance(features, NetworkFeatures):
            assert with_them.values[i, j] == pytest.approx(alone.values[0, 1], abs=1e-7)


def test_features_that_cannot_express_a_reward_are_seen() -> None:
    """Tiles and straight lines on quadratic rewards: no interval misses the truth without a word, and a richer choice has a number."""
    batch, rewards = analytic_lqr(50, 7)
    exact = np.array([[0, 0, np.sqrt(2)], [0, 0, np.sqrt(2)], [np.sqrt(2), np.sqrt(2), 0]])
    for features in ("linear", "tile", CellFeatures(2), CellFeatures(4), CellFeatures(16)):
        matrix = SampledStarc(features, discount=0.95, bootstrap=20).fit(batch, rewards)  # type: ignore[arg-type]
        assert matrix.ci is not None
        wrong = (exact < matrix.ci[..., 0] - 1e-6) | (exact > matrix.ci[..., 1] + 1e-6)
        assert not wrong.any(), (features, matrix.values, matrix.ci)
        fine = isinstance(features, CellFeatures) and features.bins == 16
        assert matrix.status(1) == ("" if fine else "features too poor")
        assert any("richer features" in note for note in matrix.notes)
    auto = SampledStarc("auto", discount=0.95, bootstrap=0).fit(batch, rewards)
    np.testing.assert_allclose(auto.values, exact, atol=0.1)


def taxi(rows: int, seed: int = 0) -> tuple[Batch, TabularMDP, dict[str, Array], Array]:
    """A small deterministic process whose states are numbers in no order, their transitions, rewards `[S, A, S]` and visits."""
    rng = np.random.default_rng(seed)
    states, actions = 40, 3
    following = rng.integers(states, size=(states, actions))
    tau = np.eye(states)[following]
    mdp = TabularMDP(tau, 0.9)
    a, b = rng.normal(size=(2, states, actions, states))
    s, state = np.zeros(rows + 1, int), 0
    act = rng.integers(actions, size=rows)
    for t in range(rows):
        s[t] = state
        state = int(following[state, act[t]]) if t % 50 < 49 else int(rng.integers(states))
        s[t + 1] = state
    after = following[s[:-1], act]
    visits = np.zeros((states, actions))
    np.add.at(visits, (s[:-1], act), 1)
    ends = torch.from_numpy(np.arange(rows) % 50 == 49)
    batch = Batch(
        observations=torch.from_numpy(s[:-1]),
        actions=torch.from_numpy(act),
        rewards=torch.zeros(rows),
        next_observations=torch.from_numpy(after),
        terminations=torch.zeros(rows, dtype=torch.bool),
        truncations=ends,
    )
    return batch, mdp, {"a": a, "b": b, "mix": a + b}, visits


@pytest.mark.parametrize("kind", ["integers", "one column", "floats", "one-hot"])
def test_states_that_are_numbers_are_categories(kind: str) -> None:
    batch, mdp, rewards, visits = taxi(6000)
    change: Any = {
        "integers": lambda x: x,
        "one column": lambda x: x[:, None],
        "floats": lambda x: x.double()[:, None],
        "one-hot": lambda x: torch.eye(40)[x],
    }[kind]
    shown = replace(batch, observations=change(batch.observations), next_observations=change(batch.next_observations))
    s, a, z = (x.numpy() for x in (batch.observations, batch.actions, batch.next_observations))
    values = {name: reward[s, a, z] for name, reward in rewards.items()}
    exact = starc_matrix(rewards, mdp, weights=visits).values
    found = SampledStarc(discount=0.9, bootstrap=20).fit(shown, values)
    np.testing.assert_allclose(found.values, exact, atol=0.05)
    assert "indicator per state (40)" in found.diagnostics["features"]
    if kind == "integers":
        as_numbers = SampledStarc("linear", discount=0.9, bootstrap=20).fit(shown, values)
        assert any("whole numbers" in note for note in as_numbers.notes)


def test_many_states_are_counted() -> None:
    """300 states and 4 actions: no feature is laid out, and the sums stay small."""
    rng = np.random.default_rng(0)
    s, a = rng.integers(300, size=20_000), rng.integers(4, size=20_000)
    z = (s * 7 + a) % 300
    batch = Batch(
        observations=torch.from_numpy(s),
        actions=torch.from_numpy(a),
        rewards=torch.zeros(len(s)),
        next_observations=torch.from_numpy(z),
        terminations=torch.zeros(len(s), dtype=torch.bool),
        truncations=torch.from_numpy(np.arange(len(s)) % 100 == 99),
    )
    table = rng.normal(size=(2, 300, 4))
    found = SampledStarc(discount=0.5, bootstrap=2).fit(batch, {"a": table[0][s, a], "b": table[1][s, a]})
    assert found.diagnostics["state_features"] == 300
    assert abs(found.values[0, 1] - np.sqrt(2)) < 0.1


def test_few_episodes_are_said() -> None:
    batch, rewards = analytic_lqr(8, 0)
    found = SampledStarc("quadratic", discount=0.95, bootstrap=20).fit(batch, rewards)
    assert any("effective episodes" in note for note in found.notes)
    many = SampledStarc("quadratic", discount=0.95, bootstrap=20).fit(analytic_lqr(40, 0)[0], rewards)
    assert not any("effective episodes" in note for note in many.notes)
