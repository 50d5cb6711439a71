"""Checkpoints: one folder per step with `state.safetensors` and `checkpoint.json`, complete or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from rlkit2.errors import RunError
from rlkit2.training.run_files import read_json, sync_folder, write_synced, writing


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
            write_synced(temporary / "state.safetensors", save(tensors))
            facts = {"step": checkpoint.step, **checkpoint.facts}
            write_synced(temporary / "checkpoint.json", json.dumps(facts, indent=2).encode())
            sync_folder(temporary)
            os.replace(temporary, final)
            sync_folder(folder)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint folder onto the CPU.

    Raises:
        RunError: a file is missing or damaged.
    """
    facts = read_json(path / "checkpoint.json")
    try:
        tensors = load_file(path / "state.safetensors")
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{path / 'state.safetensors'} cannot be read ({error}); delete {path} to resume from the one before"
        ) from error
    return Checkpoint(step=int(facts.pop("step")), tensors=tensors, facts=facts)


def prune_checkpoints(folder: Path, keep: Collection[int]) -> None:
    """Delete the checkpoints whose step is not in `keep`, and what a killed write left behind."""
    for path in [
        *folder.glob(".*.tmp"),
        *(path for step, path in checkpoint_paths(folder).items() if step not in keep),
    ]:
        shutil.rmtree(path, ignore_errors=True)
