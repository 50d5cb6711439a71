"""The reference vectors of the reward distances and their names in this library."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from rlkit2.rewards import TabularMDP
from tests.reference import ROOT

TABULAR = sorted(path.stem for path in ROOT.glob("starc_a*.npz"))
NORMS = {
    "1": "l1",
    "2": "l2",
    "inf": "linf",
    "weighted_1": "weighted_l1",
    "weighted_2": "weighted_l2",
    "weighted_inf": "weighted_linf",
    "0": "none",
}
# name in the files -> choices of canonicalisation; the minimal forms minimise the norm they are measured in
FORMS: dict[str, dict[str, Any]] = {
    "None": {"canonicalization": "none"},
    "EPIC": {"canonicalization": "epic"},
    "DARD": {"canonicalization": "dard"},
    "VALPotential": {"canonicalization": "val_potential"},
    "VAL": {"canonicalization": "val"},
    "VAL_alt": {"canonicalization": "val"},
    "MinimalPotential": {"canonicalization": "minimal_potential"},
    "Minimal": {"canonicalization": "minimal"},
}


@cache
def load(name: str) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of one file."""
    with np.load(ROOT / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@cache
def process(name: str) -> TabularMDP:
    """The decision process of a tabular file."""
    arrays = load(name)
    return TabularMDP(arrays["tau"], float(arrays["gamma"]), arrays["mu0"])
