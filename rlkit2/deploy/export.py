"""One file that acts as a policy does, in another program: written, loaded again, and held against the policy before it appears."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlkit2 import __version__
from rlkit2.deploy.formats import FORMATS, Act, Format
from rlkit2.deploy.graph import PolicyGraph, Port
from rlkit2.errors import ConfigError
from rlkit2.fields import closest
from rlkit2.files import make_folder, write_atomically
from rlkit2.nn.interface import Entry, nested
from rlkit2.nn.policy import Policy

ROUNDS = ((1, 50), (95, 10))
"""Observations at a time and steps of the check, 1,000 in all: a batch of any size goes through the same file."""
TOLERANCE = 1e-4
"""Largest difference of an action, in halves of its range (in its own units where it has no bounds); ten times as large a share of whole-numbered
actions may differ, as a hair decides between two that are alike."""
FAR = 1e6  # bounds beyond it are none


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        path, format: of the file.
        seed: the integer that names the policy's seed.
        inputs, outputs: in order.
        difference: the largest one between an action of the file and of the policy, in units of the action; None where actions are whole numbers.
        differing: how many of the `observations` in the check got another whole-numbered action.
        observations: how many were compared.
    """

    path: Path
    format: str
    seed: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    difference: float | None
    differing: int
    observations: int

    def __str__(self) -> str:
        if self.difference is None:
            return f"{self.observations:,} observations: {self.differing or 'no'} actions differ from the policy's"
        return f"{self.observations:,} observations: actions differ from the policy's by at most {self.difference:.2g}"


def export_policy(
    policy: Policy,
    path: str | Path,
    *,
    format: str | None = None,
    sampling: bool = False,
    tolerance: float = TOLERANCE,
    facts: Mapping[str, Any] | None = None,
) -> Export:
    """Write a policy of one seed as one file; normalisation, stacking, the order of entries and the action bounds are inside.

    Args:
        policy: of one seed.
        path: the file, which must not be there yet.
        format: a key of `rlkit2.deploy.formats.FORMATS`; None: what the suffix of `path` says.
        sampling: actions are samples, driven by an input `noise`; else the mode. A safetensors file holds both.
        tolerance: largest difference from the policy, see `TOLERANCE`.
        facts: JSON values to keep in the file beside what is known of the policy.

    Raises:
        ConfigError: unknown format, several seeds, nothing to sample, or a file that differs from the policy by more than `tolerance`, which then
            does not appear.
        MissingExtraError: what writes or runs the format is not installed.
        WriteError: the file cannot be written.
    """
    path = Path(path)
    name = format or _by_suffix(path)
    if name not in FORMATS:
        raise ConfigError(f"unknown format {name!r}{closest(name, FORMATS)}")
    if path.exists():
        raise ConfigError(f"{path} is there already; name another file or remove it")
    kind, graph = FORMATS[name], PolicyGraph(policy, sampling)
    kind.check_installed()
    make_folder(path.parent)
    with TemporaryDirectory() as folder:
        file = Path(folder, "policy" + kind.suffixes[0])
        description = describe(graph, policy, kind, facts or {})
        kind.write(graph, policy, file, json.dumps(description))
        difference, differing, worst = compare(kind.load(file, graph), graph, policy)
        if not worst <= tolerance:
            raise ConfigError(
                f"{path} would differ from the policy: {_size(difference, differing)} (tolerance {tolerance:g} of the range); nothing was written"
            )
        write_atomically(path, file.read_bytes())
    total = sum(batch * steps for batch, steps in ROUNDS)
    return Export(path, name, policy.seeds[0], graph.inputs, graph.outputs, difference, differing, total)


def describe(graph: PolicyGraph, policy: Policy, kind: Format, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says about itself, as JSON values."""
    known = {name: value for name, value in policy.metadata.items() if name not in ("spec", "seeds")}
    return {
        "rlkit2": __version__,
        "format": kind.name,
        **known,
        **facts,
        "seed": policy.seeds[0],
        "actions": "samples" if graph.sampling else "mode",
        "inputs": [asdict(port) for port in graph.inputs],
        "outputs": [asdict(port) for port in graph.outputs],
        "frames": graph.interface.frames,
        "spaces": graph.interface.to_json(),
    }


def compare(act: Act, graph: PolicyGraph, policy: Policy) -> tuple[float | None, int, float]:
    """The file against `Policy.predict` on 1,000 observations: largest difference of continuous actions, how many whole-numbered ones differ, and the
    larger of both in units of the tolerance."""
    draw = np.random.default_rng(0)
    outside, entries = graph.interface, graph.interface.action
    largest, differing, worst = 0.0, 0, 0.0
    total = sum(batch * steps for batch, steps in ROUNDS)
    for batch, steps in ROUNDS:
        state: Any = None
        history = np.zeros((batch, outside.frames, outside.frame_size), np.dtype(_numpy(outside.row_dtype)))
        for step in range(steps):
            values = [observed(entry, policy, at, batch, draw) for at, entry in enumerate(outside.observation)]
            start = (draw.random(batch) < 0.1) | (step == 0)
            given: list[Any] = [*values, *((history, start) if outside.frames > 1 else ())]
            noise = torch.Generator().manual_seed(step)
            if graph.sampling:
                like = torch.zeros((1, batch, 0), dtype=graph.dtype)
                given.append(policy.actor.draw_noise(like, torch.Generator().manual_seed(step)).squeeze(0).numpy())
            found = act(given)
            wanted, state = policy.predict(nested(outside.observation, values), state, start, not graph.sampling, noise)
            history = found[-1]
            apart = np.zeros(batch, bool)
            for entry, got, expected in zip(entries, found, _parts(entries, wanted), strict=False):
                if np.dtype(entry.dtype).kind == "f":
                    gap = np.abs(got.astype(np.float64) - expected).reshape(batch, -1)
                    largest = max(largest, float(gap.max()))
                    worst = max(worst, float((gap / _scale(entry)).max()))
                else:
                    apart |= (got != expected).reshape(batch, -1).any(1)
            differing += int(apart.sum())
    continuous = any(np.dtype(entry.dtype).kind == "f" for entry in entries)
    return largest if continuous else None, differing, max(worst, differing / total / 10)


def observed(entry: Entry, policy: Policy, at: int, batch: int, draw: np.random.Generator) -> NDArray[Any]:
    """Values of an entry `[B, *shape]`, spread as the data's where the policy standardises them, else over their bounds."""
    low, high = (bound.numpy() for bound in entry.limits)
    size = (batch, entry.numbers)
    if entry.choices or np.dtype(entry.dtype).kind in "iu":
        ends = np.clip(low, -1000, None), np.clip(high, None, 1000)
        found: NDArray[Any] = draw.integers(ends[0].astype(np.int64), ends[1].astype(np.int64) + 1, size)
    else:
        spread = _spread(policy, at)
        bounded = (low > -FAR) & (high < FAR)
        inside = np.where(bounded, low, -1.0) + draw.random(size) * np.where(bounded, high - low, 2.0)
        normal = draw.normal(size=size)
        found = np.where(bounded, inside, normal) if spread is None else spread[0] + spread[1] * normal
        found = np.clip(found, low, high)
    return np.ascontiguousarray(found.reshape(batch, *entry.shape).astype(entry.dtype))


def _spread(policy: Policy, at: int) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Mean and deviation of the data in the columns of an entry (of the first frame)."""
    mean, std = policy.normalizer.observation_mean, policy.normalizer.observation_std
    if mean is None or std is None:
        return None
    entries, frames = policy.known_interface.observation, policy.known_interface.frames
    first = frames * sum(entry.columns for entry in entries[:at])
    columns = slice(first, first + entries[at].columns)
    return mean[0, 0, columns].cpu().double().numpy(), std[0, 0, columns].cpu().double().numpy()


def _scale(entry: Entry) -> NDArray[Any]:
    """Half of the range of every number of an action, 1 where it has no bounds."""
    low, high = (bound.numpy() for bound in entry.limits)
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(high - low), (high - low) / 2, 1.0)


def _parts(entries: tuple[Entry, ...], action: Any) -> list[NDArray[Any]]:
    """The entries of what `predict` gave."""
    found = []
    for entry in entries:
        part = action
        for key in entry.path:
            part = part[key]
        found.append(np.asarray(part))
    return found


def _size(difference: float | None, differing: int) -> str:
    texts = [f"actions by up to {difference:.2g}"] if difference is not None else []
    return " and ".join([*texts, *([f"{differing} whole-numbered actions"] if differing else [])]) or "actions"


def _by_suffix(path: Path) -> str:
    for name, kind in FORMATS.items():
        if path.suffix in kind.suffixes:
            return name
    known = ", ".join(f"{suffix} ({name})" for name, kind in FORMATS.items() for suffix in kind.suffixes)
    raise ConfigError(f"{path} does not say its format: give --format (format=...), or one of the suffixes {known}")


def _numpy(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
