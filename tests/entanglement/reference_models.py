"""The reference vectors of preference gradients, and the models they were computed with."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from rlkit2.studies.toy_language import SmallGPT
from tests.reference import ROOT


class Vectors:
    """One `preferences_*.npz` with its model in float64."""

    def __init__(self, kind: str) -> None:
        path = ROOT / f"preferences_{kind}.npz"
        if not path.is_file():
            pytest.skip(f"{path.name} is not among the vectors; set RLKIT2_REFERENCE to the full set")
        with np.load(path) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.meta: dict[str, Any] = json.loads(str(self["meta/json"]))
        self.weights = {k[8:]: torch.tensor(v) for k, v in self.arrays.items() if k.startswith("weights/")}

    def __getitem__(self, key: str) -> Any:
        return self.arrays[key]

    def tensor(self, key: str) -> torch.Tensor:
        return torch.tensor(self.arrays[key])

    @property
    def batch(self) -> dict[str, torch.Tensor]:
        names = ("input_ids", "attention_mask", "completion_mask")
        return {f"{name}_{side}": self.tensor(f"{name}_{side}") for name in names for side in "wl"}

    def small_gpt(self) -> SmallGPT:
        """The GPT-2 weights in our own model: transformers keeps linear weights as [in, out]."""
        config = self.meta["config"]
        model = SmallGPT(
            config["vocab_size"],
            width=config["n_embd"],
            layers=config["n_layer"],
            heads=config["n_head"],
            positions=config["n_positions"],
        ).double()
        linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        state = {name: w.mT if name.endswith(linear) else w for name, w in self.weights.items()}
        state = {name: w for name, w in state.items() if name in model.state_dict()}
        model.load_state_dict(state)
        return model.eval()

    def transformers_model(self) -> torch.nn.Module:
        """The model of transformers itself."""
        transformers = pytest.importorskip("transformers")
        config = {k: v for k, v in self.meta["config"].items() if k != "architectures"}
        kind = transformers.GPT2Config if config["model_type"] == "gpt2" else transformers.LlamaConfig
        model = transformers.AutoModelForCausalLM.from_config(kind(**config), attn_implementation="eager").double()
        model.load_state_dict(self.weights, strict=False)
        return model.eval()
