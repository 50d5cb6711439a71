"""rlkit2: offline reinforcement learning and reward learning on Minari datasets.

Names load on first use, so `import rlkit2` costs little more than the interpreter's own start.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rlkit2.api import evaluate as evaluate
    from rlkit2.api import export as export
    from rlkit2.api import load_dataset as load_dataset
    from rlkit2.api import load_policy as load_policy
    from rlkit2.api import load_run as load_run
    from rlkit2.api import offline_evaluate as offline_evaluate
    from rlkit2.api import train as train
    from rlkit2.api import train_online as train_online
    from rlkit2.deploy import pull as pull
    from rlkit2.deploy import push as push

_LAZY = {
    **dict.fromkeys(
        ("load_dataset", "train", "train_online", "evaluate", "export", "load_run", "load_policy", "offline_evaluate"),
        "rlkit2.api",
    ),
    **dict.fromkeys(("push", "pull"), "rlkit2.deploy"),
}
_MODULES = (
    "agents",
    "data",
    "deploy",
    "envs",
    "evaluation",
    "losses",
    "nn",
    "online",
    "preferences",
    "reporting",
    "rewards",
    "studies",
    "sweeps",
    "training",
)

__all__ = [
    "__version__",
    "evaluate",
    "export",
    "load_dataset",
    "load_policy",
    "load_run",
    "offline_evaluate",
    "pull",
    "push",
    "train",
    "train_online",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"rlkit2.{name}")
    raise AttributeError(f"module 'rlkit2' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_MODULES})
