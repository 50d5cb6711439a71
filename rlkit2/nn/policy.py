"""What acts: an actor with its own normalisation and action bounds, in raw environment units on both sides."""

from __future__ import annotations

import itertools
import json
import uuid
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from rlkit2.checksums import Damaged, UncheckedWarning, digest, opened, sealed
from rlkit2.errors import ConfigError, RunError, first_line
from rlkit2.files import make_folder, write_atomically
from rlkit2.nn.actors import Actor, rebuild_actor
from rlkit2.nn.encoders import as_rows, can_be_rebuilt, encoded_size, plans_of
from rlkit2.nn.mlp import named_tensors
from rlkit2.nn.normalizer import Normalizer

_FORMAT = 2  # 1 had no checksums


class PolicyMissingError(RunError):
    """A folder holds no policy."""


class Policy(nn.Module):
    """A policy for S seeds.

    Args:
        actor: acts in normalised units.
        normalizer: maps to and from raw environment units.
        seeds: the integers that name the seeds, in order.
        metadata: JSON-compatible facts that travel with a saved policy (training puts the dataset's spec there).
    """

    def __init__(
        self, actor: Actor, normalizer: Normalizer, seeds: tuple[int, ...], metadata: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.actor, self.normalizer, self.seeds, self.metadata = actor, normalizer, seeds, metadata or {}

    @torch.no_grad()
    def forward(
        self, observations: Tensor, deterministic: bool = True, generator: torch.Generator | None = None
    ) -> Tensor:
        """Actions for raw observations.

        Args:
            observations: `[B, obs]` with one seed, `[S, B, obs]` with several (with one, the seed axis may be given and is kept); images as
                bytes in their own shape, or as rows.
            deterministic: the mode; otherwise a sample.
            generator: source of the sample.

        Returns:
            `[B, act]` or `[S, B, act]` within the action bounds, rounded where the space has whole numbers; discrete actions as int64 `[B]` or
            `[S, B]`, several choices as int64 `[B, k]` or `[S, B, k]`, counted from the space's own start.

        Raises:
            ConfigError: the shape does not fit the policy.
        """
        size, num_seeds = self.actor.settings["observation_size"], len(self.seeds)
        encoder = self.actor.settings.get("encoder")
        given, observations = observations.shape, as_rows(observations, encoder)
        add_axis = observations.ndim == 2 and num_seeds == 1
        if add_axis:
            observations = observations.unsqueeze(0)
        if observations.ndim != 3 or observations.shape[0] != num_seeds or observations.shape[-1] != size:
            wanted = f"[B, {size}]" if num_seeds == 1 else f"[{num_seeds}, B, {size}]"
            if encoder is not None:
                shapes = " and ".join(str(shape) for _, shape in encoder["images"])
                wanted += f", with images {shapes} in bytes"
            raise ConfigError(f"this policy takes observations {wanted}, not {list(given)}")
        parameter = next(self.actor.parameters())
        inputs = observations.to(parameter.device)
        if inputs.dtype != torch.uint8 or encoder is None:  # an encoder takes the bytes
            inputs = self.normalizer.observations(inputs.to(parameter.dtype))
        rows = inputs[..., :0].to(parameter.dtype)
        noise = None if deterministic else self.actor.draw_noise(rows, generator)
        actions = self.normalizer.environment_actions(self.actor(inputs, noise))
        return actions.squeeze(0) if add_axis else actions

    def save(self, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
        """Write the folder `path` with `policy.json` and `policy.safetensors`; each file appears by atomic rename.

        Args:
            path: folder, made if missing; files of an earlier policy in it are replaced.
            metadata: facts to keep beside the weights; None keeps the policy's own.

        Raises:
            ConfigError: the actor's network is one of your own, so nothing here could rebuild it.
            WriteError: the folder cannot be written.
        """
        if not can_be_rebuilt(self.actor.network):
            raise ConfigError(
                f"a policy on {type(self.actor.network).__name__} cannot be saved; save its state_dict yourself"
            )
        folder = Path(path)
        make_folder(folder)
        pair = uuid.uuid4().hex  # both files carry it, so half a replacement is noticed
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in _tensors(self).items()}
        content = save(tensors, metadata={"pair": pair})
        description = {
            "format": _FORMAT,
            "pair": pair,
            "seeds": list(self.seeds),
            "dtype": str(next(self.actor.parameters()).dtype).removeprefix("torch."),
            "actor": self.actor.settings,
            "action_start": self.normalizer.action_start,
            "whole_actions": self.normalizer.whole,
            "metadata": self.metadata if metadata is None else metadata,
        }
        text = json.dumps(sealed(description, {"policy.safetensors": digest(content)}), indent=2) + "\n"
        write_atomically(folder / "policy.safetensors", content)
        write_atomically(folder / "policy.json", text)


def load_policy(path: str | Path, seed_index: int | None = None) -> Policy:
    """Read a policy written by `Policy.save`, on the CPU.

    Args:
        path: the folder.
        seed_index: keep only this seed (0 to S-1); None keeps all.

    Raises:
        RunError: missing, damaged or half-replaced files (checksums are compared).
        ConfigError: no such seed index.
    """
    folder = Path(path)
    try:
        description, tensors = _read(folder)
        seeds = list(description["seeds"])
    except RunError:
        raise
    except FileNotFoundError as error:
        name = Path(error.filename).name if error.filename else error
        raise PolicyMissingError(f"{folder}: no policy here ({name} is missing)") from error
    except Exception as error:
        raise RunError(f"{folder}: the policy's files are damaged ({first_line(error)}); save it again") from error
    if seed_index is not None:
        if not 0 <= seed_index < len(seeds):
            raise ConfigError(f"seed index {seed_index} is out of range: {folder} holds {len(seeds)} seeds")
        seeds = seeds[seed_index : seed_index + 1]
        tensors = {name: tensor[seed_index : seed_index + 1] for name, tensor in tensors.items()}
    try:
        return _built(description, tensors, seeds)
    except Exception as error:
        raise RunError(f"{folder}: the policy's files are damaged ({first_line(error)}); save it again") from error


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors, with their checksums seen to."""
    stored = json.loads((folder / "policy.json").read_text())
    content = (folder / "policy.safetensors").read_bytes()
    if stored["format"] not in (1, _FORMAT):
        raise RunError(f"{folder}: policy format {stored['format']} is not known to this version; upgrade rlkit2")
    tensors = load(content)
    with safe_open(folder / "policy.safetensors", framework="pt") as file:
        pair = (file.metadata() or {}).get("pair")
    if pair != stored["pair"]:
        raise RunError(f"{folder}: policy.json and policy.safetensors are from different saves; save the policy again")
    description, digests = opened(stored)
    if (digests is None) != (stored["format"] == 1) or (digests and digests["policy.safetensors"] != digest(content)):
        raise Damaged("policy.safetensors does not have the checksum it was written with")
    if digests is None:
        text = f"{folder} was written by an older rlkit2, without checksums; it is read unchecked"
        warnings.warn(text, UncheckedWarning, stacklevel=3)
    return description, tensors


def _built(description: dict[str, Any], tensors: dict[str, Tensor], seeds: list[int]) -> Policy:
    """The policy that the files describe; anything may be raised where they contradict each other."""
    settings, dtype = description["actor"], getattr(torch, description["dtype"])
    encoder = settings.get("encoder")
    sizes = [encoded_size(settings["observation_size"], encoder), *settings["hidden_sizes"]]
    weights = sum(plan.weights for plan in plans_of(encoder))
    if weights + sum(a * b for a, b in itertools.pairwise(sizes)) > sum(tensor.numel() for tensor in tensors.values()):
        raise Damaged("policy.json describes larger networks than policy.safetensors holds")
    actor = rebuild_actor(settings, seeds, dtype)
    actor.requires_grad_(False)
    normalizer = Normalizer(
        action_start=description["action_start"],
        choices=settings.get("choices"),
        whole=description.get("whole_actions", False),
        seeds=len(seeds),
        dtype=dtype,
    )
    for name in normalizer._buffers:  # absent ones are None
        if f"normalizer.{name}" in tensors:
            setattr(normalizer, name, tensors[f"normalizer.{name}"])
    policy = Policy(actor, normalizer, tuple(seeds), description["metadata"])
    for name, target in _tensors(policy).items():
        if name not in tensors or tensors[name].shape != target.shape:
            raise Damaged(f"tensor {name} is missing or has another shape")
        target.copy_(tensors[name])
    return policy


def _tensors(policy: Policy) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": tensor
        for part, module in (("actor", policy.actor), ("normalizer", policy.normalizer))
        for name, tensor in named_tensors(module).items()
    }
