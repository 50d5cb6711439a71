"""Checkpoints: one folder per step with `state.safetensors` and `checkpoint.json`, complete or not there at all, with checksums inside."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rlkit2.checksums import Damaged, UncheckedWarning, digest, opened, sealed
from rlkit2.errors import RunError, first_line
from rlkit2.files import sync_folder, write_synced, writing
from rlkit2.training.run_files import read_json

FORMAT = 2  # 1 had no checksums
STATE = "state.safetensors"
MEND = "delete {} to continue from the one before"


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to continue as if it had never stopped.

    Attributes:
        step: updates done.
        tensors: the agent's state (`agent.*`), the generators (`generators`) and the metrics of the unfinished interval, all
            with the seed axis in front.
        facts: the rest, as JSON: sizes of the growing files, seeds that stopped, best score.
    """

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def checkpoint_paths(folder: Path) -> dict[int, Path]:
    """Step -> folder of every complete checkpoint, oldest first."""
    found = {int(path.name): path for path in folder.iterdir() if path.name.isdecimal()} if folder.is_dir() else {}
    return dict(sorted(found.items()))


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint beside its final place, wait for the disk, then rename it into place.

    Raises:
        RunError: the disk is full or the folder cannot be written; earlier checkpoints are intact.
    """
    final = folder / f"{checkpoint.step:09d}"
    temporary = folder / f".{final.name}.tmp"
    with writing(final):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
            state = save(tensors)
            write_synced(temporary / STATE, state)
            facts = {"format": FORMAT, "step": checkpoint.step, **checkpoint.facts}
            text = json.dumps(sealed(facts, {STATE: digest(state)}), indent=2)
            write_synced(temporary / "checkpoint.json", text.encode())
            sync_folder(temporary)
            os.replace(temporary, final)
            sync_folder(folder)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint folder onto the CPU, and see that it holds what was written.

    Raises:
        RunError: a file is missing or damaged.
    """
    try:
        facts, digests = opened(read_json(path / "checkpoint.json"))
    except Damaged as error:
        raise RunError(f"{path / 'checkpoint.json'} is damaged: {error}; {MEND.format(path)}") from error
    try:
        data = (path / STATE).read_bytes()
        if digests is not None and digests.get(STATE) != digest(data):
            raise Damaged("it does not have the checksum it was written with")
        tensors = load(data)
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(
            f"{path / STATE} is damaged or cannot be read ({first_line(error)}); {MEND.format(path)}"
        ) from error
    step, version = facts.pop("step", None), facts.pop("format", 1)
    if not isinstance(step, int) or version not in (1, FORMAT) or (digests is None) != (version == 1):
        raise RunError(f"{path / 'checkpoint.json'} is damaged or from a newer rlkit2; {MEND.format(path)}")
    if digests is None:
        warnings.warn(
            f"{path.parent} was written by an older rlkit2, without checksums; it is read unchecked",
            UncheckedWarning,
            stacklevel=2,
        )
    return Checkpoint(step=step, tensors=tensors, facts=facts)


def newest_checkpoint(folder: Path) -> tuple[Checkpoint, dict[int, str]]:
    """The newest checkpoint that is whole, and step -> what is wrong with the newer ones.

    Raises:
        RunError: there is none; the message is about the newest.
    """
    damaged: dict[int, str] = {}
    for step, path in reversed(checkpoint_paths(folder).items()):
        try:
            return load_checkpoint(path), damaged
        except RunError as error:
            damaged[step] = str(error)
    if damaged:
        raise RunError(f"{folder} has no checkpoint that can be read: {next(iter(damaged.values()))}")
    raise RunError(f"{folder.parent} has no checkpoint")


def set_aside(folder: Path, step: int) -> Path:
    """Rename a damaged checkpoint, so that nothing takes it for one."""
    path = checkpoint_paths(folder)[step]
    aside = path.with_name(f"damaged-{path.name}")
    with writing(aside):
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
    return aside


def prune_checkpoints(folder: Path, keep: Collection[int]) -> None:
    """Delete the checkpoints whose step is not in `keep`, and what a killed write left behind."""
    for path in [
        *folder.glob(".*.tmp"),
        *(path for step, path in checkpoint_paths(folder).items() if step not in keep),
    ]:
        shutil.rmtree(path, ignore_errors=True)
