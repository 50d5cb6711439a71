"""Transitions as sampled distances read them: rows of whole episodes, and rewards evaluated on them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rlkit2.data import Batch
from rlkit2.errors import RewardError, first_line
from rlkit2.rewards.matrix import named_rewards

CHUNK = 4096


class Rows(Protocol):
    """N transitions of E whole episodes; a `TransitionDataset` is one."""

    @property
    def episode_starts(self) -> Tensor:
        """The row of each episode's first step, and N, `[E + 1]`."""

    def __len__(self) -> int: ...

    def gather(self, indices: Tensor) -> Batch:
        """The transitions at `indices [n]`."""


@dataclass(frozen=True)
class BatchRows:
    """A `Batch` without seed axis as `Rows`; episodes end where a flag is set."""

    batch: Batch
    episode_starts: Tensor

    @classmethod
    def of(cls, batches: Batch | Iterable[Batch]) -> BatchRows:
        """One batch, or several that follow one another, each ending an episode; raises `RewardError` where there is none."""
        parts = [batches] if isinstance(batches, Batch) else list(batches)
        if not parts or not all(isinstance(part, Batch) and part.rewards.numel() for part in parts):
            raise RewardError("no transitions to compare rewards on; give a TransitionDataset or batches with rows")
        flat = [part if part.rewards.ndim == 1 else _without_seed_axis(part) for part in parts]
        joined = Batch(**{f.name: torch.cat([getattr(part, f.name) for part in flat]) for f in fields(Batch)})
        ends = (joined.terminations.bool() | joined.truncations.bool()).clone()
        ends[torch.tensor([len(part.rewards) for part in flat]).cumsum(0) - 1] = True
        return cls(joined, torch.cat([torch.zeros(1, dtype=torch.int64), ends.nonzero().squeeze(1) + 1]))

    def __len__(self) -> int:
        return len(self.batch.rewards)

    def gather(self, indices: Tensor) -> Batch:
        return Batch(**{f.name: getattr(self.batch, f.name)[indices] for f in fields(Batch)})


def _without_seed_axis(batch: Batch) -> Batch:
    if batch.rewards.ndim != 2 or len(batch.rewards) != 1:
        raise RewardError(f"a batch of shape {list(batch.rewards.shape)} has several seeds; give batches of one")
    return Batch(**{f.name: getattr(batch, f.name)[0] for f in fields(Batch)})


def episode_rows(rows: Rows, episodes: Tensor) -> Tensor:
    """The row indices of the given episodes, in order, `[n]`."""
    starts = rows.episode_starts.cpu()
    first, lengths = starts[:-1][episodes], starts.diff()[episodes]
    offsets = torch.arange(int(lengths.sum())) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    return torch.repeat_interleave(first, lengths) + offsets


class RewardFunctions:
    """K named rewards evaluated on rows: arrays aligned with the rows, batched callables, or modules.

    Raises `RewardError` naming the reward for arrays of another length, results of another shape and non-finite values.
    """

    def __init__(self, rewards: Mapping[str, Any] | Iterable[Any], rows: int) -> None:
        self.names: list[str] = []
        self._evaluate: list[Callable[[Batch, Tensor], Any]] = []
        for name, reward in named_rewards(rewards):
            if name in self.names:
                raise RewardError(f"two rewards are called {name!r}; give each its own name")
            self.names.append(name)
            self._evaluate.append(_evaluator(name, reward, rows))
        if not self.names:
            raise RewardError("there are no rewards to compare; give at least one")

    def __call__(self, batch: Batch, indices: Tensor) -> Tensor:
        """`[n, K]` float64."""
        columns = []
        for name, evaluate in zip(self.names, self._evaluate, strict=True):
            values = torch.as_tensor(evaluate(batch, indices)).detach().double().cpu()
            if values.ndim == 2 and values.shape[1] == 1:
                values = values.squeeze(1)
            if values.shape != (len(indices),):
                raise RewardError(
                    f"{name} gave shape {list(values.shape)} for {len(indices)} transitions; return one number per transition"
                )
            if not bool(torch.isfinite(values).all()):
                bad = int((~torch.isfinite(values)).nonzero()[0])
                raise RewardError(f"{name} is {float(values[bad])} at row {int(indices[bad])}; rewards must be finite")
            columns.append(values)
        return torch.stack(columns, 1)


def _evaluator(name: str, reward: Any, rows: int) -> Callable[[Batch, Tensor], Any]:
    if isinstance(reward, nn.Module):
        return lambda batch, _: _module(name, reward, batch)
    if callable(reward):
        return lambda batch, _: _called(name, reward, batch)
    values = torch.as_tensor(reward if isinstance(reward, Tensor) else np.asarray(reward))
    if values.shape != (rows,):
        raise RewardError(
            f"{name} has shape {list(values.shape)}; the data has {rows} transitions, give one number each"
        )
    return lambda _, indices: values[indices.to(values.device)]


def _called(name: str, reward: Callable[..., Any], batch: Batch) -> Any:
    try:
        return reward(batch.observations, batch.actions, batch.next_observations, batch.terminations)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise RewardError(
            f"{name} failed on a batch ({first_line(error)}); it is called as "
            "f(observations, actions, next_observations, terminations) with tensors of n rows and returns n numbers"
        ) from error


_FIELDS = ("observations", "actions", "next_observations", "terminations")
# What people call the four in reward networks.
_NAMES = {
    **dict.fromkeys(("observations", "observation", "obs", "states", "state", "s"), "observations"),
    **dict.fromkeys(("actions", "action", "act", "acts", "a"), "actions"),
    **dict.fromkeys(
        ("next_observations", "next_observation", "next_obs", "next_states", "next_state", "s_next"),
        "next_observations",
    ),
    **dict.fromkeys(("terminations", "termination", "terminated", "dones", "done"), "terminations"),
}


def _signature(name: str, module: nn.Module) -> tuple[list[str], dict[str, str]]:
    """The fields of a batch that `module.forward` takes: by position, and by keyword; names decide where they are known, else the order."""
    positional: list[str] = []
    keywords: dict[str, str] = {}
    for parameter in inspect.signature(module.forward).parameters.values():
        known = _NAMES.get(parameter.name)
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional += _FIELDS[len(positional) :]
        elif parameter.kind is parameter.KEYWORD_ONLY and known:
            keywords[parameter.name] = known
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            if known is None and (parameter.default is not parameter.empty or len(positional) >= len(_FIELDS)):
                break  # an option of its own
            positional.append(known or _FIELDS[len(positional)])
    if not positional and not keywords:
        raise RewardError(
            f"{name}.forward takes nothing that is known; it is called with some of {', '.join(_FIELDS)} by position or name"
        )
    return positional, keywords


@torch.no_grad()
def _module(name: str, module: nn.Module, batch: Batch) -> Any:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    batch, training = batch.to(device), module.training
    positional, keywords = _signature(name, module)
    module.eval()
    try:
        return module(
            *(getattr(batch, field) for field in positional),
            **{keyword: getattr(batch, field) for keyword, field in keywords.items()},
        )
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        tried = ", ".join([*positional, *(f"{keyword}={field}" for keyword, field in keywords.items())])
        raise RewardError(
            f"{name} failed on a batch ({first_line(error)}); it was called as {name}({tried}) with tensors of n rows"
        ) from error
    finally:
        module.train(training)
