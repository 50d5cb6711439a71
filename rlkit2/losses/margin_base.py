"""What a margin loss sees (`MarginInputs`) and what it is (`MarginLoss`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlkit2.errors import ConfigError
from rlkit2.guard import guarded

Terms = tuple[Tensor, Tensor, Tensor]
"""`(value, d_w, d_l)`, each of shape `[..., P]`."""


def softplus(x: Tensor) -> Tensor:
    """`log(1 + e^x)` to full precision (torch's own is linear above 20, which drops gradients of size e^-20)."""
    return -logsigmoid(-x)


@dataclass(frozen=True)
class MarginInputs:
    """What a margin loss may look at: tensors or numpy arrays of shape `[P]` or `[S, P]`.

    `logp_*` and `ref_*` are log-probabilities SUMMED over the completion (also for length-normalised losses), `len_*` the numbers of
    completion tokens (at least 1). Few losses need more: `collision_*` is the sum over completion tokens of `log sum_v p(v)^2` (at most 0),
    `context_chosen` the number of tokens before the chosen completion that the likelihood counts too (at least 0). The kind that is given
    is the kind that comes back.

    Raises:
        ConfigError: shapes differ, a value is NaN or infinite, or a length is below 1.
    """

    logp_chosen: Any
    logp_rejected: Any
    ref_chosen: Any = None
    ref_rejected: Any = None
    len_chosen: Any = None
    len_rejected: Any = None
    collision_chosen: Any = None
    collision_rejected: Any = None
    context_chosen: Any = None
    from_numpy: bool = field(init=False, default=False)

    @guarded()
    def __post_init__(self) -> None:
        names = [item.name for item in fields(self) if item.init]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        object.__setattr__(self, "from_numpy", not any(isinstance(value, Tensor) for value in given.values()))
        first = torch.as_tensor(self.logp_chosen)
        dtype = first.dtype if first.is_floating_point() else torch.get_default_dtype()
        for name, value in given.items():
            tensor = torch.as_tensor(value, device=first.device)
            tensor = tensor if name.startswith("logp") and tensor.is_floating_point() else tensor.to(dtype)
            if tensor.shape != first.shape:
                raise ConfigError(
                    f"{name} has shape {tuple(tensor.shape)} but logp_chosen {tuple(first.shape)}: give one number per pair"
                )
            object.__setattr__(self, name, tensor)
        for name in ("ref", "len", "collision"):
            if (getattr(self, f"{name}_chosen") is None) != (getattr(self, f"{name}_rejected") is None):
                raise ConfigError(f"only one of {name}_chosen and {name}_rejected is given: give both or none")
        if not torch.compiler.is_compiling():
            self._check_values(given)

    def _check_values(self, given: Mapping[str, Any]) -> None:
        for name in given:
            tensor = getattr(self, name).detach()
            fine = (tensor >= 1) if name.startswith("len") else tensor.isfinite()
            try:
                fine_everywhere = bool(fine.all())
            except RuntimeError:  # inside torch.func.vmap values cannot be looked at
                return
            if fine_everywhere:
                continue
            pair = int((~fine).reshape(-1, fine.shape[-1]).any(0).nonzero()[0]) if fine.ndim else 0
            if name.startswith("len"):
                raise ConfigError(f"{name} of pair {pair} is below 1: drop pairs whose completion is empty")
            raise ConfigError(f"{name} of pair {pair} is NaN or infinite: drop the pair or check the model's logits")

    @property
    def a(self) -> Tensor:
        """Log-probability of the chosen completion."""
        return self.logp_chosen  # type: ignore[no-any-return]

    @property
    def b(self) -> Tensor:
        """Log-probability of the rejected completion."""
        return self.logp_rejected  # type: ignore[no-any-return]

    @property
    def ratio_w(self) -> Tensor:
        """`A`, the chosen log-ratio to the reference."""
        return self.logp_chosen - self.ref_chosen  # type: ignore[no-any-return]

    @property
    def ratio_l(self) -> Tensor:
        """`B`, the rejected log-ratio to the reference."""
        return self.logp_rejected - self.ref_rejected  # type: ignore[no-any-return]

    @property
    def margin(self) -> Tensor:
        """`D = A - B`."""
        return self.ratio_w - self.ratio_l


@dataclass(frozen=True)
class MarginLoss:
    """One loss of the registry.

    `terms(inputs, **hyperparameters)` returns `(value, d_w, d_l)`; `ratio` says what `u = d_w / d_l` is, in words.
    """

    name: str
    terms: Callable[..., Terms]
    hyperparameters: Mapping[str, Any]
    ratio: str
    source: str
    needs_reference: bool = False
    needs_lengths: bool = False
    needs_collision: bool = False
    needs_context: bool = False
    couples_batch: bool = False
    aliases: tuple[str, ...] = ()

    def value(self, inputs: MarginInputs, **hyperparameters: Any) -> Any:
        """The loss of every pair, `[..., P]`."""
        return _as_given(self._evaluate(inputs, hyperparameters)[0], inputs)

    def coefficients(self, inputs: MarginInputs, **hyperparameters: Any) -> tuple[Any, Any]:
        """`(d_w, d_l)` of every pair, each `[..., P]`, without a graph."""
        with torch.no_grad():
            _, d_w, d_l = self._evaluate(inputs, hyperparameters)
        return _as_given(d_w, inputs), _as_given(d_l, inputs)

    def bind(self, **hyperparameters: Any) -> MarginLoss:
        """The same loss with other defaults."""
        return replace(self, hyperparameters=MappingProxyType(self._complete(hyperparameters)))

    def _complete(self, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
        unknown = set(hyperparameters) - set(self.hyperparameters)
        if unknown:
            known = ", ".join(self.hyperparameters) or "no hyper-parameter"
            raise ConfigError(f"loss {self.name} has no hyper-parameter {sorted(unknown)[0]!r}; it takes {known}")
        return {**self.hyperparameters, **hyperparameters}

    def _evaluate(self, inputs: MarginInputs, hyperparameters: Mapping[str, Any]) -> Terms:
        complete = self._complete(hyperparameters)
        _check_ranges(self.name, complete)
        if self.needs_reference and inputs.ref_chosen is None:
            raise ConfigError(
                f"loss {self.name} needs reference log-probabilities: give ref_chosen and ref_rejected, or use a reference-free loss such as simpo"
            )
        if self.needs_lengths and inputs.len_chosen is None:
            raise ConfigError(f"loss {self.name} is length-normalised: give len_chosen and len_rejected")
        if self.needs_collision and inputs.collision_chosen is None:
            raise ConfigError(f"loss {self.name} is weighted as in WPO: give collision_chosen and collision_rejected")
        if self.needs_context and inputs.context_chosen is None:
            raise ConfigError(f"loss {self.name} counts the prompt's tokens too: give context_chosen")
        return self.terms(inputs, **complete)


def _as_given(tensor: Tensor, inputs: MarginInputs) -> Any:
    return np.asarray(tensor.detach()) if inputs.from_numpy else tensor


_RANGES: dict[str, tuple[float, float, str]] = {
    "beta": (0.0, math.inf, "above 0"),
    "tau": (0.0, math.inf, "above 0"),
    "label_smoothing": (-1e-300, 1.0, "in [0, 1)"),
    "discount": (0.0, 1.0 + 1e-12, "in (0, 1]"),
}


def _check_ranges(name: str, hyperparameters: Mapping[str, Any]) -> None:
    for key, value in hyperparameters.items():
        if isinstance(value, Tensor | np.ndarray):
            continue
        low, high, words = _RANGES.get(key, (-math.inf, math.inf, "finite"))
        if key == "label_smoothing" and name == "robust":
            high, words = 0.5, "in [0, 0.5)"
        if key == "label_smoothing" and name == "exo_pair":
            low, words = 0.0, "in (0, 1)"
        if not low < value < high:
            raise ConfigError(f"{key}={value} of loss {name} must be {words}")
