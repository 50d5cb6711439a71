"""What acts: an actor with its own normalisation and action bounds, in raw environment units on both sides."""

from __future__ import annotations

import copy
import itertools
import json
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from rlkit2.checksums import Damaged, UncheckedWarning, digest, opened, sealed
from rlkit2.errors import ConfigError, RunError, first_line
from rlkit2.files import make_folder, write_atomically
from rlkit2.nn.actors import Actor, Memory, SequenceActor, rebuild_actor
from rlkit2.nn.encoders import can_be_rebuilt, encoded_size, plans_of
from rlkit2.nn.interface import Interface, as_tensor, nested, plain_interface
from rlkit2.nn.mlp import named_tensors
from rlkit2.nn.normalizer import Normalizer

_FORMAT = 2  # 1 had no checksums
FILE = ".safetensors"
"""Suffix of a policy that is one file."""
_ALONE = "rlkit2"  # where its header describes it


class PolicyMissingError(RunError):
    """A folder holds no policy."""


class Policy(nn.Module):
    """A policy for S seeds.

    Args:
        actor: acts in normalised units.
        normalizer: maps to and from raw environment units.
        seeds: the integers that name the seeds, in order.
        metadata: JSON-compatible facts that travel with a saved policy (training puts the dataset's spec there).
        interface: the spaces it was trained for; None: observations are rows, and actions what the actor gives.
    """

    def __init__(
        self,
        actor: Actor,
        normalizer: Normalizer,
        seeds: tuple[int, ...],
        metadata: dict[str, Any] | None = None,
        interface: Interface | None = None,
    ) -> None:
        super().__init__()
        self.actor, self.normalizer, self.seeds, self.metadata = actor, normalizer, seeds, metadata or {}
        self.interface = interface

    @torch.no_grad()
    def forward(
        self, observations: Any, deterministic: bool = True, generator: torch.Generator | None = None
    ) -> Tensor | NDArray[Any]:
        """Actions for raw observations, of all seeds together; `predict` is the same for the loop of one environment.

        Args:
            observations: a tensor or an array: `[B, obs]`, one `[obs]`, or `[S, B, obs]` with several seeds (with one, the seed axis may be given
                and is kept). Also in the shape of the space, behind the same leading axes: images in bytes, several dimensions, or the dict or
                tuple that the environment gives. Where the policy sees stacks these are stacks, `[frames, ...]`, as
                `gymnasium.wrappers.FrameStackObservation` makes them.
            deterministic: the mode; otherwise a sample.
            generator: source of the sample.

        Returns:
            `[B, act]`, `[act]` or `[S, B, act]` within the action bounds, rounded where the space has whole numbers; discrete actions as int64 `[B]`
            or `[S, B]`, several choices as int64 `[B, k]` or `[S, B, k]`, counted from the space's own start. A tensor for tensors, else an array.

        Raises:
            ConfigError: the shape does not fit the policy.
        """
        rows, arrays = self._rows(observations)
        if not self._fits(rows):
            raise ConfigError(f"this policy takes observations {self._wanted()}, not {_shape(observations)}")
        lead, seeds = rows.shape[:-1], len(self.seeds)
        actions = self._act(rows.reshape(seeds, -1, rows.shape[-1]), deterministic, generator)
        actions = actions.reshape((*lead, *actions.shape[2:]))
        return actions.cpu().numpy() if arrays else actions

    @property
    def remembers(self) -> bool:
        """Whether it acts on the history of its episode: then it is played by `begin` and `follow` (or `predict`), not by calls."""
        return isinstance(self.actor, SequenceActor)

    def asked_for(self, target_return: float) -> Policy:
        """A copy whose episodes are to earn another return, in the environment's rewards.

        Raises:
            ConfigError: the policy is not asked for a return.
        """
        if not isinstance(self.actor, SequenceActor):
            raise ConfigError(
                "this policy does what it has learnt, whatever return is wanted; only that of dt is asked for one"
            )
        twin = copy.deepcopy(self)
        assert isinstance(twin.actor, SequenceActor)
        twin.actor.target_return.fill_(target_return)
        return twin

    def begin(self, rows: int) -> Memory:
        """What a policy that remembers knows of `rows` episodes for each seed that have not begun."""
        assert isinstance(self.actor, SequenceActor)
        return self.actor.begin(rows)

    @torch.no_grad()
    def follow(
        self,
        memory: Memory,
        observations: Tensor,
        rewards: Tensor,
        deterministic: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Memory]:
        """The next actions of a policy that remembers, `[S, B, ...]` in the environment's units, and what it knows then.

        Args:
            memory: of the steps before.
            observations: raw rows `[S, B, obs]`.
            rewards: of the steps before, `[S, B]`; of no account where an episode begins.
            deterministic, generator: as for calls.
        """
        assert isinstance(self.actor, SequenceActor)
        inputs = self._inputs(observations)
        noise = None if deterministic else self.actor.draw_noise(self._like(inputs), generator)
        scale = self.normalizer.return_std
        scale = torch.ones_like(self.actor.target_return) if scale is None else scale
        actions, memory = self.actor.follow(memory, inputs, rewards.to(inputs), scale, noise)
        return self.normalizer.environment_actions(actions), memory

    @torch.no_grad()
    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = True,
        generator: torch.Generator | None = None,
        reward: Any = None,
    ) -> tuple[Any, Any]:
        """The action for what an environment shows, as Stable-Baselines3 calls it: `action, state = policy.predict(observation, state, start)`.

        A policy that sees stacks of frames stacks them itself: `observation` is the newest frame, `state` what the call before returned. Where
        `episode_start` is true the history is forgotten, and the first frame stands for those before it.

        Args:
            observation: one observation as the environment gives it (array, tensor, number, dict or tuple), or a batch of them, `[B, ...]`.
            state: of a policy that sees stacks, or that remembers: what `predict` returned for the step before, None at the first step; ignored by
                others.
            episode_start: whether this is the first step of an episode, one flag or `[B]`; to be given where `state` is None and the policy sees
                stacks or remembers, so that nobody forgets the history by accident.
            deterministic: the mode; otherwise a sample.
            generator: source of the sample.
            reward: of the step before, one number or `[B]`, for a policy that is to earn a certain return: it must know what it has earned.

        Returns:
            The action as `env.step` takes it (a batch for a batch): type, shape and bounds are those of the action space; tensors for tensors, else
            arrays. And the state: `[frames, columns]` or `[B, frames, columns]`, a `Memory` of a policy that remembers, None for one that sees single
            observations.

        Raises:
            ConfigError: the observation does not fit, the policy has several seeds, or the history of a stack is missing.
        """
        if len(self.seeds) > 1:
            names = ", ".join(map(str, self.seeds))
            raise ConfigError(
                f"predict is for one policy, and this holds seeds {names}; choose one: policy.select_seed(0)"
            )
        outside = self.known_interface
        values = outside.read(observation)
        arrays = not any(isinstance(part, Tensor) for part in _leaves(observation))
        frame = outside.frame(values)
        if self.remembers:
            return self._predict_on(frame, state, episode_start, reward, deterministic, generator, arrays)
        rows = frame
        if outside.frames > 1:
            state = outside.advance(*self._history(frame, state, episode_start))
            rows = outside.rows(state)
        actions = self._act(rows.reshape(1, -1, outside.size), deterministic, generator)
        parts = outside.values(actions.reshape((*frame.shape[:-1], *actions.shape[2:])))
        state = state if outside.frames > 1 else None
        if not arrays:
            return nested(outside.action, parts), state
        own = [entry.array(part) for entry, part in zip(outside.action, parts, strict=True)]
        return nested(outside.action, own), None if state is None else state.cpu().numpy()

    def _predict_on(
        self,
        frame: Tensor,
        state: Any,
        start: Any,
        reward: Any,
        deterministic: bool,
        generator: torch.Generator | None,
        arrays: bool,
    ) -> tuple[Any, Any]:
        """`predict` of a policy that remembers: observations as rows `[obs]` or `[B, obs]`.

        Raises:
            ConfigError: what came before is missing, or what was earned by it.
        """
        rows = frame.reshape(1, -1, frame.shape[-1])
        starts = torch.as_tensor(np.zeros(1, bool) if start is None else np.asarray(start, bool).reshape(-1))
        starts = starts.expand(rows.shape[1]).to(rows.device)
        if state is None and not bool(starts.all()):
            raise ConfigError(
                "this policy acts on the history of its episode: give the state that predict returned for the step before, or episode_start=True "
                "at the first step of an episode"
            )
        if reward is None and not bool(starts.all()):
            raise ConfigError(
                "this policy is to earn a certain return: give the reward of the step before, policy.predict(observation, state, reward=reward)"
            )
        fresh = self.begin(rows.shape[1])
        memory = fresh if state is None else replace(state, count=torch.where(starts, fresh.count, state.count))
        earned = torch.zeros(rows.shape[1]) if reward is None else torch.as_tensor(np.asarray(reward)).reshape(-1)
        actions, memory = self.follow(memory, rows, earned.expand(1, rows.shape[1]), deterministic, generator)
        parts = self.known_interface.values(actions.reshape((*frame.shape[:-1], *actions.shape[2:])))
        if arrays:
            own = [entry.array(part) for entry, part in zip(self.known_interface.action, parts, strict=True)]
            return nested(self.known_interface.action, own), memory
        return nested(self.known_interface.action, parts), memory

    def _history(self, frame: Tensor, state: Any, start: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The frames before `frame`, itself, and where episodes start, in matching shapes.

        Raises:
            ConfigError: they do not match, or it cannot be known what came before.
        """
        frames, lead = self.known_interface.frames, frame.shape[:-1]
        if state is None and (start is None or not np.all(start)):
            raise ConfigError(
                f"this policy sees the last {frames} observations: give the state that predict returned for the step before, or episode_start=True "
                "at the first step of an episode"
            )
        starts = torch.as_tensor(np.zeros(lead, bool) if start is None else start, device=frame.device).to(torch.bool)
        if starts.shape not in ((), lead):
            raise ConfigError(f"episode_start has shape {list(starts.shape)}, and the observations are {list(lead)}")
        shape = (*lead, frames, frame.shape[-1])
        before = frame.new_zeros(shape) if state is None else torch.as_tensor(state, device=frame.device)
        if before.shape != shape:
            raise ConfigError(f"state has shape {list(before.shape)}, not {list(shape)}; give what predict returned")
        return before.to(frame.dtype), frame, starts.expand(lead)

    def _act(self, rows: Tensor, deterministic: bool, generator: torch.Generator | None) -> Tensor:
        """Actions `[S, B, ...]` in the environment's units for raw rows `[S, B, obs]`."""
        inputs = self._inputs(rows)
        noise = None if deterministic else self.actor.draw_noise(self._like(inputs), generator)
        return self.normalizer.environment_actions(self.actor(inputs, noise))

    def own_actions(self, rows: Tensor, noise: Tensor | None = None) -> Tensor:
        """Actions `[S, B, ...]` in the actor's own units for raw rows `[S, B, obs]`: the mode, or a sample driven by `noise` (`Actor.draw_noise`)."""
        actions: Tensor = self.actor(self._inputs(rows), noise)
        return actions

    def _inputs(self, rows: Tensor) -> Tensor:
        """Rows as the network takes them."""
        parameter = next(self.actor.parameters())
        inputs = rows.to(parameter.device)
        if inputs.dtype == torch.uint8 and "encoder" in self.actor.settings:  # an encoder takes the bytes
            return inputs
        return self.normalizer.observations(inputs.to(parameter.dtype))

    def _like(self, inputs: Tensor) -> Tensor:
        """What noise for `inputs` takes its lead, type and device from."""
        return inputs[..., :0].to(next(self.actor.parameters()).dtype)

    def _rows(self, observations: Any) -> tuple[Tensor, bool]:
        """What `forward` is given as rows `[*lead, obs]`, and whether it was arrays."""
        if isinstance(observations, Tensor) and observations.is_floating_point() and self._fits(observations):
            return observations, False
        outside, arrays = self.known_interface, not any(isinstance(part, Tensor) for part in _leaves(observations))
        stacks = outside.frames > 1
        if not isinstance(observations, Mapping | tuple):
            plain, entry = as_tensor(observations), outside.observation[0]
            shape = (outside.frames, *entry.shape) if stacks else entry.shape
            own = tuple(plain.shape[max(plain.ndim - len(shape), 0) :]) == shape and not entry.path
            if entry.choices and not plain.is_floating_point():
                own = True  # not yet one-hot
            elif self._fits(plain):  # rows go before
                own = False
            if not own:
                return plain, arrays
        frames = outside.frame(outside.read(observations, frames=stacks, most=2))
        return outside.rows(frames) if stacks else frames, arrays

    def _fits(self, rows: Tensor) -> bool:
        """Whether these are rows for all seeds; with one seed their axis may be left out, and so may that of a batch."""
        lead, seeds = rows.shape[:-1], len(self.seeds)
        known = lead[0] == seeds if len(lead) == 2 else seeds == 1 and len(lead) < 2
        return bool(rows.ndim) and known and rows.shape[-1] == self.actor.settings["observation_size"]

    def _wanted(self) -> str:
        """The shapes that `forward` takes, in words."""
        size, encoder = self.actor.settings["observation_size"], self.actor.settings.get("encoder")
        wanted = f"[B, {size}]" if len(self.seeds) == 1 else f"[{len(self.seeds)}, B, {size}]"
        if encoder is not None:
            shapes = " and ".join(str(shape) for _, shape in encoder["images"])
            wanted += f", with images {shapes} in bytes"
        keys = [entry.name for entry in self.known_interface.observation if entry.path]
        return wanted + (f", or entries {', '.join(keys)}" if keys else "")

    @property
    def known_interface(self) -> Interface:
        """The interface, or what can be said without one."""
        return self.interface or plain_interface(self.actor.settings)

    def select_seed(self, index: int) -> Policy:
        """The policy of one seed, a copy, by its place 0 to S - 1.

        Raises:
            ConfigError: there is no such seed, or the actor's network is one of your own, so nothing here could rebuild it.
        """
        self._require_known("split into seeds")
        _check_index(index, self.seeds, "the policy")
        return _one_seed(self._description(self.metadata), _tensors(self), index)

    def _require_known(self, verb: str) -> None:
        if not can_be_rebuilt(self.actor.network):
            kind = type(self.actor.network).__name__
            raise ConfigError(f"a policy on {kind} cannot be {verb}; save its state_dict yourself")

    def _description(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Everything but the tensors, as JSON values."""
        return {
            "seeds": list(self.seeds),
            "dtype": str(next(self.actor.parameters()).dtype).removeprefix("torch."),
            "actor": self.actor.settings,
            "action_start": self.normalizer.action_start,
            "whole_actions": self.normalizer.whole,
            "interface": None if self.interface is None else self.interface.to_json(),
            "metadata": metadata,
        }

    def save(self, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
        """Write the folder `path` with `policy.json` and `policy.safetensors`, or the one file `path` if it ends in .safetensors, by atomic rename.

        Args:
            path: folder, made if missing, or file; those of an earlier policy are replaced.
            metadata: facts to keep beside the weights; None keeps the policy's own.

        Raises:
            ConfigError: the actor's network is one of your own, so nothing here could rebuild it.
            WriteError: the folder cannot be written.
        """
        self._require_known("saved")
        folder = Path(path)
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in _tensors(self).items()}
        own = self._description(self.metadata if metadata is None else metadata)
        if folder.suffix == FILE:
            make_folder(folder.parent)
            alone = sealed({"format": _FORMAT, **own}, {"tensors": digest(save(tensors))})
            write_atomically(folder, save(tensors, metadata={_ALONE: json.dumps(alone)}))
            return
        make_folder(folder)
        pair = uuid.uuid4().hex  # both files carry it, so half a replacement is noticed
        content = save(tensors, metadata={"pair": pair})
        description = {"format": _FORMAT, "pair": pair, **own}
        text = json.dumps(sealed(description, {"policy.safetensors": digest(content)}), indent=2) + "\n"
        write_atomically(folder / "policy.safetensors", content)
        write_atomically(folder / "policy.json", text)


def load_policy(path: str | Path, seed_index: int | None = None) -> Policy:
    """Read a policy written by `Policy.save`, on the CPU.

    Args:
        path: the folder, or the one file.
        seed_index: keep only this seed (0 to S-1); None keeps all.

    Raises:
        RunError: missing, damaged or half-replaced files (checksums are compared).
        ConfigError: no such seed index.
    """
    folder = Path(path)
    damaged = f"{folder}: the policy's files are damaged"
    try:
        description, tensors = _read_file(folder) if folder.suffix == FILE else _read(folder)
        seeds = list(description["seeds"])
    except RunError:
        raise
    except FileNotFoundError as error:
        name = Path(error.filename).name if error.filename else error
        raise PolicyMissingError(f"{folder}: no policy here ({name} is missing)") from error
    except Exception as error:
        raise RunError(f"{damaged} ({first_line(error)}); save it again") from error
    if seed_index is not None:
        _check_index(seed_index, seeds, str(folder))
    try:
        return (
            _built(description, tensors, seeds) if seed_index is None else _one_seed(description, tensors, seed_index)
        )
    except Exception as error:
        raise RunError(f"{damaged} ({first_line(error)}); save it again") from error


def holds_policy(path: Path) -> bool:
    """Whether `path` is the folder or the file of a saved policy, and not a run."""
    return path.is_file() if path.suffix == FILE else (path / "policy.json").is_file()


def _check_index(index: int, seeds: Sequence[int], owner: str) -> None:
    if not 0 <= index < len(seeds):
        raise ConfigError(f"seed index {index} is out of range: {owner} holds {len(seeds)} seeds")


def _one_seed(description: dict[str, Any], tensors: dict[str, Tensor], index: int) -> Policy:
    """The policy of one of the seeds."""
    own = {name: tensor[index : index + 1] for name, tensor in tensors.items()}
    return _built(description, own, description["seeds"][index : index + 1])


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a policy that is one file, with their checksums seen to."""
    tensors = load(path.read_bytes())
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(_ALONE)
    if text is None:
        raise Damaged("it holds tensors, but not what rlkit2 says about a policy")
    description, digests = opened(json.loads(text))
    if digests is None or digests["tensors"] != digest(save(tensors)):
        raise Damaged("the tensors do not have the checksum they were written with")
    if description["format"] != _FORMAT:
        raise RunError(f"{path}: policy format {description['format']} is not known to this version; upgrade rlkit2")
    return description, tensors


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
    stored = description.get("interface")  # older files have none
    interface = None if stored is None else Interface.from_json(stored)
    if interface is not None and interface.size != settings["observation_size"]:
        raise Damaged("policy.json describes other observations than its network takes")
    policy = Policy(actor, normalizer, tuple(seeds), description["metadata"], interface)
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


def _leaves(observation: Any) -> Iterator[Any]:
    """The arrays and tensors of an observation."""
    if isinstance(observation, Mapping):
        observation = tuple(observation.values())
    if isinstance(observation, tuple):
        for part in observation:
            yield from _leaves(part)
    else:
        yield observation


def _shape(observations: Any) -> Any:
    """What to say was given."""
    if isinstance(observations, Mapping):
        return {key: _shape(part) for key, part in observations.items()}
    return list(np.shape(observations)) if not isinstance(observations, tuple) else tuple(map(_shape, observations))
