"""Every key of the tabular reference vectors: canonical forms, norms, distances, planning and regret."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlkit2.rewards import (
    canonicalize,
    dard_distance,
    epic_distance,
    minimal_norm,
    optimal_policy,
    policy_return,
    regret,
    standardize,
    starc_distance,
    starc_matrix,
    worst_case_regret,
)
from tests.rewards.vectors import FORMS, NORMS, TABULAR, load, process

PAIRS = list(zip(*np.triu_indices(7, 1), strict=True))
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
assert len(TABULAR) >= 5, "no reference vectors"
pytestmark = pytest.mark.parametrize("name", TABULAR)


def test_canonical_forms(name: str) -> None:
    file, mdp = load(name), process(name)
    rewards = file["R"]
    for ours, key, choices in (
        ("val", "x_VAL", {}),
        ("val", "x_VAL_alt", {"policy": file["pi_alt"]}),
        ("val_potential", "x_VALPotential", {}),
        ("epic", "a_EPIC", {}),
        ("dard", "a_DARD", {}),
        ("minimal", "x_Minimal_2", {"p": 2}),
        ("minimal", "x_Minimal_w2", {"p": "weighted_2"}),
        ("minimal_potential", "x_MinimalPotential_2", {"p": 2}),
        ("minimal_potential", "x_MinimalPotential_w2", {"p": "weighted_2"}),
    ):
        together = canonicalize(rewards, mdp, ours, **choices)
        one_by_one = np.stack([canonicalize(reward, mdp, ours, **choices) for reward in rewards])
        scale = np.abs(rewards).max((1, 2, 3)).reshape(-1, *[1] * (together.ndim - 1))
        np.testing.assert_allclose(together / scale, file[key] / scale, **TIGHT, err_msg=key)
        np.testing.assert_allclose(one_by_one, together, rtol=1e-12, atol=1e-12 * scale.max(), err_msg=key)
    np.testing.assert_allclose(canonicalize(rewards, mdp), file["a_VAL"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(canonicalize(rewards, mdp, "val_potential"), file["a_VALPotential"], rtol=0, atol=1e-5)


def test_values(name: str) -> None:
    file, mdp = load(name), process(name)
    for key, policy in (("x_V", None), ("x_V_alt", file["pi_alt"])):
        values = mdp.values(mdp.expected_reward(file["R"]), mdp.policy(policy)).numpy()
        np.testing.assert_allclose(values, file[key], rtol=1e-9, atol=1e-9 * np.abs(file[key]).max())


@pytest.mark.parametrize("p", ["2", "w2"])
def test_the_published_minimisers_come_near(name: str, p: str) -> None:
    file = load(name)
    published = file[f"a_MinimalPotential_{p}"]
    ours = canonicalize(file["R"], process(name), "minimal_potential", p=2 if p == "2" else "weighted_2")
    for form, reference in zip(ours, published, strict=True):
        if np.isfinite(reference).all():
            weight = 1.0 if p == "2" else file["tau"]
            error = np.sqrt((weight * (form - reference) ** 2).sum() / (weight * reference**2).sum())
            assert error < (5e-3 if p == "2" else 6e-3)


def test_minimal_objectives(name: str) -> None:
    file, mdp = load(name), process(name)
    for row, p in enumerate(file["minimal_p_names"]):
        ours: Any = int(p) if p in ("1", "2") else str(p)
        for kind, key in (("minimal", "x_Minimal_obj"), ("minimal_potential", "x_MinimalPotential_obj")):
            found = [minimal_norm(reward, mdp, p=ours, kind=kind) for reward in file["R"]]  # type: ignore[arg-type]
            scale = np.abs(file["R"]).max()
            np.testing.assert_allclose(found, file[key][row], rtol=1e-8, atol=1e-8 * scale, err_msg=f"{key} {p}")


def _choices(canon: str, norm: str, file: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any] | None:
    choices = dict(FORMS[canon], legacy=True)
    if canon == "VAL_alt":
        choices["policy"] = file["pi_alt"]
    if canon.startswith("Minimal"):
        allowed = ("1", "2", "weighted_1", "weighted_2") if canon == "MinimalPotential" else ("2", "weighted_2")
        if norm not in allowed:
            return None
        choices["p"] = int(norm) if norm.isdigit() else norm
    return choices


def test_norms_and_distances(name: str) -> None:
    file, mdp = load(name), process(name)
    trivial = file["x_trivial"]
    for c, canon in enumerate(file["canon_names_x"]):
        for n, norm in enumerate(file["norm_names"]):
            choices = _choices(canon, norm, file)
            if choices is None or (canon == "MinimalPotential" and norm in ("1", "weighted_1")):
                continue  # minimisers that need not be unique
            if not np.isfinite(file["x_norm"][c, n]).all():
                assert canon.startswith("Minimal")
                continue
            kind = {k: v for k, v in choices.items() if k in ("policy", "p")}
            forms = canonicalize(file["R"], mdp, choices["canonicalization"], **kind)
            sizes = [standardize(form, NORMS[norm], mdp=mdp, legacy=True)[1] for form in forms]  # type: ignore[arg-type]
            if norm != "0":
                scale = np.abs(file["x_norm"][c, n]).max()
                np.testing.assert_allclose(sizes, file["x_norm"][c, n], rtol=1e-9, atol=1e-9 * scale)
            # Where a weighted norm is 0 although the form is not, the files hold NaN or a quotient of rounding errors.
            magnitudes = np.abs(file["R"]).max((1, 2, 3))
            vanishing = (np.abs(sizes) <= 1e-9 * magnitudes) & (np.abs(forms).reshape(7, -1).max(1) > 1e-9 * magnitudes)
            for d, distance in enumerate(file["dist_names"]):
                matrix = starc_matrix(
                    file["R"],
                    mdp,
                    norm=NORMS[norm],
                    distance=NORMS[distance],
                    **choices,  # type: ignore[arg-type]
                )
                reference = file["x_dist"][c, n, d]
                found = np.array([matrix.values[pair] for pair in PAIRS])
                kept = np.array([not (vanishing[i] or vanishing[j]) for i, j in PAIRS])
                scale = max(1.0, np.abs(reference[kept]).max())
                np.testing.assert_allclose(
                    found[kept] / scale,
                    reference[kept] / scale,
                    rtol=1e-8,
                    atol=1e-9,
                    err_msg=f"{canon} {norm} {distance}",
                )
                np.testing.assert_array_equal(matrix.values, matrix.values.T)
            if canon == "VAL":
                np.testing.assert_array_equal(matrix.trivial, trivial)


def test_published_distances(name: str) -> None:
    file, mdp = load(name), process(name)
    kept = [k for k, pair in enumerate(PAIRS) if 5 not in pair]  # the released code does not guard trivial rewards
    for c, canon in enumerate(file["canon_names_a"]):
        if canon == "MinimalPotential":
            continue
        tolerance = 5e-5 if canon.startswith("VAL") else 1e-12
        for n, norm in enumerate(file["norm_names"]):
            for d, distance in enumerate(file["dist_names"]):
                matrix = starc_matrix(
                    file["R"],
                    mdp,
                    norm=NORMS[norm],  # type: ignore[arg-type]
                    distance=NORMS[distance],  # type: ignore[arg-type]
                    **_choices(canon, norm, file) or {},
                )
                found = np.array([matrix.values[PAIRS[k]] for k in kept])
                reference = file["a_dist"][c, n, d, kept]
                found = np.where(np.isnan(reference), np.nan, found)
                scale = max(1.0, np.nanmax(np.abs(reference)))
                np.testing.assert_allclose(found / scale, reference / scale, rtol=1e-9, atol=tolerance)


def test_single_distances_agree_with_the_matrix(name: str) -> None:
    file, mdp = load(name), process(name)
    matrix = starc_matrix(file["R"], mdp)
    for i, j in PAIRS:
        assert starc_distance(file["R"][i], file["R"][j], mdp) == pytest.approx(matrix.values[i, j], abs=1e-13)


def test_epic_dard_and_angles(name: str) -> None:
    file, mdp = load(name), process(name)
    for key, distance, coverage in (
        ("x_EPIC_pearson", epic_distance, "uniform"),
        ("x_EPIC_pearson_tau", epic_distance, "transition"),
        ("x_DARD_pearson_tau", dard_distance, "transition"),
    ):
        found = [[distance(a, b, mdp, coverage=coverage) for b in file["R"]] for a in file["R"]]
        found = np.where(
            np.isnan(file[key]), np.nan, found
        )  # trivial rewards have EPIC forms, the files leave them out
        np.testing.assert_allclose(found, file[key], rtol=1e-9, atol=2e-8, equal_nan=True, err_msg=key)
    angles = starc_matrix(file["R"], mdp, scale="angle", trivial="nan").values
    np.testing.assert_allclose(angles, file["x_VAL_angle"], rtol=1e-9, atol=2e-8, equal_nan=True)


def test_planning_and_regret(name: str) -> None:
    file, mdp = load(name), process(name)
    rewards, ranges = file["R"], file["x_J_opt"] - file["x_J_worst"]
    best = np.stack([optimal_policy(reward, mdp) for reward in rewards])
    worst = np.stack([optimal_policy(reward, mdp, minimize=True) for reward in rewards])
    scale = np.abs(file["x_J"]).max(1)
    for i, reward in enumerate(rewards):
        slack = 1e-9 * scale[i]
        assert policy_return(best[i], reward, mdp) == pytest.approx(file["x_J_opt"][i], rel=1e-9, abs=slack)
        assert policy_return(worst[i], reward, mdp) == pytest.approx(file["x_J_worst"][i], rel=1e-9, abs=slack)
        assert policy_return(np.full_like(file["pi_uniform"], 1 / mdp.num_actions), reward, mdp) == pytest.approx(
            file["x_J_uniform"][i], rel=1e-9, abs=slack
        )
        values = mdp.values(mdp.expected_reward(reward), mdp.policy(best[i])).numpy()
        np.testing.assert_allclose(values, file["x_V_opt"][i], rtol=1e-9, atol=1e-9 * np.abs(file["x_V_opt"][i]).max())
        for j in range(7):
            if file["x_trivial"][j]:
                continue
            same = np.array_equal(best[j], file["x_pi_opt"][j])
            assert same or j == 6 or file["x_trivial"][j]  # reward 6 can have several optimal policies
            if same:
                assert policy_return(best[j], reward, mdp) == pytest.approx(file["x_J"][i, j], rel=1e-9, abs=slack)
                expected = file["x_regret_opt"][i, j]
                assert regret(reward, rewards[j], mdp) == pytest.approx(
                    expected, rel=1e-9, abs=1e-9 + slack / max(ranges[i], 1e-12), nan_ok=True
                )


def test_worst_case_regret_and_range_distance(name: str) -> None:
    file, mdp = load(name), process(name)
    matrix = starc_matrix(file["R"], mdp, norm="range", distance="range", trivial="nan")
    np.testing.assert_allclose(matrix.values, file["x_range_dist"], rtol=1e-8, atol=1e-8, equal_nan=True)
    found = [[worst_case_regret(a, b, mdp) for b in file["R"]] for a in file["R"]]
    np.testing.assert_allclose(found, file["x_worst_regret"], rtol=1e-7, atol=1e-7, equal_nan=True)
    for i, j in PAIRS[:4]:
        value = worst_case_regret(file["R"][i], file["R"][j], mdp, method="lp")[0]
        assert value == pytest.approx(file["x_worst_regret"][i, j], abs=1e-7)
