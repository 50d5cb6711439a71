"""A policy of one seed as one function of tensors: from what an environment shows to what it takes. What exported files are made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlkit2.errors import ConfigError
from rlkit2.nn.interface import Entry, Interface
from rlkit2.nn.mlp import LAYER_NORM_EPSILON, StackedMLP
from rlkit2.nn.policy import Policy

NEVER_SAMPLE = ("deterministic", "greedy")
NOISE = {"categorical": "uniform in [0, 1)"}  # of the head's noise, where it is not standard normal


@dataclass(frozen=True)
class Port:
    """An input or output of an exported policy: its name, its type in numpy's words, and its shape without the batch axis, which comes first."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    meaning: str

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, ('B', *self.shape)))}]"


class PolicyGraph(nn.Module):
    """A policy's whole way, with tensors alone: `forward(*inputs)` in the order of `inputs` gives a tuple in the order of `outputs`.

    Observations come as the environment has them, entry by entry. Of a policy that sees stacks, `history` is the output `next_history` of the step
    before (at the first step zeros), and `episode_start` says where it is forgotten. With `sampling`, `noise` drives the sample.

    Args:
        policy: of one seed; copied.
        sampling: whether actions are samples, else the mode.

    Raises:
        ConfigError: several seeds, nothing to sample, or a network of one's own.
    """

    def __init__(self, policy: Policy, sampling: bool = False) -> None:
        super().__init__()
        if len(policy.seeds) > 1:
            raise ConfigError(
                f"a graph holds one policy, and this holds seeds {policy.seeds}; choose one with select_seed"
            )
        head = policy.actor.head
        if policy.remembers:
            raise ConfigError(
                "this policy acts on the history of its episode and on what it has earned, which a graph of one step does not hold; use rlkit2"
            )
        if sampling and head in NEVER_SAMPLE:
            raise ConfigError(
                f"the policy is {head}, so there is nothing to sample; leave --sampling (sampling=True) out"
            )
        own = policy.select_seed(0).requires_grad_(False).eval()
        own.interface = policy.interface
        self.interface: Interface = own.known_interface
        self.dtype, self.takes_bytes = next(own.actor.parameters()).dtype, "encoder" in own.actor.settings
        self.actor, self.normalizer, self.sampling = layered(own.actor), own.normalizer, sampling
        self.inputs, self.outputs = _inputs(self.interface), _outputs(self.interface)
        if sampling:
            noise = own.actor.draw_noise(torch.zeros((1, 1, 0), dtype=self.dtype))
            meaning = NOISE.get(head, "standard normal")
            self.inputs += (Port("noise", _name(self.dtype), tuple(noise.shape[2:]), meaning),)
        for entry in (*self.interface.observation, *self.interface.action):
            _ = entry.limits, entry.choices and entry.places  # made here, not while a graph is traced

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Actions, and the history of a policy that sees stacks."""
        outside, count = self.interface, len(self.interface.observation)
        rows = outside.frame(inputs[:count])
        after: tuple[Tensor, ...] = ()
        if outside.frames > 1:
            history = outside.advance(inputs[count], rows, inputs[count + 1])
            rows, after = outside.rows(history), (history,)
        rows = rows.unsqueeze(0)
        if rows.dtype != torch.uint8 or not self.takes_bytes:
            rows = self.normalizer.observations(rows.to(self.dtype))
        noise = inputs[-1].unsqueeze(0) if self.sampling else None
        actions = self.normalizer.environment_actions(self.actor(rows, noise)).squeeze(0)
        return (*outside.values(actions), *after)

    def examples(self, batch: int) -> tuple[Tensor, ...]:
        """Inputs of the right types and shapes, for tracing."""
        made = [torch.zeros((batch, *port.shape), dtype=getattr(torch, port.dtype)) for port in self.inputs]
        for at, entry in enumerate(self.interface.observation):
            if entry.choices:
                made[at] = (made[at] + entry.limits[0].reshape(entry.shape)).to(made[at].dtype)
        return tuple(made)


class LayeredMLP(nn.Module):
    """A `StackedMLP` whose weights are tensors of their own, one a layer, without a backward pass; same shapes in and out."""

    def __init__(self, network: StackedMLP) -> None:
        super().__init__()
        self.members, self.layers, self.scalar = network.members, len(network.hidden_sizes), network.output_size is None
        for name, view in network.named_views().items():
            self.register_buffer(name.replace(".", "_"), view.detach().clone())

    def forward(self, inputs: Tensor, *, frozen: bool = False) -> Tensor:
        """Outputs for inputs `[S, B, in]`."""
        own: dict[str, Any] = self._buffers
        hidden = inputs if self.members is None else inputs.unsqueeze(1)
        for i in range(self.layers):
            hidden = hidden @ own[f"layers_{i}_weight"] + own[f"layers_{i}_bias"]
            if f"norms_{i}_weight" in own:
                hidden = F.layer_norm(hidden, hidden.shape[-1:], eps=LAYER_NORM_EPSILON)
                hidden = hidden * own[f"norms_{i}_weight"] + own[f"norms_{i}_bias"]
            hidden = hidden.relu()
        last: Tensor = hidden @ own[f"layers_{self.layers}_weight"] + own[f"layers_{self.layers}_bias"]
        return last.squeeze(-1) if self.scalar else last


def layered(module: nn.Module) -> Any:
    """The module, with a `LayeredMLP` in the place of every `StackedMLP` in it."""
    for name, child in module.named_children():
        setattr(module, name, LayeredMLP(child) if isinstance(child, StackedMLP) else layered(child))
    return module


def _inputs(outside: Interface) -> tuple[Port, ...]:
    found = tuple(_port("observation", entry) for entry in outside.observation)
    if outside.frames == 1:
        return found
    history = (outside.frames, outside.frame_size)
    return (
        *found,
        Port(
            "history", _name(outside.row_dtype), history, "the output next_history of the step before; zeros at first"
        ),
        Port("episode_start", "bool", (), "whether this is the first step of an episode"),
    )


def _outputs(outside: Interface) -> tuple[Port, ...]:
    found = tuple(_port("action", entry) for entry in outside.action)
    if outside.frames == 1:
        return found
    history = (outside.frames, outside.frame_size)
    return (*found, Port("next_history", _name(outside.row_dtype), history, "the input history of the next step"))


def _port(what: str, entry: Entry) -> Port:
    dtype = entry.dtype if hasattr(torch, entry.dtype) else "int64"
    return Port(".".join(map(str, (what, *entry.path))), dtype, entry.shape, f"{what} as the environment has it")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
