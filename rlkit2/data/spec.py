"""What a dataset is about: its spaces, environments, identity and reference scores."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import Error as GymnasiumError
from minari.serialization import deserialize_space, serialize_space

from rlkit2.data.records import FrameLayout, record_dtype
from rlkit2.data.spaces import SpaceFlattener, action_layout, flattener, stacked_space
from rlkit2.errors import CorruptDatasetError, DatasetError, UnsupportedSpaceError, first_line


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """Spaces, environment specifications and identity of a dataset.

    `observation_space` and `action_space` are those of the stored data. `content_hash` is the SHA-256 of the aligned records, so two machines agree
    on it. `ref_min_score` and `ref_max_score` are the returns of a random and an expert policy in the evaluation environment, None where
    unknown. `observation_keys` are the Dict keys used, in order. `frame_stack`: how many observations of the environment one of
    `observation_space` holds. `notes` counts what the loader had to handle.
    """

    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    env_spec: EnvSpec | None = None
    eval_env_spec: EnvSpec | None = None
    id: str = "arrays"
    content_hash: str = ""
    ref_min_score: float | None = None
    ref_max_score: float | None = None
    observation_keys: tuple[str, ...] | None = None
    frame_stack: int = 1
    notes: dict[str, int] = field(default_factory=dict)

    @cached_property
    def flattener(self) -> SpaceFlattener:
        """Turns raw observations of this space into rows, for datasets and environments alike."""
        return flattener(self.observation_space, self.observation_keys)

    @property
    def observation_ranges(self) -> dict[str, tuple[int, int]]:
        """Columns `(start, stop)` of every key of a Dict or Tuple observation space."""
        return self.flattener.ranges

    @property
    def observation_size(self) -> int:
        """Columns of a flattened observation."""
        return self.flattener.size

    @property
    def images(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """First column and shape of every image in a flattened observation: boxes of bytes with two or more dimensions."""
        return tuple(
            (leaf.start, tuple(leaf.space.shape))
            for leaf in self.flattener.leaves
            if isinstance(leaf.space, spaces.Box) and leaf.space.dtype == np.uint8 and len(leaf.space.shape) > 1
        )

    @property
    def layout(self) -> FrameLayout | None:
        """How observations are kept as frames; None for those without images, which the records hold."""
        flat = self.flattener
        images = tuple((start, start + math.prod(shape)) for start, shape in self.images)
        return FrameLayout(flat.shape, flat.dtype, images) if images else None

    @property
    def record_dtype(self) -> np.dtype[Any]:
        """The layout of one record."""
        flat, actions = self.flattener, action_layout(self.action_space)
        if self.layout is not None:  # numbers of frames in place of observations
            return record_dtype((), np.int64, actions.shape, actions.dtype)
        return record_dtype(flat.shape, flat.dtype, actions.shape, actions.dtype)

    def stacked(self, count: int) -> DatasetSpec:
        """The specification of observations that are the last `count` ones, oldest first.

        Raises `UnsupportedSpaceError` for spaces that cannot be stacked, `DatasetError` for a stack of stacks.
        """
        if count == 1:
            return self
        if self.frame_stack > 1:
            raise DatasetError(f"the observations of {self.id} are stacks of {self.frame_stack} already")
        return replace(self, observation_space=stacked_space(self.observation_space, count), frame_stack=count)

    def refuse_images(self, what: str) -> None:
        """Raise `UnsupportedSpaceError` where observations hold images, which `what` does not take."""
        if self.images:
            shapes = ", ".join(" x ".join(map(str, shape)) for _, shape in self.images)
            raise UnsupportedSpaceError(
                f"the observations of {self.id} hold images ({shapes}), which {what} does not take; a dictionary's other entries can be chosen "
                "with observation_keys"
            )

    @property
    def discrete(self) -> bool:
        """Whether actions are one categorical choice."""
        return isinstance(self.action_space, spaces.Discrete)

    @property
    def action_kind(self) -> str:
        """`discrete` (one choice), `multidiscrete` (several at once) or `continuous`."""
        if self.discrete:
            return "discrete"
        return "continuous" if action_layout(self.action_space).choices is None else "multidiscrete"

    @property
    def action_size(self) -> int:
        """Number of choices of a Discrete action space, else columns of an action."""
        if isinstance(self.action_space, spaces.Discrete):
            return int(self.action_space.n)
        return action_layout(self.action_space).shape[0]

    def to_json(self) -> str:
        """The specification as JSON text; `from_json` reverses it."""
        return json.dumps(
            {
                "observation_space": serialize_space(self.observation_space),
                "action_space": serialize_space(self.action_space),
                "env_spec": env_spec_text(self.env_spec),
                "eval_env_spec": env_spec_text(self.eval_env_spec),
                "id": self.id,
                "content_hash": self.content_hash,
                "ref_min_score": self.ref_min_score,
                "ref_max_score": self.ref_max_score,
                "observation_keys": self.observation_keys,
                **({"frame_stack": self.frame_stack} if self.frame_stack > 1 else {}),
                "notes": self.notes,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> DatasetSpec:
        """Read what `to_json` wrote; an environment specification that cannot be read here becomes None. Raises `CorruptDatasetError`."""
        try:
            values = json.loads(text)
            keys = values["observation_keys"]
            spec = cls(
                observation_space=deserialize_space(values["observation_space"]),
                action_space=deserialize_space(values["action_space"]),
                env_spec=read_env_spec(values["env_spec"]),
                eval_env_spec=read_env_spec(values["eval_env_spec"]),
                id=_text(values["id"]),
                content_hash=_text(values["content_hash"]),
                ref_min_score=_number(values["ref_min_score"]),
                ref_max_score=_number(values["ref_max_score"]),
                observation_keys=None if keys is None else tuple(map(_text, keys)),
                frame_stack=_count(values.get("frame_stack", 1)),
                notes=dict(values["notes"]),
            )
            spec.flattener  # noqa: B018 - spaces that cannot be flattened are damage here
            return spec
        except DatasetError:
            raise
        except Exception as error:  # Minari's and Gymnasium's readers raise anything
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise CorruptDatasetError(f"the specification of a dataset is damaged ({reason})") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise TypeError(f"{value!r} is not a positive whole number")
    return value


def _number(value: Any) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise TypeError(f"{value!r} is not a number")
    return None if value is None else float(value)


def env_spec_text(spec: EnvSpec | None) -> str | None:
    """Gymnasium's JSON of an environment specification; None for one that has no JSON (a callable entry point)."""
    if spec is None:
        return None
    try:
        return spec.to_json()
    except (ValueError, TypeError):
        return None


def read_env_spec(text: str | None) -> EnvSpec | None:
    """The specification in `text`, or None where it cannot be read here (fields of other Gymnasium versions are dropped).

    Reading imports nothing; building goes through `known_environments.registered_spec`.
    """
    if not text:
        return None
    try:
        known = {f.name for f in fields(EnvSpec) if f.init}
        values = {key: value for key, value in json.loads(text).items() if key in known}
        spec = EnvSpec.from_json(json.dumps({"additional_wrappers": [], **values}))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, GymnasiumError):
        return None
    return spec if _well_formed(spec) else None


def _well_formed(spec: EnvSpec) -> bool:
    """Whether every field has its type: a file may hold anything."""
    steps = spec.max_episode_steps
    return (
        isinstance(spec.id, str)
        and all(entry is None or isinstance(entry, str) for entry in (spec.entry_point, spec.vector_entry_point))
        and isinstance(spec.kwargs, dict)
        and (steps is None or (isinstance(steps, int) and not isinstance(steps, bool) and steps > 0))
        and all(isinstance(wrapper.kwargs, dict | None) for wrapper in spec.additional_wrappers)
    )
