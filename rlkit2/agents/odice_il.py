"""O-DICE for imitation: the expert's data give the reward, the rest is O-DICE.

Imitation is relabelling. A discriminator c(x) = P(x is the expert's) is trained by logistic loss between expert data E and offline data O, and

    r(x) = clip(log c(x) - log(1 - c(x)), -10, 10),   an estimate of log d^E(x) / d^O(x)

becomes the reward. With f = w log w ("rkl"), maximising E_pi[log d^E/d^O] - KL(d^pi || d^O) is exactly minimising KL(d^pi || d^E), so the weights
need no tuning of a temperature. x is (s, a), or s or (s, s') where the expert's actions are unknown: then only the offline data teach the policy
what to do.

With `reward = "zero"` every reward is 0 and the data are the expert's alone: the released code's offline imitation, which is cloning with nearly
uniform weights (preset `odice_il_zero`).

Source: Mao, Xu, Zhang, Zhan, "ODICE" (ICLR 2024), offline imitation, for "zero". The discriminator reward is that of Kim et al., "DemoDICE" (ICLR
2022) for (s, a), Ma et al., "SMODICE" (ICML 2022) for s, Kim et al., "LobsDICE" (NeurIPS 2022) for (s, s'). The gradient penalty is centred at zero
(Mescheder, Geiger, Nowozin, "Which training methods for GANs do actually converge?", ICML 2018), so that equal data give a reward of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from rlkit2.agents import make_normalizer
from rlkit2.agents.odice import ODICE, ODICEConfig
from rlkit2.data.dataset import TransitionDataset, dataset_from_arrays
from rlkit2.data.load import read_dataset
from rlkit2.errors import ConfigError, DatasetError
from rlkit2.fields import Checked, Count, Inside, Interval, Natural, NonNegative, Positive, Rate, Widths
from rlkit2.losses.divergences import Divergence
from rlkit2.nn import Adam, StackedMLP

RewardSource = Literal["discriminator", "zero"]
Inputs = Literal["state_action", "state", "transition"]
OWN_EXPERT_EPISODES = 5


@dataclass(frozen=True)
class DiscriminatorConfig(Checked):
    """How c(x) is trained."""

    # what the discriminator sees: "state_action", "state" or "transition" (s, s')
    inputs: Inputs = "state_action"
    # widths of its hidden layers
    hidden_sizes: Widths = (256, 256)
    # updates
    steps: Count = 2000
    # rows of either dataset per update
    batch_size: Count = 256
    # Adam's step size
    learning_rate: NonNegative = 1e-3
    # weight of the mean squared slope of the logit between the two datasets
    gradient_penalty: NonNegative = 2e-4
    # expert labels 1 - this, others this
    label_smoothing: Annotated[float, Interval("[0, 0.5)")] = 0.0
    # bound of the log-ratio
    reward_clip: Positive = 10.0
    # of its weights and minibatches
    seed: Natural = 0


@dataclass(frozen=True)
class ODICEILConfig(ODICEConfig):
    """O-DICE on rewards from expert data; the fields of O-DICE, with "rkl", and where the reward comes from."""

    # f, see rlkit2.losses.divergences; "rkl" makes the log-ratio the right reward
    divergence: Divergence = "rkl"
    # weight of the conjugate term, in (0, 1)
    lambda_: Inside = 0.6
    # weight of the projected backward gradient (orthogonal rule); 0 is the semi rule
    eta: NonNegative = 1.0
    # layer norm before each ReLU of V
    value_layer_norm: bool = True
    # squash the Gaussian's mean into the action bounds
    tanh_mean: bool = False
    # Adam's step size for V
    value_learning_rate: NonNegative = 2e-4
    # Adam's step size for the policy
    policy_learning_rate: NonNegative = 2e-4
    # Polyak rate of the target V
    target_update_rate: Rate = 0.005
    # units of V: those of the log-ratio, whose scale is what makes d^E the optimum
    value_unit: Literal["return", "reward"] = "reward"
    # units of R in the objective, likewise
    residual_unit: Literal["spread", "value"] = "value"
    # policy weight, see O-DICE
    weight: Literal["above_quantile", "positive_residual", "conjugate_grad"] = "positive_residual"
    # R of the policy weight, see O-DICE
    weight_residual: Literal["auto", "return", "mixed", "expected", "sampled"] = "sampled"
    # "discriminator" (log-ratio of expert to offline data) or "zero" (expert data alone)
    reward: RewardSource = "discriminator"
    # id or path of the expert's dataset; None: the best episodes of the dataset itself
    expert_dataset: str | None = None
    # the first so many of expert_dataset, or the best so many of the dataset itself; None: all, or the best 5
    expert_episodes: Count | None = None
    # "state_action", or "state" or "transition" (s, s') to imitate without the expert's actions
    discriminator_inputs: Inputs = "state_action"
    # updates of the discriminator
    discriminator_steps: Count = 2000
    # weight of the mean squared slope of the discriminator's logit
    gradient_penalty: NonNegative = 2e-4
    # expert labels 1 - this, others this
    label_smoothing: Annotated[float, Interval("[0, 0.5)")] = 0.0

    @property
    def policy_widths(self) -> tuple[int, ...]:
        """Hidden layers of the policy; those of the released code where none are given."""
        return (1024, 1024) if self.policy_hidden_sizes is None is self.hidden_sizes else super().policy_widths

    def discriminator(self) -> DiscriminatorConfig:
        """How the discriminator is trained."""
        return DiscriminatorConfig(
            inputs=self.discriminator_inputs,
            steps=self.discriminator_steps,
            gradient_penalty=self.gradient_penalty,
            label_smoothing=self.label_smoothing,
        )


class ODICEIL(ODICE):
    """O-DICE on `imitation_dataset(...)`; arguments as for `Agent`."""

    config_class = ODICEILConfig
    sees_images = False  # its discriminator reads plain rows
    several_steps = False  # its reward is of single steps
    config: ODICEILConfig

    @classmethod
    def prepare_dataset(
        cls, config: Any, dataset: TransitionDataset, load: Callable[[str], TransitionDataset] | None = None
    ) -> TransitionDataset:
        """Read the expert's data and relabel."""
        if config.expert_dataset is None:
            expert = best_episodes(dataset, config.expert_episodes or OWN_EXPERT_EPISODES)
        else:
            whole = (load or read_dataset)(config.expert_dataset)
            expert = whole if config.expert_episodes is None else first_episodes(whole, config.expert_episodes)
        return imitation_dataset(dataset, expert, reward=config.reward, discriminator=config.discriminator())


def first_episodes(dataset: TransitionDataset, count: int) -> TransitionDataset:
    """The first `count` episodes: an expert's best ones would be those with the luckiest starts.

    Raises:
        DatasetError: there are fewer.
    """
    _require_episodes(dataset, count)
    return dataset.select(range(count))


def best_episodes(dataset: TransitionDataset, count: int) -> TransitionDataset:
    """The `count` episodes with the largest returns, in their order.

    Raises:
        DatasetError: there are fewer.
    """
    _require_episodes(dataset, count)
    best = dataset.episode_returns.argsort(descending=True, stable=True)[:count]
    return dataset.select(best.sort().values)


def _require_episodes(dataset: TransitionDataset, count: int) -> None:
    if count > dataset.num_episodes:
        raise DatasetError(f"{dataset.spec.id} has {dataset.num_episodes} episodes, fewer than the {count} asked for")


def imitation_dataset(
    dataset: TransitionDataset,
    expert: TransitionDataset,
    *,
    reward: str = "discriminator",
    discriminator: DiscriminatorConfig | None = None,
) -> TransitionDataset:
    """A dataset whose rewards say how much a transition is like the expert's.

    Args:
        dataset: offline data O of any quality; its own rewards are not read.
        expert: expert data E of the same spaces, a selection of `dataset` or another; its rewards are not read, nor its actions unless the inputs
            are "state_action".
        reward: "discriminator" labels O, and E behind it where E is not a part of O and its actions are known, with the clipped log-ratio;
            "zero" gives E alone with rewards of 0.
        discriminator: how the log-ratio is estimated.

    Raises:
        DatasetError: the spaces differ.
        ConfigError: unknown reward.
    """
    if reward not in get_args(RewardSource):
        raise ConfigError(f"unknown reward {reward!r}; choose one of: {', '.join(get_args(RewardSource))}")
    for name in ("observation_size", "action_size", "discrete"):
        own, other = getattr(dataset.spec, name), getattr(expert.spec, name)
        if own != other:
            raise DatasetError(f"{name} is {own} in {dataset.spec.id} but {other} in the expert's {expert.spec.id}")
    if reward == "zero":
        return expert.with_rewards(torch.zeros(len(expert)))
    settings = discriminator or DiscriminatorConfig()
    known = expert.records is dataset.records or settings.inputs != "state_action"
    data = dataset if known else _joined(dataset, expert)
    return data.with_rewards(log_density_ratio(data, dataset, expert, settings))


def log_density_ratio(
    data: TransitionDataset,
    dataset: TransitionDataset,
    expert: TransitionDataset,
    config: DiscriminatorConfig | None = None,
) -> Tensor:
    """log d^E(x) / d^O(x) at every row of `data`, `[N]`, clipped to +-`reward_clip`, from a discriminator between `expert` and `dataset`."""
    config = config or DiscriminatorConfig()
    others, experts = _features(dataset, config.inputs), _features(expert, config.inputs)
    both = torch.cat([others, experts])
    mean, std = both.mean(0), both.std(0, correction=0) + 1e-3
    network = _train_discriminator((others - mean) / std, (experts - mean) / std, config)
    rows = (_features(data, config.inputs) - mean) / std
    with torch.no_grad():
        logits = torch.cat([network(part.unsqueeze(0))[0] for part in torch.split(rows, 8192)])
    return logits.clamp(-config.reward_clip, config.reward_clip)


def _train_discriminator(others: Tensor, experts: Tensor, config: DiscriminatorConfig) -> StackedMLP:
    network = StackedMLP(others.shape[1], config.hidden_sizes, seeds=[config.seed], stream="discriminator")
    optimizer = Adam(network, config.learning_rate, cosine_steps=config.steps)
    generator = torch.Generator().manual_seed(config.seed)
    labels = torch.cat(
        [
            torch.full((config.batch_size,), config.label_smoothing),
            torch.full((config.batch_size,), 1.0 - config.label_smoothing),
        ]
    )
    for _ in range(config.steps):
        a, b = (rows[torch.randint(len(rows), (config.batch_size,), generator=generator)] for rows in (others, experts))
        logits = network(torch.cat([a, b]).unsqueeze(0))[0]
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        if config.gradient_penalty > 0.0:
            share = torch.rand((config.batch_size, 1), generator=generator)
            between = (a + share * (b - a)).unsqueeze(0).requires_grad_()
            (slope,) = torch.autograd.grad(network.differentiable(between).sum(), between, create_graph=True)
            loss = loss + config.gradient_penalty * slope.square().sum(-1).mean()
        optimizer.minimize(loss.unsqueeze(0))
    return network


def _features(dataset: TransitionDataset, inputs: str) -> Tensor:
    """What the discriminator sees, `[N, features]`; choices as one-hot rows."""
    spec = dataset.spec
    if dataset.observations.dtype == torch.uint8:
        raise DatasetError(f"{spec.id} has image observations; the discriminator takes vectors")
    if inputs == "state":
        return dataset.observations
    if inputs == "transition":
        return torch.cat([dataset.observations, dataset.next_observations], 1)
    actions = dataset.actions
    if spec.discrete:
        actions = F.one_hot(actions - int(getattr(spec.action_space, "start", 0)), spec.action_size).float()
    elif (normalizer := make_normalizer(spec)).choices:
        actions = normalizer.actions(actions.unsqueeze(0))[0]
    return torch.cat([dataset.observations, actions], 1)


def _joined(*datasets: TransitionDataset) -> TransitionDataset:
    """All episodes in memory, with the specification of the first."""
    fields: Sequence[str] = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    joined: dict[str, Any] = {name: torch.cat([getattr(dataset, name) for dataset in datasets]) for name in fields}
    spec = datasets[0].spec
    return dataset_from_arrays(**joined, spec=replace(spec, id=" + ".join(dataset.spec.id for dataset in datasets)))
