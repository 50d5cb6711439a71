"""Read the reference vectors of O-DICE into an agent.

The files are outputs of the authors' released update functions on synthetic data (see `tests/data/reference/README.md`).
`RLKIT2_REFERENCE` may point to the full set; the copies beside the tests are a part of it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlkit2.agents import make_config
from rlkit2.agents.odice import ODICE
from rlkit2.data import Batch

ROOT = Path(os.environ.get("RLKIT2_REFERENCE") or Path(__file__).parent / "data" / "reference")


def odice_files() -> list[str]:
    """Names of the update files that are there."""
    return sorted(p.stem for p in ROOT.glob("odice_*.npz") if "ops" not in p.stem)


class ReferenceUpdates:
    """One file of consecutive updates."""

    def __init__(self, name: str) -> None:
        with np.load(ROOT / f"{name}.npz") as file:
            self.arrays = {key: file[key] for key in file.files}
        self.meta: dict[str, Any] = json.loads(str(self.arrays.pop("meta")))
        self.dtype = getattr(torch, self.meta["dtype"])
        self.steps = self.meta["steps"]
        self.heads = ["v1", "v2"] if self.meta["twin"] else ["v"]

    def config(self, **overrides: Any) -> Any:
        """The agent's configuration for this file."""
        meta = self.meta
        hidden = (meta["hidden"],) * meta["n_hidden"]
        fields: dict[str, Any] = {
            "gradient_rule": meta["rule"],
            "divergence": meta["f_name"],
            "lambda_": meta["lambda"],
            "eta": meta["eta"],
            "discount": meta["discount"],
            "num_values": len(self.heads),
            "value_hidden_sizes": hidden,
            "policy_hidden_sizes": hidden,
            "value_layer_norm": meta["layer_norm"],
            "tanh_mean": meta["use_tanh"],
            "value_learning_rate": meta["value_lr"],
            "policy_learning_rate": meta["policy_lr"],
            "policy_weight_decay": meta["weight_decay"],
            "target_update_rate": meta["polyak"],
        }
        return make_config("odice_released", **{**fields, **overrides})

    def agent(self, seeds: int = 1, *, agent_type: type[ODICE] = ODICE, **overrides: Any) -> ODICE:
        """An agent whose every seed starts from the file's parameters."""
        agent = agent_type(
            self.config(**overrides), self.meta["obs_dim"], self.meta["act_dim"], seeds=seeds, dtype=self.dtype
        )
        self.load(agent)
        return agent

    def load(self, agent: ODICE, seed: int | None = None) -> None:
        """Put the file's initial parameters into all seeds, or into one; optimisers start from zero."""
        state = agent.state_dict()
        for name, tensor in {
            **self.value("init/v"),
            **self.value("init/v_target", "value_target"),
            **self.policy("init"),
        }.items():
            state[name][slice(None) if seed is None else slice(seed, seed + 1)] = tensor
        for name in state:
            if name.startswith("optimizer") or name == "step":
                state[name].zero_()
        agent.load_state_dict(state)

    def batch(self, t: int, seeds: int = 1) -> Batch:
        """The minibatch of step t (from 0), the same for every seed."""

        def field(key: str) -> torch.Tensor:
            x = torch.from_numpy(self.arrays[f"batch/{key}"][t])
            return x.expand(seeds, *x.shape)

        terminals = field("terminals")
        return Batch(
            observations=field("observations"),
            actions=field("actions"),
            rewards=field("rewards"),
            next_observations=field("next_observations"),
            terminations=terminals,
            truncations=torch.zeros_like(terminals),
        )

    def trace(self, key: str, t: int) -> torch.Tensor:
        """`trace/key` at step t; per-sample traces always with the head axis."""
        x = torch.as_tensor(self.arrays[f"trace/{key}"][t])
        return x.unsqueeze(0) if x.ndim == 1 else x

    def value(self, where: str, prefix: str = "value") -> dict[str, torch.Tensor]:
        """Parameters of V under `where` (such as `step05/v`) by the agent's names, `[1, M, ...]`."""
        stride = 3 if self.meta["layer_norm"] else 2
        found = {}
        for i in range(self.meta["n_hidden"] + 1):
            last = i == self.meta["n_hidden"]
            found[f"{prefix}.layers.{i}.weight"] = self._heads(where, f"{stride * i}.weight").mT
            found[f"{prefix}.layers.{i}.bias"] = self._heads(where, f"{stride * i}.bias").unsqueeze(-2)
            if self.meta["layer_norm"] and not last:
                for kind in ("weight", "bias"):
                    found[f"{prefix}.norms.{i}.{kind}"] = self._heads(where, f"{stride * i + 1}.{kind}").unsqueeze(-2)
        return found

    def _heads(self, where: str, key: str) -> torch.Tensor:
        return torch.stack([torch.from_numpy(self.arrays[f"{where}/{head}.{key}"]) for head in self.heads]).unsqueeze(0)

    def policy(self, where: str) -> dict[str, torch.Tensor]:
        """Parameters of the policy under `where` (such as `step05`) by the agent's names, `[1, ...]`."""
        found = {"policy.log_std": torch.from_numpy(self.arrays[f"{where}/policy/log_std"]).view(1, 1, -1)}
        for i in range(self.meta["n_hidden"] + 1):
            found[f"policy.layers.{i}.weight"] = torch.from_numpy(
                self.arrays[f"{where}/policy/net.{2 * i}.weight"]
            ).mT.unsqueeze(0)
            found[f"policy.layers.{i}.bias"] = torch.from_numpy(self.arrays[f"{where}/policy/net.{2 * i}.bias"]).view(
                1, 1, -1
            )
        return found

    def flatten_value(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Gradient parts `[S, M, ...]` in the file's order: `[S, P]`, head by head, weights as [out, in]."""
        flat = [part.mT.flatten(2) for part in parts]
        return torch.cat(flat, 2).flatten(1)
