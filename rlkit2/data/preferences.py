"""Preferences between trajectory segments of one dataset: indices and labels, on disk and as minibatches.

A segment is `(episode, step)`, the place where `length` consecutive steps of one episode begin; nothing is copied out of the dataset.
`label_mass` is the probability that the SECOND segment of a pair is preferred: 0 and 1 are clear choices, 0.5 is a tie.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import ArrayLike
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rlkit2.data.batch import Batch
from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import ConfigError, CorruptDatasetError, DatasetError, DatasetNotFoundError
from rlkit2.files import make_folder, write_atomically, write_json, writing

FORMAT = 1
JSON_FILE = "preferences.json"


class SegmentIndex:
    """Every segment of `length` steps of a dataset that stays inside one episode.

    Args:
        dataset: where the segments are.
        length: steps H of a segment.
        stride: steps between the starts of neighbouring segments; each episode's first start is its first step.

    Attributes:
        segments: `[K, 2]` int64, (episode, step of the episode) of every start, in the dataset's order. The last possible start of an
            episode counts (B-Pref's sampler leaves it out).
        starts: `[K]` int64, the dataset's rows of the starts.

    Raises:
        DatasetError: no episode has `length` steps.
    """

    def __init__(self, dataset: TransitionDataset, length: int, stride: int = 1) -> None:
        self.dataset, self.length, self.stride = dataset, length, stride
        self.starts = dataset.segment_starts(length, stride).cpu()
        firsts = dataset.episode_starts.cpu()
        episodes = torch.searchsorted(firsts, self.starts, right=True) - 1
        self.segments = torch.stack([episodes, self.starts - firsts[episodes]], 1)

    def __len__(self) -> int:
        return len(self.starts)

    def rows(self, which: Tensor | None = None) -> Tensor:
        """The dataset's rows of the segments `which` (indices `[...]`; None: all): `[..., H]`."""
        starts = self.starts if which is None else self.starts[which]
        return starts[..., None] + torch.arange(self.length)


@dataclass(frozen=True, eq=False)
class PreferenceDataset:
    """P labelled pairs of segments of one dataset.

    Attributes:
        segments_w, segments_l: `[P, 2]` int64, (episode, step) of the first and of the second segment; the letters say which is the
            chosen and which the rejected one where `label_mass` is 0.
        label_mass: `[P]` float64 in [0, 1], the probability that the second is preferred.
        source: where the labels come from (teacher, person, file), any JSON value.
        length: steps of every segment.
        dataset_id, dataset_hash: the dataset, and a hash of its transitions without the rewards (`transitions_hash`), so that labels stay
            valid for a relabelled dataset and for no other one; empty: not bound to a dataset yet (`bind`).

    Raises:
        ConfigError: shapes that do not fit, or a label outside [0, 1].
    """

    segments_w: Tensor
    segments_l: Tensor
    label_mass: Tensor
    source: Any = "unknown"
    length: int = field(kw_only=True)
    dataset_id: str = field(default="", kw_only=True)
    dataset_hash: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        for name, dtype in (("segments_w", torch.int64), ("segments_l", torch.int64), ("label_mass", torch.float64)):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name)).detach().cpu().to(dtype))
        count = self.label_mass.numel()
        for name, shape in (("segments_w", (count, 2)), ("segments_l", (count, 2)), ("label_mass", (count,))):
            if tuple(getattr(self, name).shape) != shape:
                raise ConfigError(
                    f"{name} has shape {list(getattr(self, name).shape)} for {count} labels; expected {list(shape)}"
                )
        bad = (~((self.label_mass >= 0) & (self.label_mass <= 1))).nonzero()
        if len(bad):
            raise ConfigError(
                f"label {int(bad[0])} is {float(self.label_mass[bad[0]]):g}, not the probability in [0, 1] that the second segment is preferred"
            )
        if self.length < 1:
            raise ConfigError(f"segment length {self.length} must be at least 1")

    def __len__(self) -> int:
        return len(self.label_mass)

    def __repr__(self) -> str:
        return f"PreferenceDataset({len(self)} pairs of {self.length} steps of {self.dataset_id!r}, {int(self.ties.sum())} ties)"

    @property
    def ties(self) -> Tensor:
        """Which labels prefer neither segment, `[P]` bool."""
        return self.label_mass == 0.5

    @classmethod
    def from_rows(
        cls, dataset: TransitionDataset, rows_w: ArrayLike, rows_l: ArrayLike, label_mass: ArrayLike, source: Any
    ) -> PreferenceDataset:
        """Pairs given as windows of the dataset's rows, `[P, H]` each (as `TransitionDataset.segments` returns them).

        Raises:
            ConfigError: the two sides differ in length, or a window leaves its episode.
        """
        windows = [torch.as_tensor(rows, dtype=torch.int64) for rows in (rows_w, rows_l)]
        lengths = [rows.shape[-1] for rows in windows]
        if lengths[0] != lengths[1]:
            raise ConfigError(
                f"segments have {lengths[0]} and {lengths[1]} steps: returns are comparable at equal lengths only, cut both to one length"
            )
        for side, rows in zip(("first", "second"), windows, strict=True):
            broken = (rows.diff(dim=1) != 1).any(1).nonzero()
            if len(broken):
                raise ConfigError(f"the {side} segment of pair {int(broken[0])} is not a run of consecutive rows")
        return cls.from_starts(dataset, windows[0][:, 0], windows[1][:, 0], label_mass, source, length=lengths[0])

    @classmethod
    def from_starts(
        cls,
        dataset: TransitionDataset,
        starts_w: Tensor,
        starts_l: Tensor,
        label_mass: ArrayLike,
        source: Any,
        *,
        length: int,
    ) -> PreferenceDataset:
        """Pairs given by the dataset's rows `[P]` at which their segments start; bound to the dataset and checked."""
        firsts = dataset.episode_starts.cpu()
        sides = []
        for side, starts in (("first", starts_w), ("second", starts_l)):
            outside = ((starts < 0) | (starts >= len(dataset))).nonzero()
            if len(outside):
                raise ConfigError(
                    f"the {side} segment of pair {int(outside[0])} starts at row {int(starts[outside[0]])} of {len(dataset)} in {dataset.spec.id}"
                )
            episodes = torch.searchsorted(firsts, starts.contiguous(), right=True) - 1
            sides.append(torch.stack([episodes, starts - firsts[episodes]], 1))
        first, second = sides
        return cls(first, second, torch.as_tensor(label_mass), source, length=length).bind(dataset)

    def bind(self, dataset: TransitionDataset) -> PreferenceDataset:
        """The same labels, tied to `dataset`; raises `DatasetError` where a segment is not inside one of its episodes."""
        bound = replace(self, dataset_id=dataset.spec.id, dataset_hash=transitions_hash(dataset))
        bound.rows(dataset)
        return bound

    def rows(self, dataset: TransitionDataset) -> tuple[Tensor, Tensor]:
        """The dataset's rows of the first and of the second segments, `[P, H]` each.

        Raises:
            DatasetError: the labels belong to another dataset, or to this one before it changed.
        """
        if self.dataset_hash and self.dataset_hash != transitions_hash(dataset):
            raise DatasetError(
                f"these labels belong to {self.dataset_id} with transitions {self.dataset_hash[:12]}, not to {dataset.spec.id} as given "
                f"({transitions_hash(dataset)[:12]}); load the dataset they were made for, or label again"
            )
        lengths, firsts = dataset.episode_lengths.cpu(), dataset.episode_starts.cpu()
        found = []
        for side, segments in (("first", self.segments_w), ("second", self.segments_l)):
            episode, step = segments.unbind(1)
            known = (episode >= 0) & (episode < dataset.num_episodes) & (step >= 0)
            fits = known & (step + self.length <= lengths[episode.clamp(0, dataset.num_episodes - 1)])
            bad = (~fits).nonzero()
            if len(bad):
                place = f"episode {int(episode[bad[0]])}, step {int(step[bad[0]])}"
                raise DatasetError(
                    f"the {side} segment of pair {int(bad[0])} ({place}, {self.length} steps) is not inside an episode of {dataset.spec.id}"
                )
            found.append((firsts[episode] + step)[:, None] + torch.arange(self.length))
        return found[0], found[1]

    def select(self, which: ArrayLike | Tensor) -> PreferenceDataset:
        """Some of the pairs: indices `[K]`, or a mask `[P]`."""
        chosen = torch.as_tensor(which)
        return replace(
            self,
            segments_w=self.segments_w[chosen],
            segments_l=self.segments_l[chosen],
            label_mass=self.label_mass[chosen],
        )

    def split(self, fraction: float, *, seed: int = 0) -> tuple[PreferenceDataset, PreferenceDataset]:
        """Split at random into `(train, held_out)`, each with at least one pair; `fraction` in (0, 1) is the held-out share."""
        if not 0 < fraction < 1 or len(self) < 2:
            raise ConfigError(
                f"cannot hold out {fraction} of {len(self)} pairs: it takes a share in (0, 1) and two pairs"
            )
        count = min(max(round(fraction * len(self)), 1), len(self) - 1)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.select(order[count:].sort().values), self.select(order[:count].sort().values)

    def extend(self, other: PreferenceDataset) -> PreferenceDataset:
        """These pairs, then those of `other`; `ConfigError` where lengths or datasets differ."""
        if (self.length, self.dataset_hash) != (other.length, other.dataset_hash):
            raise ConfigError(f"{self} and {other} cannot be joined: lengths or datasets differ")
        return replace(
            self,
            segments_w=torch.cat([self.segments_w, other.segments_w]),
            segments_l=torch.cat([self.segments_l, other.segments_l]),
            label_mass=torch.cat([self.label_mass, other.label_mass]),
            source=self.source if self.source == other.source else [self.source, other.source],
        )

    def pairs(self, dataset: TransitionDataset, *, replay: int = 0) -> PreferencePairs:
        """What an agent that learns from preferences trains on; see `PreferencePairs`."""
        return PreferencePairs(dataset, *self.rows(dataset), self.label_mass, replay=replay)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folder `path`: `preferences.json` and the safetensors file it names.

        A kill at any moment leaves the old or the new labels, never a mixture: the tensors get a name of their own, the JSON that names them
        is replaced in one step, and only then older tensors are deleted.

        Raises:
            DatasetError: the folder cannot be written.
        """
        folder = Path(path)
        data = save({name: getattr(self, name).clone() for name in ("segments_w", "segments_l", "label_mass")})
        tensors = f"preferences-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
        description = {
            "format": FORMAT,
            "dataset": self.dataset_id,
            "dataset_hash": self.dataset_hash,
            "length": self.length,
            "pairs": len(self),
            "tensors": tensors,
            "source": self.source,
        }
        make_folder(folder)
        write_atomically(folder / tensors, data)
        write_json(folder / JSON_FILE, description)
        with writing(folder):
            for old in folder.glob("preferences-*.safetensors"):
                if old.name != tensors:
                    old.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PreferenceDataset:
        """Read what `save` wrote.

        Raises:
            DatasetNotFoundError: no labels there.
            CorruptDatasetError: damaged files.
        """
        folder = Path(path)
        try:
            description = parse_json((folder / JSON_FILE).read_bytes())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DatasetNotFoundError(
                f"no labels in {folder}: {JSON_FILE} is missing; make some with: rlkit2 prefs label"
            ) from error
        except (OSError, ValueError) as error:
            raise CorruptDatasetError(f"{folder / JSON_FILE} cannot be read ({error})") from error
        if not isinstance(description, dict) or description.get("format") != FORMAT:
            raise CorruptDatasetError(f"{folder / JSON_FILE} is not in format {FORMAT} of this version; upgrade rlkit2")
        try:
            tensors = load((folder / Path(description["tensors"]).name).read_bytes())
            return cls(
                **tensors,
                source=description["source"],
                length=description["length"],
                dataset_id=description["dataset"],
                dataset_hash=description["dataset_hash"],
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CorruptDatasetError(f"the labels in {folder} are damaged ({error})") from error


def transitions_hash(dataset: TransitionDataset) -> str:
    """SHA-256 of what a dataset shows (episodes, observations, actions, flags) without its rewards, which a preference does not see."""
    cached: str | None = dataset.__dict__.get("_transitions_hash")
    if cached is None:
        digest = hashlib.sha256()
        last = dataset.episode_starts[1:] - 1  # the only next observations that are not the observation of the next row
        for tensor in (
            dataset.episode_starts,
            dataset.observations,
            dataset.next_observations[last],
            dataset.actions,
            dataset.terminations,
        ):
            digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor.cpu().contiguous().numpy().data)
        cached = dataset.__dict__["_transitions_hash"] = digest.hexdigest()
    return cached


@dataclass(frozen=True, kw_only=True)
class PreferenceBatch:
    """One minibatch of pairs for every seed, in raw environment units.

    Attributes:
        segments: fields `[S, B, 2, H, ...]`, the first and the second segment of every pair.
        label_mass: `[S, B]` float32, probability that the second is preferred.
        transitions: fields `[S, B * replay, ...]` drawn from the whole dataset; None without replay.
    """

    segments: Batch
    label_mass: Tensor
    transitions: Batch | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PreferenceBatch:
        """The same batch on `device`."""
        moved = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if (value := getattr(self, f.name)) is not None
        }
        return PreferenceBatch(**moved)


class PreferencePairs:
    """P labelled pairs as a trainer sees a dataset: rows are drawn by `sample_indices` and turned into minibatches by `gather`.

    With `replay` every row is a pair together with `replay` transitions of the dataset: row `i` stands for pair `i % P` and the transitions
    `i // P + k N / replay` (modulo N), so that rows drawn uniformly give pairs and transitions that are both uniform and independent of
    each other, from the one stream of numbers a seed has.

    Args:
        dataset: where the segments are.
        rows_w, rows_l: `[P, H]`.
        label_mass: `[P]`.
        replay: transitions beside every pair.
    """

    def __init__(
        self, dataset: TransitionDataset, rows_w: Tensor, rows_l: Tensor, label_mass: Tensor, *, replay: int = 0
    ) -> None:
        self.dataset, self.replay = dataset, replay
        self.windows = torch.stack([rows_w, rows_l], 1).to(dataset.device)  # [P, 2, H]
        self.label_mass = label_mass.to(dataset.device, torch.float32)
        self.shifts = torch.arange(replay, device=dataset.device) * len(dataset) // max(replay, 1)

    def __len__(self) -> int:
        return len(self.label_mass) * (len(self.dataset) if self.replay else 1)

    @property
    def spec(self) -> DatasetSpec:
        """The specification of the dataset."""
        return self.dataset.spec

    @property
    def device(self) -> torch.device:
        """Where the dataset is."""
        return self.dataset.device

    @property
    def nbytes(self) -> int:
        """Bytes of the dataset's records."""
        return self.dataset.nbytes

    @property
    def observations(self) -> Tensor:
        """Observations `[N, obs]` of the dataset (for their statistics)."""
        return self.dataset.observations

    def to(self, device: torch.device | str) -> PreferencePairs:
        """The same pairs with the dataset in the memory of `device`."""
        first, second = self.windows.unbind(1)
        return PreferencePairs(self.dataset.to(device), first, second, self.label_mass, replay=self.replay)

    def sample_indices(self, batch_size: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Rows `[S, batch_size]`, each seed's from its own generator, drawn on the CPU."""
        return torch.cat([torch.randint(len(self), (1, batch_size), generator=generator) for generator in generators])

    def gather(self, indices: Tensor) -> PreferenceBatch:
        """The pairs (and transitions) of rows `[S, B]`."""
        indices = indices.to(self.device)
        pairs = indices % len(self.label_mass)
        transitions = None
        if self.replay:
            rows = (indices // len(self.label_mass))[..., None] + self.shifts
            transitions = self.dataset.gather((rows % len(self.dataset)).flatten(1))
        return PreferenceBatch(
            segments=self.dataset.gather(self.windows[pairs]),
            label_mass=self.label_mass[pairs],
            transitions=transitions,
        )


def describe(source: Any) -> str:
    """A source in a few words, for tables."""
    if isinstance(source, Mapping):
        return ", ".join(f"{key} {value}" for key, value in source.items())
    return str(source)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text that somebody else may have written.

    Raises:
        ValueError: not JSON as its standard has it (no NaN or Infinity), or nested too deeply to be read.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON value")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
