"""A run: a folder that says what was trained, on what, how, and what came out."""

from __future__ import annotations

import csv
import io
import os
import platform
import re
import shlex
import subprocess
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit2.data.folders import new_folder
from rlkit2.errors import RLKitError, RunError, first_line
from rlkit2.files import write_atomically, write_json, writing
from rlkit2.training.checkpoints import Checkpoint, checkpoint_paths, load_checkpoint, newest_checkpoint
from rlkit2.training.ownership import Owner, is_owned, owned
from rlkit2.training.run_files import read_json, read_json_lines
from rlkit2.training.schemas import check_config, check_evaluation, check_manifest, check_metrics

if TYPE_CHECKING:
    from rlkit2.agents.base import Agent
    from rlkit2.nn.policy import Policy

PACKAGES = ("rlkit2", "torch", "numpy", "gymnasium", "minari", "safetensors")


class RunWarning(UserWarning):
    """A run can be resumed, but not as it was begun."""


class DamageWarning(UserWarning):
    """A file of a run is damaged, and something else was taken in its place."""


class Run:
    """The folder of one training run.

    `config.json` (what to do), `manifest.json` (where, when and with what it was done), `metrics.jsonl` and `metrics.csv`,
    `evaluations.jsonl`, `checkpoints/`, `policy/`.

    Args:
        path: the folder.

    Raises:
        RunError: the folder is not a run, or is damaged.
    """

    step: int | None = None  # whose agent and policy are meant; None: the newest

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            what = "holds no config.json, so it is not the folder of a run" if self.path.is_dir() else "does not exist"
            if self.path.is_file():
                what = "is a file, not the folder of a run"
            raise RunError(f"{self.path} {what}; runs are the folders that `rlkit2 train` writes below runs/")
        self.config = read_json(self.path / "config.json", check_config)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @classmethod
    def create(cls, out: str | os.PathLike[str], name: str, config: Mapping[str, Any]) -> Run:
        """Make a new folder `out/name-001` (or the next free number) and write its config and manifest.

        Raises:
            RunError: the folder cannot be written.
        """
        out = Path(out)
        slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            number = 1 + max(
                (
                    int(match[1])
                    for path in out.iterdir()
                    if (match := re.fullmatch(rf"{re.escape(slug)}-(\d+)", path.name))
                ),
                default=0,
            )
            while True:  # a rename decides between processes that start together, and a kill leaves no half of a run
                path = out / f"{slug}-{number:03d}"
                try:
                    with new_folder(path, out) as new:
                        write_json(new / "manifest.json", {"id": uuid.uuid4().hex, "status": "created", "starts": []})
                        write_json(new / "config.json", config)
                    return cls(path)
                except FileExistsError:
                    number += 1

    @property
    def resume_command(self) -> str:
        """The command line that trains on from the newest checkpoint; Python for an agent of the script or notebook that runs."""
        if ":" in self.config["agent"] and "agent_source" not in self.config:
            return (
                f"rlkit2.train(resume={str(self.path)!r}), where {self.config['agent'].rpartition(':')[2]} is defined"
            )
        own = [self.config["agent_source"]] if "agent_source" in self.config else []
        env = self.config.get("env") or ""
        named = ["--env", env] if ":" in env else []  # what a file names is not imported
        return shlex.join(["rlkit2", "train", *own, "--resume", str(self.path), *named])

    @property
    def manifest(self) -> dict[str, Any]:
        """Status, times, versions, platform, dataset, seeds and commands, as last written."""
        return read_json(self.path / "manifest.json", check_manifest)

    @property
    def id(self) -> str:
        """32 hexadecimal digits that no other run has, wherever its folder is and whatever it is called."""
        found = self.manifest.get("id")
        if found is None:  # of a run from before there were any
            found = uuid.uuid4().hex
            self.update_manifest(id=found)
        return str(found)

    @property
    def status(self) -> str:
        """`created`, `running`, `interrupted`, `finished`, `failed` (every seed stopped), or `died`: killed, or ended by an error (`error` in the
        manifest), and to be resumed."""
        status = str(self.manifest.get("status", "created"))
        return "died" if status == "running" and not is_owned(self.path) else status

    def update_manifest(self, **changes: Any) -> None:
        """Change entries of the manifest."""
        write_json(self.path / "manifest.json", {**self.manifest, **changes})

    def rewrite(self, config: Mapping[str, Any]) -> None:
        """Replace the config (a run that is prolonged)."""
        write_json(self.path / "config.json", config)
        self.config = dict(config)

    def metrics(self) -> list[dict[str, Any]]:
        """One dict per seed and log step: `step`, `seed`, and the mean of every metric since the log step before."""
        return read_json_lines(self.path / "metrics.jsonl", check_metrics)

    def evaluations(self) -> list[dict[str, Any]]:
        """One dict per seed and evaluation: `step`, `seed`, `returns`, `lengths`, `normalized_scores`, `deterministic`."""
        return read_json_lines(self.path / "evaluations.jsonl", check_evaluation)

    @property
    def checkpoints(self) -> dict[int, Path]:
        """Step -> folder of the complete checkpoints, oldest first."""
        return checkpoint_paths(self.path / "checkpoints")

    def checkpoint(self, step: int | None = None) -> Checkpoint:
        """The newest checkpoint that is whole (a warning names damaged newer ones), or that of `step`.

        Raises:
            RunError: there is none, or that of `step` is damaged.
        """
        if step is None:
            found, damaged = newest_checkpoint(self.path / "checkpoints")
            for text in damaged.values():
                warnings.warn(
                    f"{text.partition(';')[0]}; taking the one of step {found.step}", DamageWarning, stacklevel=2
                )
            return found
        return load_checkpoint(self._require(step))

    def _require(self, step: int) -> Path:
        paths = self.checkpoints
        if step not in paths:
            raise RunError(f"{self.path} has no checkpoint of step {step}; steps there are: {list(paths) or 'none'}")
        return paths[step]

    def at(self, step: int) -> Run:
        """The same run with `agent` and `policy` as they were at the checkpoint of `step`.

        Raises:
            RunError: there is none.
        """
        self._require(step)
        twin = Run(self.path)
        twin.step = step
        return twin

    @property
    def label(self) -> str:
        """What tables call it: the folder's name, and the step where one is meant."""
        return self.path.name if self.step is None else f"{self.path.name} at {self.step}"

    def load_agent(self, step: int | None = None) -> Agent:
        """The agent with all its seeds, on the CPU, as it was at a checkpoint (default: the newest).

        Raises:
            RunError: there is no such checkpoint.
        """
        from rlkit2.training.building import agent_factory

        checkpoint = self.checkpoint(step)
        agent = agent_factory(self.config)(self.config["seeds"], "cpu")
        with fitting(checkpoint, self.path):
            agent.load_state_dict(agent_state(checkpoint))
        return agent

    @property
    def agent(self) -> Agent:
        """The agent of the newest checkpoint, or of the one meant (`at`), on the CPU."""
        return self.load_agent(self.step)

    @property
    def policy(self) -> Policy:
        """The policy of all seeds: from `policy/` where training ended or was interrupted, else from the newest checkpoint; see also `at`."""
        if self.step is not None:
            return self.agent.policy
        from rlkit2.agents.policy_interface import with_interface
        from rlkit2.nn.policy import PolicyMissingError, load_policy

        try:
            policy = with_interface(load_policy(self.path / "policy"))
            if policy.metadata.get("step") == max(self.checkpoints, default=policy.metadata.get("step")):
                return policy
        except PolicyMissingError:  # killed before the first one was written
            pass
        except RunError as error:  # killed while it was, or damaged since
            if not self.checkpoints:
                raise
            warnings.warn(f"{error}; taking that of the newest checkpoint", DamageWarning, stacklevel=2)
        return self.agent.policy

    def write_csv(self) -> None:
        """Write `metrics.csv` from `metrics.jsonl`: the same numbers as a table, empty where a metric is missing."""
        lines = self.metrics()
        columns = {name: None for line in lines for name in line}  # in order of appearance
        text = io.StringIO()
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        write_atomically(self.path / "metrics.csv", text.getvalue())

    def lock(self, say: Callable[[str], None] = lambda text: None) -> AbstractContextManager[Owner]:
        """Hold the run for writing, see `rlkit2.training.ownership.owned`; `say` is told when a dead owner's place is taken.

        Raises:
            RunError: another process trains this run, on this machine or on another one.
        """
        return owned(self.path, say)


@contextmanager
def fitting(checkpoint: Checkpoint, path: Path) -> Iterator[None]:
    """Turn whatever is raised where a checkpoint does not fit its run into one clear `RunError`."""
    try:
        yield
    except (RLKitError, OSError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise RunError(
            f"the checkpoint of step {checkpoint.step} does not fit {path} ({reason}); the run is damaged"
        ) from error


def agent_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """The agent's part of a checkpoint."""
    return {
        name.removeprefix("agent."): tensor for name, tensor in checkpoint.tensors.items() if name.startswith("agent.")
    }


def group_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint keeps of the groups of seeds besides their agents."""
    return {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if not name.startswith("agent.") and name != "metrics"
    }


def describe_start(device: str) -> dict[str, Any]:
    """What a manifest says about one start of the training: when, where, with which versions, by which command."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "device": device,
        "git": _git_state(),
    }


def _git_state() -> dict[str, Any] | None:
    """Commit of the working directory and whether it has changes; None outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None
