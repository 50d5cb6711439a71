"""The one place where the T + 1 observations of an episode become aligned pairs `(s_t, s_{t+1})`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit2.data.records import RecordWriter
from rlkit2.data.spaces import ActionLayout, SpaceFlattener
from rlkit2.errors import CorruptDatasetError, UnsupportedSpaceError

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Episode:
    """One episode as it is stored: `observations` and `actions` arrays or trees of arrays, the rest `[T]`; `name` is for messages."""

    name: str
    observations: Any
    actions: Any
    rewards: NDArray[Any]
    terminations: NDArray[Any]
    truncations: NDArray[Any]


class EpisodePacker:
    """Aligns episodes and writes them as records; counts in `notes` what was not as it should be.

    An episode normally has one observation more than actions. With as many observations as actions its last next observation was never
    stored: after a termination nothing is bootstrapped, so the last observation stands in for it; otherwise the last step is dropped and the
    step before it is the truncated one. Any other length is refused. An episode that ends without a flag counts as truncated.
    """

    def __init__(self, writer: RecordWriter, flat: SpaceFlattener, actions: ActionLayout) -> None:
        self.writer = writer
        self.flat = flat
        self.actions = actions
        self.notes: dict[str, int] = {}

    def _count(self, what: str) -> None:
        self.notes[what] = self.notes.get(what, 0) + 1

    def _flatten(self, episode: Episode) -> tuple[NDArray[Any], NDArray[Any]]:
        try:
            observations = self.flat.flatten(episode.observations)
            actions = self.actions.flatten(episode.actions)
        except UnsupportedSpaceError as error:
            raise CorruptDatasetError(f"{episode.name}: {error}") from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise CorruptDatasetError(
                f"{episode.name}: observations or actions do not fit the spaces in the metadata ({error})"
            ) from error
        return observations, actions

    def add(self, episode: Episode) -> None:
        """Align and write one episode; `CorruptDatasetError` names it where lengths or shapes contradict each other."""
        observations, actions = self._flatten(episode)
        rewards, terminations, truncations = (
            np.asarray(a).reshape(-1) for a in (episode.rewards, episode.terminations, episode.truncations)
        )
        steps = len(actions)
        if not len(rewards) == len(terminations) == len(truncations) == steps:
            lengths = f"{steps} actions, {len(rewards)} rewards, {len(terminations)} terminations, {len(truncations)} truncations"
            raise CorruptDatasetError(f"{episode.name} has {lengths}; they must be equal")
        if steps == 0:
            raise CorruptDatasetError(f"{episode.name} has no steps")
        terminations, truncations = terminations.astype(bool), truncations.astype(bool)
        if len(observations) == steps:
            if terminations[-1]:
                self._count("episodes_without_final_observation")
                observations = np.concatenate([observations, observations[-1:]])
            else:
                self._count("last_steps_dropped_for_want_of_a_next_observation")
                steps -= 1
                if steps == 0:
                    self._count("episodes_dropped")
                    return
                truncations = truncations.copy()
                truncations[steps - 1] = True
        elif len(observations) != steps + 1:
            raise CorruptDatasetError(
                f"{episode.name} has {len(observations)} observations for {steps} actions; {steps + 1} expected"
            )
        if not (terminations[steps - 1] or truncations[steps - 1]):
            self._count("episodes_without_end_flag")
            truncations = truncations.copy()
            truncations[steps - 1] = True
        rows = slice(0, steps)
        # The next observation of step t is observation t + 1; the last observation is never the start of a transition.
        self.writer.add(
            observations[:steps],
            observations[1 : steps + 1],
            actions[rows],
            rewards[rows],
            terminations[rows],
            truncations[rows],
        )

    def add_all(
        self, episodes: Iterable[Episode], source: str, progress: Progress | None = None, total: int = 0
    ) -> None:
        """Write every episode of `source`; `CorruptDatasetError` where nothing usable is left.

        `progress` is called with (rows done, `total` rows) after each episode.
        """
        for episode in episodes:
            self.add(episode)
            if progress is not None:
                progress(self.writer.length, max(total, self.writer.length))
        if self.writer.length == 0:
            raise CorruptDatasetError(f"{source} has no usable episode; a dataset needs at least one transition")
