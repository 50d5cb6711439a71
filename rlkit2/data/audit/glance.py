"""What training says about its data in one line: values that are no numbers, columns that never change, rewards far from all others."""

from __future__ import annotations

import numpy as np

from rlkit2.data.audit.scan import chunks, reward_outliers
from rlkit2.data.dataset import TransitionDataset


def glance(dataset: TransitionDataset) -> str | None:
    """One line about what is unusual in `dataset`, None where nothing is; images are not looked at."""
    missing, parts, bounds = 0, [], []
    for _, _, fields in chunks(dataset):
        parts.append(fields["rewards"])
        numbers = [
            values for name in ("observations", "actions", "rewards") if (values := fields[name]).dtype.kind == "f"
        ]
        missing += sum(int((~np.isfinite(values)).sum()) for values in numbers)
        if fields["observations"].dtype.kind == "f":
            rows = fields["observations"].reshape(len(parts[-1]), -1)
            bounds.append((np.fmin.reduce(rows, axis=0), np.fmax.reduce(rows, axis=0)))
    rewards = np.concatenate(parts)
    found = []
    if missing:
        found.append(f"{missing:,} values are NaN or infinite (--fill-missing fills observations)")
    low, high = (
        (np.fmin.reduce([part[0] for part in bounds]), np.fmax.reduce([part[1] for part in bounds]))
        if bounds
        else (0, 1)
    )
    constant = np.flatnonzero(low == high).tolist() if len(dataset) > 1 else []
    if constant:
        found.append(
            f"observation column{'s' * (len(constant) > 1)} {_listed(constant)} never change{'s' * (len(constant) == 1)}"
        )
    outliers = rewards[reward_outliers(rewards)]
    if len(outliers):
        largest = outliers[np.abs(outliers).argmax()]
        found.append(f"{len(outliers):,} rewards lie far from all others, up to {largest:g}")
    if not found:
        return None
    return f"{dataset.spec.id}: {'; '.join(found)}; see rlkit2 data check"


def _listed(columns: list[int], most: int = 5) -> str:
    return ", ".join(map(str, columns[:most])) + (", ..." if len(columns) > most else "")
