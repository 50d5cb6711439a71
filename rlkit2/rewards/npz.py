"""Decision processes and rewards in `.npz` files."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from rlkit2.errors import RewardError, first_line
from rlkit2.rewards.mdp import TabularMDP

_NAMES = {
    "transitions": ("transitions", "tau"),
    "discount": ("discount", "gamma"),
    "initial_distribution": ("initial_distribution", "mu0"),
    "rewards": ("rewards", "R"),
    "names": ("names", "reward_names"),
}


def read_tabular(path: str | os.PathLike[str], discount: float | None = None) -> tuple[TabularMDP, dict[str, Any]]:
    """A process and its rewards by name from an `.npz` file (read without pickle).

    Arrays: `transitions [S, A, S]`; `discount`, unless given here; `initial_distribution [S]`, uniform where missing; `rewards [K, S, A, S]`
    or `[K, S, A]` with `names [K]` where there are several, else every other array `[S, A, S]`, `[S, A]` or `[S]` is a reward called by
    its own name. `tau`, `gamma`, `mu0`, `R` and `reward_names` are understood too.

    Raises `RewardError` for files that cannot be read or lack arrays, and as `TabularMDP` does.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise RewardError(f"{os.fspath(path)} is not an .npz file of plain arrays ({first_line(error)})") from error

    def pick(what: str) -> Any:
        return next((arrays[key] for key in _NAMES[what] if key in arrays), None)

    transitions = pick("transitions")
    discount = pick("discount") if discount is None else discount
    for value, what in ((transitions, "transitions"), (discount, "discount")):
        if value is None:
            raise RewardError(f"{os.fspath(path)} has no array {what!r}; it has {', '.join(arrays) or 'none'}")
    mdp = TabularMDP(transitions, float(np.asarray(discount)), pick("initial_distribution"))
    rewards = pick("rewards")
    if rewards is not None:
        names = pick("names")
        labels = [f"reward_{k}" for k in range(len(rewards))] if names is None else [str(name) for name in names]
        if len(labels) != len(rewards) or len(set(labels)) != len(labels):
            raise RewardError(f"{os.fspath(path)} has {len(rewards)} rewards and names {labels}; give each its own")
        return mdp, dict(zip(labels, rewards, strict=True))
    shape = mdp.num_states, mdp.num_actions, mdp.num_states
    used = {key for keys in _NAMES.values() for key in keys}
    found = {
        key: value for key, value in arrays.items() if key not in used and value.shape in (shape, shape[:2], shape[:1])
    }
    if not found:
        raise RewardError(
            f"{os.fspath(path)} has no rewards; save them as 'rewards' [K, S, A, S] or by their own names"
        )
    return mdp, found
