"""What says of every step whether it ended an episode."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit2.errors import DatasetError


def as_flags(values: Any, name: str) -> NDArray[np.bool_]:
    """`values`, booleans or numbers that are all 0 or 1, as booleans of the same shape.

    A number between, or one that is not a number, is a probability, a mask or a mistake, and which one the data do not say.

    Raises:
        DatasetError: anything else is among them; the message shows the first.
    """
    array = np.asarray(values)
    if array.dtype.kind == "b":
        return array.astype(np.bool_, copy=False)
    if array.dtype.kind not in "iuf":
        raise DatasetError(f"{name} must be true or false (1 or 0), not {array.dtype}")
    odd = np.flatnonzero((array != 0) & (array != 1))
    if len(odd):
        raise DatasetError(f"{name} must be true or false (1 or 0), not {array.flat[odd[0]]:g} (entry {odd[0]})")
    flags: NDArray[np.bool_] = array == 1
    return flags
