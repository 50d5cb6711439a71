"""Where metrics go besides the files of the run: TensorBoard, Weights & Biases, trackio; each imported only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlkit2.errors import ConfigError, require

if TYPE_CHECKING:
    from rlkit2.training.run import Run


class Logger(Protocol):
    """Receives what is written to the files of a run."""

    def log(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Lines of one step: `step`, `seed` and named numbers."""

    def close(self) -> None:
        """Called once, when training ends for whatever reason."""


class TensorBoardLogger:
    """Event files in `tensorboard/seed-N`; steps after a resumed checkpoint replace those written before the kill."""

    def __init__(self, run: Run, first_step: int) -> None:
        self._writer_class = require("torch.utils.tensorboard", extra="tensorboard").SummaryWriter
        self._folder: Path = run.path / "tensorboard"
        self._first_step = first_step
        self._writers: dict[int, Any] = {}

    def log(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write scalars, one writer a seed."""
        for line in lines:
            seed = line["seed"]
            if seed not in self._writers:
                self._writers[seed] = self._writer_class(
                    str(self._folder / f"seed-{seed}"), purge_step=self._first_step + 1
                )
            for name, value in _numbers(line).items():
                self._writers[seed].add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Flush the event files."""
        for writer in self._writers.values():
            writer.close()


class TrackerLogger:
    """Weights & Biases, or trackio, which has the same interface: one remote or offline run, metrics prefixed by seed."""

    def __init__(self, module: str, run: Run, first_step: int) -> None:
        tracker = require(module, extra=module)
        name, options = run.path.name, {"resume": "allow"}
        if module == "trackio":  # knows runs by their names
            name = f"{name}-{run.id[:8]}"
        else:
            options |= {"id": run.id, "dir": str(run.path)}
        self._tracker = tracker.init(project="rlkit2", name=name, config=dict(run.config), **options)

    def log(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Send all seeds of a step in one call."""
        for step in dict.fromkeys(line["step"] for line in lines):
            values = {
                f"seed{line['seed']}/{name}": value
                for line in lines
                if line["step"] == step
                for name, value in _numbers(line).items()
            }
            self._tracker.log(values, step=step)

    def close(self) -> None:
        """Finish the tracker's run."""
        self._tracker.finish()


LOGGERS: dict[str, Callable[[Run, int], Logger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": lambda run, first_step: TrackerLogger("wandb", run, first_step),
    "trackio": lambda run, first_step: TrackerLogger("trackio", run, first_step),
}


def check_names(names: Sequence[str]) -> None:
    """Raise `ConfigError` for an unknown name."""
    for name in names:
        if name not in LOGGERS:
            raise ConfigError(f"unknown logger {name!r}; there are {', '.join(LOGGERS)}")


def check_loggers(names: Sequence[str]) -> None:
    """Raise `ConfigError` for an unknown name, `MissingExtraError` for a tool that is not installed."""
    check_names(names)
    for name in names:
        require(name, extra=name)


def make_loggers(names: Sequence[str], run: Run) -> list[Logger]:
    """Loggers by name, ready for the steps after the run's newest checkpoint."""
    first = run.checkpoint().step if names and run.checkpoints else 0
    return [LOGGERS[name](run, first) for name in names]


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name not in ("step", "seed")}
