"""`import rlkit2` is quick because heavy parts wait for their first use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SHOW = "import json, sys; {}; print(json.dumps(sorted(sys.modules)))"
# What `import torch` itself brings does not count against `load_dataset`; all of it counts against `import rlkit2`.
HEAVY = (
    "torch._dynamo",
    "torch._inductor",
    "matplotlib",
    "scipy.optimize",
    "scipy.signal",
    "sympy",
    "scipy.stats",
    "pandas",
    "mujoco",
    "gymnasium_robotics",
    "transformers",
    "trl",
    "tyro",
    "wandb",
    "ray",
)
NEVER_AT_ONCE = ("torch", "rich", "numpy", "minari", "gymnasium", "h5py", "safetensors")


def modules(statement: str) -> set[str]:
    """Modules of a fresh interpreter after `statement`."""
    command = [sys.executable, "-c", SHOW.format(statement)]
    return set(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def test_import_rlkit2_imports_nothing_heavy() -> None:
    assert modules("import rlkit2").isdisjoint({*HEAVY, *NEVER_AT_ONCE})


TRAIN = """
import numpy as np, rlkit2
from rlkit2.data import dataset_from_arrays
rows, flags = np.zeros((8, 1), np.float32), np.arange(8) == 7
data = dataset_from_arrays(rows, rows, rows[:, 0], rows, flags & False, flags)
rlkit2.train("odice", data, steps=2, batch_size=4, out="runs", progress=False)
"""


def test_training_needs_no_compiler_no_plots_and_no_simulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them takes as long to import as torch, in every process that trains."""
    monkeypatch.chdir(tmp_path)
    loaded = modules(f"exec({TRAIN!r})")
    assert {"torch", "rlkit2.training.trainer", "rlkit2.agents.odice"} <= loaded
    assert loaded.isdisjoint(HEAVY)


@pytest.mark.parametrize("name", ["load_dataset", "train", "evaluate", "load_run", "load_policy"])
def test_the_names_at_the_top_are_there(name: str) -> None:
    import rlkit2

    assert callable(getattr(rlkit2, name))
    assert name in dir(rlkit2)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rlkit2.nothing
