"""`rlkit2 doctor`: versions, optional parts, devices, dataset roots and write access of this installation."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tyro.conf import FlagCreatePairsOff

from rlkit2.cli import output
from rlkit2.cli.parsing import command
from rlkit2.data.cache import cache_folder
from rlkit2.data.folders import minari_root
from rlkit2.data.load import local_datasets
from rlkit2.envs.builtin import builtin_recipes, data_root
from rlkit2.errors import first_line
from rlkit2.nn.matmul import onednn_is_better

# distribution -> module
NEEDED = {
    "torch": "torch",
    "numpy": "numpy",
    "scipy": "scipy",
    "gymnasium": "gymnasium",
    "minari": "minari",
    "h5py": "h5py",
    "pyarrow": "pyarrow",
    "safetensors": "safetensors",
    "tyro": "tyro",
    "rich": "rich",
    "matplotlib": "matplotlib",
}
# extra -> (distribution, module, what for)
EXTRAS = {
    "mujoco": ("mujoco", "mujoco", "Hopper, HalfCheetah and the other MuJoCo tasks"),
    "robotics": ("gymnasium-robotics", "gymnasium_robotics", "point mazes, AntMaze, Adroit, Kitchen"),
    "box2d": ("box2d", "Box2D", "LunarLander"),
    "tensorboard": ("tensorboard", "tensorboard", "logging"),
    "wandb": ("wandb", "wandb", "logging"),
    "trl": ("trl", "trl", "preference diagnostics of language models"),
    "ray": ("ray", "ray", "sweeps on a Ray cluster"),
    "slurm": ("submitit", "submitit", "sweeps on a Slurm cluster"),
    "trackio": ("trackio", "trackio", "logging"),
    "export": ("onnxruntime", "onnxruntime", "policies as ONNX files"),
    "hub": ("huggingface_hub", "huggingface_hub", "push and pull"),
    "video": ("imageio-ffmpeg", "imageio_ffmpeg", "films of episodes as MP4 (GIF needs nothing)"),
    "label": ("starlette", "starlette", "the labelling page in the browser"),
}


def doctor(*, json: bool = False) -> int:
    """Show versions, optional parts, devices, dataset roots and write access; exit status 1 where something needed is missing.

    Example: rlkit2 doctor --json > installation.json

    Args:
        json: print JSON.
    """
    found = examine()
    out = output.console()
    if json:
        output.print_json(found)
    else:
        _print(out, found)
    return 1 if found["problems"] else 0


def examine() -> dict[str, Any]:
    """Everything the doctor looks at, as JSON values; `problems` are what keeps rlkit2 from working."""
    packages = {name: _package(name, module) for name, module in {"rlkit2": "rlkit2", **NEEDED}.items()}
    extras = {extra: {"version": _extra(name, module), "for": why} for extra, (name, module, why) in EXTRAS.items()}
    folders = {
        "Minari datasets": _folder(minari_root(), "MINARI_DATASETS_PATH", len(local_datasets())),
        "built-in datasets": _folder(
            data_root(), "RLKIT2_DATA", sum((data_root() / name).is_dir() for name in builtin_recipes())
        ),
        "cache": _folder(cache_folder(), "RLKIT2_CACHE", len(list((cache_folder() / "datasets").glob("[!.]*")))),
        "runs (working folder)": _folder(
            Path("runs").absolute(), "--out", len(list(Path("runs").glob("*/manifest.json")))
        ),
    }
    problems = [f"{name} cannot be imported ({found['error']})" for name, found in packages.items() if found["error"]]
    problems += [
        f"{folder['path']} cannot be written; set {folder['set_by']} to a folder that can"
        for name, folder in folders.items()
        if not folder["writable"] and name in ("built-in datasets", "cache")
    ]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "extras": extras,
        "devices": _devices(),
        "folders": folders,
        "problems": problems,
    }


def _package(name: str, module: str) -> dict[str, str | None]:
    """Version of a package without which nothing works, and what importing it says if it fails."""
    try:
        importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - a broken installation raises many kinds
        return {"version": None, "error": first_line(error)}
    return {"version": importlib.metadata.version(name), "error": None}


def _extra(name: str, module: str) -> str | None:
    """Version of an optional package (which is not imported: some take seconds); None where it is not installed."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # the module comes with a distribution of another name
        return "installed"


def _folder(path: Path, variable: str, count: int) -> dict[str, Any]:
    """Whether a file can be made in the folder, or in the closest folder above it that exists."""
    place = next(parent for parent in (path, *path.parents) if parent.is_dir())
    try:
        with tempfile.TemporaryFile(dir=place):
            writable = True
    except OSError:
        writable = False
    return {"path": str(path), "exists": path.is_dir(), "writable": writable, "entries": count, "set_by": variable}


def _devices() -> list[dict[str, Any]]:
    threads = os.environ.get("OMP_NUM_THREADS")
    cpu = {
        "device": "cpu",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    library = "oneDNN (large ones)" if onednn_is_better() else "torch's default"
    facts = {"torch_threads": torch.get_num_threads(), "OMP_NUM_THREADS": threads, "matmul": library}
    devices: list[dict[str, Any]] = [cpu | facts]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {"device": f"cuda:{index}", "name": properties.name, "gigabytes": round(properties.total_memory / 2**30, 1)}
        )
    return devices


def _print(out: Console, found: dict[str, Any]) -> None:
    out.print(f"Python {found['python']}, {found['platform']}")
    out.print(", ".join(f"{name} {entry['version'] or '?'}" for name, entry in found["packages"].items()))
    for device in found["devices"]:
        facts = ", ".join(f"{key} {value}" for key, value in device.items() if key != "device" and value is not None)
        out.print(f"{device['device']}: {facts}")
    extras = Table(
        "extra", "installed", "for", box=None, pad_edge=False, title="\noptional parts", title_justify="left"
    )
    for extra, entry in found["extras"].items():
        missing = f"pip install 'rlkit2\\[{extra}]'"
        extras.add_row(extra, entry["version"] or missing, entry["for"])
    out.print(extras)
    folders = Table(
        "folder",
        "path",
        "writable",
        "entries",
        "set by",
        box=None,
        pad_edge=False,
        title="\nfolders",
        title_justify="left",
    )
    for name, entry in found["folders"].items():
        folders.add_row(
            name, entry["path"], "yes" if entry["writable"] else "[red]no", str(entry["entries"]), entry["set_by"]
        )
    out.print(folders)
    out.print()
    for problem in found["problems"]:
        out.print(f"[bold red]problem[/] {problem}")
    out.print(f"{len(found['problems']) or 'no'} problem{'' if len(found['problems']) == 1 else 's'}")


def run(arguments: Sequence[str]) -> int | None:
    """Entry of the command line."""
    return command(doctor, arguments, prog="rlkit2 doctor", config=(FlagCreatePairsOff,))
