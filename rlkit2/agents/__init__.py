"""One file per algorithm, readable top to bottom."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from rlkit2.agents.base import ACTION_KINDS, Agent, as_seeds
from rlkit2.agents.policy_interface import make_interface
from rlkit2.data.spaces import action_layout
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import ConfigError, first_line
from rlkit2.fields import closest, field_types, read_fields, read_texts
from rlkit2.nn import Image, Normalizer
from rlkit2.user_code import import_place

__all__ = [
    "Agent",
    "agent_class",
    "agent_classes",
    "agent_kinds",
    "agent_source",
    "class_name",
    "code_hash",
    "import_agent",
    "list_agents",
    "make_agent",
    "make_config",
    "make_normalizer",
    "plain_name",
    "read_config",
]


@dataclass(frozen=True)
class _Entry:
    module: str
    name: str
    preset: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, tuple[str, str]] = field(
        default_factory=dict
    )  # kind of actions -> module and class in its place
    distribution: str | None = None  # the installed package that offers it


ODICE_RELEASED = {
    "lambda_": 0.6,
    "eta": 1.0,
    "value_layer_norm": True,
    "policy_hidden_sizes": (1024, 1024),
    "tanh_mean": False,
    "value_learning_rate": 2e-4,
    "policy_learning_rate": 2e-4,
    "target_update_rate": 0.005,
    "value_unit": "reward",
    "residual_unit": "value",
    "weight": "positive_residual",
    "weight_residual": "sampled",
    "weight_normalization": "none",
}
"""The released code's values for offline RL where `ODICEConfig` has others."""

_REGISTRY = {
    "awac": _Entry("rlkit2.agents.awac", "AWAC"),
    "bc": _Entry("rlkit2.agents.bc", "BC"),
    "bc10": _Entry("rlkit2.agents.bc", "BC", {"fraction": 0.1}),
    "cpl": _Entry("rlkit2.agents.cpl", "CPL"),
    "cql": _Entry(
        "rlkit2.agents.cql", "CQL", variants={"continuous": ("rlkit2.agents.cql_continuous", "ContinuousCQL")}
    ),
    "crr": _Entry("rlkit2.agents.crr", "CRR"),
    "dqn": _Entry("rlkit2.agents.dqn", "DQN"),
    "dt": _Entry("rlkit2.agents.dt", "DT"),
    "edac": _Entry("rlkit2.agents.edac", "EDAC"),
    "fql": _Entry("rlkit2.agents.fql", "FQL"),
    "ipl": _Entry("rlkit2.agents.ipl", "IPL"),
    "iql": _Entry("rlkit2.agents.iql", "IQL"),
    "odice": _Entry("rlkit2.agents.odice", "ODICE"),
    "odice_released": _Entry("rlkit2.agents.odice", "ODICE", ODICE_RELEASED),
    "p_iql": _Entry("rlkit2.agents.p_iql", "PIQL"),
    "odice_il": _Entry("rlkit2.agents.odice_il", "ODICEIL"),
    "odice_il_zero": _Entry(
        "rlkit2.agents.odice_il",
        "ODICEIL",
        {
            "reward": "zero",
            "divergence": "pearson",
            "weight_normalization": "none",
            "lambda_": 0.4,
            "value_layer_norm": False,
            "tanh_mean": True,
            "value_learning_rate": 1e-4,
            "policy_learning_rate": 1e-4,
            "policy_weight_decay": 1e-5,
        },
    ),
    "ppo": _Entry("rlkit2.agents.ppo", "PPO"),
    "rebrac": _Entry("rlkit2.agents.rebrac", "ReBRAC"),
    "sac": _Entry("rlkit2.agents.sac", "SAC"),
    "sacn": _Entry("rlkit2.agents.sacn", "SACN"),
    "sdice": _Entry("rlkit2.agents.odice", "ODICE", {"gradient_rule": "semi"}),
    "sql": _Entry("rlkit2.agents.sql", "SQL"),
    "td3bc": _Entry("rlkit2.agents.td3bc", "TD3BC"),
    "vdice": _Entry("rlkit2.agents.odice", "ODICE", {"gradient_rule": "true"}),
    "xql": _Entry("rlkit2.agents.xql", "XQL"),
}


ENTRY_POINTS = "rlkit2.agents"
"""Group under which an installed package offers agents of its own: name = "module:Class"."""


def list_agents() -> list[str]:
    """Names that `make_agent` knows, those of installed packages included, in alphabetical order."""
    return sorted({*_REGISTRY, *entry_points(group=ENTRY_POINTS).names})


def import_agent(name: str) -> type[Agent]:
    """An agent of the user's own, by its file (`path/my_agents.py:MyAgent`) or its module (`package.module:MyAgent`); runs that code.

    To be called with what a user has typed, never with what a file says. The file's module is called by its stem, so that configs and
    runs find it again; it finds modules beside it, as a script does.

    Raises:
        ConfigError: no such file, module or class, another module of that name is loaded, or the code fails.
    """
    place, _, called = name.rpartition(":")
    if not place or not called:
        raise ConfigError(f"{name!r} does not name an agent; write my_agents.py:MyAgent or package.module:MyAgent")
    module = import_place(place)
    found = getattr(module, called, None)
    if not (isinstance(found, type) and issubclass(found, Agent)):
        known = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, Agent)]
        own = [key for key in known if vars(module)[key].__module__ == module.__name__]
        raise ConfigError(f"{place} has no agent {called!r}; it has {', '.join(own) or 'none'}")
    return found


def agent_class(name_or_config: str | object, kind: str | None = None) -> type[Agent]:
    """The class of a registered name, of `module:Class` where that module is loaded (nothing is imported because a run, recipe or
    sweep names it: see `import_agent`), or of a config object (any `Agent` in the config's own module that names its class).

    `kind`: of the actions (`ACTION_KINDS`), for a name that stands for different algorithms; None: its first one.

    Raises:
        ConfigError: unknown name, or no agent has this config.
    """
    if isinstance(name_or_config, str):
        if ":" in name_or_config:
            return _loaded(name_or_config)
        return _registered(name_or_config, kind)
    module = sys.modules[type(name_or_config).__module__]
    for candidate in vars(module).values():
        if (
            isinstance(candidate, type)
            and issubclass(candidate, Agent)
            and getattr(candidate, "config_class", None) is type(name_or_config)
        ):
            return candidate
    raise ConfigError(
        f"{type(name_or_config).__name__} is not an agent's config; give one of: {', '.join(list_agents())}"
    )


def agent_classes(name: str) -> tuple[type[Agent], ...]:
    """The classes of a name: one, or, where a name stands for different algorithms, one for each of them.

    Raises:
        ConfigError: unknown name.
    """
    others = () if ":" in name else tuple(_entry(name).variants)
    return tuple(dict.fromkeys((agent_class(name), *(agent_class(name, kind) for kind in others))))


def agent_kinds(name: str) -> tuple[str, ...]:
    """The kinds of actions, of `ACTION_KINDS`, that an agent of this name learns.

    Raises:
        ConfigError: unknown name.
    """
    learnt = {kind for cls in agent_classes(name) for kind in cls.action_kinds}
    return tuple(kind for kind in ACTION_KINDS if kind in learnt)


def class_name(cls: type[Agent]) -> str:
    """The registered name of an agent's class, the shortest where there are several, or `module:Class`."""
    names = []
    for name in list_agents():
        entry = _entry(name)
        places = [(entry.module, entry.name), *entry.variants.values()]
        if any(getattr(sys.modules.get(module), called, None) is cls for module, called in places):
            names.append(name)
    return min(names, key=len) if names else f"{cls.__module__}:{cls.__qualname__}"


def agent_source(cls: type[Agent]) -> str | None:
    """What a user types for an agent of their own from any folder: `/path/my_agents.py:MyAgent`, or `package.module:MyAgent`.

    None for a registered agent, and for one defined in the script or notebook that runs: importing that would run it.
    """
    if ":" not in class_name(cls) or cls.__module__ == "__main__":
        return None
    path = Path(inspect.getfile(cls)).resolve()
    return f"{path if path.stem == cls.__module__ else cls.__module__}:{cls.__qualname__}"


def code_hash(cls: type[Agent]) -> str | None:
    """SHA-256 of the file an agent of the user's own is written in; None for a registered agent, or where there is no file."""
    if ":" not in class_name(cls):
        return None
    try:
        return hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()
    except (OSError, TypeError):  # typed into a console
        return None


def _registered(name: str, kind: str | None = None) -> type[Agent]:
    entry = _entry(name)
    module, called = entry.variants.get(kind or "", (entry.module, entry.name))
    try:
        found = getattr(importlib.import_module(module), called)
    except Exception as error:
        if entry.distribution is None:
            raise
        raise ConfigError(
            f"agent {name} of the installed package {entry.distribution} cannot be imported: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Agent)):
        raise ConfigError(f"agent {name} of the installed package {entry.distribution} is not an rlkit2.agents.Agent")
    return found


def _loaded(name: str) -> type[Agent]:
    place, _, called = name.rpartition(":")
    module = Path(place).stem if place.endswith(".py") else place
    found = getattr(sys.modules.get(module), called, None)
    if not (isinstance(found, type) and issubclass(found, Agent)):
        typed = shlex.quote(f"{place if '.' in place else f'{place}.py'}:{called}")
        raise ConfigError(
            f"{called} of {place} is not loaded, and what a file names is not imported; name it yourself: "
            f"rlkit2 train {typed} ..., or --agent {typed} for the other commands (in Python: import it first)"
        )
    return found


def plain_name(name: str) -> str:
    """The name of the agent that `name` is a preset of: "odice" for "sdice", "bc" for "bc10"; a plain agent's own name.

    Raises:
        ConfigError: unknown name.
    """
    if ":" in name:
        return name
    entry = _entry(name)
    plain = (
        plain
        for plain, other in _REGISTRY.items()
        if (other.module, other.name) == (entry.module, entry.name) and not other.preset
    )
    return next(plain, name)


def make_config(name: str, kind: str | None = None, /, **overrides: Any) -> Any:
    """The config of a registered name with its preset, then `overrides`; `kind`: see `agent_class`.

    Raises:
        ConfigError: unknown name, unknown field, or a value out of range.
    """
    config_class: Any = agent_class(name, kind).config_class
    try:
        preset = {} if ":" in name else _entry(name).preset
        if "hidden_sizes" in overrides:  # it sets all networks
            preset = {key: value for key, value in preset.items() if not key.endswith("_hidden_sizes")}
        return config_class(**{**preset, **overrides})
    except TypeError as error:
        raise ConfigError(
            f"{name}: {error}; its fields are: {', '.join(f.name for f in fields(config_class))}"
        ) from error


def read_config(
    name: str, values: Mapping[str, Any], kind: str | None = None, *, typed: bool = False
) -> dict[str, Any]:
    """Fields of the config of a name, from TOML, JSON, Python or (`typed`) a command line, checked and in their types.

    `kind`: of the actions; None where that is not known yet: the fields must then be those of one of the name's classes.

    Raises:
        ConfigError: unknown name, an unknown field, or one that is for other actions; a value of another type or out of range.
    """
    classes = agent_classes(name) if kind is None else (agent_class(name, kind),)
    fitting = [cls for cls in classes if values.keys() <= field_types(cls.config_class).keys()]
    if not fitting and (misplaced := _misplaced(name, values, kind)):
        raise ConfigError(misplaced)
    read = read_texts if typed else read_fields
    for cls in fitting[:-1]:
        with suppress(ConfigError):  # the next one may have another range for it
            return read(cls.config_class, values)
    return read((fitting or list(classes))[-1].config_class, values)


def _misplaced(name: str, values: Mapping[str, Any], kind: str | None) -> str | None:
    """One line where fields belong to algorithms of the name that are for other actions; None where one is unknown to all."""
    able = {
        field: [
            kind for cls in agent_classes(name) if field in field_types(cls.config_class) for kind in cls.action_kinds
        ]
        for field in values
    }
    if not all(able.values()):
        return None
    if kind is not None:
        field = next(field for field, kinds in able.items() if kind not in kinds)
        return f"{name} has {field!r} for {' or '.join(able[field])} actions alone; these are {kind}: leave it out"
    (one, its), *others = (item for item in able.items() if len(item[1]) < len(agent_kinds(name)))
    other, theirs = next(item for item in others if not set(item[1]) & set(its))
    return f"{name} has {one!r} for {' or '.join(its)} actions alone and {other!r} for {' or '.join(theirs)} ones: leave one out"


def make_agent(
    name_or_config: str | object,
    spec: DatasetSpec,
    *,
    seeds: int | Sequence[int] = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    normalizer: Normalizer | None = None,
    cls: type[Agent] | None = None,
) -> Agent:
    """Build an agent for the spaces of a dataset.

    Args:
        name_or_config: a name of `list_agents()` or a config object.
        spec: the dataset's specification.
        seeds: n for seeds 0 to n-1, or the integers themselves.
        device, dtype: of all floating tensors.
        normalizer: None maps the action bounds of `spec` to [-1, 1] and leaves observations alone.
        cls: the agent's class; default: that of the name, or the one the config was written for (a subclass may share it).

    Raises:
        ConfigError: unknown name, or a configuration that does not fit the data.
    """
    kind = spec.action_kind
    config = make_config(name_or_config, kind) if isinstance(name_or_config, str) else name_or_config
    normalizer = make_normalizer(spec, seeds=len(as_seeds(seeds))) if normalizer is None else normalizer
    agent = (agent_class(name_or_config, kind) if cls is None else cls)(
        config,
        spec.observation_size,
        sum(normalizer.choices) if normalizer.choices else spec.action_size,
        seeds=seeds,
        dtype=dtype,
        device=device,
        discrete=spec.discrete,
        normalizer=normalizer,
        **({"images": [Image(*image) for image in spec.images]} if spec.images else {}),
    )
    agent.policy.interface = make_interface(spec)
    return agent


MOST_STEPS = 2**24
"""Whole numbers that float32 tells apart: a wider range of them counts as one without bounds."""


def make_normalizer(
    spec: DatasetSpec,
    *,
    seeds: int = 1,
    observation_mean: torch.Tensor | None = None,
    observation_std: torch.Tensor | None = None,
    return_mean: torch.Tensor | None = None,
    return_std: torch.Tensor | None = None,
) -> Normalizer:
    """Action bounds of `spec` to [-1, 1], choices counted from 0, and, if given, standardised observations (statistics `[obs]`, raw units).

    `return_mean` and `return_std` are kept for agents that count in returns.
    """
    layout = action_layout(spec.action_space)
    actions: dict[str, Any] = {}
    if isinstance(spec.action_space, spaces.Discrete):
        actions = {"action_start": int(spec.action_space.start)}
    elif layout.choices is not None:
        actions = dict(zip(("choices", "action_start"), layout.choices, strict=True))
    else:
        boxes: list[Any] = [leaf.space for leaf in layout.leaves]
        low, high = (
            torch.cat([torch.as_tensor(getattr(box, end), dtype=torch.float64).flatten() for box in boxes])
            for end in ("low", "high")
        )
        whole = layout.dtype == np.int64
        free = whole & (high - low > MOST_STEPS)
        low, high = low.masked_fill(free, -torch.inf), high.masked_fill(free, torch.inf)
        actions = {"action_low": low, "action_high": high, "whole": whole}
    return Normalizer(
        observation_mean=observation_mean,
        observation_std=observation_std,
        return_mean=return_mean,
        return_std=return_std,
        seeds=seeds,
        dtype=torch.float64,
        **actions,
    )


def _entry(name: str) -> _Entry:
    plain = name.replace("-", "_")  # as it is typed, and as runs from before the names agreed have it
    if plain in _REGISTRY:
        return _REGISTRY[plain]
    offered = entry_points(group=ENTRY_POINTS)
    for point in (point for called in (name, plain) for point in offered.select(name=called)):
        return _Entry(point.module, point.attr, distribution=point.dist.name if point.dist else "?")
    raise ConfigError(
        f"unknown agent {name!r}{closest(name, list_agents())}, or an agent of your own: my_agents.py:MyAgent"
    )
