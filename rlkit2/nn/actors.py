"""Policy heads: from network outputs to actions and log-likelihoods, in the agent's units (observations normalised, actions in [-1, 1])."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rlkit2.errors import ConfigError
from rlkit2.nn.critics import Critic, mean_less_deviations, noise_shape
from rlkit2.nn.encoders import make_network
from rlkit2.nn.mlp import named_tensors
from rlkit2.nn.transformer import DecisionTransformer

SQUASHED_ACTION_LIMIT = 1.0 - 1e-6
"""Actions are clipped to this before atanh: in float32, 1 - 1e-7 gives atanh 8.3 and 1 gives infinity."""


class Actor(nn.Module):
    """A network and what its outputs mean. Shapes: observations `[S, B, obs]`, actions `[S, B, act]` (categorical: int64 `[S, B]`).

    `network` is what `make_network` makes, without members; any module with the same shapes may take its place (`Policy.save` then refuses).
    """

    head: ClassVar[str]
    network: nn.Module

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Log-likelihood of `actions`, `[S, B]`."""
        raise NotImplementedError

    def forward(self, observations: Tensor, noise: Tensor | None = None) -> Tensor:
        """The mode, or a sample driven by `noise` (shape and distribution of `draw_noise`)."""
        raise NotImplementedError

    def draw_noise(self, observations: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Noise for one sample per row: standard normal `[S, B, act]`."""
        shape = (*observations.shape[:-1], self.action_size)
        return torch.randn(shape, generator=generator, device=observations.device, dtype=observations.dtype)

    @property
    def action_size(self) -> int:
        """Number of action dimensions, or of discrete actions."""
        return int(self.settings["action_size"])

    settings: dict[str, Any]
    """What `make_actor` needs to build this actor again."""

    def named_views(self) -> dict[str, Tensor]:
        """The network's tensors, then the head's own."""
        own = {name: parameter.detach() for name, parameter in self.named_parameters(recurse=False)}
        return {**named_tensors(self.network), **own}


class GaussianActor(Actor):
    """Diagonal Gaussian with a state-independent `log_std [S, 1, act]`, clamped when used (no gradient outside the bounds)."""

    head = "gaussian"

    def __init__(
        self,
        network: nn.Module,
        action_size: int,
        seeds: int,
        *,
        tanh_mean: bool = False,
        log_std_init: float = 0.0,
        log_std_bounds: tuple[float, float] = (-5.0, 2.0),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.network = network
        self.tanh_mean, self.log_std_bounds = tanh_mean, log_std_bounds
        self.log_std = nn.Parameter(torch.full((seeds, 1, action_size), log_std_init, dtype=dtype, device=device))

    def mean(self, observations: Tensor) -> Tensor:
        """Mean action `[S, B, act]`."""
        mean: Tensor = self.network(observations)
        return mean.tanh() if self.tanh_mean else mean

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Sum over action dimensions of log N(action; mean, std)."""
        log_density: Tensor = _GaussianLogDensity.apply(  # type: ignore[no-untyped-call]
            self.mean(observations), self.log_std, actions, self.log_std_bounds
        )
        return log_density

    def forward(self, observations: Tensor, noise: Tensor | None = None) -> Tensor:
        mean = self.mean(observations)
        return mean if noise is None else mean + self.log_std.clamp(*self.log_std_bounds).exp() * noise


class _GaussianLogDensity(torch.autograd.Function):
    """Sum over dimensions of log N(action; mean, exp(clamped log_std)), `[S, B]`: autograd would take twice the operations back."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, log_std: Tensor, actions: Tensor, bounds: tuple[float, float]) -> Tensor:
        clamped = log_std.clamp(*bounds)
        deviation = clamped.exp()
        standardized = (actions - mean) / deviation
        ctx.save_for_backward(standardized, deviation, clamped == log_std)
        constant = torch.rsub(clamped.sum(-1), -0.5 * math.log(2.0 * math.pi) * log_std.shape[-1])
        return torch.add(constant, standardized.square().sum(-1), alpha=-0.5)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor, None, None]:
        standardized, deviation, inside = ctx.saved_tensors
        cotangent = cotangent.unsqueeze(-1)
        scaled = cotangent * standardized
        at_log_std = (scaled * standardized - cotangent).sum(-2, keepdim=True) * inside
        return scaled / deviation, at_log_std, None, None


class SquashedGaussianActor(Actor):
    """tanh of a diagonal Gaussian whose mean and log standard deviation are both network outputs `[S, B, 2 act]`."""

    head = "squashed_gaussian"

    def __init__(self, network: nn.Module, *, log_std_bounds: tuple[float, float] = (-5.0, 2.0)) -> None:
        super().__init__()
        self.network, self.log_std_bounds = network, log_std_bounds

    def _parameters_at(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.network(observations).chunk(2, -1)
        return mean, log_std.clamp(*self.log_std_bounds)

    @staticmethod
    def _log_density(noise: Tensor, log_std: Tensor, pre_tanh: Tensor) -> Tensor:
        gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi)
        log_slope = 2.0 * (math.log(2.0) - pre_tanh - F.softplus(-2.0 * pre_tanh))  # log(1 - tanh^2), stable
        return (gaussian - log_slope).sum(-1)

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Log-density of `actions`, which are clipped into (-1, 1) first."""
        mean, log_std = self._parameters_at(observations)
        pre_tanh = torch.atanh(actions.clamp(-SQUASHED_ACTION_LIMIT, SQUASHED_ACTION_LIMIT))
        return self._log_density((pre_tanh - mean) * torch.exp(-log_std), log_std, pre_tanh)

    def sample(self, observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """A reparameterised sample `[S, B, act]` and its log-density `[S, B]`."""
        mean, log_std = self._parameters_at(observations)
        pre_tanh = mean + log_std.exp() * noise
        return pre_tanh.tanh(), self._log_density(noise, log_std, pre_tanh)

    def forward(self, observations: Tensor, noise: Tensor | None = None) -> Tensor:
        mean, log_std = self._parameters_at(observations)
        return (mean if noise is None else mean + log_std.exp() * noise).tanh()


class DeterministicActor(Actor):
    """tanh of the network's output."""

    head = "deterministic"

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Minus the squared error summed over dimensions: the log-density of N(action, 1/2) up to a constant."""
        error: Tensor = actions - self(observations)
        return -error.square().sum(-1)

    def forward(self, observations: Tensor, noise: Tensor | None = None) -> Tensor:
        """The action; `noise` is ignored, as there is nothing to sample."""
        action: Tensor = self.network(observations)
        return action.tanh()


class OneStepActor(Actor):
    """A network that turns an observation and a standard normal number for each action dimension into an action, cut off at -1 and 1.

    It has no density. Its mode is what it makes of the noise 0, the most likely one: the samples' own mode is not known.
    """

    head = "one_step"

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Refused.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("a one-step policy is a function of noise and has no density of actions")

    def raw(self, observations: Tensor, noise: Tensor) -> Tensor:
        """The network's output, `[S, B, act]`, before it is cut off."""
        found: Tensor = self.network(torch.cat([observations, noise], -1))
        return found

    def forward(self, observations: Tensor, noise: Tensor | None = None) -> Tensor:
        if noise is None:
            noise = observations.new_zeros((*observations.shape[:-1], self.action_size))
        return self.raw(observations, noise).clamp(-1.0, 1.0)


@dataclass(frozen=True)
class Memory:
    """What a policy knows of the episodes that B rows of S seeds are in: the last K steps, oldest first, in the network's units.

    `observations` `[S, B, K, obs]`, `actions` `[S, B, K, act]`, `returns` `[S, B, K]`: of as many steps as `count` `[S, B]` says, at most K.
    `wanted` `[S, B]`: what is still to be earned, in raw units.
    """

    observations: Tensor
    actions: Tensor
    returns: Tensor
    count: Tensor
    wanted: Tensor


class SequenceActor(Actor):
    """A transformer over the last K steps of an episode, asked for the action that leads to a return: its network is a `DecisionTransformer`.

    It has no action for an observation alone: see `begin` and `follow`. `target_return` `[S, 1]` is what episodes are to earn, in raw units.
    """

    head = "sequence"
    network: DecisionTransformer
    target_return: Tensor

    def __init__(self, network: DecisionTransformer, context: int, *, discrete: bool) -> None:
        super().__init__()
        self.network, self.context, self.discrete = network, context, discrete
        self.register_buffer("target_return", torch.zeros_like(network.time[:, :1, 0]), persistent=False)

    def named_views(self) -> dict[str, Tensor]:
        """The network's tensors, and the return that is wanted."""
        return {**named_tensors(self.network), "target_return": self.target_return}

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Refused, as `forward`."""
        raise ConfigError(NO_HISTORY)

    def forward(self, observations: Tensor, noise: Tensor | None = None) -> Tensor:
        """Refused.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(NO_HISTORY)

    def begin(self, rows: int) -> Memory:
        """The memory of `rows` episodes for every seed that have not begun."""
        like = self.target_return
        shape = (len(like), rows)
        observations = like.new_zeros(*shape, self.context, self.settings["observation_size"])
        actions = like.new_zeros(*shape, self.context, self.action_size)
        count = torch.zeros(shape, dtype=torch.int64, device=like.device)
        return Memory(observations, actions, observations[..., 0].clone(), count, like.expand(shape).clone())

    def follow(
        self, memory: Memory, observations: Tensor, rewards: Tensor, scale: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Memory]:
        """The actions for the next observations, and what is known then.

        Args:
            memory: of the steps before.
            observations: `[S, B, obs]`, in the network's units.
            rewards: of the steps before, raw, `[S, B]`; of no account where an episode begins.
            scale: what a return is divided by, `[S, 1]`.
            noise: `draw_noise`'s; the mode without. Of continuous actions there is nothing to sample.
        """
        full = (memory.count >= self.context).unsqueeze(-1)
        place = memory.count.clamp(max=self.context - 1).unsqueeze(-1)
        wanted = torch.where(memory.count > 0, memory.wanted - rewards, self.target_return)
        returns = torch.where(full, memory.returns.roll(-1, 2), memory.returns)
        returns = returns.scatter(2, place, (wanted / scale).unsqueeze(-1))
        seen = torch.where(full.unsqueeze(-1), memory.observations.roll(-1, 2), memory.observations)
        seen = seen.scatter(2, place.unsqueeze(-1).expand_as(observations.unsqueeze(2)), observations.unsqueeze(2))
        done = torch.where(full.unsqueeze(-1), memory.actions.roll(-1, 2), memory.actions)
        steps = torch.arange(self.context, device=place.device)
        first = memory.count.unsqueeze(-1) - place
        outputs = self.network(returns, seen, done, first + steps, steps <= place)
        index = place.unsqueeze(-1).expand(*place.shape, self.action_size)
        output = outputs.gather(2, index).squeeze(2)
        if not self.discrete:
            actions = entered = output.tanh()
        else:
            if noise is not None:
                output = output - torch.log(-torch.log(noise.clamp(1e-20, 1.0 - 1e-7)))
            actions = output.argmax(-1)
            entered = torch.zeros_like(output).scatter(-1, actions.unsqueeze(-1), 1.0)
        done = done.scatter(2, index, entered.unsqueeze(2))
        return actions, Memory(seen, done, returns, memory.count + 1, wanted)

    def draw_noise(self, observations: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Uniform numbers `[S, B, act]` in [0, 1)."""
        shape = (*observations.shape[:-1], self.action_size)
        return torch.rand(shape, generator=generator, device=observations.device, dtype=observations.dtype)


NO_HISTORY = (
    "this policy acts on the history of its episode, not on an observation alone: evaluate it in an environment, or call "
    "policy.predict(observation, state, reward=...) step by step"
)


class CategoricalActor(Actor):
    """Softmax over the network's outputs `[S, B, n]`; actions are int64 `[S, B]` counted from 0."""

    head = "categorical"

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        log_probabilities = torch.log_softmax(self.network(observations), -1)
        taken: Tensor = log_probabilities.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        return taken

    def draw_noise(self, observations: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Uniform numbers `[S, B, n]` in [0, 1)."""
        shape = (*observations.shape[:-1], self.action_size)
        return torch.rand(shape, generator=generator, device=observations.device, dtype=observations.dtype)

    def forward(self, observations: Tensor, noise: Tensor | None = None) -> Tensor:
        logits: Tensor = self.network(observations)
        if noise is not None:  # Gumbel's trick; the floor keeps log(0) out
            logits = logits - torch.log(-torch.log(noise.clamp(1e-20, 1.0 - 1e-7)))
        return logits.argmax(-1)


class MultiCategoricalActor(Actor):
    """Softmax over each of k groups of the network's outputs `[S, B, n]`: several choices at once, independent given the observation.

    Actions are one-hot in every group, `[S, B, n]`; `choices` are the sizes of the groups, n in all.
    """

    head = "multicategorical"
    _FAR = -1e9  # a logit that no softmax sees
    known: Tensor
    column: Tensor
    place: Tensor

    def __init__(self, network: nn.Module, choices: Sequence[int], device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.network = network
        most = max(choices)
        known = torch.arange(most) < torch.tensor(choices).unsqueeze(-1)  # [k, most]
        column = (known.flatten().cumsum(0) - 1).clamp(min=0)
        place = known.flatten().nonzero().squeeze(-1)  # of each column in the groups side by side
        for name, tensor in {"known": known, "column": column, "place": place}.items():
            self.register_buffer(name, tensor.to(device), persistent=False)

    def _groups(self, columns: Tensor, fill: float) -> Tensor:
        """`[S, B, n]` as `[S, B, k, most]`, with `fill` behind the smaller groups."""
        side_by_side = columns.index_select(-1, self.column).view(*columns.shape[:-1], *self.known.shape)
        return side_by_side.masked_fill(~self.known, fill)

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Sum over the choices of their log-probabilities, `[S, B]`."""
        log_probabilities = self._groups(self.network(observations), self._FAR).log_softmax(-1)
        return (log_probabilities * self._groups(actions, 0.0)).sum((-2, -1))

    def forward(self, observations: Tensor, noise: Tensor | None = None) -> Tensor:
        logits: Tensor = self.network(observations)
        if noise is not None:  # Gumbel's trick, on the uniform number that the normal one stands for
            uniform = torch.special.ndtr(noise).clamp(1e-20, 1.0 - 1e-7)
            logits = logits - torch.log(-torch.log(uniform))
        groups = self._groups(logits, self._FAR)
        chosen = torch.zeros_like(groups).scatter(-1, groups.argmax(-1, keepdim=True), 1.0)
        return chosen.flatten(-2).index_select(-1, self.place)


Vote = Literal["mean", "lcb", "shape"]
VOTES: tuple[str, ...] = get_args(Vote)


class GreedyActor(Actor):
    """The best action by a vote over the members of a critic with discrete actions; int64 `[S, B]` counted from 0.

    Args:
        critic: discrete; shared with its trainer, not copied.
        vote: "mean", "lcb" (mean - coefficient std) or "shape" (mean weighted by the members' noise shapes).
        coefficient: of "lcb".
        form: what the critic's shape output means, see `noise_shape`.
    """

    head = "greedy"

    def __init__(self, critic: Critic, vote: str = "mean", coefficient: float = 0.0, form: str = "power") -> None:
        super().__init__()
        if vote not in VOTES:
            raise ConfigError(f"unknown vote {vote!r}; choose one of: {', '.join(VOTES)}")
        self.critic, self.vote, self.coefficient, self.form = critic, vote, coefficient, form
        self.settings = {
            "head": self.head,
            **critic.settings,
            "vote": vote,
            "coefficient": coefficient,
            "form": form,
        }

    @property
    def network(self) -> nn.Module:  # type: ignore[override]
        """The critic's."""
        return self.critic.network

    def scores(self, observations: Tensor) -> Tensor:
        """What the action is chosen by, `[S, B, n]`."""
        every = self.critic.every_output(observations)
        if self.vote == "lcb":
            return mean_less_deviations(every[..., 0], self.coefficient)
        if self.vote == "mean":
            return every[..., 0].mean(1)
        shape = noise_shape(every[..., 1], self.form)
        return (shape * every[..., 0]).sum(1) / shape.sum(1)

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Log-softmax of the scores: the Boltzmann policy at temperature 1, which the greedy one is the limit of."""
        taken = torch.log_softmax(self.scores(observations), -1).gather(-1, actions.unsqueeze(-1))
        return taken.squeeze(-1)

    def forward(self, observations: Tensor, noise: Tensor | None = None) -> Tensor:
        """The action; `noise` is ignored, as there is nothing to sample."""
        return self.scores(observations).argmax(-1)


PolicyHead = Literal["gaussian", "squashed_gaussian", "deterministic", "categorical"]
# those of `make_actor`; a `GreedyActor` is made of its critic, a `SequenceActor` by `make_sequence_actor`
HEADS: tuple[str, ...] = (*get_args(PolicyHead), MultiCategoricalActor.head, OneStepActor.head)


def make_actor(
    head: str,
    observation_size: int,
    action_size: int,
    hidden_sizes: Sequence[int],
    *,
    seeds: Sequence[int],
    layer_norm: bool = False,
    tanh_mean: bool = False,
    log_std_init: float = 0.0,
    log_std_bounds: tuple[float, float] = (-5.0, 2.0),
    encoder: Mapping[str, Any] | None = None,
    choices: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Actor:
    """An actor with a `StackedMLP`, behind an encoder where there are images.

    Args:
        head: one of `HEADS`.
        observation_size, action_size: widths; for "categorical" the number of actions.
        hidden_sizes, layer_norm, seeds, dtype, device: as for `StackedMLP`.
        tanh_mean, log_std_init: "gaussian" only.
        log_std_bounds: both Gaussian heads.
        encoder: of images among the observations, as for `make_network`.
        choices: of "multicategorical": the sizes of the choices, `action_size` in all.

    Raises:
        ConfigError: unknown head.
    """
    if head not in HEADS:
        raise ConfigError(f"unknown policy head {head!r}; choose one of: {', '.join(HEADS)}")
    outputs = 2 * action_size if head == "squashed_gaussian" else action_size
    network = make_network(
        observation_size + (action_size if head == OneStepActor.head else 0),
        hidden_sizes,
        outputs,
        seeds=seeds,
        layer_norm=layer_norm,
        encoder=encoder,
        stream="policy",
        dtype=dtype,
        device=device,
    )
    actor: Actor
    if head == "gaussian":
        actor = GaussianActor(
            network,
            action_size,
            len(seeds),
            tanh_mean=tanh_mean,
            log_std_init=log_std_init,
            log_std_bounds=log_std_bounds,
            dtype=dtype,
            device=device,
        )
    elif head == "squashed_gaussian":
        actor = SquashedGaussianActor(network, log_std_bounds=log_std_bounds)
    elif head == "deterministic":
        actor = DeterministicActor(network)
    elif head == OneStepActor.head:
        actor = OneStepActor(network)
    elif choices is not None:
        actor = MultiCategoricalActor(network, choices, device)
    else:
        actor = CategoricalActor(network)
    actor.settings = {
        "head": head,
        "observation_size": observation_size,
        "action_size": action_size,
        "hidden_sizes": list(hidden_sizes),
        "layer_norm": layer_norm,
        "tanh_mean": tanh_mean,
        "log_std_bounds": list(log_std_bounds),
        **({"encoder": encoder} if encoder else {}),
        **({} if choices is None else {"choices": list(choices)}),
    }
    return actor


def make_sequence_actor(
    observation_size: int,
    action_size: int,
    hidden_sizes: Sequence[int],
    *,
    context: int,
    heads: int,
    timesteps: int,
    discrete: bool,
    seeds: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> SequenceActor:
    """A `SequenceActor` that sees `context` steps; other arguments as for `DecisionTransformer`."""
    network = DecisionTransformer(
        observation_size,
        action_size,
        hidden_sizes,
        heads=heads,
        timesteps=timesteps,
        seeds=seeds,
        dtype=dtype,
        device=device,
    )
    actor = SequenceActor(network, context, discrete=discrete)
    actor.settings = {
        "head": SequenceActor.head,
        "observation_size": observation_size,
        "action_size": action_size,
        "hidden_sizes": list(hidden_sizes),
        "context": context,
        "heads": heads,
        "timesteps": timesteps,
        "discrete": discrete,
    }
    return actor


def rebuild_actor(settings: Mapping[str, Any], seeds: Sequence[int], dtype: torch.dtype) -> Actor:
    """The actor that `settings` (of a saved one) describe, with fresh weights."""
    if settings["head"] == SequenceActor.head:
        own = {name: value for name, value in settings.items() if name != "head"}
        return make_sequence_actor(**own, seeds=seeds, dtype=dtype)
    if settings["head"] != GreedyActor.head:
        bounds = tuple(settings["log_std_bounds"])
        return make_actor(**{**settings, "log_std_bounds": bounds}, seeds=seeds, dtype=dtype)
    own = {name: settings[name] for name in ("vote", "coefficient", "form")}
    critic = {name: value for name, value in settings.items() if name != "head" and name not in own}
    return GreedyActor(Critic(**critic, discrete=True, seeds=seeds, dtype=dtype), **own)
