"""Episodes of a behaviour policy, as Minari episode buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode
from minari.data_collector import EpisodeBuffer
from numpy.typing import NDArray

from rlkit2.envs.behaviors import Behavior
from rlkit2.errors import EnvironmentUnavailableError

Array = NDArray[Any]


def _rows(value: Any, rows: Any) -> Any:
    """`value[rows]` for an array or a nested dict of arrays, as a copy."""
    return {key: _rows(part, rows) for key, part in value.items()} if isinstance(value, dict) else np.array(value[rows])


def _stack(values: list[Any]) -> Any:
    """Stack a list of arrays or of nested dicts of arrays along a new first axis."""
    return (
        {key: _stack([value[key] for value in values]) for key in values[0]}
        if isinstance(values[0], dict)
        else np.stack(values)
    )


def rollout(
    spec: EnvSpec, make_behavior: Callable[[], Behavior], *, episodes: int, seed: int, max_steps: int | None = None
) -> Iterator[EpisodeBuffer]:
    """Run episodes side by side and yield them in order.

    Args:
        spec: the environment, with a time limit.
        make_behavior: makes the behaviour of one batch of episodes.
        episodes: how many.
        seed: of the episodes and of the behaviour. Each episode stores the seed of its own reset.
        max_steps: end episodes after that many steps (as truncated), if the environment has not ended them before.

    Yields:
        episodes with T + 1 observations and exactly one flag set, on the last step.

    Raises:
        EnvironmentUnavailableError: the environment has no time limit, or its vector form resets in an unsupported way.
    """
    limit = min(limit for limit in (spec.max_episode_steps, max_steps, np.inf) if limit)
    if limit == np.inf:
        raise EnvironmentUnavailableError(f"{spec.id} has no time limit; give max_episode_steps or max_steps")
    # The vector form of Gymnasium's own tasks shares one generator among all sub-environments; a seed per episode needs the single form.
    own = str(spec.vector_entry_point).startswith("rlkit2.")
    width = min(episodes, 256 if own else 16)
    environments = gymnasium.make_vec(spec, num_envs=width, vectorization_mode=None if own else "sync")
    if environments.metadata["autoreset_mode"] != AutoresetMode.NEXT_STEP:
        raise EnvironmentUnavailableError(
            f"{spec.id}: only vector environments that reset on the next step are supported"
        )
    sequence = np.random.SeedSequence(seed)
    seeds = np.random.default_rng(sequence.spawn(1)[0]).integers(2**31, size=-(-episodes // width) * width)
    generator = np.random.default_rng(sequence)
    try:
        for start in range(0, episodes, width):
            batch = seeds[start : start + width].tolist()
            yield from list(_batch(environments, make_behavior(), batch, generator, int(limit)))[: episodes - start]
    finally:
        environments.close()


def _batch(
    environments: gymnasium.vector.VectorEnv[Any, Any, Any],
    behavior: Behavior,
    seeds: list[int],
    generator: np.random.Generator,
    limit: int,
) -> Iterator[EpisodeBuffer]:
    """One episode of each sub-environment; what they do after their first end is left out."""
    observation, info = environments.reset(seed=seeds)  # type: ignore[arg-type]
    observations: list[Any] = [_rows(observation, slice(None))]
    steps: list[tuple[Array, Array, Array]] = []
    lengths = np.full(len(seeds), limit)
    alive = np.ones(len(seeds), bool)
    while alive.any() and len(steps) < limit:
        actions = behavior(info.get("state", observation), generator)  # what observations hide, behaviours still know
        observation, rewards, terminations, truncations, info = environments.step(actions)
        observations.append(_rows(observation, slice(None)))
        steps.append((actions, rewards.copy(), terminations.copy()))
        ended = alive & (terminations | truncations)
        lengths[ended], alive[ended] = len(steps), False
    actions, rewards, terminations = (np.stack(part, axis=1) for part in zip(*steps, strict=True))
    everything = _stack(observations)
    for i, length in enumerate(lengths):
        terminated = terminations[i, :length]
        truncated = np.zeros(length, bool)
        truncated[-1] = not terminated[-1]
        yield EpisodeBuffer(
            seed=seeds[i],
            observations=_rows(everything, (slice(length + 1), i)),
            actions=actions[i, :length],
            rewards=rewards[i, :length],
            terminations=terminated,
            truncations=truncated,
        )
