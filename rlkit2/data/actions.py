"""Whether actions can be learnt as they are: inside their space."""

from __future__ import annotations

import numpy as np

from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.spaces import action_bounds, outside
from rlkit2.errors import DatasetError

CHUNK = 1 << 18


def check_actions(dataset: TransitionDataset) -> None:
    """Raise `DatasetError` where an action lies outside the dataset's action space by more than rounding; NaN is left to the audit."""
    space = dataset.spec.action_space
    low, high = action_bounds(space)
    if not (np.isfinite(low) | np.isfinite(high)).any():
        return
    for start in range(0, len(dataset), CHUNK):
        block = dataset.actions[start : start + CHUNK].cpu().numpy()
        bad = outside(block.reshape(len(block), -1), low, high)
        if bad.any():
            row, column = np.argwhere(bad)[0].tolist()
            value = block.reshape(len(block), -1)[row, column]
            raise DatasetError(
                f"{dataset.spec.id}: action value {value:g} in row {start + row}, column {column} lies outside its space "
                f"{' '.join(str(space).split())}; load the data with action_space=, or import them with --action-space"
            )
