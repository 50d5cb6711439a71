"""What all agents share: seeds, units, state dicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from rlkit2.data.batch import Batch, LookaheadBatch
from rlkit2.errors import ConfigError
from rlkit2.fields import Bounds, Checked, Finite, Natural
from rlkit2.nn import (
    Adam,
    Critic,
    EncodedMLP,
    Image,
    Normalizer,
    Policy,
    StackedMLP,
    as_rows,
    choose_encoder,
    lerp_,
    make_actor,
    make_network,
    named_tensors,
    random_shift,
    target_copy,
)
from rlkit2.nn.actors import Actor, PolicyHead
from rlkit2.nn.encoders import images_of
from rlkit2.nn.optim import Schedule
from rlkit2.nn.random import uniform

ActorT = TypeVar("ActorT", bound=Actor)
ACTION_KINDS = ("continuous", "discrete", "multidiscrete")
"""Numbers within bounds, one choice, and several choices at once."""
MENDS = {
    "multidiscrete": "several choices at once: choose bc, iql or odice, which have a head for them, or make them one choice (Discrete)"
}


@dataclass(frozen=True)
class PolicyOptions(Checked):
    """The head of a policy that is trained by the likelihood of actions."""

    # what the policy's outputs mean; "categorical" for one or several choices always
    policy_head: PolicyHead = "gaussian"
    # squash the Gaussian's mean into the action bounds
    tanh_mean: bool = True
    # initial log standard deviation of the Gaussian
    log_std_init: Finite = 0.0
    # the log standard deviation is clamped to these when used
    log_std_bounds: Bounds = (-5.0, 2.0)


@dataclass(frozen=True)
class EncoderOptions(Checked):
    """How an agent sees images; nothing where there are none."""

    # what turns images into features, in every network: "nature" or "impala" convolutions, "none": the pixels as they are; "auto": nature
    encoder: Literal["auto", "none", "nature", "impala"] = "auto"
    # move the images of a minibatch at random by up to so many pixels, edges repeated (for 84 x 84: 4); 0: not at all
    random_shift: Natural = 0
    # one encoder serves all networks, trained by one of them alone: the policy where it is trained by the likelihood of actions, else the critics
    shared_encoder: bool = False


class Agent:
    """Base of every agent: trains S independent seeds on batches `[S, B, ...]`.

    A subclass names its config class, makes its parts in `_build` and registers them by `_register`; `update` does one training step.
    Initial weights and any noise depend on the seed's integer and the step alone, so a seed learns the same alone or beside others.

    Args:
        config: the agent's configuration.
        observation_size, action_size: widths (number of actions if `discrete`; the sum of the sizes of several choices).
        seeds: n for seeds 0 to n-1, or the integers themselves.
        dtype, device: of all floating tensors.
        discrete: actions are int64 choices; None: whether the agent is for nothing else.
        normalizer: maps raw environment units to the networks'; None takes observations as they are and actions in [-1, 1]. Its `choices` say
            whether an action makes several choices at once ("multidiscrete"): the networks see them as one-hot columns.
        images: which columns of an observation are images, in bytes; the config's `EncoderOptions` say what becomes of them.

    Raises:
        ConfigError: the agent is not for this kind of actions or observations (class attributes `action_kinds`, `sees_images`).

    Attributes:
        config, seeds, policy.
        phases, phase: how many kinds of update take turns, and which is next; kept on the host.
        step: `[S]` int64, updates done (the same number for every seed, kept on the device).
    """

    config_class: ClassVar[type]
    # those of `ACTION_KINDS` that it learns; `_likelihood_actor` has heads for all three
    action_kinds: ClassVar[tuple[str, ...]] = ("continuous", "discrete")
    sees_images: ClassVar[bool] = False
    learns_from: ClassVar[str] = "transitions"  # or "preferences", "sequences", "rollouts"
    several_steps: ClassVar[bool] = False  # its targets may span several steps: it bootstraps by `discounts`
    needs_next_actions: ClassVar[bool] = False  # of the data, in a `LookaheadBatch`
    counts_rewards: ClassVar[bool] = False  # while it acts: its data must have the environment's own
    seeds: tuple[int, ...]
    policy: Policy
    policy_optimizer: Adam
    value_network: StackedMLP | EncodedMLP
    value_optimizer: Adam
    critic: Critic
    critic_target: Critic
    critic_optimizer: Adam
    phases: int = 1
    phase: int = 0
    policy_ema: float = 0.0

    def __init__(
        self,
        config: Any,
        observation_size: int,
        action_size: int,
        *,
        seeds: int | Sequence[int] = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        discrete: bool | None = None,
        normalizer: Normalizer | None = None,
        images: Sequence[Image] = (),
    ) -> None:
        discrete = self.action_kinds == ("discrete",) if discrete is None else discrete
        self.choices = None if normalizer is None else normalizer.choices
        kind = "multidiscrete" if self.choices else "discrete" if discrete else "continuous"
        if (refused := self.refusal(kind, images=bool(images))) is not None:
            raise ConfigError(refused)
        self.config = config
        self.encoder = choose_encoder(getattr(config, "encoder", "auto"), images)
        self.seeds = as_seeds(seeds)
        self.dtype, self.device = dtype, torch.device(device)
        self.observation_size, self.action_size, self.discrete = observation_size, action_size, discrete
        normalizer = Normalizer(seeds=len(self.seeds)) if normalizer is None else normalizer
        self.normalizer = normalizer.to(device=self.device, dtype=dtype)
        self.step = torch.zeros(len(self.seeds), dtype=torch.int64, device=self.device)
        self.seed_keys = torch.tensor(self.seeds, device=self.device)
        self._modules: dict[str, nn.Module] = {"normalizer": self.normalizer}
        self._optimizers: dict[str, Adam] = {}
        self._buffers: dict[str, Tensor] = {"step": self.step}
        self._build()
        if self.encoder is not None and getattr(config, "shared_encoder", False):
            self._share_encoder()

    @classmethod
    def refusal(cls, kind: str, *, images: bool = False) -> str | None:
        """One line on why the agent does not learn from actions of a kind of `ACTION_KINDS`, or from images; None where it does."""
        if kind not in cls.action_kinds:
            mend = MENDS.get(kind, "choose another agent")
            return f"{cls.__name__} is for {' or '.join(cls.action_kinds)} actions; these are {kind}, {mend}"
        return no_images(cls.__name__) if images and not cls.sees_images else None

    @classmethod
    def online_refusal(cls) -> str | None:
        """One line on why it cannot learn from transitions as they are collected in an environment; None where it can."""
        if cls.prepare_dataset.__func__ is Agent.prepare_dataset.__func__:  # type: ignore[attr-defined]
            return None
        return (
            f"{cls.__name__} chooses or makes what it learns from out of a whole dataset before training, not from transitions as they come; choose "
            "an agent with a critic, such as iql, sacn, td3bc, rebrac, awac, odice, cql or dqn"
        )

    def _build(self) -> None:
        """Make networks, optimisers and the policy from `self.config` and register them."""
        raise NotImplementedError

    # Parts that several agents have. Weights are drawn from the seed and the part's name, so the order of the calls does not matter.

    @property
    def _placement(self) -> dict[str, Any]:
        """The seeds whose weights a network holds, and where and how finely it holds them."""
        return {"seeds": self.seeds, "dtype": self.dtype, "device": self.device}

    def _build_value(self, hidden_sizes: Sequence[int], learning_rate: float, **options: Any) -> None:
        """`value_network` and `value_optimizer`; `options` as for `StackedMLP` (members, layer_norm)."""
        self.value_network = make_network(
            self.observation_size, hidden_sizes, encoder=self.encoder, stream="value", **self._placement, **options
        )
        self.value_optimizer = Adam(self.value_network, learning_rate)
        self._register({"value": self.value_network}, {"value": self.value_optimizer})

    def _build_critic(self, learning_rate: float, **options: Any) -> None:
        """`critic` (`num_critics` members, `hidden_sizes`), `critic_target` and `critic_optimizer`; `options` as for `Critic`."""
        self.critic = Critic(
            self.observation_size,
            self.action_size,
            self.config.hidden_sizes,
            members=self.config.num_critics,
            discrete=self.discrete,
            encoder=self.encoder,
            **self._placement,
            **options,
        )
        self.critic_target = target_copy(self.critic)
        self.critic_optimizer = Adam(self.critic, learning_rate)
        self._register({"critic": self.critic, "critic_target": self.critic_target}, {"critic": self.critic_optimizer})

    def _make_actor(self, head: str, hidden_sizes: Sequence[int], **options: Any) -> Actor:
        """A policy's network and head; `options` as for `make_actor`."""
        placed = {**self._placement, "encoder": self.encoder}
        return make_actor(head, self.observation_size, self.action_size, hidden_sizes, **placed, **options)

    def _likelihood_actor(self, hidden_sizes: Sequence[int]) -> Actor:
        """The head that the config's `PolicyOptions` describe; categorical for one or several choices, and for no others."""
        options = {f.name: getattr(self.config, f.name) for f in fields(PolicyOptions)}
        head = options.pop("policy_head")
        if self.choices:
            return self._make_actor("multicategorical", hidden_sizes, choices=self.choices)
        if head == "categorical" and not self.discrete:
            raise ConfigError("policy_head = 'categorical' is for discrete actions; these are continuous")
        return self._make_actor("categorical" if self.discrete else head, hidden_sizes, **options)

    def _build_policy(self, actor: ActorT, learning_rate: float, **options: Any) -> ActorT:
        """`policy` and `policy_optimizer` around an actor, which is returned; `options` as for `Adam`."""
        self.policy = Policy(actor, self.normalizer, self.seeds)
        self.policy_optimizer = Adam(actor, learning_rate, **options)
        self._register({"policy": actor}, {"policy": self.policy_optimizer})
        return actor

    def _share_encoder(self) -> None:
        """Let every trained network look through one encoder.

        A policy that clones says from the first minibatch on what of an image matters, while critics of sparse rewards have nothing to tell yet; a
        policy that climbs the critics knows no more than they do.
        """
        encoded = {part: getattr(self._modules[part], "network", self._modules[part]) for part in self._optimizers}
        lender = encoded.get("policy" if isinstance(self.config, PolicyOptions) else "critic")
        for part, network in encoded.items():
            if network is not lender and isinstance(network, EncodedMLP) and isinstance(lender, EncodedMLP):
                network.borrow(lender)
                self.replace_network(part, network)

    def _register(
        self,
        modules: Mapping[str, nn.Module] | None = None,
        optimizers: Mapping[str, Adam] | None = None,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Make parts belong to the state dict; `buffers` are `[S, ...]` tensors that are only ever changed in place."""
        self._modules.update(modules or {})
        self._optimizers.update(optimizers or {})
        self._buffers.update(buffers or {})

    def replace_network(self, part: str, network: nn.Module) -> None:
        """Train another module in the place of a `StackedMLP`; to be called before the first update.

        Its target becomes a copy of it and its optimiser starts anew. Any module will do, at the price of the speed of the hand-written
        backward pass.

        Args:
            part: whose network, by its name in the state dict: "policy", "value", "critic", ...
            network: same shapes in and out as the one it replaces; every parameter leads with the seed axis.

        Raises:
            ConfigError: the agent trains no such part.
        """
        if part not in self._optimizers:
            raise ConfigError(f"{type(self).__name__} trains no {part!r}; there are: {', '.join(self._optimizers)}")
        holder = self._modules[part]
        trained = network
        if isinstance(getattr(holder, "network", None), nn.Module):  # an actor or a critic around its network
            holder.network = network
            trained = holder
        changes = [(holder, trained), (self._optimizers[part], self._optimizers[part].restarted(trained))]
        if f"{part}_target" in self._modules:
            changes.append((self._modules[f"{part}_target"], target_copy(trained)))
        places: tuple[Any, ...] = (vars(self), self._modules, self._optimizers)
        for old, new in changes:
            for names in places:
                names.update({name: new for name, value in names.items() if value is old})

    def follow_schedule(
        self, schedule: Schedule, steps: int, curves: Mapping[str, Sequence[float]] | None = None
    ) -> None:
        """Let the learning rates of all optimisers fall to zero over a run of `steps` updates; "constant" leaves what the config says.

        `curves`: of "refined", by part of the agent; a part without one follows a line.
        """
        if schedule == "constant":
            return
        for part, optimizer in self._optimizers.items():
            curve = (curves or {}).get(part)
            optimizer.follow("linear" if schedule == "refined" and curve is None else schedule, steps, self.step, curve)

    def average_policy(self, decay: float) -> None:
        """Let `policy` be a running mean of the trained policy's weights; to be called before the first update and after `replace_network`.

        `decay` in [0, 1); 0 leaves the weights as they are.

        A policy that is played for thousands of steps is at the mercy of the last few minibatches otherwise (Polyak and Juditsky, "Acceleration of
        Stochastic Approximation by Averaging", 1992). Until about 4 / (1 - decay) updates are done, it is mostly one of the last quarter of them,
        whatever their number (polynomial decay with eta = 3; Shamir and Zhang, ICML 2013), from then on an exponential one.
        """
        if decay > 0.0:
            self.policy_ema = decay
            self._trained, average = self.policy, target_copy(self.policy.actor)
            self.policy = Policy(average, self.normalizer, self.seeds)
            self._register({"policy_average": average})

    @property
    def acting_policy(self) -> Policy:
        """The policy that is trained, and that collects where the agent learns in an environment; `policy` may be a running mean of it."""
        return self._trained if self.policy_ema else self.policy

    @torch.no_grad()
    def follow_policy(self, rate: float | Tensor = 1.0) -> None:
        """Move the running mean by this share towards the trained policy; 1: start it anew there."""
        old, new = self.policy.actor, self._trained.actor
        lerp_(old, new, rate)
        for old_buffer, new_buffer in zip(old.buffers(), new.buffers(), strict=True):
            old_buffer.copy_(new_buffer)

    def learn(self, batch: Batch) -> Mapping[str, Tensor]:
        """One `update`, and the running mean of the policy where there is one."""
        metrics = self.update(batch)
        if self.policy_ema:
            self.follow_policy((4.0 / (self.step[0].to(self.dtype) + 3.0)).clamp(min=1.0 - self.policy_ema))
        return metrics

    @classmethod
    def depends_on_steps(cls, config: Any) -> bool:
        """Whether an update depends on how long the run is to be, by the config alone."""
        return False

    @classmethod
    def prepare_dataset(cls, config: Any, dataset: Any, load: Callable[[str], Any] | None = None) -> Any:
        """The dataset an agent with `config` trains on; the trainer calls it once, before training.

        Args:
            config: of the agent.
            dataset: transitions, rewards transformed.
            load: opens another dataset by its id or path, for agents that read one beside it.
        """
        return dataset

    @classmethod
    def settled(cls, config: Any, dataset: Any = None) -> tuple[Any, str | None]:
        """The config with what it leaves to the data decided, and a line that says what was; the same config and None where there is nothing.

        Args:
            config: of the agent.
            dataset: transitions that it will learn from; None: it learns from transitions as they come, in an environment.
        """
        return config, None

    @classmethod
    def default_policy_ema(cls, config: Any) -> float:
        """`policy_ema` of a run with this config that does not say its own."""
        return 0.0

    @classmethod
    def labels_data(cls, config: Any) -> bool:
        """Whether what its updates need is computed for the whole dataset, once an epoch, by `label`."""
        return False

    def label(self, dataset: Any, *, anew: bool = True) -> None:
        """Compute that for every row of `dataset`, by what the agent knows now, or (`anew` = False, at a resume) by what it knew the last time.

        The trainer calls it, outside of `update`; whoever calls `update` without a trainer does so, too. Batches must know their rows
        (`TransitionDataset.gather`), and tensors stay where they are, so that a recorded update reads the new numbers.
        """

    @classmethod
    def needs_episodes(cls, config: Any) -> bool:
        """Whether its batches must say what their episodes earned (`TransitionDataset.looking_ahead(episodes=True)`)."""
        return False

    @classmethod
    def return_discount(cls, config: Any) -> float | None:
        """Discount of the data's returns whose mean and deviation the agent wants as `normalizer.return_mean` and `return_std`; None: no wish."""
        return None

    @classmethod
    def warnings(cls, config: Any, metrics: Mapping[str, float]) -> dict[str, str]:
        """Known signs of trouble in one seed's logged metrics: name of the warning -> one line with the mend.

        A pure function of numbers that have left the device; the trainer shows each name once per run. It adds `data/reward_min` and
        `data/reward_max`, the smallest and largest reward that the agent is trained on.
        """
        return {}

    def update(self, batch: Batch) -> Mapping[str, Tensor]:
        """One training step on a batch in raw units; returns metrics `group/name` as tensors `[S]` on the device."""
        raise NotImplementedError

    def normalize(self, batch: Batch) -> Batch:
        """The batch in the networks' units and dtype, flags as 0/1 numbers, with the seed axis."""
        batch = batch.with_seed_axis()
        return replace(
            batch,
            observations=self._shifted(self.inputs(batch.observations), "observations"),
            actions=self.normalize_actions(batch.actions),
            rewards=batch.rewards.to(self.dtype),
            next_observations=self._shifted(self.inputs(batch.next_observations), "next_observations"),
            terminations=batch.terminations.to(self.dtype),
            **self._normalized_ahead(batch),
        )

    def _normalized_ahead(self, batch: Batch) -> dict[str, Tensor]:
        """What a `LookaheadBatch` holds besides, in the networks' units and dtype.

        Raises:
            ConfigError: returns of several steps for an agent that has no use for them, or discounted otherwise than it discounts; no next
                actions for one that needs them.
        """
        if self.needs_next_actions and getattr(batch, "next_actions", None) is None:
            raise ConfigError(
                f"{type(self).__name__} needs the data's next actions; take batches from dataset.looking_ahead(next_actions=True)"
            )
        if not isinstance(batch, LookaheadBatch):
            return {}
        if batch.steps is not None and not self.several_steps:
            raise ConfigError(single_steps(type(self).__name__))
        if not (batch.steps is None and batch.returns_to_go is None) and batch.discount != self.config.discount:
            raise ConfigError(
                f"the batch's returns are discounted by {batch.discount:g}, the agent discounts by {self.config.discount:g}"
            )
        found = {}
        for name in (
            "steps",
            "followed",
            "returns_to_go",
            "steps_to_go",
            "first_returns",
            "first_steps",
            "final_terminations",
        ):
            if (value := getattr(batch, name)) is not None:
                found[name] = value.to(self.dtype)
        if batch.next_actions is not None:
            found["next_actions"] = self.normalize_actions(batch.next_actions)
        for name in ("first_observations", "final_observations"):
            if (value := getattr(batch, name)) is not None:
                found[name] = self.inputs(value)
        return found

    def discounts(self, batch: Batch) -> float | Tensor:
        """gamma; where a normalised batch has returns of several steps gamma^k of every row, `[S, B]`."""
        gamma: float = self.config.discount
        if isinstance(batch, LookaheadBatch) and batch.steps is not None:
            powers: Tensor = gamma**batch.steps
            return powers
        return gamma

    def inputs(self, observations: Tensor) -> Tensor:
        """Raw observations `[S, B, *shape]` as networks take them: rows `[S, B, obs]`, standardised, bytes of images as they are."""
        rows = as_rows(observations.to(self.device), self.encoder)
        if rows.dtype == torch.uint8 and self.encoder is not None:
            return rows
        return self.normalizer.observations(rows.to(self.dtype))

    def _shifted(self, rows: Tensor, stream: str) -> Tensor:
        """Rows with their images moved at random, where the config wants it."""
        pixels = getattr(self.config, "random_shift", 0)
        if self.encoder is None or not pixels:
            return rows
        draws = uniform((*rows.shape[:2], 2), self.seed_keys, self.step, stream=f"random_shift.{stream}")
        return random_shift(rows, images_of(self.encoder), pixels, draws)

    def normalize_actions(self, actions: Tensor) -> Tensor:
        """Raw actions in the networks' units and dtype; one choice stays a whole number, several become one-hot columns."""
        own = actions if self.discrete or self.choices else actions.to(self.dtype)
        return self.normalizer.actions(own, self.dtype)

    def raw_q(self, critic: nn.Module, observations: Tensor, actions: Tensor) -> Tensor:
        """Every member of `critic`, `[S, M, B]`, at raw observations `[S, B, obs]` and actions (for an agent's public `q`)."""
        observations = self.inputs(observations)
        values: Tensor = critic(observations, self.normalize_actions(actions.to(self.device)))
        return values

    def raw_value(self, observations: Tensor) -> Tensor:
        """`value_network` at raw observations `[S, B, obs]` (for an agent's public `value`): `[S, B]`, `[S, M, B]` with members."""
        values: Tensor = self.value_network(self.inputs(observations))
        return values

    # State

    def _live_state(self) -> dict[str, Tensor]:
        state = dict(self._buffers)
        for prefix, module in self._modules.items():
            state.update({f"{prefix}.{name}": tensor for name, tensor in named_tensors(module).items()})
        for prefix, optimizer in self._optimizers.items():
            state.update({f"optimizer.{prefix}.{name}": tensor for name, tensor in optimizer.named_state().items()})
        return state

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """A snapshot (contiguous copies) of everything that training changes; every tensor leads with the seed axis."""
        seeds = len(self.seeds)
        return {
            name: (tensor if tensor.ndim else tensor.expand(seeds)).clone(memory_format=torch.contiguous_format)
            for name, tensor in self._live_state().items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` in; tensors broadcast, so a scalar `step` serves all seeds.

        Raises:
            ConfigError: a tensor is missing, unknown, or does not fit.
        """
        live = self._live_state()
        odd = sorted(live.keys() ^ state.keys())
        if odd:
            where = "missing from" if odd[0] in live else "unknown in"
            raise ConfigError(
                f"{odd[0]} is {where} the state ({len(odd)} names differ); was it written by another configuration?"
            )
        for name, target in live.items():
            source = state[name]
            if not target.ndim and source.ndim:
                source = source.flatten()[0]
            try:
                target.copy_(source)
            except RuntimeError as error:
                raise ConfigError(
                    f"{name} has shape {list(source.shape)} in the state but {list(target.shape)} here; was it written by another configuration?"
                ) from error
        self.phase = int(self.step[0]) % self.phases


def no_images(name: str) -> str:
    """Why an agent refuses observations that hold images."""
    able = "bc, td3bc, rebrac, iql, sql, xql, awac, crr, odice, dqn or cql"
    return f"{name} does not learn from images; choose {able}, or leave the images out with observation_keys"


def single_steps(name: str) -> str:
    """Why an agent refuses returns of several steps."""
    return f"{name} learns from single steps; leave num_steps at 1, or choose an agent with a critic, such as iql"


def batch_means(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean over the batch of metrics `[S, B]`, in one operation; flags count as 0 and 1."""
    return dict(zip(metrics, torch.stack(list(metrics.values())).mean(-1).unbind(), strict=True))


MOST_SEEDS = 10_000  # in one run


def as_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """`n` means seeds 0 to n-1.

    Raises:
        ConfigError: no seed, or one twice.
    """
    listed = (
        list(range(min(seeds, MOST_SEEDS + 1)))
        if type(seeds) is int
        else list(seeds)
        if isinstance(seeds, Iterable)
        else []
    )
    whole = all(isinstance(seed, Integral) and not isinstance(seed, bool) and 0 <= seed < 2**63 for seed in listed)
    if not whole or not 0 < len(set(listed)) == len(listed) <= MOST_SEEDS:
        raise ConfigError(f"seeds must be a positive number or distinct integers, not {seeds!r}")
    named = tuple(map(int, listed))
    return named
