"""`TransitionDataset`: aligned transitions of whole episodes, and everything one does with them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from rlkit2.data.batch import Batch, LookaheadBatch, RowBatch
from rlkit2.data.episodes import check_bounds, check_whole
from rlkit2.data.flags import as_flags
from rlkit2.data.infer import Request, SpaceLike, infer_spaces, parse_space
from rlkit2.data.notes import say_notes
from rlkit2.data.records import FIELDS, OBSERVATIONS, MemoryWriter, Records
from rlkit2.data.returns import discounted_returns
from rlkit2.data.spaces import action_bounds, action_layout, observation_bounds
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import ConfigError, DatasetError


@dataclass(frozen=True)
class Lookahead:
    """What batches tell of the steps after their own; see `TransitionDataset.looking_ahead`."""

    num_steps: int = 1
    discount: float = 1.0
    next_actions: bool = False
    episodes: bool = False


@dataclass(frozen=True, eq=False)
class TransitionDataset:
    """Aligned transitions `(s, a, r, s')` of E whole episodes, N rows in all, in raw environment units.

    Tensors (views where possible): `observations`, `next_observations` `[N, obs]` float32 (uint8 images keep dtype and shape), `actions` `[N, act]`
    float32 or int64 `[N]` (`[N, act]` for several discrete choices), `rewards` `[N]` float32, `terminations`, `truncations` `[N]` bool, and
    `episode_starts` `[E + 1]` int64, the row of each episode's first step and N. Records may be memory-mapped; a dataset is never changed
    in place: `select`, `split`, `stacked`, `with_rewards` and `looking_ahead` give new ones that share the records.
    """

    records: Records
    episode_starts: Tensor
    spec: DatasetSpec
    rows: Tensor | None = None
    new_rewards: Tensor | None = None
    stack: int = 1
    lookahead: Lookahead = Lookahead()

    def __len__(self) -> int:
        return len(self.records) if self.rows is None else len(self.rows)

    def __repr__(self) -> str:
        return f"TransitionDataset({self.spec.id!r}, {len(self)} transitions in {self.num_episodes} episodes, device {self.device})"

    def _field(self, name: str) -> Tensor:
        if self.stack > 1 and name in OBSERVATIONS:
            return self._fields(torch.arange(len(self), device=self.device))[name]
        if self.rows is None:
            return self.records.view(name)
        return self.records.views(self.records.gather(self.rows), (name,))[name]

    @cached_property
    def observations(self) -> Tensor:
        """`s_t`, `[N, obs]`."""
        return self._field("observations")

    @cached_property
    def next_observations(self) -> Tensor:
        """`s_{t+1}`, `[N, obs]`; for the last step of an episode the observation after its last action."""
        return self._field("next_observations")

    @cached_property
    def actions(self) -> Tensor:
        """`a_t`: `[N, act]` float32, or int64 for discrete actions, as the environment takes them (a Discrete `start` is kept)."""
        return self._field("actions")

    @cached_property
    def rewards(self) -> Tensor:
        """`r_t`, `[N]` float32."""
        return self._field("rewards") if self.new_rewards is None else self.new_rewards

    @cached_property
    def terminations(self) -> Tensor:
        """Whether the step ended the episode in a terminal state, `[N]` bool: nothing follows, nothing is bootstrapped."""
        return self._field("terminations")

    @cached_property
    def truncations(self) -> Tensor:
        """Whether the step was cut off (time limit or other), `[N]` bool: the next observation still counts."""
        return self._field("truncations")

    @property
    def device(self) -> torch.device:
        """Where the records are."""
        return self.records.words.device

    @property
    def nbytes(self) -> int:
        """Bytes of the dataset's records."""
        return len(self) * self.records.row_bytes

    @property
    def num_episodes(self) -> int:
        """E."""
        return len(self.episode_starts) - 1

    @property
    def episode_lengths(self) -> Tensor:
        """Steps of each episode, `[E]` int64."""
        return self.episode_starts.diff()

    @cached_property
    def episode_returns(self) -> Tensor:
        """Undiscounted return of each episode, `[E]` float64 (summed in float64, returned unrounded)."""
        totals = torch.zeros(len(self) + 1, dtype=torch.float64, device=self.rewards.device)
        torch.cumsum(self.rewards.double(), 0, out=totals[1:])
        return totals[self.episode_starts[1:]] - totals[self.episode_starts[:-1]]

    def episode(self, index: int) -> dict[str, Tensor]:
        """The fields of episode `index` (negative counts from the end), each with T rows; `IndexError` outside."""
        if not -self.num_episodes <= index < self.num_episodes:
            raise IndexError(f"episode {index} of a dataset with {self.num_episodes} episodes")
        index %= self.num_episodes
        rows = slice(int(self.episode_starts[index]), int(self.episode_starts[index + 1]))
        return self._fields(torch.arange(rows.start, rows.stop, device=self.device))

    def sample_indices(self, batch_size: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Rows `[S, batch_size]` int64 drawn uniformly with replacement, row k from `generators[k]` alone.

        They are drawn on the CPU, so that every device sees the same rows.
        """
        rows = [torch.randint(len(self), (1, batch_size), generator=generator) for generator in generators]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def gather(self, indices: Tensor) -> Batch:
        """The transitions at `indices` (any shape `[...]`, normally `[S, B]`) as a `Batch` of fields `[..., *field]`, copied in one gather.

        A `LookaheadBatch` where the dataset is `looking_ahead`.
        """
        if indices.device != self.device:
            indices = indices.to(self.device, non_blocking=True)
        fields = self._fields(indices)
        if self.lookahead == Lookahead():
            return RowBatch(**fields, rows=indices)
        return LookaheadBatch(**fields | self._ahead(indices), rows=indices)

    def _fields(self, indices: Tensor) -> dict[str, Tensor]:
        """The fields of single steps."""
        fields = self.records.views(self._words(indices))
        if self.stack > 1:
            fields |= self._stacks(indices, fields)
        if self.new_rewards is not None:
            fields["rewards"] = self.new_rewards[indices]
        return fields

    def _ahead(self, indices: Tensor) -> dict[str, Any]:
        """What replaces the fields of single steps, and comes to them, by `lookahead`."""
        found: dict[str, Any] = {}
        last = indices
        if self.lookahead.num_steps > 1:
            last = self._last_rows[indices]
            end = self._fields(last)
            found = {name: end[name] for name in ("next_observations", "terminations", "truncations")}
            found |= {"rewards": self._returns_ahead[indices], "steps": last - indices + 1}
            found["discount"] = self.lookahead.discount
        if self.lookahead.next_actions:
            final = self._final_rows[indices]
            after = self._words(torch.minimum(last + 1, final))
            found |= {"next_actions": self.records.views(after, ("actions",))["actions"], "followed": last < final}
        if self.lookahead.episodes:
            final = self._final_rows[indices]
            first = self._piece_starts[torch.searchsorted(self._piece_starts, indices, right=True) - 1]
            end = self._fields(final)
            found |= {
                "returns_to_go": self._returns_to_go[indices],
                "steps_to_go": final - indices + 1,
                "first_returns": self._returns_to_go[first],
                "first_steps": final - first + 1,
                "first_observations": self._fields(first)["observations"],
                "final_observations": end["next_observations"],
                "final_terminations": end["terminations"],
                "discount": self.lookahead.discount,
            }
        return found

    def _words(self, indices: Tensor) -> Tensor:
        return self.records.gather(indices if self.rows is None else self.rows[indices])

    @cached_property
    def _first_rows(self) -> Tensor:
        """The row at which every row's episode starts, `[N]`."""
        return torch.repeat_interleave(self.episode_starts[:-1], self.episode_lengths)

    @cached_property
    def _final_rows(self) -> Tensor:
        """The first row at or after every row at which an episode ends or a flag says so, `[N]`."""
        ends = self.terminations | self.truncations
        ends[self.episode_starts[1:] - 1] = True
        rows = ends.nonzero().squeeze(1)
        return rows[torch.searchsorted(rows, torch.arange(len(self), device=self.device))]

    @property
    def steps_to_go(self) -> Tensor:
        """The steps from every row to the end of its episode, or to the first flag that says so, itself included, `[N]` int64."""
        return self._final_rows - torch.arange(len(self), device=self.device) + 1

    @cached_property
    def _piece_starts(self) -> Tensor:
        """The rows after an end of `_final_rows`, and row 0: where an episode begins, or what follows a flag in its middle."""
        ends = torch.unique_consecutive(self._final_rows)
        return torch.cat([ends.new_zeros(1), ends[:-1] + 1])

    @cached_property
    def _returns_to_go(self) -> Tensor:
        """Discounted rewards from every row to its final row, `[N]` (summed in float64)."""
        borders = torch.cat([self._piece_starts, self._piece_starts.new_tensor([len(self)])])
        found = discounted_returns(self.rewards, borders, self.lookahead.discount)
        return found.to(self.rewards)

    @cached_property
    def _last_rows(self) -> Tensor:
        """The last row of the steps ahead of every row, `[N]`."""
        here = torch.arange(len(self), device=self.device)
        return torch.minimum(here + self.lookahead.num_steps - 1, self._final_rows)

    @cached_property
    def _returns_ahead(self) -> Tensor:
        """Discounted rewards of the steps ahead of every row, `[N]` (summed in float64)."""
        here, rewards = torch.arange(len(self), device=self.device), self.rewards.double()
        total = torch.zeros_like(rewards)
        for j in range(min(self.lookahead.num_steps, int(self.episode_lengths.max()))):
            row = here + j
            factor = self.lookahead.discount**j * (row <= self._last_rows)
            total += factor * rewards[row.clamp(max=len(self) - 1)]
        return total.to(self.rewards.dtype)

    def _stacks(self, indices: Tensor, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        """The last observations up to those of `fields`, as one each; those before an episode's first are its first."""
        first, seen = self._first_rows[indices], []
        for lag in range(self.stack - 1, 0, -1):
            words = self._words(torch.maximum(indices - lag, first))
            seen.append(self.records.views(words, ("observations",))["observations"])
        now, after = fields["observations"], fields["next_observations"]

        def joined(steps: list[Tensor]) -> Tensor:
            frames = torch.stack([step.reshape(*indices.shape, -1) for step in steps], -2)
            return self.spec.flattener.joined(frames)

        return {"observations": joined([*seen, now]), "next_observations": joined([*seen[1:], now, after])}

    def sample(
        self, batch_size: int, *, seeds: int = 1, generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> Batch:
        """An independent uniform minibatch for each of S seeds: fields `[S, batch_size, ...]`.

        `generator`: a sequence of S generators gives every seed its own stream (seed k draws the same rows alone or with others); a single
        one is used for all seeds in turn; None uses torch's global generator. Raises `ValueError` when their number is not `seeds`.
        """
        if isinstance(generator, Sequence):
            if seeds not in (1, len(generator)):
                raise ValueError(f"{len(generator)} generators for {seeds} seeds; give one per seed")
            return self.gather(self.sample_indices(batch_size, generator))
        return self.gather(torch.randint(len(self), (seeds, batch_size), generator=generator))

    def to(self, device: torch.device | str) -> TransitionDataset:
        """The dataset in the memory of `device` (a selection is copied out of its records)."""
        if torch.device(device) == self.device:
            return self
        records = self.records
        if self.rows is not None:
            records = replace(records, words=records.gather(self.rows), checks=None)
        return replace(
            self,
            records=records.to(device),
            episode_starts=self.episode_starts.to(device),
            rows=None,
            new_rewards=None if self.new_rewards is None else self.new_rewards.to(device),
        )

    def _derived(self, *what: bytes) -> DatasetSpec:
        """The specification of a dataset made from this one: a new content hash, so that a run knows what it was trained on."""
        return replace(
            self.spec, content_hash=hashlib.sha256(b"".join([self.spec.content_hash.encode(), *what])).hexdigest()
        )

    def select(self, episodes: ArrayLike | Tensor) -> TransitionDataset:
        """The given episodes (indices `[K]`, or a bool mask `[E]`), in the given order, sharing the records.

        Raises `DatasetError` for an empty selection, `IndexError` for an episode that does not exist.
        """
        chosen = torch.as_tensor(np.asarray(episodes) if not isinstance(episodes, Tensor) else episodes)
        if chosen.dtype == torch.bool:
            if len(chosen) != self.num_episodes:
                raise DatasetError(f"episode mask has {len(chosen)} entries for {self.num_episodes} episodes")
            chosen = chosen.nonzero().squeeze(1)
        if chosen.numel() == 0:
            raise DatasetError(f"no episode of {self.spec.id} is selected")
        chosen = chosen.reshape(-1).to(torch.int64)
        if int(chosen.min()) < -self.num_episodes or int(chosen.max()) >= self.num_episodes:
            raise IndexError(
                f"episodes {int(chosen.min())}..{int(chosen.max())} of a dataset with {self.num_episodes} episodes"
            )
        chosen = chosen % self.num_episodes
        lengths = self.episode_lengths[chosen]
        starts = torch.zeros(len(chosen) + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, out=starts[1:])
        rows = torch.arange(int(starts[-1])) + torch.repeat_interleave(
            self.episode_starts[:-1][chosen] - starts[:-1], lengths
        )
        return replace(
            self,
            episode_starts=starts,
            spec=self._derived(b"select", chosen.numpy().tobytes()),
            rows=rows if self.rows is None else self.rows[rows],
            new_rewards=None if self.new_rewards is None else self.new_rewards[rows],
        )

    def split(self, fraction: float, *, seed: int = 0) -> tuple[TransitionDataset, TransitionDataset]:
        """Split by whole episodes into `(train, held_out)`; `fraction` in (0, 1) is the held-out share of the episodes.

        Both parts have at least one episode; `DatasetError` where the dataset has a single one.
        """
        if not 0 < fraction < 1:
            raise DatasetError(f"held-out fraction {fraction} is not between 0 and 1")
        if self.num_episodes < 2:
            raise DatasetError(f"{self.spec.id} has one episode; a split by episode needs two")
        count = min(max(round(fraction * self.num_episodes), 1), self.num_episodes - 1)
        order = torch.randperm(self.num_episodes, generator=torch.Generator().manual_seed(seed))
        return self.select(order[count:].sort().values), self.select(order[:count].sort().values)

    def stacked(self, count: int) -> TransitionDataset:
        """The same transitions with the last `count` observations as one, oldest first; the first of an episode stands for what came before it.

        They are put together as batches are drawn, so nothing is stored twice, and are what `gymnasium.wrappers.FrameStackObservation` shows.
        Raises `DatasetError` for a stack of stacks or observations that cannot be stacked.
        """
        if count == 1:
            return self
        return replace(
            self,
            spec=replace(self.spec.stacked(count), content_hash=self._derived(b"stack", bytes([count])).content_hash),
            stack=count,
        )

    def looking_ahead(
        self, num_steps: int = 1, discount: float = 1.0, *, next_actions: bool = False, episodes: bool = False
    ) -> TransitionDataset:
        """The same transitions, whose batches are `LookaheadBatch`es: the fields of the dataset itself stay those of single steps.

        Args:
            num_steps: returns of up to so many steps, never across the end of an episode; the steps between are those of the data's policy.
            discount: of those returns, in [0, 1]; the agent's own.
            next_actions: batches hold the data's own next actions.
            episodes: batches hold what their episodes earned from each row, and from their first, to the end.

        Raises:
            DatasetError: a number out of range.
        """
        if num_steps < 1 or not 0.0 <= discount <= 1.0:
            raise DatasetError(f"num_steps {num_steps} must be at least 1 and discount {discount} between 0 and 1")
        used = float(discount) if num_steps > 1 or episodes else 1.0
        return replace(self, lookahead=Lookahead(num_steps, used, next_actions, episodes))

    def with_rewards(self, rewards: ArrayLike | Tensor) -> TransitionDataset:
        """The same transitions with other rewards `[N]` (finite; stored as float32); records are shared."""
        values = (
            torch.as_tensor(rewards if isinstance(rewards, Tensor) else np.asarray(rewards))
            .detach()
            .to(self.device, torch.float32)
        )
        if values.shape != (len(self),):
            raise DatasetError(
                f"rewards of shape {tuple(values.shape)} for {len(self)} transitions; give one per transition"
            )
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            raise DatasetError(f"reward {int(bad[0])} is {float(values[bad[0]])}; rewards must be finite")
        values = values.clone()
        return replace(self, spec=self._derived(b"rewards", values.cpu().numpy().tobytes()), new_rewards=values)

    def segment_starts(self, length: int, stride: int = 1) -> Tensor:
        """Rows `[K]` int64 at which a window of `length` consecutive steps starts that stays inside one episode, every `stride` steps.

        `DatasetError` where no episode is long enough.
        """
        if length < 1 or stride < 1:
            raise DatasetError(f"segment length {length} and stride {stride} must be positive")
        counts = torch.clamp((self.episode_lengths - length) // stride + 1, min=0)
        if int(counts.sum()) == 0:
            raise DatasetError(
                f"no episode of {self.spec.id} has {length} steps; the longest has {int(self.episode_lengths.max())}"
            )
        first = torch.repeat_interleave(torch.cumsum(counts, 0) - counts, counts)
        offset = (torch.arange(int(counts.sum()), device=counts.device) - first) * stride
        return torch.repeat_interleave(self.episode_starts[:-1], counts) + offset

    def segments(self, length: int, stride: int = 1) -> Tensor:
        """Row indices `[K, length]` of every window of `length` consecutive steps that stays inside one episode, starting every `stride` steps.

        Index any field with it: `dataset.rewards[dataset.segments(50)]` is `[K, 50]`. `DatasetError` where no episode is long enough.
        """
        starts = self.segment_starts(length, stride)
        return starts[:, None] + torch.arange(length, device=starts.device)

    def to_minari(self, dataset_id: str, **metadata: Any) -> Any:
        """Write the dataset as a Minari dataset `dataset_id` and return the `minari.MinariDataset`; see `rlkit2.data.export.to_minari`."""
        from rlkit2.data.export import to_minari

        if self.stack > 1:
            raise DatasetError(
                f"{self.spec.id} is seen in stacks of {self.stack}; write the dataset that they were made from"
            )
        return to_minari(self, dataset_id, **metadata)


def spec_of_arrays(
    observations: NDArray[Any],
    actions: NDArray[Any],
    observation_space: SpaceLike | None = None,
    action_space: SpaceLike | None = None,
) -> DatasetSpec:
    """The given spaces, or those that plain arrays allow, as `rlkit2.data.infer` has them; noted as inferred."""

    def request(given: SpaceLike | None) -> Request | None:
        if given is None or isinstance(given, str):
            return None if given is None else parse_space(given)
        return lambda seen: given

    found = infer_spaces([(observations, actions)], request(observation_space), request(action_space))
    notes = {} if action_space is not None else {"action_spaces_inferred": 1}
    return DatasetSpec(observation_space=found[0], action_space=found[1], id="arrays", notes=notes)


def dataset_from_arrays(
    observations: ArrayLike | Tensor,
    actions: ArrayLike | Tensor,
    rewards: ArrayLike | Tensor,
    next_observations: ArrayLike | Tensor,
    terminations: ArrayLike | Tensor,
    truncations: ArrayLike | Tensor,
    spec: DatasetSpec | None = None,
    *,
    observation_space: SpaceLike | None = None,
    action_space: SpaceLike | None = None,
) -> TransitionDataset:
    """A dataset in memory from aligned arrays: `observations`, `next_observations` `[N, ...]`, `actions` `[N, act]` or integer `[N]`, the rest `[N]`.

    An episode ends where either flag is true; a last episode without a flag counts as truncated. `spec` gives the spaces and the environment, or
    `observation_space` and `action_space` a space each (`"box(-2,2)"`, `"discrete"`); what nobody gives is inferred from the values, with a notice.
    Raises `DatasetError` for no rows, unequal lengths, shapes or values that do not fit the spaces, or flags that are not 0 or 1.
    """
    if spec is not None and not (observation_space is None and action_space is None):
        raise ConfigError("give spec, which holds the spaces, or observation_space and action_space")
    given = dict(
        zip(FIELDS, (observations, next_observations, actions, rewards, terminations, truncations), strict=True)
    )
    arrays = {
        name: value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        for name, value in given.items()
    }
    lengths = {name: len(value) if value.ndim else -1 for name, value in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise DatasetError(
            f"arrays have unequal lengths: {', '.join(f'{name} {length}' for name, length in lengths.items())}"
        )
    total = lengths["rewards"]
    if total == 0:
        raise DatasetError("arrays have no rows; a dataset needs at least one transition")
    for name in ("rewards", "terminations", "truncations"):
        if arrays[name].size != total:
            raise DatasetError(f"{name} have shape {arrays[name].shape}; expected [{total}]")
        arrays[name] = arrays[name].reshape(total)
    if arrays["observations"].shape != arrays["next_observations"].shape:
        raise DatasetError(
            f"observations {arrays['observations'].shape} and next_observations {arrays['next_observations'].shape} differ in shape"
        )
    spec = spec or spec_of_arrays(arrays["observations"], arrays["actions"], observation_space, action_space)
    _check_spaces(arrays, spec, observation_space is not None, action_space is not None)
    dataset = pack_arrays(arrays, spec)
    say_notes(dataset.spec)
    return dataset


def _check_spaces(
    arrays: Mapping[str, NDArray[Any]], spec: DatasetSpec, observations_given: bool, actions_given: bool
) -> None:
    """Raise `DatasetError` for values outside a given space."""
    if actions_given:
        check_whole(spec.id, arrays["actions"], spec.action_space)
        actions = action_layout(spec.action_space).flatten(arrays["actions"])
        check_bounds(spec.id, "action", actions, spec.action_space, *action_bounds(spec.action_space))
    if observations_given:
        bounds = observation_bounds(spec.flattener)
        check_bounds(spec.id, "observation", arrays["observations"], spec.observation_space, *bounds)


def pack_arrays(arrays: Mapping[str, NDArray[Any]], spec: DatasetSpec) -> TransitionDataset:
    """Pack aligned arrays (already checked for equal lengths) into records, one episode after the other."""
    flat = spec.flattener
    actions = action_layout(spec.action_space)
    total = len(arrays["rewards"])
    try:
        observations, next_observations = (
            np.asarray(arrays[name]).reshape(total, *flat.shape) for name in ("observations", "next_observations")
        )
    except ValueError as error:
        raise DatasetError(
            f"observations of shape {np.asarray(arrays['observations']).shape} do not fit the observation space {spec.observation_space}"
        ) from error
    flattened_actions = actions.flatten(arrays["actions"])
    truncations = as_flags(arrays["truncations"], "truncations").copy()
    terminations = as_flags(arrays["terminations"], "terminations").copy()
    notes = dict(spec.notes)
    if not (terminations[-1] or truncations[-1]):
        truncations[-1] = True
        notes["episodes_without_end_flag"] = notes.get("episodes_without_end_flag", 0) + 1
    ends = (np.flatnonzero(terminations | truncations) + 1).tolist()

    writer = MemoryWriter(spec.record_dtype, spec.layout)
    for start, stop in zip([0, *ends[:-1]], ends, strict=True):
        rows = slice(start, stop)
        writer.add(
            observations[rows],
            next_observations[rows],
            flattened_actions[rows],
            arrays["rewards"][rows],
            terminations[rows],
            truncations[rows],
        )
    packed = writer.finish()
    if packed.non_finite:
        notes["non_finite_values"] = packed.non_finite
    return TransitionDataset(
        writer.records(),
        torch.from_numpy(packed.episode_starts),
        replace(spec, content_hash=packed.content_hash, notes=notes),
    )
