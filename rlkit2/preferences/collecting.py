"""From a dataset and a teacher to a labelled set of pairs, and from files of human labels to one."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.preferences import PreferenceDataset, SegmentIndex, parse_json
from rlkit2.data.spaces import DatasetWarning
from rlkit2.errors import ConfigError, CorruptDatasetError, DatasetNotFoundError
from rlkit2.preferences.inert_pickle import read_inert_pickle
from rlkit2.preferences.samplers import PairModel, sample_pairs
from rlkit2.preferences.teachers import ScriptedTeacher, average_segment_return

MOST_ROUNDS = 50  # rounds of queries before a teacher that skips nearly everything is given up


def collect_preferences(
    dataset: TransitionDataset,
    teacher: ScriptedTeacher,
    count: int,
    *,
    length: int,
    stride: int = 1,
    sampler: str = "uniform",
    model: PairModel | None = None,
    rewards: ArrayLike | None = None,
    seed: int = 0,
) -> PreferenceDataset:
    """Ask a scripted teacher until it has answered `count` queries (skipped ones are replaced).

    Args:
        dataset: where the segments come from.
        teacher: who answers.
        count: labels wanted.
        length, stride: see `SegmentIndex`.
        sampler, model: see `sample_pairs`.
        rewards: `[N]`, what the teacher judges by; None: the dataset's rewards. Advantages `Q - V` of an expert make a teacher that judges
            by regret (Hejna et al. 2024, "Contrastive Preference Learning"), see `advantages`.
        seed: of pairs, noise and mistakes.

    Raises:
        ConfigError: the teacher skips nearly everything, or the reward does not fit.
    """
    values = np.asarray(dataset.rewards if rewards is None else rewards, dtype=np.float64)
    if values.shape != (len(dataset),) or not np.isfinite(values).all():
        raise ConfigError(
            f"the teacher needs one finite reward for each of {len(dataset)} rows, not shape {list(values.shape)}"
        )
    index = SegmentIndex(dataset, length, stride)
    average = average_segment_return(dataset, length, values)
    streams = np.random.SeedSequence(seed)
    pairs: list[torch.Tensor] = []
    labels: list[np.ndarray[Any, np.dtype[np.float64]]] = []
    missing = count
    for _ in range(MOST_ROUNDS):
        pair_seed, label_seed = (int(child.generate_state(1)[0]) for child in streams.spawn(2))
        ids = sample_pairs(
            index, missing, sampler, model=model, seed=pair_seed, labelled=torch.cat(pairs) if pairs else None
        )
        answers = teacher.label(*(values[index.rows(ids[:, k])] for k in (0, 1)), average=average, seed=label_seed)
        pairs.append(ids[torch.from_numpy(answers.kept)])
        labels.append(answers.label_mass[answers.kept])
        missing -= len(pairs[-1])
        if not missing:
            break
    if missing:
        raise ConfigError(
            f"the teacher skipped all but {count - missing} of {MOST_ROUNDS} rounds of queries; lower its skip threshold"
        )
    chosen = torch.cat(pairs)
    source = {**teacher.to_dict(), "sampler": sampler, "seed": seed} | (
        {"rewards": "given"} if rewards is not None else {}
    )
    return PreferenceDataset(
        index.segments[chosen[:, 0]],
        index.segments[chosen[:, 1]],
        torch.from_numpy(np.concatenate(labels)),
        source,
        length=length,
    ).bind(dataset)


def advantages(agent: Any, dataset: TransitionDataset, chunk: int = 1 << 16) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`Q(s, a) - V(s)` of every row under an agent of one seed that has `q` and `value`: what a teacher that judges by regret sums, `[N]`."""
    found = []
    for start in range(0, len(dataset), chunk):
        rows = slice(start, start + chunk)
        observations = dataset.observations[rows]
        difference = agent.q(observations, dataset.actions[rows]) - agent.value(observations)
        found.append(difference.detach().double().reshape(-1).cpu().numpy())
    joined = np.concatenate(found)
    if joined.shape != (len(dataset),):
        raise ConfigError("a teacher judges by one agent: give an agent of one seed")
    return joined


def import_preference_transformer(
    folder: str | Path, dataset: TransitionDataset, *, length: int | None = None
) -> PreferenceDataset:
    """Human labels in the layout of the Preference Transformer repository (Kim et al., ICLR 2023).

    A folder holds `indices_num<N>[_q<H>]` and `indices_2_num<N>[_q<H>]`, the rows at which the first and the second segments start, and
    `label_human` with 0 (first preferred), 1 (second) or -1 (equal). Label i belongs to row i of both; pairs beyond the last label were
    drawn but not judged, and are left out with a `DatasetWarning`. Each may be a pickle of a list or array of numbers, as published
    (read without executing anything), or have a name ending in `.npy` or `.json`.

    Args:
        folder: where the files are.
        dataset: the dataset the rows count in; no segment may leave its episode.
        length: steps of a segment; None reads it from `_q<H>` in the names.

    Raises:
        DatasetNotFoundError: a file is missing.
        ConfigError: unknown length, more labels than pairs, unequal counts of starts, an unknown label, or a segment outside its episode.
        DatasetError: a file holds anything but numbers.
    """
    files = {file.name: file for file in sorted(Path(folder).glob("*")) if file.is_file()}
    found = {}
    for part, pattern in (("first", r"indices_num"), ("second", r"indices_2_num"), ("label", r"label_human")):
        names = [name for name in files if re.match(pattern, name)]
        if len(names) != 1:
            raise DatasetNotFoundError(f"{folder} has {len(names)} files named {pattern}*; one is expected")
        found[part] = files[names[0]]
    if length is None:
        match = re.search(r"_q(\d+)", found["first"].name)
        if match is None:
            raise ConfigError(
                f"{found['first'].name} does not say how long the segments are; give length (100 in the published MuJoCo sets)"
            )
        length = int(match[1])
    first, second, label = (_numbers(found[part]) for part in ("first", "second", "label"))
    if len(first) != len(second) or len(first) < len(label):
        raise ConfigError(
            f"{folder} has {len(first)} first starts, {len(second)} second starts and {len(label)} labels; "
            "every label needs a first and a second start, and there must be as many first starts as second ones"
        )
    if len(first) > len(label):  # published for hopper and walker2d: 100 pairs labelled of 500 or 1000 drawn
        warnings.warn(
            f"{folder} has {len(first)} pairs and {len(label)} labels; as its authors do, label i is paired with row i and the other "
            f"{len(first) - len(label)} pairs are left out",
            DatasetWarning,
            stacklevel=2,
        )
        first, second = first[: len(label)], second[: len(label)]
    unknown = sorted(set(label.tolist()) - {-1, 0, 1})
    if unknown:
        raise ConfigError(f"{found['label']} has label {unknown[0]}; known are 0 (first), 1 (second) and -1 (equal)")
    mass = torch.from_numpy(np.where(label == -1, 0.5, label))
    source = {"people": Path(folder).name}
    return PreferenceDataset.from_starts(
        dataset, torch.from_numpy(first), torch.from_numpy(second), mass, source, length=length
    )


def _numbers(file: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    if file.suffix == ".npy":
        values: Any = np.load(file, allow_pickle=False)
    elif file.suffix == ".json":
        try:
            values = parse_json(file.read_bytes())
        except ValueError as error:
            raise CorruptDatasetError(f"{file} is not JSON ({error})") from error
    else:
        values = read_inert_pickle(file)
    array = np.asarray(values)
    with np.errstate(invalid="ignore"):  # the cast of what is not a number, which the comparison finds
        whole = array.dtype.kind in "iuf" and array.ndim == 1 and bool((array == array.astype(np.int64)).all())
    if not whole:
        raise ConfigError(
            f"{file} holds {array.dtype} of shape {list(array.shape)}; a list of whole numbers is expected"
        )
    return array.astype(np.int64)
