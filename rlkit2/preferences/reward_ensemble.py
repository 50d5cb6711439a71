"""Ensembles of reward models: M members for each of S seeds in one network, callable like any other reward.

Predictions of a Bradley-Terry model have a free offset and (up to the temperature) a free scale, so raw values of two members or two models say
nothing when they are compared; only differences between segments of equal length do.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import ConfigError, RewardError
from rlkit2.files import make_folder, write_atomically, write_json
from rlkit2.nn import StackedMLP

FORMAT = 1
INPUTS = ("observations", "actions", "next_observations")
HEADS = ("linear", "tanh")
REDUCTIONS = ("mean", "sum")
CHUNK = 1 << 15


class RewardEnsemble(nn.Module):
    """Predicted rewards `r(s, a)` (or of other inputs) of M members for each of S seeds.

    Args:
        observation_size, action_size: widths (number of actions if `discrete`).
        hidden_sizes: hidden layers of every member (B-Pref and Christiano et al. 2017: three of 256 or two of 64).
        seeds: n for seeds 0 to n-1, or the integers themselves; a member's initial weights depend on its seed and its place alone.
        members: M (3 in B-Pref and Christiano et al. 2017, 7 in OPRL).
        head: "linear", or "tanh" for rewards in (-1, 1) as in B-Pref.
        reduce: "mean" or "sum" of a segment's rewards is its return; they differ by a temperature of H.
        inputs: what the reward sees, some of observations, actions, next_observations.
        discrete: actions are int64 choices, counted from `action_start`.
        dtype, device: of all floating tensors.

    Parameters: `network.flat [S, M * P]` and `log_beta [S, M]`, the logarithm of the inverse temperature of preferences. Buffers `input_mean`,
    `input_std` `[in]` standardise the inputs. `description` holds what training wrote down (labels, dataset, hashes), as JSON values.

    Raises:
        ConfigError: unknown head, reduction or input.
    """

    input_mean: Tensor
    input_std: Tensor

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        *,
        hidden_sizes: Sequence[int] = (256, 256, 256),
        seeds: int | Sequence[int] = 1,
        members: int = 3,
        head: str = "linear",
        reduce: str = "mean",
        inputs: Sequence[str] = ("observations", "actions"),
        discrete: bool = False,
        action_start: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        for name, value, known in (("head", head, HEADS), ("reduce", reduce, REDUCTIONS)):
            if value not in known:
                raise ConfigError(f"{name}={value!r} of the reward model must be one of {', '.join(known)}")
        if not inputs or not set(inputs) <= set(INPUTS):
            raise ConfigError(f"inputs={tuple(inputs)} of the reward model must be some of {', '.join(INPUTS)}")
        if members < 1:
            raise ConfigError(f"members={members} must be at least 1")
        self.seeds = tuple(range(seeds)) if isinstance(seeds, int) else tuple(int(seed) for seed in seeds)
        self.inputs = tuple(name for name in INPUTS if name in inputs)
        self.observation_size, self.action_size, self.members = observation_size, action_size, members
        self.head, self.reduce, self.discrete, self.action_start = head, reduce, discrete, action_start
        widths = {"observations": observation_size, "actions": action_size, "next_observations": observation_size}
        size = sum(widths[name] for name in self.inputs)
        self.network = StackedMLP(
            size, hidden_sizes, seeds=self.seeds, members=members, stream="reward", dtype=dtype, device=device
        )
        self.log_beta = nn.Parameter(torch.zeros((len(self.seeds), members), dtype=dtype, device=device))
        self.register_buffer("input_mean", torch.zeros(size, dtype=dtype, device=device))
        self.register_buffer("input_std", torch.ones(size, dtype=dtype, device=device))
        self.description: dict[str, Any] = {}

    @classmethod
    def for_spec(cls, spec: DatasetSpec, **settings: Any) -> RewardEnsemble:
        """An ensemble for the spaces of a dataset; `settings` as for the constructor."""
        spec.refuse_images("a reward model")
        start = int(getattr(spec.action_space, "start", 0))
        return cls(spec.observation_size, spec.action_size, discrete=spec.discrete, action_start=start, **settings)

    # Predictions

    def features(self, observations: Tensor, actions: Tensor, next_observations: Tensor | None = None) -> Tensor:
        """Standardised inputs `[..., in]` of transitions `[..., obs]`, `[..., act]` (discrete: int64 `[...]`), `[..., obs]`.

        Raises:
            RewardError: a width does not fit, or next observations are needed and missing.
        """
        dtype, device = self.input_mean.dtype, self.input_mean.device
        parts = []
        for name, values in zip(INPUTS, (observations, actions, next_observations), strict=True):
            if name not in self.inputs:
                continue
            if values is None:
                raise RewardError("this reward model reads next_observations; give them")
            if name == "actions" and self.discrete:
                parts.append(nn.functional.one_hot(values.to(device) - self.action_start, self.action_size).to(dtype))
                continue
            wanted = self.action_size if name == "actions" else self.observation_size
            if values.shape[-1] != wanted:
                raise RewardError(
                    f"this reward model takes {name} of width {wanted}, not {values.shape[-1]}; was it fitted to another dataset?"
                )
            parts.append(values.to(device, dtype))
        return (torch.cat(parts, -1) - self.input_mean) / self.input_std

    def predict(self, features: Tensor) -> Tensor:
        """Rewards `[S, M, B]` of features `[S, B, in]` (shared by the members) or `[S, M, B, in]`."""
        rewards: Tensor = self.network(features)
        return rewards.tanh() if self.head == "tanh" else rewards

    def member_rewards(self, observations: Tensor, actions: Tensor, next_observations: Tensor | None = None) -> Tensor:
        """Rewards of every seed and member for transitions with any leading axes: `[S, M, ...]`."""
        features = self.features(observations, actions, next_observations)
        shape = features.shape[:-1]
        flat = features.reshape(1, -1, features.shape[-1]).expand(len(self.seeds), -1, -1)
        return self.predict(flat).view(len(self.seeds), self.members, *shape)

    def forward(self, observations: Any, actions: Any, next_observations: Any = None, terminations: Any = None) -> Any:
        """Mean reward over members `[...]` (`[S, ...]` with several seeds) for a batch of transitions, NumPy arrays or tensors.

        `terminations` are accepted, as of any reward, and not read.
        """
        numpy = not isinstance(observations, Tensor)
        tensors = [None if x is None else torch.as_tensor(x) for x in (observations, actions, next_observations)]
        assert tensors[0] is not None
        assert tensors[1] is not None
        rewards = self.member_rewards(tensors[0], tensors[1], tensors[2]).mean(1)
        if len(self.seeds) == 1:
            rewards = rewards.squeeze(0)
        return np.asarray(rewards.detach().cpu()) if numpy else rewards

    @torch.no_grad()
    def dataset_rewards(self, dataset: TransitionDataset) -> Tensor:
        """Rewards of every seed and member for every transition of a dataset, `[S, M, N]` on the CPU.

        Raises:
            RewardError: the dataset's spaces are not those the model was made for.
        """
        self.check_spec(dataset.spec)
        parts = []
        for start in range(0, len(dataset), CHUNK):
            rows = slice(start, start + CHUNK)
            fields = (dataset.observations[rows], dataset.actions[rows], dataset.next_observations[rows])
            parts.append(self.member_rewards(*fields).cpu())
        return torch.cat(parts, -1)

    @torch.no_grad()
    def probabilities(self, dataset: TransitionDataset, rows_1: Tensor, rows_2: Tensor, chunk: int = 1024) -> Tensor:
        """Every member's probability that the second segment is preferred, `[S, M, P]`, for rows `[P, H]` of a dataset."""
        self.check_spec(dataset.spec)
        return torch.cat(
            [
                torch.sigmoid(
                    self.logits(*(self.row_features(dataset, side[i : i + chunk]) for side in (rows_1, rows_2)))
                )
                for i in range(0, len(rows_1), chunk)
            ],
            -1,
        )

    def logits(self, features_1: Tensor, features_2: Tensor) -> Tensor:
        """`beta (R_2 - R_1)` of pairs of segments, `[S, M, P]`, for features `[P, H, in]`, `[S, P, H, in]` or `[S, M, P, H, in]`."""
        return self.log_beta.exp().unsqueeze(-1) * (self.segment_returns(features_2) - self.segment_returns(features_1))

    def segment_returns(self, features: Tensor) -> Tensor:
        """Returns (`reduce` over steps) `[S, M, P]` of segments with features `[P, H, in]`, `[S, P, H, in]` or `[S, M, P, H, in]`."""
        if features.ndim == 3:
            features = features.expand(len(self.seeds), *features.shape)
        pairs, steps = features.shape[-3:-1]
        rewards = self.predict(features.flatten(-3, -2))
        rewards = rewards.view(*rewards.shape[:-1], pairs, steps)
        return rewards.mean(-1) if self.reduce == "mean" else rewards.sum(-1)

    def row_features(self, dataset: TransitionDataset, rows: Tensor | slice) -> Tensor:
        """Standardised inputs `[..., in]` of a dataset's rows `[...]`."""
        return self.features(dataset.observations[rows], dataset.actions[rows], dataset.next_observations[rows])

    def check_spec(self, spec: DatasetSpec) -> None:
        """Raise `RewardError` where a dataset's spaces are not those the model was made for."""
        mine = (self.observation_size, self.action_size, self.discrete)
        theirs = (spec.observation_size, spec.action_size, spec.discrete)
        if mine != theirs:
            kinds = [
                f"{size} observations and {count} {'choices' if d else 'actions'}" for size, count, d in (mine, theirs)
            ]
            raise RewardError(
                f"this reward model takes {kinds[0]}, but {spec.id} has {kinds[1]}; fit one to that dataset"
            )

    # Parts and files

    def select_seed(self, index: int) -> RewardEnsemble:
        """The ensemble of one seed, by its place 0 to S-1."""
        if not 0 <= index < len(self.seeds):
            raise ConfigError(f"seed index {index} is out of range: the reward model has {len(self.seeds)} seeds")
        part = self._empty(self.seeds[index : index + 1])
        with torch.no_grad():
            part.network.flat.copy_(self.network.flat[index : index + 1])
            part.log_beta.copy_(self.log_beta[index : index + 1])
        part.input_mean.copy_(self.input_mean)
        part.input_std.copy_(self.input_std)
        part.description = dict(self.description)
        return part

    def member_module(self, seed: int = 0, member: int = 0) -> nn.Sequential:
        """One member as an ordinary torch module on concatenated raw inputs `[..., in]` (continuous actions), with rewards `[..., 1]`.

        It is what the gradient meters measure: `segment_return(model.member_module(), reduce=model.reduce)`. The standardisation of the
        inputs is inside the first linear layer.
        """
        views = self.network.named_views()
        layers: list[nn.Module] = []
        for i in range(len(self.network.hidden_sizes) + 1):
            weight = views[f"layers.{i}.weight"][seed, member].T.detach().clone()
            bias = views[f"layers.{i}.bias"][seed, member, 0].detach().clone()
            if i == 0:
                weight = weight / self.input_std
                bias = bias - weight @ self.input_mean
            layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype, device=weight.device)
            layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
            layers += [layer, nn.ReLU()]
        return nn.Sequential(*layers[:-1], *([nn.Tanh()] if self.head == "tanh" else []))

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments except dtype and device, as JSON values."""
        return {
            "observation_size": self.observation_size,
            "action_size": self.action_size,
            "hidden_sizes": list(self.network.hidden_sizes),
            "seeds": list(self.seeds),
            "members": self.members,
            "head": self.head,
            "reduce": self.reduce,
            "inputs": list(self.inputs),
            "discrete": self.discrete,
            "action_start": self.action_start,
        }

    def _empty(self, seeds: Sequence[int]) -> RewardEnsemble:
        settings = {**self.settings, "seeds": seeds}
        return RewardEnsemble(**settings, dtype=self.input_mean.dtype, device=self.input_mean.device)

    def _bytes(self) -> bytes:
        return save({name: tensor.detach().cpu().clone() for name, tensor in self.state_dict().items()})

    @property
    def content_hash(self) -> str:
        """SHA-256 of the settings and all tensors."""
        return hashlib.sha256(json.dumps(self.settings).encode() + self._bytes()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folder `path` with `reward.safetensors` and `reward.json`, each by atomic rename; an earlier model in it is replaced.

        Raises:
            RewardError: the folder cannot be written.
        """
        folder = Path(path)
        text = {
            "format": FORMAT,
            "content_hash": self.content_hash,
            "dtype": str(self.input_mean.dtype).removeprefix("torch."),
            "settings": self.settings,
            "description": self.description,
        }
        make_folder(folder)
        write_atomically(folder / "reward.safetensors", self._bytes())
        write_json(folder / "reward.json", text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RewardEnsemble:
        """Read what `save` wrote, on the CPU.

        Raises:
            RewardError: missing, damaged or mixed-up files.
        """
        folder = Path(path)
        try:
            text = json.loads((folder / "reward.json").read_text())
            if text["format"] != FORMAT:
                raise RewardError(
                    f"{folder}: reward model format {text['format']} is not known to this version; upgrade rlkit2"
                )
            model = cls(**text["settings"], dtype=getattr(torch, text["dtype"]))
            model.load_state_dict(load((folder / "reward.safetensors").read_bytes()))
        except FileNotFoundError as error:
            raise RewardError(f"{folder}: no reward model here; fit one with: rlkit2 prefs fit") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise RewardError(f"{folder}: the reward model's files are damaged ({error}); fit it again") from error
        if model.content_hash != text["content_hash"]:
            raise RewardError(f"{folder}: reward.json and reward.safetensors are from different models; fit it again")
        model.description = text["description"]
        return model
