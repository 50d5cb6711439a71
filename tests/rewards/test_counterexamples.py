"""Where EPIC, DARD and other shaping-only forms fail, and the canonicalisations do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlkit2.rewards import TabularMDP, canonicalize, optimal_policy, regret, starc_distance, worst_case_regret
from tests.rewards.vectors import load

KINDS: dict[str, dict[str, Any]] = {
    "None": {"canonicalization": "none"},
    "EPIC": {"canonicalization": "epic"},
    "DARD": {"canonicalization": "dard"},
    "MinimalPotential_2": {"canonicalization": "minimal_potential"},
    "VALPotential": {"canonicalization": "val_potential"},
    "VAL": {"canonicalization": "val"},
    "Minimal_2": {"canonicalization": "minimal"},
}


@pytest.mark.parametrize("example", ["hand", "gen"])
def test_unsound_and_incomplete(example: str) -> None:
    file = load("starc_counterexamples")
    mdp = TabularMDP(file[f"{example}_tau"], float(file["gamma"]))
    r, z = file[f"{example}_r"], file[f"{example}_z"]
    for m, factor in enumerate(file["M"]):
        opposite, equivalent = (r + factor * z, -r + factor * z), (r, r + factor * z)
        assert worst_case_regret(*opposite, mdp) == pytest.approx(1, abs=1e-9)
        assert worst_case_regret(*equivalent, mdp) == pytest.approx(0, abs=1e-9)
        for c, name in enumerate(file["canon_names"]):
            for q, p in enumerate(file["p_names"]):
                choices = KINDS[str(name)] | {"norm": f"l{p}".replace("lweighted_", "weighted_l")}
                choices["distance"] = choices["norm"]
                for pair, key in ((opposite, "unsound"), (equivalent, "incomplete")):
                    expected = file[f"{example}_{key}"][m, c, q]
                    found = starc_distance(*pair, mdp, **choices)
                    assert found == pytest.approx(expected, abs=1e-8), (name, p, factor, key)
        assert starc_distance(*opposite, mdp) == pytest.approx(2, abs=1e-9)
        assert starc_distance(*equivalent, mdp) == pytest.approx(0, abs=1e-9)


def test_the_numbers_in_print() -> None:
    """d(r + M z, -r + M z) and d(r, r + M z) at M = 0, 1, 10, 100, 1000, four digits."""
    file = load("starc_counterexamples")
    mdp, r, z = TabularMDP(file["hand_tau"], 0.9), file["hand_r"], file["hand_z"]
    for kind, unsound, incomplete in (
        ("epic", (2, 1.699, 0.201, 0.0200, 0.0020), (0, 0.322, 0.683, 0.759, 0.767)),
        ("dard", (2, 1.414, 0.173, 0.0173, 0.0017), (0, 0.518, 0.928, 0.993, 0.999)),
    ):
        for factor, far, near in zip((0, 1, 10, 100, 1000), unsound, incomplete, strict=True):
            same: dict[str, Any] = {"canonicalization": kind}
            assert starc_distance(r + factor * z, -r + factor * z, mdp, **same) == pytest.approx(far, abs=6e-4)
            assert starc_distance(r, r + factor * z, mdp, **same) == pytest.approx(near, abs=6e-4)


def test_dard_changes_the_task() -> None:
    file = load("starc_counterexamples")
    mdp = TabularMDP(file["gen_tau"], float(file["gamma"]))
    form = canonicalize(file["gen_r"], mdp, "dard")
    np.testing.assert_allclose(form, file["gen_dard"], rtol=1e-9, atol=1e-12)
    worst = worst_case_regret(file["gen_r"], form, mdp)
    assert worst == pytest.approx(float(file["gen_worst_regret_R_vs_dardR"]), abs=1e-7)
    mdp = TabularMDP(file["dardopt_tau"], 0.9)
    reward = file["dardopt_R"]
    form = canonicalize(reward, mdp, "dard")
    assert optimal_policy(reward, mdp).tolist() == file["dardopt_pi_R"].tolist()
    assert optimal_policy(form, mdp).tolist() == file["dardopt_pi_dard"].tolist()
    assert regret(reward, form, mdp) == pytest.approx(float(file["dardopt_regret"]), abs=1e-9)
    assert regret(reward, form, mdp) > 0.9
