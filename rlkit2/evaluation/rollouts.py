"""Rolls out all seeds of a policy together, and counts the first episodes STARTED.

Counting the first n episodes that finish on a set of environments favours short episodes: a slot that runs a long one yields fewer of them. Here
episode k belongs to every seed, starts from the environment seed of episode k, and is waited for; there is no automatic reset.

Results do not depend on `num_envs`, bit for bit: episode k always is row `k % ROWS` of a policy call with exactly `ROWS` rows, whose noise (for
sampled actions) is seeded by (evaluation seed, k // ROWS, time step). Matrix products of different widths would differ in the last bit, which
chaotic dynamics turn into other returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from rlkit2.data.environments import Env, EnvSource, named_source, source_name
from rlkit2.data.spaces import action_bounds, action_layout
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import ConfigError, EnvironmentUnavailableError, EpisodeError, RLKitError, first_line
from rlkit2.evaluation.environments import check_spaces, evaluation_source, stacked_environment
from rlkit2.evaluation.evaluation import Evaluation
from rlkit2.evaluation.film import DRAWING, Film
from rlkit2.evaluation.reference_scores import KNOWN, ReferenceScores, reference_scores

ROWS = 10  # rows of every policy call
FIRST_EVALUATION_SEED = (
    2**30
)  # dataset collection and training count their seeds from zero; gymnasium wants less than 2**31 for some simulators
ENDLESS = 100_000  # steps after which an episode without `max_steps` is taken for endless
SUCCESS_KEYS = ("success", "is_success")

Progress = Callable[[int, int], None]


class ActingPolicy(Protocol):
    """What can be evaluated: `rlkit2.nn.policy.Policy` or anything that acts like it (raw units both sides, `[S, B, ...]` when S > 1)."""

    @property
    def seeds(self) -> Sequence[int]:
        """The integers that name the seeds, in order."""

    def __call__(
        self, observations: Tensor, deterministic: bool = True, generator: torch.Generator | None = None
    ) -> Tensor: ...


def evaluation_seeds(seed: int, episodes: int) -> tuple[int, ...]:
    """Environment seeds of episodes 0, 1, ... of evaluation `seed`: `2**30 + 2**16 * seed + k`, away from the small seeds data are collected with."""
    if not 0 <= seed < 2**14 or not 0 < episodes <= 2**16:
        raise ConfigError(
            f"evaluation seed must be in [0, {2**14 - 1}] and episodes in [1, {2**16}], not {seed} and {episodes}"
        )
    return tuple(FIRST_EVALUATION_SEED + 2**16 * seed + k for k in range(episodes))


def evaluate_policy(
    policy: ActingPolicy,
    spec: DatasetSpec,
    *,
    episodes: int = 100,
    env: EnvSource | None = None,
    deterministic: bool = True,
    seed: int = 0,
    num_envs: int | None = None,
    max_steps: int | None = None,
    progress: Progress | None = None,
    trust_env: bool = False,
    film: Film | None = None,
) -> Evaluation:
    """Run every seed of `policy` for `episodes` episodes and return what it earned.

    `spec`: the dataset's specification; it gives the observation layout, the environment and the reference returns. `env`: another environment (a
    name, an `EnvSpec`, a function that makes one, or an environment, which plays everything itself and stays open). `deterministic`: the policy's
    mode, else sampled actions. `seed`: which fixed set of evaluation episodes. `num_envs`: environments per policy seed stepped together; changes
    memory and time, never the result. `max_steps`: cut episodes there. `progress(done, total)` is called as episodes end. `trust_env`: build the
    dataset's environment as its file says, running the code it names. `film`: takes pictures of the first episodes; the caller writes it.

    Raises `EnvironmentUnavailableError` for a missing, unknown, unfitting or (unless `trust_env`) unregistered environment, `MissingExtraError` for
    a missing simulator, `EpisodeError` where the environment fails while it is played.
    """
    with Evaluator(
        spec,
        episodes=episodes,
        env=env,
        deterministic=deterministic,
        seed=seed,
        num_envs=num_envs,
        max_steps=max_steps,
        trust_env=trust_env,
        film=film,
    ) as evaluator:
        return evaluator.evaluate(policy, progress=progress)


class Evaluator:
    """`evaluate_policy` with everything but the policy fixed; keeps its environments, so that evaluating during training builds them once.

    Calling it, `evaluator(policy, step)`, gives the lines of `evaluations.jsonl`, which is what a trainer wants.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        *,
        episodes: int = 100,
        env: EnvSource | None = None,
        deterministic: bool = True,
        seed: int = 0,
        num_envs: int | None = None,
        max_steps: int | None = None,
        trust_env: bool = False,
        film: Film | None = None,
    ) -> None:
        if num_envs is not None and num_envs < 1:
            raise ConfigError(f"num_envs must be at least 1, not {num_envs}")
        if max_steps is not None and max_steps < 1:
            raise ConfigError(f"max_steps must be at least 1, not {max_steps}")
        self.spec, self.deterministic, self.seed, self.max_steps = spec, deterministic, seed, max_steps
        self.episode_seeds = evaluation_seeds(seed, episodes)
        self.source = evaluation_source(spec, env, trust_env=trust_env)
        self.own = not isinstance(named_source(self.source), gym.Env)  # made here, as many as are needed
        self.num_envs = min(num_envs or ROWS, episodes)
        self.flattener = spec.flattener
        self.name, self.film, self.pool = source_name(self.source), film, list[Env]()
        self._make_one()
        check_spaces(self.pool[0], spec, self.name)
        self.reference, self.normalization = normalization(spec, self.pool[0], given=env is not None)

    def _make_one(self) -> None:
        """One more environment; the first ones, in which the first episodes play, draw where they are filmed."""
        if self.film is None or len(self.pool) >= self.film.episodes:
            self.pool.append(stacked_environment(self.source, self.spec))
        else:
            self.pool.append(
                self.film.make(lambda mode: stacked_environment(self.source, self.spec, render_mode=mode), self.name)
            )

    def evaluate(self, policy: ActingPolicy, *, progress: Progress | None = None) -> Evaluation:
        """All episodes of every seed of `policy`."""
        seeds, episodes = tuple(policy.seeds), len(self.episode_seeds)
        together = len(seeds) * self.num_envs if self.own else 1
        while len(self.pool) < together:
            self._make_one()
        record = Record(len(seeds), episodes, progress)
        training = getattr(policy, "training", False)
        try:
            if training:
                policy.eval()  # type: ignore[attr-defined]
            with torch.no_grad():
                for first in range(0, episodes, self.num_envs):
                    wave = range(first, min(first + self.num_envs, episodes))
                    keys = [(s, k) for s in range(len(seeds)) for k in wave]
                    for start in range(0, len(keys), together):
                        self._run_together(policy, keys[start : start + together], record)
        finally:
            if training:
                policy.train()  # type: ignore[attr-defined]
        return Evaluation(
            returns=record.returns,
            lengths=record.lengths,
            successes=record.successes if record.reports_success else None,
            seeds=seeds,
            episode_seeds=self.episode_seeds,
            environment=self.name,
            dataset=self.spec.id,
            deterministic=self.deterministic,
            reference=self.reference,
            normalization=self.normalization,
        )

    def _run_together(self, policy: ActingPolicy, keys: Sequence[tuple[int, int]], record: Record) -> None:
        """Start the episodes `keys` (seed, episode), each in an environment of its own, and step them until the last one has ended."""
        count = len(record.returns)
        envs = dict(zip(keys, self.pool, strict=False))
        observations = {key: self._reset(env, key) for key, env in envs.items()}
        for key, env in envs.items():
            self._picture(env, policy, key, 0, 0.0)
        blocks = {k // ROWS: np.zeros((count, ROWS, *self.flattener.shape), self.flattener.dtype) for _, k in keys}
        remembers = getattr(policy, "remembers", False)
        memories = {block: policy.begin(ROWS) if remembers else None for block in blocks}  # type: ignore[attr-defined]
        earned = {block: np.zeros((count, ROWS)) for block in blocks}  # in the step before
        step = 0
        while observations:
            rows = self.flattener.flatten(stack(list(observations.values())))
            for (s, k), row in zip(observations, rows, strict=True):
                blocks[k // ROWS][s, k % ROWS] = row
            live = {k // ROWS for _, k in observations}
            actions = {}
            for block in live:
                last = (memories[block], earned[block]) if remembers else None
                actions[block], memories[block] = self._act(policy, blocks[block], block, step, last)
            step += 1
            following: dict[tuple[int, int], Any] = {}
            for key in observations:
                s, k = key
                action = actions[k // ROWS][s, k % ROWS]
                if not np.isfinite(action).all():
                    record.end(key, step - 1, failed=True)
                    continue
                observation, reward, terminated, truncated, info = self._step(envs[key], action, key, step)
                record.add(key, reward, info)
                earned[k // ROWS][s, k % ROWS] = reward
                ended = terminated or truncated or step == self.max_steps
                self._picture(envs[key], policy, key, step, float(record.returns[key]), ended)
                if ended:
                    record.end(key, step)
                else:
                    following[key] = observation
            observations = following
            if step >= ENDLESS and self.max_steps is None and observations:
                raise EnvironmentUnavailableError(
                    f"an episode of {self.name} still runs after {ENDLESS} steps; give --max-steps (max_steps=...)"
                )

    def _picture(
        self, env: Env, policy: ActingPolicy, key: tuple[int, int], step: int, earned: float, ended: bool = False
    ) -> None:
        """One more picture, where the episode is filmed."""
        if self.film is None or not self.film.shows(*key):
            return
        try:
            self.film.add(
                env, key[1], f"seed {policy.seeds[key[0]]}, episode {key[1]}, step {step}: return {earned:.1f}", ended
            )
        except Exception as error:
            raise EpisodeError(f"environment {self.name} cannot be drawn: {first_line(error)}; {DRAWING}") from error

    def _reset(self, env: Env, key: tuple[int, int]) -> Any:
        try:
            observation, _ = env.reset(seed=self.episode_seeds[key[1]])
        except Exception as error:
            raise self._failed(error, "reset", key) from error
        return observation

    def _step(
        self, env: Env, action: NDArray[Any], key: tuple[int, int], step: int
    ) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        try:
            observation, reward, terminated, truncated, info = env.step(step_action(action, env.action_space))
            reward = float(reward)
        except Exception as error:
            raise self._failed(error, f"step {step}", key) from error
        if not math.isfinite(reward):
            raise self._failed(ValueError(f"the reward was {reward}"), f"step {step}", key)
        return observation, reward, terminated, truncated, info

    def _failed(self, error: Exception, where: str, key: tuple[int, int]) -> RLKitError:
        """What the environment raised, or gave, in words that let it be found again."""
        if isinstance(error, RLKitError):
            return error
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        return EpisodeError(
            f"environment {self.name} failed in {where} of episode {key[1]} (its seed {self.episode_seeds[key[1]]}): {kind}{first_line(error)}"
        )

    def _act(
        self,
        policy: ActingPolicy,
        block: NDArray[Any],
        number: int,
        step: int,
        last: tuple[Any, NDArray[Any]] | None,
    ) -> tuple[NDArray[Any], Any]:
        """Actions `[S, ROWS, ...]` of one block in the environment's units, shape and dtype, and what a policy that remembers then knows.

        `last`: for such a policy, what it knew before, and the rewards `[S, ROWS]` since.
        """
        parameter = next(iter(policy.parameters()), None) if isinstance(policy, torch.nn.Module) else None
        observations = torch.from_numpy(block)
        if parameter is not None:
            observations = observations.to(
                parameter.device, parameter.dtype if observations.is_floating_point() else None
            )
        generator = None
        if not self.deterministic:
            generator = torch.Generator(observations.device)
            generator.manual_seed(
                int(np.random.SeedSequence([self.seed, number, step]).generate_state(1, np.uint64)[0] >> 1)
            )
        memory = None
        if last is not None:
            given = (last[0], observations, torch.from_numpy(last[1]))
            acted, memory = policy.follow(*given, deterministic=self.deterministic, generator=generator)  # type: ignore[attr-defined]
        else:
            squeezed = observations[0] if len(observations) == 1 else observations
            acted = policy(squeezed, deterministic=self.deterministic, generator=generator)
        actions = acted.cpu().numpy().reshape(len(block), ROWS, -1)
        return environment_actions(actions, self.pool[0].action_space), memory

    def __call__(self, policy: ActingPolicy, step: int) -> list[dict[str, Any]]:
        """The lines of `evaluations.jsonl` for one evaluation, without the step."""
        return self.evaluate(policy).lines()

    def close(self) -> None:
        """Close the environments that were made here."""
        while self.pool:
            env = self.pool.pop()
            if self.own:
                env.close()

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Record:
    """What the episodes have earned so far, `[S, E]`."""

    def __init__(self, seeds: int, episodes: int, progress: Progress | None) -> None:
        self.returns = np.zeros((seeds, episodes))
        self.lengths = np.zeros((seeds, episodes), np.int64)
        self.successes = np.zeros((seeds, episodes), bool)
        self.reports_success = False
        self.ended = 0
        self.progress = progress

    def add(self, key: tuple[int, int], reward: float, info: dict[str, Any]) -> None:
        """One step of episode `key` (seed, episode)."""
        self.returns[key] += reward
        for name in SUCCESS_KEYS:
            if name in info:
                self.reports_success = True
                self.successes[key] |= bool(info[name])

    def end(self, key: tuple[int, int], length: int, *, failed: bool = False) -> None:
        """Episode `key` is over; one that `failed` (a non-finite action) has no return."""
        self.lengths[key] = length
        if failed:
            self.returns[key] = np.nan
        self.ended += 1
        if self.progress is not None:
            self.progress(self.ended, self.returns.size)


def environment_actions(actions: NDArray[Any], space: spaces.Space[Any]) -> NDArray[Any]:
    """Actions `[S, B, n]` in the shape `[S, B, *shape]` and dtype of `space`, Box actions clipped to its bounds."""
    if isinstance(space, spaces.Box):
        actions = actions.reshape(*actions.shape[:2], *space.shape)
        if space.dtype.kind != "f":
            actions = np.rint(actions)
        clipped = np.clip(actions, space.low, space.high)
        return np.where(np.isfinite(actions), clipped, np.nan).astype(space.dtype)
    if isinstance(space, spaces.Dict | spaces.Tuple):  # one row each; `step_action` nests it
        return actions
    return actions.reshape(*actions.shape[:2], *(space.shape or ())).astype(space.dtype or np.int64)


def step_action(action: NDArray[Any], space: spaces.Space[Any]) -> Any:
    """One of `environment_actions` as `env.step` takes it."""
    if not isinstance(space, spaces.Dict | spaces.Tuple):
        return action if action.ndim else action.item()
    layout = action_layout(space)
    low, high = action_bounds(space)
    return first(layout.unflatten(space, np.clip(action, low, high)[None]))


def first(batch: Any) -> Any:
    """The first row of a batch of arrays, dicts or tuples."""
    if isinstance(batch, dict):
        return {key: first(part) for key, part in batch.items()}
    return tuple(map(first, batch)) if isinstance(batch, tuple) else batch[0]


def stack(observations: Sequence[Any]) -> Any:
    """A list of raw observations as one batch of the same structure (arrays, dicts or tuples with a leading axis)."""
    first = observations[0]
    if isinstance(first, dict):
        return {key: stack([observation[key] for observation in observations]) for key in first}
    if isinstance(first, tuple):
        return tuple(stack([observation[index] for observation in observations]) for index in range(len(first)))
    return np.stack([np.asarray(observation) for observation in observations])


def normalization(spec: DatasetSpec, env: Env, *, given: bool) -> tuple[ReferenceScores | None, str]:
    """The reference returns that hold for returns earned in `env`, and where they come from or why there are none."""
    references = reference_scores(spec)
    if references is None:
        known = any(spec.id.startswith(prefix) for prefix in KNOWN)
        other = " for this environment" if known else ""
        return (
            None,
            f"dataset {spec.id} has no reference returns and rlkit2 knows none{other}; the scores are plain returns",
        )
    own = spec.eval_env_spec or spec.env_spec
    if given and not same_environment(env, own):
        name = env.spec.id if env.spec is not None else type(env.unwrapped).__name__
        return (
            None,
            f"the reference returns of {spec.id} belong to {references.environment} as the dataset specifies it, not to the given {name}",
        )
    return references, str(references)


def same_environment(env: Env, own: Any) -> bool:
    """Whether `env` is what the dataset's specification `own` describes: id, keyword arguments and time limit."""
    theirs = env.spec
    if theirs is None or own is None:
        return False
    return bool((theirs.id, theirs.kwargs, theirs.max_episode_steps) == (own.id, own.kwargs, own.max_episode_steps))
