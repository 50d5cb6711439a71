"""Rewards as people have them: functions, torch modules and reward networks of other libraries, of whatever signature, called on rows of data.

Parameters are known by their usual names (obs, act, next_state, done, infos, ...), else by their place: observations, actions, next_observations,
terminations. What a reward may want otherwise than it is stored (numbers of another kind, one-hot actions, Dict observations, all inputs in one
row) is tried in a fixed order on the first rows; what was found is said once, and a refusal says what was tried.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlkit2.data.batch import Batch
from rlkit2.data.spaces import DatasetWarning
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import RewardError, first_line

FIELDS = ("observations", "actions", "next_observations", "terminations")
# What people call the four, and what else a step may come with.
NAMES = {
    **dict.fromkeys(("observations", "observation", "obs", "states", "state", "s", "ob"), "observations"),
    **dict.fromkeys(("actions", "action", "act", "acts", "a", "ac"), "actions"),
    **dict.fromkeys(
        (
            *("next_observations", "next_observation", "next_obs", "next_states", "next_state", "s_next", "next_s"),
            *("obs_next", "new_obs", "new_state", "s_prime", "sp", "next_ob"),
        ),
        "next_observations",
    ),
    **dict.fromkeys(
        ("terminations", "termination", "terminated", "terminateds", "dones", "done", "terminal", "terminals"),
        "terminations",
    ),
    **dict.fromkeys(("infos", "info"), "infos"),
}
# What a function of somebody else's may raise where it is given what it does not expect: anything.
FAILURES = (Exception,)
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Signature:
    """What a function takes of a step: fields in the order of its places, and by keyword; `alone` says that it has one place, of an unknown name."""

    places: tuple[str, ...]
    keywords: Mapping[str, str]
    alone: bool = False

    @classmethod
    def of(cls, name: str, function: Callable[..., Any]) -> Signature:
        """Of a function; raises `RewardError` for parameters that can't be told."""
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # written in C
            return cls(FIELDS, {})
        places: list[str] = []
        keywords: dict[str, str] = {}
        unknown: list[str] = []
        shown = f"{name}({', '.join(map(str, parameters))})"
        for parameter in parameters:
            known = NAMES.get(parameter.name)
            if parameter.kind is parameter.VAR_POSITIONAL:
                places += FIELDS[len(places) :]
            elif parameter.kind is parameter.KEYWORD_ONLY and known:
                keywords[parameter.name] = known
            elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                if known is None and (parameter.default is not parameter.empty or len(places) >= len(FIELDS)):
                    break  # an option of its own
                unknown += [] if known else [parameter.name]
                places.append(known or FIELDS[len(places)])
            elif parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
                raise RewardError(f"{shown} needs {parameter.name!r}, which no step has; {KNOWN}")
        if not places and not keywords:
            raise RewardError(f"{shown} takes nothing that is known; {KNOWN}")
        in_place = all(field == FIELDS[i] for i, field in enumerate(places) if field != "infos" and i < len(FIELDS))
        if unknown and len(unknown) < len(places) and not (in_place and all(len(part) == 1 for part in unknown)):
            raise RewardError(f"{shown}: what {', '.join(map(repr, unknown))} should be given cannot be told; {KNOWN}")
        return cls(tuple(places), keywords, len(places) == 1 and bool(unknown))

    def call(self, function: Callable[..., Any], values: Values) -> Any:
        """`function` of the fields it takes."""
        given = {keyword: values[field] for keyword, field in self.keywords.items()}
        return function(*(values[field] for field in self.places), **given)

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields that are taken."""
        return (*self.places, *self.keywords.values())

    def __str__(self) -> str:
        return ", ".join([*self.places, *(f"{keyword}={field}" for keyword, field in self.keywords.items())])


KNOWN = (
    "a reward is called with some of observations, actions, next_observations, terminations (or obs, act, next_obs, done, ...) and infos, "
    "by these names or in this order"
)


def reads_infos(reward: Any) -> bool:
    """Whether a reward takes infos."""
    if not callable(reward) or hasattr(reward, "predict_processed"):
        return False
    return "infos" in Signature.of("reward", reward.forward if isinstance(reward, nn.Module) else reward).fields


@dataclass(frozen=True)
class Attempt:
    """One way to call a reward: in words, and what is done to a batch."""

    words: str
    call: Callable[[Batch, Values], Any]


class RewardCall:
    """A reward as a function of batches.

    Args:
        name: in messages.
        reward: a function, a torch module, or a reward network with `predict_processed` and spaces (imitation's `RewardNet`).
        spec: of the data; without one observations cannot be given as a Dict.

    Called with a batch of n rows and the `infos` of these rows (arrays `[n, ...]` by name, possibly empty), returns a tensor `[n]` of finite numbers.
    Raises `RewardError` where no way to call it works (naming those that were tried), or a result is not one finite number a row.
    """

    def __init__(self, name: str, reward: Callable[..., Any], spec: DatasetSpec | None = None) -> None:
        self.name, self.spec = name, spec
        if isinstance(reward, type):
            raise RewardError(f"{name} is a class; give an instance of it, or a function")
        self._attempts = list(self._ways(reward))
        self._chosen: Attempt | None = None

    def __call__(self, batch: Batch, infos: Values | None = None) -> Tensor:
        failed: list[tuple[Attempt, Exception]] = []
        for attempt in [self._chosen] if self._chosen else self._attempts:
            try:
                found = self._read(attempt.call(batch, infos or {}), len(batch.rewards))
            except RewardError:
                raise
            except FAILURES as error:
                failed.append((attempt, error))
                continue
            if failed:
                said = f"{self.name} is called with {attempt.words}; with {failed[0][0].words} it fails ({first_line(failed[0][1])})"
                warnings.warn(said, DatasetWarning, stacklevel=3)
            self._chosen = attempt
            return found
        tried = "; ".join(f"{attempt.words}: {_reason(error)}" for attempt, error in failed)
        raise RewardError(
            f"{self.name} failed on a batch of {len(batch.rewards)} rows; it was called with {tried}"
        ) from failed[0][1]

    def _read(self, values: Any, count: int) -> Tensor:
        try:
            tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise RewardError(f"{self.name} gives no numbers: {first_line(error)}") from error
        tensor = tensor.detach().cpu()
        if tensor.ndim == 2 and tensor.shape[1] == 1:
            tensor = tensor.squeeze(1)
        if tensor.shape != (count,):
            raise RewardError(
                f"{self.name} has shape {list(tensor.shape)} for {count} transitions; return one number per transition, [{count}]"
            )
        return tensor

    def _ways(self, reward: Callable[..., Any]) -> Iterator[Attempt]:
        if hasattr(reward, "predict_processed") and hasattr(reward, "observation_space"):
            yield Attempt(
                "state, action, next_state, done (arrays of its spaces)", lambda batch, _: self._network(reward, batch)
            )
            return
        module = isinstance(reward, nn.Module)
        signature = Signature.of(self.name, reward.forward if isinstance(reward, nn.Module) else reward)
        forms = [("tensors", _tensors)] + ([] if module else [("NumPy arrays", _arrays)])
        keys = "" if self.spec is None or self.spec.flattener.keys is None else ", ".join(self.spec.flattener.keys)

        def way(words: str, prepare: Callable[[Batch], Values]) -> Attempt:
            def call(batch: Batch, infos: Values) -> Any:
                values = dict(prepare(batch)) | {"infos": infos}
                if "infos" in signature.fields and not infos:
                    raise RewardError(f"{self.name} reads infos, and the data have none; pass infos=... by name")
                return _without_gradient(reward, signature, values)

            return Attempt(f"{signature} ({words})", call)

        cast = _caster(reward)
        for words, form in forms:
            yield way(words, lambda batch, form=form: form(cast(batch)))  # type: ignore[misc]
        if keys:
            for words, form in forms:
                yield way(
                    f"{words}, observations by key: {keys}",
                    lambda batch, form=form: self._by_key(form(cast(batch)), numpy=form is _arrays),  # type: ignore[misc]
                )
        if module and self.spec is not None and self.spec.discrete and "actions" in signature.fields:
            yield way("tensors, actions one-hot", lambda batch: _tensors(cast(self._one_hot(batch))))
        if module and signature.alone:
            for fields in (("observations", "actions"), ("observations", "actions", "next_observations")):
                yield self._joined(reward, fields, cast)

    def _joined(self, reward: Callable[..., Any], fields: tuple[str, ...], cast: Callable[[Batch], Batch]) -> Attempt:
        """All inputs in one row, as a plain `nn.Sequential` takes them."""

        def call(batch: Batch, _: Values) -> Any:
            batch = cast(self._one_hot(batch) if self.spec is not None and self.spec.discrete else batch)
            rows = torch.cat([getattr(batch, field).flatten(1) for field in fields], 1)
            return _without_gradient(reward, Signature(("rows",), {}), {"rows": rows})

        return Attempt(f"one tensor of {' and '.join(fields)}", call)

    def _one_hot(self, batch: Batch) -> Batch:
        assert self.spec is not None
        start = int(getattr(self.spec.action_space, "start", 0))
        rows = nn.functional.one_hot(batch.actions.long() - start, self.spec.action_size).to(batch.observations.device)
        floating = batch.observations.is_floating_point()
        return replace(batch, actions=rows.to(batch.observations) if floating else rows.float())

    def _by_key(self, values: Values, *, numpy: bool) -> Values:
        """Observations as the dictionaries that the environment gives, without the keys that the dataset was loaded without."""
        assert self.spec is not None
        flattener = self.spec.flattener

        def unfold(rows: Any) -> Any:
            tree = flattener.unflatten(rows if numpy else rows.cpu().numpy())
            return tree if numpy else _map(tree, torch.from_numpy)

        return {key: unfold(part) if "observations" in key else part for key, part in values.items()}

    def _network(self, reward: Any, batch: Batch) -> Any:
        """A reward network that prepares raw steps of its spaces itself; statistics that it keeps of what it sees are left as they are."""
        raw = {}
        for field in ("observations", "next_observations"):
            rows = getattr(batch, field).cpu().numpy()
            tree = self.spec.flattener.unflatten(rows) if self.spec is not None else rows
            shape = getattr(reward.observation_space, "shape", None)
            raw[field] = tree.reshape(len(rows), *shape) if shape is not None and isinstance(tree, np.ndarray) else tree
        actions = batch.actions.cpu().numpy()
        actions = actions.reshape(len(actions), *(reward.action_space.shape or ()))
        options = inspect.signature(reward.predict_processed).parameters
        open_ended = any(option.kind is option.VAR_KEYWORD for option in options.values())
        still = {"update_stats": False} if "update_stats" in options or open_ended else {}
        done = batch.terminations.cpu().numpy().astype(bool)
        return reward.predict_processed(raw["observations"], actions, raw["next_observations"], done, **still)


def _reason(error: Exception) -> str:
    text = first_line(error)
    return f"no key {text}" if isinstance(error, KeyError) else text


def _tensors(batch: Batch) -> Values:
    return {field: getattr(batch, field) for field in FIELDS}


def _arrays(batch: Batch) -> Values:
    return {field: getattr(batch, field).cpu().numpy() for field in FIELDS}


def _map(tree: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(tree, dict):
        return {key: _map(part, function) for key, part in tree.items()}
    return tuple(_map(part, function) for part in tree) if isinstance(tree, tuple) else function(tree)


def _caster(reward: Any) -> Callable[[Batch], Batch]:
    """Brings batches to the device and precision of a module's parameters."""
    if not isinstance(reward, nn.Module):
        return lambda batch: batch
    found = next((part for part in (*reward.parameters(), *reward.buffers()) if part.is_floating_point()), None)

    def cast(batch: Batch) -> Batch:
        if found is None:
            return batch
        moved = batch.to(found.device)
        floating = {name: part.to(found.dtype) for name, part in vars(moved).items() if part.is_floating_point()}
        return replace(moved, **floating)

    return cast


@torch.no_grad()
def _without_gradient(reward: Any, signature: Signature, values: Values) -> Any:
    """The reward of values, a module in the state it is used in."""
    if not isinstance(reward, nn.Module):
        return signature.call(reward, values)
    training = reward.training
    reward.eval()
    try:
        return signature.call(reward, values)
    finally:
        reward.train(training)
