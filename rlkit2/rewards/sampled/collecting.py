"""Episodes of a coverage policy in a simulator, as a data set that reward distances are estimated from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeGuard

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

from rlkit2.data import DatasetSpec, TransitionDataset, dataset_from_arrays
from rlkit2.data.environments import Env, EnvSource, make_environment, named_source
from rlkit2.data.spaces import action_layout
from rlkit2.errors import ConfigError, EnvironmentUnavailableError, EpisodeError, RLKitError, first_line
from rlkit2.nn.policy import Policy, load_policy

PolicyPart: TypeAlias = Literal["uniform"] | Policy | str | os.PathLike[str] | Callable[[Any], Any]
PolicySource: TypeAlias = PolicyPart | Sequence[tuple[float, PolicyPart]]
ENDLESS = 100_000  # steps after which an episode without a limit is taken for endless


def is_environment(data: Any) -> TypeGuard[EnvSource]:
    """Whether `data` is something that episodes are played in."""
    return isinstance(data, str | EnvSpec | gymnasium.Env) or (callable(data) and not hasattr(data, "__iter__"))


def collect(
    env: EnvSource,
    *,
    policy: PolicySource = "uniform",
    episodes: int = 100,
    max_steps: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[TransitionDataset, dict[str, NDArray[Any]]]:
    """Play episodes and give their transitions, with the infos that came with each of them, arrays `[N, ...]` by name.

    Args:
        env: id, `file.py:NAME` or `module:NAME` of what makes one, specification, a function that makes one, or an environment (which stays open).
        policy: `"uniform"`; a policy (it samples; of several seeds one is drawn for each step) or the folder of a saved one; a function of one
            observation, as the environment gives it, to one action; or a mixture, `[(weight, policy), ...]`, of which one is drawn anew for each
            step, so that the mixture is itself a policy of the state alone.
        episodes: how many.
        max_steps: cut episodes there (as truncated), if the environment has not ended them before.
        seed: of episodes and actions.
        progress: called with (episodes played, episodes).

    Raises:
        EnvironmentUnavailableError: it cannot be made, or an episode without `max_steps` does not end.
        EpisodeError: the environment fails while it is played.
        ConfigError: a policy that does not fit the environment, weights that are not positive, or actions without bounds under `"uniform"`.
    """
    if episodes < 1 or (max_steps is not None and max_steps < 1):
        raise ConfigError(f"episodes={episodes} and max_steps={max_steps} must be at least 1")
    with _open(env) as made:
        parts, keys = _parts(policy, made)
        name = made.spec.id if made.spec is not None else type(made.unwrapped).__name__
        spec = DatasetSpec(
            observation_space=made.observation_space,
            action_space=made.action_space,
            env_spec=made.spec,
            id=f"{name}, {episodes} episodes",
            observation_keys=keys,
        )
        player = _Player(made, name, spec, parts, np.random.default_rng(seed), max_steps or 0)
        made.action_space.seed(seed)
        for number, start in enumerate(np.random.default_rng([seed, 1]).integers(2**31, size=episodes).tolist(), 1):
            player.play(start)
            if progress is not None:
                progress(number, episodes)
    return player.dataset(), player.infos()


@contextmanager
def _open(env: EnvSource) -> Iterator[Env]:
    """The environment; closed in the end where it was made here."""
    source = named_source(env)
    made = make_environment(source)
    if isinstance(source, gymnasium.Env):
        yield made
        return
    try:
        yield made
    finally:
        made.close()


# An actor takes an observation as the environment gives it, its row, and a generator; it gives an action of the environment.
Actor: TypeAlias = Callable[[Any, NDArray[Any], np.random.Generator], Any]


def _parts(policy: PolicySource, env: Env) -> tuple[list[tuple[float, Actor]], tuple[str, ...] | None]:
    """Weights and actors, and the keys of Dict observations that a saved policy reads."""
    given = list(policy) if isinstance(policy, Sequence) and not isinstance(policy, str) else [(1.0, policy)]
    parts, keys = [], None
    for entry in given:
        if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], int | float) and entry[0] > 0):
            raise ConfigError(f"a mixture is a list of (weight above 0, policy), not {entry!r}")
        weight, part = entry
        if part != "uniform" and isinstance(part, str | os.PathLike):
            part = load_policy(Path(part))
        if isinstance(part, Policy) and part.metadata.get("spec"):
            own = DatasetSpec.from_json(part.metadata["spec"]).observation_keys
            if keys not in (None, own):
                raise ConfigError(
                    f"the policies of a mixture read different keys of the observations: {keys} and {own}"
                )
            keys = own
        parts.append((float(weight), _actor(part, env)))
    return parts, keys


def _actor(part: Any, env: Env) -> Actor:
    space = env.action_space
    if isinstance(part, str):
        if isinstance(space, spaces.Box) and not space.is_bounded():
            raise ConfigError(f"actions {space} have no bounds to draw from uniformly; give a policy")
        return lambda observation, row, generator: space.sample()
    if isinstance(part, Policy):
        return _Sampled(part, space)
    if callable(part):
        return lambda observation, row, generator: part(observation)
    raise ConfigError(f"a policy is 'uniform', a Policy or its folder, or a function of an observation, not {part!r}")


@dataclass(frozen=True)
class _Sampled:
    """A policy of rlkit2 that samples; with several seeds, one of them each time."""

    policy: Policy
    space: spaces.Space[Any]

    def __call__(self, observation: Any, row: NDArray[Any], generator: np.random.Generator) -> Any:
        seeds = len(self.policy.seeds)
        noise = torch.Generator().manual_seed(int(generator.integers(2**62)))
        given = torch.from_numpy(np.ascontiguousarray(row, dtype=np.float32)).expand(seeds, 1, -1)
        action = self.policy(given, deterministic=False, generator=noise)[generator.integers(seeds), 0].cpu().numpy()
        if isinstance(self.space, spaces.Box):
            return np.clip(action.reshape(self.space.shape), self.space.low, self.space.high).astype(self.space.dtype)
        return action.reshape(self.space.shape or ()).astype(self.space.dtype or np.int64)[()]


class _Player:
    """Plays episodes and keeps their steps."""

    def __init__(
        self,
        env: Env,
        name: str,
        spec: DatasetSpec,
        parts: list[tuple[float, Actor]],
        generator: np.random.Generator,
        limit: int,
    ) -> None:
        self.env, self.name, self.spec, self.generator, self.limit = env, name, spec, generator, limit
        weights, self.actors = zip(*parts, strict=True)
        self.shares = np.array(weights) / sum(weights)
        self.columns: dict[str, list[Any]] = {key: [] for key in ("s", "a", "r", "n", "end", "cut")}
        self._infos: list[dict[str, Any]] = []

    def play(self, seed: int) -> None:
        """One episode."""
        observation, _ = self.env.reset(seed=seed)
        row = self._row(observation)
        for step in range(1, (self.limit or ENDLESS) + 1):
            actor = self.actors[self.generator.choice(len(self.actors), p=self.shares)]
            action = None
            try:
                action = actor(observation, row, self.generator)
                observation, reward, terminated, truncated, info = self.env.step(action)
            except Exception as error:
                raise self._failed(error, action, f"in step {step} of the episode from its seed {seed}") from error
            following = self._row(observation)
            stored = action_layout(self.env.action_space).flatten(_batched(action))[0]
            cut = not terminated and (truncated or step == self.limit)
            for key, value in zip(self.columns, (row, stored, reward, following, terminated, cut), strict=True):
                self.columns[key].append(value)
            self._infos.append(info)
            row = following
            if terminated or cut:
                return
        raise EnvironmentUnavailableError(
            f"an episode of {self.name} still runs after {ENDLESS} steps; give max_steps (--max-steps)"
        )

    def _failed(self, error: Exception, action: Any, where: str) -> RLKitError:
        """Who is at fault: a policy that gave no action of the space, or the environment."""
        if action is None or not _holds(self.env.action_space, action):
            return ConfigError(f"the policy does not fit {self.name}: {first_line(error)}")
        return EpisodeError(f"environment {self.name} failed {where}: {type(error).__name__}: {first_line(error)}")

    def _row(self, observation: Any) -> NDArray[Any]:
        return np.asarray(self.spec.flattener.flatten(_batched(observation))[0])

    def dataset(self) -> TransitionDataset:
        """All transitions."""
        s, a, r, n, end, cut = (np.stack([np.asarray(value) for value in column]) for column in self.columns.values())
        return dataset_from_arrays(s, a, r, n, end.astype(bool), cut.astype(bool), self.spec)

    def infos(self) -> dict[str, NDArray[Any]]:
        """Numbers that came with every step."""
        found = {}
        for name in self._infos[0]:
            if all(name in info for info in self._infos):
                values = [np.asarray(info[name]) for info in self._infos]
                if values[0].dtype.kind in "biuf" and all(value.shape == values[0].shape for value in values):
                    found[name] = np.stack(values)
        return found


def _holds(space: spaces.Space[Any], action: Any) -> bool:
    try:
        return bool(space.contains(action))
    except Exception:  # noqa: BLE001 - the action may be anything
        return False


def _batched(tree: Any) -> Any:
    """A leading axis of one row."""
    if isinstance(tree, dict):
        return {key: _batched(value) for key, value in tree.items()}
    return tuple(_batched(value) for value in tree) if isinstance(tree, tuple) else np.asarray(tree)[None]
