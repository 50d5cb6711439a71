"""Labelled segments that are stored as arrays: the buffers of CPL and IPL, and the batches of D4RL preference code.

| layout | arrays |
| --- | --- |
| pairs (IPL, early CPL) | `obs_1, obs_2 [P, H, obs]`, `action_1, action_2 [P, H, act]`, `label [P]`, perhaps `reward_1, reward_2` |
| stacked (CPL) | `obs [2P, H, obs]`, `action [2P, H, act]`, perhaps `reward`, and a score per segment `[2P]`: i is compared with P + i |
| batch (Preference Transformer and its descendants) | `observations, observations_2`, `actions, actions_2`, `labels [P, 2]` |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlkit2.data.dataset import TransitionDataset, dataset_from_arrays
from rlkit2.data.preferences import PreferenceDataset
from rlkit2.data.sources.npz import open_npz
from rlkit2.errors import ConfigError, DatasetNotFoundError

Array = NDArray[Any]
_PAIRS = ({"obs": "obs_1", "action": "action_1", "reward": "reward_1"}, {"obs": "obs_2", "action": "action_2", "reward": "reward_2"})  # fmt: skip
_BATCH = (
    {"obs": "observations", "action": "actions", "reward": "rewards"},
    {"obs": "observations_2", "action": "actions_2", "reward": "rewards_2"},
)
_STACKED = {"obs": "obs", "action": "action", "reward": "reward"}


@dataclass(frozen=True)
class SegmentArrays:
    """P labelled pairs of segments of H steps.

    Attributes:
        observations, actions: of the first and the second segments, `[P, H, ...]` each.
        rewards: the same `[P, H]`, where the file has them.
        label_mass: `[P]`, the probability that the second is preferred.
        name: of the file.
    """

    observations: tuple[Array, Array]
    actions: tuple[Array, Array]
    rewards: tuple[Array, Array] | None
    label_mass: Array
    name: str

    @classmethod
    def read(cls, path: str | Path, *, label_key: str | None = None) -> SegmentArrays:
        """Read an `.npz` file in one of the layouts; nothing in it is executed.

        Args:
            path: the file.
            label_key: the array of labels or of scores per segment; needed where the stacked layout has several scores.

        Raises:
            DatasetNotFoundError: no such file.
            CorruptDatasetError: it cannot be read.
            ConfigError: none of the layouts, arrays whose shapes do not fit, or a label that has no one meaning.
        """
        path = Path(path)
        if not path.exists():
            raise DatasetNotFoundError(f"{path} does not exist; give an .npz file of labelled segments")
        with open_npz(path) as file:
            arrays = {name: file[name] for name in file.files}
        read = {name for names in (*_PAIRS, *_BATCH, _STACKED) for name in names.values()} | {
            "label",
            "labels",
            label_key,
        }
        odd = [
            name for name in arrays if name in read and not (arrays[name].ndim and arrays[name].dtype.kind in "fiub")
        ]
        if odd:
            raise ConfigError(f"{path}: {odd[0]} is not an array of numbers")
        sides = next((names for names in (_PAIRS, _BATCH) if names[1]["obs"] in arrays), None)
        if sides is not None:
            found = [{part: arrays[name] for part, name in names.items() if name in arrays} for names in sides]
            mass = _labels(path, arrays, label_key or ("label" if "label" in arrays else "labels"))
        elif "obs" in arrays:
            whole = {part: arrays[name] for part, name in _STACKED.items() if name in arrays}
            count = len(whole["obs"]) // 2
            found = [{part: array[half] for part, array in whole.items()} for half in (slice(count), slice(count, 2 * count))]  # fmt: skip
            mass = _compared(path, arrays, label_key, len(whole["obs"]))
        else:
            raise ConfigError(
                f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}; labelled segments are obs_1, obs_2, action_1, action_2, label, or obs, "
                "action and a score, or observations, observations_2, actions, actions_2, labels"
            )
        return cls._checked(path, found, mass)

    @classmethod
    def _checked(cls, path: Path, sides: list[dict[str, Array]], mass: Array) -> SegmentArrays:
        for part in ("obs", "action"):
            if any(part not in side for side in sides):
                raise ConfigError(f"{path} has no {part} arrays of both segments")
            shapes = [side[part].shape for side in sides]
            if shapes[0] != shapes[1] or len(shapes[0]) < 2 or shapes[0][:2] != sides[0]["obs"].shape[:2]:
                raise ConfigError(
                    f"{path}: {part} of the two segments have shapes {shapes[0]} and {shapes[1]}; expected [pairs, steps, ...] alike"
                )
            if any(not np.isfinite(side[part]).all() for side in sides if side[part].dtype.kind == "f"):
                raise ConfigError(f"{path}: {part} holds NaN or infinite values")
        pairs, steps = sides[0]["obs"].shape[:2]
        if len(mass) != pairs:
            raise ConfigError(f"{path} has {len(mass)} labels for {pairs} pairs of segments")
        given = [side.get("reward") for side in sides]
        rewards = None
        if given[0] is not None and given[1] is not None and given[0].size == given[1].size == pairs * steps:
            rewards = given[0].reshape(pairs, steps), given[1].reshape(pairs, steps)
        return cls(
            (sides[0]["obs"], sides[1]["obs"]), (sides[0]["action"], sides[1]["action"]), rewards, mass, path.name
        )

    @property
    def source(self) -> dict[str, str]:
        """Where the labels are from."""
        return {"people": self.name}

    def find(self, dataset: TransitionDataset) -> PreferenceDataset:
        """The labels as segments of the dataset that the arrays were cut from: every segment is looked up by its values.

        Raises:
            ConfigError: a segment is not in the dataset; its pair is named.
        """
        columns = dataset.observations.shape[1]
        stored = dataset.observations.numpy().astype(np.float32), dataset.actions.numpy()
        first_rows: dict[bytes, list[int]] = {}
        for row, values in enumerate(stored[0]):
            first_rows.setdefault(values.tobytes(), []).append(row)
        episode = np.repeat(np.arange(dataset.num_episodes), dataset.episode_lengths.numpy())
        starts = []
        for side, word in enumerate(("first", "second")):
            observations = self.observations[side].astype(np.float32)
            observations = observations.reshape(*observations.shape[:2], -1)
            if observations.shape[2] != columns:
                raise ConfigError(
                    f"{self.name} has observations of {observations.shape[2]} numbers but {dataset.spec.id} of {columns}: it is another dataset"
                )
            actions = self.actions[side].reshape(*observations.shape[:2], *stored[1].shape[1:]).astype(stored[1].dtype)
            steps, found = observations.shape[1], []
            for pair in range(len(observations)):
                rows = first_rows.get(observations[pair, 0].tobytes(), [])
                fits = (
                    row
                    for row in rows
                    if row + steps <= len(episode)
                    and episode[row] == episode[row + steps - 1]
                    and np.array_equal(stored[0][row : row + steps], observations[pair])
                    and np.array_equal(stored[1][row : row + steps], actions[pair])
                )
                start = next(fits, None)
                if start is None:
                    raise ConfigError(
                        f"the {word} segment of pair {pair} of {self.name} is not in {dataset.spec.id}: name the dataset it was cut from, or make a "
                        "dataset of the segments with --as-dataset"
                    )
                found.append(start)
            starts.append(torch.tensor(found))
        first, second = starts
        return PreferenceDataset.from_starts(dataset, first, second, self.label_mass, self.source, length=steps)

    def as_dataset(self) -> tuple[TransitionDataset, PreferenceDataset]:
        """A dataset of its own whose episodes are the segments, and the labels of these.

        What follows a segment's last step is not stored, so that step is left out: episodes have H - 1 steps and end truncated. Rewards are the
        file's, or 0 where it has none.

        Raises:
            ConfigError: segments of a single step.
        """
        pairs, steps = self.observations[0].shape[:2]
        if steps < 2:
            raise ConfigError(f"{self.name} has segments of one step, which show no transition")
        observations, actions = (np.concatenate(both) for both in (self.observations, self.actions))
        rewards = np.concatenate(self.rewards) if self.rewards is not None else np.zeros((2 * pairs, steps))
        truncations = np.zeros((2 * pairs, steps - 1), dtype=bool)
        truncations[:, -1] = True

        def flat(array: Array) -> Array:
            return array.reshape(2 * pairs * (steps - 1), *array.shape[2:])

        dataset = dataset_from_arrays(
            flat(observations[:, :-1]),
            flat(actions[:, :-1]),
            flat(rewards[:, :-1]),
            flat(observations[:, 1:]),
            np.zeros(truncations.size, dtype=bool),
            flat(truncations),
        )
        starts = torch.arange(2 * pairs) * (steps - 1)
        labels = PreferenceDataset.from_starts(
            dataset, starts[:pairs], starts[pairs:], self.label_mass, self.source, length=steps - 1
        )
        return dataset, labels


def _labels(path: Path, arrays: Mapping[str, Array], key: str) -> Array:
    """`[P]` probabilities that the second segment is preferred."""
    if key not in arrays:
        raise ConfigError(f"{path} has no array {key!r} of labels; it has {', '.join(sorted(arrays))}")
    label = arrays[key].astype(np.float64)
    if label.ndim == 2 and label.shape[1] == 2:  # one column a segment
        if not np.allclose(label.sum(1), 1):
            raise ConfigError(f"{path}: the two columns of {key} do not add up to 1 in every row")
        label = label[:, 1]
    if label.size != len(label):
        raise ConfigError(f"{path}: {key} has shape {arrays[key].shape}; expected one label a pair, or two columns")
    label = label.reshape(-1)
    odd = np.flatnonzero(~((label >= 0) & (label <= 1)))
    if len(odd):
        hint = " (some files mean equal by it, others unanswered: leave such pairs out or write 0.5)" if label[odd[0]] == -1 else ""  # fmt: skip
        raise ConfigError(f"{path}: label {label[odd[0]]:g} of pair {odd[0]} is not in [0, 1]{hint}")
    return label


def _compared(path: Path, arrays: Mapping[str, Array], key: str | None, segments: int) -> Array:
    """Labels from a score per segment: the higher one is preferred, equal ones are a tie."""
    scores = sorted(
        name
        for name, array in arrays.items()
        if array.shape == (segments,) and array.dtype.kind in "fiub" and name not in _STACKED.values()
    )
    if key is None and "label" in scores:
        key = "label"
    if key is None and len(scores) != 1:
        raise ConfigError(
            f"{path} has {len(scores)} scores per segment ({', '.join(scores) or 'none'}); name the one to compare by with --label-key"
        )
    key = key or scores[0]
    if key not in scores or segments % 2:
        raise ConfigError(
            f"{path} has {segments} segments and the scores {', '.join(scores) or 'none'}; {key!r} must be one of them, of an even number of segments"
        )
    values = arrays[key].astype(np.float64)
    if not np.isfinite(values).all():
        raise ConfigError(f"{path}: {key} holds NaN or infinite values")
    first, second = values[: segments // 2], values[segments // 2 :]
    return np.asarray((first < second) + 0.5 * (first == second))
