"""The map between raw environment units and what networks see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlkit2.errors import ConfigError


class Normalizer(nn.Module):
    """Standardises observations, maps action bounds to [-1, 1] and several choices to one-hot columns; parts that are the identity cost nothing.

    Args:
        observation_mean, observation_std: `[obs]` (every seed alike) or `[S, 1, obs]`; None leaves observations alone.
        return_mean, return_std: of the data's discounted returns, one number or `[S]`, for agents whose values count in them; None: not known.
        action_low, action_high: bounds `[act]` or `[S, 1, act]`, infinite where an action is unbounded (it then passes unchanged); None means
            the actions live in [-1, 1] already.
        action_start: first value of a discrete action, or of each of several choices; agents count from 0.
        choices: sizes of the choices that one action makes together, k of them; None: it makes one, or is continuous.
        whole: actions are whole numbers within their bounds; on the way back they are rounded to the nearest.
        seeds: S.
        dtype, device: of the buffers.

    Raises:
        ConfigError: an action has equal bounds, or one that is not a number.

    Buffers, all leading with S: `observation_mean`, `observation_std` `[S, 1, obs]`; `action_center`, `action_scale`, `action_limit`
    `[S, 1, act]`, the last being 1 or infinity; `return_mean`, `return_std` `[S, 1]`; of several choices `choice` and `choice_value`
    `[S, 1, n]` int64, which one a column belongs to and what it stands for. Absent buffers are None.
    """

    def __init__(
        self,
        *,
        observation_mean: Tensor | None = None,
        observation_std: Tensor | None = None,
        return_mean: Tensor | None = None,
        return_std: Tensor | None = None,
        action_low: Tensor | None = None,
        action_high: Tensor | None = None,
        action_start: int | Sequence[int] = 0,
        choices: Sequence[int] | None = None,
        whole: bool = False,
        seeds: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.action_start = action_start
        self.first = action_start if isinstance(action_start, int) else 0
        self.choices = None if choices is None else tuple(choices)
        self.whole = whole
        self.observation_mean: Tensor | None
        self.observation_std: Tensor | None
        self.return_mean: Tensor | None
        self.return_std: Tensor | None
        self.action_center: Tensor | None
        self.action_scale: Tensor | None
        self.action_limit: Tensor | None
        self.choice: Tensor | None
        self.choice_value: Tensor | None

        def buffer(name: str, value: Tensor | None) -> None:
            if value is not None:
                value = value.to(device=device, dtype=dtype if value.is_floating_point() else None)
                value = value.expand(seeds, 1, value.shape[-1]).clone()
            self.register_buffer(name, value)

        buffer("observation_mean", observation_mean)
        buffer("observation_std", observation_std)
        for name, value in (("return_mean", return_mean), ("return_std", return_std)):
            known = None if value is None else value.to(device=device, dtype=dtype).reshape(-1, 1)
            self.register_buffer(name, None if known is None else known.expand(seeds, 1).clone())
        center = scale = limit = None
        if action_low is not None and action_high is not None:
            _require_room(action_low, action_high)
            bounded = torch.isfinite(action_low) & torch.isfinite(action_high)
            center = torch.where(bounded, (action_low + action_high) / 2, 0.0)
            scale = torch.where(bounded, (action_high - action_low) / 2, 1.0)
            limit = None if bounded.all() else torch.where(bounded, 1.0, torch.inf)
            if bool((center == 0).all() and (scale == 1).all()):
                center = scale = None
        buffer("action_center", center)
        buffer("action_scale", scale)
        buffer("action_limit", limit)
        choice, value = (None, None) if self.choices is None else _columns(self.choices, action_start)
        buffer("choice", choice)
        buffer("choice_value", value)

    def observations(self, observations: Tensor) -> Tensor:
        """Raw `[S, B, obs]` to network inputs."""
        if self.observation_mean is None or self.observation_std is None:
            return observations
        return (observations - self.observation_mean) / self.observation_std

    def actions(self, actions: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Raw actions `[S, B, act]` to [-1, 1]; discrete `[S, B]` to 0, 1, ...; several choices `[S, B, k]` to one-hot columns `[S, B, n]`.

        `dtype`: of the one-hot columns, which are NaN where a choice lies outside its space.
        """
        if self.choice is not None and self.choice_value is not None:
            chosen = actions.index_select(-1, self.choice[0, 0]) == self.choice_value
            return chosen.to(dtype) / (chosen.sum(-1, keepdim=True) == actions.shape[-1])
        if not actions.is_floating_point():
            return actions - self.first if self.first else actions
        if self.action_center is None or self.action_scale is None:
            return actions
        return (actions - self.action_center) / self.action_scale

    def environment_actions(self, actions: Tensor) -> Tensor:
        """The way back; bounded continuous actions are clipped to their bounds, whole ones also rounded; choices are int64."""
        if self.choice is not None and self.choice_value is not None:
            values = torch.where(actions > 0.5, self.choice_value, 0)
            chosen = values.new_zeros(*actions.shape[:-1], len(self.choices or ()))
            return chosen.index_add(-1, self.choice[0, 0], values)
        if not actions.is_floating_point():
            return actions + self.first if self.first else actions
        if self.action_limit is None:
            actions = actions.clamp(-1.0, 1.0)
        else:
            actions = torch.minimum(torch.maximum(actions, -self.action_limit), self.action_limit)
        if self.action_center is not None and self.action_scale is not None:
            actions = actions * self.action_scale + self.action_center
        return actions.round() if self.whole else actions


def _columns(choices: Sequence[int], starts: int | Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of every one-hot column `[n]`: which choice it belongs to, and the value it stands for."""
    sizes = torch.tensor(choices)
    first = torch.as_tensor(starts).expand(len(choices))
    choice = torch.repeat_interleave(torch.arange(len(choices)), sizes)
    return choice, first[choice] + torch.cat([torch.arange(size) for size in choices])


def _require_room(low: Tensor, high: Tensor) -> None:
    """Between equal bounds there is nothing to learn, and no map to [-1, 1]."""
    for index, (bottom, top) in enumerate(zip(low.flatten().tolist(), high.flatten().tolist(), strict=True)):
        if not bottom < top:
            raise ConfigError(
                f"action {index} has bounds {bottom:g} and {top:g}: there is nothing to choose between; take it out of the actions, "
                "or give the true bounds where the data are read (action_space=, or rlkit2 data import --action-space)"
            )
