"""Recipes of datasets: TOML files that name the environment, the behaviours, the size, the seed and the reference policies."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec
from minari.dataset.minari_dataset import parse_dataset_id

from rlkit2.data.known_environments import check_arguments
from rlkit2.errors import ConfigError, EnvironmentUnavailableError, require
from rlkit2.toml import read_toml

# The module whose presence shows that an extra is installed, and whose import registers its environments.
EXTRA_MODULES = {"robotics": "gymnasium_robotics", "mujoco": "mujoco", "box2d": "Box2D"}


@dataclass(frozen=True)
class EnvironmentRecipe:
    """The environment: its Gymnasium id, arguments, time limit, and the extra of rlkit2 that it needs."""

    id: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    max_episode_steps: int | None = None
    extra: str | None = None


@dataclass(frozen=True)
class PolicyRecipe:
    """A behaviour policy: a name in `rlkit2.envs.behaviors.BEHAVIORS`, its options, and what is mixed into its actions."""

    policy: str
    options: dict[str, Any] = field(default_factory=dict)
    noise: float = 0.0  # standard deviation of Gaussian noise, in units of half the action range
    epsilon: float = 0.0  # probability of a uniform action


@dataclass(frozen=True)
class BehaviorRecipe(PolicyRecipe):
    """A share of the dataset: so many episodes of a policy."""

    episodes: int = 0
    max_steps: int | None = None  # cut episodes after that many steps, as truncated
    kwargs: dict[str, Any] = field(default_factory=dict)  # arguments of the environment for these episodes only


@dataclass(frozen=True)
class ReferenceRecipe:
    """How the scores of normalisation are measured: episodes of uniform actions and of an expert in the evaluation environment."""

    expert: PolicyRecipe
    episodes: int = 100
    seed: int = 0


@dataclass(frozen=True)
class DatasetRecipe:
    """A whole dataset. `evaluation` holds the arguments by which the evaluation environment differs."""

    id: str
    description: str
    seed: int
    environment: EnvironmentRecipe
    behaviors: tuple[BehaviorRecipe, ...]
    reference: ReferenceRecipe
    evaluation: dict[str, Any] = field(default_factory=dict)

    @property
    def episodes(self) -> int:
        """Episodes of the dataset."""
        return sum(behavior.episodes for behavior in self.behaviors)

    @property
    def digest(self) -> str:
        """SHA-256 of the content: two recipes with the same digest make the same dataset."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def spec(self, **kwargs: Any) -> EnvSpec:
        """The environment's spec, with further arguments.

        Raises:
            MissingExtraError: an optional dependency is missing.
            EnvironmentUnavailableError: Gymnasium knows no such id, or an argument may name a file or a class.
        """
        if self.environment.extra is not None:
            gymnasium.register_envs(require(EXTRA_MODULES[self.environment.extra], extra=self.environment.extra))
        try:
            spec = copy.deepcopy(gymnasium.spec(self.environment.id))
        except gymnasium.error.Error as error:
            raise EnvironmentUnavailableError(f"recipe {self.id}: environment.id: {error}") from error
        arguments = {**self.environment.kwargs, **kwargs}
        check_arguments(arguments, spec.kwargs, f"environment {spec.id} of recipe {self.id}")
        spec.kwargs = {**spec.kwargs, **arguments}
        if self.environment.max_episode_steps is not None:
            spec.max_episode_steps = self.environment.max_episode_steps
        return spec


class _Table:
    """A TOML table being read: checks types and ranges, and reports the first wrong field by its full name."""

    def __init__(self, values: Any, name: str, file: Path) -> None:
        self.name, self.file = name, file
        if not isinstance(values, dict):
            raise self.error("", f"must be a table, not {values!r}")
        self.values = values

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.file}: {'.'.join(filter(None, (self.name, key))) or 'recipe'} {problem}")

    def read(self, kind: type, **parsed: Any) -> dict[str, Any]:
        """Keyword arguments for the dataclass `kind`; `parsed` holds the fields that are tables themselves."""
        known = {f.name: str(f.type) for f in fields(kind)}
        if unknown := [key for key in self.values if key not in known]:
            raise self.error(unknown[0], f"is unknown; fields: {', '.join(known)}")
        return parsed | {key: self.check(key, known[key]) for key in self.values if key not in parsed}

    def check(self, key: str, annotation: str) -> Any:
        value: Any = self.values[key]
        annotation = annotation.removesuffix(" | None")
        kinds: dict[str, tuple[tuple[type, ...], str]] = {
            "str": ((str,), "text"),
            "int": ((int,), "a whole number"),
            "float": ((int, float), "a number"),
        }
        accepted, wanted = kinds.get(annotation, ((dict,), "a table"))
        if not isinstance(value, accepted) or isinstance(value, bool):
            raise self.error(key, f"must be {wanted}, not {value!r}")
        low = 1 if key in ("episodes", "max_steps", "max_episode_steps") else 0
        high = 1.0 if key == "epsilon" else math.inf
        if isinstance(value, int | float) and not low <= value <= high:
            raise self.error(
                key,
                f"must be at least {low}, not {value!r}" if value < low else f"must be at most {high:g}, not {value!r}",
            )
        return value

    def need(self, *keys: str) -> _Table:
        for key in keys:
            if key not in self.values:
                raise self.error(key, "is missing")
        return self

    def table(self, key: str) -> _Table:
        return _Table(self.values[key], f"{self.name}.{key}" if self.name else key, self.file)


def read_recipe(path: str | Path) -> DatasetRecipe:
    """Read and check a recipe.

    Raises:
        ConfigError: no such file, not TOML, or a field that is missing, unknown, of the wrong type or out of range; the message names it.
    """
    file = Path(path)
    values = read_toml(file, "recipe")
    top = _Table(values, "", file).need("id", "description", "seed", "environment", "behaviors", "reference")
    environment = EnvironmentRecipe(**top.table("environment").need("id").read(EnvironmentRecipe))
    if environment.extra is not None and environment.extra not in EXTRA_MODULES:
        raise top.table("environment").error(
            "extra", f"must be one of {', '.join(EXTRA_MODULES)}, not {environment.extra!r}"
        )
    if not isinstance(values["behaviors"], list) or not values["behaviors"]:
        raise top.error("behaviors", "must be one or more [[behaviors]] tables")
    behaviors = []
    for i, entry in enumerate(values["behaviors"]):
        table = _Table(entry, f"behaviors[{i}]", file).need("policy", "episodes")
        behaviors.append(BehaviorRecipe(**table.read(BehaviorRecipe)))
    reference = top.table("reference").need("expert")
    expert = PolicyRecipe(**reference.table("expert").need("policy").read(PolicyRecipe))
    recipe = DatasetRecipe(
        **top.read(
            DatasetRecipe,
            environment=environment,
            behaviors=tuple(behaviors),
            reference=ReferenceRecipe(**reference.read(ReferenceRecipe, expert=expert)),
        )
    )
    try:
        parse_dataset_id(recipe.id)
    except (ValueError, TypeError) as error:
        raise top.error("id", f"must have the form namespace/name-v0, not {recipe.id!r}") from error
    return recipe
